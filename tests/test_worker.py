from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdnn_dist.agent import Agent
from hdnn_dist.data import share
from hdnn_dist.errors import PlacementError
from hdnn_dist.job import Job
from hdnn_dist.node import Exchange
from hdnn_dist.replicas import Replicas
from hdnn_dist.tables import read_targets
from hdnn_dist.testing import assert_close, assert_matches_dense
from hdnn_dist.trainer import LocalRunner
from hdnn_dist.worker import Worker, device_of, slowest
from tests.strategies import in_process, jobs, numbers

Result = TypeVar("Result")
ONE, DEVICE = ("topology.edges=[]",), "cluster.device="

BASE = (
    *("model.layers=2", "topology.d=2", "training.dtype=float64", "training.batch_size=10"),
    *("data.train_samples=30", "training.optimizer.lr=0.05", "training.clip_norm=0.5"),
)


class Threads(Replicas):
    """Copies that are threads of this process: what they sum is left on a table."""

    def __init__(self, copy: int, copies: int, barrier: threading.Barrier) -> None:
        super().__init__(copy, copies)
        self.barrier = barrier
        self.table: dict[int, list[Tensor]] = {}

    def add(self, summands: Sequence[Tensor]) -> None:
        self.table[self.copy] = list(summands)
        self.barrier.wait()
        parts = zip(*(self.table[copy] for copy in range(self.copies)), strict=True)
        totals = [sum(part[1:], part[0]) for part in parts]
        self.barrier.wait()
        for tensor, total in zip(summands, totals, strict=True):
            tensor.copy_(total)


def copies_of(job: Job, copies: int) -> list[Worker]:
    """All agents of a job, several times over."""
    barrier = threading.Barrier(copies, timeout=60)
    threads = [Threads(copy, copies, barrier) for copy in range(copies)]
    for thread in threads:
        thread.table = threads[0].table
    agents = range(len(job.topology.agents))
    return [Worker(job, agents, in_process(job), thread) for thread in threads]


def all_of(workers: Sequence[Worker], action: Callable[[Worker], Result]) -> list[Result]:
    """What an action returns of each copy, all at once."""
    with ThreadPoolExecutor(len(workers)) as pool:
        return [future.result() for future in [pool.submit(action, w) for w in workers]]


def alone(job: Job) -> Worker:
    return Worker(job, range(len(job.topology.agents)), in_process(job))


def assert_alike(one: Worker, others: Sequence[Worker]) -> None:
    """The copies hold the same states bit by bit, and those of one worker but for rounding."""
    for i, agent in one.agents.items():
        for key, value in agent.state().items():
            first, *rest = (other.agents[i].state()[key] for other in others)
            assert_close(first, value, f"{agent.name}: {key}")
            assert all(torch.equal(first, state) for state in rest), f"{agent.name}: {key}"


@settings(max_examples=15)
@given(jobs(), st.data())
def test_gradients_of_copies_add_up_to_those_of_the_dense_model(
    job: Job, data: st.DataObject
) -> None:
    workers = copies_of(job, data.draw(st.integers(1, job.batch)))
    results = all_of(workers, lambda worker: worker.train(1))
    for worker, [result] in zip(workers, results, strict=True):
        gradients = {i: agent.node.gradients for i, agent in worker.agents.items()}
        assert_matches_dense(job, result, gradients)


@pytest.mark.parametrize("augmentation", ["training.shift=1", "training.distort={elastic: 1}"])
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_an_uneven_batch_train_as_one(copies: int, augmentation: str) -> None:
    job = Job.load(None, [*BASE, "training.alpha=0.01", augmentation])
    assert len({s.stop - s.start for s in (share(job.batch, c, 3) for c in range(3))}) == 2
    one, workers = alone(job), copies_of(job, copies)
    expected, results = one.train(5), all_of(workers, lambda worker: worker.train(5))
    for ours in results:
        assert [r.loss for r in ours] == pytest.approx([r.loss for r in expected], abs=1e-10)
        assert [(r.step, r.correct, r.samples, r.lr) for r in ours] == [
            (r.step, r.correct, r.samples, r.lr) for r in expected
        ]
        assert [r.grad_norm for r in ours] == pytest.approx([r.grad_norm for r in expected])
    assert_alike(one, workers)
    squares = sum(worker.gradient_squares() for worker in workers)
    assert isinstance(squares, Tensor)
    assert_close(squares, one.gradient_squares(), "‖∂loss/∂y_j‖²")


def test_copies_share_an_evaluation_and_a_prediction() -> None:
    job = Job.load(None, BASE)
    one, workers = alone(job), copies_of(job, 3)
    expected = one.evaluate()
    assert expected is not None
    for evaluation in all_of(workers, lambda worker: worker.evaluate()):
        assert evaluation is not None
        assert (evaluation.accuracy, evaluation.samples) == (expected.accuracy, expected.samples)
        assert evaluation.loss == pytest.approx(expected.loss, abs=1e-12)
    parts = [torch.tensor(part) for part in all_of(workers, lambda w: w.predict("test"))]
    assert_close(torch.cat(parts), torch.tensor(one.predict("test")), "P")


def test_targets_are_predicted_by_copies_as_by_one_and_in_their_units() -> None:
    own = {"a1": ["y6", "y0"], "a3": ["y2"]}
    for targets in (own, ["y0", "y6"]):
        job = Job.load(
            {
                "topology": {"agents": 3, "edges": [["a1", "a2"], ["a2", "a3"]]},
                "data": numbers() | {"targets": targets},
                "training": {"dtype": "float64"},
            }
        )
        one, workers = alone(job), copies_of(job, 3)
        expected = one.evaluate()
        assert expected is not None
        for found in all_of(workers, lambda worker: worker.evaluate()):
            assert found is not None
            assert found.scores == pytest.approx(expected.scores, rel=1e-12)
        whole = one.predict("test")
        assert whole is not None
        parts = [torch.tensor(part) for part in all_of(workers, lambda w: w.predict("test"))]
        assert_close(torch.cat(parts), torch.tensor(whole), "y")
        names, data = job.data.targets, job.spec.data
        y, train = read_targets(data, "test", names), read_targets(data, "train", names)
        assert expected.scores["rmse"] == pytest.approx(np.sqrt(np.mean((whole - y) ** 2)))
        errors, off = (np.mean(((p - y) / train.std(0)) ** 2) for p in (whole, train.mean(0)))
        assert expected.loss == pytest.approx(errors, rel=1e-5)
        assert expected.scores["r2"] == pytest.approx(1 - errors / off, rel=1e-5)


@pytest.mark.parametrize("what", ["a state", "the loss"])
def test_a_number_of_one_copy_that_is_not_finite_has_no_copy_take_the_step(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the gradients are finite all the same."""
    job = Job.load(None, [*BASE, "training.on_nonfinite=skip"])
    workers = copies_of(job, 2)
    agent = workers[1].agents[0 if what == "a state" else job.root]
    if what == "a state":
        monkeypatch.setattr(agent.node, "first_nonfinite_state", lambda: 1)
    else:
        differentiate = agent.differentiate

        def overflowing(step: int) -> Exchange[None]:
            yield from differentiate(step)
            agent.tally[0] = torch.inf

        monkeypatch.setattr(agent, "differentiate", overflowing)
    before = [{k: v.clone() for k, v in a.state().items()} for a in workers[0].agents.values()]
    all_of(workers, lambda worker: worker.train(1))
    for worker in workers:
        for old, a in zip(before, worker.agents.values(), strict=True):
            assert all(torch.equal(old[key], value) for key, value in a.state().items())
    fault = min(fault for worker in workers for fault in worker.faults())
    assert fault.agent == agent.name
    assert fault.what == ("the state y_1" if what == "a state" else "the loss")


def test_copies_write_a_checkpoint_once_and_know_its_checksums(tmp_path: Path) -> None:
    workers = copies_of(Job.load(None, BASE), 2)
    all_of(workers, lambda worker: worker.train(2))
    second, first = tmp_path / "second", tmp_path / "first"
    assert workers[1].save(second) == workers[0].save(first)
    assert not second.exists()
    assert len(list(first.iterdir())) == 8


@pytest.mark.parametrize(
    ("wish", "gpu", "there", "found"),
    [
        ("auto", 0.5, True, "cuda:0"),
        ("auto", 0.5, False, "cpu"),  # Ray gave one, but this torch cannot use it
        ("auto", 0, True, "cpu"),
        ("cpu", 1, True, "cpu"),
        ("cuda", 0, True, "cuda:0"),
    ],
)
def test_agents_compute_on_what_they_ask_for(
    wish: str, gpu: float, there: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    job = Job.load(None, [f"topology.agents=[{{name: a, gpu: {gpu}}}]", *ONE, f"{DEVICE}{wish}"])
    assert device_of(job, [0]) == torch.device(found)


def test_a_gpu_that_is_not_there_is_named() -> None:
    job = Job.load(None, ["topology.agents=[a]", *ONE, f"{DEVICE}cuda"])
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(
        PlacementError, match=r"agent\(s\) a on .* has no GPU; give these agents gpu"
    ):
        device_of(job, [0])


def test_the_time_of_training_steps_is_told_agent_by_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["topology.agents=3", "topology.edges.args.n=3", "topology.d=2", "model.layers=2"]
    worker = LocalRunner(Job.load(None, tiny)).worker
    regularise, now = Agent._regularise, [0.0]

    def slowly(self: Agent) -> None:
        now[0] += 5.0 if self.name == "a2" else 1.0
        regularise(self)

    monkeypatch.setattr(Agent, "_regularise", slowly)
    for module in "worker", "trace":
        clock = SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr(f"hdnn_dist.{module}.time", clock)
    worker.train(2)
    worker.evaluate("test")  # is no part of it
    now[0] += 100
    worker.train(1)
    times = worker.times()
    assert times.agents == ("a1", "a2", "a3")
    assert times.steps == 3
    assert times.wait == 0  # there is no other process
    assert times.compute == (3.0, 15.0, 3.0)
    assert times.total == 21.0
    assert worker.times().steps == worker.times().total == 0


@pytest.mark.parametrize(
    ("busy", "slow"),
    [([1, 4, 1, 1], [1]), ([4, 3.7, 1], [0, 1]), ([4, 4, 3.9], []), ([4], []), ([0, 0], [])],
)
def test_the_others_wait_for_who_takes_longest(busy: list[float], slow: list[int]) -> None:
    assert slowest(busy) == slow
    assert slowest(busy, 100.0) == [], "all wait for something else"
