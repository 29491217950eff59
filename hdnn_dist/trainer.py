"""The training loop, the same for one process and for a Ray cluster."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from hdnn_dist.agent import Evaluation, Fault, StepResult, averaged, scores_of
from hdnn_dist.analysis import Sums
from hdnn_dist.checkpoint import (
    Manifest,
    Totals,
    checkpoint_folder,
    checkpoints,
    from_latest,
    newest_step,
    read_absent,
    read_manifest,
    set_aside,
    to_json,
    write_absent,
    write_checkpoint,
    write_json,
    write_text,
)
from hdnn_dist.data import Part
from hdnn_dist.errors import CheckpointError, LostError, RunError, StorageError, UserError
from hdnn_dist.job import Job
from hdnn_dist.storage import MAX_TEXT, Place, read
from hdnn_dist.topology import Topology
from hdnn_dist.trace import Track, chrome
from hdnn_dist.transport import InProcess
from hdnn_dist.worker import Times, Worker, agreement_of, device_of, slowest

log = logging.getLogger("hdnn_dist")
SCORES = re.compile(r"(best_)?test_(accuracy|rmse|r2)")
TRACE = "trace.json"  # in the run directory
REPORT_EVERY = 0.5  # seconds between two reports of progress, about


class Runner(Protocol):
    """Where the agents live: in this process, or on a cluster."""

    job: Job

    def describe(self) -> str:
        """One line on what runs where."""
        ...

    def train(self, steps: int) -> list[StepResult]:
        """Take so many steps from where the run stands."""
        ...

    def profile(self, steps: int) -> tuple[list[StepResult], list[Track]]:
        """As `train`, and what each actor did when."""
        ...

    def faults(self) -> list[Fault]:
        """Numbers that were not finite, since the last call."""
        ...

    def evaluate(self, part: Part = "test") -> Evaluation:
        """Loss and scores over a part of the data set."""
        ...

    def predict(self, source: str | os.PathLike[str]) -> np.ndarray:
        """Class probabilities or targets `(samples, C)` for "train", "test", or rows of a file."""
        ...

    def sent(self) -> Counter[tuple[int, int]]:
        """Bytes sent so far from agent to agent."""
        ...

    def times(self) -> list[Times]:
        """Where the time of training steps went since the last call, actor by actor."""
        ...

    def gradient_squares(self) -> Tensor:
        """`‖∂loss/∂y_j‖²`, `j = 0 … N`, of all agents at the last step of the last epoch."""
        ...

    def sensitivities(self, samples: int, V: Tensor) -> Sums:
        """What the agents add up to for the first test samples (see `hdnn_dist.analysis`)."""
        ...

    def save(self, folder: Place) -> dict[str, str]:
        """Write each agent's state into a folder; checksum by agent."""
        ...

    def load(self, folder: Place, manifest: Manifest) -> None:
        """Put back what `save` wrote."""
        ...

    def reform(self, job: Job) -> None:
        """Start all agents of a job anew, at their initial weights, where there is room for them.

        Args:
            job: the runner's own, or that of other agents of the same spec (`Job.without`).
        """
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class LocalRunner:
    """All agents in this process, messages by reference; one copy, whatever `cluster.replicas` is.

    Sets torch's threads to `cluster.threads`, or to one: the products of single agents are small,
    and more threads cost more than they win.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        torch.set_num_threads(job.spec.cluster.threads or 1)
        self.reform(job)

    def describe(self) -> str:
        """See `Runner`; so too below."""
        return f"{len(self.worker.agents)} agents in this process"

    def train(self, steps: int) -> list[StepResult]:  # noqa: D102
        return self.worker.train(steps)

    def profile(self, steps: int) -> tuple[list[StepResult], list[Track]]:  # noqa: D102
        results, track = self.worker.profile(steps)
        return results, [track]

    def faults(self) -> list[Fault]:  # noqa: D102
        return self.worker.faults()

    def evaluate(self, part: Part = "test") -> Evaluation:  # noqa: D102
        result = self.worker.evaluate(part)
        assert result is not None
        return result

    def predict(self, source: str | os.PathLike[str]) -> np.ndarray:  # noqa: D102
        result = self.worker.predict(source)
        assert result is not None
        return result

    def sent(self) -> Counter[tuple[int, int]]:  # noqa: D102
        return self.worker.transport.sent

    def times(self) -> list[Times]:  # noqa: D102
        return [self.worker.times()]

    def gradient_squares(self) -> Tensor:  # noqa: D102
        return self.worker.gradient_squares()

    def sensitivities(self, samples: int, V: Tensor) -> Sums:  # noqa: D102
        return self.worker.sensitivities(samples, V)

    def save(self, folder: Place) -> dict[str, str]:  # noqa: D102
        return self.worker.save(folder)

    def load(self, folder: Place, manifest: Manifest) -> None:  # noqa: D102
        self.worker.load(folder, manifest)

    def reform(self, job: Job) -> None:  # noqa: D102
        self.job = job
        agents = range(len(job.topology.agents))
        transport = InProcess(agreement_of(job))
        self.worker = Worker(job, agents, transport, device=device_of(job, agents))

    def close(self) -> None:  # noqa: D102
        pass


@dataclass(frozen=True)
class Progress:
    """Where a run stands after some steps.

    Attributes:
        step, steps: taken, and of the whole run.
        epoch, epochs: the epoch under way (from 1), and of the whole run.
        loss: mean over the steps since the last report.
        accuracy: on the batches since the last report; None of targets.
        samples_per_second: since the last report.
        seconds_left: at that speed.
        squares, variance: of targets, on the batches since the last report.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float | None
    samples_per_second: float
    seconds_left: float
    squares: float | None = None
    variance: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """See `hdnn_dist.agent.scores_of`."""
        return scores_of(self.loss, self.accuracy, self.squares, self.variance)


@dataclass(frozen=True)
class Summary:
    """Figures of a whole run, as in `summary.json`.

    A run that was resumed sums over the processes that took it on: each checkpoint carries the sums
    so far. What was done past a checkpoint and lost by an interruption is not counted.

    Attributes:
        run: the run directory.
        test_accuracy, test_loss: of the last evaluation; no accuracy of targets.
        best_test_accuracy: of all evaluations.
        epochs, steps: of the whole run.
        seconds: wall time of `fit`.
        training_seconds: of it, in training steps.
        samples_per_second: of training.
        bytes_per_step: the plan's between agents in a training step; sums over copies aside.
        bytes_sent: between agents, counted at the transport, evaluations included.
        parameters: of all agents.
        placement: what ran where.
        restarts: after losses, by the process that ended the run.
        absent: agents of the spec that do not take part in the end.
        test_rmse, test_r2: of targets, of the last evaluation.
        best_test_r2: of all evaluations.
    """

    run: str
    test_accuracy: float | None
    test_loss: float
    best_test_accuracy: float | None
    epochs: int
    steps: int
    seconds: float
    training_seconds: float
    samples_per_second: float
    bytes_per_step: int
    bytes_sent: int
    parameters: int
    placement: str
    restarts: int = 0
    absent: tuple[str, ...] = ()
    test_rmse: float | None = None
    test_r2: float | None = None
    best_test_r2: float | None = None

    @property
    def test_scores(self) -> dict[str, float]:
        """By name: accuracy, or rmse and r2; one that is no finite number is left out."""
        scores = {"accuracy": self.test_accuracy, "rmse": self.test_rmse, "r2": self.test_r2}
        return {name: score for name, score in scores.items() if score is not None}


class Listener:
    """Is told of a run's course; every method may be left as it is."""

    def started(self, runner: Runner, step: int) -> None:
        """Training begins, or goes on after `step` steps: what was told of later ones is void."""

    def lost(self, cause: LostError, restart: int) -> None:
        """Actors were lost; the run goes on from its last checkpoint, for the n-th time."""

    def regrouped(self, step: int, left: Sequence[str], joined: Sequence[str]) -> None:
        """After `step` steps, agents have left the run or joined it; an evaluation follows."""

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:
        """Some steps were taken."""

    def skipped(self, fault: Fault) -> None:
        """No agent took a step, because of a number that is not finite."""

    def differentiated(self, step: int, epoch: int, norms: Sequence[float]) -> None:
        """An epoch has ended; `norms[j] = ‖∂loss/∂y_j‖`, `j = 0 … N`, in its last step."""

    def timed(self, step: int, times: Sequence[Times]) -> None:
        """An epoch has ended; where the time of its steps went, actor by actor."""

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        """The test set was gone through."""

    def ended(self, summary: Summary) -> None:
        """The run is complete."""

    def close(self) -> None:
        """The run is over, complete or not."""


class Trainer:
    """Takes a job from where its runner stands to the end.

    Args:
        runner: where the agents live.
        run: the run directory.
        listeners: are told of the run's course.
        stop: when it is set, the run saves a checkpoint and ends with a KeyboardInterrupt.
        profile: steps, at most, of which `trace.json` tells who did what when: of one epoch, after
            the first step, which is slower than the others.
    """

    def __init__(
        self,
        runner: Runner,
        run: Place,
        listeners: Sequence[Listener] = (),
        stop: Event | None = None,
        profile: int = 0,
    ) -> None:
        self.runner, self.run, self.listeners = runner, run, listeners
        self.stop = Event() if stop is None else stop
        self.profile = profile

    def fit(self) -> Summary:
        """Train to the last epoch from the latest checkpoint, evaluating and saving on the way.

        When actors are lost, all are started anew where there is room, or with `cluster.
        on_agent_loss: drop` all others, and the run goes on from its last checkpoint (from the
        initial weights, before the first one), `cluster.max_restarts` times. Agents that are asked
        to leave or to join (`absent.json`) do so when a checkpoint is written. A run that is
        complete already is left as it is, and its summary returned.

        Raises:
            KeyboardInterrupt: `stop` was set; a checkpoint of this very step is there.
            LostError: actors were lost, and the run may not or cannot go on without them.
            RunError: a loss, state or gradient is not finite; the last checkpoint is good.
            StorageError: something cannot be written, or the last checkpoint not be reached.
        """
        cluster, restarts = self.runner.job.spec.cluster, 0
        again = False
        while True:
            try:
                job, step = self._wanted(), newest_step(self.run)
                with _when(f"after step {step}"):
                    if again or job is not self.runner.job:
                        self.runner.reform(job)
                    again = False
                    step = restore(self.runner, self.run) if step else 0
                if (summary := self._fit(step, restarts)) is not None:
                    return summary
            except LostError as error:
                if cluster.on_agent_loss == "stop":
                    raise
                if restarts == cluster.max_restarts:
                    spent = f"; all {restarts} restarts (cluster.max_restarts) are spent"
                    raise LostError(str(error) + spent * (restarts > 0), error.agents) from None
                if cluster.on_agent_loss == "drop":
                    self._drop(error)
                restarts, again = restarts + 1, True
                self._tell("lost", error, restarts)
            except StorageError as error:
                raise StorageError(f"{error.problem}; {self._what_is_left()}", error.mend) from None

    def _what_is_left(self) -> str:
        try:
            whole = checkpoints(self.run)
        except StorageError:  # told already
            return "its checkpoints are as they were"
        return f"{whole[-1].name} is whole" if whole else "there is no checkpoint yet"

    def _wanted(self) -> Job:
        """The job of those agents that are to take part: the runner's own, if it is that."""
        job, absent = self.runner.job, read_absent(self.run)
        return job if set(absent) == set(job.absent) else job.without(absent)

    def _drop(self, error: LostError) -> None:
        """Have a run go on without the agents that it has lost."""
        absent = {*self.runner.job.absent, *error.agents}
        try:
            job = self.runner.job.without(absent)
        except UserError as reason:
            raise LostError(
                f"{error}; the run cannot go on without: {reason}", error.agents
            ) from None
        write_absent(self.run, job.absent)

    def _fit(self, step: int, restarts: int) -> Summary | None:
        """Train from `step` to the end, or until other agents are to take part: then None."""
        job, runner = self.runner.job, self.runner
        training, per_epoch = job.spec.training, job.steps_per_epoch
        if step == job.steps and (written := read_summary(self.run, step)) is not None:
            return written
        set_aside(self.run, step)
        before_us, took_part = Totals(), set(job.names)
        if step:
            manifest = read_manifest(checkpoint_folder(self.run, step))
            before_us, took_part = manifest.totals, set(manifest.files)
        training_seconds, best = before_us.training_seconds, before_us.best if step else -math.inf
        with _when(f"after step {step}"):
            started, sent = time.perf_counter(), self._sent()

        def totals() -> Totals:
            return Totals(
                seconds=before_us.seconds + time.perf_counter() - started,
                training_seconds=training_seconds,
                bytes_sent=before_us.bytes_sent + self._sent() - sent,
                **_best(job, best),
            )

        def save() -> None:
            write_checkpoint(
                self.run,
                step,
                state_digest(job),
                totals(),
                runner.save,
                accuracy=None if evaluation is None else evaluation.quality,
                spec=job.spec.model_dump(mode="json"),
                keep_last=training.keep_last,
                keep_best=training.keep_best,
            )

        evaluation: Evaluation | None = None  # of the weights after `step` steps
        chunk, first = 1, step
        self._tell("started", runner, step)
        if took_part != (now := set(job.topology.names)):
            self._tell("regrouped", step, sorted(took_part - now), sorted(now - took_part))
            with _when(f"after step {step}"):
                evaluation = self._evaluate()
            self._tell("evaluated", step, step // per_epoch, evaluation)
        while step < job.steps:
            profiled = self.profile and (step > first or step + 1 == job.steps)
            count = min(self.profile if profiled else chunk, per_epoch - step % per_epoch)
            before = time.perf_counter()
            with _when(f"steps {step + 1} to {step + count}" if count > 1 else f"step {step + 1}"):
                results = self._profile(count) if profiled else runner.train(count)
                self._check_finite(results)
            seconds = time.perf_counter() - before
            training_seconds += seconds
            step, evaluation = step + count, None
            chunk = max(1, round(count * REPORT_EVERY / seconds))
            self._tell("stepped", results, self._progress(step, results, seconds))
            epoch, position = divmod(step, per_epoch)
            ends, stopped = step == job.steps, self.stop.is_set()
            with _when(f"after step {step}"):
                if not position:
                    norms = runner.gradient_squares().sqrt().tolist()
                    self._tell("differentiated", step, epoch, norms)
                    self._tell("timed", step, runner.times())
                    if epoch % training.eval_every == 0 or ends:
                        evaluation = self._evaluate()
                        best = max(best, evaluation.quality)
                        self._tell("evaluated", step, epoch, evaluation)
                if stopped or (not position and (epoch % training.checkpoint_every == 0 or ends)):
                    save()
                    if stopped and not ends:
                        raise KeyboardInterrupt
                    if not ends and self._wanted() is not job:
                        return None
        if evaluation is None:  # all steps were taken, but the summary is not there
            with _when(f"after step {step}"):
                evaluation = self._evaluate()
            best = max(best, evaluation.quality)
        summary = Summary(
            run=str(self.run),
            test_accuracy=evaluation.accuracy,
            test_rmse=evaluation.scores.get("rmse"),
            test_r2=evaluation.scores.get("r2"),
            test_loss=evaluation.loss,
            epochs=training.epochs,
            steps=step,
            samples_per_second=step * job.batch / max(training_seconds, 1e-9),
            bytes_per_step=job.bytes_per_step,
            parameters=job.parameters,
            placement=runner.describe(),
            restarts=restarts,
            absent=job.absent,
            **totals().model_dump(),
        )
        write_json(self.run / "summary.json", asdict(summary))
        self._tell("ended", summary)
        return summary

    def _profile(self, steps: int) -> list[StepResult]:
        """Train, and write down what each actor did when."""
        results, tracks = self.runner.profile(steps)
        total = max(track.seconds for track in tracks)
        found = chrome(tracks, slowest([track.busy for track in tracks], total))
        write_text(self.run / TRACE, to_json(found))
        self.profile = 0
        return results

    def _check_finite(self, results: Sequence[StepResult]) -> None:
        """Name the first number of some steps that is not finite: stop, or say what was skipped."""
        faults = {fault.step: fault for fault in sorted(self.runner.faults(), reverse=True)}
        if self.runner.job.spec.training.on_nonfinite == "skip":
            for _, fault in sorted(faults.items()):
                self._tell("skipped", fault)
            return
        losses = [r for r in results if not math.isfinite(r.loss)]
        if faults:
            problem = str(min(faults.values()))
        elif losses:
            problem = f"the loss is {losses[0].loss} at step {losses[0].step}"
        else:
            return
        self._refuse(problem)

    def _evaluate(self) -> Evaluation:
        """Look at the test set; at a number that is not finite stop, or warn: nothing to skip."""
        evaluation = self.runner.evaluate()
        faults = self.runner.faults()
        if faults or not math.isfinite(evaluation.loss):
            problem = str(min(faults)) if faults else f"the test loss is {evaluation.loss}"
            if self.runner.job.spec.training.on_nonfinite == "stop":
                self._refuse(problem)
            log.warning(problem)
        return evaluation

    def _refuse(self, problem: str) -> NoReturn:
        raise RunError(
            f"{problem}; the checkpoints before it are good: resume with a lower "
            "training.optimizer.lr, with training.clip_norm, or with training.on_nonfinite=skip"
        )

    def _progress(self, step: int, results: Sequence[StepResult], seconds: float) -> Progress:
        job, mean = self.runner.job, averaged(results)
        return Progress(
            step=step,
            steps=job.steps,
            epoch=(step - 1) // job.steps_per_epoch + 1,
            epochs=job.spec.training.epochs,
            loss=mean.loss,
            accuracy=mean.accuracy,
            samples_per_second=mean.samples / seconds,
            seconds_left=(job.steps - step) * seconds / len(results),
            squares=mean.squares,
            variance=mean.variance,
        )

    def _sent(self) -> int:
        return sum(self.runner.sent().values())

    def _tell(self, event: str, *news: object) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*news)


def _best(job: Job, best: float) -> dict[str, float | None]:
    """The best of all evaluations, by what it is."""
    if not job.data.targets:
        return {"best_test_accuracy": max(0.0, best)}
    return {"best_test_accuracy": None, "best_test_r2": best if math.isfinite(best) else None}


@contextmanager
def _when(steps: str) -> Iterator[None]:
    """Say at which steps actors were lost."""
    try:
        yield
    except LostError as error:
        raise LostError(f"{steps}: {error}", error.agents) from None


def state_digest(job: Job) -> str:
    """SHA-256 over all that gives the states in a checkpoint their meaning."""
    spec = job.spec
    parts = (
        Topology.from_spec(spec.topology).digest(),
        spec.model.model_dump_json(),
        spec.data.model_dump_json(include={"name", "split"}),
        spec.training.model_dump_json(include={"dtype"}),
        spec.training.optimizer.name,
        *[repr(targets) for targets in [spec.data.targets] if targets],
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def restore(runner: Runner, run: Place) -> int:
    """Load a run's latest checkpoint into its agents.

    Args:
        runner: where the agents live.
        run: the run directory.

    Returns:
        The steps that the checkpoint has taken.

    Raises:
        CheckpointError: there is no whole checkpoint, or it is of another job, or past its end.
    """

    def use(folder: Place, manifest: Manifest) -> int:
        check_belongs(runner.job, run, folder, manifest)
        runner.load(folder, manifest)
        return manifest.step

    return from_latest(run, use)


def check_belongs(job: Job, run: Place, folder: Place, manifest: Manifest) -> None:
    """A checkpoint is of this very job, and not past its end.

    Raises:
        CheckpointError: it is not.
    """
    if manifest.state != state_digest(job):
        raise CheckpointError(
            f"{folder}: written by agents of another topology, model or data split than that of "
            f"{run / 'spec.yaml'}",
            "restore the spec.yaml of the run",
        )
    if manifest.step > job.steps:
        raise CheckpointError(
            f"{run} has taken {manifest.step} steps, but {job.spec.training.epochs} epochs are "
            f"{job.steps}",
            f"set training.epochs to {-(-manifest.step // job.steps_per_epoch)} or more",
        )


def read_summary(run: Place, steps: int) -> Summary | None:
    """The summary of a run that ended after so many steps; None if there is none."""
    try:
        content = json.loads(read(run / "summary.json", MAX_TEXT))
        values: dict[str, Any] = {
            k: math.nan if v is None and not SCORES.fullmatch(k) else v for k, v in content.items()
        }
        found = TypeAdapter(Summary).validate_python(values)
    except (OSError, ValueError, RecursionError, AttributeError):  # missing or damaged
        return None
    if found.steps != steps or not math.isfinite(found.seconds) or found.bytes_sent >= 2**63:
        return None
    return replace(found, run=str(run))  # it may have moved
