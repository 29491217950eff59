"""Kill random actors, worker processes and nodes of a job, and compare it to an undisturbed one.

    python -m tests.chaos --kills 20 --seed 0

Four raylets on this machine; one line of JSON in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

import hdnn_dist
from hdnn_dist.cluster import RayRunner
from hdnn_dist.errors import LostError
from hdnn_dist.job import Job
from hdnn_dist.trainer import Listener, Runner

KINDS = ("actor", "process", "node")


class Killer(Listener):
    """Some time after each start, kills something; leaves the run alone after so many kills."""

    def __init__(self, cluster: Cluster, kills: int, seed: int) -> None:
        self.cluster, self.left, self.random = cluster, kills, random.Random(seed)
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        self.killed: Counter[str] = Counter()
        self.killed_at = 0.0
        self.detected: list[float] = []
        self.back: list[float] = []
        self.lost_steps: list[int] = []
        self.reached = 0

    def started(self, runner: Runner, step: int) -> None:
        assert isinstance(runner, RayRunner)
        if self.killed_at:
            self.back.append(time.monotonic() - self.killed_at)
            self.lost_steps.append(self.reached - step)
        if self.left:
            self.left -= 1
            delay = self.random.uniform(0.1, 1.5)
            threading.Timer(delay, self.kill, (runner, self.random.choice(KINDS))).start()

    def kill(self, runner: RayRunner, kind: str) -> None:
        actor = self.random.choice(runner._actors)
        if kind == "process":
            pid = ray.get(actor.__ray_call__.options(concurrency_group="health").remote(_pid))
        self.killed[kind] += 1
        self.killed_at = time.monotonic()
        if kind == "actor":
            ray.kill(actor)
        elif kind == "process":
            os.kill(pid, signal.SIGKILL)
        else:
            node = self.nodes.pop(self.random.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)

    def stepped(self, results: object, progress: hdnn_dist.trainer.Progress) -> None:
        self.reached = progress.step

    def lost(self, cause: LostError, restart: int) -> None:
        self.detected.append(time.monotonic() - self.killed_at)
        while len(self.nodes) < 3:  # only the main thread may start one
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        print(f"{restart}: {cause}", flush=True)


def _pid(_: object) -> int:
    return os.getpid()


def main() -> None:
    """Run, compare and print."""
    parser = argparse.ArgumentParser(description="kill parts of a job at random")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=300)
    o = parser.parse_args()
    job = Job.load(
        None,
        [
            *("topology.agents=6", "topology.edges.args.n=6", "topology.d=2", "model.layers=2"),
            *("data.split.kind=auto", "data.train_samples=320", "training.batch_size=32"),
            *(f"training.epochs={o.epochs}", "training.eval_every=100"),
            *("cluster.agents_per_actor=2", "cluster.placement=spread", "cluster.timeout=20"),
            f"cluster.max_restarts={3 * o.kills}",
        ],
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    killer = Killer(cluster, o.kills, o.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        disturbed = hdnn_dist.train(job, run=Path(folder) / "disturbed", listeners=[killer])
        seconds = time.monotonic() - start
        ray.shutdown()
        cluster.shutdown()
        quiet = hdnn_dist.train(job, run=Path(folder) / "quiet", local=True)
        weights = [hdnn_dist.load(summary.run).state_dict() for summary in (disturbed, quiet)]
    equal = all(torch.equal(weights[0][name], w) for name, w in weights[1].items())
    print(
        json.dumps(
            {
                "kills": dict(killer.killed),
                "restarts": disturbed.restarts,
                "equal": equal and disturbed.test_loss == quiet.test_loss,
                "most steps lost": max(killer.lost_steps, default=0),
                "steps a checkpoint": job.steps_per_epoch,
                "seconds to detection, most": round(max(killer.detected, default=0), 1),
                "seconds until it trains again, most": round(max(killer.back, default=0), 1),
                "seconds": round(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
