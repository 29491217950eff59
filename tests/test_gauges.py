"""What Prometheus is served, by the endpoint of a real Ray."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray

import hdnn_dist
from hdnn_dist import trainer
from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.cluster import RayRunner
from hdnn_dist.errors import few
from hdnn_dist.gauges import (
    EVERY,
    LOSS,
    METRICS,
    SCORES,
    TEST_SCORES,
    ActorCounters,
    Metric,
    RunGauges,
)
from hdnn_dist.job import Job
from hdnn_dist.trainer import Listener, LocalRunner, Progress
from tests.strategies import numbers

Sample = tuple[str, dict[str, str], float]
TINY = ["topology.d=2", "model.layers=2", "cluster.agents_per_actor=4"]
TOLD = 40.0  # seconds until Ray must have told; it does every ten


def exported(metric: Metric) -> str:
    return f"ray_{metric.name}" + "_total" * metric.counter


def served(topology: str) -> Iterator[Sample]:
    """What all machines serve of the jobs of a topology: name, tags, value."""
    for node in ray.nodes():
        at = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(at, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if (found := re.fullmatch(r"(ray_hdnn_\w+)\{(.*)\} (\S+)", line)) is not None:
                tags = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
                if tags["topology"] == topology:
                    yield found[1], tags, float(found[3])


@pytest.mark.cluster
@pytest.mark.slow
def test_prometheus_is_served_every_figure_of_a_run(cluster: None) -> None:
    job = Job.load(None, [*TINY, "topology.name=watched"])
    runner, local = RayRunner(job), LocalRunner(job)
    try:
        runner.reform(job)  # as after a loss
        [first] = runner.train(1)
        evaluation = runner.evaluate()
        of_classes = (metric for metric in METRICS if not metric.name.endswith(("rmse", "r2")))
        names, samples = {exported(metric) for metric in of_classes}, list[Sample]()
        deadline = time.monotonic() + TOLD
        local.train(1)
        agents, sent = job.topology.names, Counter[tuple[str, str]]()
        links = {(agents[l], agents[i]) for l, i in local.sent()}
        # Each actor's figures come by themselves, at another time than the others'.
        while time.monotonic() < deadline and (
            {name for name, _, _ in samples} < names or sent.keys() < links
        ):
            time.sleep(1.0)
            samples = list(served("watched"))
            sent = Counter()
            for name, tags, value in samples:
                if name == "ray_hdnn_sent_bytes_total":
                    sent[tags["source"], tags["target"]] += int(value)
        assert {name for name, _, _ in samples} == names
        values = {name: value for name, _, value in samples if "total" not in name}
        assert values["ray_hdnn_loss"] == pytest.approx(first.loss)
        assert values["ray_hdnn_accuracy"] == pytest.approx(first.correct / first.samples)
        assert values["ray_hdnn_test_loss"] == pytest.approx(evaluation.loss)
        assert values["ray_hdnn_test_accuracy"] == pytest.approx(evaluation.accuracy)
        assert values["ray_hdnn_step"] == 1
        assert values["ray_hdnn_step_seconds"] > 0
        assert values["ray_hdnn_restarts"] == 1
        assert sent == {(agents[l], agents[i]): n for (l, i), n in local.sent().items()}
        waits = {
            (tags["agents"], tags["neighbour"])
            for name, tags, _ in samples
            if name == "ray_hdnn_waited_seconds_total"
        }
        one, other = (few([agents[i] for i in members]) for members in runner.packing)
        assert waits <= {(one, other), (other, one)}
        assert {tags["ray_job"] for _, tags, _ in samples} == {
            ray.get_runtime_context().get_job_id()
        }
    finally:
        runner.close()


def test_figures_of_targets_are_those_of_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "REPORT_EVERY", 1e9)  # several steps at a time, however slow
    told: dict[Metric, float] = {}
    roots: list[list[float]] = []

    class Kept(RunGauges):
        def __init__(self) -> None:
            """Ray is not asked."""

        def _set(self, metric: Metric, value: float) -> None:
            told[metric] = value

    class Watch(Listener):
        def stepped(self, results: Sequence[StepResult], progress: Progress) -> None:
            kept.trained(results, 1.0)
            roots.append([r.scores["rmse"] for r in results])
            assert {name: told[SCORES[name]] for name in ("rmse", "r2")} == progress.scores
            assert told[SCORES["rmse"]] == pytest.approx(np.sqrt(np.mean(np.square(roots[-1]))))
            assert told[LOSS] == progress.loss

        def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
            kept.evaluated(evaluation)
            assert {name: told[TEST_SCORES[name]] for name in ("rmse", "r2")} == evaluation.scores

    kept = Kept()
    topology = {"agents": 2, "d": 2, "edges": [["a1", "a2"]]}
    training = {"batch_size": 5, "epochs": 3}
    job = {"topology": topology, "model": {"layers": 1}, "data": numbers(), "training": training}
    hdnn_dist.train(job, run=tmp_path / "run", local=True, listeners=[Watch()])
    assert {metric.name for metric in told} == {
        metric.name for metric in METRICS if not metric.counter and "accuracy" not in metric.name
    } - {"hdnn_restarts"}
    assert len(set(max(roots, key=len))) > 1  # else any mean of them would do


@pytest.mark.cluster
def test_an_actor_tells_its_counts_now_and_then_and_what_was_added_since(cluster: None) -> None:
    counters = ActorCounters("here", ("ann", "ben"), [0])
    told: list[tuple[float, dict[str, str]]] = []
    for counter in counters._sent, counters._waited:
        counter.inc = lambda value, tags: told.append((value, tags))  # type: ignore[method-assign]
    assert counters.due
    counters.record({(0, 1): 100}, {"ben": 0.5})
    assert not counters.due
    counters._recorded -= EVERY
    assert counters.due
    counters.record({(0, 1): 150, (1, 0): 7}, {"ben": 0.5})
    assert told == [
        (100, {"source": "ann", "target": "ben"}),
        (0.5, {"agents": "ann", "neighbour": "ben"}),
        (50, {"source": "ann", "target": "ben"}),
        (7, {"source": "ben", "target": "ann"}),
    ]
