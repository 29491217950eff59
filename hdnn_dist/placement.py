"""Which agents share an actor, and what an actor asks of the cluster. Pure."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hdnn_dist.spec import AgentSpec, ClusterSpec
from hdnn_dist.topology import Topology

Packing = tuple[tuple[int, ...], ...]


def pack(topology: Topology, cluster: ClusterSpec, cores: int) -> Packing:
    """The agents of each actor: runs of neighbours in the spec's order, as even as can be.

    Agents that ask for other node labels or custom resources never share an actor: those may be on
    different machines.

    Args:
        topology: the agents.
        cluster: `agents_per_actor`; "auto" makes one actor a core.
        cores: of the cluster (of this machine if there is none).
    """
    M = len(topology.agents)
    if cluster.agents_per_actor == "auto":
        size = math.ceil(M / max(1, cores))
    else:
        size = cluster.agents_per_actor
    runs: list[list[int]] = []
    for i, agent in enumerate(topology.agents):
        before = topology.agents[i - 1]
        if i and (agent.labels, agent.resources) == (before.labels, before.resources):
            runs[-1].append(i)
        else:
            runs.append([i])
    packing: list[tuple[int, ...]] = []
    for run in runs:
        actors = math.ceil(len(run) / size)
        ends = [len(run) * k // actors for k in range(actors + 1)]
        packing += [tuple(run[a:b]) for a, b in pairwise(ends)]
    return tuple(packing)


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
