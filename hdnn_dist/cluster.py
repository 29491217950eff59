"""Ray: the control plane. It places actors, tells them what to do and watches over them.

No message of a layer passes through Ray: the actors form a torch.distributed group among
themselves, and `hdnn_dist.transport` carries the rounds. Only this module, `actor`, `gauges`,
`joining` and `submission` import ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import numpy as np
import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)
from torch import Tensor

from hdnn_dist.actor import START, AgentActor, actor_class
from hdnn_dist.agent import Evaluation, Fault, StepResult, whole
from hdnn_dist.analysis import Sums
from hdnn_dist.checkpoint import Manifest
from hdnn_dist.data import Part
from hdnn_dist.errors import (
    AgreementError,
    HdnnError,
    LostError,
    PlacementError,
    RunError,
    TransportError,
    few,
)
from hdnn_dist.gauges import RunGauges
from hdnn_dist.job import Job
from hdnn_dist.joining import as_node, knock, start
from hdnn_dist.placement import (
    Demand,
    Node,
    Packing,
    address_of,
    assign,
    demands,
    pack,
    shortage,
)
from hdnn_dist.storage import Place
from hdnn_dist.trace import Track, clock_ahead
from hdnn_dist.worker import PARTS, Times

SLICE = 2.0  # seconds between two looks: at what the cluster has, at who is still alive
GRACE = 3.0  # seconds that actors are given to tell their side of a failure, at most

# How a job that finds no place is mended.
ROOM = (
    "give the job fewer or smaller agents or fewer cluster.replicas, pack them "
    "(cluster.agents_per_actor: auto), or add machines"
)

log = logging.getLogger("hdnn_dist")


class RayRunner:
    """The agents of a job on Ray actors (see `hdnn_dist.trainer.Runner`).

    Args:
        job: the job.
        address: a Ray cluster to join; default: the spec's, then `$RAY_ADDRESS`, then a Ray of
            its own on this machine. A Ray that this process has already joined is used as it is.

    Raises:
        PlacementError: the cluster is not there, or cannot hold the actors.
        AgreementError: an actor sees another topology, plan or model.
    """

    def __init__(self, job: Job, address: str | None = None) -> None:
        self.job = job
        self.timeout = job.spec.cluster.timeout
        # Who is silent for so long is lost: the rest of the timeout goes to finding out who.
        self.grace = min(GRACE, self.timeout / 6)
        self.patience = self.timeout - 2.5 * self.grace
        self._actors: list[Any] = []
        self._nodes: list[str] = []
        self._raylets: dict[str, str] = {}  # where each node listens
        self._silence: dict[str, float] = {}  # seconds since it answered, by node
        self._looked = 0.0  # when those were asked last
        self._starting = True  # the actors' processes
        self._suspects: set[str] = set()  # nodes on which actors were lost
        self._group: PlacementGroup | None = None
        self._own_ray = not ray.is_initialized()
        # On this machine alone, and so no other can come.
        self._alone = self._own_ray and address_of(job.spec.cluster, address) is None
        # Actors that fail because another one did are asked about it, not reported one by one.
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
        try:
            if self._own_ray:
                start(address_of(job.spec.cluster, address))
            self._gauges = RunGauges(job.topology.name)
            self._launch()
        except BaseException:
            self.close()
            raise

    def _launch(self) -> None:
        """Form the group, anew where machines are lost meanwhile."""
        cluster = self.job.spec.cluster
        for left in reversed(range(cluster.max_restarts + 1)):
            try:
                return self.reform(self.job)
            except LostError as error:
                if not left or cluster.on_agent_loss == "stop":
                    raise
                log.warning("%s; the actors are started anew", error)

    def reform(self, job: Job) -> None:
        """See `Runner`: the actors there are make room for new ones."""
        self.job = job
        try:
            self._disband()
            self._clear_suspects()
            self._place()
        except HdnnError:
            raise
        except Exception as error:  # Ray raises nothing more precise when its head is gone
            raise RunError(f"Ray failed while the actors were placed: {error}") from error
        self._gauges.formed()
        self._form()

    def _clear_suspects(self) -> None:
        """Nodes that lost actors, but do what they are told, are as good as any."""
        if not self._suspects:
            return
        probe = ray.remote(num_cpus=0, max_retries=0)(lambda: None)
        asked = {
            probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(): suspect
            for node in ray.nodes()
            for suspect in self._suspects
            if node["Alive"] and node["NodeID"][:8] in suspect
        }
        for call in _answered(asked, 2 * self.grace):
            with contextlib.suppress(RayError):  # it has just died
                ray.get(call)
                self._suspects.discard(asked[call])

    def _place(self) -> None:
        """Reserve a bundle of resources an actor, all or none, and start the actors there.

        What the cluster has may change meanwhile, as Ray learns of a dead node with a delay: then
        the agents are packed anew. What is still held after half of the time may stay so, as when a
        node could not hear that its actors were given up: then they are packed for what is free.
        """
        deadline, late = time.monotonic() + self.timeout, False
        before: dict[str, dict[str, float]] | None = None  # what each node had room for
        wanted: Sequence[Demand] = ()
        if missing := self._shortage():
            if self._alone:
                raise PlacementError(missing, ROOM)
            log.warning("%s; waiting %g s for machines", missing, self.timeout)
        while True:
            left = deadline - time.monotonic()
            if not late and left < self.timeout / 2:
                late, before = True, None
                if not self._shortage():
                    what = "%d actors wait for the cluster: %s; from now on what is free will do"
                    log.warning(what, len(wanted), _held(wanted))
            nodes = [node for node in ray.nodes() if node["Alive"]]
            room = _with_what_is_free(nodes) if late else nodes
            if before != (now := {node["NodeID"]: as_node(node).resources for node in room}):
                before, wanted = now, self._reserve(nodes, room)
            assert self._group is not None
            if self._group.wait(max(0.0, min(SLICE, left))):
                break
            if left <= 0:
                missing = self._shortage() or _held(wanted)
                raise PlacementError(
                    f"the cluster could not hold {len(wanted)} actors within {self.timeout:g} s: "
                    f"{missing}",
                    ROOM,
                )
        for k, demand in enumerate(wanted):
            custom = {n: v for n, v in demand.resources.items() if n not in ("CPU", "GPU")}
            self._actors.append(
                actor_class(AgentActor)
                .options(
                    num_cpus=demand.resources.get("CPU", 0),
                    num_gpus=demand.resources.get("GPU", 0),
                    resources=custom,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._group, placement_group_bundle_index=k
                    ),
                )
                .remote()
            )
        by_id = {node["NodeID"]: node for node in ray.nodes()}
        bundles = placement_group_table(self._group)["bundles_to_node_id"]
        on = [by_id[bundles[rank]] for rank in range(len(wanted))]
        self._nodes = [f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in on]
        addresses = [f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in on]
        self._raylets = dict(zip(self._nodes, addresses, strict=True))

    def _reserve(
        self, nodes: Sequence[dict[str, Any]], room: Sequence[dict[str, Any]]
    ) -> Sequence[Demand]:
        """Ask Ray for the bundles, in place of those asked for before; what they are to hold.

        Ray takes a minute to see that a machine is cut off, and until then would place actors
        there: machines that lost some are left out where the others have room.

        Args:
            nodes: all there are.
            room: the same, with what they are taken to have room for. Where that is not enough
                the bundles wait for all that there is.
        """
        if self._group is not None:
            remove_placement_group(self._group)
        trusted = [n for n in room if not any(n["NodeID"][:8] in s for s in self._suspects)]
        for chosen in (trusted, room, nodes):
            machines = [as_node(node) for node in chosen]
            self.packing, wanted = self._wanted(machines)
            if None not in assign(wanted, machines):
                break
        there = {node["NodeID"] for node in chosen}
        shunned = [node["NodeID"] for node in nodes if node["NodeID"] not in there]
        away = {"ray.io/node-id": f"!in({','.join(shunned)})"} if shunned else {}
        self._group = placement_group(
            [demand.resources for demand in wanted],
            strategy=self.job.spec.cluster.placement.upper(),
            bundle_label_selector=[demand.labels | away for demand in wanted],
        )
        return wanted

    def _wanted(self, nodes: Sequence[Node]) -> tuple[Packing, Sequence[Demand]]:
        """Who shares an actor on these machines, in each copy, and what all actors ask for."""
        cores = sum(node.resources.get("CPU", 0) for node in nodes)
        copies = self.job.spec.cluster.replicas
        packing = pack(self.job.topology, self.job.spec.cluster, int(cores) // copies)
        return packing, demands(self.job.topology, packing * copies, nodes)

    def _shortage(self) -> str:
        """Whom the cluster could not hold even if nobody else used it; empty if there is nobody."""
        nodes = [as_node(node) for node in ray.nodes() if node["Alive"]]
        packing, wanted = self._wanted(nodes)
        who = [few(self.job.topology.names[i] for i in agents) for agents in packing]
        return shortage(wanted, who * self.job.spec.cluster.replicas, nodes)

    def _form(self) -> None:
        """Have the actors form their group, take on their agents, and agree on the job."""
        self._silence = dict.fromkeys(self._nodes, 0.0)
        self._starting = True
        self._all("alive")
        self._starting = False
        first_on_node = [self._nodes.index(node) for node in dict.fromkeys(self._nodes)]
        self._ask([(rank, "prepare", (self.job.spec,)) for rank in first_on_node])
        size, copies = len(self._actors), self.job.spec.cluster.replicas
        if size > 1:
            [meeting] = self._ask([(0, "open_store", (self.patience,))])
            group, direct = (size, self.patience, copies), self._has_gpus_apart()
            self._ask([(rank, "join", (meeting, rank, *group, direct)) for rank in range(size)])
        digests = self._ask(
            [
                (rank, "host", (self.job.spec, agents, self.packing, self.job.absent))
                for rank, agents in enumerate(self.packing * copies)
            ]
        )
        for rank, digest in enumerate(digests):
            if digest != self.job.digest:
                raise AgreementError(
                    f"{self._who(rank)} sees a job with digest {digest[:12]}, but the driver "
                    f"has {self.job.digest[:12]}: install one version of hdnn_dist everywhere"
                )
        if size > 1 and self.job.spec.cluster.wire == "auto":
            self._all("connect")

    def _has_gpus_apart(self) -> bool:
        """Whether every actor computes on a GPU that no other has."""
        agents, cluster = self.job.topology.agents, self.job.spec.cluster
        wanted = (any(agents[i].gpu for i in members) for members in self.packing)
        if cluster.device == "cpu" or not all(wanted):
            return False
        gpus = self._all("gpu")
        return None not in gpus and len(set(gpus)) == len(gpus)

    def describe(self) -> str:
        """See `Runner`; so too below."""
        actors, nodes = len(self._actors), len(set(self._nodes))
        agents, copies = len(self.job.topology.agents), self.job.spec.cluster.replicas
        return (
            f"{agents} agents{f', {copies} copies of each,' * (copies > 1)} "
            f"on {actors} Ray actor{'s' * (actors > 1)}, {nodes} node{'s' * (nodes > 1)}"
        )

    def train(self, steps: int) -> list[StepResult]:  # noqa: D102
        started = time.perf_counter()
        answers = self._all("train", steps)[: len(self.packing)]  # the same in all copies
        results = _together(answers)
        self._gauges.trained(results, time.perf_counter() - started)
        return results

    def profile(self, steps: int) -> tuple[list[StepResult], list[Track]]:  # noqa: D102
        answers = self._all("profile", steps)
        results = _together([own for own, _ in answers[: len(self.packing)]])
        clocks = {  # a node has one for all its actors
            node: clock_ahead(partial(self._clock, self._nodes.index(node)))
            for node in dict.fromkeys(self._nodes)
        }
        return results, [
            replace(track, node=node, ahead=clocks[node][0], error=clocks[node][1])
            for (_, track), node in zip(answers, self._nodes, strict=True)
        ]

    def _clock(self, rank: int) -> tuple[str, float]:
        [told] = self._ask([(rank, "clock", ())])
        machine, now = told
        return str(machine), float(now)

    def faults(self) -> list[Fault]:  # noqa: D102
        return [fault for faults in self._all("faults") for fault in faults]

    def evaluate(self, part: Part = "test") -> Evaluation:  # noqa: D102
        answers = self._all("evaluate", part)[: len(self.packing)]  # the same in all copies
        evaluation: Evaluation = whole([answer for answer in answers if answer is not None])
        if part == "test":
            self._gauges.evaluated(evaluation)
        return evaluation

    def predict(self, source: str | os.PathLike[str]) -> np.ndarray:  # noqa: D102
        if source not in PARTS:  # actors work elsewhere
            source = os.path.abspath(source)
        answers, actors = self._all("predict", source), len(self.packing)
        copies = (answers[k : k + actors] for k in range(0, len(answers), actors))
        told = [[part for part in copy if part is not None] for copy in copies]
        return np.concatenate([reduce(operator.add, parts) for parts in told if parts])

    def sent(self) -> Counter[tuple[int, int]]:  # noqa: D102
        return sum(self._all("sent"), Counter())

    def times(self) -> list[Times]:  # noqa: D102
        return [
            replace(own, node=node)
            for own, node in zip(self._all("times"), self._nodes, strict=True)
        ]

    @property
    def cores(self) -> int:
        """Of the cluster."""
        return int(ray.cluster_resources().get("CPU", 1))

    def time_rounds(self, columns: int, rounds: int) -> float:
        """Seconds of one round that brings the states of a batch of `columns`, of so many."""
        return float(max(self._all("time_rounds", columns, rounds)))

    def gradient_squares(self) -> Tensor:  # noqa: D102
        squares: Tensor = reduce(operator.add, self._all("gradient_squares"))
        return squares

    def sensitivities(self, samples: int, V: Tensor) -> Sums:  # noqa: D102
        ranks = range(len(self.packing))  # of one copy
        calls = [(rank, "sensitivities", (samples, V)) for rank in ranks]
        sums: Sums = reduce(operator.add, self._ask(calls))
        return sums

    def save(self, folder: Place) -> dict[str, str]:  # noqa: D102
        saved: dict[str, str] = {}
        for rank, part in enumerate(self._all("save", folder.absolute())):
            for name, sha in part.items():
                if saved.setdefault(name, sha) != sha:
                    raise AgreementError(
                        f"{self._who(rank)} has another state of {name} than the first copy: one "
                        "computes wrongly, or their machines round differently; let copies be on "
                        "machines of one kind, or set cluster.replicas to 1"
                    )
        return saved

    def load(self, folder: Place, manifest: Manifest) -> None:  # noqa: D102
        self._all("load", folder.absolute(), manifest)

    def close(self) -> None:  # noqa: D102
        with contextlib.ExitStack() as stack:
            if self._own_ray:
                stack.callback(ray.shutdown)
            stack.callback(self._disband)

    def _disband(self) -> None:
        with contextlib.ExitStack() as stack:  # each step is taken even if one before it fails
            if self._group is not None:
                stack.callback(remove_placement_group, self._group)
            for actor in self._actors:
                stack.callback(ray.kill, actor)
            self._actors, self._nodes, self._raylets, self._group = [], [], {}, None

    def _all(self, method: str, *arguments: object) -> list[Any]:
        return self._ask([(rank, method, arguments) for rank in range(len(self._actors))])

    def _ask(self, calls: Sequence[tuple[int, str, tuple[Any, ...]]]) -> list[Any]:
        """Call methods of actors at once; the answers in order, or the first error to come.

        Answers are taken as they come, so that an actor's failure is seen while those that wait
        for its messages are still blocked. Meanwhile all actors are asked whether they are alive.
        """
        pending = {
            getattr(self._actors[rank], method).remote(*arguments): rank
            for rank, method, arguments in calls
        }
        order = list(pending)
        answers: dict[Any, Any] = {}
        pings: dict[Any, int] = {}
        begin = time.monotonic() + (START if self._starting else 0.0)
        heard = dict.fromkeys(range(len(self._actors)), begin)
        while pending:
            self._look_at_nodes()
            ready, _ = ray.wait(list(pending), timeout=min(SLICE, self.timeout / 8))
            if not ready:
                self._listen(heard, pings, pending)
            for call in ready:
                rank = pending.pop(call)
                try:
                    answers[call] = ray.get(call)
                except RayError as error:
                    raise self._diagnosis({rank: error}, pending) from None
        return [answers[call] for call in order]

    def _listen(
        self, heard: dict[int, float], pings: dict[Any, int], pending: dict[Any, int]
    ) -> None:
        """Take the answers of actors that were asked whether they are alive, and ask again.

        Args:
            heard: per rank, when it answered last.
            pings: questions without an answer.
            pending: calls without an answer.
        """
        for ping in _answered(pings, 0.0):
            rank = pings.pop(ping)
            try:
                ray.get(ping)
            except RayError as error:
                raise self._diagnosis({rank: error}, pending) from None
            heard[rank] = max(heard[rank], time.monotonic())
        for rank in heard.keys() - pings.values():
            pings[self._actors[rank].alive.remote()] = rank
        if silent := [r for r, at in heard.items() if time.monotonic() - at > self.patience]:
            raise self._lost({}, silent)

    def _look_at_nodes(self) -> None:
        """Whether Ray still runs on each node; Ray itself would tell only after a quarter minute.

        An actor outlives the raylet of its node for a while, but nobody can look after it; and one
        that has not started yet cannot tell that its node is stopped.
        """
        elapsed = time.monotonic() - self._looked
        if elapsed < min(SLICE, self.timeout / 8):
            return
        self._looked = time.monotonic()
        answers = knock(self._raylets.values())
        dead: dict[int, str] = {}
        silent: list[int] = []
        for rank, node in enumerate(self._nodes):
            if answers[self._raylets[node]] is False:
                dead[rank] = "no Ray runs on its node any more"
            elif self._silence[node] > self.patience:
                silent.append(rank)
        for node, address in self._raylets.items():
            unheard = min(elapsed, 2 * SLICE)  # nobody listened while nothing was asked
            self._silence[node] = 0.0 if answers[address] else self._silence[node] + unheard
        if dead or silent:
            raise self._lost(dead, silent)

    def _lost(self, dead: Mapping[int, str], silent: Sequence[int] = ()) -> LostError:
        """Some actors died, how is told of each, and some did not say that they are alive."""
        ranks = sorted({*dead, *silent})
        self._suspects.update(self._nodes[rank] for rank in ranks if self._nodes)
        problems = [f"{self._who(rank)} died: {how}" for rank, how in list(dead.items())[:1]]
        if also := " and ".join(map(self._who, list(dead)[1:])):
            problems.append(f"so did {also}")
        if silent:
            who = " and ".join(map(self._who, silent))
            problems.append(f"{who} did not answer: its process is stopped, or its network is cut")
        lost = {i for rank in ranks for i in self.packing[rank % len(self.packing)]}
        return LostError("; ".join(problems), [self.job.topology.names[i] for i in sorted(lost)])

    def _diagnosis(self, failed: dict[int, RayError], pending: dict[Any, int]) -> HdnnError:
        """The cause of a failure, which the one who told of it first need not know.

        An actor that waits for one that is gone fails too. So the others are given a moment to tell
        their side, and those that say nothing are asked whether they are alive.
        """
        silent = set(range(len(self._actors)))
        for calls in (pending, {a.alive.remote(): rank for rank, a in enumerate(self._actors)}):
            for call in _answered(calls, self.grace):
                silent.discard(calls[call])
                try:
                    ray.get(call)
                except RayError as error:
                    failed.setdefault(calls[call], error)
        causes = {
            rank: error.cause for rank, error in failed.items() if isinstance(error, RayTaskError)
        }
        for cause in causes.values():
            if isinstance(cause, HdnnError) and not isinstance(cause, TransportError):
                return cause
        dead = {  # the actor, its worker or its node
            rank: _in_short(failure)
            for rank, failure in sorted(failed.items())
            if not isinstance(failure, RayTaskError)
        }
        if dead or silent:
            return self._lost(dead, sorted(silent - dead.keys()))
        for rank, failure in failed.items():
            if not isinstance(causes.get(rank), TransportError):
                return RunError(f"{self._who(rank)} failed:\n{failure}")
        rank, cause = next(iter(causes.items()))
        return TransportError(f"{self._who(rank)}: {cause}")

    def _who(self, rank: int) -> str:
        copy, k = divmod(rank, len(self.packing))
        names = ", ".join(self.job.topology.names[i] for i in self.packing[k])
        which = f" (copy {copy + 1})" if self.job.spec.cluster.replicas > 1 else ""
        node = f" on node {self._nodes[rank]}" if self._nodes else ""
        return f"the actor of agent{'s' * (len(self.packing[k]) > 1)} {names}{which}{node}"


def _answered(calls: Iterable[Any], timeout: float) -> list[Any]:
    """Those of some calls that are answered, all of them or as many as come in time."""
    waiting = list(calls)
    answered: list[Any] = []
    if waiting:
        answered, _ = ray.wait(waiting, num_returns=len(waiting), timeout=timeout)
    return answered


def _in_short(error: RayError) -> str:
    """The first and the last line of what Ray says, without colours."""
    said = re.sub(r"\x1b\[\d*m", "", str(error)).splitlines()
    lines = [line.strip().partition(" Some common causes")[0] for line in said if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _together(answers: Sequence[Sequence[StepResult]]) -> list[StepResult]:
    """Step by step, what actors with a part of the outputs know of it; the others say nothing."""
    return [whole(parts) for parts in zip(*filter(None, answers), strict=True)]


def _with_what_is_free(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nodes with what nobody holds now, in place of all they have; of cores, whole ones."""
    free = available_resources_per_node()
    return [
        node | {"Resources": {**left, "CPU": math.floor(left.get("CPU", 0.0))}}
        for node in nodes
        for left in [free.get(node["NodeID"], {})]
    ]


def _held(wanted: Sequence[Demand]) -> str:
    """What is free of all that actors ask for, on a cluster that could hold them."""
    there, free = ray.cluster_resources(), ray.available_resources()
    kinds = sorted({key for demand in wanted for key in demand.resources})
    amounts = (f"{free.get(key, 0):g} of {there.get(key, 0):g} {key}" for key in kinds)
    return (
        f"its resources are held by other jobs or split over its nodes; free: {', '.join(amounts)}"
    )
