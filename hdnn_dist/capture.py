"""Forward and backward of all agents of a process as one CUDA graph.

An agent's step is hundreds of small operations, whose launch takes longer than they do. As their
shapes are the same in every step, they are recorded once, and from then on launched all at once, on
inputs in the same memory. An agent's operations wait for the messages that it is sent, later for
those who read its own, and for no others, so that agents compute side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hdnn_dist.agent import Agent
from hdnn_dist.exchange import Round
from hdnn_dist.node import Exchange
from hdnn_dist.transport import InProcess, Mail, Relay, drive

Action = Callable[[], None]
WARM_UP = 3  # runs before the recording, in which libraries set themselves up


def cuda_graph(action: Action) -> Action:
    """Record what an action launches; calling what is returned launches it again.

    Raises:
        RuntimeError: the action does something that cannot be recorded, such as to wait.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


class Captured:
    """`Agent.differentiate` of all agents of a job at once.

    Args:
        agents: all of them.
        transport: theirs.
        rounds: of the plan, from inputs to gradients.
        step: whose batch is recorded with.
        record: makes an action that does the same again of one.
        side_by_side: whether agents on a GPU compute at the same time.

    Raises:
        RuntimeError: see `cuda_graph`.
    """

    def __init__(
        self,
        agents: Mapping[int, Agent],
        transport: InProcess,
        rounds: Sequence[Round],
        step: int,
        record: Callable[[Action], Action] = cuda_graph,
        *,
        side_by_side: bool = True,
    ) -> None:
        self._agents, self._transport, self._rounds = agents, transport, rounds
        device = next(iter(agents.values())).device
        self._side_by_side = side_by_side and device.type == "cuda"
        self._next = step, self._draw(step)
        self._batches = {i: [x.to(device) for x in own] for i, own in self._next[1].items()}
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        before = transport.sent
        try:
            self._run()
            self._sent = transport.sent - before  # of a step
            self._replay = record(self._run)
        finally:
            transport.count({link: before[link] - n for link, n in transport.sent.items()})

    def _draw(self, step: int) -> dict[int, list[Tensor]]:
        return {i: agent.draw(step) for i, agent in self._agents.items()}

    def _run(self) -> None:
        actions = {i: a.propagate(*self._batches[i]) for i, a in self._agents.items()}
        samples = next(iter(self._batches.values()))[0].shape[1]
        if self._side_by_side:
            streams = _Streams(self._transport, actions)
            try:
                drive(streams.actions, streams, samples, self._rounds)
            finally:  # what takes the step in its place is not to overtake it
                streams.join()
        else:
            drive(actions, self._transport, samples, self._rounds)
        finite = torch.stack([agent.node.finite() for agent in self._agents.values()])
        self._finite.copy_(finite.all())

    def differentiate(self, step: int) -> bool:
        """Do it on the batch of a step.

        Returns:
            Whether all states are finite. If not, it is to be done by `Agent.differentiate`, which
            finds the first.
        """
        drawn, batches = self._next
        if drawn != step:
            batches = self._draw(step)
        for i, own in self._batches.items():
            for old, new in zip(own, batches[i], strict=True):
                old.copy_(new)
        self._replay()
        self._next = step + 1, self._draw(step + 1)  # while the device computes
        if not self._finite:
            return False
        self._transport.count(self._sent)
        return True


class _Streams(Relay):
    """A stream for each agent, which waits for that of another where a message comes from it.

    The transport of its own actions. Memory comes from the stream that asks for it and may be used
    there anew as soon as nobody refers to it: so messages are held until that stream waits for
    those who have read them.

    Args:
        inner: brings the messages.
        actions: of the agents.

    Attributes:
        actions: the same, each on its agent's stream.
    """

    inner: InProcess

    def __init__(self, inner: InProcess, actions: Mapping[int, Exchange[None]]) -> None:
        super().__init__(inner)
        self._all = torch.cuda.current_stream()
        begun = self._all.record_event()
        self._own = {i: torch.cuda.Stream() for i in actions}
        for stream in self._own.values():
            stream.wait_event(begun)
        self._done: dict[int, torch.cuda.Event] = {}  # by agent, what it was resumed for last
        self._held: Mail = {}  # what came in the last round,
        self._ready: dict[tuple[int, int], torch.cuda.Event] = {}  # and since when it is there,
        self._makers: dict[tuple[int, int], torch.cuda.Stream] = {}  # and whose memory it is in
        self.actions = {i: self._on_its_stream(i, action) for i, action in actions.items()}

    def _on_its_stream(self, i: int, action: Exchange[None]) -> Exchange[None]:
        stream = self._own[i]
        inbox: dict[int, Tensor] | None = None
        while True:
            for source in inbox or ():
                stream.wait_event(self._ready[source, i])
            with torch.cuda.stream(stream):
                try:
                    request = action.send(inbox)  # type: ignore[arg-type]
                except StopIteration:
                    return
                finally:
                    self._done[i] = stream.record_event()
            inbox = yield request

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        """See `Transport`."""
        for (_, target), maker in self._makers.items():
            maker.wait_event(self._done[target])
        sources = {link[0] for link in mail}
        if self.inner.is_rounded(phase):  # for all agents at once, who wait for it
            for source in sources:
                self._all.wait_event(self._done[source])
            arrived = super().exchange(phase, mail, batch)
            rounded = self._all.record_event()
            for source in sources:
                self._own[source].wait_event(rounded)
            self._makers = dict.fromkeys(arrived, self._all)
            self._ready = dict.fromkeys(arrived, rounded)
        else:
            arrived = super().exchange(phase, mail, batch)
            self._makers = {link: self._own[link[0]] for link in arrived}
            self._ready = {link: self._done[link[0]] for link in arrived}
        self._held = arrived
        return arrived

    def join(self) -> None:
        """Have the current stream wait for all agents."""
        for stream in self._own.values():
            self._all.wait_stream(stream)
