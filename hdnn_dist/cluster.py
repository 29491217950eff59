"""Ray: the control plane. It places actors, tells them what to do and watches over them.

No message of a layer passes through Ray: the actors form a torch.distributed group among
themselves, and `hdnn_dist.transport` carries the rounds. Only this module and `submission` import
ray.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import operator
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import ray
import torch
import torch.distributed as dist
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

from hdnn_dist.agent import Evaluation, Fault, StepResult
from hdnn_dist.analysis import Sums
from hdnn_dist.checkpoint import Manifest
from hdnn_dist.data import Part, ensure_available
from hdnn_dist.direct import Direct
from hdnn_dist.errors import (
    AgreementError,
    HdnnError,
    LostError,
    PlacementError,
    RunError,
    TransportError,
)
from hdnn_dist.job import Job
from hdnn_dist.placement import Demand, Node, Packing, address_of, assign, demands, hosts, pack
from hdnn_dist.replicas import Replicas
from hdnn_dist.spec import Spec
from hdnn_dist.storage import Place
from hdnn_dist.transport import InProcess, PointToPoint, Staged, Transport
from hdnn_dist.wires import Gloo, PeerError, Sockets, connect
from hdnn_dist.worker import PARTS, Times, Worker, device_of

SLICE = 2.0  # seconds between two looks: at what the cluster has, at who is still alive
GRACE = 3.0  # seconds that actors are given to tell their side of a failure, at most
KNOCK = 0.5  # seconds until a node that does not answer a knock is passed over
START = 60.0  # seconds that a process is given to start, torch and all, before it is taken for lost
CONNECT_TIMEOUT = 5.0  # seconds until a cluster that does not answer is taken to be away
TLS = "GLOO_DEVICE_TRANSPORT"  # the start of the names of gloo's own settings

log = logging.getLogger("hdnn_dist")


class AgentActor:
    """A Ray actor that hosts one agent, or several. Its methods mirror those of `Worker`."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._store: dist.TCPStore | None = None
        self._replicas = Replicas()
        self._timeout = 0.0
        self._near: Sockets | None = None
        self._meetings = 0  # in this group
        self._direct = False

    @ray.method(concurrency_group="health")
    def alive(self) -> None:
        """Answer, even while another method is blocked in a round."""

    def open_store(self, timeout: float) -> tuple[str, int]:
        """Open the store at which the group meets, on a port that is free; rank 0 alone."""
        address = ray.util.get_node_ip_address()
        listener = socket.create_server((address, 0))  # the store's own would hear all interfaces
        port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout),
            master_listen_fd=listener.detach(),
        )
        return address, port

    def gpu(self) -> str | None:
        """What tells the GPU here from all others; None if there is none that torch can use."""
        return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else None

    def join(
        self,
        meeting: tuple[str, int],
        rank: int,
        size: int,
        timeout: float,
        copies: int = 1,
        direct: bool = False,
    ) -> None:
        """Become `rank` of a torch.distributed group of `size`; leave the one before, if any.

        Args:
            meeting: where the group meets.
            rank: of this process.
            size: of the group.
            timeout: of its operations, in seconds.
            copies: of the agents; the ranks of each follow those of the one before.
            direct: whether every rank has a GPU of its own, between which NCCL carries messages.
        """
        self.leave()
        limit = datetime.timedelta(seconds=timeout)
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            os.environ["GLOO_SOCKET_IFNAME"] = _interface(ray.util.get_node_ip_address())
        # Connect to neighbours alone, not to everybody; gloo's TLS cannot do that.
        os.environ["TORCH_GLOO_LAZY_INIT"] = "0" if os.environ.get(TLS) == "TCP_TLS" else "1"
        self._timeout, self._meetings = timeout, 0
        if rank != 0:
            self._store = dist.TCPStore(*meeting, timeout=limit)
        backend = "cpu:gloo,cuda:nccl" if direct else "gloo"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={os.environ['GLOO_SOCKET_IFNAME']}")
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an error, and not the end of the process
        try:
            dist.init_process_group(
                backend, store=self._store, rank=rank, world_size=size, timeout=limit
            )
        except RuntimeError as error:
            if "unsupported gloo device" not in str(error):
                raise
            raise PlacementError(
                f"{TLS}={os.environ.get(TLS)}, but the torch {torch.__version__} of "
                f"{socket.gethostname()} is built without that transport",
                f"unset {TLS} and encrypt the links with WireGuard (deploy/wireguard), or install "
                "a torch whose gloo was built with TLS",
            ) from None
        self._direct, device = direct, torch.device("cuda" if direct else "cpu")
        if direct:  # messages may only follow upon something that all ranks take part in
            dist.all_reduce(torch.zeros(1, device=device))
        if copies > 1:
            actors = size // copies
            group = dist.new_group(
                range(rank % actors, size, actors), limit, use_local_synchronization=True
            )
            self._replicas = Replicas(rank // actors, copies, group, device)

    def leave(self) -> None:
        """Leave the group."""
        self._replicas = Replicas()
        self._hang_up()
        if dist.is_initialized():
            dist.destroy_process_group()

    def host(
        self, spec: Spec, agents: Sequence[int], packing: Packing, absent: Sequence[str] = ()
    ) -> str:
        """Take on some agents of a job, and return the digest of the job as this actor sees it."""
        torch.set_num_threads(spec.cluster.threads or 1)
        job = Job.of(spec).without(absent)
        common = job.architecture.patterns.S, job.topology.names, job.dtype, job.message_dtype
        first = self._replicas.copy * len(packing)  # rank of this copy of the agents
        device = device_of(job, agents)
        transport: Transport = InProcess(*common)
        if len(packing) > 1:
            ranks = [first + rank for rank in hosts(packing)]
            if self._direct:
                transport = Direct(*common, ranks, job.digest, device)
            else:
                wired = PointToPoint(*common, ranks, job.digest, dist.get_rank(), Gloo())
                transport = wired if device.type == "cpu" else Staged(wired, device)
        self._worker = Worker(job, agents, transport, self._replicas, device)
        self._worker.load_data()
        return job.digest

    def connect(self) -> None:
        """Open sockets to the actors on this machine that host neighbours of the agents here.

        Raises:
            TransportError: one that should do the same does not.
        """
        self._hang_up()
        transport = self.worker.transport
        if isinstance(transport, Staged):
            transport = transport.inner
        if not isinstance(transport, PointToPoint):  # a copy in one process, or GPUs apart
            return
        assert self._store is not None
        self._meetings += 1
        meeting = f"meeting {self._meetings}"
        try:
            near = connect(self._store, meeting, transport.rank, transport.peers, START)
        except PeerError as error:
            raise TransportError(
                f"the process of agent(s) {transport.hosted(error.peer)} did not connect: "
                f"{error.problem}"
            ) from error
        self._near = transport.near = Sockets(near, self._timeout)

    def _hang_up(self) -> None:
        if self._near is not None:
            self._near.close()
            self._near = None

    @property
    def worker(self) -> Worker:
        """The agents here."""
        assert self._worker is not None, "host() comes first"
        return self._worker

    def prepare(self, spec: Spec) -> None:
        """Have the data set on this node."""
        ensure_available(spec.data, progress=False)

    def train(self, steps: int) -> list[StepResult]:
        """See `Worker`; so too below."""
        return self.worker.train(steps)

    def faults(self) -> list[Fault]:  # noqa: D102
        return self.worker.faults()

    def evaluate(self, part: Part) -> Evaluation | None:  # noqa: D102
        return self.worker.evaluate(part)

    def predict(self, source: str) -> np.ndarray | None:  # noqa: D102
        return self.worker.predict(source)

    def times(self) -> Times:  # noqa: D102
        return self.worker.times()

    def gradient_squares(self) -> Tensor:  # noqa: D102
        return self.worker.gradient_squares()

    def sensitivities(self, samples: int, V: Tensor) -> Sums:  # noqa: D102
        return self.worker.sensitivities(samples, V)

    def save(self, folder: Place) -> dict[str, str]:  # noqa: D102
        return self.worker.save(folder)

    def load(self, folder: Place, manifest: Manifest) -> None:  # noqa: D102
        self.worker.load(folder, manifest)

    def sent(self) -> Counter[tuple[int, int]]:
        """Bytes sent by the agents here."""
        return self.worker.transport.sent

    def time_rounds(self, columns: int, rounds: int) -> float:
        """Seconds of one round that brings the states of a batch of `columns`, of so many."""
        phase, dtype = self.worker.job.plan.states[0], self.worker.job.dtype
        mail = {
            (m.source, m.target): torch.zeros(m.rows, columns, dtype=dtype)
            for i in self.worker.agents
            for m in phase.outbound.get(i, ())
        }
        start = time.perf_counter()
        for _ in range(rounds):
            self.worker.transport.exchange(phase, mail, columns)
        return (time.perf_counter() - start) / rounds


def actor_class(cls: type[AgentActor]) -> Any:
    """The Ray class of an actor: one thread for its work, one to say that it is alive."""
    remote: Any = ray.remote  # its stubs do not know of concurrency groups
    return remote(concurrency_groups={"health": 1})(cls)


def _interface(address: str) -> str:
    """The name of the network interface that has an address, so that gloo binds to it alone."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    raise RunError(f"no network interface of {socket.gethostname()} has the address {address}")


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
        # Actors that fail because another one did are asked about it, not reported one by one.
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
        try:
            if self._own_ray:
                _start(address_of(job.spec.cluster, address))
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
        the agents are packed anew.
        """
        deadline, there = time.monotonic() + self.timeout, set[str]()
        while True:
            left = deadline - time.monotonic()
            if left < self.timeout / 2 and self._suspects:  # the others are held by somebody
                self._suspects.clear()
                there = set()
            nodes = [node for node in ray.nodes() if node["Alive"]]
            if there != (now := {node["NodeID"] for node in nodes}):
                there, wanted = now, self._reserve(nodes)
            assert self._group is not None
            if self._group.wait(max(0.0, min(SLICE, left))):
                break
            if left <= 0:
                raise PlacementError(
                    _shortage(wanted, self.timeout),
                    "give the job fewer or smaller "
                    "agents or fewer cluster.replicas, pack them (cluster.agents_per_actor: "
                    "auto), or add machines",
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

    def _reserve(self, nodes: Sequence[dict[str, Any]]) -> Sequence[Demand]:
        """Ask Ray for the bundles, in place of those asked for before; what they are to hold.

        Ray takes a minute to see that a machine is cut off, and until then would place actors
        there: machines that lost some are left out where the others have room.
        """
        if self._group is not None:
            remove_placement_group(self._group)
        trusted = [n for n in nodes if not any(n["NodeID"][:8] in s for s in self._suspects)]
        if not self._fits(trusted):
            trusted = list(nodes)
        shunned = [node["NodeID"] for node in nodes if node not in trusted]
        away = {"ray.io/node-id": f"!in({','.join(shunned)})"} if shunned else {}
        self.packing, wanted = self._wanted(trusted)
        self._group = placement_group(
            # Ray refuses empty bundles: a hair of a core stands for "nothing in particular".
            [demand.resources or {"CPU": 1e-4} for demand in wanted],
            strategy=self.job.spec.cluster.placement.upper(),
            bundle_label_selector=[demand.labels | away for demand in wanted],
        )
        return wanted

    def _wanted(self, nodes: Sequence[dict[str, Any]]) -> tuple[Packing, Sequence[Demand]]:
        """Who shares an actor on these machines, in each copy, and what all actors ask for."""
        cores = sum(node["Resources"].get("CPU", 0) for node in nodes)
        copies = self.job.spec.cluster.replicas
        packing = pack(self.job.topology, self.job.spec.cluster, int(cores) // copies)
        return packing, demands(self.job.topology, packing * copies, cores)

    def _fits(self, nodes: Sequence[dict[str, Any]]) -> bool:
        """Whether these machines could hold the actors, if nobody else used them."""
        _, wanted = self._wanted(nodes)
        return None not in assign(wanted, [_node(node) for node in nodes])

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
        answers = self._all("train", steps)[: len(self.packing)]  # the same in all copies
        return [result for results in answers for result in results]

    def faults(self) -> list[Fault]:  # noqa: D102
        return [fault for faults in self._all("faults") for fault in faults]

    def evaluate(self, part: Part = "test") -> Evaluation:  # noqa: D102
        answers = self._all("evaluate", part)[: len(self.packing)]  # the same in all copies
        evaluation: Evaluation = _only(answers)
        return evaluation

    def predict(self, source: str | os.PathLike[str]) -> np.ndarray:  # noqa: D102
        if source not in PARTS:  # actors work elsewhere
            source = os.path.abspath(source)
        shares = [share for share in self._all("predict", source) if share is not None]
        return np.concatenate(shares)

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
        answers = _knock(self._raylets.values())
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


def _channel(address: str) -> grpc.Channel:
    """To one of Ray's servers, past any proxy."""
    return grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])


def _knock(addresses: Iterable[str]) -> dict[str, bool | None]:
    """Whether a raylet answers at each address; False if nobody is there, None if it is silent."""
    with contextlib.ExitStack() as stack:
        calls = {}
        for address in set(addresses):
            ask = stack.enter_context(_channel(address)).unary_unary("/grpc.health.v1.Health/Check")
            calls[address] = ask.future(b"", timeout=KNOCK)
        return {address: _is_there(address, call.code()) for address, call in calls.items()}


def _is_there(address: str, answer: grpc.StatusCode) -> bool | None:
    if answer is grpc.StatusCode.DEADLINE_EXCEEDED:
        return None
    if answer is grpc.StatusCode.UNAVAILABLE:  # gone, or it speaks TLS
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return None
    return True  # be it a refusal


def _answered(calls: Iterable[Any], timeout: float) -> list[Any]:
    """Those of some calls that are answered, all of them or as many as come in time."""
    waiting = list(calls)
    answered: list[Any] = []
    if waiting:
        answered, _ = ray.wait(waiting, num_returns=len(waiting), timeout=timeout)
    return answered


def cluster_nodes(address: str) -> list[Node]:
    """The machines of a running cluster, which is joined to ask and left again.

    Raises:
        PlacementError: no cluster answers.
    """
    joined = ray.is_initialized()
    if not joined:
        _start(address)
    try:
        return [_node(node) for node in ray.nodes() if node["Alive"]]
    finally:
        if not joined:
            ray.shutdown()


def _node(node: dict[str, Any]) -> Node:
    """A machine as Ray tells of it."""
    # Ray also lists its own marks, such as node:10.0.0.1, as resources.
    resources = {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU") or _custom(k)}
    return Node(node["NodeName"], resources, node["Labels"])


def _custom(resource: str) -> bool:
    """Whether a resource is one that the cluster's owner declared."""
    return resource not in ("memory", "object_store_memory") and ":" not in resource


def _start(address: str | None) -> None:
    """Join a Ray cluster, or start one on this machine."""
    # A cluster's workers do not see the driver's environment.
    folder = os.environ.get("HDNN_DATA")
    variables = {"HDNN_DATA": os.path.abspath(os.path.expanduser(folder))} if folder else {}
    variables |= {name: value for name, value in os.environ.items() if name.startswith(TLS)}
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": variables} if variables else None,
    }
    if address is None:
        with _interrupt_held():
            ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        host, _, port = address.partition(":")
        if port.isdecimal():  # ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
            _authenticate(address)
        with _interrupt_held():
            ray.init(address=address, **quiet)
    except PlacementError:
        raise
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]})",
            "start one with `ray start --head`; see deploy/README.md if it asks for a token; or "
            "leave --address out to run on this machine",
        ) from None


def _authenticate(address: str) -> None:
    """Have Ray show its token to a cluster that asks for one, and to no other.

    Ray itself does so only for a cluster that it finds or starts on this machine; given the address
    of one, a wrong guess ends in half a minute of retries, or in actors that die unseen.

    Raises:
        PlacementError: the cluster asks for a token and does not get its own, or for none and
            would get one.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled") or (open_to_all := _admits(address)) is None:
        return
    if open_to_all:
        if mode == "token":
            raise PlacementError(
                f"the Ray cluster at {address!r} asks for no token, but RAY_AUTH_MODE is token",
                "set RAY_AUTH_MODE=disabled to join it, or have it ask for one (deploy/README.md)",
            )
        log.warning(
            "the Ray cluster at %s asks for no token: who can reach it can run code there; "
            "see deploy/README.md",
            address,
        )
        return
    asks = f"the Ray cluster at {address!r} asks for a token"
    if mode == "disabled":
        raise PlacementError(f"{asks}, but RAY_AUTH_MODE is disabled", "leave RAY_AUTH_MODE unset")
    place, shown = token()
    if not shown:
        raise PlacementError(
            f"{asks}, and there is none in {place}",
            "put there what `ray get-auth-token` prints on the cluster's head",
        )
    if not _admits(address, shown):
        raise PlacementError(
            f"{asks}, and refuses that of {place}",
            "put there what `ray get-auth-token` prints on the cluster's head",
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    raylet: Any = ray._raylet
    raylet.Config.initialize("")  # Ray read its environment when it was imported


def token() -> tuple[str, str]:
    """Where Ray looks for its token on this machine, and what is there."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return "$RAY_AUTH_TOKEN", given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return str(file), file.read_text().strip() if file.is_file() else ""


def _admits(address: str, token: str | None = None) -> bool | None:
    """Whether a Ray cluster lets in who shows this token, or none; None if it cannot be told."""
    with _channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        shown = [("authorization", f"Bearer {token}")] if token else None
        try:
            ask(b"", timeout=CONNECT_TIMEOUT, metadata=shown)
        except grpc.RpcError as error:
            return False if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return True


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C is obeyed after the block: amid the start of Ray it would crash the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def _in_short(error: RayError) -> str:
    """The first and the last line of what Ray says, without colours."""
    said = re.sub(r"\x1b\[\d*m", "", str(error)).splitlines()
    lines = [line.strip().partition(" Some common causes")[0] for line in said if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _shortage(wanted: Sequence[Demand], waited: float) -> str:
    """What the cluster lacks for the actors."""
    there = ray.cluster_resources()
    total: Counter[str] = Counter()
    for demand in wanted:
        total.update(demand.resources)
    lacking = [
        f"{amount:g} {key} asked for, {there.get(key, 0):g} there"
        for key, amount in total.items()
        if amount > there.get(key, 0)
    ]
    if not there.get("CPU"):
        lacking.append("no machine with a core")
    labels = {f"{k}={v}" for demand in wanted for k, v in demand.labels.items()}
    if labels:
        lacking.append(f"nodes labelled {', '.join(sorted(labels))}")
    missing = "; ".join(lacking) or "its resources are held by other jobs or split over its nodes"
    return f"the cluster could not hold {len(wanted)} actors within {waited:g} s: {missing}"


def _only(answers: Sequence[Any]) -> Any:
    """The answer of the actor that hosts the root; the others have none."""
    [answer] = [answer for answer in answers if answer is not None]
    return answer
