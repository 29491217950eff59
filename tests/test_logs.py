from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hdnn_dist
from hdnn_dist.job import Job
from hdnn_dist.logs import configure

log = logging.getLogger("hdnn_dist")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    configure("text")


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_record_is_a_line_with_its_own_figures_and_whose_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("json", node="there", agents=["a", "b"])
    log.info("took %d\nsteps", 3, extra={"step": 7, "loss": math.nan, "_of_ray": 1})
    try:
        raise ValueError("what?")
    except ValueError:
        log.exception("oh", extra={"agents": ["b"], "at": Path("x")})
    first, second = said(capsys)
    assert first.pop("time")[10:].endswith("+00:00")
    assert first == {
        "level": "info",
        "message": "took 3\nsteps",
        "node": "there",
        "agents": ["a", "b"],
        "step": 7,
        "loss": None,
    }
    assert (second["level"], second["agents"], second["at"]) == ("error", ["b"], "x")
    assert second["exception"].splitlines()[-1] == "ValueError: what?"


def test_the_last_form_holds_and_nothing_is_told_twice(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    configure("json", agents=["a"])
    configure("json", agents=["b"])
    log.warning("once")
    assert [record["agents"] for record in said(capsys)] == [["b"]]
    assert not caplog.records
    configure("text")
    log.warning("as ever")
    log.info("not shown")
    assert said(capsys) == []
    assert [record.message for record in caplog.records] == ["as ever"]


def test_the_course_of_a_run_is_logged_step_by_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["topology.d=2", "model.layers=2", "data.train_samples=64", "training.epochs=1"]
    job = Job.load(None, [*tiny, "training.batch_size=32", "cluster.logs=json"])
    summary = hdnn_dist.train(job, run=tmp_path / "run", local=True)
    records = said(capsys)
    assert {record["level"] for record in records} == {"info"}
    assert [(record["message"], record["step"]) for record in records[-2:]] == [
        ("test set gone through", 2),
        ("the run is complete", 2),
    ]
    assert records[0]["message"].startswith("ring8 learns digits: 8 agents in this process")
    assert {r["step"] for r in records if r["message"] == "steps taken"} == {1, 2}
    assert records[-2]["test_accuracy"] == summary.test_accuracy
    assert all(record["node"] for record in records)


@pytest.mark.cluster
def test_an_actor_logs_with_its_agents_and_step(cluster: None, tmp_path: Path) -> None:
    """In the files of its worker, which Ray shows and collects."""
    import ray

    from hdnn_dist.cluster import RayRunner

    changes = ["topology.name=logged", "topology.d=2", "model.layers=2", "cluster.logs=json"]
    runner = RayRunner(Job.load(None, [*changes, "cluster.agents_per_actor=4"]))
    try:
        runner.train(2)
        runner.save(tmp_path)
        nodes = set(runner._nodes)
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
        digest, records = runner.job.digest[:12], list[dict[str, Any]]()
        for file in logs.glob("worker-*.err"):
            lines = [line for line in file.read_text().splitlines() if line.startswith("{")]
            own = [json.loads(line) for line in lines]
            if any(record.get("job") == digest for record in own):
                records += own
    finally:
        runner.close()
    names = runner.job.topology.names
    for members in runner.packing:
        agents = [names[i] for i in members]
        own = [record for record in records if record["agents"] == agents]
        assert [(record["message"], record["step"]) for record in own] == [
            ("hosts its agents on cpu", 0),
            ("steps taken", 2),
            (f"saved {tmp_path}", 2),
        ]
        assert own[1]["sent_bytes"] > 0
        assert {record["node"] for record in own} == nodes
