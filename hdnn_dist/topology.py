"""The graph of agents: from a spec's edges, generator or file to one plain value.

An edge ``(l, i)`` is a *dependency*: agent ``i`` uses the state of agent ``l``. An undirected edge
is two of them. A *link* is a pair of agents that can send to one another in both directions;
the readout's tree and the labels' way back need links.

Self loops are implied by the unit diagonals of T and R: those of a generator or a file are dropped
(like parallel edges), one that is written out in a list is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import numpy as np

from hdnn_dist.errors import SpecError, did_you_mean
from hdnn_dist.graphs import MAX_AGENTS, MAX_EDGES, Graph, Loc, graph_of, simple
from hdnn_dist.spec import (
    AGENT_NAME,
    MAX_SIZE,
    NAME_RULE,
    AgentSpec,
    EdgeList,
    Edges,
    FileEdges,
    GeneratedEdges,
    LayerGraph,
    MatrixFile,
    Spec,
    TopologySpec,
)
from hdnn_dist.storage import check_regular

Pairs = tuple[tuple[int, int], ...]
MAX_ENTRIES = 4_000_000  # of a J from a file, which the resolved spec writes out
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
        agents, edges = _resolve_topology(spec, Path())
        pairs = _dependencies([agent.name for agent in agents], edges, spec.directed)
        return cls(spec.name, tuple(agents), pairs, spec.directed, spec.links == "two-way")

    @classmethod
    def from_graph(
        cls, graph: Graph, d: int = 8, name: str = "topology", two_way: bool = True
    ) -> Topology:
        """The topology of a networkx graph, directed or not.

        Nodes are named by ``str`` (tuples joined by '-'); a node attribute ``d`` is its state size.

        Raises:
            SpecError: on no nodes, a node whose name no agent can have, or a bad ``d``.
        """
        graph = simple(graph)
        agents = tuple(_agents_of(graph, d, ("topology", "agents")))
        names = [agent.name for agent in agents]
        edges = [(_name(u), _name(v)) for u, v in graph.edges]
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
    def digraph(self) -> nx.DiGraph[int]:
        """The dependencies as a graph on 0 … M-1."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(len(self.agents)))
        graph.add_edges_from(self.edges)
        return graph

    @cached_property
    def links(self) -> nx.Graph[int]:
        """Pairs that can talk both ways: all edges, or with one-way links those that are mutual."""
        return self.digraph.to_undirected(reciprocal=not self.two_way)

    @cached_property
    def _undirected(self) -> nx.Graph[int]:
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
        pieces = nx.connected_components(self.links)
        piece = max(pieces, key=lambda nodes: (len(nodes), -min(nodes)))
        graph = self.links.subgraph(piece).copy()
        if len(piece) <= _EXACT_CENTRE:
            eccentricity: dict[int, int] = nx.eccentricity(graph)  # type: ignore[assignment]
            return min(piece, key=lambda node: (eccentricity[node], node))
        start, end = min(piece), min(piece)
        for _ in range(2):  # breadth first: the last node is a furthest one
            start, end = end, list(nx.single_source_shortest_path_length(graph, end))[-1]
        path: list[int] = nx.shortest_path(graph, start, end)
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
            child: parent for parent, child in nx.bfs_edges(self.links, root, sort_neighbors=sorted)
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

    def without(self, absent: Collection[str]) -> Topology:
        """The graph that is left when agents leave, with the others in the order they had."""
        kept = [i for i, name in enumerate(self.names) if name not in absent]
        position = {i: k for k, i in enumerate(kept)}
        return replace(
            self,
            agents=tuple(self.agents[i] for i in kept),
            edges=tuple(
                (position[l], position[i]) for l, i in self.edges if {l, i} <= position.keys()
            ),
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
    agents, edges = _resolve_topology(spec.topology, base)
    topology = spec.topology.model_copy(update={"agents": agents, "edges": edges})
    model = spec.model
    if model.layer_graphs is not None:
        names, directed = [agent.name for agent in agents], topology.directed
        layers: list[LayerGraph | Literal["topology", "none"]] = []
        count = 0
        for k, entry in enumerate(model.layer_graphs):
            if isinstance(entry, LayerGraph):
                pairs = _layer_pairs(k, entry.edges, names, directed, base)
                entry = LayerGraph(edges=pairs)
                count += len(pairs)
            if count > MAX_EDGES:
                loc = ("model", "layer_graphs", k)
                problem = f"the graphs up to this one have {count} edges"
                raise SpecError(loc, problem, f"use at most {MAX_EDGES} in all")
            layers.append(entry)
        model = model.model_copy(update={"layer_graphs": layers})
    for key in ("J", "X"):
        if isinstance(matrix := getattr(model, key), MatrixFile):
            rows = read_matrix(base / matrix.file, ("model", key, "file"))
            model = model.model_copy(update={key: rows})
    return spec.model_copy(update={"topology": topology, "model": model})


def read_matrix(path: Path, loc: tuple[str, ...]) -> list[Any]:
    """The rows of a matrix in a .npy file, or those of a matrix a layer.

    Args:
        path: the file.
        loc: of its name in the spec.

    Raises:
        SpecError: the file cannot be read, or holds anything but two or three axes of numbers.
    """
    mend = "write it with numpy.save from a float array"
    try:
        check_regular(path)
        matrix = np.load(path, allow_pickle=False, mmap_mode="r")
    except Exception as error:  # a damaged header can raise whatever Python's tokenizer does
        raise SpecError(loc, f"{path} cannot be read as .npy: {error}", mend) from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim not in (2, 3) or matrix.dtype.kind != "f":
        raise SpecError(loc, f"{path} holds no real matrix", mend)
    if matrix.size > MAX_ENTRIES or not np.isfinite(matrix).all():
        raise SpecError(loc, f"{path} holds too many entries, or some not finite", mend)
    rows: list[Any] = matrix.tolist()
    return rows


def layer_edges(spec: Spec) -> tuple[Pairs, ...] | None:
    """Dependencies ``(l, i)`` of each entry of a resolved ``model.layer_graphs``; None if unset."""
    if spec.model.layer_graphs is None:
        return None
    topology = Topology.from_spec(spec.topology)

    def pairs(k: int, entry: LayerGraph | str) -> Pairs:
        if isinstance(entry, LayerGraph):
            loc = ("model", "layer_graphs", k, "edges")
            return _dependencies(topology.names, entry.edges, topology.directed, loc)
        return topology.edges if entry == "topology" else ()

    return tuple(pairs(k, entry) for k, entry in enumerate(spec.model.layer_graphs))


def _resolve_topology(spec: TopologySpec, base: Path) -> tuple[list[AgentSpec], EdgeList]:
    graph = None
    if not isinstance(spec.edges, list):
        graph = graph_of(spec.edges, spec.directed, base, ("topology", "edges"))
    agents = [agent.model_copy(update={"d": agent.d or spec.d}) for agent in _agents(spec, graph)]
    names = [agent.name for agent in agents]
    _check_names(names)
    edges = _named_edges(graph, spec.edges, names)
    _dependencies(names, edges, spec.directed)
    return agents, edges


def _agents(spec: TopologySpec, graph: Graph | None) -> list[AgentSpec]:
    """The agents of `spec`, or of its graph; see the table in `resolve`."""
    loc = ("topology", "agents")
    given: int | list[AgentSpec] | None = None
    if isinstance(spec.agents, list):
        given = [AgentSpec(name=a) if isinstance(a, str) else a for a in spec.agents]
        if not given:
            raise SpecError(loc, "an empty list of agents", "name at least one agent")
    elif spec.agents is not None:
        given = spec.agents
        if given > MAX_AGENTS:
            raise SpecError(loc, f"{given} agents given", f"use at most {MAX_AGENTS}")
    if isinstance(spec.edges, list):
        if given is None:
            given = [AgentSpec(name=n) for n in dict.fromkeys(chain.from_iterable(spec.edges))]
            if not given:
                mend = "say `agents: 8`, list them, or give edges"
                raise SpecError(("topology",), "there are no agents", mend)
        return _numbered(given) if isinstance(given, int) else given
    assert graph is not None
    if isinstance(spec.edges, FileEdges):
        source = spec.edges.file
        own = _agents_of(graph, None, ("topology", "edges", "file"))
        if isinstance(given, list):
            return _by_name(given, own, source)
    else:
        source = spec.edges.generator
        own = _numbered(len(graph))
    if given is None:
        return own
    count = given if isinstance(given, int) else len(given)
    if count != len(own):
        raise SpecError(
            loc,
            f"{count} agents given, but {source} has {len(own)} nodes",
            "make the numbers agree, or drop `agents`",
        )
    return own if isinstance(given, int) else given


def _by_name(given: Sequence[AgentSpec], own: Sequence[AgentSpec], source: str) -> list[AgentSpec]:
    """The listed agents, which must be just the nodes of the file, with the file's sizes."""
    loc = ("topology", "agents")
    sizes = {agent.name: agent.d for agent in own}
    for k, agent in enumerate(given):
        if agent.name not in sizes:
            raise _unknown(agent.name, sizes, (*loc, k), f"node of {source}")
    if missing := sizes.keys() - {agent.name for agent in given}:
        problem = f"{min(missing)} of {source} is not among the agents"
        raise SpecError(loc, problem, "add it, or drop `agents`")
    return [agent.model_copy(update={"d": agent.d or sizes[agent.name]}) for agent in given]


def _numbered(count: int) -> list[AgentSpec]:
    return [AgentSpec(name=f"a{k}") for k in range(1, count + 1)]


def _agents_of(graph: Graph, d: int | None, loc: Loc) -> list[AgentSpec]:
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
                NAME_RULE,
            )
        if size is not None and (type(size) is not int or not 0 < size <= MAX_SIZE):
            mend = f"make d a whole number from 1 to {MAX_SIZE}"
            raise SpecError(loc, f"node {name} has d = {size!r}", mend)
        agents.append(AgentSpec(name=name, d=size))
    _check_names([agent.name for agent in agents], loc)
    return agents


def _name(node: Any) -> str:
    return "-".join(map(str, node)) if isinstance(node, tuple) else str(node)


def _check_names(names: Sequence[str], loc: Loc = ("topology", "agents")) -> None:
    seen: dict[str, int] = {}
    for k, name in enumerate(names):
        # Names name checkpoint files, and some disks do not tell A from a.
        first = seen.setdefault(name.casefold(), k)
        if first != k:
            same = f"both called {name}"
            if names[first] != name:
                same = f"called {names[first]} and {name}, the same but for case"
            raise SpecError(
                (*loc, k) if loc[-1] == "agents" else loc,
                f"agents {first} and {k} are {same}",
                "give every agent a name of its own",
            )


def _named_edges(graph: Graph | None, edges: Edges, names: Sequence[str]) -> EdgeList:
    """`edges` as pairs of names; a file names its nodes, a generator's k-th is ``names[k]``."""
    if isinstance(edges, list):
        return edges
    assert graph is not None
    own = {node: _name(node) for node in graph}
    name = own if isinstance(edges, FileEdges) else dict(zip(graph, names, strict=True))
    return [(name[u], name[v]) for u, v in graph.edges]


def _layer_pairs(
    k: int, edges: Edges, names: Sequence[str], directed: bool, base: Path
) -> EdgeList:
    """The edges of the k-th layer graph, over agents that are known already."""
    loc = ("model", "layer_graphs", k, "edges")
    graph = None if isinstance(edges, list) else graph_of(edges, directed, base, loc)
    if graph is not None and isinstance(edges, GeneratedEdges) and len(graph) != len(names):
        raise SpecError(
            loc,
            f"{edges.generator} has {len(graph)} nodes, but there are {len(names)} agents",
            "make the numbers agree",
        )
    pairs = _named_edges(graph, edges, names)
    _dependencies(names, pairs, directed, loc)
    return pairs


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
        u, v = (index[name] for name in edge)
        if u == v:
            raise SpecError(
                (*loc, k),
                f"{edge[0]} has an edge to itself",
                "drop it: an agent always uses its own state",
            )
        if (u, v) in pairs:
            swapped = not directed and tuple(edges[pairs[u, v]]) != tuple(edge)
            raise SpecError(
                (*loc, k),
                f"edge [{edge[0]}, {edge[1]}] repeats edge {pairs[u, v]}",
                "drop one; an undirected edge goes both ways (or set topology.directed: true)"
                if swapped
                else "drop one of the two",
            )
        pairs[u, v] = k
        if not directed:
            pairs[v, u] = k
    return tuple(sorted(pairs))


def _unknown(name: str, names: Iterable[str], loc: Loc, what: str = "agent") -> SpecError:
    return SpecError(loc, f"there is no {what} called {name!r}", did_you_mean(name, names))
