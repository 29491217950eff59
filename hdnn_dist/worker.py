"""One process: the agents that it hosts, run in lockstep over a transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdnn_dist.agent import Agent, Evaluation, StepResult
from hdnn_dist.checkpoint import Manifest, load_agent, save_agent
from hdnn_dist.data import Part, load_rows
from hdnn_dist.job import Job
from hdnn_dist.node import Exchange
from hdnn_dist.transport import Result, Transport, drive

EVAL_BATCH = 1000  # samples of one forward pass without a backward pass


class Worker:
    """Hosts some of a job's agents.

    Every worker of a job is told to do the same things in the same order; what they compute for one
    another goes over the transport. Results about the loss are the root's: other workers
    return nothing.

    Args:
        job: the job.
        agents: which agents live here.
        transport: carries the rounds.
    """

    def __init__(self, job: Job, agents: Sequence[int], transport: Transport) -> None:
        self.job, self.transport = job, transport
        self.agents = {i: Agent(job, i) for i in agents}
        self.step = 0

    def train(self, steps: int) -> list[StepResult]:
        """Take so many optimiser steps from where the run stands."""
        results = []
        for _ in range(steps):
            step = self.step
            results += self._drive(lambda agent: agent.train_step(step), self.job.batch)
            self.step += 1
        return results

    def evaluate(self, part: Part = "test") -> Evaluation | None:
        """Loss and accuracy over a part of the data set."""
        total, right, samples = 0.0, 0, self.job.data.samples(part)
        parts: list[tuple[float, int]] = []
        for start in range(0, samples, EVAL_BATCH):
            stop = min(start + EVAL_BATCH, samples)
            parts += self._drive(
                lambda agent: agent.evaluate(part, start, stop),  # noqa: B023 - used at once
                stop - start,
            )
        if not parts:
            return None
        total = sum(loss for loss, _ in parts)
        right = sum(correct for _, correct in parts)
        return Evaluation(total / samples, right / samples, samples)

    def predict(self, source: Part | Path) -> np.ndarray | None:
        """Class probabilities `(samples, C)` for a part of the data set or the rows of a file."""
        own: dict[int, Tensor] = {
            i: agent.features(source)
            if not isinstance(source, Path)
            else torch.from_numpy(load_rows(self.job.spec.data, source, agent.view.columns))
            for i, agent in self.agents.items()
        }
        samples = len(next(iter(own.values())))
        chunks: list[np.ndarray] = []
        for start in range(0, samples, EVAL_BATCH):
            stop = min(start + EVAL_BATCH, samples)
            chunks += self._drive(
                lambda agent: agent.predict(own[agent.i][start:stop]),  # noqa: B023 - used at once
                stop - start,
            )
        return np.concatenate(chunks) if chunks else None

    def save(self, folder: Path) -> dict[str, str]:
        """Write the state of each agent here; SHA-256 by agent."""
        return {
            agent.name: save_agent(folder, agent.name, agent.state())
            for agent in self.agents.values()
        }

    def load(self, folder: Path, manifest: Manifest) -> None:
        """Put back what `save` wrote, whichever processes wrote it.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        for agent in self.agents.values():
            agent.load_state(load_agent(folder, agent.name, manifest))
        self.step = manifest.step

    def _drive(self, action: Callable[[Agent], Exchange[Result | None]], batch: int) -> list[Result]:
        """Run an action of every agent here; what the root returned, if it lives here."""
        with torch.no_grad():
            generators = {i: action(agent) for i, agent in self.agents.items()}
            results = drive(generators, self.transport, batch)
        return [result for result in results.values() if result is not None]
