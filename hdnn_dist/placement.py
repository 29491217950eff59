"""Which agents share an actor, and what an actor asks of the cluster. Pure."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pymetis

from hdnn_dist.errors import few
from hdnn_dist.spec import AgentSpec, ClusterSpec
from hdnn_dist.topology import Topology

Packing = tuple[tuple[int, ...], ...]
HAIR = 1e-4  # of a core: the least that Ray counts, for actors that ask for nothing in particular
KINDS = 3  # demands that find no place up to which all are told
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


def hosts(packing: Packing) -> tuple[int, ...]:
    """Per agent, the rank of its actor."""
    rank = {i: k for k, agents in enumerate(packing) for i in agents}
    return tuple(rank[i] for i in range(len(rank)))


@dataclass(frozen=True)
class Demand:
    """What one actor asks for: the sums over its agents, and the node labels they share."""

    resources: dict[str, float]
    labels: dict[str, str]


@dataclass(frozen=True)
class Node:
    """A machine of a cluster: what it has in all, and the labels it carries."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str]

    def could_hold(self, demand: Demand) -> bool:
        """Whether it could hold such an actor, if it had nothing else to hold."""
        return demand.labels.items() <= self.labels.items() and _fits(demand, self.resources)


def demands(topology: Topology, packing: Packing, nodes: Sequence[Node]) -> tuple[Demand, ...]:
    """What each actor asks for.

    What its agents name is summed. An actor with agents that name no `cpu` asks for a core more,
    or where there are more such actors than cores, for a half, a third, …, so that they fill
    whole cores and fit on machines of any size. The cores that count are those of the machines that
    could hold it, and those that it shares them with are all whom no others could hold.

    Args:
        topology: the agents.
        packing: who shares an actor.
        nodes: of the cluster.
    """
    members = [[topology.agents[i] for i in agents] for agents in packing]
    named = [_named(agents) for agents in members]
    unnamed = [any(agent.cpu is None for agent in agents) for agents in members]
    kinds = {repr(demand): demand for demand in named}
    home_of = {kind: _home(demand, nodes) for kind, demand in kinds.items()}
    homes = [home_of[repr(demand)] for demand in named]
    part: dict[frozenset[int], float] = {}
    for home in set(homes):
        within = [k for k, other in enumerate(homes) if other <= home]
        cores = sum(nodes[n].resources.get("CPU", 0.0) for n in home)
        free = cores - sum(named[k].resources["CPU"] for k in within)
        part[home] = _part(free, sum(unnamed[k] for k in within))
    least = {home: min(p for other, p in part.items() if home <= other) for home in part}
    return tuple(
        _with_cores(demand, least[home] if more else 0.0)
        for demand, home, more in zip(named, homes, unnamed, strict=True)
    )


def _named(members: Sequence[AgentSpec]) -> Demand:
    """What the agents of an actor name."""
    needs: Counter[str] = Counter()
    for agent in members:
        needs.update({"CPU": agent.cpu or 0.0, "GPU": agent.gpu} | agent.resources)
    if needs["GPU"] > 1:  # Ray shares out parts of one GPU, and whole ones
        needs["GPU"] = math.ceil(needs["GPU"])
    return Demand(dict(needs), members[0].labels)


def _with_cores(demand: Demand, cores: float) -> Demand:
    """A demand for so many cores more, as Ray counts."""
    needs = demand.resources | {"CPU": demand.resources["CPU"] + cores}
    # Rounding down keeps a third of a core within a third.
    rounded = {k: math.floor(amount / HAIR + 1e-6) / 1e4 for k, amount in needs.items()}
    asked = {key: amount for key, amount in rounded.items() if amount > 0}
    return Demand(asked or {"CPU": HAIR}, demand.labels)


def _home(demand: Demand, nodes: Sequence[Node]) -> frozenset[int]:
    """The nodes that could hold an actor; all of them if none could."""
    could = frozenset(n for n, node in enumerate(nodes) if node.could_hold(demand))
    return could or frozenset(range(len(nodes)))


def _part(free: float, count: int) -> float:
    """A core, or the part of one that so many can have of those that are free."""
    if free >= 1:
        return 1 / max(1, math.ceil(count / int(free)))
    return max(0.0, free) / max(1, count)


def assign(
    wanted: Sequence[Demand], nodes: Sequence[Node], spread: bool = False
) -> tuple[int | None, ...]:
    """A node for each actor; None where no node has room left.

    A forecast: Ray places them itself, on what other jobs leave.

    Args:
        wanted: what each actor asks for.
        nodes: of the cluster.
        spread: over the nodes; else on as few as possible.
    """
    return _dealt(wanted, nodes, spread)[0]


def _dealt(
    wanted: Sequence[Demand], nodes: Sequence[Node], spread: bool
) -> tuple[tuple[int | None, ...], list[dict[str, float]]]:
    """The nodes, and what is left on each. Whom few could hold comes first, then the largest."""
    left = [dict(node.resources) for node in nodes]
    held = [0] * len(nodes)
    places: list[int | None] = [None] * len(wanted)
    kinds = {repr(demand): demand for demand in wanted}
    holders = {
        kind: [n for n, node in enumerate(nodes) if node.could_hold(demand)]
        for kind, demand in kinds.items()
    }
    could = [holders[repr(demand)] for demand in wanted]
    for k in sorted(
        range(len(wanted)), key=lambda k: (len(could[k]), -sum(wanted[k].resources.values()))
    ):
        fitting = (n for n in could[k] if _fits(wanted[k], left[n]))
        place = min(fitting, key=held.__getitem__, default=None) if spread else next(fitting, None)
        places[k] = place
        if place is not None:
            held[place] += 1
            for key, amount in wanted[k].resources.items():
                left[place][key] -= amount
    return tuple(places), left


def _fits(demand: Demand, left: Mapping[str, float]) -> bool:
    """Whether what is left holds an actor."""
    return all(left.get(key, 0.0) >= amount - 1e-9 for key, amount in demand.resources.items())


def _lacking(demand: Demand, node: Node, left: Mapping[str, float]) -> list[str]:
    """What keeps a node from holding an actor, in words."""
    labels = [
        f"its {key} is {node.labels[key]}" if key in node.labels else f"no label {key}"
        for key, value in demand.labels.items()
        if node.labels.get(key) != value
    ]
    return labels + [
        f"{left.get(key, 0.0):g} {key} of {node.resources.get(key, 0.0):g} left"
        if key in node.resources
        else f"no {key}"
        for key, amount in demand.resources.items()
        if left.get(key, 0.0) < amount - 1e-9
    ]


def shortage(
    wanted: Sequence[Demand], who: Sequence[str], nodes: Sequence[Node], spread: bool = False
) -> str:
    """Which actors no node could hold, and what each node lacks for them; empty if all fit.

    Of actors that ask for the same the first is told, and of what they ask for some kinds.

    Args:
        wanted: what each actor asks for.
        who: its agents, in words.
        nodes: of the cluster.
        spread: over them.
    """
    places, left = _dealt(wanted, nodes, spread)
    homeless = [k for k, place in enumerate(places) if place is None]
    if not homeless:
        return ""
    if not any(node.resources.get("CPU") for node in nodes):
        return "there is no machine with a core"
    first_of = {repr(wanted[k]): k for k in reversed(homeless)}
    told = [f"{len(homeless)} of {len(wanted)} actors find no place"]
    for k in sorted(first_of.values())[:KINDS]:
        demand, which = wanted[k], "the first" if k == homeless[0] else "another"
        asked = [f"{amount:g} {key}" for key, amount in demand.resources.items()]
        asked += [f"the label {key}={value}" for key, value in demand.labels.items()]
        told.append(f"{which}, of {who[k]}, asks for {', '.join(asked)}")
        reasons: dict[str, list[str]] = {}
        for node, rest in zip(nodes, left, strict=True):
            reasons.setdefault(", ".join(_lacking(demand, node, rest)), []).append(node.name)
        told += [f"{few(names)}: {why}" for why, names in reasons.items()]
    return "; ".join(told)


def address_of(cluster: ClusterSpec, given: str | None = None) -> str | None:
    """The Ray cluster to join: the one given, else the spec's, else `$RAY_ADDRESS`, else none."""
    return given or cluster.address or os.environ.get("RAY_ADDRESS") or None
