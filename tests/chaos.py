"""Kill or stop random actors, processes and machines of a job; compare it to an undisturbed one.

    python -m tests.chaos --kills 30 --seed 0

Four raylets on this machine; a line a loss, and one of JSON in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import ray
import ray.exceptions
import torch
from ray.cluster_utils import Cluster

import hdnn_dist
from hdnn_dist.cluster import RayRunner
from hdnn_dist.errors import LostError
from hdnn_dist.job import Job
from hdnn_dist.trainer import Listener, Progress, Runner
from tests.processes import machine

DEATHS = ("actor", "process", "raylet", "machine")  # a machine: a raylet and all below it at once
STOPS = ("stopped process", "stopped machine")
REPORT = re.compile(
    r"(step \d+|steps \d+ to \d+|after step \d+): (the actor of agents .+ on node \S+ \(\w{8}\)) "
    r"(died: .+|did not answer: .+)"
)


class Killer(Listener):
    """Some time after each start, kills something; leaves the run alone after so many kills.

    A machine that is killed or stopped is replaced by a new one. Who was stopped stays so, while
    the run goes on without it.
    """

    def __init__(self, cluster: Cluster, kills: int, seed: int) -> None:
        self.cluster, self.random = cluster, random.Random(seed)
        self.plan: list[str] = []
        while len(self.plan) < kills:
            self.plan += self.random.sample(DEATHS + STOPS, len(DEATHS + STOPS))
        del self.plan[kills:]
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        self.lock = threading.Lock()  # the cluster is changed by one thread at a time
        self.timer: threading.Timer | None = None
        self.killed: Counter[str] = Counter()
        self.killed_at = 0.0
        self.victim = ""  # who was killed, until it is told
        self.detected: dict[str, list[float]] = {}
        self.back: dict[str, list[float]] = {}
        self.lost_steps: list[int] = []
        self.misreported: list[str] = []
        self.reached = 0
        self.stopped: list[psutil.Process] = []

    def started(self, runner: Runner, step: int) -> None:
        assert isinstance(runner, RayRunner)
        self.runner = runner
        if self.killed_at:
            self.back.setdefault(self.kind, []).append(time.monotonic() - self.killed_at)
            self.lost_steps.append(self.reached - step)
        self.strike(runner)

    def strike(self, runner: RayRunner) -> None:
        if self.plan:
            self.timer = threading.Timer(self.random.uniform(0.1, 1.5), self.kill, (runner,))
            self.timer.start()

    def kill(self, runner: RayRunner) -> None:
        rank = self.random.randrange(len(runner._actors))  # fewer, while a machine is missing
        actor, who, node_of = runner._actors[rank], runner._who(rank), runner._nodes[rank]
        call = actor.__ray_call__.options(concurrency_group="health")
        try:
            process = psutil.Process(ray.get(call.remote(lambda _: os.getpid()), timeout=10))
            node = next(n for n in self.nodes if n.node_id[:8] in node_of)
        except (ray.exceptions.RayError, psutil.NoSuchProcess, StopIteration) as error:
            print(f"not struck, as it is not there: {who}: {error!r}", flush=True)
            return
        with self.lock:
            self.kind, self.victim = self.plan.pop(), who
            self.killed[self.kind] += 1
            self.killed_at = time.monotonic()
            if self.kind == "actor":
                ray.kill(actor)
                return
            number = signal.SIGSTOP if self.kind in STOPS else signal.SIGKILL
            processes = [process]
            if not self.kind.endswith("process"):
                self.nodes.remove(node)
                processes = machine(node)
                if self.kind == "raylet":
                    del processes[1:]
            for each in processes:
                each.send_signal(number)
            if number == signal.SIGSTOP:
                self.stopped += processes

    def stepped(self, results: object, progress: Progress) -> None:
        self.reached = progress.step
        while progress.step > 0.8 * progress.steps and (self.plan or self.timer):
            assert self.timer is not None  # the run is not to end before its last kill
            self.timer.join()
            if self.victim or not self.plan:
                break
            self.strike(self.runner)  # nobody was struck

    def lost(self, cause: LostError, restart: int) -> None:
        seconds = time.monotonic() - self.killed_at
        if self.timer is not None:
            self.timer.join()
        with self.lock:
            told = REPORT.fullmatch(str(cause))
            if told is None or self.victim not in told[2]:
                self.misreported.append(str(cause))
            self.detected.setdefault(self.kind, []).append(seconds)
            while len(self.nodes) < 3:  # only the main thread may start one
                self.nodes.append(self.cluster.add_node(num_cpus=1))
        print(f"{restart}, {self.kind}, {seconds:.1f} s: {cause}", flush=True)
        self.victim = ""


def spans(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """The least and the most."""
    return {kind: (round(min(s), 1), round(max(s), 1)) for kind, s in seconds.items()}


def main() -> None:
    """Run, compare and print."""
    parser = argparse.ArgumentParser(description="kill parts of a job at random")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
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
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    killer = Killer(cluster, o.kills, o.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        disturbed = hdnn_dist.train(job, run=Path(folder) / "disturbed", listeners=[killer])
        seconds = time.monotonic() - start
        ray.shutdown()
        cluster.shutdown()
        for process in killer.stopped:  # what is stopped heeds SIGKILL alone
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
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
                "seconds to detection": spans(killer.detected),
                "seconds until it trains again": spans(killer.back),
                "misreported": killer.misreported,
                "seconds": round(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
