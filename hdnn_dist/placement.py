"""Which agents share an actor, and what an actor asks of the cluster. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hdnn_dist.spec import ClusterSpec
from hdnn_dist.topology import Topology

Packing = tuple[tuple[int, ...], ...]


def pack(topology: Topology, cluster: ClusterSpec, cores: int) -> Packing:
    """The agents of each actor: runs of neighbours in the spec's order, as even as can be.

    Agents whose node labels differ never share an actor.

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
        if i and agent.labels == topology.agents[i - 1].labels:
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

    An agent that names no `cpu` takes an equal share of the cores that the named ones leave, at
    most one: any number of agents fits, and on a large cluster each has a core.

    Args:
        topology: the agents.
        packing: who shares an actor.
        cores: of the cluster.
    """
    named = sum(agent.cpu for agent in topology.agents if agent.cpu is not None)
    unnamed = sum(agent.cpu is None for agent in topology.agents)
    # Ray counts in 1/10000; rounding down keeps the sum within the cluster.
    share = min(1.0, math.floor(max(0.0, cores - named) / max(1, unnamed) * 1e4) / 1e4)
    result = []
    for agents in packing:
        needs: dict[str, float] = {}
        for i in agents:
            agent = topology.agents[i]
            wanted = {"CPU": share if agent.cpu is None else agent.cpu, "GPU": agent.gpu}
            for key, amount in (wanted | agent.resources).items():
                needs[key] = needs.get(key, 0.0) + amount
        labels = topology.agents[agents[0]].labels
        result.append(Demand({k: round(v, 4) for k, v in needs.items() if v > 0}, labels))
    return tuple(result)


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
