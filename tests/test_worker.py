from __future__ import annotations

import time

import pytest

from hdnn_dist.agent import Agent
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner


def test_the_time_of_training_steps_is_told_agent_by_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["topology.agents=3", "topology.edges.args.n=3", "topology.d=2", "model.layers=2"]
    worker = LocalRunner(Job.load(None, tiny)).worker
    regularise = Agent._regularise

    def slowly(self: Agent) -> None:
        time.sleep(0.05 * (self.name == "a2"))
        regularise(self)

    monkeypatch.setattr(Agent, "_regularise", slowly)
    worker.train(2)
    worker.evaluate("test")  # is no part of it
    before = time.perf_counter()
    worker.train(1)
    last = time.perf_counter() - before
    times = worker.times()
    assert times.agents == ("a1", "a2", "a3")
    assert times.steps == 3
    assert times.wait == 0  # there is no other process
    assert times.compute[1] >= 0.15 > times.compute[0] > 0
    assert max(last, sum(times.compute)) < times.total
    assert worker.times().steps == worker.times().total == 0
