"""What a job would do, told without doing it: no process starts and no data is loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from operator import or_

import psutil
import torch

from hdnn_dist.console import size
from hdnn_dist.cost import Calibration, Cost, predict
from hdnn_dist.data import share
from hdnn_dist.errors import few
from hdnn_dist.exchange import Round
from hdnn_dist.job import Job
from hdnn_dist.placement import Demand, Node, Packing, assign, demands, hosts, pack, shortage
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.worker import slowest

ACTORS_A_CORE = 4  # up to which packings are tried
# Up to so many agents, and paths of two hops, is computed what takes their square, or cube.
EXAMINED_AGENTS = 2000
EXAMINED_PATHS = 20_000_000


@dataclass(frozen=True)
class AgentReport:
    """An agent: what it sees, holds, and asks for; `actor` is the number of its actor."""

    name: str
    d: int
    features: int
    parameters: int
    actor: int
    cpu: float | None
    gpu: float
    resources: dict[str, float]
    labels: dict[str, str]


@dataclass(frozen=True)
class PatternReport:
    """A pattern: its rows (see `BlockPattern`), and how much of the full matrix it is."""

    symbol: str
    rows: tuple[tuple[int, ...], ...]
    density: float


@dataclass(frozen=True)
class Phase:
    """Part of a training step."""

    name: str
    rounds: int
    bytes: int


@dataclass(frozen=True)
class LinkReport:
    """What a training step sends from one agent to another."""

    source: str
    target: str
    bytes: int


@dataclass(frozen=True)
class ActorReport:
    """An actor: its agents, what it asks for, and a node that has it (None: no node is left).

    `copy` is the number of the copy of the agents that it is in.
    """

    agents: tuple[str, ...]
    copy: int
    resources: dict[str, float]
    labels: dict[str, str]
    node: str | None


@dataclass(frozen=True)
class Crossing:
    """What a training step sends from one machine to another: between whom, and bytes in all."""

    source: str
    target: str
    links: tuple[tuple[str, str], ...]
    bytes: int


@dataclass(frozen=True)
class Timing:
    """The predicted time of a step (see `hdnn_dist.cost`), with a number of agents an actor."""

    agents_per_actor: int | str
    actors: int
    cost: Cost


@dataclass(frozen=True)
class Stragglers:
    """The actors for which all others are predicted to wait, in each copy.

    Attributes:
        actors: their numbers.
        agents: their agents.
        busy: seconds of a step in which the slowest computes.
        others: of these, those in which the others compute, on average; in the rest they wait.
    """

    actors: tuple[int, ...]
    agents: tuple[str, ...]
    busy: float
    others: float


@dataclass(frozen=True)
class Report:
    """All that can be said of a job beforehand. Bytes are those of a training step.

    Attributes:
        topology, data, model: their names.
        agents: one by one.
        edges: of the graph; an undirected edge counts once.
        directed, two_way: as in `Topology`.
        links: pairs of agents that may exchange messages.
        examined: whether the graph is small enough for `diameter`, `spectral_gap`, the
            compositions, `single_exchange`, `missing` and `layers_to_cross`; else they are empty.
        diameter: directions aside; None if the graph is not connected.
        spectral_gap: as in `Topology`; None for a single agent.
        patterns: T for each distinct layer graph, R, and their compositions.
        single_exchange: the paper's condition RᵀTᵀT ≤ S.
        missing: the (i, l) for which it fails: i's update involves l, and l cannot talk to i.
        layers: per distinct layer graph, the rounds and bytes of one layer's forward pass; the
            backward pass has as many of both, or twice as many if it recomputes the states.
        recompute: whether it does.
        step: the parts of a training step.
        busiest: the link that carries most.
        traffic: every link that carries something.
        parameters, dense_parameters: trained by all agents, and on the complete graph.
        depth: layers N.
        layers_to_cross: until everybody's state depends on everybody's input; None for never.
        root: the agent that holds the labels, unless agents read out for themselves.
        tree_depth: hops that the scores travel to it.
        own_targets: how many agents read out targets by themselves, with no root.
        replicas: copies of all agents.
        shares: samples of a step that each copy takes.
        actors, nodes: the placement, tried out on the nodes.
        crossing_links, crossing_bytes: of the traffic, what passes between actors.
        crossings: of that, what passes between nodes, the most first; sums over copies aside.
        timings: as the spec has it, and then with other packings, the fastest first; empty
            without a calibration.
        stragglers: for whom the others wait, with the spec's packing; None if for nobody much.
        warnings: what will not work well.
    """

    topology: str
    data: str
    model: str
    agents: tuple[AgentReport, ...]
    edges: int
    directed: bool
    two_way: bool
    links: int
    examined: bool
    diameter: int | None
    spectral_gap: float | None
    patterns: tuple[PatternReport, ...]
    single_exchange: bool | None
    missing: tuple[tuple[str, str], ...]
    layers: tuple[Phase, ...]
    recompute: bool
    step: tuple[Phase, ...]
    busiest: LinkReport | None
    traffic: tuple[LinkReport, ...]
    parameters: int
    dense_parameters: int
    depth: int
    layers_to_cross: int | None
    root: str
    tree_depth: int
    own_targets: int
    replicas: int
    shares: tuple[int, ...]
    actors: tuple[ActorReport, ...]
    nodes: tuple[Node, ...]
    crossing_links: int
    crossing_bytes: int
    crossings: tuple[Crossing, ...]
    timings: tuple[Timing, ...]
    stragglers: Stragglers | None
    warnings: tuple[str, ...]


def this_machine() -> Node:
    """What a Ray started here would have."""
    gpus = torch.cuda.device_count()
    cores = {"CPU": float(os.cpu_count() or 1)}
    return Node("this machine", cores | ({"GPU": float(gpus)} if gpus else {}), {})


def examine(job: Job, nodes: Sequence[Node], calibration: Calibration | None = None) -> Report:
    """Tell what a job would do.

    Args:
        job: the job.
        nodes: of the cluster that it is to run on; this machine alone, if there is none.
        calibration: of such machines, to predict the time of a step by.
    """
    topology, architecture, plan = job.topology, job.architecture, job.plan
    patterns, names, M = architecture.patterns, topology.names, len(topology.agents)
    cores = sum(node.resources.get("CPU", 0.0) for node in nodes)
    copies = job.spec.cluster.replicas
    packing = pack(topology, job.spec.cluster, int(cores) // copies)
    host = hosts(packing)
    wanted = demands(topology, packing * copies, nodes)
    places = assign(wanted, nodes, job.spec.cluster.placement == "spread")
    sent = job.traffic(plan.training_step)
    shares = [share(job.batch, copy, copies) for copy in range(copies)]
    traffic = tuple(
        LinkReport(names[source], names[target], amount)
        for (source, target), amount in sorted(sent.items())
    )
    crossing = [n for (source, target), n in sent.items() if host[source] != host[target]]
    timings = tuple(_timings(job, packing, calibration, int(cores))) if calibration else ()
    paths = sum(len(row) ** 2 for row in patterns.K.rows)
    examined = M <= EXAMINED_AGENTS and paths <= EXAMINED_PATHS
    missing = (patterns.composed - patterns.S).entries if examined else ()
    report = Report(
        topology=topology.name,
        data=job.data.name,
        model=architecture.member.name,
        agents=tuple(
            AgentReport(
                name=agent.name,
                d=topology.sizes[i],
                features=len(job.views[i].columns),
                parameters=architecture.count(i),
                actor=host[i],
                cpu=agent.cpu,
                gpu=agent.gpu,
                resources=agent.resources,
                labels=agent.labels,
            )
            for i, agent in enumerate(topology.agents)
        ),
        edges=len(topology.edges) // (1 if topology.directed else 2),
        directed=topology.directed,
        two_way=topology.two_way,
        links=len({frozenset(entry) for entry in patterns.S.entries}) - M,
        examined=examined,
        diameter=topology.diameter if examined else None,
        spectral_gap=topology.spectral_gap if examined else None,
        patterns=tuple(_patterns(job, composed=examined)),
        single_exchange=patterns.single_exchange if examined else None,
        missing=tuple((names[i], names[j]) for i, j in missing),
        layers=tuple(_layers(job)),
        recompute=plan.recompute,
        step=tuple(_step(job)),
        busiest=max(traffic, key=lambda link: link.bytes, default=None),
        traffic=traffic,
        parameters=job.parameters,
        dense_parameters=architecture.count_dense(),
        depth=patterns.layers,
        layers_to_cross=patterns.layers_to_cross() if examined else None,
        root=names[job.root],
        tree_depth=len(architecture.tree.levels),
        own_targets=0 if architecture.own is None else len(architecture.readers),
        replicas=copies,
        shares=tuple(taken.stop - taken.start for taken in shares),
        actors=tuple(
            ActorReport(
                tuple(names[i] for i in agents),
                k // len(packing),
                demand.resources,
                demand.labels,
                None if place is None else nodes[place].name,
            )
            for k, (agents, demand, place) in enumerate(
                zip(packing * copies, wanted, places, strict=True)
            )
        ),
        nodes=tuple(nodes),
        crossing_links=len(crossing),
        crossing_bytes=sum(crossing),
        crossings=tuple(_crossings(job, host, places, nodes)),
        timings=timings,
        stragglers=_stragglers(job, packing, timings[0].cost) if timings else None,
        warnings=(),
    )
    return replace(report, warnings=tuple(_warnings(job, report)))


def _crossings(
    job: Job, host: Sequence[int], places: Sequence[int | None], nodes: Sequence[Node]
) -> Iterator[Crossing]:
    names, copies = job.topology.names, job.spec.cluster.replicas
    actors = len(places) // copies
    between: dict[tuple[int, int], Counter[tuple[int, int]]] = {}
    for copy in range(copies):
        taken = share(job.batch, copy, copies)
        on = [places[copy * actors + rank] for rank in host]
        for link, amount in job.traffic_of(
            job.plan.training_step, taken.stop - taken.start
        ).items():
            source, target = (on[i] for i in link)
            if source is not None and target is not None and source != target:
                between.setdefault((source, target), Counter())[link] += amount
    for (source, target), sent in sorted(between.items(), key=lambda item: -item[1].total()):
        links = tuple((names[l], names[i]) for l, i in sorted(sent))
        yield Crossing(nodes[source].name, nodes[target].name, links, sent.total())


def _timings(job: Job, packing: Packing, calibration: Calibration, cores: int) -> Iterator[Timing]:
    """The packing of the spec, and then one, two, four … actors up to some a core."""
    cluster, M = job.spec.cluster, len(job.topology.agents)
    copies = cluster.replicas

    def timing(size: int | str, packing: Packing) -> Timing:
        return Timing(size, copies * len(packing), predict(job, packing, calibration, cores))

    yield timing(cluster.agents_per_actor, packing)
    found = {}
    count = 1
    while count <= min(M, ACTORS_A_CORE * max(1, cores // copies)):
        size = -(-M // count)
        other = pack(job.topology, cluster.model_copy(update={"agents_per_actor": size}), cores)
        found[len(other)] = timing(size, other)
        count *= 2
    yield from sorted(found.values(), key=lambda timing: timing.cost.seconds)


def _stragglers(job: Job, packing: Packing, cost: Cost) -> Stragglers | None:
    """Who computes longest, if a step takes that long for them and not for want of cores."""
    busy = cost.busy
    slow = slowest(busy)
    if not slow or cost.arithmetic > max(busy):
        return None
    rest = [seconds for k, seconds in enumerate(busy) if k not in slow]
    names = tuple(job.topology.names[i] for k in slow for i in packing[k])
    return Stragglers(tuple(slow), names, max(busy), sum(rest) / len(rest))


def _patterns(job: Job, composed: bool) -> Iterator[PatternReport]:
    patterns = job.architecture.patterns
    R = patterns.R

    def row(symbol: str, P: BlockPattern) -> PatternReport:
        return PatternReport(symbol, P.rows, P.nnz / P.size**2)

    for T, layers in _layers_by_graph(job).items():
        where = "" if len(layers) == patterns.layers else f" in layers {few(map(str, layers))}"
        yield row(f"T{where}", T)
        if composed and any(update.pull for update in patterns.updates):
            yield row(f"TᵀT{where}", T.T @ T)
            yield row(f"RᵀTᵀT{where}", R.T @ T.T @ T)
    yield row("R", R)


def _layers_by_graph(job: Job) -> dict[BlockPattern, list[int]]:
    layers: dict[BlockPattern, list[int]] = {}
    for j, T in enumerate(job.architecture.patterns.T):
        layers.setdefault(T, []).append(j)
    return layers


def _layers(job: Job) -> Iterator[Phase]:
    for layers in _layers_by_graph(job).values():
        j, plan = layers[0], job.plan
        rounds = [phase for update in plan.updates for phase in plan.half_step(j, update)]
        yield _phase(job, f"layer{'s' * (len(layers) > 1)} {few(map(str, layers))}", rounds)


def _step(job: Job) -> Iterator[Phase]:
    plan = job.plan
    scores = len([phase for phase in plan.collect if phase.messages])
    forward, backward = plan.forward, plan.backward
    yield _phase(job, "layers forward", forward[: len(forward) - scores])
    yield _phase(job, "scores to the root", forward[len(forward) - scores :])
    yield _phase(job, "their cotangent back", backward[:scores])
    yield _phase(job, "layers backward", backward[scores:])
    if (copies := job.spec.cluster.replicas) > 1:
        # A ring among the copies of an actor: 2 (R - 1) messages one after the other.
        yield Phase("sums over the copies", 2 * (copies - 1), job.bytes_of_sums)
    yield _phase(job, "norm of the gradient", plan.clipping)


def _phase(job: Job, name: str, rounds: Sequence[Round]) -> Phase:
    moved = job.traffic(rounds)
    return Phase(name, len(rounds), sum(moved.values()))


def _unread(job: Job) -> list[str]:
    """Agents whose input cannot reach the scores within the depth of the network."""
    patterns = job.architecture.patterns
    p, q = next(islice(patterns.dependencies(), patterns.layers, None))
    reached = reduce(or_, (p[i] | q[i] for i in job.architecture.readers))
    return [
        name
        for i, name in enumerate(job.topology.names)
        if job.views[i].columns and not reached >> i & 1
    ]


def _warnings(job: Job, report: Report) -> Iterator[str]:
    depth, crosses = report.depth, report.layers_to_cross
    if not report.examined:
        yield "the graph is too large to tell how far information goes in it, or its diameter"
    elif crosses is None:
        yield "information never crosses the graph, however many layers: connect its parts"
    elif crosses > depth:
        yield (
            f"information needs {crosses} layers to cross the graph, but there are {depth}: "
            f"set model.layers to {crosses} or more, or add edges"
        )
    if report.examined and (unread := _unread(job)):
        yield (
            f"the scores do not depend on the input of {few(unread)}: "
            "add layers or edges, or read at more agents "
            f"({'model.readout.agents' if job.architecture.own is None else 'data.targets'})"
        )
    if job.spec.model.encoder == "pad":
        yield (
            "the encoder pad makes an agent's raw features its first state, which its neighbours "
            "are sent: use the encoder linear where raw data must not leave an agent"
        )
    if job.spec.training.distort is not None:
        yield (
            "to distort training images every agent reads all their pixels from the data set: use "
            "training.shift where an agent has no more than its own"
        )
    wanted = [Demand(actor.resources, actor.labels) for actor in report.actors]
    spread = job.spec.cluster.placement == "spread"
    who = [few(actor.agents) for actor in report.actors]
    if missing := shortage(wanted, who, report.nodes, spread):
        yield f"{missing}: ask for less, or add machines"
    without = [actor for actor in report.actors if not actor.resources.get("GPU")]
    if without and job.spec.cluster.device == "cuda":
        yield (
            f"cluster.device is cuda, but {len(without)} of {len(report.actors)} actors ask for no "
            f"GPU; the first, of {few(without[0].agents)}: give its agents gpu (1, or a part)"
        )
    weights, memory = report.parameters * job.dtype.itemsize, psutil.virtual_memory().total
    if weights > memory:
        yield (
            f"the parameters alone take {size(weights)}, but this machine has {size(memory)} of "
            "memory: lower topology.d or model.layers, or spread the agents over machines"
        )
    cores = sum(node.resources.get("CPU", 0.0) for node in report.nodes)
    if len(report.actors) > cores:
        yield (
            f"{len(report.actors)} actors share {cores:g} cores and wait for one another every "
            "round: --set cluster.agents_per_actor=auto makes it one actor a core"
        )
