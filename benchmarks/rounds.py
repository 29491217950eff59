"""A training step of one process and of actors, over sockets and over gloo alone, from one run.

    python benchmarks/rounds.py --data-dir FOLDER_OF_THE_IDX_FILES      # about four minutes

`topologies/mnist-grid16.yaml` in one process with one thread and with two, on two actors and on
sixteen. All of them are up at once and take turns of a few steps; the wall time of a step counts,
medians over the turns. Actors have one thread each.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from timing import machine

from hdnn_dist.cluster import RayRunner
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner

SPEC = Path(__file__).parents[1] / "topologies" / "mnist-grid16.yaml"
AGENTS = [f"{{name: a{i + 1}, cpu: 0}}" for i in range(16)]  # all groups of actors at once


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = ArgumentParser(description="a training step of one process and of actors")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the MNIST files")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--actors", nargs="+", type=int, default=(2, 16))
    parser.add_argument("--wires", nargs="+", default=("auto", "gloo"))
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--turns", type=int, default=9)
    o = parser.parse_args(argv)

    def job_of(*overrides: str) -> Job:
        always = f"data.dir={o.data_dir.absolute()}", f"training.batch_size={o.batch}"
        return Job.load(SPEC, [*always, f"topology.agents=[{', '.join(AGENTS)}]", *overrides])

    calls: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        for threads in 1, 2:
            local = LocalRunner(job_of())
            calls[f"one process, {threads} thread{'s' * (threads > 1)}"] = with_threads(
                threads, local, o.steps
            )
        for actors in o.actors:
            for wire in o.wires:
                packed = f"cluster.agents_per_actor={16 // actors}"
                runner = RayRunner(job_of(packed, f"cluster.wire={wire}"))
                stack.callback(runner.close)
                name = {"auto": "sockets", "gloo": "gloo"}[wire]
                calls[f"{actors} actors, {name}"] = lambda runner=runner: runner.train(o.steps)  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(o.turns):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) / o.steps)

    job = job_of()
    print(
        f"{machine()}; batch {o.batch}, {len(job.plan.training_step)} rounds a step; "
        f"medians of {o.turns} turns of {o.steps} steps\n"
    )
    print("| what | ms a step | least, most | over 1 thread | over 2 threads |")
    print("|---|---:|---:|---:|---:|")
    one, two, *_ = (median(seconds) for seconds in times.values())
    for name, seconds in times.items():
        ms = median(seconds)
        print(
            f"| {name} | {1e3 * ms:.1f} | {1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f} "
            f"| {ms / one:.2f} | {ms / two:.2f} |"
        )


def with_threads(threads: int, runner: LocalRunner, steps: int) -> Callable[[], object]:
    """A turn of so many threads."""

    def call() -> None:
        torch.set_num_threads(threads)
        runner.train(steps)
        torch.set_num_threads(1)

    return call


if __name__ == "__main__":
    main()
