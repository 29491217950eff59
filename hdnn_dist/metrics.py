"""A run's metrics as a file: one JSON record a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.checkpoint import to_json
from hdnn_dist.storage import Log, Place, kind, lines
from hdnn_dist.trainer import Listener, Progress, Runner
from hdnn_dist.worker import Times

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
