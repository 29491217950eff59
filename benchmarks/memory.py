"""Peak memory and time over the depth, with states stored and with states recomputed.

    python benchmarks/memory.py        # about three minutes

Each cell is a process of its own: the highest resident memory of two training steps, less what the
process holds before them, the weights and their gradients included. Linux only. `Layers` is H2 with
64 features on a batch of 4096; `agents` is a training step of four agents on a ring, d = 32, digits
in batches of 512, in one process, with plain SGD.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timing import machine

import hdnn_dist
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner

WHAT = ("Layers", "agents")
MODES = ("store", "recompute")


def layers(depth: int, activations: str, batch: int = 4096) -> Callable[[], object]:
    """A forward and backward pass of `Layers`."""
    net = hdnn_dist.Layers("H2", 64, depth, 4 / depth, activations=activations)
    y = torch.randn(batch, 64)
    for w in net.parameters():
        w.grad = torch.ones_like(w)

    def step() -> None:
        net.zero_grad()
        net(y).square().sum().backward()

    return step


def agents(depth: int, activations: str, batch: int = 512) -> Callable[[], object]:
    """A training step of agents."""
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
    for agent in runner.worker.agents.values():
        for gradient in agent.node.gradients.values():
            gradient.fill_(1)  # memory that is only asked for is not there yet
    return lambda: runner.train(1)


def peak() -> int:
    """The highest resident memory of this process since `forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    """Give back what is free, and have the highest memory be the present one."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def cell(what: str, depth: int, activations: str) -> None:
    """Print the peak of the steps in MB, and the CPU seconds of one."""
    torch.set_num_threads(1)
    make = layers if what == "Layers" else agents
    make(1, activations, 1)()
    step = make(depth, activations)
    forget_peak()
    before = peak()
    seconds = []
    for _ in range(2):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    print((peak() - before) / 1e6, min(seconds))


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
