"""A run's figures for Ray's Prometheus endpoints: every machine of a cluster serves its own.

The driver records what is known of the whole run, an actor what it has sent and for whom it has
waited. Ray collects all of it every ten seconds, and puts `ray_` before a name, and `_total` behind
that of a counter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.util.metrics import Counter, Gauge

from hdnn_dist.agent import Evaluation, StepResult, averaged
from hdnn_dist.errors import few

EVERY = 5.0  # seconds between two records of an actor, which has a figure for each of its edges
Kind = TypeVar("Kind", Counter, Gauge)


@dataclass(frozen=True)
class Metric:
    """What Prometheus knows of a figure.

    Attributes:
        name: without what Ray adds.
        description: for people.
        tags: beside those of every metric (`TAGS`).
        counter: whether it is one, of what happens while it is looked at, or a gauge.
    """

    name: str
    description: str
    tags: tuple[str, ...] = ()
    counter: bool = False


TAGS = "ray_job", "topology"
LOSS = Metric(
    "hdnn_loss",
    "Mean cross-entropy of the last steps in nats, or mean square of standardised errors",
)
TEST_LOSS = Metric("hdnn_test_loss", "The same over the test set")
SCORES = {
    "accuracy": Metric("hdnn_accuracy", "Share of the last steps' samples classified rightly"),
    "rmse": Metric("hdnn_rmse", "Root mean square error of the last steps, in the targets' unit"),
    "r2": Metric("hdnn_r2", "Share of the targets' variance explained in the last steps"),
}
TEST_SCORES = {
    name: Metric(f"hdnn_test_{name}", f"{words}, over the test set")
    for name, words in (
        ("accuracy", "Share of samples classified rightly"),
        ("rmse", "Root mean square error in the targets' unit"),
        ("r2", "Share of the targets' variance explained"),
    )
}
STEP = Metric("hdnn_step", "Training steps taken")
STEP_SECONDS = Metric("hdnn_step_seconds", "Seconds of a training step, on average of the last")
RESTARTS = Metric("hdnn_restarts", "How often the driver has started all actors anew")
SENT = Metric("hdnn_sent_bytes", "Bytes from agent to agent", ("source", "target"), True)
WAITED = Metric(
    "hdnn_waited_seconds",
    "Seconds in which the actor of some agents had nothing to do but to wait for another's message",
    ("agents", "neighbour"),
    True,
)
METRICS = (
    *(LOSS, *SCORES.values(), TEST_LOSS, *TEST_SCORES.values()),
    *(STEP, STEP_SECONDS, RESTARTS, SENT, WAITED),
)


def _tagged(kind: type[Kind], metric: Metric, topology: str) -> Kind:
    made = kind(metric.name, metric.description, (*TAGS, *metric.tags))
    tags = (ray.get_runtime_context().get_job_id(), topology)
    made.set_default_tags(dict(zip(TAGS, tags, strict=True)))
    return made


class RunGauges:
    """What the driver records.

    Args:
        topology: name of the topology.
    """

    def __init__(self, topology: str) -> None:
        self._gauges = {m: _tagged(Gauge, m, topology) for m in METRICS if not m.counter}
        self._formed = 0

    def formed(self) -> None:
        """All actors are started, for the first time or anew."""
        self._set(RESTARTS, self._formed)
        self._formed += 1

    def trained(self, results: Sequence[StepResult], seconds: float) -> None:
        """Some steps were taken, in so many seconds."""
        self._set(STEP, results[-1].step)
        self._set(STEP_SECONDS, seconds / len(results))
        mean = averaged(results)
        self._set(LOSS, mean.loss)
        for name, score in mean.scores.items():
            self._set(SCORES[name], score)

    def evaluated(self, evaluation: Evaluation) -> None:
        """The test set was gone through."""
        self._set(TEST_LOSS, evaluation.loss)
        for name, score in evaluation.scores.items():
            self._set(TEST_SCORES[name], score)

    def _set(self, metric: Metric, value: float) -> None:
        self._gauges[metric].set(value)


class ActorCounters:
    """What an actor records.

    Args:
        topology: name of the topology.
        names: of all agents.
        agents: here.
    """

    def __init__(self, topology: str, names: Sequence[str], agents: Sequence[int]) -> None:
        self._sent = _tagged(Counter, SENT, topology)
        self._waited = _tagged(Counter, WAITED, topology)
        self._names, self._here = names, few([names[i] for i in agents])
        self._before: tuple[Mapping[tuple[int, int], int], Mapping[str, float]] = {}, {}
        self._recorded = -EVERY

    @property
    def due(self) -> bool:
        """Whether it is time for another record."""
        return time.monotonic() - self._recorded >= EVERY

    def record(self, sent: Mapping[tuple[int, int], int], waited: Mapping[str, float]) -> None:
        """Take note of all so far: bytes by edge, and seconds by whom was waited for."""
        sent_before, waited_before = self._before
        for link, count in sent.items():
            if (more := count - sent_before.get(link, 0)) > 0:
                source, target = (self._names[i] for i in link)
                self._sent.inc(more, {"source": source, "target": target})
        for neighbour, seconds in waited.items():
            if (longer := seconds - waited_before.get(neighbour, 0.0)) > 0:
                self._waited.inc(longer, {"agents": self._here, "neighbour": neighbour})
        self._before, self._recorded = (sent, waited), time.monotonic()
