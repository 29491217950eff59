"""Which agents share an actor, and what an actor asks of the cluster. Pure."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pymetis

from hdnn_dist.spec import AgentSpec, ClusterSpec
from hdnn_dist.topology import Topology

Packing = tuple[tuple[int, ...], ...]
NAMED = 3  # agents by which an actor is called
SMALL = 4096  # entries of an agent's K in a layer whose products take as long as to begin them


def pack(topology: Topology, cluster: ClusterSpec, cores: int) -> Packing:
    """The agents of each actor, so that few bytes pass between actors: METIS's partition.

    With a number of agents an actor, that is the most, and actors are as even as can be; with
    "auto" they are even in what their agents compute. Agents that ask for other node labels
    or custom resources, or whose machines are of another speed, never share an actor: those may be
    on different machines. Nor do agents that ask for a GPU and agents that do not.

    Args:
        topology: the agents.
        cluster: `agents_per_actor`; "auto" makes one actor a core.
        cores: of the cluster (of this machine if there is none).

    Returns:
        Agents in ascending order, and actors by their first; the same for the same arguments.
    """
    limit = None if cluster.agents_per_actor == "auto" else cluster.agents_per_actor
    size = limit or math.ceil(len(topology.agents) / max(1, cores))
    alike: dict[str, list[int]] = {}
    for i, agent in enumerate(topology.agents):
        asked = sorted(agent.labels.items()), sorted(agent.resources.items())
        machine = *asked, agent.gpu > 0, agent.speed
        alike.setdefault(repr(machine), []).append(i)
    parts = [
        part
        for agents in alike.values()
        for part in _partition(topology, agents, math.ceil(len(agents) / size), limit)
    ]
    return tuple(sorted(map(tuple, parts)))


def _partition(
    topology: Topology, agents: list[int], count: int, limit: int | None
) -> list[list[int]]:
    """Some agents in `count` parts of even load, or fewer, with little between them."""
    if count in (1, len(agents)):
        return [[i] for i in agents] if count > 1 else [agents]
    position = {i: k for k, i in enumerate(agents)}
    between: list[Counter[int]] = [Counter() for _ in agents]
    sizes, reads = topology.sizes, list(topology.sizes)
    for l, i in topology.edges:
        reads[i] += sizes[l]
        if l in position and i in position:  # q^l to i, and as many numbers back
            between[position[l]][position[i]] += sizes[l]
            between[position[i]][position[l]] += sizes[l]
    loads = [1 if limit else SMALL + sizes[i] * reads[i] for i in agents]
    partition = pymetis.part_graph(
        count,
        pymetis.CSRAdjacency(
            [0, *accumulate(map(len, between))], [k for row in between for k in row]
        ),
        eweights=_whole([amount for row in between for amount in row.values()]),
        vweights=_whole(loads),
        recursive=True,
        options=pymetis.Options(seed=0, ncuts=10, ufactor=1),  # the best of ten, of even loads
    )
    found = list(partition.vertex_part)
    amounts = Counter[int]()
    for part, load in zip(found, loads, strict=True):
        amounts[part] += load
    even = max(math.ceil(sum(loads) / count), *loads)
    if max(amounts.values()) > even * (1 if limit else 1.1):
        # METIS keeps to no bound; runs of even load in the order of its parts do.
        order = sorted(range(len(agents)), key=found.__getitem__)
        ends = accumulate(loads[k] for k in order)
        for k, end in zip(order, ends, strict=True):
            found[k] = int((end - loads[k] / 2) / sum(loads) * count)
    parts: dict[int, list[int]] = {}
    for i, part in zip(agents, found, strict=True):
        parts.setdefault(part, []).append(i)
    return list(parts.values())


def _whole(weights: Sequence[int]) -> list[int]:
    """Weights as whole numbers up to a thousand, as METIS adds them up in 32 bits."""
    most = max(weights, default=0)
    return [max(1, round(1000 * weight / most)) for weight in weights]


def called(agents: Sequence[str]) -> str:
    """What an actor is called after its agents."""
    more = len(agents) - NAMED
    return ", ".join(agents[:NAMED]) + (f" and {more} more" if more > 0 else "")


def hosts(packing: Packing) -> tuple[int, ...]:
    """Per agent, the rank of its actor."""
    rank = {i: k for k, agents in enumerate(packing) for i in agents}
    return tuple(rank[i] for i in range(len(rank)))


@dataclass(frozen=True)
class Demand:
    """What one actor asks for: the sums over its agents, and the node labels they share."""

    resources: dict[str, float]
    labels: dict[str, str]


def demands(topology: Topology, packing: Packing, cores: float) -> tuple[Demand, ...]:
    """What each actor asks for.

    What its agents name is summed. An actor with agents that name no `cpu` asks for a core more,
    or where there are more such actors than cores, for a half, a third, …, so that they fill
    whole cores and fit on machines of any size.

    Args:
        topology: the agents.
        packing: who shares an actor.
        cores: of the cluster.
    """
    named = [
        [a.cpu for a in members if a.cpu is not None] for members in _members(topology, packing)
    ]
    sharing = [len(cpus) < len(agents) for cpus, agents in zip(named, packing, strict=True)]
    free = cores - sum(map(sum, named))
    if free >= 1:
        share = 1 / math.ceil(sum(sharing) / int(free)) if any(sharing) else 0.0
    else:
        share = max(0.0, free) / max(1, sum(sharing))
    result = []
    for members, cpus, shares in zip(_members(topology, packing), named, sharing, strict=True):
        needs = Counter({"CPU": sum(cpus) + shares * share, "GPU": sum(a.gpu for a in members)})
        for agent in members:
            needs.update(agent.resources)
        # Ray counts in 1/10000; rounding down keeps a third of a core within a third.
        rounded = {key: math.floor(amount * 1e4 + 1e-6) / 1e4 for key, amount in needs.items()}
        if rounded["GPU"] > 1:  # Ray shares out parts of one GPU, and whole ones
            rounded["GPU"] = math.ceil(rounded["GPU"])
        result.append(Demand({k: v for k, v in rounded.items() if v > 0}, members[0].labels))
    return tuple(result)


def _members(topology: Topology, packing: Packing) -> list[list[AgentSpec]]:
    return [[topology.agents[i] for i in agents] for agents in packing]


@dataclass(frozen=True)
class Node:
    """A machine of a cluster: what it has in all, and the labels it carries."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str]


def assign(wanted: Sequence[Demand], nodes: Sequence[Node]) -> tuple[int | None, ...]:
    """A node for each actor, the largest first; None where no node has room left.

    A forecast: Ray places them itself, on what other jobs leave.
    """
    free = [dict(node.resources) for node in nodes]
    places: list[int | None] = [None] * len(wanted)
    for k in sorted(range(len(wanted)), key=lambda k: -sum(wanted[k].resources.values())):
        demand = wanted[k]
        for n, node in enumerate(nodes):
            fits = all(
                free[n].get(key, 0.0) >= amount - 1e-9 for key, amount in demand.resources.items()
            )
            if fits and demand.labels.items() <= node.labels.items():
                for key, amount in demand.resources.items():
                    free[n][key] -= amount
                places[k] = n
                break
    return tuple(places)


def address_of(cluster: ClusterSpec, given: str | None = None) -> str | None:
    """The Ray cluster to join: the one given, else the spec's, else `$RAY_ADDRESS`, else none."""
    return given or cluster.address or os.environ.get("RAY_ADDRESS") or None
