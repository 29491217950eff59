"""Commands of runs: train one, use it, look into it, take it elsewhere."""

from __future__ import annotations

import csv
import io
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hdnn_dist.cli_exits import interrupt_sets, report_error, tidy_up_from_here
from hdnn_dist.cli_options import (
    Address,
    AsJson,
    DataDir,
    Profile,
    Resume,
    Set,
    SpecArgument,
    changes_of,
    load_job,
    refuse_beside_resume,
)
from hdnn_dist.errors import CheckpointError, HdnnError, UserError

if TYPE_CHECKING:
    import numpy as np

    from hdnn_dist.storage import Place
    from hdnn_dist.trainer import Listener, Summary


class Part(StrEnum):
    """Which samples of the data set."""

    test = "test"
    train = "train"


class Track(StrEnum):
    """What is told of a run, beside its own files."""

    mlflow = "mlflow"
    wandb = "wandb"


class Beside(StrEnum):
    """What a run is compared with."""

    trained = "trained"
    initial = "initial"
    none = "none"


RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Directory of a training run: a path or a URL.")
]
AgentsArgument = Annotated[
    list[str], typer.Argument(metavar="AGENT...", help="Names of agents in the run's spec.")
]
PartOption = Annotated[Part, typer.Option(help="Which samples.")]
Local = Annotated[bool, typer.Option("--local", help="All agents in this process, without Ray.")]


def train(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    run: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory of the new run: a path or a URL.")
    ] = None,
    resume: Resume = None,
    address: Address = None,
    local: Local = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events.")] = True,
    ui: Annotated[
        bool,
        typer.Option("--ui", help="Show it in TensorBoard, on this machine, while it trains."),
    ] = False,
    track: Annotated[
        list[Track] | None, typer.Option(help="Tell it to a tracker as well. Repeats.")
    ] = None,
    profile: Profile = 0,
) -> None:
    """Train a job, or continue a run."""
    _refuse_both(address, local)
    refuse_beside_resume(resume, spec, run)
    changes = changes_of(overrides, data_dir)
    if resume is None:
        job = load_job(spec, changes)

    from hdnn_dist.api import fit, launch
    from hdnn_dist.console import view
    from hdnn_dist.run import check_is_shared, create, finished, reopen, vacant
    from hdnn_dist.storage import place
    from hdnn_dist.trainer import TRACE

    # Before a cluster is started for it.
    folder = vacant(job, run) if resume is None else place(resume)
    if not local:
        check_is_shared(folder)
    if resume is not None:
        job = reopen(folder, changes)
        if (summary := finished(job, folder)) is not None:
            print("nothing to train: all epochs are done (training.epochs sets how many)")
            _print_summary(summary)
            return
    # torch would import these later, when Ctrl-C may come at any line of them.
    if local:
        import torch._dynamo  # for the optimisers
    if tensorboard:
        import torch.utils.tensorboard  # noqa: F401
    told = [view(Console()), *_trackers(folder, track or (), ui=ui)]
    tidy_up_from_here()
    with closing(launch(job, local=local, address=address)) as runner:
        if resume is None:
            create(job, folder)
        options = (" --local" if local else "") + (f" --address {address}" if address else "")
        hint = f"continue with: hdnn-dist train --resume {folder}{options}"
        try:
            with interrupt_sets(threading.Event()) as stop:
                summary = fit(
                    runner,
                    folder,
                    told,
                    tensorboard=tensorboard,
                    stop=stop,
                    profile=profile,
                )
        except KeyboardInterrupt:
            print(f"interrupted; {hint}", file=sys.stderr)
            raise typer.Exit(130) from None
        except CheckpointError:  # it cannot be continued as it is
            raise
        except (HdnnError, OSError) as error:
            code = report_error(error)
            print(hint, file=sys.stderr)
            raise typer.Exit(code) from None
    _print_summary(summary)
    if profile:
        print(f"trace: {folder / TRACE}, for https://ui.perfetto.dev or chrome://tracing")


def _trackers(folder: Place, wanted: Sequence[Track], ui: bool) -> Iterator[Listener]:
    """Who else is told of a run; TensorBoard is started if it is to be shown."""
    if not (wanted or ui):
        return
    from hdnn_dist.tracking import MLflow, TensorBoard, WandB, serve

    kinds = {Track.mlflow: MLflow, Track.wandb: WandB}
    for name in dict.fromkeys(wanted):
        yield kinds[name](folder)
    if ui:
        if not isinstance(folder, Path):
            raise UserError(
                f"--ui shows TensorBoard's events, but {folder} is no local path, and gets none",
                "choose a local --run, or --track",
            )
        print(f"TensorBoard, until this command ends: {serve(folder)}", flush=True)
        yield TensorBoard(folder, figures=True)


def _print_summary(summary: Summary) -> None:
    from hdnn_dist.console import duration, scores, size

    print(
        f"test {', '.join((*scores(summary.test_scores), f'loss {summary.test_loss:.4f}'))}; "
        f"{summary.epochs} epochs in {duration(summary.seconds)}, "
        f"{summary.samples_per_second:,.0f} samples/s, {size(summary.bytes_sent)} sent\n"
        f"run: {summary.run}"
    )


def evaluate(
    run: RunArgument,
    part: PartOption = Part.test,
    data_dir: DataDir = None,
    overrides: Set = None,
    address: Address = None,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Loss and accuracy of a run's latest checkpoint; of targets RMSE and R²."""
    _refuse_both(address, local)
    from hdnn_dist.api import open_run
    from hdnn_dist.checkpoint import to_json
    from hdnn_dist.console import scores

    changes = changes_of(overrides, data_dir)
    tidy_up_from_here()
    with open_run(run, overrides=changes, local=local, address=address) as (runner, step):
        result = runner.evaluate(part.value)
    if as_json:
        told = {"loss": result.loss, **result.scores, "samples": result.samples}
        print(to_json({"part": part.value, "step": step, **told}))
    else:
        print(
            f"{part.value} {', '.join(scores(result.scores))}, loss {result.loss:.4f} "
            f"({result.samples} samples, step {step})"
        )


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
    """Classes and their probabilities, or targets, as CSV, by a run's latest checkpoint."""
    _refuse_both(address, local)
    from hdnn_dist.api import open_run
    from hdnn_dist.checkpoint import write_text
    from hdnn_dist.data import load_rows
    from hdnn_dist.run import reopen

    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}", "make it first")
    if out is not None and out.is_dir():
        raise UserError(f"--out: {out} is a folder", f"name a file, such as {out / 'out.csv'}")
    changes = changes_of(overrides, data_dir)
    if rows is not None:  # a bad file is refused before a cluster is started
        load_rows(reopen(run, changes).spec.data, rows, ())
    tidy_up_from_here()
    with open_run(run, overrides=changes, local=local, address=address) as (runner, _):
        predicted = runner.predict(part.value if rows is None else rows.absolute())
        targets = runner.job.data.targets
    text = _csv_of_targets(predicted, targets) if targets else _csv(predicted)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)


def _csv_of_targets(predicted: np.ndarray, names: Sequence[str]) -> str:
    """A line a sample: its index, and its targets in their units."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["index", *names])
    lines.writerows([k, *(f"{v:.6g}" for v in row)] for k, row in enumerate(predicted))
    return text.getvalue()


def _csv(probabilities: np.ndarray) -> str:
    """A line a sample: its index, the likeliest class, its probability, and those of all."""
    header = ["index", "class", "probability", *(f"p{c}" for c in range(probabilities.shape[1]))]
    lines = [",".join(header)]
    for k, row in enumerate(probabilities):
        best = row.argmax()
        lines.append(",".join([f"{k}", f"{best}", *(f"{p:.6g}" for p in (row[best], *row))]))
    return "\n".join(lines) + "\n"


def drop(run: RunArgument, agents: AgentsArgument) -> None:
    """Have agents leave a run, at its next checkpoint or when it is resumed."""
    _regroup(run, leave=agents)


def join(run: RunArgument, agents: AgentsArgument) -> None:
    """Have agents that left a run join it again, with fresh weights, at its next checkpoint."""
    _regroup(run, join=agents)


def _regroup(run: str, **changes: Sequence[str]) -> None:
    from hdnn_dist.run import regroup

    absent = regroup(run, **changes)
    print(f"absent from the next checkpoint of {run} on: {', '.join(absent) or 'nobody'}")


def analyze(
    run: RunArgument,
    samples: Annotated[int, typer.Option(min=1, help="Of the test set, from its first.")] = 8,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write here; default: RUN/analysis.")
    ] = None,
    baselines: Annotated[
        Beside,
        typer.Option(
            help="An MLP and a ResNet of equal size beside it; to train them takes as long as "
            "the run did in one process."
        ),
    ] = Beside.trained,
    data_dir: DataDir = None,
    overrides: Set = None,
    address: Address = None,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Measure sensitivities, symplecticity, bounds and energy of a run's latest checkpoint."""
    _refuse_both(address, local)
    from hdnn_dist.checkpoint import to_json
    from hdnn_dist.report import analyze, render

    changes = changes_of(overrides, data_dir)
    tidy_up_from_here()
    report = analyze(
        run,
        samples=samples,
        baselines=baselines.value,
        overrides=changes,
        local=local,
        address=address,
        out=out,
    )
    if as_json:
        print(to_json(report))
    else:
        Console().print(render(report))
        print(f"defect: J is {report['J']}; bound: {report['bound']}")
        print("\n".join(report["figures"]))


def write_report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, side by side if there are several.")
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write here; default: RUN/report; of several: ./report."),
    ] = None,
    worst: Annotated[
        int, typer.Option(min=0, max=100, help="Worst-classified samples shown; 0 reads no input.")
    ] = 12,
    bsm: Annotated[bool, typer.Option(help="Measure backward sensitivities.")] = True,
    data_dir: DataDir = None,
    overrides: Set = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Write a run, or several side by side, as one HTML page and PNG files."""
    _refuse_both(address, local)
    from hdnn_dist.page import write_page

    changes = changes_of(overrides, data_dir)
    tidy_up_from_here()
    print(
        write_page(
            runs,
            out=out,
            worst=worst,
            bsm=bsm,
            overrides=changes,
            local=local,
            address=address,
        )
    )


def export(
    run: RunArgument,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write here; default: RUN/export.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="ONNX too; takes the packages onnx and onnxscript.")
    ] = False,
) -> None:
    """Write a run's dense model: a torch.export program, weights by name, and ONNX if asked for.

    All agents' weights are gathered in this process.
    """
    from hdnn_dist.dense import export

    tidy_up_from_here()
    print("\n".join(map(str, export(run, out, onnx=onnx))))


def _refuse_both(address: str | None, local: bool) -> None:
    if local and address is not None:
        raise UserError(
            "--local and --address are both given, but a local run joins no cluster",
            "leave one of them out",
        )
