"""Set-up and step time over the number of agents, all in one process.

    python benchmarks/scale.py        # about six minutes

Grids, tori and random 4-regular graphs; H2 with d = 4, 4 layers, batches of 16 digits. 64 agents
(16 in the smallest) see the pixels, all contribute to the scores. `set-up` is the spec, the graph,
the plan and its digest; `agents` is the weights, optimisers and data of all of them. Steps of
all sizes take turns, and the median of each counts. The slope is that of log time over log edges,
by least squares.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import Call, alternated, machine

from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner

AGENTS = (16, 64, 256, 1024, 4096)
D, LAYERS, BATCH = 4, 4, 16


def generators(M: int) -> dict[str, dict[str, Any]]:
    """Graphs of bounded degree with M agents, by name."""
    side = math.isqrt(M)
    grid = {"m": side, "n": side}
    return {
        "grid": {"generator": "grid_2d_graph", "args": grid},
        "torus": {"generator": "grid_2d_graph", "args": grid | {"periodic": True}},
        "random 4-regular": {
            "generator": "random_regular_graph",
            "args": {"n": M, "d": 4, "seed": 0},
        },
    }


def job_of(edges: dict[str, Any], M: int) -> Job:
    """A job on a graph, with its plan and digest."""
    seers = [f"a{1 + k * M // min(M, 64)}" for k in range(min(M, 64))]
    job = Job.load(
        {
            "topology": {"d": D, "edges": edges},
            "model": {"layers": LAYERS},
            "data": {"split": {"kind": "auto", "agents": seers}},
            "training": {"batch_size": BATCH},
        }
    )
    assert job.digest
    return job


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = ArgumentParser(description="step time over the number of agents")
    parser.add_argument("--agents", nargs="+", type=int, default=AGENTS, help="squares")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(machine())
    print(
        "\n| graph | agents | edges | set-up s | agents s | rounds a step | step ms | µs an edge |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    slopes = {}
    for name in generators(16):
        calls: dict[str, Call] = {}
        rows: dict[str, str] = {}
        edges = []
        for M in o.agents:
            start = time.perf_counter()
            job = job_of(generators(M)[name], M)
            there = time.perf_counter()
            runner = LocalRunner(job)
            runner.worker.load_data()
            made = time.perf_counter() - there
            edges.append(len(job.topology.edges) // 2)
            rows[str(M)] = (
                f"{name} | {M} | {edges[-1]} | {there - start:.2f} | {made:.2f} "
                f"| {len(job.plan.training_step)}"
            )
            calls[str(M)] = partial(runner.train, 1)
        steps = alternated(calls, o.rounds)
        for M, row, links in zip(rows, rows.values(), edges, strict=True):
            print(f"| {row} | {1e3 * steps[M]:.1f} | {1e6 * steps[M] / links:.0f} |", flush=True)
        slopes[name] = float(np.polyfit(np.log(edges), np.log([*steps.values()]), 1)[0])
    for name, value in slopes.items():
        print(f"\n{name}: step time grows as edges to the power {value:.2f}", flush=True)


if __name__ == "__main__":
    main()
