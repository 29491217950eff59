"""The graph of agents: from a spec's edges, generator or file to one plain value.

An edge ``(l, i)`` is a *dependency*: agent ``i`` uses the state of agent ``l``. An undirected edge
is two of them. A *link* is a pair of agents that can send to one another in both directions;
the readout's tree and the labels' way back need links.

Self loops are implied by the unit diagonals of T and R: those of a generator or a file are dropped
(like parallel edges), one that is written out in a list is an error.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from hdnn_dist.errors import SpecError
from hdnn_dist.spec import (
    AGENT_NAME,
    AgentSpec,
    EdgeList,
    Edges,
    FileEdges,
    GeneratedEdges,
    LayerGraph,
    Spec,
    TopologySpec,
    did_you_mean,
)

Pairs = tuple[tuple[int, int], ...]
Loc = tuple[str | int, ...]

MAX_AGENTS = 1_000_000
MAX_EDGES = 10_000_000
_EXACT_CENTRE = 256  # above so many agents the centre is found by a double sweep


# --- the values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """A tree of links towards `root`: ``parent[child]``, and ``depth[agent]`` in hops."""

    root: int
    parent: dict[int, int]
    depth: dict[int, int]

    @cached_property
    def levels(self) -> tuple[Pairs, ...]:
        """``(child, parent)`` pairs, deepest level first: the order in which sums travel up."""
        levels: list[list[tuple[int, int]]] = [[] for _ in range(max(self.depth.values()))]
        for child, parent in sorted(self.parent.items()):
            levels[-self.depth[child]].append((child, parent))
        return tuple(map(tuple, levels))


@dataclass(frozen=True)
class Topology:
    """Agents and who uses whose state.

    Attributes:
        name: for reports.
        agents: in order; every one has its ``d``.
        edges: dependencies ``(l, i)``, "i uses l's state", sorted, without self loops; an
            undirected edge is there in both directions.
        directed: whether the edges were meant one by one.
        two_way: whether the link under a directed edge also carries messages back.
    """

    name: str
    agents: tuple[AgentSpec, ...]
    edges: Pairs
    directed: bool = False
    two_way: bool = True

    @classmethod
    def from_spec(cls, spec: TopologySpec) -> Topology:
        """The topology that `spec` describes; graph files are found from the working directory.

        Raises:
            SpecError: as `resolve` does.
        """
        spec = _resolve_topology(spec, Path())
        agents = tuple(agent for agent in spec.agents if isinstance(agent, AgentSpec))  # type: ignore[union-attr]
        edges = _dependencies([a.name for a in agents], spec.edges, spec.directed)
        return cls(spec.name, agents, edges, spec.directed, spec.links == "two-way")

    @classmethod
    def from_graph(
        cls, graph: nx.Graph, d: int = 8, name: str = "topology", two_way: bool = True
    ) -> Topology:
        """The topology of a networkx graph, directed or not.

        Nodes are named by ``str`` (tuples joined by '-'); a node attribute ``d`` is its state size.

        Raises:
            SpecError: on no nodes, a node whose name no agent can have, or a bad ``d``.
        """
        graph = _simple(graph)
        agents = tuple(_agents_of(graph, d, ("topology", "agents")))
        names = [agent.name for agent in agents]
        edges = [(_name(l), _name(i)) for l, i in graph.edges]
        pairs = _dependencies(names, edges, graph.is_directed())
        return cls(name, agents, pairs, graph.is_directed(), two_way)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the agents, in order."""
        return tuple(agent.name for agent in self.agents)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """State sizes ``d_i``: p^i and q^i are in R^{d_i}."""
        return tuple(agent.d or 0 for agent in self.agents)

    def index(self, name: str) -> int:
        """Position of the agent called `name`.

        Raises:
            SpecError: if there is none.
        """
        if name not in self._positions:
            raise _unknown(name, self.names, ())
        return self._positions[name]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def digraph(self) -> nx.DiGraph:
        """The dependencies as a graph on 0 … M-1."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.agents)))
        graph.add_edges_from(self.edges)
        return graph

    @cached_property
    def links(self) -> nx.Graph:
        """Pairs that can talk both ways: all edges, or with one-way links those that are mutual."""
        return self.digraph.to_undirected(reciprocal=not self.two_way)

    @cached_property
    def _undirected(self) -> nx.Graph:
        return self.digraph.to_undirected()

    @property
    def connected(self) -> bool:
        """Whether the graph is in one piece, directions aside."""
        return bool(nx.is_connected(self._undirected))

    @cached_property
    def diameter(self) -> int | None:
        """Longest shortest path, directions aside; None if the graph is not connected."""
        if not self.connected:
            return None
        return int(nx.diameter(self._undirected, usebounds=True)) if len(self.agents) > 1 else 0

    @cached_property
    def spectral_gap(self) -> float | None:
        """Second-smallest eigenvalue of the normalised Laplacian ``I - D^-½ A D^-½``.

        Of the undirected version; 0 if it is not connected, None for a single agent. Small values
        mean a bottleneck: information mixes slowly.
        """
        if len(self.agents) < 2:
            return None
        A = nx.to_numpy_array(self._undirected, nodelist=range(len(self.agents)))
        degree = A.sum(axis=0)
        scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1)), 0.0)
        laplacian = np.diag((degree > 0) * 1.0) - scale[:, None] * A * scale
        return max(0.0, float(np.linalg.eigvalsh(laplacian)[1]))

    def centre(self) -> int:
        """An agent of smallest eccentricity over the links, the first of several.

        In a graph of several pieces, of the largest piece. Beyond 256 agents it is the middle of a
        long shortest path (double sweep): exact on trees, near the centre elsewhere.
        """
        piece = max(nx.connected_components(self.links), key=lambda nodes: (len(nodes), -min(nodes)))
        graph = self.links.subgraph(piece)
        if len(piece) <= _EXACT_CENTRE:
            eccentricity = nx.eccentricity(graph)
            return min(piece, key=lambda node: (eccentricity[node], node))
        far = list(nx.single_source_shortest_path_length(graph, min(piece)))[-1]
        path: list[int] = list(nx.single_source_shortest_path(graph, far).values())[-1]
        return path[len(path) // 2]

    def spanning_tree(self, root: int, nodes: Iterable[int] | None = None) -> Tree:
        """Breadth-first tree over the links, cut down to the paths from `nodes` to `root`.

        Args:
            root: where the sums end.
            nodes: who has something to say; default: all agents.

        Raises:
            SpecError: if one of `nodes` has no path of links to the root.
        """
        wanted = set(range(len(self.agents)) if nodes is None else nodes)
        # Sorted neighbours make the tree a function of the graph alone, whatever its history.
        up = {
            child: parent
            for parent, child in nx.bfs_edges(self.links, root, sort_neighbors=sorted)
        }
        if lost := sorted(wanted - up.keys() - {root}):
            shown = ", ".join(self.names[i] for i in lost[:5]) + (", …" if len(lost) > 5 else "")
            raise SpecError(
                ("model", "readout"),
                f"the readout at {self.names[root]} has no path of two-way links from {shown}",
                "connect them, read at named agents that reach the root (model.readout.agents), "
                "or move model.readout.root",
            )
        depth = {root: 0}
        for child, parent in up.items():  # in BFS order: a parent comes before its children
            depth[child] = depth[parent] + 1
        on_path = {root}
        for node in wanted:
            while node not in on_path:
                on_path.add(node)
                node = up[node]
        return Tree(
            root,
            {child: parent for child, parent in sorted(up.items()) if child in on_path},
            {node: hops for node, hops in sorted(depth.items()) if node in on_path},
        )

    def digest(self) -> str:
        """SHA-256 (hex) of names, sizes, edges and links: what all actors must agree on."""
        links = sorted(tuple(sorted(pair)) for pair in self.links.edges)
        content = {"names": self.names, "sizes": self.sizes, "edges": self.edges, "links": links}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- resolving a spec ----------------------------------------------------------------------------


def resolve(spec: Spec, base: Path | None = None) -> Spec:
    """`spec` with every agent and edge written out, so that it stands alone; idempotent.

    ======================  ============================  ==========================
    ``topology.agents``     edges from a list             from a generator / a file
    ======================  ============================  ==========================
    left out                names in order of appearance  a1 … aM / the file's names
    a number M              a1 … aM                       must be the number of nodes
    a list                  edges name its agents         one a node, in order / by name
    ======================  ============================  ==========================

    An agent's ``d`` is its own, else the file's node attribute ``d``, else ``topology.d``.

    Args:
        spec: any valid spec.
        base: where relative graph files are found; default: the working directory.

    Raises:
        SpecError: an unknown, duplicate or missing agent; a duplicate edge or self loop in a list;
            a generator or file that cannot be used or contradicts ``topology.directed``.
    """
    base = base or Path()
    topology = _resolve_topology(spec.topology, base)
    names = [agent.name for agent in topology.agents if isinstance(agent, AgentSpec)]  # type: ignore[union-attr]
    model = spec.model
    if model.layer_graphs is not None:
        layers = [
            entry
            if isinstance(entry, str)
            else LayerGraph(
                edges=_layer_pairs(
                    entry.edges, names, topology.directed, base, ("model", "layer_graphs", k, "edges")
                )
            )
            for k, entry in enumerate(model.layer_graphs)
        ]
        model = model.model_copy(update={"layer_graphs": layers})
    return spec.model_copy(update={"topology": topology, "model": model})


def layer_edges(spec: Spec) -> tuple[Pairs, ...] | None:
    """Dependencies ``(l, i)`` of every entry of a resolved ``model.layer_graphs``, None if unset."""
    if spec.model.layer_graphs is None:
        return None
    topology = Topology.from_spec(spec.topology)

    def pairs(k: int, entry: LayerGraph | str) -> Pairs:
        if isinstance(entry, LayerGraph):
            loc = ("model", "layer_graphs", k, "edges")
            return _dependencies(topology.names, entry.edges, topology.directed, loc)
        return topology.edges if entry == "topology" else ()

    return tuple(pairs(k, entry) for k, entry in enumerate(spec.model.layer_graphs))


def _resolve_topology(spec: TopologySpec, base: Path) -> TopologySpec:
    graph = None
    if not isinstance(spec.edges, list):
        graph = _graph(spec.edges, spec.directed, base, ("topology", "edges"))
    agents = [
        agent.model_copy(update={"d": agent.d or spec.d}) for agent in _agents(spec, graph)
    ]
    names = [agent.name for agent in agents]
    _check_names(names)
    edges = spec.edges if graph is None else _named_edges(graph, spec.edges, names)
    _dependencies(names, edges, spec.directed)
    return spec.model_copy(update={"agents": agents, "edges": edges})


def _agents(spec: TopologySpec, graph: nx.Graph | None) -> list[AgentSpec]:
    """The agents of `spec`, or of its graph; see the table in `resolve`."""
    loc = ("topology", "agents")
    given = spec.agents
    if isinstance(given, list):
        if not given:
            raise SpecError(loc, "an empty list of agents", "name at least one agent")
        given = [AgentSpec(name=a) if isinstance(a, str) else a for a in given]
    elif given is not None and given > MAX_AGENTS:
        raise SpecError(loc, f"{given} agents", f"use at most {MAX_AGENTS}")
    if graph is None:
        assert isinstance(spec.edges, list)
        if given is None:
            if not spec.edges:
                raise SpecError(
                    ("topology",), "neither agents nor edges are given", "say `agents: 8`, or list them"
                )
            given = [AgentSpec(name=n) for n in dict.fromkeys(n for edge in spec.edges for n in edge)]
        return _numbered(given) if isinstance(given, int) else given
    if isinstance(spec.edges, GeneratedEdges):
        own, source = _numbered(len(graph)), spec.edges.generator
    else:
        own, source = _agents_of(graph, None, ("topology", "edges", "file")), spec.edges.file  # type: ignore[union-attr]
    if given is None:
        return own
    count = given if isinstance(given, int) else len(given)
    if isinstance(given, list) and isinstance(spec.edges, FileEdges):
        sizes = {agent.name: agent.d for agent in own}
        for k, agent in enumerate(given):
            if agent.name not in sizes:
                raise _unknown(agent.name, sizes, (*loc, k), f"node of {source}")
        if missing := sizes.keys() - {agent.name for agent in given}:
            raise SpecError(
                loc, f"{min(missing)} of {source} is not among the agents", "add it, or drop `agents`"
            )
        return [agent.model_copy(update={"d": agent.d or sizes[agent.name]}) for agent in given]
    if count != len(graph):
        raise SpecError(
            loc,
            f"{count} agents, but {source} gives {len(graph)} nodes",
            "make the numbers agree, or drop `agents`",
        )
    return own if isinstance(given, int) else given


def _numbered(count: int) -> list[AgentSpec]:
    return [AgentSpec(name=f"a{k}") for k in range(1, count + 1)]


def _agents_of(graph: nx.Graph, d: int | None, loc: Loc) -> list[AgentSpec]:
    """One agent a node, by the node's own name and attribute ``d`` (else `d`)."""
    if not graph:
        raise SpecError(loc, "the graph has no nodes", "give it at least one")
    agents = []
    for node, attributes in graph.nodes(data=True):
        name, size = _name(node), attributes.get("d", d)
        if not re.fullmatch(AGENT_NAME, name) or len(name) > 64:
            raise SpecError(
                loc,
                f"node {name!r} cannot name an agent",
                "use up to 64 letters, digits, '_' and '-', the first a letter or digit",
            )
        if size is not None and (type(size) is not int or size < 1):
            raise SpecError(loc, f"node {name} has d = {size!r}", "make d a whole number above 0")
        agents.append(AgentSpec(name=name, d=size))
    _check_names([agent.name for agent in agents], loc)
    return agents


def _name(node: Any) -> str:
    return "-".join(map(str, node)) if isinstance(node, tuple) else str(node)


def _check_names(names: Sequence[str], loc: Loc = ("topology", "agents")) -> None:
    seen: dict[str, int] = {}
    for k, name in enumerate(names):
        if name in seen:
            raise SpecError(
                (*loc, k) if loc[-1] == "agents" else loc,
                f"agents {seen[name]} and {k} are both called {name}",
                "give every agent a name of its own",
            )
        seen[name] = k


def _named_edges(graph: nx.Graph, edges: Edges, names: Sequence[str]) -> EdgeList:
    """A graph's edges as pairs of names: its k-th node is ``names[k]``, a file's node itself."""
    if isinstance(edges, FileEdges):
        return [(_name(l), _name(i)) for l, i in graph.edges]
    name = dict(zip(graph, names, strict=True))
    return [(name[l], name[i]) for l, i in graph.edges]


def _layer_pairs(
    edges: Edges, names: Sequence[str], directed: bool, base: Path, loc: Loc
) -> EdgeList:
    if not isinstance(edges, list):
        graph = _graph(edges, directed, base, loc)
        if isinstance(edges, GeneratedEdges) and len(graph) != len(names):
            raise SpecError(
                loc,
                f"{edges.generator} gives {len(graph)} nodes, but there are {len(names)} agents",
                "make the numbers agree",
            )
        for node in graph if isinstance(edges, FileEdges) else ():
            if _name(node) not in names:
                raise _unknown(_name(node), names, loc)
        edges = _named_edges(graph, edges, names)
    _dependencies(names, edges, directed, loc)
    return edges


def _dependencies(
    names: Sequence[str], edges: Edges, directed: bool, loc: Loc = ("topology", "edges")
) -> Pairs:
    """Named pairs as sorted dependencies; refuses unknown agents, self loops and duplicates."""
    assert isinstance(edges, list), "resolve the spec first"
    if len(edges) > MAX_EDGES:
        raise SpecError(loc, f"{len(edges)} edges", f"use at most {MAX_EDGES}")
    index = {name: i for i, name in enumerate(names)}
    pairs: dict[tuple[int, int], int] = {}
    for k, edge in enumerate(edges):
        for name in edge:
            if name not in index:
                raise _unknown(name, names, (*loc, k))
        l, i = (index[name] for name in edge)
        if l == i:
            raise SpecError(
                (*loc, k), f"{edge[0]} has an edge to itself", "drop it: an agent always uses its own state"
            )
        if (l, i) in pairs:
            swapped = not directed and tuple(edges[pairs[l, i]]) != tuple(edge)
            raise SpecError(
                (*loc, k),
                f"edge [{edge[0]}, {edge[1]}] repeats edge {pairs[l, i]}",
                "drop one; an undirected edge goes both ways (or set topology.directed: true)"
                if swapped
                else "drop one of the two",
            )
        pairs[l, i] = k
        if not directed:
            pairs[i, l] = k
    return tuple(sorted(pairs))


def _unknown(name: str, names: Iterable[str], loc: Loc, what: str = "agent") -> SpecError:
    return SpecError(loc, f"there is no {what} called {name!r}", did_you_mean(name, names))


# --- graphs from networkx ------------------------------------------------------------------------


def _graph(edges: GeneratedEdges | FileEdges, directed: bool, base: Path, loc: Loc) -> nx.Graph:
    """The simple graph that `edges` asks for, its directedness checked against the topology's."""
    if isinstance(edges, GeneratedEdges):
        graph, source = _generate(edges, directed, loc), edges.generator
    else:
        graph, source = _read(base / edges.file, directed, loc), edges.file
    if graph.is_directed() != directed:
        kind = "a directed" if graph.is_directed() else "an undirected"
        raise SpecError(
            loc,
            f"{source} gives {kind} graph, but topology.directed is {str(directed).lower()}",
            f"set topology.directed: {str(not directed).lower()}, or use another graph",
        )
    if len(graph) > MAX_AGENTS or graph.number_of_edges() > MAX_EDGES:
        raise SpecError(
            loc,
            f"{source} gives {len(graph)} nodes and {graph.number_of_edges()} edges",
            f"stay within {MAX_AGENTS} agents and {MAX_EDGES} edges",
        )
    return _simple(graph)


def _simple(graph: nx.Graph) -> nx.Graph:
    """A copy without parallel edges and self loops."""
    simple = nx.DiGraph() if graph.is_directed() else nx.Graph()
    simple.add_nodes_from(graph.nodes(data=True))
    simple.add_edges_from((l, i) for l, i in graph.edges() if l != i)
    return simple


@cache
def generators() -> dict[str, Callable[..., Any]]:
    """The public functions of ``networkx.generators`` by name: all that a spec can call."""
    return {
        name: function
        for name, function in vars(nx.generators).items()
        if not name.startswith("_")
        and callable(function)
        and not inspect.isclass(function)
        and getattr(function, "__module__", "").startswith("networkx.generators.")
    }


def _generate(edges: GeneratedEdges, directed: bool, loc: Loc) -> nx.Graph:
    """Call the generator; it is told of `directed` where it has a way to hear it."""
    name, args = edges.generator, dict(edges.args)
    if name not in generators():
        raise SpecError(
            (*loc, "generator"),
            f"{name!r} is no networkx graph generator",
            did_you_mean(name, generators(), "see networkx.org, Reference, Graph generators"),
        )
    function = generators()[name]
    signature = inspect.signature(function)
    known = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
        and parameter.name not in ("create_using", "backend")
    ]
    for key, value in args.items():
        if key not in known:
            raise SpecError(
                (*loc, "args", key),
                f"{name} takes no argument {key!r} here",
                did_you_mean(key, known, f"it takes {', '.join(known)}"),
            )
        if any(abs(number) > MAX_AGENTS for number in _integers(value)):
            raise SpecError((*loc, "args", key), f"{value} is too large", f"stay within {MAX_AGENTS}")
    parameters = signature.parameters
    if "seed" in parameters:
        args.setdefault("seed", 0)
    if directed and "directed" in parameters:
        args.setdefault("directed", True)
    call: dict[str, Any] = dict(args)
    if directed and "create_using" in parameters and "directed" not in parameters:
        call["create_using"] = nx.DiGraph
    shown = ", ".join(f"{key}={value!r}" for key, value in args.items())
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.name not in call and p.name in known
    ]
    if missing:
        raise SpecError(
            (*loc, "args"), f"{name} needs {', '.join(missing)}", "add it under `args`"
        )
    bound = inspect.BoundArguments(
        signature, OrderedDict((key, call[key]) for key in parameters if key in call)
    )
    try:
        graph = function(*bound.args, **bound.kwargs)
    except Exception as error:  # the user's arguments, inside someone else's code
        raise SpecError(
            loc, f"{name}({shown}) fails: {error}", "mend its arguments or use another generator"
        ) from error
    if not isinstance(graph, nx.Graph):
        raise SpecError(
            (*loc, "generator"), f"{name} does not make one graph", "use another generator"
        )
    if not graph:
        raise SpecError(loc, f"{name}({shown}) has no nodes", "ask for at least one")
    return graph


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int):
        yield value


def _read(path: Path, directed: bool, loc: Loc) -> nx.Graph:
    """The graph in a file; an edge list has no direction of its own and takes the topology's."""
    loc = (*loc, "file")
    readers: dict[str, Callable[[str], nx.Graph]] = {
        ".graphml": _graphml,
        ".json": _node_link,
        ".edgelist": lambda text: _edge_list(text, directed),
        ".txt": lambda text: _edge_list(text, directed),
    }
    if path.suffix.lower() not in readers:
        raise SpecError(
            loc, f"{path} has an unknown suffix {path.suffix!r}", f"use {', '.join(readers)}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(
            loc, f"cannot read {path}: {reason}", "give the path of a readable graph file"
        ) from error
    try:
        return readers[path.suffix.lower()](text)
    except Exception as error:  # a damaged file can break a reader in any way
        raise SpecError(
            loc,
            f"{path} is no {path.suffix} graph: {str(error) or type(error).__name__}",
            "write the file anew, e.g. with networkx",
        ) from error


def _graphml(text: str) -> nx.Graph:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("document types and entities are not read")
    return nx.parse_graphml(text)


def _node_link(text: str) -> nx.Graph:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("expected a mapping with nodes and edges")
    return nx.node_link_graph(data, edges="edges" if "edges" in data else "links")


def _edge_list(text: str, directed: bool) -> nx.Graph:
    """``from to [data, ignored]`` a line, ``#`` comments. (networkx skips lines it cannot read.)"""
    graph = nx.DiGraph() if directed else nx.Graph()
    for number, line in enumerate(text.splitlines(), 1):
        match line.partition("#")[0].split():
            case []:
                continue
            case [l, i, *_]:
                graph.add_edge(l, i)
            case [name]:
                raise ValueError(f"line {number} names {name} alone, not two nodes")
    return graph
