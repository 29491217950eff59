from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given

from hdnn_dist.errors import SpecError
from hdnn_dist.exchange import Message, Plan, Round
from hdnn_dist.family import H2
from hdnn_dist.job import Job
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.testing import assert_within
from tests.strategies import jobs


def job(edges: list[list[str]], **sections: dict[str, object]) -> Job:
    topology = {"d": 2, "edges": edges} | sections.pop("topology", {})
    return Job.of(spec_from_dict({"topology": topology, **sections}))


@given(jobs())
def test_the_adjoint_turns_every_message_round(job: Job) -> None:
    for phase in job.plan.training_step:
        assert phase.adjoint.adjoint is phase
        turned = {(m.target, m.source, m.rows) for m in phase.messages}
        assert turned == {(m.source, m.target, m.rows) for m in phase.adjoint.messages}


@given(jobs())
def test_backward_is_the_adjoint_of_forward_in_reverse(job: Job) -> None:
    plan = dataclasses.replace(job.plan, recompute=False)
    assert [phase.adjoint for phase in reversed(plan.backward)] == list(plan.forward)


@given(jobs())
def test_recomputing_runs_the_rounds_of_the_layers_once_more(job: Job) -> None:
    store, recompute = (dataclasses.replace(job.plan, recompute=r) for r in (False, True))
    scores = len([phase for phase in job.plan.collect if phase.messages])
    again = Counter(store.forward[: len(store.forward) - scores])
    assert Counter(recompute.backward) == Counter(store.backward) + again
    assert recompute.forward == store.forward


@given(jobs())
def test_nothing_is_planned_outside_the_links_and_no_round_is_empty(job: Job) -> None:
    for phase in job.plan.training_step:
        assert phase.messages
        assert_within([(m.source, m.target) for m in phase.messages], job.architecture.patterns.S)
        assert len({(m.source, m.target) for m in phase.messages}) == len(phase.messages)


@given(jobs())
def test_the_plan_is_minimal_for_its_patterns(job: Job) -> None:
    # One message for each non-zero block off the diagonal, of the width of the state sent.
    patterns, sizes = job.architecture.patterns, job.architecture.sizes
    for T, states in zip(patterns.T, job.plan.states, strict=True):
        blocks = {(l, i, sizes[l]) for i, l in T.entries if i != l}
        assert {(m.source, m.target, m.rows) for m in states.messages} == blocks


@pytest.mark.parametrize(("graph", "rounds"), [("K", 2), ("J", 1), ("both", 3)])
def test_rounds_of_a_half_step(graph: str, rounds: int) -> None:
    plan = job([["a", "b"]], model={"graph": graph, "layers": 3}).plan
    p, q = plan.updates
    assert len(plan.half_step(0, p)) == len(plan.half_step(2, q)) == rounds
    # 3 layers of 2 half steps, the readout's single level, and the same back.
    assert len(plan.training_step) == 2 * (6 * rounds + 1)


def test_the_rounds_of_a_half_step_by_name() -> None:
    plan = job([["a", "b"]], model={"graph": "both"}).plan
    p, q = plan.updates
    assert [r.name for r in plan.half_step(0, p)] == ["states", "states*", "mix*"]
    assert [r.name for r in plan.half_step(0, q)] == ["states", "states*", "mix"]
    backward = plan.backward[len(plan.collect) :]
    assert [r.name for r in backward[:3]] == ["mix*", "states", "states*"]


@pytest.mark.parametrize(
    ("model", "rounds"),
    [
        ({"name": "H1"}, [["states", "states*"]]),
        ({"name": "H1", "graph": "J"}, [["mix"]]),
        ({"name": "H1", "J": "J2"}, [["states", "states*", "mix"]]),
        ({"name": "MS1"}, [["states"], ["states*"]]),
        ({"name": "MS2"}, [["states", "states*"]]),
        ({"name": "MS3"}, [["states", "states*"], ["states", "states*"]]),
    ],
)
def test_the_rounds_of_a_layer(model: dict[str, object], rounds: list[list[str]]) -> None:
    plan = job([["a", "b"]], model=model).plan
    assert [[r.name for r in plan.half_step(0, u)] for u in plan.updates] == rounds


def test_an_edge_of_MS2_carries_one_message_each_way() -> None:
    # a trains the block above the diagonal: b sends its state, a sends Kᵀ y.
    plan = job([["a", "b"]], model={"name": "MS2", "layers": 1}).plan
    assert plan.traffic(plan.half_step(0, plan.updates[0]), 1, 1) == {(0, 1): 4, (1, 0): 4}


def test_bytes_by_hand() -> None:
    # a -> b, d = 2 and 3: one layer moves q^a to b and K[b, a]ᵀ s back, in both half steps.
    plan = job(
        [["a", "b"]],
        topology={"directed": True, "agents": [{"name": "a", "d": 2}, {"name": "b", "d": 3}]},
        model={"layers": 1, "readout": {"root": "a"}},
        training={"clip_norm": 1.0},
    ).plan
    B, C, size = 5, 10, 8
    assert plan.traffic(plan.forward, B, size) == {
        (0, 1): 2 * 2 * B * size,
        (1, 0): (2 * 2 + C) * B * size,
    }
    assert plan.traffic(plan.training_step, B, size) == {
        (0, 1): (2 * 2 + 2 * 2 + C) * B * size + size,
        (1, 0): (2 * 2 + 2 * 2 + C) * B * size + size,
    }


def test_narrow_messages_are_half_the_bytes_but_for_the_norm() -> None:
    full, bf16 = (
        job([["a", "b"]], training={"clip_norm": 1.0, "messages": messages})
        for messages in ("full", "bf16")
    )
    norm = 2 * full.dtype.itemsize  # up, and down
    assert bf16.bytes_per_step - norm == (full.bytes_per_step - norm) / 2


def test_one_way_links_are_refused_where_training_needs_the_way_back() -> None:
    edges = [["a", "b"], ["b", "a"], ["b", "c"]]
    one_way = {"directed": True, "links": "one-way"}
    with pytest.raises(SpecError, match=r"from 'c' to 'b'.*\[c, b\]"):
        job(edges, topology=one_way, model={"readout": {"agents": ["a"]}})
    job([*edges, ["c", "b"]], topology=one_way)  # every way back is an edge itself


def test_graphs_per_layer_stay_inside_the_links() -> None:
    with pytest.raises(SpecError, match=r"layer_graphs\.0: 'a' would use the state of 'c'"):
        job([["a", "b"], ["b", "c"]], model={"layer_graphs": [{"edges": [["a", "c"]]}]})


def test_digests_tell_plans_apart() -> None:
    edges = [["a", "b"], ["b", "c"]]
    assert job(edges).plan.digest() == job(edges).plan.digest()
    others = [
        job(edges, model={"layers": 3}),
        job(edges, model={"graph": "J"}),
        job(edges, topology={"d": 3}),
        job(edges, training={"clip_norm": 1.0}),
        job([*edges, ["a", "c"]]),
    ]
    assert len({other.plan.digest() for other in [job(edges), *others]}) == 6


def test_a_plan_without_neighbours_has_no_rounds() -> None:
    assert Job.of(spec_from_dict({"topology": {"agents": 1}})).plan.training_step == ()
    phase = Round("x", (Message(0, 1, 3),))
    assert (phase.numbers(4), Round("y", phase.messages, per_sample=False).numbers(4)) == (12, 3)
    plan = Plan(updates=H2.updates, states=(phase,), mix=Round("mix", ()), collect=())
    assert plan.forward[0] is phase
