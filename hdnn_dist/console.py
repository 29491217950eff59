"""A run as seen at the console: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from hdnn_dist.agent import Evaluation, Fault, StepResult
from hdnn_dist.errors import LostError, few
from hdnn_dist.trainer import Listener, Progress, Runner, Summary
from hdnn_dist.worker import Times, slowest

QUIET = 5.0  # seconds between two plain lines, at least
log = logging.getLogger("hdnn_dist")


def view(console: Console) -> Listener:
    """What suits the console."""
    return LiveView(console) if console.is_terminal else PlainView(console)


def size(count: float, unit: str = "B") -> str:
    """A number of bytes for people: "12.3 kB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Seconds for people: "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def scores(found: Mapping[str, float], digits: int = 2) -> tuple[str, ...]:
    """Scores (see `hdnn_dist.agent.scores_of`) for people: "accuracy 97.50%" or "RMSE 0.12"."""
    width = digits + 5
    forms = {
        "accuracy": f"accuracy {{:{width if digits == 1 else ''}.{digits}%}}",
        "rmse": "RMSE {:.4g}",
        "r2": f"R² {{:.{digits + 2}f}}",
    }
    return tuple(forms[name].format(score) for name, score in found.items())


def figures(progress: Progress) -> tuple[str, ...]:
    """Loss, scores and speed, as wide as they were before."""
    return (
        f"loss {progress.loss:.4f}",
        *scores(progress.scores, digits=1),
        f"{progress.samples_per_second:,.0f} samples/s",
    )


def header(runner: Runner, step: int) -> Iterator[str]:
    """What is about to be trained, and where."""
    job = runner.job
    yield f"{job.topology.name} learns {job.data.name}: {runner.describe()}"
    yield (
        f"{job.architecture.patterns.layers} layers, {job.parameters:,} parameters, "
        f"{len(job.plan.training_step)} rounds and {size(job.bytes_per_step)} a step between agents"
    )
    if step:
        yield f"continues after step {step} of {job.steps}"


def verdict(step: int, epoch: int, evaluation: Evaluation) -> str:
    """An evaluation in a line."""
    told = "  ".join(scores(evaluation.scores))
    return f"epoch {epoch:3}  step {step}  test {told}  loss {evaluation.loss:.4f}"


def loss(cause: LostError, restart: int) -> str:
    """What was lost, in two lines."""
    return f"lost: {cause}\nrestart {restart}: agents start anew, from the last checkpoint"


def change(step: int, left: Sequence[str], joined: Sequence[str]) -> str:
    """Who has left and who has joined, in a line."""
    parts = [f"without {', '.join(left)}"] * bool(left)
    parts += [f"with {', '.join(joined)}, at initial weights,"] * bool(joined)
    return f"goes on {' and '.join(parts)} from step {step}"


def waiting(times: Sequence[Times]) -> str | None:
    """For whom the other actors waited in an epoch, in a line; None if for nobody, or not long."""
    busy = [1e3 * (own.total - own.wait) / own.steps for own in times]
    step = max(1e3 * own.total / own.steps for own in times)
    if not (slow := slowest(busy, step)):
        return None
    others = [each for k, each in enumerate(busy) if k not in slow]
    names = few([name for k in slow for name in times[k].agents])
    who = f"actors of {names}: they were" if len(slow) > 1 else f"actor of {names}: it was"
    return (
        f"the others wait for the {who} at work for {max(busy):.3g} ms of a step of {step:.3g} ms, "
        f"and the others for {sum(others) / len(others):.3g} ms on average"
    )


class _View(Listener):
    """Says in the end for whom the others waited in the last epoch.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._times: Sequence[Times] = ()

    def timed(self, step: int, times: Sequence[Times]) -> None:
        """See `Listener`; so too below."""
        self._times = times

    def ended(self, summary: Summary) -> None:
        if self._times and (line := waiting(self._times)) is not None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _TwoRows(Bar):
    """A bar with figures below it, which go on in the next row where a terminal is narrow."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Columns(map(Text, task.fields["figures"]), padding=(0, 2))


class LiveView(_View):
    """A progress bar with the figures of the moment; each evaluation leaves a line above it.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = _TwoRows(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),  # takes what the others leave
            TextColumn("{task.completed}/{task.total}  {task.fields[left]}"),
            console=console,
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None

    def started(self, runner: Runner, step: int) -> None:
        """See `Listener`; so too below."""
        for line in header(runner, step):
            self.console.print(line, highlight=False, markup=False)
        job = runner.job
        self._bytes = job.bytes_per_step
        if self._task is not None:
            self._bar.remove_task(self._task)
        epoch = f"{step // job.steps_per_epoch + 1}/{job.spec.training.epochs}"
        self._task = self._bar.add_task(
            "", total=job.steps, completed=step, epoch=epoch, left="", figures=()
        )
        self._bar.start()

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:  # noqa: D102
        assert self._task is not None, "started() comes first"
        self._bar.update(
            self._task,
            completed=progress.step,
            epoch=f"{progress.epoch}/{progress.epochs}",
            left=f"{duration(progress.seconds_left)} left",
            figures=(*figures(progress), f"{size(self._bytes)}/step"),
        )

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:  # noqa: D102
        self.console.print(verdict(step, epoch, evaluation), highlight=False)

    def skipped(self, fault: Fault) -> None:  # noqa: D102
        self.console.print(f"skipped {fault}", highlight=False, markup=False)

    def lost(self, cause: LostError, restart: int) -> None:  # noqa: D102
        self.console.print(loss(cause, restart), highlight=False, markup=False)

    def regrouped(  # noqa: D102
        self, step: int, left: Sequence[str], joined: Sequence[str]
    ) -> None:
        self.console.print(change(step, left, joined), highlight=False, markup=False)

    def close(self) -> None:  # noqa: D102
        self._bar.stop()


class PlainView(_View):
    """Lines for logs: one an evaluation, and now and then one on progress.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._last = time.monotonic()

    def started(self, runner: Runner, step: int) -> None:
        """See `Listener`; so too below."""
        for line in header(runner, step):
            self._print(line)

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:  # noqa: D102
        if time.monotonic() - self._last >= QUIET:
            self._print(
                f"epoch {progress.epoch:3}  step {progress.step}/{progress.steps}  "
                f"{'  '.join(figures(progress))}  {duration(progress.seconds_left)} left"
            )

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:  # noqa: D102
        self._print(verdict(step, epoch, evaluation))

    def skipped(self, fault: Fault) -> None:  # noqa: D102
        self._print(f"skipped {fault}")

    def lost(self, cause: LostError, restart: int) -> None:  # noqa: D102
        self._print(loss(cause, restart))

    def regrouped(  # noqa: D102
        self, step: int, left: Sequence[str], joined: Sequence[str]
    ) -> None:
        self._print(change(step, left, joined))

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._last = time.monotonic()


class LogView(Listener):
    """Log records of the run's course, for who collects those (`hdnn_dist.logs`)."""

    def started(self, runner: Runner, step: int) -> None:
        """See `Listener`; so too below."""
        log.info("; ".join(header(runner, step)), extra={"step": step})

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:  # noqa: D102
        log.info(
            "steps taken",
            extra={
                "step": progress.step,
                "epoch": progress.epoch,
                "loss": progress.loss,
                **progress.scores,
                "samples_per_second": round(progress.samples_per_second, 1),
            },
        )

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:  # noqa: D102
        scored = {f"test_{name}": score for name, score in evaluation.scores.items()}
        found = {"test_loss": evaluation.loss, **scored}
        log.info("test set gone through", extra={"step": step, "epoch": epoch, **found})

    def skipped(self, fault: Fault) -> None:  # noqa: D102
        extra = {"step": fault.step, "agents": [fault.agent]}
        log.warning("skipped %s", fault, extra=extra)

    def lost(self, cause: LostError, restart: int) -> None:  # noqa: D102
        log.warning("lost: %s", cause, extra={"agents": list(cause.agents), "restart": restart})

    def regrouped(  # noqa: D102
        self, step: int, left: Sequence[str], joined: Sequence[str]
    ) -> None:
        log.info(change(step, left, joined), extra={"step": step})

    def ended(self, summary: Summary) -> None:  # noqa: D102
        extra = {"step": summary.steps, "run": summary.run, "seconds": round(summary.seconds, 3)}
        log.info("the run is complete", extra=extra)
