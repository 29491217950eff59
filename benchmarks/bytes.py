"""What a training step sends, against the patterns' minimum and data-parallel training.

    python benchmarks/bytes.py --data-dir FOLDER_OF_THE_IDX_FILES                # a minute
    python benchmarks/bytes.py --data-dir FOLDER_OF_THE_IDX_FILES --epochs 3     # and accuracies

`topologies/mnist-grid16.yaml` in one process, its messages in each type. `least` is counted from
the graph alone: for each half step a state along each edge and a pull-back against it, for either
its cotangent the other way, and along the tree the scores and their cotangent. DDP is torch's on
the dense model of the same job; what it gives to its all-reduce is counted, and in a ring of R
workers each sends 2 (R - 1) / R of that. The zeros are blocks that the graph leaves out.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hdnn_dist
from hdnn_dist.job import Job
from hdnn_dist.placement import hosts, pack
from hdnn_dist.spec import ClusterSpec
from hdnn_dist.trainer import LocalRunner

SPEC = Path(__file__).parents[1] / "topologies" / "mnist-grid16.yaml"
TYPES = {"full": 4, "bf16": 2, "fp16": 2}


def least(job: Job, itemsize: int) -> dict[tuple[int, int], int]:
    """Bytes that must cross each edge in a step, where K alone has the graph."""
    sizes, tree = job.architecture.sizes, job.architecture.tree
    column = itemsize * job.batch
    found: dict[tuple[int, int], int] = {}
    for l, i in job.topology.edges:  # i uses l's state: it comes, and its pull-back goes, and bars
        both = 2 * job.architecture.patterns.layers * 2 * sizes[l] * column
        for way in (l, i), (i, l):
            found[way] = found.get(way, 0) + both
    for child, parent in (edge for level in tree.levels for edge in level):
        for way in (child, parent), (parent, child):
            found[way] = found.get(way, 0) + job.architecture.outputs * column
    return found


def all_reduced(job: Job) -> int:
    """Bytes that DDP gives to its all-reduce in a step of one worker."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1
        )
        net = DistributedDataParallel(hdnn_dist.HDNN(job.architecture))
        counted: list[int] = []

        def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            counted.append(bucket.buffer().nbytes)
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        # DDP compares these as values, not as text.
        hook.__annotations__.update(
            {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
        )
        net.register_comm_hook(None, hook)
        x, labels = torch.randn(8, job.data.features), torch.arange(8)
        F.cross_entropy(net(x), labels).backward()
        dist.destroy_process_group()
    return sum(counted)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = ArgumentParser(description="what a training step sends")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the MNIST files")
    parser.add_argument("--epochs", type=int, default=0, help="of training, for the accuracies")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    o = parser.parse_args(argv)

    def job_of(**training: Any) -> Job:
        changes = [f"training.{key}={value}" for key, value in training.items()]
        return Job.load(SPEC, [f"data.dir={o.data_dir.absolute()}", *changes])

    print("| messages | edges | bytes an edge, least and most | over the least | a step |")
    print("|---|---:|---:|---:|---:|")
    for messages, itemsize in TYPES.items():
        job = job_of(messages=messages)
        runner = LocalRunner(job)
        runner.train(1)
        sent, minimum = runner.sent(), least(job, itemsize)
        over = sum(abs(sent.get(way, 0) - minimum.get(way, 0)) for way in sent | minimum)
        print(
            f"| {messages} | {len(sent)} | {min(sent.values()):,} to {max(sent.values()):,} "
            f"| {over} | {sum(sent.values()):,} |"
        )

    job = job_of()
    gradient = all_reduced(job)
    sent = job.traffic(job.plan.training_step)
    print(
        f"\n{job.parameters:,} parameters; DDP all-reduces {gradient:,} bytes a step, "
        f"batch {job.batch}\n"
    )
    print("| workers | DDP | DDP without the zeros | between so many actors | ratios |")
    print("|---:|---:|---:|---:|---:|")
    for R in 2, 16:
        packing = pack(job.topology, ClusterSpec(agents_per_actor=16 // R), R)
        host = hosts(packing)
        crossing = sum(n for (a, b), n in sent.items() if host[a] != host[b])
        ring, packed = (2 * (R - 1) * n for n in (gradient, 4 * job.parameters))
        print(
            f"| {R} | {ring:,} | {packed:,} | {crossing:,} "
            f"| {crossing / ring:.2f}, {crossing / packed:.2f} |"
        )

    if o.epochs:
        print(f"\n| messages | {' | '.join(f'seed {seed}' for seed in o.seeds)} |")
        print("|---|" + "---:|" * len(o.seeds))
        for messages in TYPES:
            cells = []
            for seed in o.seeds:
                job = job_of(messages=messages, seed=seed, epochs=o.epochs)
                with tempfile.TemporaryDirectory() as folder:
                    done = hdnn_dist.train(job, run=Path(folder) / "run", local=True)
                cells.append(f"{100 * done.test_accuracy:.2f} %, loss {done.test_loss:.4f}")
            print(f"| {messages} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
