"""The command line. Each command is a few calls of the library.

Exit codes: 0 done; 1 the job failed while running; 2 something the user can mend; 130 interrupted.
torch and ray take seconds to import, so the commands import what they need, when they need it.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from hdnn_dist import __version__
from hdnn_dist.errors import CheckpointError, HdnnError, RunError, UserError, on_a_line

if TYPE_CHECKING:
    import numpy as np

    from hdnn_dist.job import Job
    from hdnn_dist.storage import Place
    from hdnn_dist.submission import Jobs
    from hdnn_dist.trainer import Listener, Summary


class _Commands(TyperGroup):
    """Says so when Ctrl-C ends a command: typer itself would exit without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
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
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Directory of a training run: a path or a URL.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. training.epochs=3. Repeats."),
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the MNIST files (data.dir).")
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to join; default: cluster.address, then $RAY_ADDRESS, "
        "then a Ray of its own.",
    ),
]
Local = Annotated[bool, typer.Option("--local", help="All agents in this process, without Ray.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Profile = Annotated[
    int,
    typer.Option(
        min=0,
        max=1000,
        metavar="STEPS",
        help="Write RUN/trace.json, which tells for so many steps who did what when.",
    ),
]


class Track(StrEnum):
    """What is told of a run, beside its own files."""

    mlflow = "mlflow"
    wandb = "wandb"


PartOption = Annotated[Part, typer.Option(help="Which samples.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; default: those of this process.
    """
    with _interrupt_ends_at_once():
        try:
            app(args=arguments, prog_name="hdnn-dist")
        except (HdnnError, OSError) as error:
            sys.exit(_report(error))
        except MemoryError as error:
            problem = f"out of memory ({str(error) or 'of Python'})"
            sys.exit(_report(UserError(problem, "take smaller inputs, or a machine with more")))


@contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """Ctrl-C ends the process until `_tidy_up_from_here`: half an import fails in odd ways."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tidy_up_from_here() -> None:
    """From here on there are actors and files to tidy up: Ctrl-C is an exception again."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _interrupt_sets(stop: threading.Event) -> Iterator[threading.Event]:
    """Ctrl-C asks for an end in good order; a second one does not wait for it."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        os.write(2, b"saving a checkpoint; Ctrl-C again ends at once\n")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _report(error: HdnnError | OSError) -> int:
    """Print an error; its exit code, 2 also for a name too long for a file."""
    said = str(error)
    if isinstance(error, OSError):  # a full disk has no file name
        said = ": ".join(str(part) for part in (error.filename, error.strerror) if part) or said
        said = on_a_line(said)
    print(f"error: {said}", file=sys.stderr)
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return 2 if too_long or isinstance(error, UserError) else 1


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
        str | None, typer.Option(metavar="DIR", help="Directory of the new run: a path or a URL.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run instead.")
    ] = None,
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
    _refuse_beside_resume(resume, spec, run)
    changes = _overrides(overrides, data_dir)
    if resume is None:
        job = _load(spec, changes)

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
    _tidy_up_from_here()
    with closing(launch(job, local=local, address=address)) as runner:
        if resume is None:
            create(job, folder)
        options = (" --local" if local else "") + (f" --address {address}" if address else "")
        hint = f"continue with: hdnn-dist train --resume {folder}{options}"
        try:
            with _interrupt_sets(threading.Event()) as stop:
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
            code = _report(error)
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


JobServer = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard."
    ),
]
JOB_SERVER = "http://127.0.0.1:8265"
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="By the name that `submit` told.")]


@app.command()
def submit(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Of the new run: a URL, or a path on all its machines."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run instead.")
    ] = None,
    address: JobServer = JOB_SERVER,
    profile: Profile = 0,
    follow: Annotated[bool, typer.Option(help="Show what it prints until it ends.")] = True,
) -> None:
    """Train a job, or continue a run, on a cluster elsewhere; package and spec are sent there."""
    _refuse_beside_resume(resume, spec, run)
    from hdnn_dist.submission import Jobs, command, elsewhere

    where = elsewhere(run, "--run") if resume is None else elsewhere(resume, "--resume")
    if data_dir is not None:
        elsewhere(data_dir, "--data-dir")
    changes = _overrides(overrides, data_dir)
    if resume is None:
        from hdnn_dist.reader import read_spec

        if (folder := read_spec(spec, changes)[0].data.dir) is not None:
            elsewhere(folder, "data.dir")
        resolved, entry = _load(spec, changes).spec, command(where, profile=profile)
    else:
        resolved, entry = None, command(where, changes, resume=True, profile=profile)
    _tidy_up_from_here()
    jobs = Jobs(address)
    id = jobs.submit(entry, resolved)
    print(f"job {id} on {address}, run {where}", flush=True)
    if follow:
        _follow(jobs, id)
    print(_how_to_go_on(jobs, id))


@app.command()
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Default: all of the cluster's.")
    ] = None,
    address: JobServer = JOB_SERVER,
    as_json: AsJson = False,
) -> None:
    """How the jobs of a cluster stand."""
    from hdnn_dist.submission import Jobs

    jobs = Jobs(address)
    states = jobs.all() if job is None else [jobs.state(job)]
    if as_json:
        print(json.dumps([asdict(state) for state in states], indent=2))
    for state in () if as_json else states:
        code = "" if state.code is None else f" (exit code {state.code})"
        until = f" to {state.ended}" if state.ended else ""
        print(f"{state.id}  {state.status}{code}  {state.started}{until}  {state.command}")


@app.command()
def logs(
    job: JobArgument,
    address: JobServer = JOB_SERVER,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until it ends; then exit with its code.")
    ] = False,
) -> None:
    """What a job has printed."""
    from hdnn_dist.submission import Jobs

    _tidy_up_from_here()
    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    print(jobs.logs(job), end="")


@app.command()
def stop(job: JobArgument, address: JobServer = JOB_SERVER) -> None:
    """Have a job save a checkpoint of this very step and end."""
    from hdnn_dist.submission import Jobs

    state = Jobs(address).stop(job)
    print(f"job {job}: {state.status}")


def _follow(jobs: Jobs, job: str) -> NoReturn:
    """Show what a job prints until it ends, and exit with its code."""
    try:
        state = jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(_how_to_go_on(jobs, job), file=sys.stderr)
        raise typer.Exit(130) from None
    except RunError as error:
        code = _report(error)
        print(_how_to_go_on(jobs, job), file=sys.stderr)
        raise typer.Exit(code) from None
    if state.code is None:  # it never ran, or was stopped
        print(f"job {job}: {state.status}: {on_a_line(state.message or '')}", file=sys.stderr)
    raise typer.Exit(state.exit_code)


def _how_to_go_on(jobs: Jobs, job: str) -> str:
    at = f"{job} --address {jobs.address}"
    return (
        f"job {job} goes on by itself\n"
        f"follow it with: hdnn-dist logs --follow {at}\n"
        f"stop it with: hdnn-dist stop {at}"
    )


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
    """Loss and accuracy of a run's latest checkpoint; of targets RMSE and R²."""
    _refuse_both(address, local)
    from hdnn_dist.api import open_run
    from hdnn_dist.checkpoint import to_json
    from hdnn_dist.console import scores

    changes = _overrides(overrides, data_dir)
    _tidy_up_from_here()
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
    changes = _overrides(overrides, data_dir)
    if rows is not None:  # a bad file is refused before a cluster is started
        load_rows(reopen(run, changes).spec.data, rows, ())
    _tidy_up_from_here()
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


@app.command()
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
    job = _load(spec, _overrides(overrides, data_dir))

    from hdnn_dist.cost import calibration_file, read_calibration

    file = calibration or calibration_file()
    measured = read_calibration(file) if calibration or file.exists() else None

    from hdnn_dist.check import examine, render, this_machine
    from hdnn_dist.checkpoint import to_json
    from hdnn_dist.placement import address_of

    address = address_of(job.spec.cluster, address)
    if address is None:
        nodes = [this_machine()]
    else:
        from hdnn_dist.joining import cluster_nodes

        _tidy_up_from_here()
        nodes = cluster_nodes(address)
    report = examine(job, nodes, measured)
    if as_json:
        print(to_json(asdict(report), indent=2))
    else:
        Console().print(render(report))


@app.command()
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

    _tidy_up_from_here()
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


AgentsArgument = Annotated[
    list[str], typer.Argument(metavar="AGENT...", help="Names of agents in the run's spec.")
]


@app.command()
def drop(run: RunArgument, agents: AgentsArgument) -> None:
    """Have agents leave a run, at its next checkpoint or when it is resumed."""
    _regroup(run, leave=agents)


@app.command()
def join(run: RunArgument, agents: AgentsArgument) -> None:
    """Have agents that left a run join it again, with fresh weights, at its next checkpoint."""
    _regroup(run, join=agents)


def _regroup(run: str, **changes: Sequence[str]) -> None:
    from hdnn_dist.run import regroup

    absent = regroup(run, **changes)
    print(f"absent from the next checkpoint of {run} on: {', '.join(absent) or 'nobody'}")


class Beside(StrEnum):
    """What a run is compared with."""

    trained = "trained"
    initial = "initial"
    none = "none"


@app.command()
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

    changes = _overrides(overrides, data_dir)
    _tidy_up_from_here()
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


@app.command("report")
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

    changes = _overrides(overrides, data_dir)
    _tidy_up_from_here()
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


@app.command()
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

    _tidy_up_from_here()
    print("\n".join(map(str, export(run, out, onnx=onnx))))


topology = typer.Typer(help="Graphs of agents.", no_args_is_help=True)
app.add_typer(topology, name="topology")


@topology.command()
def draw(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .png or .svg file to write.")] = Path(
        "topology.png"
    ),
) -> None:
    """Draw who talks to whom, how much, and what each agent sees; run nothing.

    Colours are the actors in which this machine alone would place the agents.
    """
    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--out: {out} is neither a .png nor an .svg file", "name one of these")
    job = _load(spec, _overrides(overrides, data_dir))

    from hdnn_dist.check import examine, this_machine
    from hdnn_dist.figures import topology
    from hdnn_dist.run import check_can_be_made
    from hdnn_dist.storage import write

    check_can_be_made(out.parent, "--out")
    report = examine(job, [this_machine()])
    chart = topology(job, [agent.actor for agent in report.agents])
    write(out, chart.svg_file if out.suffix == ".svg" else chart.png)
    print(f"{chart.alt}\n{out}")


@app.command()
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


@app.command()
def schema() -> None:
    """The JSON Schema of a spec, for editors."""
    from hdnn_dist.reader import json_schema

    print(json.dumps(json_schema(), indent=2))


def _print_summary(summary: Summary) -> None:
    from hdnn_dist.console import duration, scores, size

    print(
        f"test {', '.join((*scores(summary.test_scores), f'loss {summary.test_loss:.4f}'))}; "
        f"{summary.epochs} epochs in {duration(summary.seconds)}, "
        f"{summary.samples_per_second:,.0f} samples/s, {size(summary.bytes_sent)} sent\n"
        f"run: {summary.run}"
    )


def _load(spec: Path | None, overrides: Sequence[str]) -> Job:
    from hdnn_dist.reader import read_spec

    written, source = read_spec(spec, overrides)  # a bad spec is refused before torch is imported
    from hdnn_dist.job import Job

    return Job.of(written, base=spec.parent if spec else None, source=source)


def _overrides(overrides: Sequence[str] | None, data_dir: Path | None) -> list[str]:
    """Those of --set and then that of --data-dir, absolute as actors work elsewhere."""
    folder = [] if data_dir is None else [f"data.dir={json.dumps(str(data_dir.absolute()))}"]
    return [*(overrides or ()), *folder]


def _refuse_beside_resume(resume: str | None, spec: Path | None, run: str | None) -> None:
    if resume is not None and (spec is not None or run is not None):
        other = "a SPEC" if spec is not None else "--run"
        raise UserError(
            f"{other} is given with --resume, but a run goes on with its own spec in its own place",
            f"leave {'SPEC' if spec is not None else '--run'} out, or train without --resume",
        )


def _refuse_both(address: str | None, local: bool) -> None:
    if local and address is not None:
        raise UserError(
            "--local and --address are both given, but a local run joins no cluster",
            "leave one of them out",
        )
