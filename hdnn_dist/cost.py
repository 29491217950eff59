"""How long a training step takes, predicted from a job, who shares an actor, and a calibration.

With the agents `i` of actor `k`, and `share(x) = max(max_k x_k, Σ_k x_k / cores)` for actors that
wait for one another, and for cores::

    step     = share(Σ_i arithmetic_i / speed_i) + Σ_rounds (latency + share(send · messages_k)
                                                             + share(bytes_k) / bandwidth)
    arithmetic_i = step + half_step · (passes through half steps) + message · (messages sent)
                 + number · (numbers passed over) + keep · (numbers kept for the adjoint)
                 + Σ_products flops / rate(flops)

where rounds are those in which anything passes between actors, and messages and bytes are what an
actor `k` sends and receives in one. With copies of the agents the actors are those of all copies, a
batch is the largest share of one, and the ring in which gradients are summed is some rounds more.
The ten constants are a `Calibration`, which `hdnn-dist calibrate` measures. Processors are taken to
have nothing else to do, and messages in fewer bits to cost their bytes alone.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.placement import Packing, hosts
from hdnn_dist.storage import Place, read_text

SMALL, LARGE = 500_000, 30_000_000  # FLOPs of the products whose rates are measured

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Calibration:
    """A machine's constants, in seconds, FLOP/s and bytes/s.

    Attributes:
        host, date, torch: where, when and with which torch they were measured.
        cores: of that host.
        step: of an agent, a step, whatever its size.
        half_step: of an agent, a half step forward; its adjoint counts twice.
        message: to hand a message to an agent of the same process.
        number: to pass over a number once, in an elementwise operation.
        keep: to keep a number for the adjoint, in memory that a step uses for the first time.
        small, large: FLOP/s of products of `SMALL` and of `LARGE` FLOPs.
        latency: until what another process sends is there.
        send: of a core, for a message between processes, at each end.
        bandwidth: bytes/s that an actor sends and receives.
    """

    host: str
    date: str
    torch: str
    cores: int
    step: Seconds
    half_step: Seconds
    message: Seconds
    number: Seconds
    keep: Seconds
    small: Rate
    large: Rate
    latency: Seconds
    send: Seconds
    bandwidth: Rate

    def product(self, flops: float) -> float:
        """Seconds of a product, without the call: rates in between follow the FLOPs' logarithm."""
        if not flops:
            return 0.0
        where = math.log(flops / SMALL) / math.log(LARGE / SMALL)
        rate: float = self.small * (self.large / self.small) ** min(1.0, max(0.0, where))
        return flops / rate

    def arithmetic(self, work: Work) -> float:
        """Seconds of an agent's step."""
        return (
            self.step
            + self.half_step * work.half_steps
            + self.message * work.messages
            + self.number * work.numbers
            + self.keep * work.kept
            + sum(times * self.product(flops) for flops, times in work.products.items())
        )


def calibration_file() -> Path:
    """Where `hdnn-dist calibrate` writes, and `check` looks, if not told otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "hdnn_dist" / "calibration.json"


def read_calibration(file: Place) -> Calibration:
    """What `hdnn-dist calibrate` has written.

    Raises:
        StorageError: the file cannot be read.
        UserError: it is not there, or holds no calibration.
    """
    if not file.exists():
        raise UserError(f"there is no {file}", "write it by hdnn-dist calibrate --out")
    try:
        return TypeAdapter(Calibration).validate_json(read_text(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file} holds no calibration: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            "write it anew by hdnn-dist calibrate",
        ) from None


@dataclass(frozen=True)
class Work:
    """What an agent does in a training step.

    Attributes:
        half_steps: passes: one forward, two for the adjoint, one more if states are recomputed.
        messages: that it sends.
        numbers: that elementwise operations and the optimiser pass over.
        kept: numbers kept for the adjoint; recomputed states are not.
        products: how many products of so many FLOPs.
    """

    half_steps: int
    messages: int
    numbers: float
    kept: int
    products: Counter[int]


def work_of(job: Job) -> list[Work]:
    """The work of each agent.

    A half step `u = C Kᵀ σ(K y + b)` of an agent with `d` rows that reads `D` is a product of
    `2 d D B` FLOPs for `K y`, one for `Kᵀ s` and one for `C z`; the adjoint has two for each. About
    12 d + 4 D numbers a sample are passed over in all, and 3 d + D kept; for each parameter 20 are
    passed over.
    """
    architecture, plan, B = job.architecture, job.plan, _share_of_a_copy(job)
    sent: Counter[int] = Counter()
    for phase, times in Counter(plan.training_step).items():
        for source, messages in phase.outbound.items():
            sent[source] += times * len(messages)
    sizes, updates, passes = architecture.sizes, plan.updates, 4 if plan.recompute else 3
    arguments = sum(2 if u.argument == "K-KT" else 1 for u in updates)
    pulls = sum(u.pull for u in updates)
    couplings = sum(bool(u.coupling) for u in updates) if architecture.coupling else 0
    graphs = Counter(architecture.patterns.T)
    result = []
    for i, d in enumerate(sizes):
        numbers, kept = 20.0 * architecture.count(i), 0
        products: Counter[int] = Counter()
        for T, layers in graphs.items():
            D = sum(sizes[l] for l in T.rows[i])
            products[2 * d * D * B] += passes * (arguments + pulls) * layers
            numbers += passes / 3 * len(updates) * layers * B * (12 * d + 4 * D)
            kept += 0 if plan.recompute else len(updates) * layers * B * (3 * d + D)
        if couplings:
            D = sum(sizes[l] for l in architecture.patterns.R.rows[i])
            products[2 * d * D * B] += passes * couplings * plan.depth
        width = 2 * architecture.patterns.sizes[i]
        products[2 * width * len(architecture.columns[i]) * B] += 2
        products[2 * width * len(architecture.reads_out(i)) * B] += 3
        half_steps = passes * len(updates) * plan.depth
        result.append(Work(half_steps, sent[i], numbers, kept, products))
    return result


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step: computing, waiting for messages, and for their bytes.

    `busy` are those in which each actor of a copy computes.
    """

    arithmetic: float
    latency: float
    transfer: float
    busy: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """In all."""
        return self.arithmetic + self.latency + self.transfer


def predict(job: Job, packing: Packing, calibration: Calibration, cores: int) -> Cost:
    """The cost of a training step.

    Args:
        job: the job.
        packing: who shares an actor, in each copy; a single actor is also what `--local` does.
        calibration: of such machines.
        cores: of the cluster, which the actors share.
    """
    agents, work, host = job.topology.agents, work_of(job), hosts(packing)
    batch, copies = _share_of_a_copy(job), job.spec.cluster.replicas
    busy = tuple(
        sum(calibration.arithmetic(work[i]) / agents[i].speed for i in members)
        for members in packing
    )
    latency = transfer = 0.0

    def add(times: int, messages: Iterable[int], volume: Iterable[float]) -> None:
        """Rounds with so many messages and bytes at each actor of a copy."""
        nonlocal latency, transfer
        sending = calibration.send * _share([*messages] * copies, cores)
        latency += times * (calibration.latency + sending)
        transfer += times * _share([*volume] * copies, cores) / calibration.bandwidth

    for phase, times in Counter(job.plan.training_step).items():
        itemsize = phase.travels_as(job.message_dtype, job.dtype).itemsize
        frames: Counter[tuple[int, int]] = Counter()
        for m in phase.messages:
            if host[m.source] != host[m.target]:
                amount = m.rows * phase.columns(batch) * itemsize
                frames[host[m.source], host[m.target]] += amount
        if frames:
            volume: Counter[int] = Counter()
            for pair, amount in frames.items():
                volume.update(dict.fromkeys(pair, amount))
            add(times, Counter(rank for pair in frames for rank in pair).values(), volume.values())
    if copies > 1:  # a ring: each actor sends a part of its numbers on and receives one
        numbers = [
            sum(job.architecture.count(i, zeros=True) for i in members) for members in packing
        ]
        part = 2 * job.dtype.itemsize / copies
        add(2 * (copies - 1), [2] * len(packing), [part * count for count in numbers])
    return Cost(_share(busy * copies, cores), latency, transfer, busy)


def _share_of_a_copy(job: Job) -> int:
    """Samples a step, of the copy that has most."""
    return -(-job.batch // job.spec.cluster.replicas)


def _share(amounts: Iterable[float], cores: int) -> float:
    """When all are done that share some cores, and wait for one another."""
    each = list(amounts)
    return max(*each, sum(each) / max(1, cores))
