"""Messages from GPU to GPU by NCCL, where every process has one of its own.

NCCL takes one process a GPU, and says as little of what came as gloo. So a message is
`stamp | numbers`, on the device, and the stamp, which says job, how many rounds went before, round,
shape, dtype and agents, is looked at by the host. Between processes that share a GPU, or have none,
messages go by host memory (`hdnn_dist.transport.Staged`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hdnn_dist.errors import AgreementError, TransportError
from hdnn_dist.exchange import Message, Round
from hdnn_dist.transport import Agreement, Apart, Mail, Sides
from hdnn_dist.wires import STAMP


class Direct(Apart):
    """Agents are spread over the processes of the default torch.distributed group, a device each.

    Args:
        agreed, host: as in `hdnn_dist.transport.Apart`.
        device: of this process.
    """

    def __init__(self, agreed: Agreement, host: Sequence[int], device: torch.device) -> None:
        super().__init__(agreed, host, dist.get_rank())
        self.device = device
        self._sides: dict[Round, Sides] = {}

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`. All messages of a round are one operation: none waits for another.

        Raises:
            AgreementError: an agent here, or a peer, sends something else than the plan says.
            TransportError: a peer is gone or did not answer within the group's timeout.
        """
        columns, dtype = phase.columns(batch), self.travels_as(phase)
        sides = self._sides.get(phase)
        if sides is None:
            sides = self._sides[phase] = Sides(phase, self.host, self.rank)
        sends, receives = sides.sends, sides.receives
        self._check(phase, mail, sides.planned, columns)
        self._rounds += 1
        arrived = self._delivered(phase, {link: mail[link] for link in sides.local})
        if not sends and not receives:
            return arrived
        frames = {peer: self._room(messages, columns, dtype) for peer, messages in receives.items()}
        operations = [dist.P2POp(dist.irecv, frame, peer) for peer, frame in frames.items()]
        for peer, messages in sends.items():
            frame = self._room(messages, columns, dtype)
            frame[:STAMP].copy_(self._stamp(phase, messages, columns, dtype))
            numbers = [mail[m.source, m.target] for m in messages]
            torch.cat(numbers, out=_numbers(frame, columns, dtype))
            operations.append(dist.P2POp(dist.isend, frame, peer))
        posted = time.perf_counter()
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            stamps = {peer: frame[:STAMP].cpu() for peer, frame in frames.items()}
        except RuntimeError as error:
            peers = {operation.peer for operation in operations}
            raise TransportError(
                f"round {phase.name}: a process of agent(s) {self.hosted(*peers)} did not answer: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.waited += time.perf_counter() - posted
        for peer, messages in receives.items():
            wanted = self._stamp(phase, messages, columns, dtype)
            if not torch.equal(stamps[peer], wanted):
                raise AgreementError(
                    f"round {phase.name}: the process of agent(s) {self.hosted(peer)} sent "
                    f"{_text(stamps[peer])!r}, where {_text(wanted)!r} is planned (job, number of "
                    "the round, round, shape, dtype, agents)"
                )
            came = _numbers(frames[peer], columns, dtype).to(self.dtype)
            parts = came.split([m.rows for m in messages])
            arrived |= {(m.source, m.target): x for m, x in zip(messages, parts, strict=True)}
        return arrived

    def _room(self, messages: Sequence[Message], columns: int, dtype: torch.dtype) -> Tensor:
        size = STAMP + sum(m.rows for m in messages) * columns * dtype.itemsize
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _stamp(
        self, phase: Round, messages: Sequence[Message], columns: int, dtype: torch.dtype
    ) -> Tensor:
        shape = f"{sum(m.rows for m in messages)}x{columns} {str(dtype).split('.')[1]}"
        agents = ",".join(f"{m.source}-{m.target}" for m in messages)
        text = f"{self.job} {self._rounds} {phase.name} {shape} {agents}"
        return torch.frombuffer(bytearray(text.encode().ljust(STAMP)[:STAMP]), dtype=torch.uint8)


def _numbers(frame: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return frame[STAMP:].view(dtype).view(-1, columns)


def _text(stamp: Tensor) -> str:
    return bytes(stamp.tolist()).decode("ascii", "replace").rstrip()
