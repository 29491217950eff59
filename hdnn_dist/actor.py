"""The Ray actor that hosts agents, and the torch.distributed group that it is part of."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from hdnn_dist.agent import Evaluation, Fault, StepResult
from hdnn_dist.analysis import Sums
from hdnn_dist.checkpoint import Manifest
from hdnn_dist.data import Part, ensure_available
from hdnn_dist.direct import Direct
from hdnn_dist.errors import PlacementError, RunError, TransportError, few
from hdnn_dist.gauges import ActorCounters
from hdnn_dist.job import Job
from hdnn_dist.joining import TLS
from hdnn_dist.logs import configure
from hdnn_dist.placement import Packing, hosts
from hdnn_dist.replicas import Replicas
from hdnn_dist.spec import Spec
from hdnn_dist.storage import Place
from hdnn_dist.trace import Track, clock
from hdnn_dist.transport import InProcess, PointToPoint, Staged, Transport
from hdnn_dist.wires import Gloo, PeerError, Sockets, connect
from hdnn_dist.worker import Times, Worker, agreement_of, device_of

log = logging.getLogger("hdnn_dist")
START = 60.0  # seconds that a process is given to start, torch and all, before it is taken for lost


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
        self._counters: ActorCounters | None = None

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
        agreed, device = agreement_of(job), device_of(job, agents)
        first = self._replicas.copy * len(packing)  # rank of this copy of the agents
        transport: Transport = InProcess(agreed)
        if len(packing) > 1:
            ranks = [first + rank for rank in hosts(packing)]
            if self._direct:
                transport = Direct(agreed, ranks, device)
            else:
                wired = PointToPoint(agreed, ranks, dist.get_rank(), Gloo())
                transport = wired if device.type == "cpu" else Staged(wired, device)
        self._worker = Worker(job, agents, transport, self._replicas, device)
        self._worker.load_data()
        self._counters = ActorCounters(job.topology.name, job.topology.names, agents)
        node = f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"
        names = [job.topology.names[i] for i in agents]
        configure(spec.cluster.logs, node=node, agents=names, copy=self._replicas.copy)
        log.info("hosts its agents on %s", device, extra={"step": 0, "job": job.digest[:12]})
        return job.digest

    def connect(self) -> None:
        """Open sockets to the actors on this machine that host neighbours of the agents here.

        Raises:
            TransportError: one that should do the same does not.
        """
        self._hang_up()
        if (transport := self._wired) is None:
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

    @property
    def _wired(self) -> PointToPoint | None:
        """What talks to other processes over wires; None for a copy in one, or GPUs apart."""
        transport = self.worker.transport
        if isinstance(transport, Staged):
            transport = transport.inner
        return transport if isinstance(transport, PointToPoint) else None

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
        results = self.worker.train(steps)
        self._record()
        return results

    def profile(self, steps: int) -> tuple[list[StepResult], Track]:  # noqa: D102
        return self.worker.profile(steps)

    def clock(self) -> tuple[str, float]:
        """See `hdnn_dist.trace`."""
        return clock()

    def _record(self) -> None:
        """Have Ray know what was sent and for whom was waited, now and then."""
        if self._counters is None or not self._counters.due:
            return
        waited = {"other copies": self._replicas.waited}
        if (wired := self._wired) is not None:
            for peer, seconds in wired.waited_for.items():
                waited[few(wired.hosted(peer).split(", "))] = seconds
        sent = self.worker.transport.sent
        self._counters.record(sent, waited)
        figures = {"sent_bytes": sent.total(), "waited_seconds": round(sum(waited.values()), 3)}
        log.info("steps taken", extra={"step": self.worker.step, **figures})

    def faults(self) -> list[Fault]:  # noqa: D102
        found = self.worker.faults()
        for fault in found:
            log.warning(str(fault), extra={"step": fault.step, "agents": [fault.agent]})
        return found

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
        saved = self.worker.save(folder)
        log.info("saved %s", folder, extra={"step": self.worker.step})
        return saved

    def load(self, folder: Place, manifest: Manifest) -> None:  # noqa: D102
        self.worker.load(folder, manifest)
        log.info("loaded %s", folder, extra={"step": self.worker.step})

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
