"""A run as it goes, told to what people watch runs with: TensorBoard, MLflow, Weights & Biases.

All are told the same, by the same names::

    train/loss, accuracy, lr, grad_norm, samples_per_second     every step
    test/loss, accuracy                                         every evaluation
    gradients/y_0000, …     ‖∂loss/∂y_j‖, of 33 states at most  every epoch
    time/compute, send, wait    ms a step, the agents' mean     every epoch
    topology, gradients, times, confusion                       figures

Of numbers to predict, `rmse` and `r2` stand in the place of `accuracy`.

MLflow and W&B are their own packages, by their public clients: `pip install "hdnn_dist[mlflow]"`,
`"hdnn_dist[wandb]"`. Where they send what they are told, and as whom, they find out for themselves
(`MLFLOW_TRACKING_URI`, `WANDB_MODE`, …).
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.image import imread

from hdnn_dist import drawing, figures
from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.checkpoint import write_json
from hdnn_dist.data import classes_of
from hdnn_dist.errors import UserError, on_a_line
from hdnn_dist.figures import Chart
from hdnn_dist.job import Job
from hdnn_dist.reader import dump_spec
from hdnn_dist.storage import MAX_TEXT, Where, kind, place, read
from hdnn_dist.trainer import Listener, Progress, Runner, Summary
from hdnn_dist.worker import Times

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("hdnn_dist")
STATES = 33  # whose gradients are told
IDLE = 20.0  # times as long as figures take to draw, there are no new ones


class Tracker(Listener):
    """Names what is told; a tool says how it keeps numbers and figures.

    Args:
        figures: whether figures are drawn. They take a twentieth of a run's time at most, so that
            not every evaluation has them; the last one does.
    """

    def __init__(self, figures: bool = True) -> None:
        self.figures = figures

    def started(self, runner: Runner, step: int) -> None:
        """See `Listener`; so too below."""
        self._job, self._norms = runner.job, list[tuple[int, Sequence[float]]]()
        self._waiting: dict[str, Callable[[], Chart]] = {}
        self._not_before = 0.0
        self.begin(runner.job, step)
        if len(runner.job.topology.agents) <= drawing.DRAWN:
            self._waiting["topology"] = lambda: drawing.topology(runner.job, None)
        self._draw(step)

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:  # noqa: D102
        for result in results:
            told = {"train/loss": result.loss, "train/lr": result.lr}
            told |= {f"train/{name}": score for name, score in result.scores.items()}
            if result.grad_norm is not None:
                told["train/grad_norm"] = result.grad_norm
            if result is results[-1]:
                told["train/samples_per_second"] = progress.samples_per_second
            self.numbers(result.step, told)

    def differentiated(self, step: int, epoch: int, norms: Sequence[float]) -> None:  # noqa: D102
        chosen = np.unique(np.linspace(0, len(norms) - 1, STATES).round().astype(int))
        self.numbers(step, {f"gradients/y_{j:04}": norms[j] for j in chosen})
        self._norms.append((epoch, norms))
        self._waiting["gradients"] = lambda: figures.gradients("gradients", self._norms)

    def timed(self, step: int, times: Sequence[Times]) -> None:  # noqa: D102
        # Of copies, the first one's actors.
        split: dict[str, tuple[float, float, float]] = {}
        for own in times:
            for agent, seconds in zip(own.agents, own.a_step(), strict=True):
                split.setdefault(agent, seconds)
        mean = 1e3 * np.mean(list(split.values()), 0)
        parts = zip(figures.PARTS, mean.tolist(), strict=True)
        self.numbers(step, {f"time/{part}": ms for part, ms in parts})
        self._waiting["times"] = lambda: figures.times("times", [*split], [*split.values()])

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:  # noqa: D102
        told = {f"test/{name}": score for name, score in evaluation.scores.items()}
        self.numbers(step, {"test/loss": evaluation.loss, **told})
        if counts := evaluation.confusion:
            classes = classes_of(self._job.spec.data)
            self._waiting["confusion"] = lambda: figures.confusion(
                "confusion", np.array(counts), classes
            )
        self._draw(step)

    def ended(self, summary: Summary) -> None:  # noqa: D102
        self._not_before = 0.0
        self._draw(summary.steps)

    def _draw(self, step: int) -> None:
        """Draw what is new, if there is time for it."""
        start = time.perf_counter()
        if not self.figures or start < self._not_before:
            return
        for draw in self._waiting.values():
            self.figure(step, draw())
        self._waiting.clear()
        end = time.perf_counter()
        self._not_before = end + IDLE * (end - start)

    def begin(self, job: Job, step: int) -> None:
        """Open the tool's own run, or go on with it after `step` steps; again after a loss."""
        raise NotImplementedError

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers by name, of a step."""
        raise NotImplementedError

    def figure(self, step: int, chart: Chart) -> None:
        """Keep a figure, of a step."""
        raise NotImplementedError


def _pixels(chart: Chart) -> Any:
    """A chart as `(height, width, 3)` bytes."""
    return (255 * imread(io.BytesIO(chart.png))[..., :3]).round().astype(np.uint8)


# --- TensorBoard ---------------------------------------------------------------------------------


class TensorBoard(Tracker):
    """Writes TensorBoard events: `tensorboard --logdir RUN`.

    Args:
        run: the run directory, a local one: TensorBoard's writer appends to its files.
        figures: as for `Tracker`.
    """

    def __init__(self, run: str | Path, figures: bool = False) -> None:
        super().__init__(figures)
        self.folder = Path(run) / "tensorboard"
        self._writer: SummaryWriter | None = None

    def begin(self, job: Job, step: int) -> None:
        """See `Tracker`; so too below."""
        self.close()
        # Imported here: it takes a second that runs without TensorBoard need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        # Events past the checkpoint, if any, are of steps that will be taken again.
        purge_step = step + 1 if self.folder.exists() else None
        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        self._writer.add_text("spec", f"```\n{dump_spec(job.spec)}```", step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:  # noqa: D102
        assert self._writer is not None, "started() comes first"
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, step: int, chart: Chart) -> None:  # noqa: D102
        assert self._writer is not None, "started() comes first"
        self._writer.add_image(chart.name, _pixels(chart), step, dataformats="HWC")

    def close(self) -> None:  # noqa: D102
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def serve(run: Path) -> str:
    """Start TensorBoard for a run, on this machine alone, until this process ends; its address."""
    from tensorboard import default, program

    server = program.TensorBoard(default.get_plugins())
    where = ["--host", "127.0.0.1", "--port", "0", "--reload_interval", "5"]
    server.configure(["tensorboard", "--logdir", str(run), *where])
    return str(server.launch())


# --- MLflow and Weights & Biases -----------------------------------------------------------------


class _Elsewhere(Tracker):
    """A tool with a client of its own, whose troubles do not end a run.

    The name that the tool gave the run is in `tracking.json`, so that a run that goes on goes on
    there too.
    """

    package: str
    extra: str

    def __init__(self, run: Where) -> None:
        super().__init__()
        self.run = place(run)
        self._lost = False
        try:
            self.client: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise UserError(
                f"{self.package} is to be told of the run, but cannot be imported: {error}",
                f'pip install "hdnn_dist[{self.extra}]"',
            ) from None

    def begin(self, job: Job, step: int) -> None:
        """See `Tracker`; so too below."""
        file = self.run / "tracking.json"
        try:
            known = json.loads(read(file, MAX_TEXT)) if kind(file) else {}
            known[self.extra] = self.open(job, known.get(self.extra))
        except Exception as error:
            raise UserError(
                f"{self.package} takes no run: {on_a_line(str(error))}",
                "set it up by its own variables, or train without it",
            ) from None
        write_json(file, known)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if not self._lost:
            self._tell(lambda: self.keep(step, values))

    def figure(self, step: int, chart: Chart) -> None:
        if not self._lost:
            self._tell(lambda: self.show(step, chart))

    def _tell(self, say: Callable[[], None]) -> None:
        try:
            say()
        except Exception as error:  # whatever a client and its network come to
            self._lost = True
            log.warning("%s is told no more of this run: %s", self.package, on_a_line(str(error)))

    def open(self, job: Job, known: str | None) -> str:
        """Open a run, or the one that is known; its name there."""
        raise NotImplementedError

    def keep(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        raise NotImplementedError

    def show(self, step: int, chart: Chart) -> None:
        """A figure."""
        raise NotImplementedError


class MLflow(_Elsewhere):
    """Tells an MLflow tracking server (`MLFLOW_TRACKING_URI`), in `MLFLOW_EXPERIMENT_NAME`.

    Args:
        run: the run directory.

    Raises:
        UserError: the package is not there.
    """

    package, extra = "mlflow", "mlflow"
    _id, _ends = "", "KILLED"

    def open(self, job: Job, known: str | None) -> str:  # noqa: D102
        self._store = self.client.MlflowClient()
        if known is None:
            wish = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hdnn_dist")
            experiment = self.client.set_experiment(wish)
            made = self._store.create_run(experiment.experiment_id, run_name=str(self.run))
            known = str(made.info.run_id)
            self._store.log_text(known, dump_spec(job.spec), "spec.yaml")
            for key, value in _settings(job).items():
                self._store.log_param(known, key, value)
        else:
            self._store.update_run(known, "RUNNING")
        self._id = known
        return known

    def keep(self, step: int, values: Mapping[str, float]) -> None:  # noqa: D102
        now = int(1e3 * time.time())
        metrics = [
            self.client.entities.Metric(name, value, now, step)
            for name, value in values.items()
            if math.isfinite(value)  # some of its stores take no others
        ]
        self._store.log_batch(self._id, metrics)

    def show(self, step: int, chart: Chart) -> None:  # noqa: D102
        self._store.log_image(self._id, _pixels(chart), key=chart.name, step=step)

    def ended(self, summary: Summary) -> None:  # noqa: D102
        super().ended(summary)
        self._ends = "FINISHED"

    def close(self) -> None:  # noqa: D102
        if self._id:
            self._tell(lambda: self._store.set_terminated(self._id, self._ends))


class WandB(_Elsewhere):
    """Tells Weights & Biases; `WANDB_MODE=offline` keeps it in the run directory, for `wandb sync`.

    Args:
        run: the run directory; one that is no local path has its files where `WANDB_DIR` says.

    Raises:
        UserError: the package is not there.
    """

    package, extra = "wandb", "wandb"
    _run: Any = None

    def open(self, job: Job, known: str | None) -> str:  # noqa: D102
        self.close()
        self._run = self.client.init(
            project=os.environ.get("WANDB_PROJECT", "hdnn_dist"),
            id=known,
            resume="allow" if known else None,
            name=self.run.name,
            dir=self.run if isinstance(self.run, Path) else None,
            config=job.spec.model_dump(mode="json"),
            settings=self.client.Settings(console="off"),  # the terminal is another listener's
        )
        self._run.define_metric("*", step_metric="step")  # a step may be told of twice
        return str(self._run.id)

    def keep(self, step: int, values: Mapping[str, float]) -> None:  # noqa: D102
        self._run.log({"step": step, **values})

    def show(self, step: int, chart: Chart) -> None:  # noqa: D102
        image = self.client.Image(_pixels(chart), caption=chart.alt)
        self._run.log({"step": step, chart.name: image})

    def close(self) -> None:  # noqa: D102
        if self._run is not None:
            self._tell(self._run.finish)
            self._run = None


def _settings(job: Job) -> dict[str, str | float | bool | None]:
    """The spec's plain values by dotted key, but for the topology's lists."""
    found: dict[str, str | float | bool | None] = {}

    def visit(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, held in value.items():
                visit(held, f"{at}.{key}" if at else key)
        elif not isinstance(value, list):
            found[at] = value

    visit(job.spec.model_dump(mode="json"), "")
    return found
