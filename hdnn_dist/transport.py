"""Delivery of a plan's rounds: within a process, and between processes by torch.distributed.

A transport is given the messages that the agents of its process send in one round and returns
those that they receive. It sends nothing that the round does not list, nothing along a link that
the topology does not have, and counts every byte per pair of agents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hdnn_dist.errors import TransportError
from hdnn_dist.exchange import Message, Round
from hdnn_dist.node import Exchange
from hdnn_dist.sparsity import BlockPattern

Result = TypeVar("Result")
Mail = dict[tuple[int, int], Tensor]


class Transport(Protocol):
    """Delivers one round after the other."""

    sent: Counter[tuple[int, int]]
    """Bytes sent so far, by (source, target)."""

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """Messages of this process's agents out, those for them in, both by (source, target)."""
        ...


def drive(
    agents: Mapping[int, Exchange[Result]], transport: Transport, batch: int
) -> dict[int, Result]:
    """Run the agents of a process in lockstep, round by round, and return what each returns.

    All agents run through the same rounds of one plan; who has nothing to send in a round
    takes part with an empty hand.

    Args:
        agents: a started-to-be generator per agent (see `hdnn_dist.node`).
        transport: carries the messages.
        batch: number of samples, which fixes the size of every message.
    """
    inboxes: dict[int, dict[int, Tensor] | None] = dict.fromkeys(agents)
    results: dict[int, Result] = {}
    while True:
        phase: Round | None = None
        mail: Mail = {}
        for i, agent in agents.items():
            try:
                # A generator is started by sending None.
                wanted, outbox = agent.send(inboxes[i])  # type: ignore[arg-type]
            except StopIteration as stop:
                results[i] = stop.value
                continue
            assert phase is None or phase is wanted, f"{i} is in {wanted.name}, not {phase}"
            phase = wanted
            for target, tensor in outbox.items():
                mail[i, target] = tensor
        if phase is None:
            return results
        assert not results, f"agents {list(results)} have ended before the others"
        inboxes = {i: {} for i in agents}
        for (source, target), tensor in transport.exchange(phase, mail, batch).items():
            box = inboxes[target]
            assert box is not None
            box[source] = tensor


class InProcess:
    """All agents share one process: a message is a reference.

    Args:
        links: the pattern `S`; `S[i, l] = 1` if a message may go from `l` to `i`.
    """

    def __init__(self, links: BlockPattern) -> None:
        self.links = frozenset((source, target) for target, source in links.entries)
        self.sent: Counter[tuple[int, int]] = Counter()

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`."""
        self._count(phase, mail, phase.messages, phase.columns(batch))
        return mail

    def _count(self, phase: Round, mail: Mail, expected: Sequence[Message], columns: int) -> None:
        assert len(mail) == len(expected), f"round {phase.name}: not the planned messages"
        for m in expected:
            link = m.source, m.target
            tensor = mail[link]
            assert link in self.links, f"round {phase.name}: {link} is not a link"
            assert tensor.shape == (m.rows, columns), f"{phase.name}: {link} sends {tensor.shape}"
            self.sent[link] += tensor.nbytes


class PointToPoint(InProcess):
    """Agents are spread over the processes of the default torch.distributed group.

    What one process has for another in a round travels as one message, in the plan's order.
    Receives are posted before sends, so no order of processes can deadlock.

    Args:
        links: as in `InProcess`.
        host: per agent, the rank of the process that hosts it.
        names: the agents' names, for messages of error.
        dtype: of everything that is sent.
    """

    def __init__(
        self, links: BlockPattern, host: Sequence[int], names: Sequence[str], dtype: torch.dtype
    ) -> None:
        super().__init__(links)
        self.host, self.names, self.dtype = tuple(host), tuple(names), dtype
        self.rank = dist.get_rank()
        self._routes: dict[Round, _Route] = {}

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`.

        Raises:
            TransportError: a peer is gone or did not answer within the group's timeout.
        """
        route = self._routes.get(phase)
        if route is None:
            route = self._routes[phase] = _Route(phase, self.host, self.rank)
        columns = phase.columns(batch)
        self._count(phase, mail, route.planned, columns)
        arrived = {link: mail[link] for link in route.local}
        if not route.peers:
            return arrived
        buffers = {
            peer: torch.empty(sum(m.rows for m in messages), columns, dtype=self.dtype)
            for peer, messages in route.receives.items()
        }
        pending: list[tuple[int, dist.Work | None]] = []
        try:
            for rank, buffer in buffers.items():
                peer = rank
                pending.append((peer, dist.irecv(buffer, peer)))
            for rank, messages in route.sends.items():
                peer = rank
                merged = torch.cat([mail[m.source, m.target] for m in messages])
                pending.append((peer, dist.isend(merged, peer)))
            for rank, work in pending:
                peer = rank
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            theirs = [n for n, rank in zip(self.names, self.host, strict=True) if rank == peer]
            raise TransportError(
                f"round {phase.name}: the process of agent(s) {', '.join(theirs)} did not answer: "
                f"{str(error).splitlines()[0]}"
            ) from error
        for peer, messages in route.receives.items():
            parts = buffers[peer].split([m.rows for m in messages])
            arrived.update(zip(((m.source, m.target) for m in messages), parts, strict=True))
        return arrived


class _Route:
    """A round as seen from one rank: what stays, what goes to which peer, what comes from it."""

    def __init__(self, phase: Round, host: tuple[int, ...], rank: int) -> None:
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
