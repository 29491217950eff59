"""A run's metrics as files: one JSON record a line, and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.checkpoint import to_json
from hdnn_dist.storage import Log, Place, kind, lines
from hdnn_dist.trainer import Listener, Progress, Runner
from hdnn_dist.worker import Times

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


MAX_LINE = 1 << 24  # bytes of a record: of all layers, or the names of all agents


class JsonLines(Listener):
    """Writes `metrics.jsonl`; a run that goes on drops what was written past its checkpoint.

    ::

        {"kind": "train", "step": 1, "epoch": 1, "loss": 2.3, "accuracy": 0.1, "lr": 0.01,
         "grad_norm": null, "samples_per_second": 5000.0}
        {"kind": "gradients", "step": 22, "epoch": 1, "norms": [0.02, 0.02, 0.03]}
        {"kind": "eval", "step": 22, "epoch": 1, "loss": 0.4, "accuracy": 0.9, "samples": 360}
        {"kind": "agents", "step": 22, "left": ["a3"], "joined": []}
        {"kind": "times", "step": 22, "actors": [{"agents": ["a1", "a2"], "steps": 22, "total": 0.9,
         "compute": [0.2, 0.2], "wait": 0.3, "node": "10.0.0.1 (1f2e3d4c)"}]}

    Of targets there are "rmse" and "r2" in place of the accuracy.

    `norms` are `‖∂loss/∂y_j‖` of the states `y_0 … y_N` in an epoch's last step, over its batch.

    `times` are seconds of an epoch's steps (see `hdnn_dist.worker.Times`); they say who shared an
    actor, too.

    A loss that is no number is null, as JSON has none of those. Object stores, which cannot append,
    have the file as of the last epoch.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Place) -> None:
        self.path = run / "metrics.jsonl"
        self._log: Log | None = None

    def started(self, runner: Runner, step: int) -> None:
        """See `Listener`; so too below."""
        self.close()
        self._steps_per_epoch = runner.job.steps_per_epoch
        kept = [line for line, record in _lines(self.path) if record["step"] <= step]
        self._log = Log(self.path, "".join(f"{line}\n" for line in kept))

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:  # noqa: D102
        self._write(
            *(
                {
                    "kind": "train",
                    "step": result.step,
                    "epoch": (result.step - 1) // self._steps_per_epoch + 1,
                    "loss": result.loss,
                    **result.scores,
                    "lr": result.lr,
                    "grad_norm": result.grad_norm,
                    "samples_per_second": round(progress.samples_per_second, 1),
                }
                for result in results
            )
        )

    def differentiated(self, step: int, epoch: int, norms: Sequence[float]) -> None:  # noqa: D102
        norms = list(norms)
        self._write({"kind": "gradients", "step": step, "epoch": epoch, "norms": norms}, ends=True)

    def timed(self, step: int, times: Sequence[Times]) -> None:  # noqa: D102
        self._write({"kind": "times", "step": step, "actors": [asdict(own) for own in times]})

    def regrouped(  # noqa: D102
        self, step: int, left: Sequence[str], joined: Sequence[str]
    ) -> None:
        record = {"kind": "agents", "step": step, "left": list(left), "joined": list(joined)}
        self._write(record, ends=True)

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:  # noqa: D102
        told = {"loss": evaluation.loss, **evaluation.scores, "samples": evaluation.samples}
        self._write({"kind": "eval", "step": step, "epoch": epoch, **told}, ends=True)

    def close(self) -> None:  # noqa: D102
        if self._log is not None:
            self._log.close()
            self._log = None

    def _write(self, *records: dict[str, Any], ends: bool = False) -> None:
        assert self._log is not None, "started() comes first"
        self._log.append("".join(f"{to_json(record)}\n" for record in records))
        if ends:
            self._log.commit()


def read_metrics(run: Place) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; none if it has no such file."""
    return [record for _, record in _lines(run / "metrics.jsonl")]


def _lines(path: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its record, up to one that is torn by a crash or otherwise none."""
    for content in lines(path, MAX_LINE) if kind(path) else ():
        line = content.decode(errors="replace").rstrip()
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            return
        if record.get("kind") == "gradients" and not _are_gradients(record):
            return
        yield line, record


def _are_gradients(record: dict[str, Any]) -> bool:
    epoch, norms = record.get("epoch"), record.get("norms")
    kept = isinstance(norms, list) and all(isinstance(norm, float | None) for norm in norms)
    return isinstance(epoch, int) and kept


class TensorBoard(Listener):
    """Writes the metrics as TensorBoard events: `tensorboard --logdir RUN`.

    Args:
        run: the run directory, a local one: TensorBoard's writer appends to its files.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "tensorboard"
        self._writer: SummaryWriter | None = None

    def started(self, runner: Runner, step: int) -> None:
        """See `Listener`; so too below."""
        self.close()
        # Imported here: it takes a second that runs without TensorBoard need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        # Events past the checkpoint, if any, are of steps that will be taken again.
        purge_step = step + 1 if self.folder.exists() else None
        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)

    def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:  # noqa: D102
        for result in results:
            self._add("train/loss", result.loss, result.step)
            for name, score in result.scores.items():
                self._add(f"train/{name}", score, result.step)
            self._add("train/lr", result.lr, result.step)
            if result.grad_norm is not None:
                self._add("train/grad_norm", result.grad_norm, result.step)
        self._add("train/samples_per_second", progress.samples_per_second, progress.step)

    def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:  # noqa: D102
        self._add("test/loss", evaluation.loss, step)
        for name, score in evaluation.scores.items():
            self._add(f"test/{name}", score, step)

    def close(self) -> None:  # noqa: D102
        if self._writer is not None:
            self._writer.close()

    def _add(self, tag: str, value: float, step: int) -> None:
        assert self._writer is not None, "started() comes first"
        self._writer.add_scalar(tag, value, step)
