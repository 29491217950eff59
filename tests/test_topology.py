"""Topologies: every way to give a graph, and what is computed from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdnn_dist.errors import SpecError
from hdnn_dist.reader import dump_spec, read_spec, spec_from_dict
from hdnn_dist.spec import AgentSpec, Spec
from hdnn_dist.topology import Topology, layer_edges, resolve

SHIPPED = sorted((Path(__file__).parent.parent / "topologies").glob("*.yaml"))


def resolved(model: dict[str, Any] | None = None, /, **topology: Any) -> Spec:
    return resolve(spec_from_dict({"topology": topology, "model": model or {}}))


def topology(**given: Any) -> Topology:
    return Topology.from_spec(spec_from_dict({"topology": given}).topology)


def refused(model: dict[str, Any] | None = None, /, **topology: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        resolved(model, **topology)
    assert "\n" not in str(caught.value)
    return caught.value


def generator(name: str, **args: Any) -> dict[str, Any]:
    return {"generator": name, "args": args}


@st.composite
def graphs(draw: st.DrawFn, directed: bool = False) -> nx.Graph:
    """A graph on 0 … M-1, in any number of pieces."""
    M = draw(st.integers(1, 12))
    nodes = st.integers(0, M - 1)
    graph = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(range(M))
    graph.add_edges_from(draw(st.lists(st.tuples(nodes, nodes), max_size=30)))
    return graph


# --- where agents and edges come from ------------------------------------------------------------


def test_explicit_edges() -> None:
    t = topology(agents=["a", {"name": "b", "d": 2}, "c"], edges=[["b", "a"], ["b", "c"]], d=5)
    assert (t.names, t.sizes) == (("a", "b", "c"), (5, 2, 5))
    assert t.edges == ((0, 1), (1, 0), (1, 2), (2, 1))
    assert topology(agents=3, edges=[["a1", "a3"]]).names == ("a1", "a2", "a3")
    assert topology(edges=[["z", "y"], ["y", "x"]]).names == ("z", "y", "x")
    directed = topology(edges=[["z", "y"], ["y", "x"]], directed=True)
    assert directed.edges == ((0, 1), (1, 2))


def test_the_kth_agent_is_the_generators_kth_node() -> None:
    grid = topology(edges=generator("grid_2d_graph", m=2, n=2))
    assert grid.names == ("a1", "a2", "a3", "a4")
    assert grid.edges == ((0, 1), (0, 2), (1, 0), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2))
    star = topology(agents=["hub", "x", "y"], edges=generator("star_graph", n=2))
    assert star.edges == ((0, 1), (0, 2), (1, 0), (2, 0))


def write(path: Path, text: str) -> dict[str, str]:
    path.write_text(text)
    return {"file": str(path)}


def test_graph_files(tmp_path: Path) -> None:
    graph = nx.Graph([("x", "y"), ("y", "z"), ("z", "z")])
    graph.nodes["y"]["d"] = 3
    nx.write_graphml(graph, tmp_path / "g.graphml")
    (tmp_path / "g.json").write_text(json.dumps(nx.node_link_data(graph)))
    for name in ("g.graphml", "g.json"):
        t = topology(edges={"file": str(tmp_path / name)})
        assert (t.names, t.sizes) == (("x", "y", "z"), (8, 3, 8))
        assert t.edges == ((0, 1), (1, 0), (1, 2), (2, 1))
    nx.write_edgelist(graph, tmp_path / "g.edgelist")
    edge_list = topology(edges={"file": str(tmp_path / "g.edgelist")})
    assert (edge_list.names, edge_list.edges) == (t.names, t.edges)
    grid = nx.node_link_data(nx.grid_2d_graph(2, 1))
    tuples = write(tmp_path / "grid.json", json.dumps(grid))
    assert topology(edges=tuples).names == ("0-0", "1-0")


def test_listed_agents_are_matched_by_name_with_a_file(tmp_path: Path) -> None:
    graph = nx.DiGraph([("x", "y")])
    nx.set_node_attributes(graph, {"x": 2, "y": 3}, "d")
    nx.write_graphml(graph, tmp_path / "g.graphml")
    file = {"file": str(tmp_path / "g.graphml")}
    t = topology(agents=["y", {"name": "x", "d": 7}], edges=file, directed=True)
    assert (t.names, t.sizes, t.edges) == (("y", "x"), (3, 7), ((1, 0),))
    assert topology(agents=2, edges=file, directed=True).names == ("x", "y")
    assert "no node of" in str(refused(agents=["x", "z"], edges=file, directed=True))
    assert "y of" in str(refused(agents=["x"], edges=file, directed=True))
    assert "3 agents given" in str(refused(agents=3, edges=file, directed=True))
    assert "gives a directed graph" in str(refused(edges=file))


def test_base_is_where_files_are_found(tmp_path: Path) -> None:
    write(tmp_path / "g.txt", "a b")
    spec = spec_from_dict({"topology": {"edges": {"file": "g.txt"}}})
    assert resolve(spec, tmp_path).topology.edges == [("a", "b")]


# --- resolving -----------------------------------------------------------------------------------

LAYERS = ["topology", "none", {"edges": [["a1", "a3"]]}, {"edges": generator("star_graph", n=3)}]


@pytest.mark.parametrize("directed", [False, True])
def test_layer_graphs(directed: bool) -> None:
    spec = resolved(
        {"layer_graphs": LAYERS}, edges=generator("cycle_graph", n=4), directed=directed
    )
    assert resolve(spec) == spec
    ring = Topology.from_spec(spec.topology).edges
    chord = ((0, 2),) if directed else ((0, 2), (2, 0))
    star = (
        ((0, 1), (0, 2), (0, 3)) if directed else ((0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0))
    )
    assert layer_edges(spec) == (ring, (), chord, star)
    assert layer_edges(resolved(agents=2)) is None


@pytest.mark.parametrize(
    "path", [None, *SHIPPED], ids=lambda path: path.stem if path else "default"
)
def test_shipped_topologies(path: Path | None, tmp_path: Path) -> None:
    spec, _ = read_spec(path)
    alone = resolve(spec, path and path.parent)
    assert resolve(alone) == alone
    (tmp_path / "spec.yaml").write_text(dump_spec(alone))
    assert read_spec(tmp_path / "spec.yaml")[0] == alone
    t = Topology.from_spec(alone.topology)
    assert all(isinstance(agent, AgentSpec) and agent.d for agent in t.agents)
    # Information crosses the graph within the depth, along the dependencies.
    assert spec.model.layers >= nx.diameter(t.digraph)


def test_ten_topologies_and_more_are_shipped() -> None:
    names = [read_spec(path)[0].topology.name for path in SHIPPED]
    assert len(set(names)) >= 10
    assert len(names) == len(set(names)) + 1  # one grid, with two ways to train on it


# --- refusals ------------------------------------------------------------------------------------

ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("given", "loc", "fragments"),
    [
        ({}, "topology", ["there are no agents", "agents: 8"]),
        ({"agents": []}, "topology.agents", ["empty list", "at least one"]),
        ({"agents": ["a", "b", "a"]}, "topology.agents.2", ["agents 0 and 2", "called a"]),
        (
            {"agents": ["a", "b", "A"]},
            "topology.agents.2",
            ["agents 0 and 2", "called a and A, the same but for case"],
        ),
        ({"agents": 10**7}, "topology.agents", ["10000000 agents", "at most"]),
        (
            {"agents": ["fog1", "fog2"], "edges": [["fog1", "fog2"], ["fog3", "fog1"]]},
            "topology.edges.1",
            ["no agent called 'fog3'", "did you mean 'fog"],
        ),
        ({"agents": ABC, "edges": [["a", "xyz"]]}, "topology.edges.0", ["use one of a, b, c"]),
        ({"agents": ABC, "edges": [["a", "a"]]}, "topology.edges.0", ["a has an edge to itself"]),
        (
            {"agents": ABC, "edges": [["a", "b"], ["b", "c"], ["a", "b"]]},
            "topology.edges.2",
            ["edge [a, b] repeats edge 0", "drop one of the two"],
        ),
        (
            {"agents": ABC, "edges": [["a", "b"], ["b", "a"]]},
            "topology.edges.1",
            ["edge [b, a] repeats edge 0", "directed: true"],
        ),
        (
            {"agents": 7, "edges": generator("cycle_graph", n=8)},
            "topology.agents",
            ["7 agents given, but cycle_graph has 8 nodes"],
        ),
        (
            {"agents": ABC, "edges": generator("cycle_graph", n=8)},
            "topology.agents",
            ["3 agents given"],
        ),
    ],
)
def test_refused_agents_and_edges(given: dict[str, Any], loc: str, fragments: list[str]) -> None:
    error = refused(**given)
    assert ".".join(map(str, error.loc)) == loc
    assert [f for f in fragments if f not in str(error)] == [], str(error)


@pytest.mark.parametrize(
    ("name", "text", "fragments"),
    [
        ("g.txt", "# nothing\n", ["no nodes"]),
        ("g.txt", "a ../b\n", ["node '../b' cannot name an agent", "letters"]),
        ("g.json", '{"nodes": [{"id": "a", "d": "x"}], "edges": []}', ["node a has d = 'x'"]),
        ("g.json", '{"nodes": [{"id": "a", "d": 0}], "edges": []}', ["node a has d = 0"]),
        ("g.json", '{"nodes": [{"id": 1}, {"id": "1"}], "edges": []}', ["both called 1"]),
        ("g.json", '{"nodes": [{"id": "a", "d": 10001}], "edges": []}', ["d = 10001", "to 10000"]),
    ],
)
def test_refused_files(tmp_path: Path, name: str, text: str, fragments: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    error = refused(edges={"file": str(path)})
    assert error.loc == ("topology", "edges", "file")
    assert [f for f in fragments if f not in str(error)] == [], str(error)


@pytest.mark.parametrize(
    ("edges", "loc", "fragment"),
    [
        ([["a1", "a9"]], (0,), "no agent called 'a9'"),
        ([["a1", "a1"]], (0,), "edge to itself"),
        (generator("cycle_graph", n=5), (), "has 5 nodes, but there are 4 agents"),
        (generator("gn_graph", n=4), (), "directed graph"),
    ],
)
def test_refused_layer_graphs(edges: Any, loc: tuple[int, ...], fragment: str) -> None:
    error = refused({"layer_graphs": ["none", {"edges": edges}]}, agents=4)
    assert error.loc == ("model", "layer_graphs", 1, "edges", *loc)
    assert fragment in str(error)


# --- the value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("directed", [False, True])
def test_from_graph(directed: bool) -> None:
    graph = nx.grid_2d_graph(2, 2, create_using=nx.DiGraph if directed else nx.Graph)
    graph.nodes[0, 1]["d"] = 5
    t = Topology.from_graph(graph, d=3, name="grid")
    assert (t.name, t.directed, t.names) == ("grid", directed, ("0-0", "0-1", "1-0", "1-1"))
    assert t.sizes == (3, 5, 3, 3)
    assert t.index("1-0") == 2
    assert (2, 0) in t.edges
    with pytest.raises(SpecError, match="no agent called '1-2'; did you mean '1-"):
        t.index("1-2")
    with pytest.raises(SpecError, match="no nodes"):
        Topology.from_graph(nx.Graph())


@given(graph=graphs(directed=True))
def test_edges_are_the_graphs_own(graph: nx.DiGraph) -> None:
    t = Topology.from_graph(graph)
    assert t.edges == tuple(sorted((u, v) for u, v in graph.edges if u != v))
    assert set(t.digraph.edges) == set(t.edges)
    assert list(t.digraph) == list(range(len(graph)))
    one_way = Topology.from_graph(graph, two_way=False)
    mutual = {frozenset(e) for e in t.edges if e[::-1] in t.edges}
    assert {frozenset(e) for e in one_way.links.edges} == mutual
    assert {frozenset(e) for e in t.links.edges} == {frozenset(e) for e in t.edges}
    assert len(one_way.links) == len(graph)


@given(graph=graphs())
def test_measures(graph: nx.Graph) -> None:
    t = Topology.from_graph(graph)
    assert t.connected == nx.is_connected(graph)
    assert t.diameter == (nx.diameter(graph) if t.connected else None)
    if len(graph) == 1:
        assert t.spectral_gap is None
    else:
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        L = nx.normalized_laplacian_matrix(graph).toarray()
        assert t.spectral_gap == pytest.approx(max(0, np.linalg.eigvalsh(L)[1]), abs=1e-9)
        assert (t.spectral_gap > 1e-9) == t.connected
    centre = t.centre()
    largest = max(map(len, nx.connected_components(graph)))
    piece = nx.node_connected_component(graph, centre)
    assert len(piece) == largest
    assert nx.eccentricity(graph.subgraph(piece))[centre] == nx.radius(graph.subgraph(piece))


@given(data=st.data(), graph=graphs())
def test_a_spanning_tree_is_shortest_paths_over_links(data: st.DataObject, graph: nx.Graph) -> None:
    t = Topology.from_graph(graph)
    agents = st.integers(0, len(graph) - 1)
    root, nodes = data.draw(agents), data.draw(st.sets(agents))
    distance = nx.single_source_shortest_path_length(graph, root)
    if nodes - distance.keys():
        with pytest.raises(SpecError) as caught:
            t.spanning_tree(root, nodes)
        assert caught.value.loc == ("model", "readout")
        assert str(min(nodes - distance.keys())) in caught.value.problem
        return
    tree = t.spanning_tree(root, nodes)
    assert tree.parent.keys() | {root} == tree.depth.keys()
    assert all(t.links.has_edge(child, parent) for child, parent in tree.parent.items())
    assert all(tree.depth[child] == tree.depth[p] + 1 for child, p in tree.parent.items())
    assert tree.depth == {node: distance[node] for node in tree.depth}
    leaves = tree.depth.keys() - set(tree.parent.values()) - {root}
    assert nodes <= tree.depth.keys()
    assert leaves <= nodes
    assert len(tree.levels) == max(tree.depth.values())
    assert dict(pair for level in tree.levels for pair in level) == tree.parent
    for k, level in enumerate(tree.levels):
        assert {tree.depth[child] for child, _ in level} == {len(tree.levels) - k}


def test_the_tree_reaches_everyone_by_default() -> None:
    tree = topology(edges=generator("path_graph", n=4)).spanning_tree(1)
    assert tree.parent == {0: 1, 2: 1, 3: 2}
    assert tree.levels == (((3, 2),), ((0, 1), (2, 1)))
    assert topology(agents=1).spanning_tree(0).levels == ()


def test_one_way_links_carry_no_tree() -> None:
    ring = topology(edges=generator("cycle_graph", n=3), directed=True, links="one-way")
    with pytest.raises(SpecError, match="no path of two-way links from a2, a3"):
        ring.spanning_tree(0)
    assert ring.connected
    assert ring.diameter == 1


@pytest.mark.parametrize("graph", [nx.path_graph(4096), nx.balanced_tree(3, 7)], ids=len)
def test_the_centre_of_a_large_tree_is_exact(graph: nx.Graph) -> None:
    middles = set(nx.center(graph)) if len(graph) < 4096 else {2047, 2048}
    assert Topology.from_graph(graph).centre() in middles


def test_digest() -> None:
    edges = [["a1", "a2"], ["a2", "a3"]]
    same = topology(agents=3, edges=edges)
    assert same.digest() == topology(agents=["a1", "a2", "a3"], edges=edges[::-1]).digest()
    others = [
        topology(agents=3, edges=edges, d=9),
        topology(agents=3, edges=edges, directed=True),
        topology(agents=3, edges=edges, directed=True, links="one-way"),
        topology(agents=3, edges=edges[:1]),
        topology(agents=4, edges=edges),
        topology(edges=[["b1", "a2"], ["a2", "a3"]]),
    ]
    assert len({t.digest() for t in [same, *others]}) == 1 + len(others)
    assert len(same.digest()) == 64
