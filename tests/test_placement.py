from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdnn_dist.placement import Demand, Node, assign, demands, hosts, pack
from hdnn_dist.spec import AgentSpec, ClusterSpec
from hdnn_dist.topology import Topology


def topology(*agents: AgentSpec) -> Topology:
    return Topology("t", agents, ())


def plain(M: int) -> Topology:
    return topology(*(AgentSpec(name=f"a{i}", d=1) for i in range(M)))


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_agent_has_one_actor_and_actors_are_even(M: int, size: int) -> None:
    packing = pack(plain(M), ClusterSpec(agents_per_actor=size), cores=1)
    assert [i for agents in packing for i in agents] == list(range(M))
    sizes = [len(agents) for agents in packing]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert [i in packing[rank] for i, rank in enumerate(hosts(packing))] == [True] * M


@pytest.mark.parametrize(("cores", "actors"), [(1, 1), (2, 2), (3, 3), (16, 16), (64, 16)])
def test_auto_makes_one_actor_a_core(cores: int, actors: int) -> None:
    assert len(pack(plain(16), ClusterSpec(agents_per_actor="auto"), cores)) == actors


def test_agents_with_other_labels_do_not_share_an_actor() -> None:
    agents = [
        AgentSpec(name=f"a{i}", d=1, labels={"site": "x" if i < 3 else "y"}) for i in range(5)
    ]
    packing = pack(topology(*agents), ClusterSpec(agents_per_actor=4), cores=1)
    assert packing == ((0, 1, 2), (3, 4))
    assert [d.labels for d in demands(topology(*agents), packing, 4)] == [
        {"site": "x"},
        {"site": "y"},
    ]


def test_what_is_asked_for_is_the_sum_over_the_agents() -> None:
    agents = topology(
        AgentSpec(name="a", d=1, cpu=1.5, resources={"camera": 1.0}),
        AgentSpec(name="b", d=1, gpu=0.5, resources={"camera": 1.0}),
        AgentSpec(name="c", d=1),
    )
    first, second = demands(agents, ((0, 1), (2,)), cores=2.5)
    assert first.resources == {"CPU": 2.0, "GPU": 0.5, "camera": 2.0}
    assert second.resources == {"CPU": 0.5}  # 1.5 of 2.5 are named: two share the last whole one


@given(st.integers(1, 100), st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 9))
def test_unnamed_shares_fit_on_machines_of_any_size(
    M: int, machines: list[int], per_actor: int
) -> None:
    cluster = ClusterSpec(agents_per_actor=per_actor)
    packing = pack(plain(M), cluster, sum(machines))
    nodes = [Node(f"n{k}", {"CPU": float(cores)}, {}) for k, cores in enumerate(machines)]
    assert None not in assign(demands(plain(M), packing, sum(machines)), nodes)


def test_a_forecast_goes_by_resources_and_labels() -> None:
    nodes = [Node("x", {"CPU": 2.0}, {}), Node("y", {"CPU": 1.0, "GPU": 1.0}, {"site": "b"})]
    wanted = (
        Demand({"CPU": 1.0}, {"site": "b"}),
        Demand({"CPU": 2.0}, {}),
        Demand({"GPU": 1.0}, {}),
        Demand({"CPU": 0.5}, {"site": "c"}),
    )
    assert assign(wanted, nodes) == (1, 0, 1, None)
