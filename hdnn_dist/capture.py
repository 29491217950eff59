"""Forward and backward of all agents of a process as one CUDA graph.

An agent's step is hundreds of small operations, whose launch takes longer than they do. As their
shapes are the same in every step, they are recorded once, and from then on launched all at once, on
inputs in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hdnn_dist.agent import Agent
from hdnn_dist.exchange import Round
from hdnn_dist.transport import InProcess, drive

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
    ) -> None:
        self._agents, self._transport, self._rounds = agents, transport, rounds
        self._batches = {i: agent.draw(step) for i, agent in agents.items()}
        device = next(iter(agents.values())).device
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        before = transport.sent
        try:
            self._run()
            self._sent = transport.sent - before  # of a step
            self._replay = record(self._run)
        finally:
            transport.count({link: before[link] - n for link, n in transport.sent.items()})

    def _run(self) -> None:
        actions = {i: a.propagate(*self._batches[i]) for i, a in self._agents.items()}
        samples = next(iter(self._batches.values()))[0].shape[1]
        drive(actions, self._transport, samples, self._rounds)
        finite = torch.stack([agent.node.finite() for agent in self._agents.values()])
        self._finite.copy_(finite.all())

    def differentiate(self, step: int) -> bool:
        """Do it on the batch of a step.

        Returns:
            Whether all states are finite. If not, it is to be done by `Agent.differentiate`, which
            finds the first.
        """
        for i, agent in self._agents.items():
            for old, new in zip(self._batches[i], agent.draw(step), strict=True):
                old.copy_(new)
        self._replay()
        if not self._finite:
            return False
        self._transport.count(self._sent)
        return True
