"""The command line. Each command is a few calls of the library.

Exit codes: 0 done; 1 the job failed while running; 2 something the user can mend; 130 interrupted.
torch and ray take seconds to import, so the commands import what they need, when they need it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hdnn_dist import __version__
from hdnn_dist.errors import HdnnError, RunError, UserError
from hdnn_dist.reader import json_schema, read_spec

if TYPE_CHECKING:
    import numpy as np

    from hdnn_dist.job import Job
    from hdnn_dist.trainer import Summary

app = typer.Typer(
    help="Train Hamiltonian deep networks on a graph of agents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Part(StrEnum):
    """Which samples of the data set."""

    test = "test"
    train = "train"


SpecArgument = Annotated[
    Path | None, typer.Argument(metavar="SPEC", help="YAML file; default: the embedded job.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a training run.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. training.epochs=3. Repeats."),
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the MNIST files (data.dir).")
]
Address = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Ray cluster to join; default: start one.")
]
Local = Annotated[bool, typer.Option("--local", help="All agents in this process, without Ray.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
PartOption = Annotated[Part, typer.Option(help="Which samples.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; default: those of this process.
    """
    try:
        app(args=arguments, prog_name="hdnn-dist")
    except HdnnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        if error.filename is None:  # not about a file: a bug of ours
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hdnn-dist {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Train Hamiltonian deep networks on a graph of agents."""


@app.command()
def train(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the new run.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this run instead.")
    ] = None,
    address: Address = None,
    local: Local = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events.")] = True,
) -> None:
    """Train a job, or continue a run."""
    _refuse_both(address, local)
    if resume is not None and (spec is not None or run is not None):
        other = "a SPEC" if spec is not None else "--run"
        raise UserError(
            f"{other} is given with --resume, but a run goes on with its own spec in its own place",
            f"leave {'SPEC' if spec is not None else '--run'} out, or train without --resume",
        )
    changes = _overrides(overrides, data_dir)
    if resume is None:
        job = _load(spec, changes)

    from hdnn_dist.api import fit, launch
    from hdnn_dist.console import view
    from hdnn_dist.run import create, reopen, vacant

    if resume is None:
        run = vacant(job, run)  # before a cluster is started for it
    else:
        job = reopen(resume, changes)
    with closing(launch(job, local=local, address=address)) as runner:
        folder = create(job, run) if resume is None else resume
        try:
            summary = fit(runner, folder, [view(Console())], tensorboard=tensorboard)
        except (KeyboardInterrupt, RunError) as error:
            options = (" --local" if local else "") + (f" --address {address}" if address else "")
            hint = f"continue with: hdnn-dist train --resume {folder}{options}"
            if isinstance(error, RunError):
                print(f"error: {error}\n{hint}", file=sys.stderr)
                raise typer.Exit(1) from None
            print(f"interrupted; {hint}", file=sys.stderr)
            raise typer.Exit(130) from None
    _print_summary(summary)


@app.command("eval")
def evaluate(
    run: RunArgument,
    part: PartOption = Part.test,
    data_dir: DataDir = None,
    overrides: Set = None,
    address: Address = None,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Loss and accuracy of a run's latest checkpoint."""
    _refuse_both(address, local)
    from hdnn_dist.api import open_run

    changes = _overrides(overrides, data_dir)
    with open_run(run, overrides=changes, local=local, address=address) as (runner, step):
        result = runner.evaluate(part.value)
    if as_json:
        print(json.dumps({"part": part.value, "step": step, **asdict(result)}))
    else:
        print(
            f"{part.value} accuracy {result.accuracy:.2%}, loss {result.loss:.4f} "
            f"({result.samples} samples, step {step})"
        )


@app.command()
def predict(
    run: RunArgument,
    part: PartOption = Part.test,
    rows: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE.npy", help="Raw samples instead, one a row."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write here; default: stdout.")
    ] = None,
    data_dir: DataDir = None,
    overrides: Set = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Classes and their probabilities as CSV, by a run's latest checkpoint."""
    _refuse_both(address, local)
    from hdnn_dist.api import open_run
    from hdnn_dist.checkpoint import write_text
    from hdnn_dist.data import load_rows
    from hdnn_dist.run import reopen

    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}", "make it first")
    changes = _overrides(overrides, data_dir)
    if rows is not None:  # a bad file is refused before a cluster is started
        load_rows(reopen(run, changes).spec.data, rows, ())
    with open_run(run, overrides=changes, local=local, address=address) as (runner, _):
        probabilities = runner.predict(part.value if rows is None else rows.absolute())
    if out is None:
        sys.stdout.write(_csv(probabilities))
    else:
        write_text(out, _csv(probabilities))


def _csv(probabilities: np.ndarray) -> str:
    """A line a sample: its index, the likeliest class, its probability, and those of all."""
    header = ["index", "class", "probability", *(f"p{c}" for c in range(probabilities.shape[1]))]
    lines = [",".join(header)]
    for k, row in enumerate(probabilities):
        best = row.argmax()
        lines.append(",".join([f"{k}", f"{best}", *(f"{p:.6g}" for p in (row[best], *row))]))
    return "\n".join(lines) + "\n"


@app.command()
def check(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a job would do, and run nothing."""
    job = _load(spec, _overrides(overrides, data_dir))

    from hdnn_dist.check import examine, render, this_machine

    address = address or job.spec.cluster.address
    if address is None:
        nodes = [this_machine()]
    else:
        from hdnn_dist.cluster import cluster_nodes

        nodes = cluster_nodes(address)
    report = examine(job, nodes)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        Console().print(render(report))


@app.command()
def schema() -> None:
    """The JSON Schema of a spec, for editors."""
    print(json.dumps(json_schema(), indent=2))


def _print_summary(summary: Summary) -> None:
    from hdnn_dist.console import duration, size

    print(
        f"test accuracy {summary.test_accuracy:.2%}, loss {summary.test_loss:.4f}; "
        f"{summary.epochs} epochs in {duration(summary.seconds)}, "
        f"{summary.samples_per_second:,.0f} samples/s, {size(summary.bytes_sent)} sent\n"
        f"run: {summary.run}"
    )


def _load(spec: Path | None, overrides: Sequence[str]) -> Job:
    written, source = read_spec(spec, overrides)  # a bad spec is refused before torch is imported
    from hdnn_dist.job import Job

    return Job.of(written, base=spec.parent if spec else None, source=source)


def _overrides(overrides: Sequence[str] | None, data_dir: Path | None) -> list[str]:
    """Those of --set and then that of --data-dir, absolute as actors work elsewhere."""
    folder = [] if data_dir is None else [f"data.dir={json.dumps(str(data_dir.absolute()))}"]
    return [*(overrides or ()), *folder]


def _refuse_both(address: str | None, local: bool) -> None:
    if local and address is not None:
        raise UserError(
            "--local and --address are both given, but a local run joins no cluster",
            "leave one of them out",
        )
