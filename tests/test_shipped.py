"""Every topology that is shipped is a job that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hdnn_dist.job import Job
from hdnn_dist.testing import assert_follows_plan, assert_matches_dense
from hdnn_dist.trainer import LocalRunner

TOPOLOGIES = sorted((Path(__file__).parent.parent / "topologies").glob("*.yaml"))
NEEDED = {
    "ring8",
    "line",
    "star",
    "mnist-grid16",
    "mnist-grid16-best",
    "small-world",
    "random-geometric",
    "edge-fog-cloud",
    "two-clusters",
    "directed-ring",
    "unequal",
    "fast-hub",
}


def test_all_of_them_are_there() -> None:
    assert {path.stem for path in TOPOLOGIES} >= NEEDED


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: path.stem)
def test_it_trains(path: Path, folder: Path) -> None:
    # As many samples as a batch: every step sees the same ones, so the loss has to fall.
    overrides = ["training.batch_size=64", "data.train_samples=64"]
    overrides += ["training.dtype=float64", "training.shift=0", "training.distort=null"]
    overrides.append("training.optimizer.lr=0.003")
    if Job.load(path).data.name == "mnist":
        overrides.append(f"data.dir={folder}")
    job = Job.load(path, overrides)
    crossing = job.architecture.patterns.layers_to_cross()
    assert crossing is not None
    assert crossing <= job.spec.model.layers, "information does not cross the graph"
    runner = LocalRunner(job)
    first = runner.train(1)
    gradients = {i: agent.node.gradients for i, agent in runner.worker.agents.items()}
    assert_matches_dense(job, first[0], gradients)
    assert_follows_plan(runner.sent(), job)
    last = runner.train(9)[-1]
    assert last.loss < first[0].loss, "training does not descend"
