"""Train for many steps and watch what the processes hold on to.

    python -m tests.soak --steps 20000           # two Ray actors
    python -m tests.soak --steps 20000 --local   # one process

One line of JSON in the end; exit code 1 if memory, descriptors or threads grow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

import hdnn_dist
from hdnn_dist.cluster import RayRunner
from hdnn_dist.job import Job
from hdnn_dist.trainer import Listener, Progress, Runner
from tests.processes import tree

SAMPLES = 200  # of a run
MAY_GROW = 2.0  # MB in the second half of a run, of each process
MAY_OPEN = 4  # descriptors, and threads, in the second half


class Watch(Listener):
    """Looks at every process of a run now and then."""

    def __init__(self) -> None:
        self.processes: dict[str, psutil.Process] = {}
        self.seen: dict[str, list[tuple[int, float, int, int]]] = {}
        self.step = 0

    def started(self, runner: Runner, step: int) -> None:
        self.processes["driver"] = psutil.Process()
        if isinstance(runner, RayRunner):
            for rank, actor in enumerate(runner._actors):
                pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
                self.processes[f"actor {rank}"] = psutil.Process(pid)
            for process in tree(os.getpid()):
                if process.name() in ("raylet", "gcs_server"):
                    self.processes[process.name()] = process

    def stepped(self, results: object, progress: Progress) -> None:
        if progress.step - self.step < progress.steps / SAMPLES:
            return
        self.step = progress.step
        for name, process in self.processes.items():
            held = process.memory_full_info().uss / 1e6
            sample = self.step, held, process.num_fds(), process.num_threads()
            self.seen.setdefault(name, []).append(sample)


def figures(seen: Sequence[tuple[int, float, int, int]]) -> dict[str, Any]:
    """What a process held after a tenth, a half and all of a run, and its growth in between.

    The slope is of a least-squares line through the second half.
    """
    half = seen[len(seen) // 2 :]
    steps, held = [s[0] / 1000 for s in half], [s[1] for s in half]
    mean_step, mean_held = sum(steps) / len(steps), sum(held) / len(held)
    slope = sum((s - mean_step) * (h - mean_held) for s, h in zip(steps, held, strict=True))
    slope /= sum((s - mean_step) ** 2 for s in steps)
    marks = [seen[len(seen) // 10], half[0], seen[-1]]
    return {
        "MB at 10, 50, 100 %": [round(mark[1], 1) for mark in marks],
        "MB per 1000 steps": round(slope, 3),
        "descriptors": [mark[2] for mark in marks],
        "threads": [mark[3] for mark in marks],
        "flat": slope * (steps[-1] - steps[0]) <= MAY_GROW
        and all(half[-1][k] - half[0][k] <= MAY_OPEN for k in (2, 3)),
    }


def main() -> None:
    """Train, watch and print."""
    parser = argparse.ArgumentParser(description="watch memory and descriptors over a long run")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--local", action="store_true", help="in one process")
    o = parser.parse_args()
    job = Job.load(
        None,
        [
            *("topology.agents=2", "topology.edges=[[a1, a2]]", "topology.d=2", "model.layers=1"),
            *("data.split.kind=auto", "data.train_samples=640", "data.test_samples=64"),
            *("training.batch_size=32", f"training.epochs={-(-o.steps // 20)}"),
            *("training.eval_every=10", "training.checkpoint_every=10"),
        ],
    )
    watch, start = Watch(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        summary = hdnn_dist.train(job, run=Path(folder) / "run", local=o.local, listeners=[watch])
    found = {name: figures(seen) for name, seen in watch.seen.items()}
    seconds = round(time.monotonic() - start)
    print(json.dumps({"steps": summary.steps, "seconds": seconds, "USS": found}))
    sys.exit(not all(each["flat"] for each in found.values()))


if __name__ == "__main__":
    main()
