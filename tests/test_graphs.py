"""Graphs from outside: generators that are called, files that are read, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import resource
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdnn_dist import graphs
from hdnn_dist.errors import SpecError
from hdnn_dist.graphs import generators, graph_of, simple
from hdnn_dist.spec import FileEdges, GeneratedEdges
from hdnn_dist.topology import Topology

LOC = ("topology", "edges")


def generated(name: str, directed: bool = False, /, **args: Any) -> nx.Graph:
    return graph_of(GeneratedEdges(generator=name, args=args), directed, Path(), LOC)


def read(path: Path, directed: bool = False) -> nx.Graph:
    return graph_of(FileEdges(file=path.name), directed, path.parent, LOC)


def edges_of(graph: nx.Graph) -> set[object]:
    """The edges without loops; their ends have an order in a directed graph alone."""
    pairs = ((u, v) for u, v in graph.edges() if u != v)
    return set(pairs) if graph.is_directed() else set(map(frozenset, pairs))


@st.composite
def drawn(draw: st.DrawFn, multiple: bool = False) -> nx.Graph:
    """A graph on 0 … M-1, directed or not, with loops and, with `multiple`, parallel edges."""
    M = draw(st.integers(1, 10))
    kinds = [nx.Graph, nx.DiGraph] + [nx.MultiGraph, nx.MultiDiGraph] * multiple
    graph = draw(st.sampled_from(kinds))()
    graph.add_nodes_from((i, {"d": i + 1}) for i in range(M))
    node = st.integers(0, M - 1)
    graph.add_edges_from(draw(st.lists(st.tuples(node, node), max_size=25)))
    return graph


@given(drawn(multiple=True))
def test_a_simple_graph_has_what_it_is_of_but_loops_and_parallels(graph: nx.Graph) -> None:
    before = list(graph.edges)
    made = simple(graph)
    assert (made.is_multigraph(), made.is_directed()) == (False, graph.is_directed())
    assert list(made.nodes(data=True)) == list(graph.nodes(data=True))
    assert edges_of(made) == edges_of(graph)
    assert nx.number_of_selfloops(made) == 0
    assert list(graph.edges) == before


# --- generators ----------------------------------------------------------------------------------


def test_only_generators_can_be_called() -> None:
    assert {"watts_strogatz_graph", "random_geometric_graph", "cycle_graph"} <= generators().keys()
    assert not {"read_gml", "line_graph", "write_gml", "Graph"} & generators().keys()
    assert generators().keys() >= graphs._LINEAR  # no slip in the names of those that are quick


def test_nodes_are_numbered_in_the_order_of_the_generator() -> None:
    grid = generated("grid_2d_graph", m=2, n=3)
    assert list(grid) == list(range(6))
    assert edges_of(grid) == {
        frozenset((3 * i + k, 3 * i + k + 1)) for i in (0, 1) for k in (0, 1)
    } | {frozenset((k, k + 3)) for k in range(3)}


def test_generators_hear_whether_the_graph_is_directed() -> None:
    assert edges_of(generated("cycle_graph", True, n=3)) == {(0, 1), (1, 2), (2, 0)}
    random = generated("fast_gnp_random_graph", True, n=9, p=0.3)
    assert edges_of(random) != edges_of(random.reverse())


def test_a_missing_seed_is_zero_and_a_seed_counts() -> None:
    def edges(**seed: int) -> object:
        return edges_of(generated("gnp_random_graph", n=12, p=0.4, **seed))

    assert edges() == edges() == edges(seed=0) != edges(seed=2_000_000)


def test_list_arguments_and_star_arguments() -> None:
    assert generated("circulant_graph", n=6, offsets=[1, 3]).number_of_edges() == 9
    assert generated("complete_multipartite_graph", subset_sizes=[1, 3]).number_of_edges() == 3


def test_parallel_edges_and_self_loops_of_a_generator_are_dropped() -> None:
    graph = generated("scale_free_graph", True, n=12)
    assert not graph.is_multigraph()
    assert nx.number_of_selfloops(graph) == 0


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("watts_strogatz_graph", {"n": 12, "k": 4, "p": 0.5, "seed": 3}),
        ("grid_2d_graph", {"m": 3, "n": 2}),
        ("watts_strogatz_graph", {"n": 3, "k": 9, "p": 0.1}),
    ],
)
def test_a_graph_is_the_same_whichever_process_makes_it(
    name: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome() -> object:
        try:
            graph = generated(name, **args)
        except SpecError as error:
            return str(error)
        return list(graph), list(graph.edges)

    asked = []
    ask = graphs._ask
    monkeypatch.setattr(graphs, "_ask", lambda call: asked.append(call) or ask(call))
    here = outcome()
    assert not asked
    monkeypatch.setattr(graphs, "_SMALL", 0)
    assert outcome() == here
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("edges", "loc", "fragments"),
    [
        (("os.system", {"command": "ls"}), "generator", ["no networkx graph generator"]),
        (("__class__", {}), "generator", ["no networkx graph generator"]),
        (("classic", {}), "generator", ["no networkx graph generator"]),
        (("classic.cycle_graph", {"n": 3}), "generator", ["did you mean 'cycle_graph'?"]),
        (("read_gml", {"path": "/etc/passwd"}), "generator", ["no networkx graph generator"]),
        (("line_graph", {"G": "x"}), "generator", ["no networkx graph generator"]),
        (("watts_strogatz", {"n": 3}), "generator", ["did you mean 'watts_strogatz_graph'?"]),
        (("cycle_graph", {}), "args", ["cycle_graph needs 'n'", "add n under args"]),
        (("cycle_graph", {"m": 3}), "args.m", ["takes no 'm' here", "it takes n"]),
        (("cycle_graph", {"n": 3, "create_using": "x"}), "args.create_using", ["takes no"]),
        (("cycle_graph", {"n": 3, "backend": "x"}), "args.backend", ["takes no 'backend' here"]),
        (("cycle_graph", {"n": 10**7}), "args.n", ["10000000 is too large"]),
        (("lcf_graph", {"n": 3}), "generator", ["did you mean 'LCF_graph'?"]),
        (("path_graph", {"n": "abc"}), "args.n", ["'abc' given", "write a number"]),
        (("empty_graph", {"n": 100_001}), "", ["100001 nodes", "within 100000 agents"]),
        (("complete_graph", {"n": 1500}), "", ["1124250 edges", "and 1000000 edges"]),
        (("grid_graph", {"dim": [3, 10**7]}), "args.dim", ["is too large"]),
        (("complete_multipartite_graph", {"subset_sizes": 3}), "args.subset_sizes", ["a list"]),
        (("watts_strogatz_graph", {"n": 3, "k": 9, "p": 0.1}), "", ["k=9", "fails: k>n"]),
        (("cycle_graph", {"n": -2}), "", ["cycle_graph(n=-2) fails:"]),
        (("path_graph", {"n": 0}), "", ["path_graph(n=0) has no nodes"]),
        (("graph_atlas_g", {}), "generator", ["does not make a graph"]),
        (("gn_graph", {"n": 5}), "", ["gives a directed graph", "directed: true"]),
    ],
)
def test_refused_generators(
    edges: tuple[str, dict[str, Any]], loc: str, fragments: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        generated(edges[0], **edges[1])
    assert ".".join(map(str, caught.value.loc)) == f"topology.edges.{loc}".rstrip(".")
    assert [f for f in fragments if f not in str(caught.value)] == [], str(caught.value)


def test_text_where_a_generator_wants_it() -> None:
    assert generated("triad_graph", True, triad_name="300").number_of_edges() == 6


@pytest.mark.parametrize(
    ("name", "args"),
    [("watts_strogatz_graph", {"n": 5, "k": 2, "p": 0.1}), ("grid_graph", {"dim": [2, 2]})],
    ids=["told and refuses", "has no way to hear it"],
)
def test_a_generator_that_cannot_be_directed(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        generated(name, True, **args)
    assert caught.value.loc == LOC
    assert (
        "undirected graph" in caught.value.problem or "makes directed graphs" in caught.value.mend
    )


# --- limits of a generator -----------------------------------------------------------------------


def test_a_generator_that_the_clock_stops_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CPU_SECONDS", 0.01)  # of this process; the other is patient
    with pytest.raises(SpecError, match=r"hypercube_graph\(n=11\) takes more.*; ask for a smaller"):
        generated("hypercube_graph", n=11)


FREE = resource.RLIM_INFINITY
CALL = '["cycle_graph", {"n": 3}, true]'
RING = {"directed": True, "nodes": 3, "edges": [[0, 1], [1, 2], [2, 0]]}


def answer(serve: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(call))
    monkeypatch.setattr(sys, "stdout", written)
    serve()
    return json.loads(written.getvalue())


@pytest.mark.parametrize(
    ("memory", "seconds", "bounds"),
    [
        (FREE, 3, ((graphs.MEMORY, FREE), (3, 3))),  # lower already, and not to be raised
        (1 << 30, FREE, ((1 << 30, 1 << 30), (graphs.CPU_SECONDS, FREE))),
    ],
)
def test_limits_are_set_before_anything_is_read(
    memory: int, seconds: int, bounds: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        def read(self) -> str:
            raise EOFError

    limits: dict[int, tuple[int, int]] = {}
    hard = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: seconds}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (FREE, hard[limit]))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setattr(sys, "stdin", Nothing())
    with pytest.raises(EOFError):
        graphs.serve()
    assert (limits[resource.RLIMIT_AS], limits[resource.RLIMIT_CPU]) == bounds
    assert limits[resource.RLIMIT_CORE] == (0, 0)
    assert answer(graphs.serve, CALL, monkeypatch) == RING


def test_a_generator_that_fills_the_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fills() -> None:
        raise MemoryError

    monkeypatch.setattr(resource, "setrlimit", lambda limit, most: None)
    monkeypatch.setattr(graphs, "generators", lambda: {"fills": fills})
    assert answer(graphs.serve, '["fills", {}, false]', monkeypatch) == {"stopped": True}


def test_windows_which_has_no_limits_makes_graphs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.spec_from_file_location("graphs_of_windows", graphs.__file__)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "resource", None)  # cannot be imported
    monkeypatch.setattr(sys, "platform", "win32")
    found.loader.exec_module(module)
    assert answer(module.serve, CALL, monkeypatch) == RING


# --- files ---------------------------------------------------------------------------------------


@given(graph=drawn(), suffix=st.sampled_from([".graphml", ".json", ".JSON", ".edgelist", ".txt"]))
def test_a_graph_that_is_written_is_read_again(
    graph: nx.Graph, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("graphs") / f"g{suffix}"
    names = nx.relabel_nodes(graph, {i: f"n{i}" for i in graph})
    if suffix == ".graphml":
        nx.write_graphml(names, path)
    elif suffix.lower() == ".json":
        edges = "links" if len(names) % 2 else "edges"  # the older key, and the newer
        path.write_text(json.dumps(nx.node_link_data(names, edges=edges)))
    else:  # which knows a node by its edges alone
        names = names.edge_subgraph(names.edges).copy()
        nx.write_edgelist(names, path, data=suffix == ".txt")
    made = read(path, graph.is_directed())
    expected = simple(names)
    assert edges_of(made) == edges_of(expected)
    assert set(made) == set(expected)
    if suffix not in (".edgelist", ".txt"):
        assert list(made.nodes(data=True)) == list(expected.nodes(data=True))
    if graph.number_of_edges():
        Topology.from_graph(made)  # whose names agents can have


def test_nodes_that_are_tuples_are_lists_in_json(tmp_path: Path) -> None:
    grid = nx.grid_2d_graph(2, 2)
    (tmp_path / "g.json").write_text(json.dumps(nx.node_link_data(grid)))
    assert edges_of(read(tmp_path / "g.json")) == edges_of(grid)


def test_an_edge_list_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_text("# a ring\n\n1 2  # near\n2 3 0.5\n3 1\n")
    assert edges_of(read(path, True)) == {("1", "2"), ("2", "3"), ("3", "1")}


def test_a_file_has_a_direction_and_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g.json"
    path.write_text(json.dumps(nx.node_link_data(nx.cycle_graph(3, create_using=nx.DiGraph))))
    with pytest.raises(SpecError, match=r"g\.json gives a directed graph.*set .*directed: true"):
        read(path)
    monkeypatch.setattr(graphs, "MAX_EDGES", 2)
    with pytest.raises(SpecError, match=r"g\.json gives 3 nodes and 3 edges; stay .* and 2 edges"):
        read(path, True)


GRAPHML = '<graphml xmlns="http://graphml.graphdrawing.org/xmlns"><graph edgedefault="undirected">'


@pytest.mark.parametrize(
    ("name", "text", "fragments"),
    [
        ("g.csv", "a b", ["no known kind of file; use .graphml, .json, .edgelist, .txt"]),
        ("g.txt", "a b\nc\n", ["line 2 names c alone"]),
        ("g.txt", "\udce9", ["not UTF-8 text"]),
        ("g.json", "{", ["is no .json graph"]),
        ("g.json", "[]", ["expected a mapping"]),
        ("g.json", '{"nodes": []}', ["is no .json graph"]),
        ("g.json", '{"edges": []}', ['lists of mappings, "nodes"']),
        ("g.json", '{"nodes": ["a"], "edges": []}', ["lists of mappings"]),
        ("g.json", '{"nodes": [{"id": "a"}, {}], "edges": []}', ["node 1 needs an id"]),
        ("g.json", '{"nodes": [{"id": NaN}], "edges": []}', ["node 0 needs an id"]),
        ("g.json", '{"nodes": [{"id": true}], "edges": []}', ["node 0 needs an id"]),
        ("g.json", '{"nodes": [{"id": "a"}], "links": [{"source": "a"}]}', ["edge 0 needs a"]),
        (
            "g.json",
            '{"nodes": [{"id": "node"}], "links": [{"source": "node", "target": "mode"}]}',
            ["g.json has an edge at 'mode', but no such node", "add the node, or", "mean 'node'"],
        ),
        (
            "g.json",
            '{"nodes": [{"id": 1}], "links": [{"source": 1, "target": "1"}]}',
            ["g.json has an edge at '1', but no such node"],
        ),
        (
            "g.json",
            '{"nodes": [{"id": "a"}, {"id": "a"}], "links": []}',
            ["g.json has 2 nodes with the id 'a'", "an id of its own"],
        ),
        (
            "g.graphml",
            GRAPHML + '<node id="a"/><edge source="a" target="zzz"/></graph></graphml>',
            ["g.graphml has an edge at 'zzz', but no such node; add the node, or mend the edge"],
        ),
        (
            "g.graphml",
            GRAPHML + '<node id="a"/><node id="a"/></graph></graphml>',
            ["g.graphml has 2 nodes with the id 'a'"],
        ),
        ("g.graphml", GRAPHML + "<node/></graph></graphml>", ["node 0 needs an id"]),
        ("g.graphml", GRAPHML + "</graph><graph/></graphml>", ["it holds 2 graphs, not one"]),
        (
            "g.graphml",
            GRAPHML + '<node id="a"><graph><node id="b"/></graph></node></graph></graphml>',
            ["it holds 2 graphs, not one"],
        ),
        ("g.graphml", "<graphml", ["is no .graphml graph"]),
        ("g.graphml", "<!DOCTYPE a>" + GRAPHML, ["document types and entities are not read"]),
    ],
)
def test_refused_files(tmp_path: Path, name: str, text: str, fragments: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpecError) as caught:
        read(path)
    assert caught.value.loc == (*LOC, "file")
    assert [f for f in fragments if f not in str(caught.value)] == [], str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read(tmp_path / "g.json")
