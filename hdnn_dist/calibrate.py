"""The constants of `hdnn_dist.cost`, measured on the spot by training small jobs.

Everything is measured on the code that trains: the arithmetic in this process, the messages between
actors on Ray. The least of several times counts, and for the arithmetic time of the processor, as
others may use the machine too.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from hdnn_dist.cluster import RayRunner
from hdnn_dist.cost import LARGE, SMALL, Calibration, predict, work_of
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner, Runner

SECONDS = 1.0  # that each job is trained for, at least
COLUMNS = 4096  # of the long messages, by 64 rows
ROUNDS = 50  # of them, and of short ones

# Jobs that spend their time on different things: (graph, its arguments, d, layers, batch).
ALONE: tuple[tuple[str, dict[str, int], int, int, int], ...] = (
    ("cycle_graph", {"n": 4}, 2, 1, 8),
    ("cycle_graph", {"n": 4}, 2, 16, 8),
    ("complete_graph", {"n": 12}, 2, 4, 8),
    ("cycle_graph", {"n": 4}, 16, 8, 512),
    ("cycle_graph", {"n": 4}, 96, 4, 64),
    ("grid_2d_graph", {"m": 8, "n": 8}, 4, 4, 16),
)


def small_job(graph: str, args: dict[str, Any], d: int, layers: int, batch: int) -> Job:
    """H2 with digits on a generator's graph, an actor an agent."""
    return Job.load(
        {
            "topology": {"d": d, "edges": {"generator": graph, "args": args}},
            "model": {"layers": layers, "h": 1 / layers},
            "data": {"split": {"kind": "auto"}},
            "training": {"batch_size": batch},
            "cluster": {"placement": "spread"},
        }
    )


def step_seconds(runner: Runner) -> float:
    """The least mean of several runs of steps: of the processor, or with actors of the wall."""
    clock = time.process_time if isinstance(runner, LocalRunner) else time.perf_counter
    runner.train(2)
    once = _timed(lambda: runner.train(2), clock) / 2
    steps = max(1, round(SECONDS / 5 / max(1e-4, once)))
    return min(_timed(lambda: runner.train(steps), clock) for _ in range(5)) / steps


def calibrate(
    address: str | None = None, tell: Callable[[str], object] = lambda _: None
) -> Calibration:
    """Measure this machine, and messages on a Ray cluster; about a minute.

    Args:
        address: of the cluster; default: `$RAY_ADDRESS`, else a Ray started here.
        tell: is told what is measured now.

    Raises:
        PlacementError: the cluster is not there, or has no room for four actors.
    """
    tell("products")
    small, large = _product_rates()
    constants = Calibration(
        host=platform.node(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=torch.__version__,
        cores=os.cpu_count() or 1,
        step=0.0,
        half_step=0.0,
        message=0.0,
        number=0.0,
        small=small,
        large=large,
        latency=0.0,
        send=0.0,
        bandwidth=1.0,
    )
    tell("agents in this process")
    constants = _with_arithmetic(constants)
    tell("messages between two and four actors")
    return _with_messages(constants, address)


def _timed(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    call()
    return clock() - start


def _product_rates() -> tuple[float, float]:
    """FLOP/s of products of `SMALL` and of `LARGE` FLOPs, without what a call costs."""
    torch.set_num_threads(1)

    def seconds(d: int, D: int, B: int) -> float:
        K, y = torch.randn(d, D), torch.randn(D, B)
        calls = max(1, 20_000_000 // (2 * d * D * B + 20_000))
        return min(_timed(lambda: [K @ y for _ in range(calls)]) for _ in range(9)) / calls

    call = seconds(1, 1, 1)
    d, batch = 8, SMALL // (2 * 8 * 24)  # three agents' states of 8 numbers each
    D, large_batch = 384, LARGE // (2 * 128 * 384)
    return (
        2 * d * 24 * batch / max(1e-9, seconds(d, 24, batch) - call),
        2 * 128 * D * large_batch / max(1e-9, seconds(128, D, large_batch) - call),
    )


def _with_arithmetic(constants: Calibration) -> Calibration:
    """Solve for what an agent, a half step, a message and a number cost; none is negative."""
    rows, times = [], []
    for arguments in ALONE:
        job = small_job(*arguments)
        work = work_of(job)
        products = sum(
            n * constants.product(flops) for w in work for flops, n in w.products.items()
        )
        runner = LocalRunner(job)
        runner.worker.load_data()
        total = step_seconds(runner)
        amounts = [[1, w.half_steps, w.messages, w.numbers] for w in work]
        rows.append(np.sum(amounts, 0) / total)  # all jobs count alike
        times.append(max(0.0, total - products) / total)
    scale = np.max(rows, 0)
    found, _ = nnls(np.array(rows) / scale, np.array(times))
    step, half_step, message, number = (found / scale).tolist()
    return replace(constants, step=step, half_step=half_step, message=message, number=number)


def _with_messages(constants: Calibration, address: str | None) -> Calibration:
    """What a round between two and four actors takes beyond their arithmetic."""
    waits, loads = [], []
    two, four = (small_job("cycle_graph", {"n": n}, 1, 16, 8) for n in (2, 4))
    with closing(RayRunner(two, address)) as runner:
        cores = runner.cores
        for job in (two, four):
            if job is four:
                runner.reform(four)
            packing = tuple((i,) for i in range(len(job.topology.agents)))
            rest = step_seconds(runner) - predict(job, packing, constants, cores).arithmetic
            waits.append(max(0.0, rest) / len(job.plan.training_step))
            # Each end of a message: of a ring all actors have two neighbours, of two one.
            ends = 2 if job is two else 4
            loads.append([1, max(ends, ends * len(packing) / cores)])
        long = small_job("cycle_graph", {"n": 2}, 64, 1, 8)
        runner.reform(long)
        short, full = (
            min(runner.time_rounds(columns, ROUNDS) for _ in range(5)) for columns in (1, COLUMNS)
        )
    (latency, send), _ = nnls(np.array(loads), np.array(waits))
    volume = 2 * 64 * (COLUMNS - 1) * long.dtype.itemsize * max(1, 2 / cores)  # there and back
    bandwidth = volume / max(1e-9, full - short)
    return replace(constants, latency=float(latency), send=float(send), bandwidth=bandwidth)
