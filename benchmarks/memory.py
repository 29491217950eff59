"""Peak memory and time over the depth, with states stored and with states recomputed.

    python benchmarks/memory.py        # about three minutes

Each cell is a process of its own: the highest resident memory of two training passes, less that of
the process with everything imported and a sample run, and less twice the weights (their gradients
are as large). `Layers` is H2 with 64 features on a batch of 4096; `agents` is a training step of
four agents on a ring, d = 32, digits in batches of 512, in one process, with plain SGD.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence

import torch
from timing import machine

import hdnn_dist
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner

WHAT = ("Layers", "agents")
MODES = ("store", "recompute")


def layers(depth: int, activations: str, batch: int = 4096) -> tuple[Callable[[], object], int]:
    """A forward and backward pass of `Layers`, and the bytes of its weights."""
    net = hdnn_dist.Layers("H2", 64, depth, 4 / depth, activations=activations)
    y = torch.randn(batch, 64)

    def step() -> None:
        net.zero_grad()
        net(y).square().sum().backward()

    return step, sum(w.nbytes for w in net.parameters())


def agents(depth: int, activations: str, batch: int = 512) -> tuple[Callable[[], object], int]:
    """A training step of agents, and the bytes of their weights."""
    job = Job.load(
        {
            "topology": {"d": 32, "edges": {"generator": "cycle_graph", "args": {"n": 4}}},
            "model": {"layers": depth, "h": 4 / depth},
            "training": {
                "batch_size": batch,
                "activations": activations,
                "optimizer": {"name": "sgd", "momentum": 0},
            },
        }
    )
    runner = LocalRunner(job)
    runner.worker.load_data()
    return lambda: runner.train(1), job.parameters * job.dtype.itemsize


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cell(what: str, depth: int, activations: str) -> None:
    """Print the peak above the imports and the weights in MB, and the CPU seconds of a step."""
    torch.set_num_threads(1)
    make = layers if what == "Layers" else agents
    make(1, activations, 1)[0]()
    before = peak()
    step, weights = make(depth, activations)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    print((peak() - before - 2 * weights) / 1e6, min(seconds))


def measured(what: str, depth: int, activations: str) -> tuple[float, float]:
    """`cell` in a process of its own."""
    call = [sys.executable, __file__, "--cell", what, str(depth), activations]
    out = subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()
    return float(out[0]), float(out[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = ArgumentParser(description="peak memory and time over the depth")
    parser.add_argument("--depths", nargs="+", type=int, default=(16, 1024))
    parser.add_argument("--cell", nargs=3, metavar=("WHAT", "DEPTH", "MODE"))
    o = parser.parse_args(argv)
    if o.cell:
        return cell(o.cell[0], int(o.cell[1]), o.cell[2])
    torch.set_num_threads(1)
    print(machine())
    print("\n| what | layers | store MB | recompute MB | store s | recompute s | time ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for what in WHAT:
        for depth in o.depths:
            (store, s), (again, r) = (measured(what, depth, mode) for mode in MODES)
            print(
                f"| {what} | {depth} | {store:.1f} | {again:.1f} "
                f"| {s:.3f} | {r:.3f} | {r / s:.2f} |"
            )
    return None


if __name__ == "__main__":
    main()
