from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hdnn_dist
from hdnn_dist.data import load_features
from hdnn_dist.errors import CheckpointError, DataError, UserError
from hdnn_dist.testing import assert_close

TINY = [
    "topology.agents=4",
    "topology.edges.args.n=4",
    "topology.d=2",
    "model.layers=2",
    "data.split.kind=auto",
    "data.train_samples=128",
    "training.batch_size=32",
    "training.epochs=2",
    "training.dtype=float64",
    "training.clip_norm=1.0",
    "training.schedule.name=constant",  # the others depend on the length of the run
    "training.optimizer.lr=0.05",
]


def test_train_load_and_open(tmp_path: Path) -> None:
    seen: list[str] = []

    class Ear(hdnn_dist.Listener):
        def evaluated(self, step: int, epoch: int, evaluation: object) -> None:
            seen.append(f"{epoch}/{step}")

    summary = hdnn_dist.train(overrides=TINY, run=tmp_path / "run", local=True, listeners=[Ear()])
    assert seen == ["1/4", "2/8"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["run"] == summary.run
    with hdnn_dist.open_run(summary.run, local=True) as (agents, step):
        assert step == summary.steps == 8
        assert agents.evaluate().accuracy == summary.test_accuracy
        distributed = agents.predict("test")
    model = hdnn_dist.load(summary.run)
    job = hdnn_dist.Job.load(Path(summary.run) / "spec.yaml")
    x = torch.from_numpy(load_features(job.spec.data, "test", range(64))).double()
    with torch.no_grad():
        assert_close(torch.from_numpy(distributed), model(x).softmax(1), "probabilities")


def test_the_models_weights_are_trained_on_as_those_of_any_module(tmp_path: Path) -> None:
    job = hdnn_dist.Job.load(None, TINY)
    model = hdnn_dist.HDNN(job.architecture)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x = torch.from_numpy(load_features(job.spec.data, "train", range(64)))
    from hdnn_dist.data import load_labels

    labels = torch.from_numpy(load_labels(job.spec.data, "train"))
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_run_directory_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        hdnn_dist.train(overrides=TINY, run=tmp_path, local=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_topologies_from_networkx() -> None:
    import networkx as nx

    topology = hdnn_dist.Topology.from_graph(nx.petersen_graph(), d=3)
    assert (len(topology.agents), topology.diameter, topology.sizes[0]) == (10, 2, 3)


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_local_run_goes_on_over_actors_with_the_same_numbers(tmp_path: Path) -> None:
    """Trained in one process, continued by two actors, then by one."""
    whole = hdnn_dist.train(overrides=[*TINY, "training.epochs=4"], run=tmp_path / "a", local=True)
    part = hdnn_dist.train(overrides=TINY, run=tmp_path / "b", local=True)
    for epochs, per_actor in ((3, 2), (4, 4)):
        changes = [f"training.epochs={epochs}", f"cluster.agents_per_actor={per_actor}"]
        from hdnn_dist.run import reopen

        runner = hdnn_dist.launch(reopen(Path(part.run), changes))
        try:
            last = hdnn_dist.fit(runner, Path(part.run))
        finally:
            runner.close()
    assert last.steps == whole.steps
    ours, theirs = hdnn_dist.load(last.run), hdnn_dist.load(whole.run)
    for name, weight in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], weight, name)

    def losses(run: str) -> list[float]:
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]

    np.testing.assert_allclose(losses(last.run), losses(whole.run), atol=1e-10)


def test_a_job_of_ones_own_graph() -> None:
    import networkx as nx

    graph = nx.DiGraph([("sensor", "hub"), ("camera", "hub"), ("hub", "camera")])
    graph.nodes["hub"]["d"] = 3
    job = hdnn_dist.Job.load({"topology": graph, "model": {"layers": 2}})
    assert job.topology.names == ("sensor", "hub", "camera")
    assert job.topology.sizes == (8, 3, 8)
    assert job.topology.edges == ((0, 1), (1, 2), (2, 1))
    topology = hdnn_dist.Topology.from_graph(nx.path_graph(3), d=2)
    assert hdnn_dist.Job.load({"topology": topology}).topology == topology


def test_predictions_of_a_file_and_of_a_part(tmp_path: Path) -> None:
    job = hdnn_dist.Job.load(None, TINY)
    runner = hdnn_dist.launch(job, local=True)
    rows = np.random.default_rng(0).integers(0, 17, (3, 64)).astype(np.uint8)
    np.save(tmp_path / "rows.npy", rows)
    from_text, from_path = (
        runner.predict(kind(tmp_path / "rows.npy")) for kind in (str, lambda path: path)
    )
    assert from_text.shape == (3, 10)
    assert np.array_equal(from_text, from_path)
    assert runner.predict("train").shape == (128, 10)
    with pytest.raises(DataError, match="no part 'all'"):
        runner.evaluate("all")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        runner.predict("valid")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"spec": hdnn_dist.Job.load(None), "overrides": ["training.epochs=1"]}, "a Job is given"),
        ({"overrides": "training.epochs=1"}, "list of"),
        ({"spec": {"topology": {"agents": 1}}, "overrides": ["model.h=1"]}, "a spec file"),
        ({"local": True, "address": "127.0.0.1:1"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        hdnn_dist.train(**arguments, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_public_names_are_found() -> None:
    assert {"train", "Job", "HDNN", "Topology"} <= set(dir(hdnn_dist))
    assert all(getattr(hdnn_dist, name) for name in hdnn_dist.__all__)
