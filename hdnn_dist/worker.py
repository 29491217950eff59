"""One process: the agents that it hosts, run in lockstep over a transport."""

from __future__ import annotations

import contextlib
import gc
import logging
import operator
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdnn_dist.agent import CPU, Agent, Evaluation, Fault, StepResult, counted, whole
from hdnn_dist.analysis import Sums
from hdnn_dist.capture import Captured
from hdnn_dist.checkpoint import Manifest, load_agent, save_agent
from hdnn_dist.data import Part, load_rows, share
from hdnn_dist.errors import DataError, PlacementError
from hdnn_dist.exchange import Round
from hdnn_dist.job import Job
from hdnn_dist.node import Exchange
from hdnn_dist.replicas import Replicas
from hdnn_dist.storage import Place
from hdnn_dist.trace import Recorder, Track, watched
from hdnn_dist.transport import Agreement, InProcess, Result, Transport, drive

PARTS: tuple[Part, ...] = ("train", "test")
EVAL_BATCH = 1000  # samples of one forward pass without a backward pass
LITTLE = 0.1  # of the whole time
ALIKE = 0.9  # of the time that the slowest takes, at which another is as slow
log = logging.getLogger("hdnn_dist")


def agreement_of(job: Job) -> Agreement:
    """What all processes of a job take for granted of each other's messages."""
    links, names = job.architecture.patterns.S, job.topology.names
    return Agreement(links, names, job.dtype, job.message_dtype, job.digest)


def device_of(job: Job, agents: Sequence[int]) -> torch.device:
    """What some agents that share a process compute on (`cluster.device`).

    Raises:
        PlacementError: a GPU, but the process has none.
    """
    wish = job.spec.cluster.device
    asked = any(job.topology.agents[i].gpu for i in agents)
    if wish == "cpu" or (wish == "auto" and not asked):
        return CPU
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wish == "auto":
        return CPU
    raise PlacementError(
        "cluster.device is cuda, but the process of agent(s) "
        f"{', '.join(job.topology.names[i] for i in agents)} on {platform.node()} has no GPU",
        "give these agents gpu (1, or a part of one) and install a torch that is built for CUDA, "
        "or set cluster.device to auto",
    )


@dataclass(frozen=True)
class Times:
    """Where the seconds of some training steps of an actor went.

    Attributes:
        agents: its agents.
        steps: how many.
        total: all seconds.
        compute: of these, those in which each agent computed; a CUDA graph is no agent's.
        wait: those in which nothing was left but to wait for other processes, other copies too.
        node: the machine; empty for the process that asks.
    """

    agents: tuple[str, ...]
    steps: int
    total: float
    compute: tuple[float, ...]
    wait: float
    node: str = ""

    def a_step(self) -> list[tuple[float, float, float]]:
        """Seconds of a step to each agent: to compute, to hand over messages, to wait.

        An agent waits for other processes, and while others in its own compute; what is left of a
        step is its process's, to hand over messages.
        """
        computed = sum(self.compute)
        send = max(0.0, self.total - computed - self.wait)
        return [
            (own / self.steps, send / self.steps, (self.wait + computed - own) / self.steps)
            for own in self.compute
        ]


def slowest(busy: Sequence[float], total: float = 0.0) -> list[int]:
    """Those of some actors for which the others wait: that take about as long as the slowest.

    Args:
        busy: seconds in which each is at work.
        total: seconds that all of it takes; what is little beside these is not waited for.

    Returns:
        Their numbers; none if the others take as long, or wait little.
    """
    longest = max(busy)
    slow = [k for k, seconds in enumerate(busy) if seconds >= ALIKE * longest]
    others = [seconds for k, seconds in enumerate(busy) if k not in slow]
    if not others or longest - sum(others) / len(others) < LITTLE * total:
        return []
    return slow


class Worker:
    """Hosts some of a job's agents.

    Every worker of a job is told to do the same things in the same order; what they compute for one
    another goes over the transport. Results about the loss are the root's, or of each agent that
    reads out for itself: workers without such an agent return nothing.

    Args:
        job: the job.
        agents: which agents live here.
        transport: carries the rounds.
        replicas: the other copies of these agents; by default there are none.
        device: what they compute on.
    """

    def __init__(
        self,
        job: Job,
        agents: Sequence[int],
        transport: Transport,
        replicas: Replicas | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.job, self.transport = job, transport
        self.replicas = Replicas() if replicas is None else replicas
        taken = self._share(job.batch)
        self.agents = {i: Agent(job, i, taken, device) for i in agents}
        # A step of agents that share a process and a GPU is recorded when the first is taken.
        self._may_capture = device.type == "cuda" and type(transport) is InProcess
        self._captured: Captured | None = None
        self.step = 0
        self._recorder: Recorder | None = None  # of what is done when, while it is asked for
        self._faults: list[Fault] = []
        self._forget_times()

    def load_data(self) -> None:
        """Read the agents' data now, not in the first round, for which others wait."""
        for agent in self.agents.values():
            agent.load_data()

    def train(self, steps: int) -> list[StepResult]:
        """Take so many optimiser steps from where the run stands, the same in all copies."""
        results: list[StepResult] = []
        plan, taken = self.job.plan, self._share(self.job.batch)
        samples = taken.stop - taken.start
        started, waited = time.perf_counter(), self.transport.waited + self.replicas.waited
        for _ in range(steps):
            if not self._differentiate_at_once():
                actions = {
                    i: self._timed(i, agent.differentiate(self.step))
                    for i, agent in self.agents.items()
                }
                self._drive(actions, samples, plan.differentiation)
            self.replicas.add([summand for a in self.agents.values() for summand in a.summands])
            updates = {
                i: self._timed(i, agent.update(self.step)) for i, agent in self.agents.items()
            }
            if parts := self._drive(updates, samples, plan.clipping):
                results.append(whole(parts))
            self._faults += [agent.fault for agent in self.agents.values() if agent.fault]
            self.step += 1
        self._steps += steps
        self._total += time.perf_counter() - started
        self._wait += self.transport.waited + self.replicas.waited - waited
        return results

    def profile(self, steps: int) -> tuple[list[StepResult], Track]:
        """As `train`, and what was done when."""
        transport, replicas = self.transport, self.replicas
        self._recorder = recorder = Recorder()
        self.transport, self.replicas = recorder.transport(transport), recorder.replicas(replicas)
        results: list[StepResult] = []
        try:
            for _ in range(steps):
                recorder.step = self.step + 1
                results += self.train(1)
        finally:
            self.transport, self.replicas, self._recorder = transport, replicas, None
        names = tuple(agent.name for agent in self.agents.values())
        return results, Track(names, tuple(recorder.slices))

    def _timed(self, i: int, action: Exchange[Result]) -> Exchange[Result]:
        """An agent's action, with the seconds counted in which it is at work."""

        def tell(what: str, started: float, seconds: float) -> None:
            self._compute[i] += seconds
            if self._recorder is not None:
                self._recorder.computed(self.agents[i].name, what, started, seconds)

        return watched(action, tell)

    def times(self) -> Times:
        """Where the time of the training steps went, since the last call."""
        found = Times(
            tuple(agent.name for agent in self.agents.values()),
            self._steps,
            self._total,
            tuple(self._compute[i] for i in self.agents),
            self._wait,
        )
        self._forget_times()
        return found

    def _forget_times(self) -> None:
        self._compute = dict.fromkeys(self.agents, 0.0)
        self._steps, self._total, self._wait = 0, 0.0, 0.0

    def _differentiate_at_once(self) -> bool:
        """Have a CUDA graph do it, if there is one and it finds nothing that is to be looked at."""
        if self._may_capture and self._recorder is None:
            self._may_capture = False
            assert isinstance(self.transport, InProcess)
            try:
                with torch.no_grad():
                    rounds = self.job.plan.differentiation
                    self._captured = Captured(self.agents, self.transport, rounds, self.step)
            except RuntimeError as error:
                log.warning("steps are not recorded as a CUDA graph: %s", error)
        with torch.no_grad():
            return self._captured is not None and self._captured.differentiate(self.step)

    def faults(self) -> list[Fault]:
        """Numbers that were not finite, since the last call."""
        found, self._faults = self._faults, []
        return found

    def evaluate(self, part: Part = "test") -> Evaluation | None:
        """Loss and scores over a part of the data set, of which each copy takes its share.

        Raises:
            DataError: the data set has no such part.
        """
        if part not in PARTS:
            raise DataError(f"the data set has no part {part!r}", f"use one of {', '.join(PARTS)}")
        samples = self.job.data.samples(part)
        C, targets = counted(self.job.data), bool(self.job.data.targets)
        sums = torch.zeros((3 if targets else 2) + C**2, dtype=torch.float64)
        for start, stop in _slices(self._share(samples)):
            actions = {i: a.evaluate(part, start, stop, self.step) for i, a in self.agents.items()}
            for found in self._drive(actions, stop - start, self.job.plan.forward):
                sums += found
            self._faults += [agent.fault for agent in self.agents.values() if agent.fault]
        if not any(agent.finishes for agent in self.agents.values()):
            return None
        self.replicas.add([sums])
        if targets:
            loss, squares, variance = (sums / samples).tolist()
            return Evaluation(loss, None, samples, squares, variance)
        loss, accuracy = (sums[:2] / samples).tolist()
        rows = sums[2:].long().view(C, C).tolist()
        return Evaluation(loss, accuracy, samples, confusion=tuple(map(tuple, rows)))

    def predict(self, source: str | os.PathLike[str]) -> np.ndarray | None:
        """What `Agent.predict` says of "train", "test", or the rows of a .npy file, `(samples, C)`.

        Of these each copy takes its share; None of none. Targets that other processes read out are
        zero, so that theirs can be added.

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
        samples = len(next(iter(own.values())))
        for start, stop in _slices(self._share(samples)):
            actions = {i: a.predict(own[i][start:stop]) for i, a in self.agents.items()}
            parts = self._drive(actions, stop - start, self.job.plan.forward)
            if parts and self.job.architecture.own is not None:
                parts = [self._side_by_side(parts)]
            chunks += parts
        return np.concatenate(chunks) if chunks else None

    def _side_by_side(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The outputs of agents that read out for themselves, among those of all."""
        architecture = self.job.architecture
        outputs = np.zeros((len(parts[0]), architecture.outputs))
        readers = [i for i, agent in self.agents.items() if agent.finishes]
        for i, part in zip(readers, parts, strict=True):
            outputs[:, list(architecture.reads_out(i))] = part
        return outputs

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
        """Write the state of each agent here, which the first copy does; checksum by agent."""
        to = folder if self.replicas.copy == 0 else None
        return {
            agent.name: save_agent(to, agent.name, agent.state()) for agent in self.agents.values()
        }

    def load(self, folder: Place, manifest: Manifest) -> None:
        """Put back what `save` wrote, whichever processes wrote it.

        Agents that did not take part in the checkpoint start anew.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        took_part = manifest.files.keys()
        same = set(self.job.topology.names) == took_part
        writer = None if same else self.job.among(took_part).architecture
        for agent in self.agents.values():
            if same or agent.name in took_part:
                agent.load_state(load_agent(folder, agent.name, manifest), writer)
            else:
                agent.load_state(agent.initial_state())
        self.step = manifest.step

    def _share(self, samples: int) -> slice:
        """Which of some samples this copy takes."""
        return share(samples, self.replicas.copy, self.replicas.copies)

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


def _slices(samples: slice) -> Iterator[tuple[int, int]]:
    """Runs of at most `EVAL_BATCH` samples."""
    for start in range(samples.start, samples.stop, EVAL_BATCH):
        yield start, min(start + EVAL_BATCH, samples.stop)
