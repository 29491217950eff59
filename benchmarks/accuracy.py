"""Time to an accuracy on MNIST: agents, the same model by data-parallel torch, and dense.

    python benchmarks/accuracy.py --data-dir FOLDER_OF_THE_IDX_FILES

The job is `topologies/mnist-grid16.yaml`: 16 agents on a grid, 7x7 pixels each. One after the
other, from the same initial weights, with the same order of samples, batches, shifts of pixels and
learning rates:

    DDP           the dense model in two processes, half a batch each, gradients averaged by gloo
    Ray Train     the same two processes, set up by its TorchTrainer (if `ray[train]` is installed)
    dense         the dense model in this process, two threads
    one process   all agents in this process, one thread
    2 actors      8 agents in each of two Ray actors
    16 actors     one agent in each

Times are of training steps alone, by the clock of the wall: neither starts nor evaluations, which
follow every epoch.
"""

from __future__ import annotations

import importlib.util
import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from timing import machine
from torch import multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hdnn_dist
from hdnn_dist.data import (
    background,
    epoch_order,
    load_features,
    load_labels,
    shift_images,
    shifts,
)
from hdnn_dist.optimization import build_optimizer, learning_rate

SPEC = Path(__file__).parents[1] / "topologies" / "mnist-grid16.yaml"
WORKERS = 2
Epoch = tuple[float, float]  # seconds of training, test accuracy after it


def agents(job: hdnn_dist.Job, local: bool = False) -> Iterator[Epoch]:
    """Every agent with its own part, by messages."""
    with closing(hdnn_dist.launch(job, local=local)) as runner:
        for _ in range(job.spec.training.epochs):
            start = time.perf_counter()
            runner.train(job.steps_per_epoch)
            yield time.perf_counter() - start, runner.evaluate().accuracy


def dense(job: hdnn_dist.Job, rank: int = 0, size: int = 1) -> Iterator[Epoch]:
    """The dense model on every `size`-th sample of each batch, gradients averaged."""
    spec, training = job.spec.data, job.spec.training
    black = background(spec.name)
    x, test = (
        torch.from_numpy(load_features(spec, part, range(job.data.features)))
        for part in ("train", "test")
    )
    labels, answers = (torch.from_numpy(load_labels(spec, part)) for part in ("train", "test"))
    model = hdnn_dist.HDNN(job.architecture, job.dtype, fast=True)
    net: nn.Module = model if size == 1 else DistributedDataParallel(model)
    optimizer = build_optimizer(training.optimizer, model.parameters())
    for epoch in range(training.epochs):
        order = torch.from_numpy(epoch_order(training.seed, epoch, job.data.train))
        start = time.perf_counter()
        for k in range(job.steps_per_epoch):
            step = epoch * job.steps_per_epoch + k
            index = order[k * job.batch : (k + 1) * job.batch][rank::size]
            moves = shifts(training.seed, step, job.batch, training.shift)[rank::size]
            seen = x[index]
            for view in job.views:
                assert view.image is not None
                columns = list(view.columns)
                part = shift_images(seen[:, columns].numpy(), view.image, moves, black)
                seen[:, columns] = torch.from_numpy(part)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    training.schedule,
                    training.optimizer.lr,
                    step,
                    job.steps,
                    job.steps_per_epoch,
                )
            optimizer.zero_grad()
            F.cross_entropy(net(seen), labels[index]).backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            right = sum(
                int((model(rows).argmax(1) == classes).sum())
                for rows, classes in zip(test.split(1000), answers.split(1000), strict=True)
            )
        yield seconds, right / len(test)


def data_parallel(job: hdnn_dist.Job) -> Iterator[Epoch]:
    """`dense` in several processes that average their gradients."""
    with TemporaryDirectory() as folder:
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        workers = multiprocessing.spawn(
            _data_parallel_worker, (job.spec, f"{folder}/store", queue), WORKERS, join=False
        )
        for _ in range(job.spec.training.epochs):
            yield queue.get()
        workers.join()


def _data_parallel_worker(rank: int, spec: Any, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORKERS)
    for epoch in dense(hdnn_dist.Job.of(spec), rank, WORKERS):
        if rank == 0:
            queue.put(epoch)
    dist.destroy_process_group()


def by_ray_train(job: hdnn_dist.Job) -> Iterator[Epoch]:
    """`data_parallel` in processes that Ray Train starts."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address="local")  # else it joins whatever Ray ran here last
    with TemporaryDirectory() as folder:
        TorchTrainer(
            _ray_train_worker,
            train_loop_config={"spec": job.spec, "out": f"{folder}/epochs"},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        ray.shutdown()
        yield from (tuple(epoch) for epoch in json.loads(Path(folder, "epochs").read_text()))


def _ray_train_worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank = dist.get_rank()
    epochs = list(dense(hdnn_dist.Job.of(config["spec"]), rank, WORKERS))
    if rank == 0:
        Path(config["out"]).write_text(json.dumps(epochs))


def with_threads(threads: int, epochs: Callable[[], Iterator[Epoch]]) -> Iterator[Epoch]:
    """The epochs, with so many threads in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield from epochs()
    torch.set_num_threads(before)


def main() -> None:
    """Print a Markdown table."""
    parser = ArgumentParser(description="seconds to an accuracy on MNIST")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the MNIST files")
    parser.add_argument("--accuracy", type=float, default=0.985, help="to be reached")
    parser.add_argument("--epochs", type=int, default=6, help="of the schedule")
    o = parser.parse_args()

    def job(per_actor: int) -> hdnn_dist.Job:
        return hdnn_dist.Job.load(
            SPEC,
            [
                f"data.dir={o.data_dir.absolute()}",
                f"training.epochs={o.epochs}",
                f"cluster.agents_per_actor={per_actor}",
            ],
        )

    contestants: dict[str, Callable[[], Iterator[Epoch]]] = {
        f"DDP, {WORKERS} processes": lambda: data_parallel(job(1)),
        f"Ray Train, {WORKERS} processes": lambda: by_ray_train(job(1)),
        f"dense, one process, {WORKERS} threads": lambda: with_threads(
            WORKERS, lambda: dense(job(1))
        ),
        "16 agents, one process, 1 thread": lambda: agents(job(16), local=True),
        "16 agents, 2 actors": lambda: agents(job(8)),
        "16 agents, 16 actors": lambda: agents(job(1)),
    }
    if importlib.util.find_spec("pandas") is None:  # ray.train cannot do without
        del contestants[f"Ray Train, {WORKERS} processes"]
    print(machine(), end="\n\n")
    print(
        f"| what | epochs to {o.accuracy:.1%} | seconds | of DDP's | seconds an epoch "
        f"| after {o.epochs} epochs |\n|---|---:|---:|---:|---:|---:|",
        flush=True,
    )
    ddp = None
    for name, run in contestants.items():
        epochs = list(run())
        cells, reached = ["never", "-", "-"], _reached(epochs, o.accuracy)
        if reached is not None:
            count, seconds = reached
            ddp = ddp or seconds  # it comes first
            cells = [str(count), f"{seconds:.1f}", f"{seconds / ddp:.2f}"]
        each = sum(seconds for seconds, _ in epochs) / len(epochs)
        print(f"| {name} | {' | '.join(cells)} | {each:.1f} | {epochs[-1][1]:.2%} |", flush=True)


def _reached(epochs: list[Epoch], accuracy: float) -> tuple[int, float] | None:
    """After how many epochs and seconds an accuracy was first there."""
    seconds = 0.0
    for count, (more, found) in enumerate(epochs, 1):
        seconds += more
        if found >= accuracy:
            return count, seconds
    return None


if __name__ == "__main__":
    main()
