"""Delivery of a plan's rounds: within a process, and between processes over wires.

A transport is given the messages that the agents of its process send in one round and returns
those that they receive. It sends and accepts nothing that the round does not list, nothing along a
link that the topology does not have, and counts every byte per pair of agents. A message that is
not the planned one, in sender, round, shape or dtype, is an error that names its sender.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hdnn_dist.errors import AgreementError, TransportError
from hdnn_dist.exchange import Message, Round
from hdnn_dist.node import Exchange, Request
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.wires import STAMP, Frame, PeerError, Sockets, Wire

Result = TypeVar("Result")
Mail = dict[tuple[int, int], Tensor]


class Transport(Protocol):
    """Delivers one round after the other."""

    names: tuple[str, ...]
    """The agents' names."""

    border: frozenset[int]
    """The agents here whose messages to other processes may be posted ahead of a round."""

    @property
    def sent(self) -> Counter[tuple[int, int]]:
        """Bytes sent so far, by (source, target)."""
        ...

    @property
    def waited(self) -> float:
        """Seconds so far in which nothing was left but to wait for other processes."""
        ...

    @property
    def waited_for(self) -> dict[int, float]:
        """Seconds so far in which this process slept until another came, by the other's rank.

        Empty where there is no other, or where it is not known which.
        """
        ...

    def post(self, phase: Round, mail: Mail, batch: int) -> None:
        """Have what the border sends in a round on its way; its `exchange` comes next."""
        ...

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """Messages of this process's agents out, those for them in, both by (source, target).

        What came in is good until the next exchange.
        """
        ...


def drive(
    agents: Mapping[int, Exchange[Result]],
    transport: Transport,
    batch: int,
    rounds: Iterable[Round],
) -> dict[int, Result]:
    """Run the generators of a process's agents through a plan's rounds; what each returns.

    In each round those that take part are resumed, and no others. The transport sees every round,
    so that all processes go through the same ones. Agents with neighbours in other processes come
    first: their messages travel while the others compute.

    Args:
        agents: a started-to-be generator per agent (see `hdnn_dist.node`).
        transport: carries the messages.
        batch: number of samples, which fixes the size of every message.
        rounds: the plan's, in order.

    Raises:
        AgreementError: an agent is in another round, or sends what the plan does not have.
        TransportError: another process is gone.
    """
    names, border = transport.names, transport.border
    waiting: dict[int, Request] = {}
    results: dict[int, Result] = {}

    def resume(inboxes: Mapping[int, dict[int, Tensor] | None]) -> None:
        for i, inbox in inboxes.items():
            try:
                waiting[i] = agents[i].send(inbox)  # type: ignore[arg-type]
            except StopIteration as stop:
                results[i] = stop.value

    inboxes: dict[int, Any] = dict.fromkeys(agents)  # a generator is started by sending None
    for phase in rounds:
        if border:
            resume({i: inboxes.pop(i) for i in [*inboxes] if i in border})
            ready = ((i, waiting[i]) for i in border & waiting.keys())
            transport.post(
                phase,
                {(i, t): x for i, (r, out) in ready if r is phase for t, x in out.items()},
                batch,
            )
        resume(inboxes)
        few, many = sorted((agents.keys(), phase.agents), key=len)
        inboxes = {i: {} for i in few if i in many}
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
    resume(inboxes)
    for i, (wanted, _) in waiting.items():
        raise AgreementError(f"agent {names[i]} is in round {wanted.name} at the plan's end")
    return {i: results[i] for i in agents}


@dataclass(frozen=True)
class Agreement:
    """What all processes of a job take for granted of each other's messages.

    Attributes:
        links: the pattern `S`; `S[i, l] = 1` if a message may go from `l` to `i`.
        names: the agents' names, for messages of error.
        dtype: of everything that agents send and receive.
        per_sample: in which numbers travel of which there is one a sample. If it is narrower, they
            are rounded to it within a process too, so that numbers do not depend on who shares one.
        job: the digest of all that they have agreed on.
    """

    links: BlockPattern
    names: tuple[str, ...]
    dtype: torch.dtype
    per_sample: torch.dtype
    job: str


class InProcess:
    """All agents share one process: a message is a reference.

    Args:
        agreed: what their messages are like.
    """

    def __init__(self, agreed: Agreement) -> None:
        self.links = frozenset((source, target) for target, source in agreed.links.entries)
        self.names, self.dtype, self.per_sample = agreed.names, agreed.dtype, agreed.per_sample
        self._outgoing: dict[tuple[Round, int], _Outgoing] = {}
        self._besides: Counter[tuple[int, int]] = Counter()
        self.border: frozenset[int] = frozenset()
        self.waited = 0.0

    @property
    def sent(self) -> Counter[tuple[int, int]]:
        """See `Transport`."""
        total: Counter[tuple[int, int]] = Counter()
        for each in self._outgoing.values():
            total.update({link: each.times * size for link, size in each.bytes.items()})
        total.update(self._besides)
        return total

    @property
    def waited_for(self) -> dict[int, float]:
        """See `Transport`."""
        return {}

    def count(self, sent: Mapping[tuple[int, int], int]) -> None:
        """Take so many bytes for sent besides, by (source, target); fewer, if they are negative."""
        self._besides.update(sent)

    def post(self, phase: Round, mail: Mail, batch: int) -> None:
        """See `Transport`."""

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`.

        Raises:
            AgreementError: an agent sends something else than the plan says.
        """
        self._check(phase, mail, phase.messages, phase.columns(batch))
        return self._delivered(phase, mail)

    def travels_as(self, phase: Round) -> torch.dtype:
        """The type of the numbers of a round on their way."""
        return phase.travels_as(self.per_sample, self.dtype)

    def is_rounded(self, phase: Round) -> bool:
        """Whether that is another type than agents compute with."""
        return self.travels_as(phase) != self.dtype

    def _delivered(self, phase: Round, mail: Mail) -> Mail:
        """Mail that stays in this process, as it arrives."""
        if not self.is_rounded(phase):
            return mail
        narrow = self.travels_as(phase)
        sent = {id(tensor): tensor for tensor in mail.values()}  # one may go to several agents
        came = {key: tensor.to(narrow).to(self.dtype) for key, tensor in sent.items()}
        return {link: came[id(tensor)] for link, tensor in mail.items()}

    def _check(self, phase: Round, mail: Mail, planned: Sequence[Message], columns: int) -> None:
        """Refuse mail that is not exactly what was planned, and count it."""
        out = self._outgoing.get((phase, columns))
        if out is None:
            out = _Outgoing(planned, columns, self.travels_as(phase).itemsize)
            if astray := out.shapes.keys() - self.links:
                raise self._refusal(phase, min(astray), "a message", "no link")
            self._outgoing[phase, columns] = out
        out.times += 1
        if mail.keys() == out.shapes.keys() and all(
            tensor.shape == out.shapes[link] and tensor.dtype == self.dtype
            for link, tensor in mail.items()
        ):
            return
        for link, shape in out.shapes.items():
            tensor = mail.get(link)
            if tensor is None or tensor.shape != shape or tensor.dtype != self.dtype:
                sent = "nothing" if tensor is None else _described(tensor.shape, tensor.dtype)
                raise self._refusal(phase, link, sent, _described(shape, self.dtype))
        link = min(mail.keys() - out.shapes.keys())
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


class _Outgoing:
    """What the agents of a process send in a round.

    Attributes:
        shapes, bytes: by link.
        times: how often they have sent it.
    """

    def __init__(self, planned: Sequence[Message], columns: int, itemsize: int) -> None:
        self.shapes = {(m.source, m.target): torch.Size((m.rows, columns)) for m in planned}
        self.bytes = {link: shape.numel() * itemsize for link, shape in self.shapes.items()}
        self.times = 0


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


class Apart(InProcess):
    """Agents are spread over processes, which take the same rounds.

    Args:
        agreed: what their messages are like.
        host: per agent, the rank of the process that hosts it.
        rank: of this process.
    """

    def __init__(self, agreed: Agreement, host: Sequence[int], rank: int) -> None:
        super().__init__(agreed)
        self.host, self.job, self.rank = tuple(host), agreed.job[:12], rank
        self._rounds = 0

    def hosted(self, *peers: int) -> str:
        """The names of the agents of some peers."""
        return ", ".join(n for n, rank in zip(self.names, self.host, strict=True) if rank in peers)


class Sides:
    """A round as seen from one process.

    Attributes:
        planned: what the agents here send.
        local: the links of what stays here.
        sends, receives: what goes to other processes and comes from them, by rank.
    """

    def __init__(self, phase: Round, host: Sequence[int], rank: int) -> None:
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


class PointToPoint(Apart):
    """Agents are spread over processes, and messages go over wires.

    What one process has for another in a round travels as one message, in the plan's order, with a
    stamp at both ends: job, how many rounds went before, round, shape, dtype and who sends to whom.
    All is posted before anything is waited for, so that no order of processes can deadlock.

    Args:
        agreed, host, rank: as in `Apart`.
        far: the wire to the others.

    Attributes:
        near: the wire to those of the others that it has a socket to.
    """

    def __init__(self, agreed: Agreement, host: Sequence[int], rank: int, far: Wire) -> None:
        super().__init__(agreed, host, rank)
        self._far = far
        self.near: Sockets | None = None
        self._routes: dict[tuple[Round, int], _Route] = {}
        self._posted: _Route | None = None
        here = {i for i, at in enumerate(host) if at == rank}
        border = {
            i for link in self.links for i in link if (link[0] in here) != (link[1] in here)
        } & here
        if border != here:  # else nobody would compute meanwhile
            self.border = frozenset(border)

    @property
    def peers(self) -> list[int]:
        """The processes that have messages for this one, or may be sent some."""
        apart = {(self.host[a], self.host[b]) for a, b in self.links}
        return sorted({p for pair in apart if self.rank in pair for p in pair} - {self.rank})

    @property
    def waited_for(self) -> dict[int, float]:
        """See `Transport`."""
        wires: list[Wire] = [self._far, *([] if self.near is None else [self.near])]
        return {peer: seconds for wire in wires for peer, seconds in wire.waited.items()}

    def wire(self, peer: int) -> Wire:
        """What leads to a peer."""
        return self._far if self.near is None or peer not in self.near.peers else self.near

    def post(self, phase: Round, mail: Mail, batch: int) -> None:
        """See `Transport`. Mail that is not what was planned is left for `exchange` to refuse."""
        route = self._route(phase, phase.columns(batch))
        if all(
            (tensor := mail.get(link)) is not None
            and tensor.shape == shape
            and tensor.dtype == self.dtype
            for link, shape in route.shapes.items()
        ):
            with self._telling(phase):
                self._post(route, mail)

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`.

        Raises:
            AgreementError: an agent here, or a peer, sends something else than the plan says.
            TransportError: a peer is gone or did not answer in time.
        """
        route = self._route(phase, phase.columns(batch))
        self._check(phase, mail, route.planned, phase.columns(batch))
        with self._telling(phase):
            if self._posted is None:
                self._post(route, mail)
            posted = time.perf_counter()
            for wire, _, _ in route.wires:
                wire.wait()
            self.waited += time.perf_counter() - posted
        self._posted = None
        for peer, frame in route.receives.items():
            if not (frame.begun and frame.ended):
                raise self._misfit(frame, phase, peer)
        for narrow, wide in route.widened:
            wide.copy_(narrow)
        return self._delivered(phase, {link: mail[link] for link in route.local}) | route.arrivals

    def _route(self, phase: Round, columns: int) -> _Route:
        route = self._routes.get((phase, columns))
        if route is None:
            route = self._routes[phase, columns] = _Route(self, phase, columns)
        return route

    def _post(self, route: _Route, mail: Mail) -> None:
        self._rounds += 1
        this_time = f"{self.job} {self._rounds}"
        for links, frame in route.sends:
            torch.cat([mail[link] for link in links], out=frame.numbers)
            frame.seal(this_time)
        for frame in route.receives.values():
            frame.expect(this_time)
        for wire, outbound, inbound in route.wires:
            wire.post(outbound, inbound)
        self._posted = route

    @contextmanager
    def _telling(self, phase: Round) -> Iterator[None]:
        """Name the agents of a peer that is gone."""
        try:
            yield
        except PeerError as error:
            raise TransportError(
                f"round {phase.name}: the process of agent(s) {self.hosted(error.peer)} did not "
                f"answer: {error.problem}"
            ) from error

    def _misfit(self, frame: Frame, phase: Round, peer: int) -> AgreementError:
        """What came in a frame is not what was planned."""
        text = bytes(frame.view[:STAMP]).decode("ascii", "replace").rstrip()
        sent = repr(text) if text.isprintable() else "something that is no message"
        if frame.begun:
            sent += " with fewer or more numbers than it says"
        return AgreementError(
            f"round {phase.name}: the process of agent(s) {self.hosted(peer)} sent {sent}, where "
            f"{frame.stamp.decode().rstrip()!r} is planned (job, number of the round, round, "
            "shape, dtype, agents)"
        )


class Relay:
    """A transport that has another do what it does not do itself."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.names, self.border = inner.names, inner.border

    @property
    def sent(self) -> Counter[tuple[int, int]]:
        """See `Transport`; so too below."""
        return self.inner.sent

    @property
    def waited(self) -> float:  # noqa: D102
        return self.inner.waited

    @property
    def waited_for(self) -> dict[int, float]:  # noqa: D102
        return self.inner.waited_for

    def post(self, phase: Round, mail: Mail, batch: int) -> None:  # noqa: D102
        self.inner.post(phase, mail, batch)

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:  # noqa: D102
        return self.inner.exchange(phase, mail, batch)


class Staged(Relay):
    """Agents here are on a device, and what they send to other processes goes by host memory.

    Args:
        inner: takes it there.
        device: where messages to agents here are put.
    """

    inner: PointToPoint

    def __init__(self, inner: PointToPoint, device: torch.device) -> None:
        super().__init__(inner)
        self.device = device
        self.border = frozenset()
        self._here = {i for i, rank in enumerate(inner.host) if rank == inner.rank}

    def post(self, phase: Round, mail: Mail, batch: int) -> None:
        """See `Transport`."""

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`."""
        staged = {
            link: tensor if link[1] in self._here else tensor.cpu() for link, tensor in mail.items()
        }
        arrived = self.inner.exchange(phase, staged, batch)
        return {link: tensor.to(self.device) for link, tensor in arrived.items()}


class _Route:
    """A round as seen from one process, and the memory that it takes every time.

    Attributes:
        planned, local: as in `Sides`.
        shapes: of what goes to other processes, by link.
        sends: per peer, the links of what goes there, and the frame in which it does.
        receives: by peer, the frame in which it comes.
        arrivals: the numbers of those frames by link.
        widened: per frame whose numbers are narrower than those of agents, these and those.
        wires: the frames out and in by peer, for each wire.
    """

    def __init__(self, transport: PointToPoint, phase: Round, columns: int) -> None:
        sides, dtype = Sides(phase, transport.host, transport.rank), transport.travels_as(phase)
        self.planned, self.local = sides.planned, sides.local
        self.shapes = {
            (m.source, m.target): torch.Size((m.rows, columns))
            for messages in sides.sends.values()
            for m in messages
        }
        by_wire: dict[Wire, tuple[dict[int, Frame], dict[int, Frame]]] = {}
        self.sends: list[tuple[list[tuple[int, int]], Frame]] = []
        self.receives: dict[int, Frame] = {}
        self.arrivals: Mail = {}
        self.widened: list[tuple[Tensor, Tensor]] = []
        for peer, messages in sides.sends.items():
            frame = Frame(*_marks(phase, messages, columns, dtype))
            self.sends.append(([(m.source, m.target) for m in messages], frame))
            by_wire.setdefault(transport.wire(peer), ({}, {}))[0][peer] = frame
        for peer, messages in sides.receives.items():
            wire = transport.wire(peer)
            frame = self.receives[peer] = wire.inbox(*_marks(phase, messages, columns, dtype))
            by_wire.setdefault(wire, ({}, {}))[1][peer] = frame
            numbers = frame.numbers
            if dtype != transport.dtype:
                numbers = torch.empty_like(numbers, dtype=transport.dtype)
                self.widened.append((frame.numbers, numbers))
            parts = numbers.split([m.rows for m in messages])
            links = ((m.source, m.target) for m in messages)
            self.arrivals.update(zip(links, parts, strict=True))
        self.wires = [(wire, *frames) for wire, frames in by_wire.items()]


def _marks(
    phase: Round, messages: Sequence[Message], columns: int, dtype: torch.dtype
) -> tuple[str, tuple[int, int], torch.dtype]:
    """Label, shape and dtype of what goes from one process to another in a round."""
    shape = sum(m.rows for m in messages), columns
    agents = zlib.crc32(repr([(m.source, m.target, m.rows) for m in messages]).encode())
    return f"{phase.name} {_described(shape, dtype)} {agents:08x}", shape, dtype
