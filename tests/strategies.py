"""Hypothesis strategies: jobs on any small graph, in every way the graph can enter the model.

And what is wrong: any plain value, a value with a part of it changed, bytes that were damaged.
"""

from __future__ import annotations

import atexit
import copy
import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hdnn_dist.architecture import Architecture
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.spec import Spec
from hdnn_dist.tables import write_table
from hdnn_dist.transport import InProcess
from hdnn_dist.worker import agreement_of


@st.composite
def edges(draw: st.DrawFn, names: list[str]) -> list[list[str]]:
    """A connected graph: a random tree, and more edges (each in one direction only)."""
    tree = [(draw(st.integers(0, i - 1)), i) for i in range(1, len(names))]
    tree = [pair[::-1] if draw(st.booleans()) else pair for pair in tree]
    pairs = [(a, b) for a in range(len(names)) for b in range(len(names)) if a != b]
    extra = draw(st.lists(st.sampled_from(pairs), max_size=4, unique=True)) if pairs else []
    taken: list[tuple[int, int]] = []
    for a, b in tree + extra:
        if (a, b) not in taken and (b, a) not in taken:
            taken.append((a, b))
    return [[names[a], names[b]] for a, b in taken]


@cache
def numbers() -> dict[str, Any]:
    """The section of a table of 12 features and 7 targets, whose units are far apart."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    random = np.random.default_rng(0)
    x, A = random.standard_normal((30, 12)), random.standard_normal((12, 7))
    y = np.tanh(x @ A) * 10.0 ** np.arange(-3, 4) + 5
    return write_table(folder.name, (x[:20], y[:20]), (x[20:], y[20:]))


@st.composite
def tasks(draw: st.DrawFn, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections of data and readout: digits or targets, read out at the root or by agents."""
    readers = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    readout = {
        "agents": draw(st.sampled_from(["all", readers])),
        "root": draw(st.sampled_from([None, *names])),
    }
    kind = draw(st.sampled_from(["classes", "targets", "targets of agents"]))
    if kind == "classes":
        return {}, readout
    if kind == "targets":
        return numbers(), readout
    own: dict[str, list[str]] = {}
    for target in draw(st.permutations(numbers()["targets"]))[: draw(st.integers(1, 7))]:
        own.setdefault(draw(st.sampled_from(readers)), []).append(target)
    return numbers() | {"targets": own}, {}


@st.composite
def specs(draw: st.DrawFn, max_agents: int = 6, dtype: str = "float64") -> Spec:
    """A job on digits or a table, with a drawn graph, sizes, depth, readout and patterns."""
    M = draw(st.integers(1, max_agents))
    names = [f"a{i + 1}" for i in range(M)]
    member = draw(st.sampled_from(["H1", "H2", "MS1", "MS2", "MS3"]))
    graph = draw(st.sampled_from(["K", "J", "both"])) if member in ("H1", "H2") else "K"
    links = draw(edges(names))
    directed = member != "MS2" and draw(st.booleans())
    one_way = directed and draw(st.booleans())
    if one_way:  # every way back is then an edge itself
        links = [pair for link in links for pair in (link, link[::-1])]
    layers = draw(st.integers(1, 3))
    layer_graphs = None
    if graph != "J" and draw(st.booleans()):
        some = st.lists(st.sampled_from(links), unique_by=tuple) if links else st.just([])
        entry = st.one_of(st.sampled_from(["topology", "none"]), some.map(lambda e: {"edges": e}))
        layer_graphs = draw(st.lists(entry, min_size=1, max_size=3))
    sizes = [draw(st.integers(1, 3)) for _ in names]
    given: dict[str, object] = {}
    if member in ("H1", "H2") and graph == "K" and draw(st.booleans()):
        several = layers if member == "H1" and draw(st.booleans()) else None
        pairs = {(names.index(a), names.index(b)) for a, b in links}
        seed = draw(st.integers(0, 99))
        given = {"J" if member == "H1" else "X": matrix(member, sizes, pairs, several, seed)}
    data, readout = draw(tasks(names))
    return spec_from_dict(
        {
            "topology": {
                "agents": [{"name": n, "d": d} for n, d in zip(names, sizes, strict=True)],
                "edges": links,
                "directed": directed,
                "links": "one-way" if one_way else "two-way",
            },
            "model": {
                "name": member,
                "graph": graph,
                "layers": layers,
                "h": draw(st.sampled_from([0.1, 0.5])),
                "activation": draw(st.sampled_from(["tanh", "relu", "elu"])),
                "layer_graphs": layer_graphs,
                "train_J": member == "H2" and draw(st.booleans()),
                **given,
                "readout": readout,
            },
            "data": data,
            "training": {
                "batch_size": draw(st.integers(1, 5)),
                "alpha": draw(st.sampled_from([0.0, 0.1])),
                "clip_norm": draw(st.sampled_from([None, 0.5, 1e6])),
                "activations": "store"
                if member in ("H1", "MS2")
                else draw(st.sampled_from(["store", "recompute"])),
                "seed": draw(st.integers(0, 100)),
                "dtype": dtype,
            },
            "cluster": {"wire": draw(st.sampled_from(["auto", "gloo"]))},
        }
    )


def matrix(
    member: str, sizes: list[int], links: set[tuple[int, int]], layers: int | None, seed: int
) -> list[object]:
    """A regular J of H1 (of each layer, if several) or X of H2 along some links."""
    agent = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    agent = agent.repeat(2) if member == "H1" else agent
    linked = torch.eye(len(sizes), dtype=torch.bool)
    for a, b in links:
        linked[a, b] = linked[b, a] = True
    random = torch.Generator().manual_seed(seed)
    shape = (*([] if layers is None else [layers]), len(agent), len(agent))
    W = torch.randn(*shape, generator=random, dtype=torch.float64) * linked[agent[:, None], agent]
    W = W - W.mT if member == "H1" else W + 5 * torch.eye(len(agent))
    rows: list[object] = W.tolist()
    return rows


@st.composite
def jobs(draw: st.DrawFn, max_agents: int = 6, dtype: str = "float64") -> Job:
    """Jobs of `specs`, some without an agent or two that they can do without."""
    job = Job.of(draw(specs(max_agents, dtype)))
    absent = draw(st.just(set()) | st.sets(st.sampled_from(job.names), max_size=2))
    try:
        return job.without(absent)
    except UserError:  # they are needed
        return job


PAIR = {"name": "a pair/of", "agents": ["a", "b"], "d": 2, "edges": [["a", "b"]]}


def tiny(**sections: object) -> Job:
    """A job of one layer on the graph `PAIR`, unless its sections say otherwise."""
    small = {"data": {"train_samples": 64, "test_samples": 10}, "model": {"layers": 1}}
    return Job.of(spec_from_dict({"topology": PAIR, **small, **sections}))


def in_order(architecture: Architecture, matrix: torch.Tensor) -> torch.Tensor:
    """Rows and columns agent after agent, as the blocks of a pattern lie."""
    agents = tuple(range(len(architecture.names)))
    order = architecture.stacked(agents, architecture.member.whole)
    return matrix[..., order[:, None], order]


def in_process(job: Job, cls: type[InProcess] = InProcess) -> InProcess:
    """The transport of a job whose agents share a process."""
    return cls(agreement_of(job))


# --- what is wrong -------------------------------------------------------------------------------

HOSTILE = (0, -1, 2**31, 2**63, 10**9, 10**30, -(10**400), 1e308, float("inf"), float("nan"))
NASTY = ("", "a/b", "../../x", "/etc/passwd", "a\0b", "a\nb", ".", "~nobody/x", "é\x85", "x" * 5000)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(width=32),
    st.sampled_from(HOSTILE),
    st.sampled_from(NASTY),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """`value`, plain data, with up to three of its parts replaced, dropped, renamed or doubled."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holders = [holder for holder in _holders(result) if holder]
        if not holders:
            return draw(values)
        holder = draw(st.sampled_from(holders))
        key = draw(st.sampled_from(range(len(holder)) if isinstance(holder, list) else [*holder]))
        match draw(st.sampled_from(["replace", "drop", "rename", "double", "swap"])):
            case "replace":
                holder[key] = draw(values)
            case "drop":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case "rename" | "double" if isinstance(holder, dict):
                holder[draw(st.text(max_size=6) | st.sampled_from(NASTY))] = holder.pop(key)
            case _:  # by a part from elsewhere
                holder[key] = copy.deepcopy(draw(st.sampled_from(holders)))
    return result


def _holders(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return []
    return [value, *(holder for child in children for holder in _holders(child))]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with up to three runs of bytes overwritten, cut out, put in or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, min(len(content), 400)) | st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 2, 8, 60, 10**9])))
        match draw(st.sampled_from(["overwrite", "cut", "put", "repeat"])):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=8))
                content = content[:start] + new + content[start + len(new) :]
            case "cut":
                content = content[:start] + content[end:]
            case "put":
                content = content[:start] + draw(st.binary(max_size=40)) + content[start:]
            case _:
                content = content[:start] + 3 * content[start:end] + content[start:]
    return content
