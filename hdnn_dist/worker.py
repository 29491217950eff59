"""One process: the agents that it hosts, run in lockstep over a transport."""

from __future__ import annotations

import contextlib
import gc
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdnn_dist.agent import Agent, Evaluation, Fault, StepResult
from hdnn_dist.analysis import Sums
from hdnn_dist.checkpoint import Manifest, load_agent, save_agent
from hdnn_dist.data import Part, load_rows
from hdnn_dist.errors import DataError
from hdnn_dist.exchange import Round
from hdnn_dist.job import Job
from hdnn_dist.node import Exchange
from hdnn_dist.storage import Place
from hdnn_dist.transport import Result, Transport, drive

PARTS: tuple[Part, ...] = ("train", "test")
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
        self._faults: list[Fault] = []

    def load_data(self) -> None:
        """Read the agents' data now, not in the first round, for which others wait."""
        for agent in self.agents.values():
            for part in PARTS:
                agent.features(part)
                if agent.is_root:
                    agent.labels(part)

    def train(self, steps: int) -> list[StepResult]:
        """Take so many optimiser steps from where the run stands."""
        results: list[StepResult] = []
        for _ in range(steps):
            actions = {i: agent.train_step(self.step) for i, agent in self.agents.items()}
            results += self._drive(actions, self.job.batch, self.job.plan.training_step)
            self._faults += [agent.fault for agent in self.agents.values() if agent.fault]
            self.step += 1
        return results

    def faults(self) -> list[Fault]:
        """Numbers that were not finite, since the last call."""
        found, self._faults = self._faults, []
        return found

    def evaluate(self, part: Part = "test") -> Evaluation | None:
        """Loss and accuracy over a part of the data set.

        Raises:
            DataError: the data set has no such part.
        """
        if part not in PARTS:
            raise DataError(f"the data set has no part {part!r}", f"use one of {', '.join(PARTS)}")
        samples = self.job.data.samples(part)
        sums: list[tuple[float, int]] = []
        for start, stop in _slices(samples):
            actions = {i: a.evaluate(part, start, stop) for i, a in self.agents.items()}
            sums += self._drive(actions, stop - start, self.job.plan.forward)
        if not sums:
            return None
        loss, correct = (sum(column) for column in zip(*sums, strict=True))
        return Evaluation(loss / samples, correct / samples, samples)

    def predict(self, source: str | os.PathLike[str]) -> np.ndarray | None:
        """Class probabilities `(samples, C)` for "train", "test", or the rows of a .npy file.

        Raises:
            DataError: the file cannot be read, or its rows are not samples of the data set.
        """
        spec = self.job.spec.data
        own: dict[int, Tensor] = {
            i: agent.features("train" if source == "train" else "test")
            if source in PARTS
            else torch.from_numpy(load_rows(spec, Path(source), agent.view.columns))
            for i, agent in self.agents.items()
        }
        chunks: list[np.ndarray] = []
        for start, stop in _slices(len(next(iter(own.values())))):
            actions = {i: a.predict(own[i][start:stop]) for i, a in self.agents.items()}
            chunks += self._drive(actions, stop - start, self.job.plan.forward)
        return np.concatenate(chunks) if chunks else None

    def gradient_squares(self) -> Tensor:
        """`‖∂loss/∂y_j‖²` of the agents here, `j = 0 … N`, at the last step of the last epoch."""
        return torch.stack([agent.gradient_squares for agent in self.agents.values()]).sum(0)

    def sensitivities(self, samples: int, V: Tensor) -> Sums:
        """What the agents here add to the analysis of the first `samples` of the test set.

        Args:
            samples: how many.
            V: the cotangents of `y_N`, `(2n, r)` (see `hdnn_dist.analysis`).
        """
        actions = {
            i: agent.sensitivities(agent.features("test")[:samples], V)
            for i, agent in self.agents.items()
        }
        energy = self.job.architecture.member.activation.integral is not None
        rounds = self.job.plan.analysis(energy) * samples
        sums = self._drive(actions, V.shape[1], rounds)
        return reduce(operator.add, sums)

    def save(self, folder: Place) -> dict[str, str]:
        """Write the state of each agent here; SHA-256 by agent."""
        return {
            agent.name: save_agent(folder, agent.name, agent.state())
            for agent in self.agents.values()
        }

    def load(self, folder: Place, manifest: Manifest) -> None:
        """Put back what `save` wrote, whichever processes wrote it.

        Agents that did not take part in the checkpoint keep the weights they have.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        took_part = manifest.files.keys()
        same = set(self.job.topology.names) == took_part
        writer = None if same else self.job.among(took_part).architecture
        for agent in self.agents.values():
            if same or agent.name in took_part:
                agent.load_state(load_agent(folder, agent.name, manifest), writer)
        self.step = manifest.step

    def _drive(
        self,
        actions: Mapping[int, Exchange[Result | None]],
        batch: int,
        rounds: Sequence[Round],
    ) -> list[Result]:
        """Run an action of every agent here; what the root returned, if it lives here."""
        with torch.no_grad(), _no_collector():
            results = drive(actions, self.transport, batch, rounds)
        return [result for result in results.values() if result is not None]


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Hold back Python's collector of cycles, of which a step makes none.

    It would look through thousands of agents again and again, for a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _slices(samples: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `EVAL_BATCH` samples."""
    for start in range(0, samples, EVAL_BATCH):
        yield start, min(start + EVAL_BATCH, samples)
