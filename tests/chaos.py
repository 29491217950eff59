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

import psutil
import ray
import torch
from ray.cluster_utils import Cluster

import hdnn_dist
from hdnn_dist.cluster import RayRunner
from hdnn_dist.errors import LostError
from hdnn_dist.job import Job
from hdnn_dist.trainer import Listener, Progress, Runner

KINDS = ("actor", "process", "node", "stopped process")


class Killer(Listener):
    """Some time after each start, kills something; leaves the run alone after so many kills."""

    def __init__(self, cluster: Cluster, kills: int, seed: int) -> None:
        self.cluster, self.left, self.random = cluster, kills, random.Random(seed)
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        self.lock = threading.Lock()  # the cluster is changed by one thread at a time
        self.timer: threading.Timer | None = None
        self.killed: Counter[str] = Counter()
        self.killed_at = 0.0
        self.detected: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.back: list[float] = []
        self.lost_steps: list[int] = []
        self.kind, self.reached, self.stopped = "", 0, list[int]()

    def started(self, runner: Runner, step: int) -> None:
        assert isinstance(runner, RayRunner)
        if self.killed_at:
            self.back.append(time.monotonic() - self.killed_at)
            self.lost_steps.append(self.reached - step)
        if self.left:
            self.left -= 1
            self.kind, delay = self.random.choice(KINDS), self.random.uniform(0.1, 1.5)
            self.timer = threading.Timer(delay, self.kill, (runner, self.random.randrange(3)))
            self.timer.start()

    def kill(self, runner: RayRunner, victim: int) -> None:
        actor = runner._actors[victim]
        if self.kind.endswith("process"):
            call = actor.__ray_call__.options(concurrency_group="health")
            pid = ray.get(call.remote(lambda _: os.getpid()))
        with self.lock:
            self.killed[self.kind] += 1
            self.killed_at = time.monotonic()
            if self.kind == "actor":
                ray.kill(actor)
            elif self.kind == "process":
                os.kill(pid, signal.SIGKILL)
            elif self.kind == "stopped process":
                self.stopped.append(pid)
                os.kill(pid, signal.SIGSTOP)
            else:
                node = next(n for n in self.nodes if n.node_id[:8] in runner._nodes[victim])
                self.nodes.remove(node)
                self.cluster.remove_node(node, allow_graceful=False)

    def stepped(self, results: object, progress: Progress) -> None:
        self.reached = progress.step
        if self.timer is not None and progress.step > 0.8 * progress.steps:
            self.timer.join()  # the run is not to end before its last kill

    def lost(self, cause: LostError, restart: int) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()
        with self.lock:
            self.detected[self.kind].append(time.monotonic() - self.killed_at)
            while len(self.nodes) < 3:  # only the main thread may start one
                self.nodes.append(self.cluster.add_node(num_cpus=1))
        print(f"{restart}, {self.kind}: {cause}", flush=True)


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
            *("cluster.agents_per_actor=2", "cluster.placement=spread", "cluster.timeout=15"),
            f"cluster.max_restarts={3 * o.kills}",
        ],
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    killer = Killer(cluster, o.kills, o.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        disturbed = hdnn_dist.train(job, run=Path(folder) / "disturbed", listeners=[killer])
        seconds = time.monotonic() - start
        ray.shutdown()
        cluster.shutdown()
        left_over = [pid for pid in killer.stopped if psutil.pid_exists(pid)]
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
                "seconds to detection, most": {
                    kind: round(max(times), 1) for kind, times in killer.detected.items() if times
                },
                "seconds until it trains again, most": round(max(killer.back, default=0), 1),
                "stopped processes left over": len(left_over),
                "seconds": round(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
