"""Training steps on a GPU: the engine's stack, and agents in one process, from one run.

    python benchmarks/gpu.py --data-dir FOLDER_OF_THE_IDX_FILES      # about two minutes

The stack is that of `benchmarks/engine.py`, launched operation by operation and as a CUDA graph.
The agents are those of `topologies/mnist-grid16.yaml`, with other sizes and batches, on the CPU and
on the GPU, there operation by operation and with forward and backward pass as a CUDA graph: one
agent after the other, and side by side, which is how they run. `--only` is for one of the two.
Errors are of the cotangent of the first state, against the first formulation. Products are in
float32 without TF32; `--tf32` is for the other case. Rates count the operations on non-zero blocks
against a large product of the same type on the same GPU.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from engine import SIZES, Size, chosen, contestants
from timing import Call, alternated, machine, product_rate

from hdnn_dist.capture import Captured, cuda_graph
from hdnn_dist.cost import work_of
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner
from hdnn_dist.transport import InProcess
from hdnn_dist.worker import Worker

SPEC = Path(__file__).parents[1] / "topologies" / "mnist-grid16.yaml"
STACKS = {name: SIZES[name] for name in ("16x64x125", "128x16x128", "256x8x512")} | {
    "2048x8x4096": Size(2048, 8, 4096),
    "8192x4x2048": Size(8192, 4, 2048, agents=64, with_reference=False),
}
AGENTS = ((16, 256), (16, 4096), (64, 1024), (256, 4096))  # d, batch


def clock() -> float:
    """Seconds by the wall when all that was launched is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def stacks(turns: int, peak: float) -> None:
    """Print the table of stacks."""
    print(
        "| features x layers x batch | formulation | launched one by one, ms | as a graph, ms "
        "| times faster than masked | of the rate | over dense x density | relative error |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|"
    )
    for name, size in STACKS.items():
        with torch.device("cuda"):
            calls = contestants(size)
        found = {key: call() for key, call in calls.items()}
        first = next(iter(found.values()))
        errors = {key: float((x - first).norm() / first.norm()) for key, x in found.items()}
        del found, first
        eager = alternated(calls, turns, clock, 3)
        recorded = {key: cuda_graph(call) for key, call in calls.items()}
        graphs = alternated(recorded, turns, clock, 10)
        density = size.pattern.nnz / size.pattern.size**2
        best = chosen(size, torch.device("cuda"))
        for key, seconds in graphs.items():
            ratio = f"{graphs['masked'] / seconds:.2f}" if "masked" in graphs else "-"
            print(
                f"| {name} | {key}{'*' * (key == best)} | {eager[key] * 1e3:.3f} "
                f"| {seconds * 1e3:.3f} | {ratio} | {size.flops / seconds / peak:.1%} "
                f"| {seconds / graphs['dense'] / density:.2f} | {errors[key]:.0e} |",
                flush=True,
            )
        del calls, recorded
        torch.cuda.empty_cache()


def agents(data_dir: Path, turns: int, peak: float) -> None:
    """Print the table of agents."""
    print("| d | batch | what | ms a step | samples/s | of the rate |")
    print("|---:|---:|---|---:|---:|---:|")
    for d, batch in AGENTS:

        def runner(device: str, d: int = d, batch: int = batch) -> LocalRunner:
            settings = f"topology.d={d}", f"training.batch_size={batch}", f"cluster.device={device}"
            return LocalRunner(Job.load(SPEC, [f"data.dir={data_dir.absolute()}", *settings]))

        calls: dict[str, Call] = {}
        if d * d * batch <= 16 * 16 * 4096:
            calls["CPU, 1 thread"] = partial(ready(runner("cpu")).train, 1)
        worker = ready(runner("cuda"))
        calls["GPU, one by one"] = partial(step, worker)
        for how, side_by_side in ("in turn", False), ("side by side", True):
            worker = ready(runner("cuda"))  # of its own: a graph draws for the step that comes next
            assert isinstance(worker.transport, InProcess)
            with torch.no_grad():
                worker._captured = Captured(
                    worker.agents,
                    worker.transport,
                    worker.job.plan.differentiation,
                    step=0,
                    side_by_side=side_by_side,
                )
            calls[f"GPU, graph, {how}"] = partial(step, worker)
            calls[f"of it, the graph, {how}"] = worker._captured._replay
        calls["drawing, meanwhile"] = partial(draw, worker)
        times = alternated(calls, turns, clock, 4)
        flops = sum(f * n for work in work_of(worker.job) for f, n in work.products.items())
        for name, seconds in times.items():
            share = f"{flops / seconds / peak:.1%}" if name.startswith("GPU") else "-"
            print(
                f"| {d} | {batch} | {name} | {seconds * 1e3:.2f} | {batch / seconds:,.0f} "
                f"| {share} |",
                flush=True,
            )


def ready(runner: LocalRunner) -> Worker:
    """Its worker, with its data read."""
    runner.worker.load_data()
    return runner.worker


def step(worker: Worker) -> None:
    """Take a training step, with a recorded graph if there is one."""
    worker._may_capture = False
    worker.train(1)


def draw(worker: Worker) -> None:
    """Have all agents draw the batch of the step that comes next."""
    for agent in worker.agents.values():
        agent.draw(worker.step)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = ArgumentParser(description="training steps on a GPU")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the MNIST files")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=("stacks", "agents"))
    parser.add_argument("--tf32", action="store_true", help="products with TF32")
    o = parser.parse_args(argv)
    if o.tf32:
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    with torch.device("cuda"):
        peak = product_rate(8192, 5, clock)
    print(
        f"{torch.cuda.get_device_name()}; {machine()}; float32{' by TF32' * o.tf32}; "
        f"product of 8192: {peak / 1e12:.1f} TFLOP/s; medians of {o.turns} turns\n"
    )
    if o.only != "agents":
        stacks(o.turns, peak)
        print()
    if o.only != "stacks":
        agents(o.data_dir, o.turns, peak)


if __name__ == "__main__":
    main()
