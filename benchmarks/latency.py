"""Wall time a training step where messages between two sites take long, with one copy and several.

    python benchmarks/latency.py                  # 0, 1, 10, 50 ms; one copy and two; three minutes
    python benchmarks/latency.py --sizes 16x64x1024 --ms 10 --copies 1 2 4 8

A size is agents x d x batch. So many agents in two rows learn digits in two actors, each of them
held to a core of its own, as if that were its site's machine. The copies of an actor
(cluster.replicas) share its core, so that they are micro-batches: while the messages of one are
under way, another computes. Frames go by gloo, and each is held back where it arrives until its
time has passed since it was sent: that is done here, by a wire in place of gloo's, and is nothing
that the package can do.
"""

from __future__ import annotations

import os
import struct
import time
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import ExitStack, closing
from statistics import median
from types import SimpleNamespace

import ray
import torch
from timing import machine

from hdnn_dist.actor import AgentActor
from hdnn_dist.cluster import RayRunner
from hdnn_dist.job import Job
from hdnn_dist.placement import hosts
from hdnn_dist.transport import PointToPoint
from hdnn_dist.wires import STAMP, Frame, Gloo


class Late(Gloo):
    """Frames are there `latency` seconds after they were sent, at the earliest.

    The time of sending follows the frame, where its receiver has room to spare. One machine has one
    clock.
    """

    latency = 0.0

    def post(self, outbound: Mapping[int, Frame], inbound: Mapping[int, Frame]) -> None:
        """See `Wire`; so too below."""
        self._awaited = list(inbound.values())
        now = torch.tensor([time.monotonic()], dtype=torch.float64).view(torch.uint8)
        self._stamped = {
            rank: SimpleNamespace(bytes=torch.cat([frame.bytes, now]))
            for rank, frame in outbound.items()
        }
        super().post(self._stamped, inbound)  # type: ignore[arg-type]

    def wait(self) -> None:  # noqa: D102
        super().wait()
        for frame in self._awaited:
            when = slice(frame.stop + STAMP, frame.stop + STAMP + 8)
            [sent] = struct.unpack("=d", frame.view[when])
            frame.view[when] = frame.guard[STAMP : STAMP + 8]
            time.sleep(max(0.0, sent + self.latency - time.monotonic()))


def settle(actor: AgentActor, core: int) -> None:
    """Hold an actor to a core, and its messages back."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    assert isinstance(actor.worker.transport, PointToPoint)
    actor.worker.transport._far = Late()


def delay(actor: AgentActor, seconds: float) -> None:
    """From now on."""
    actor.worker.transport._far.latency = seconds  # type: ignore[attr-defined]


def start(size: str, copies: int) -> RayRunner:
    """So many copies of both actors."""
    agents, d, batch = map(int, size.split("x"))
    names = ", ".join(f"{{name: a{i}, cpu: 0}}" for i in range(agents))  # so that all fit at once
    settings = [
        *(f"topology.agents=[{names}]", "topology.edges.generator=grid_2d_graph"),
        *(f"topology.edges.args={{m: 2, n: {agents // 2}}}", f"topology.d={d}"),
        *("data.split.kind=auto", f"training.batch_size={batch}", "model.layers=4"),
        *(f"cluster.agents_per_actor={agents // 2}", f"cluster.replicas={copies}"),
        "cluster.wire=gloo",
    ]
    runner = RayRunner(Job.load(None, settings))
    each(runner, settle, [rank % 2 for rank in range(2 * copies)])
    return runner


def each(runner: RayRunner, what: object, values: list[object]) -> None:
    """Have each actor do something with its value."""
    calls = zip(runner._actors, values, strict=True)
    ray.get([actor.__ray_call__.remote(what, value) for actor, value in calls])


def main() -> None:
    """Print Markdown tables."""
    parser = ArgumentParser(description="wall time a step with latency between two sites")
    parser.add_argument("--sizes", nargs="+", default=["2x128x512", "16x64x1024"])
    parser.add_argument("--ms", type=float, nargs="+", default=[0, 1, 10, 50])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    o = parser.parse_args()
    torch.set_num_threads(1)  # as the actors have
    print(f"{machine()}; medians of {o.turns} turns of {o.steps} steps\n")
    print("| agents x d x batch | latency, ms | copies | ms a step | least, most | times faster |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for size in o.sizes:
        with ExitStack() as stack:
            runners = {n: stack.enter_context(closing(start(size, n))) for n in o.copies}
            job, host = runners[o.copies[0]].job, hosts(runners[o.copies[0]].packing)
            for runner in runners.values():
                runner.train(o.steps)
            for ms in o.ms:
                times: dict[int, list[float]] = {n: [] for n in runners}
                for runner in runners.values():
                    each(runner, delay, [ms / 1e3] * len(runner._actors))
                for _ in range(o.turns):
                    for n, runner in runners.items():
                        begun = time.perf_counter()
                        runner.train(o.steps)
                        times[n].append((time.perf_counter() - begun) / o.steps)
                first = median(times[o.copies[0]])
                for n, seconds in times.items():
                    print(
                        f"| {size} | {ms:g} | {n} | {1e3 * median(seconds):.1f} "
                        f"| {1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f} "
                        f"| {first / median(seconds):.2f} |",
                        flush=True,
                    )
            rounds = job.plan.training_step
            apart = [any(host[m.source] != host[m.target] for m in r.messages) for r in rounds]
            print(
                f"{size}: {sum(apart)} of {len(rounds)} rounds pass between the sites", flush=True
            )


if __name__ == "__main__":
    main()
