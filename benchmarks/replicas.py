"""Wall time a training step of one copy of the agents and of several, an actor to a copy.

    python benchmarks/replicas.py                 # 1 and 2 copies, two sizes, two minutes
    python benchmarks/replicas.py --copies 1 2 4 --sizes 64x1024

A size is that of an agent's states, d, and of the batch. Eight agents on a ring learn digits. The
actors of all runs are there at once and take turns, so that those of one run compute at a time;
medians count.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from contextlib import ExitStack, closing
from statistics import median

import torch
from timing import machine

import hdnn_dist
from hdnn_dist import Job
from hdnn_dist.trainer import Runner

STEPS = 10  # of a turn
AGENTS = ", ".join(f"{{name: a{i}, cpu: 0.01}}" for i in range(1, 9))  # so that all fit at once


def main() -> None:
    """Print a Markdown table."""
    parser = ArgumentParser(description="wall time a step of one copy of the agents and of several")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", default=["8x64", "64x1024"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    o = parser.parse_args()
    torch.set_num_threads(1)  # as the actors have
    print(f"{machine()}; medians of {o.rounds} turns of {STEPS} steps\n")
    print("| d x batch | copies | ms a step | times faster |\n|---|---:|---:|---:|", flush=True)
    with ExitStack() as stack:
        for size in o.sizes:
            d, batch = size.split("x")
            runners: dict[int, Runner] = {}
            for copies in o.copies:
                settings = [f"topology.agents=[{AGENTS}]", f"training.batch_size={batch}"]
                settings += [
                    f"topology.d={d}",
                    f"cluster.replicas={copies}",
                    "cluster.agents_per_actor=8",
                ]
                runner = hdnn_dist.launch(Job.load(None, settings))
                runners[copies] = stack.enter_context(closing(runner))
                runner.train(STEPS)
            times: dict[int, list[float]] = {copies: [] for copies in o.copies}
            for _ in range(o.rounds):
                for copies, runner in runners.items():
                    start = time.perf_counter()
                    runner.train(STEPS)
                    times[copies].append((time.perf_counter() - start) / STEPS)
            seconds = {copies: median(taken) for copies, taken in times.items()}
            for copies, taken in seconds.items():
                faster = seconds[o.copies[0]] / taken
                print(f"| {size} | {copies} | {1000 * taken:.1f} | {faster:.2f} |", flush=True)


if __name__ == "__main__":
    main()
