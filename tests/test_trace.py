from __future__ import annotations

import time
from collections import defaultdict
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from hdnn_dist import trace
from hdnn_dist.job import Job
from hdnn_dist.replicas import Replicas
from hdnn_dist.trace import Recorder, Slice, Track, chrome, clock, clock_ahead
from hdnn_dist.transport import InProcess, Mail
from hdnn_dist.worker import Worker, agreement_of
from tests.strategies import in_process

TINY = ["topology.agents=3", "topology.edges.args.n=3", "topology.d=2", "model.layers=2"]


def test_a_step_is_told_agent_by_agent_and_round_by_round() -> None:
    job = Job.load(None, TINY)
    worker, alone = (Worker(job, range(3), in_process(job)) for _ in range(2))
    expected = alone.train(3)
    before = time.perf_counter()
    results, track = worker.profile(2)
    after = time.perf_counter()
    assert [r.loss for r in results] == [r.loss for r in expected[:2]]
    assert track.agents == job.topology.names
    rounds = [phase.name for phase in job.plan.training_step]
    for step in 1, 2:
        own = [each for each in track.slices if each.step == step]
        assert [each.what for each in own if each.kind == "send"] == rounds
        for name in job.topology.names:
            computed = [each.what for each in own if each.agent == name]
            assert computed[-2:] == ["differentiate", "update"]
            i = job.topology.index(name)
            assert computed[:-2] == [p.name for p in job.plan.training_step if i in p.agents]
    ends = [before, *(each.start + each.seconds for each in track.slices)]
    assert ends == sorted(ends), "one thing after the other"
    assert ends[-1] < after
    assert all(each.start >= end for end, each in zip(ends, track.slices, strict=False))
    times = worker.times()
    assert sum(s.seconds for s in track.slices if s.kind == "compute") <= sum(times.compute)
    assert track.busy <= times.total
    # Nothing of it is left behind.
    assert [r.loss for r in worker.train(1)] == [r.loss for r in expected[2:]]
    assert type(worker.transport) is InProcess
    assert worker.transport.sent == alone.transport.sent


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is moved."""
    at = [100.0]
    monkeypatch.setattr(trace, "time", SimpleNamespace(perf_counter=lambda: at[0]))
    return at


def test_waiting_is_told_apart_from_sending_and_for_whom_it_is(now: list[float]) -> None:
    job = Job.load(None, TINY)
    phase = job.plan.training_step[0]
    sleeps: list[dict[int, float]] = []

    class Slow(InProcess):
        waits: ClassVar[defaultdict[int, float]] = defaultdict(float)

        @property
        def waited_for(self) -> dict[int, float]:
            return dict(self.waits)

        def exchange(self, phase: object, mail: Mail, batch: int) -> Mail:
            now[0] += 1.0
            for peer, seconds in sleeps.pop(0).items():
                self.waits[peer] += seconds
                self.waited += seconds
                now[0] += seconds
            self.waited += 0.5  # to take in what has come
            now[0] += 0.5
            return mail

    recorder = Recorder()
    recorder.step = 4
    watched = recorder.transport(Slow(agreement_of(job)))
    sleeps += {}, {1: 2.0, 2: 5.0}, {}, {1: 1.0}
    for _ in range(3):
        watched.exchange(phase, {(0, 1): torch.zeros(1, 1)}, 1)
    watched.exchange(phase, {}, 1)  # nobody here takes part: nothing is told of it
    assert recorder.slices == [
        Slice("send", "states", 4, 100.0, 1.0),
        Slice("wait", "states", 4, 101.0, 0.5, None, None),  # nobody was ever slept for
        Slice("send", "states", 4, 101.5, 1.0),
        Slice("wait", "states", 4, 102.5, 7.5, None, 2),
        Slice("send", "states", 4, 110.0, 1.0),
        Slice("wait", "states", 4, 111.0, 0.5, None, None),  # nor now
    ]


def test_sums_over_copies_are_told(now: list[float]) -> None:
    class Two(Replicas):
        def add(self, summands: object) -> None:
            now[0] += 3.0
            self.waited += 2.0

    recorder, one, two = Recorder(), Replicas(), Two(0, 2)
    assert recorder.replicas(one) is one
    watched = recorder.replicas(two)
    watched.add([])
    assert (watched.copy, watched.copies, watched.waited) == (0, 2, 2.0)
    assert [(s.kind, s.start, s.seconds) for s in recorder.slices] == [
        ("send", 100.0, 1.0),
        ("wait", 101.0, 2.0),
    ]


def test_clocks_of_one_machine_are_one() -> None:
    assert clock_ahead(clock) == (0.0, 0.0)


def test_the_fastest_answer_tells_how_far_clocks_are_apart(now: list[float]) -> None:
    ways = iter([(0.3, 0.1), (0.002, 0.001), *[(0.2, 0.4)] * 6])  # there, and back

    def ask() -> tuple[str, float]:
        there, back = next(ways)
        now[0] += there
        told = now[0] + 50.0  # it is so much ahead
        now[0] += back
        return "elsewhere", told

    ahead, error = clock_ahead(ask)
    assert error == pytest.approx(0.0015)
    assert abs(ahead - 50.0) <= error


def test_tracks_are_on_one_axis_and_show_for_whom_the_others_wait() -> None:
    here = Track(("a", "b"), (Slice("compute", "states", 1, 10.0, 0.5, "b"),))
    there = Track(
        ("c",),
        (Slice("send", "states", 1, 60.25, 0.25), Slice("wait", "states", 1, 60.5, 1.0, None, 0)),
        "10.0.0.2 (1f2e)",
        ahead=50.0,
        error=0.0004,
    )
    found = chrome([here, there], [1])
    about = {
        (e["pid"], e["tid"], e["name"]): next(iter(e["args"].values()))
        for e in found["traceEvents"]
        if e["ph"] == "M"
    }
    assert about[0, 0, "process_name"] == "actor 0: a, b"
    assert about[1, 0, "process_name"] == "actor 1: c on 10.0.0.2 (1f2e)"
    assert about[1, 0, "process_labels"] == "the others wait for it, clock ± 0.4 ms"
    assert about[0, 0, "process_labels"] == ""
    assert [about[0, row, "thread_name"] for row in range(3)] == ["messages", "a", "b"]
    compute, send, wait = (e for e in found["traceEvents"] if e["ph"] == "X")
    assert (compute["ts"], compute["dur"], compute["pid"], compute["tid"]) == (0, 5e5, 0, 2)
    assert compute["args"] == {"round": "states", "step": 1, "agent": "b"}
    assert (send["name"], send["ts"], send["dur"]) == ("send states", 2.5e5, 2.5e5)
    assert (wait["pid"], wait["tid"], wait["ts"]) == (1, 0, 5e5)
    assert wait["args"]["for"] == "actor 0"
