"""Delivery of a plan's rounds: within a process, and between processes by torch.distributed.

A transport is given the messages that the agents of its process send in one round and returns
those that they receive. It sends and accepts nothing that the round does not list, nothing along a
link that the topology does not have, and counts every byte per pair of agents. A message that is
not the planned one, in sender, round, shape or dtype, is an error that names its sender.
"""

from __future__ import annotations

import math
import secrets
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hdnn_dist.errors import AgreementError, TransportError
from hdnn_dist.exchange import Message, Round
from hdnn_dist.node import Exchange, Request
from hdnn_dist.sparsity import BlockPattern

Result = TypeVar("Result")
Mail = dict[tuple[int, int], Tensor]

STAMP = 128  # bytes before and after the numbers of a message between processes; keeps them aligned
# Bytes by which a message may be too long before gloo ends the process that gets it.
SPARE = 1 << 20


class Transport(Protocol):
    """Delivers one round after the other."""

    names: tuple[str, ...]
    """The agents' names."""

    sent: Counter[tuple[int, int]]
    """Bytes sent so far, by (source, target)."""

    @property
    def waited(self) -> float:
        """Seconds so far in which nothing was left but to wait for other processes."""
        ...

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """Messages of this process's agents out, those for them in, both by (source, target)."""
        ...


def drive(
    agents: Mapping[int, Exchange[Result]],
    transport: Transport,
    batch: int,
    rounds: Iterable[Round],
) -> dict[int, Result]:
    """Run the generators of a process's agents through a plan's rounds; what each returns.

    In each round those that take part are resumed, and no others. The transport sees every round,
    so that all processes go through the same ones.

    Args:
        agents: a started-to-be generator per agent (see `hdnn_dist.node`).
        transport: carries the messages.
        batch: number of samples, which fixes the size of every message.
        rounds: the plan's, in order.

    Raises:
        AgreementError: an agent is in another round, or sends what the plan does not have.
        TransportError: another process is gone.
    """
    names = transport.names
    waiting: dict[int, Request] = {}
    results: dict[int, Result] = {}

    def resume(i: int, inbox: dict[int, Tensor] | None) -> None:
        try:
            # A generator is started by sending None.
            waiting[i] = agents[i].send(inbox)  # type: ignore[arg-type]
        except StopIteration as stop:
            results[i] = stop.value

    for i in agents:
        resume(i, None)
    for phase in rounds:
        few, many = sorted((agents.keys(), phase.agents), key=len)
        inboxes: dict[int, dict[int, Tensor]] = {i: {} for i in few if i in many}
        mail: Mail = {}
        for i in inboxes:
            if i in results:
                raise AgreementError(f"agent {names[i]} ended before round {phase.name}")
            wanted, outbox = waiting.pop(i)
            if wanted is not phase:
                raise AgreementError(
                    f"agent {names[i]} is in round {wanted.name}, where the plan has {phase.name}"
                )
            for target, tensor in outbox.items():
                mail[i, target] = tensor
        for (source, target), tensor in transport.exchange(phase, mail, batch).items():
            inboxes[target][source] = tensor
        for i, inbox in inboxes.items():
            resume(i, inbox)
    for i, (wanted, _) in waiting.items():
        raise AgreementError(f"agent {names[i]} is in round {wanted.name} at the plan's end")
    return {i: results[i] for i in agents}


class InProcess:
    """All agents share one process: a message is a reference.

    Args:
        links: the pattern `S`; `S[i, l] = 1` if a message may go from `l` to `i`.
        names: the agents' names, for messages of error.
        dtype: of everything that is sent.
    """

    def __init__(self, links: BlockPattern, names: Sequence[str], dtype: torch.dtype) -> None:
        self.links = frozenset((source, target) for target, source in links.entries)
        self.names, self.dtype = tuple(names), dtype
        self.sent: Counter[tuple[int, int]] = Counter()
        self.waited = 0.0

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`.

        Raises:
            AgreementError: an agent sends something else than the plan says.
        """
        self._check(phase, mail, phase.messages, phase.columns(batch))
        return mail

    def _check(self, phase: Round, mail: Mail, planned: Sequence[Message], columns: int) -> None:
        """Refuse mail that is not exactly what was planned, and count it."""
        for m in planned:
            link, shape = (m.source, m.target), (m.rows, columns)
            tensor = mail.get(link)
            if tensor is None or tensor.shape != shape or tensor.dtype != self.dtype:
                sent = "nothing" if tensor is None else _described(tensor.shape, tensor.dtype)
                raise self._refusal(phase, link, sent, _described(shape, self.dtype))
            if link not in self.links:
                raise self._refusal(phase, link, "a message", "no link")
            self.sent[link] += tensor.nbytes
        if len(mail) != len(planned):
            link = min(mail.keys() - {(m.source, m.target) for m in planned})
            raise self._refusal(phase, link, "a message", "none")

    def _refusal(
        self, phase: Round, link: tuple[int, int], sent: str, planned: str
    ) -> AgreementError:
        source, target = (
            repr(self.names[i]) if 0 <= i < len(self.names) else f"number {i}" for i in link
        )
        return AgreementError(
            f"round {phase.name}: agent {source} sends {sent} to agent {target}, where {planned} "
            "is planned"
        )


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


class PointToPoint(InProcess):
    """Agents are spread over the processes of the default torch.distributed group.

    What one process has for another in a round travels as one message, in the plan's order.
    Receives are posted before sends, so no order of processes can deadlock.

    gloo tells nobody how long a message was, leaves the rest of a buffer as it was if one is
    short, and ends the process if one is longer than the buffer. So a message is

        stamp | numbers | stamp

    where the stamp says job, how many rounds went before, round, shape, dtype and who sends to
    whom, and is received in a buffer with room to spare behind it.

    Args:
        links, names, dtype: as in `InProcess`.
        host: per agent, the rank of the process that hosts it.
        job: the digest of what all processes have agreed on.
    """

    def __init__(
        self,
        links: BlockPattern,
        names: Sequence[str],
        dtype: torch.dtype,
        host: Sequence[int],
        job: str,
    ) -> None:
        super().__init__(links, names, dtype)
        self.host, self.job = tuple(host), job[:12]
        self.rank = dist.get_rank()
        self._rounds = 0
        self._routes: dict[Round, _Route] = {}
        self._untouched = secrets.token_bytes(2 * STAMP)  # what no peer can guess

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`.

        Raises:
            AgreementError: an agent here, or a peer, sends something else than the plan says.
            TransportError: a peer is gone or did not answer within the group's timeout.
        """
        route = self._routes.get(phase)
        if route is None:
            route = self._routes[phase] = _Route(phase, self.host, self.rank)
        columns = phase.columns(batch)
        self._check(phase, mail, route.planned, columns)
        self._rounds += 1
        arrived = {link: mail[link] for link in route.local}
        if not route.peers:
            return arrived
        outbound, inbound = route.frames(columns, self.dtype)
        pending: list[tuple[int, dist.Work | None]] = []
        try:
            for rank, frame in inbound.items():
                peer = rank
                frame.view[frame.stop : frame.stop + 2 * STAMP] = self._untouched
                pending.append((peer, dist.irecv(frame.bytes, peer)))
            for rank, frame in outbound.items():
                peer = rank
                torch.cat([mail[m.source, m.target] for m in frame.messages], out=frame.numbers)
                frame.view[:STAMP] = frame.view[frame.stop :] = self._stamp(frame)
                pending.append((peer, dist.isend(frame.bytes, peer)))
            posted = time.perf_counter()
            for rank, work in pending:
                peer = rank
                if work is not None:
                    work.wait()
            self.waited += time.perf_counter() - posted
        except RuntimeError as error:
            raise TransportError(
                f"round {phase.name}: the process of agent(s) {self._hosted(peer)} did not answer: "
                f"{str(error).splitlines()[0]}"
            ) from error
        for peer, frame in inbound.items():
            self._open(frame, phase, peer)
            parts = frame.numbers.clone().split([m.rows for m in frame.messages])
            arrived.update(zip(((m.source, m.target) for m in frame.messages), parts, strict=True))
        return arrived

    def _stamp(self, frame: _Frame) -> bytes:
        return f"{self.job} {self._rounds} {frame.label}".encode().ljust(STAMP)[:STAMP]

    def _open(self, frame: _Frame, phase: Round, peer: int) -> None:
        """Refuse what came in a frame unless it is what was planned."""
        stop, planned = frame.stop, self._stamp(frame)
        stamp, end = bytes(frame.view[:STAMP]), bytes(frame.view[stop : stop + 2 * STAMP])
        if stamp == planned and end == planned + self._untouched[STAMP:]:
            return
        text = stamp.decode("ascii", "replace").rstrip()
        sent = repr(text) if text.isprintable() else "something that is no message"
        if stamp == planned:
            sent += " with fewer or more numbers than it says"
        raise AgreementError(
            f"round {phase.name}: the process of agent(s) {self._hosted(peer)} sent {sent}, where "
            f"{planned.decode().rstrip()!r} is planned (job, number of the round, round, shape, "
            "dtype, agents)"
        )

    def _hosted(self, peer: int) -> str:
        return ", ".join(n for n, rank in zip(self.names, self.host, strict=True) if rank == peer)


class Staged:
    """Agents here are on a device, and what they send to other processes goes by host memory.

    Args:
        inner: takes it there.
        device: where messages to agents here are put.
    """

    def __init__(self, inner: PointToPoint, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self.names, self.sent = inner.names, inner.sent
        self._here = {i for i, rank in enumerate(inner.host) if rank == inner.rank}

    @property
    def waited(self) -> float:
        """See `Transport`."""
        return self.inner.waited

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`."""
        staged = {
            link: tensor if link[1] in self._here else tensor.cpu() for link, tensor in mail.items()
        }
        arrived = self.inner.exchange(phase, staged, batch)
        return {link: tensor.to(self.device) for link, tensor in arrived.items()}


class _Frame:
    """Memory for the messages of a round from one process to another (see `PointToPoint`)."""

    def __init__(
        self, name: str, messages: Sequence[Message], columns: int, dtype: torch.dtype, spare: int
    ) -> None:
        self.messages = messages
        shape = sum(m.rows for m in messages), columns
        agents = zlib.crc32(repr([(m.source, m.target, m.rows) for m in messages]).encode())
        self.label = f"{name} {_described(shape, dtype)} {agents:08x}"
        self.stop = STAMP + math.prod(shape) * dtype.itemsize
        self.bytes = torch.empty(self.stop + STAMP + spare, dtype=torch.uint8)
        self.numbers = self.bytes[STAMP : self.stop].view(dtype).view(shape)
        self.view = self.bytes.numpy().data


class _Route:
    """A round as seen from one rank: what stays, what goes to which peer, what comes from it."""

    def __init__(self, phase: Round, host: tuple[int, ...], rank: int) -> None:
        self.name = phase.name
        self.planned = [m for m in phase.messages if host[m.source] == rank]
        self.local = [(m.source, m.target) for m in self.planned if host[m.target] == rank]
        self.sends: dict[int, list[Message]] = {}
        self.receives: dict[int, list[Message]] = {}
        for m in phase.messages:
            here, there = host[m.source], host[m.target]
            if here == rank != there:
                self.sends.setdefault(there, []).append(m)
            elif there == rank != here:
                self.receives.setdefault(here, []).append(m)
        self.peers = self.sends.keys() | self.receives.keys()
        self._frames: dict[int, tuple[dict[int, _Frame], dict[int, _Frame]]] = {}

    def frames(
        self, columns: int, dtype: torch.dtype
    ) -> tuple[dict[int, _Frame], dict[int, _Frame]]:
        """By peer, the memory to send from and to receive in, the same every time."""
        if columns not in self._frames:
            self._frames[columns] = (
                {r: _Frame(self.name, m, columns, dtype, 0) for r, m in self.sends.items()},
                {r: _Frame(self.name, m, columns, dtype, SPARE) for r, m in self.receives.items()},
            )
        return self._frames[columns]
