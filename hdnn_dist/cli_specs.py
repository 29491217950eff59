"""Commands that need no run: of specs, and of the machine and the method that they rest on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hdnn_dist.cli_exits import tidy_up_from_here
from hdnn_dist.cli_options import (
    Address,
    AsJson,
    DataDir,
    Set,
    SpecArgument,
    changes_of,
    load_job,
)
from hdnn_dist.errors import UserError


def check(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    address: Address = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `calibrate` wrote, to predict the time of a step by; default: where it "
            "writes.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a job would do, and run nothing."""
    job = load_job(spec, changes_of(overrides, data_dir))

    from hdnn_dist.cost import calibration_file, read_calibration

    file = calibration or calibration_file()
    measured = read_calibration(file) if calibration or file.exists() else None

    from hdnn_dist.check import examine, this_machine
    from hdnn_dist.check_tables import render
    from hdnn_dist.checkpoint import to_json
    from hdnn_dist.placement import address_of

    address = address_of(job.spec.cluster, address)
    if address is None:
        nodes = [this_machine()]
    else:
        from hdnn_dist.joining import cluster_nodes

        tidy_up_from_here()
        nodes = cluster_nodes(address)
    report = examine(job, nodes, measured)
    if as_json:
        print(to_json(asdict(report), indent=2))
    else:
        Console().print(render(report))


def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write here; default: hdnn_dist/calibration.json in $XDG_CACHE_HOME or ~/.cache.",
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, and a cluster's messages, for `check` to predict times by."""
    from hdnn_dist.calibrate import calibrate
    from hdnn_dist.checkpoint import to_json, write_json
    from hdnn_dist.cost import calibration_file

    tidy_up_from_here()
    found = asdict(calibrate(address, lambda what: print(f"measuring {what}", file=sys.stderr)))
    file = out or calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    if as_json:
        print(to_json(found))
        return
    for name, value in found.items():
        print(f"{name:10} {value:.3g}" if isinstance(value, float) else f"{name:10} {value}")
    print(file)


def draw(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="A .png or .svg file to write.")
    ] = "topology.png",
) -> None:
    """Draw who talks to whom, how much, and what each agent sees; run nothing.

    Colours are the actors in which this machine alone would place the agents.
    """
    if not out.lower().endswith((".png", ".svg")):
        raise UserError(f"--out: {out} is neither a .png nor an .svg file", "name one of these")
    job = load_job(spec, changes_of(overrides, data_dir))

    from hdnn_dist.check import examine, this_machine
    from hdnn_dist.drawing import topology
    from hdnn_dist.run import check_can_be_made
    from hdnn_dist.storage import place, write

    file = place(out)
    check_can_be_made(file.parent, "--out")
    report = examine(job, [this_machine()])
    chart = topology(job, [agent.actor for agent in report.agents])
    write(file, chart.svg_file if out.lower().endswith(".svg") else chart.png)
    print(f"{chart.alt}\n{file}")


def counterexample(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Write the figure here.")] = Path(
        "counterexample"
    ),
    as_json: AsJson = False,
) -> None:
    """Exploding gradients: the sensitivity of ẏ = ε J tanh(y) grows with time."""
    from hdnn_dist.analysis import counterexample
    from hdnn_dist.checkpoint import to_json, write_json
    from hdnn_dist.plots import save_counterexample
    from hdnn_dist.run import check_can_be_made

    check_can_be_made(out, "--out")
    found = counterexample()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "counterexample.json", asdict(found))
    figure = save_counterexample(found, out / "counterexample.png")
    if as_json:
        print(to_json(asdict(found)))
        return
    for k in range(0, len(found.t) + 1, len(found.t) // 4):
        t, norm = (0.0, 1.0) if k == 0 else (found.t[k - 1], found.norms[k - 1])
        print(f"t = {t:5.2f}   ‖∂y(T)/∂y(T-t)‖ = {norm:.4f}")
    print(figure)


def schema() -> None:
    """The JSON Schema of a spec, for editors."""
    from hdnn_dist.reader import json_schema

    print(json.dumps(json_schema(), indent=2))
