from __future__ import annotations

import math

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdnn_dist.placement import (
    Demand,
    Node,
    Packing,
    assign,
    demands,
    hosts,
    pack,
    shortage,
)
from hdnn_dist.spec import AgentSpec, ClusterSpec
from hdnn_dist.topology import Topology


def topology(*agents: AgentSpec) -> Topology:
    return Topology("t", agents, ())


def plain(M: int) -> Topology:
    return topology(*(AgentSpec(name=f"a{i}", d=1) for i in range(M)))


def graph(name: str, d: int = 4, **arguments: object) -> Topology:
    return Topology.from_graph(getattr(nx, name)(**arguments), d)


def machine(cores: float, name: str = "n", **more: float) -> Node:
    return Node(name, {"CPU": cores, **more}, {})


def cut(topology: Topology, packing: Packing) -> int:
    """Undirected edges between actors."""
    host = hosts(packing)
    return sum(host[l] != host[i] for l, i in topology.edges) // 2


@given(st.integers(1, 40), st.floats(0, 1), st.integers(1, 12), st.integers(0, 99))
def test_every_agent_has_one_actor_and_actors_are_even(
    M: int, p: float, size: int, seed: int
) -> None:
    there = graph("gnp_random_graph", n=M, p=p, seed=seed)
    packing = pack(there, ClusterSpec(agents_per_actor=size), cores=1)
    assert sorted(i for agents in packing for i in agents) == list(range(M))
    assert all(list(agents) == sorted(agents) for agents in packing)
    assert list(packing) == sorted(packing)
    sizes = [len(agents) for agents in packing]
    assert max(sizes) <= size
    assert len(packing) == math.ceil(M / size)
    assert max(sizes) == math.ceil(M / len(packing))
    assert [i in packing[rank] for i, rank in enumerate(hosts(packing))] == [True] * M


@pytest.mark.parametrize(
    ("there", "actors", "edges"),
    [
        (graph("grid_2d_graph", m=4, n=4), 2, 4),
        (graph("grid_2d_graph", m=4, n=4), 4, 8),
        (graph("cycle_graph", n=24), 3, 3),
        (graph("barbell_graph", m1=6, m2=0), 2, 1),
        (graph("grid_2d_graph", m=64, n=64), 16, 440),  # squares of 16 x 16: 384
    ],
)
def test_actors_are_cut_where_few_edges_cross(there: Topology, actors: int, edges: int) -> None:
    for cluster in (
        ClusterSpec(agents_per_actor="auto"),
        ClusterSpec(agents_per_actor=len(there.agents) // actors),
    ):
        packing = pack(there, cluster, cores=actors)
        assert len(packing) == actors
        assert cut(there, packing) <= edges


def test_the_order_of_the_agents_does_not_matter_to_the_cut() -> None:
    """Two cliques and a bridge, with the names of one among those of the other."""
    order = [k // 2 + 6 * (k % 2) for k in range(12)]
    shuffled = nx.relabel_nodes(nx.barbell_graph(6, 0), dict(enumerate(order)))
    scattered = nx.Graph()
    scattered.add_nodes_from(order)
    scattered.add_edges_from(shuffled.edges)
    there = Topology.from_graph(scattered)
    assert cut(there, pack(there, ClusterSpec(agents_per_actor=6), cores=1)) == 1


def test_links_that_carry_more_are_cut_less() -> None:
    ring = nx.cycle_graph(6)
    nx.set_node_attributes(ring, dict(enumerate((9, 9, 1, 9, 9, 1))), "d")
    host = hosts(pack(Topology.from_graph(ring), ClusterSpec(agents_per_actor=3), 1))
    assert (host[0], host[3]) == (host[1], host[4])


def test_auto_evens_out_what_is_computed() -> None:
    star = nx.star_graph(8)
    nx.set_node_attributes(star, {0: 256}, "d")
    there = Topology.from_graph(star, d=2)
    with_hub, without = pack(there, ClusterSpec(agents_per_actor="auto"), 2)
    assert (len(with_hub), len(without)) in ((1, 8), (2, 7))


@pytest.mark.parametrize(("cores", "actors"), [(1, 1), (2, 2), (3, 3), (16, 16), (64, 16)])
def test_auto_makes_one_actor_a_core(cores: int, actors: int) -> None:
    assert len(pack(plain(16), ClusterSpec(agents_per_actor="auto"), cores)) == actors


def test_agents_with_other_labels_do_not_share_an_actor() -> None:
    agents = [
        AgentSpec(name=f"a{i}", d=1, labels={"site": "x" if i < 3 else "y"}) for i in range(5)
    ]
    packing = pack(topology(*agents), ClusterSpec(agents_per_actor=4), cores=1)
    assert packing == ((0, 1, 2), (3, 4))
    scattered = [agents[k] for k in (0, 3, 1, 4, 2)]
    assert pack(topology(*scattered), ClusterSpec(agents_per_actor=4), 1) == ((0, 2, 4), (1, 3))
    assert [d.labels for d in demands(topology(*agents), packing, [machine(4)])] == [
        {"site": "x"},
        {"site": "y"},
    ]


@pytest.mark.parametrize("others", [{"speed": 0.5}, {"gpu": 0.5}])
def test_agents_on_other_machines_do_not_share_an_actor(others: dict[str, float]) -> None:
    agents = [AgentSpec(name=f"a{i}", d=1, **(others if i < 3 else {})) for i in range(5)]
    packing = pack(topology(*agents), ClusterSpec(agents_per_actor="auto"), cores=2)
    assert packing == ((0, 1, 2), (3, 4))


def test_what_is_asked_for_is_the_sum_over_the_agents() -> None:
    agents = topology(
        AgentSpec(name="a", d=1, cpu=1.5, resources={"camera": 1.0}),
        AgentSpec(name="b", d=1, gpu=0.5, resources={"camera": 1.0}),
        AgentSpec(name="c", d=1),
    )
    first, second = demands(agents, ((0, 1), (2,)), [machine(2.5)])
    assert first.resources == {"CPU": 2.0, "GPU": 0.5, "camera": 2.0}
    assert second.resources == {"CPU": 0.5}  # 1.5 of 2.5 are named: two share the last whole one


@given(st.integers(1, 100), st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 9))
def test_unnamed_shares_fit_on_machines_of_any_size(
    M: int, machines: list[int], per_actor: int
) -> None:
    cluster = ClusterSpec(agents_per_actor=per_actor)
    packing = pack(plain(M), cluster, sum(machines))
    nodes = [machine(cores, f"n{k}") for k, cores in enumerate(machines)]
    assert None not in assign(demands(plain(M), packing, nodes), nodes)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=5),
)
def test_agents_pinned_to_a_site_share_its_cores(
    sites: list[int], machines: list[tuple[int, int]]
) -> None:
    """Site 0 is anywhere; nobody names cores, so that whoever has its site finds room there."""
    nodes = [
        Node(f"n{k}", {"CPU": float(cores)}, {"site": str(site)})
        for k, (cores, site) in enumerate(machines)
    ]
    there = topology(
        *(
            AgentSpec(name=f"a{i}", d=1, labels={"site": str(site)} if site else {})
            for i, site in enumerate(sites)
        )
    )
    wanted = demands(there, pack(there, ClusterSpec(), 1), nodes)
    for site, place in zip(sites, assign(wanted, nodes), strict=True):
        exists = not site or str(site) in {node.labels["site"] for node in nodes}
        assert (place is not None) == exists
        if site and place is not None:
            assert nodes[place].labels == {"site": str(site)}


def test_a_machine_that_few_can_use_does_not_make_the_others_small() -> None:
    agents = [AgentSpec(name=f"a{i}", d=1, resources={"camera": 1}) for i in range(4)]
    there = topology(*agents, AgentSpec(name="b", d=1))
    nodes = [machine(1, "seeing", camera=4), machine(4, "blind")]
    wanted = demands(there, tuple((i,) for i in range(5)), nodes)
    assert [demand.resources["CPU"] for demand in wanted] == [0.25] * 4 + [1]
    assert assign(wanted, nodes) == (0, 0, 0, 0, 1)


def test_a_forecast_goes_by_resources_and_labels() -> None:
    nodes = [Node("x", {"CPU": 2.0}, {}), Node("y", {"CPU": 1.0, "GPU": 1.0}, {"site": "b"})]
    wanted = (
        Demand({"CPU": 1.0}, {"site": "b"}),
        Demand({"CPU": 2.0}, {}),
        Demand({"GPU": 1.0}, {}),
        Demand({"CPU": 0.5}, {"site": "c"}),
    )
    assert assign(wanted, nodes) == (1, 0, 1, None)


def test_who_fits_on_few_nodes_is_placed_first_and_the_others_beside_or_apart() -> None:
    nodes = [machine(2, "x", camera=1), machine(2, "y")]
    wanted = [Demand({"CPU": 1.0}, {}), Demand({"CPU": 2.0, "camera": 1.0}, {})]
    assert assign(wanted, nodes) == (1, 0)
    plain = [Demand({"CPU": 0.5}, {})] * 4
    assert assign(plain, nodes) == (0, 0, 0, 0)
    assert assign(plain, nodes, spread=True) == (0, 1, 0, 1)


def test_what_is_missing_is_told_of_each_node() -> None:
    nodes = [
        Node("x", {"CPU": 2.0, "camera": 1.0}, {"site": "north"}),
        Node("y", {"CPU": 2.0}, {"site": "south"}),
        *(Node(f"z{k}", {"CPU": 1.0}, {}) for k in range(9)),
    ]
    wanted = [Demand({"CPU": 1.0, "camera": 1.0}, {"site": "north"})] * 2
    assert shortage(wanted[:1], ["a"], nodes) == ""
    assert shortage(wanted, ["a", "b"], nodes) == (
        "1 of 2 actors find no place; the first, of b, asks for 1 CPU, 1 camera, the label "
        "site=north; x: 0 camera of 1 left; y: its site is south, "
        "no camera; z0, z1, z2, z3, z4 and 4 more: no label site, no camera"
    )
    others = [Demand({"GPU": 1.0}, {}), *wanted, Demand({"GPU": 1.0}, {})]
    assert shortage(others, "abcd", nodes[:2]) == (
        "3 of 4 actors find no place; the first, of a, asks for 1 GPU; x, y: no GPU; another, of "
        "c, asks for 1 CPU, 1 camera, the label site=north; x: 0 camera of 1 left; y: its site is "
        "south, no camera"
    )
    blind = [Node("head", {}, {})]
    assert shortage(wanted, ["a", "b"], blind) == "there is no machine with a core"
