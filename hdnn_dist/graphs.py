"""Graphs from outside: networkx generators by name, and graph files.

Nothing is called by a name from a spec but public graph generators, with arguments checked first.
What a generator takes is known when it has ended, if it ends: only small graphs of well-known ones
are made in this process, all others in one of their own that is stopped at its limits (on Windows,
which has none, by the clock alone).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

import networkx as nx

from hdnn_dist.errors import SpecError, did_you_mean
from hdnn_dist.spec import FileEdges, GeneratedEdges
from hdnn_dist.storage import read_text

if sys.platform != "win32":
    import resource

Graph: TypeAlias = "nx.Graph[Any]"
Loc = tuple[str | int, ...]

MAX_AGENTS = 100_000
MAX_EDGES = 1_000_000
MAX_FILE = 32 << 20  # bytes
CPU_SECONDS = 10  # of a generator's process: as much work on a busy machine as on an idle one
MEMORY = 2 << 30  # bytes that it may map
# Made in well below a second if the product of their arguments is `_SMALL`.
_LINEAR = frozenset(
    f"{kind}_graph"
    for kind in (
        "barabasi_albert",
        "circular_ladder",
        "complete",
        "connected_watts_strogatz",
        "cycle",
        "erdos_renyi",
        "fast_gnp_random",
        "gnp_random",
        "grid_2d",
        "ladder",
        "path",
        "random_geometric",
        "star",
        "watts_strogatz",
        "wheel",
    )
)
_SMALL = 1000


def graph_of(edges: GeneratedEdges | FileEdges, directed: bool, base: Path, loc: Loc) -> Graph:
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
        raise _too_large(source, len(graph), graph.number_of_edges(), loc)
    return simple(graph)


def _too_large(source: str, nodes: int, edges: int, loc: Loc) -> SpecError:
    return SpecError(
        loc,
        f"{source} gives {nodes} nodes and {edges} edges",
        f"stay within {MAX_AGENTS} agents and {MAX_EDGES} edges",
    )


def simple(graph: Graph) -> Graph:
    """A copy without parallel edges and self loops."""
    simple: Graph = nx.DiGraph() if graph.is_directed() else nx.Graph()
    simple.add_nodes_from(graph.nodes(data=True))
    simple.add_edges_from((u, v) for u, v in graph.edges() if u != v)
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
        and not {"G", "B"} & inspect.signature(function).parameters.keys()  # not made from a graph
    }


def _generate(edges: GeneratedEdges, directed: bool, loc: Loc) -> Graph:
    """Have the generator called; its nodes are numbered in its own order."""
    name = edges.generator
    if name not in generators():
        raise SpecError(
            (*loc, "generator"),
            f"{name!r} is no networkx graph generator",
            did_you_mean(name, generators(), "see networkx.org, Reference, Graph generators"),
        )
    given = _arguments(edges, inspect.signature(generators()[name]), loc)
    if _is_small(name, given):
        answer = _called(name, given, directed)
    else:
        answer = json.loads(_ask(json.dumps([name, given, directed])))
    shown = ", ".join(f"{key}={value!r}" for key, value in edges.args.items())
    if "fails" in answer:
        mend = "mend its arguments or use another generator"
        if directed:
            mend += "; not every one makes directed graphs"
        raise SpecError(loc, f"{name}({shown}) fails: {answer['fails']}", mend)
    if "stopped" in answer:
        limits = f"{MEMORY >> 30} GiB of memory or {CPU_SECONDS} s of computing"
        raise SpecError(loc, f"{name}({shown}) takes more than {limits}", "ask for a smaller graph")
    if "nodes" not in answer:
        raise SpecError((*loc, "generator"), f"{name} does not make a graph", "use another")
    if not answer["nodes"]:
        raise SpecError(loc, f"{name}({shown}) has no nodes", "ask for at least one")
    if "edges" not in answer:
        raise _too_large(name, answer["nodes"], answer["edge count"], loc)
    graph: Graph = nx.DiGraph() if answer["directed"] else nx.Graph()
    graph.add_nodes_from(range(answer["nodes"]))
    graph.add_edges_from(answer["edges"])
    return graph


def _is_small(name: str, given: dict[str, Any]) -> bool:
    sizes = [value for key, value in given.items() if key != "seed"]
    if name not in _LINEAR or not all(isinstance(value, int | float) for value in sizes):
        return False
    product: float = math.prod(max(1, abs(value)) for value in sizes)
    return product <= _SMALL


@lru_cache(maxsize=16)
def _ask(call: str) -> str:
    """What `serve` answers to `call`, in a process of its own."""
    command = [sys.executable, "-c", "from hdnn_dist.graphs import serve; serve()"]
    # One thread: each reserves memory, which counts. The path: this process may have changed it.
    paths = os.pathsep.join(path or os.curdir for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            input=call,
            capture_output=True,
            text=True,
            env=environment,
            timeout=10 * CPU_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return '{"stopped": true}'
    assert done.returncode <= 0, done.stderr  # above 0 it is our fault, below the limits'
    return '{"stopped": true}' if done.returncode else done.stdout


def serve() -> None:
    """Read a generator's name, arguments and directedness, and print the graph; all in JSON."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_SECONDS)):
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (most, hard))
    name, given, directed = json.load(sys.stdin)
    try:
        answer = json.dumps(_called(name, given, directed))
    except MemoryError:
        answer = '{"stopped": true}'
    sys.stdout.write(answer)


def _called(name: str, given: dict[str, Any], directed: bool) -> dict[str, Any]:
    """Call the generator, which is told of `directed` where it has an ear for it."""
    function = generators()[name]
    signature = inspect.signature(function)
    if directed and "directed" in signature.parameters:
        given = {"directed": True, **given}
    elif directed and "create_using" in signature.parameters:
        given = {"create_using": nx.DiGraph, **given}
    # Bound by hand, so that a list goes to a generator's *args too.
    bound = inspect.BoundArguments(
        signature, OrderedDict((key, given[key]) for key in signature.parameters if key in given)
    )
    try:
        graph = function(*bound.args, **bound.kwargs)
    except MemoryError:
        raise
    except Exception as error:  # the user's values, deep in networkx: it may raise anything
        return {"fails": " ".join(str(error).split())[:1000] or type(error).__name__}
    if not isinstance(graph, nx.Graph):
        return {}
    answer = {"directed": graph.is_directed(), "nodes": len(graph)}
    if len(graph) > MAX_AGENTS or graph.number_of_edges() > MAX_EDGES:
        return answer | {"edge count": graph.number_of_edges()}
    number = {node: k for k, node in enumerate(graph)}
    return answer | {"edges": [(number[u], number[v]) for u, v in graph.edges()]}


def _arguments(edges: GeneratedEdges, signature: inspect.Signature, loc: Loc) -> dict[str, Any]:
    """The arguments for the generator, checked against its signature; a missing seed is 0."""
    loc = (*loc, "args")
    known = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in ("create_using", "backend")
    }
    for key, value in edges.args.items():
        if key not in known:
            mend = did_you_mean(key, known, f"it takes {', '.join(known) or 'none'}")
            raise SpecError((*loc, key), f"{edges.generator} takes no {key!r} here", mend)
        if any(abs(number) > MAX_EDGES for number in _integers(value)) and key != "seed":
            raise SpecError((*loc, key), f"{value} is too large", f"stay within {MAX_EDGES}")
        if isinstance(value, str) and "name" not in key:  # networkx takes "abc" for three nodes
            problem = f"{value!r} given"
            raise SpecError((*loc, key), problem, "write a number or a list of numbers")
        if known[key].kind is inspect.Parameter.VAR_POSITIONAL and not isinstance(value, list):
            raise SpecError((*loc, key), f"{value!r} given", "write a list")
    for key, parameter in known.items():
        required = parameter.default is parameter.empty
        if required and parameter.kind is not parameter.VAR_POSITIONAL and key not in edges.args:
            mend = f"add {key} under args"
            raise SpecError(loc, f"{edges.generator} needs {key!r}", mend)
    return {"seed": 0, **edges.args} if "seed" in known else dict(edges.args)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int):
        yield value


def _read(path: Path, directed: bool, loc: Loc) -> Graph:
    """The graph in a file; an edge list has no direction of its own and takes the topology's."""
    loc = (*loc, "file")
    readers: dict[str, Callable[[str], tuple[Graph, list[Any]]]] = {
        ".graphml": _graphml,
        ".json": _node_link,
        ".edgelist": lambda text: _edge_list(text, directed),
        ".txt": lambda text: _edge_list(text, directed),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SpecError(loc, f"{path} is no known kind of file", f"use {', '.join(readers)}")
    try:
        text = read_text(path, MAX_FILE)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(loc, f"cannot read {path}: {reason}", "name a graph file") from error
    try:
        graph, declared = reader(text)
    except Exception as error:  # a damaged file can break a reader in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"{path} is no {path.suffix} graph: {reason}"
        raise SpecError(loc, problem, "write the file anew, e.g. with networkx") from error
    for node, times in Counter(declared).items():
        if times > 1:
            problem = f"{path} has {times} nodes with the id {node!r}"
            raise SpecError(loc, problem, "give every node an id of its own")
    for node in graph.nodes - set(declared):
        problem = f"{path} has an edge at {node!r}, but no such node"
        near = did_you_mean(str(node), map(str, declared), "mend the edge")
        raise SpecError(loc, problem, f"add the node, or {near}")
    return graph


def _graphml(text: str) -> tuple[Graph, list[Any]]:
    """Read GraphML, and what it declares: networkx merges and makes up nodes without a word."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("document types and entities are not read")
    root = ElementTree.fromstring(text)
    if (graphs := len(root.findall(".//{*}graph"))) != 1:
        raise ValueError(f"it holds {graphs} graphs, not one")
    nodes = [node.get("id") for node in root.findall(".//{*}node")]
    if None in nodes:
        raise ValueError(f"node {nodes.index(None)} needs an id")
    return nx.parse_graphml(text), nodes


def _node_link(text: str) -> tuple[Graph, list[Any]]:
    """Read node-link JSON, and what it declares: networkx numbers and makes up nodes."""
    data = json.loads(text)
    edges = "edges" if isinstance(data, dict) and "edges" in data else "links"
    if not (isinstance(data, dict) and all(_are_mappings(data.get(k)) for k in ("nodes", edges))):
        raise ValueError('expected a mapping with lists of mappings, "nodes" and "edges"')
    for k, node in enumerate(data["nodes"]):
        parts = node.get("id")  # a list where it was a tuple, as in networkx's grids
        if not all(type(p) in (str, int) for p in (parts if isinstance(parts, list) else [parts])):
            raise ValueError(f"node {k} needs an id, text or a whole number")
    for k, edge in enumerate(data[edges]):
        if not {"source", "target"} <= edge.keys():
            raise ValueError(f"edge {k} needs a source and a target")
    nodes = [tuple(i) if isinstance(i := node["id"], list) else i for node in data["nodes"]]
    return nx.node_link_graph(data, edges=edges), nodes


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _edge_list(text: str, directed: bool) -> tuple[Graph, list[Any]]:
    """Read "from to [data, ignored]" lines; networkx would skip those that it cannot read."""
    graph: Graph = nx.DiGraph() if directed else nx.Graph()
    for number, line in enumerate(text.splitlines(), 1):
        match line.partition("#")[0].split():
            case []:
                continue
            case [l, i, *_]:
                graph.add_edge(l, i)
            case [name]:
                raise ValueError(f"line {number} names {name} alone, not two nodes")
    return graph, list(graph)
