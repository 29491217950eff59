"""The time of a training step, predicted from the spec and a calibration, and measured.

    python benchmarks/cost.py        # about five minutes

Calibrates this machine first. Configurations are other than those that it is calibrated on, and 0
actors are one process without Ray. Measured is the least of several
means over a second: of the wall with actors, of the processor without. Then
predictions for many agents: on this machine, and on actors of one core each with a network of the
given latency and bandwidth.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from math import isqrt
from statistics import median
from typing import Any

import torch
from timing import machine

from hdnn_dist.calibrate import calibrate, step_seconds
from hdnn_dist.cluster import RayRunner
from hdnn_dist.cost import Calibration, predict
from hdnn_dist.job import Job
from hdnn_dist.placement import pack
from hdnn_dist.spec import ClusterSpec
from hdnn_dist.trainer import LocalRunner

# (graph, its arguments, d, layers, batch, actors, model)
CONFIGURATIONS: tuple[tuple[str, dict[str, Any], int, int, int, int, dict[str, Any]], ...] = (
    ("cycle_graph", {"n": 8}, 8, 8, 125, 0, {}),
    ("grid_2d_graph", {"m": 4, "n": 4}, 4, 4, 32, 0, {}),
    ("grid_2d_graph", {"m": 4, "n": 4}, 32, 6, 128, 0, {}),
    ("random_regular_graph", {"n": 60, "d": 6, "seed": 0}, 8, 2, 64, 0, {}),
    ("star_graph", {"n": 12}, 16, 12, 16, 0, {"name": "MS3"}),
    ("cycle_graph", {"n": 8}, 8, 8, 125, 2, {}),
    ("grid_2d_graph", {"m": 4, "n": 4}, 16, 4, 64, 2, {}),
    ("grid_2d_graph", {"m": 4, "n": 4}, 32, 6, 512, 2, {"graph": "both"}),
    ("random_regular_graph", {"n": 40, "d": 4, "seed": 0}, 4, 4, 32, 2, {"name": "MS1"}),
    ("cycle_graph", {"n": 8}, 4, 6, 32, 4, {}),
    ("grid_2d_graph", {"m": 4, "n": 4}, 16, 4, 256, 4, {}),
    ("path_graph", {"n": 12}, 32, 8, 64, 4, {"name": "H1"}),
)
MANY = (1_000, 10_000, 100_000)


def job_of(
    graph: str, args: dict[str, Any], d: int, layers: int, batch: int, model: dict[str, Any]
) -> Job:
    """A job with digits, 64 of the agents seeing a pixel or a few each."""
    edges = {"generator": graph, "args": args}
    spec = {"topology": {"d": d, "edges": edges}, "training": {"batch_size": batch}}
    M = args["m"] * args["n"] if "m" in args else args["n"] + (graph == "star_graph")
    seers = [f"a{1 + k * M // min(M, 64)}" for k in range(min(M, 64))]
    split = {"split": {"kind": "auto", "agents": seers}}
    return Job.load({**spec, "data": split, "model": {"layers": layers, "h": 0.2, **model}})


def packed(job: Job, actors: int, cores: int) -> tuple[tuple[int, ...], ...]:
    """The packing of so many actors."""
    size = -(-len(job.topology.agents) // max(1, actors))
    return pack(job.topology, ClusterSpec(agents_per_actor=size), cores)


def compare(calibration: Calibration) -> None:
    """Print predicted and measured times of a step."""
    print(
        "\n| graph | agents | d | layers | batch | model | actors | predicted ms | measured ms ",
        end="",
    )
    print("| error |\n|---|---:|---:|---:|---:|---|---:|---:|---:|---:|")
    errors = []
    runner = None
    for graph, args, d, layers, batch, actors, model in CONFIGURATIONS:
        job = job_of(graph, args, d, layers, batch, model)
        cluster = ClusterSpec(agents_per_actor=-(-len(job.topology.agents) // max(1, actors)))
        job = replace(job, spec=job.spec.model_copy(update={"cluster": cluster}))
        packing = packed(job, actors, calibration.cores)
        predicted = predict(job, packing, calibration, calibration.cores).seconds
        if not actors:
            local = LocalRunner(job)
            local.worker.load_data()
            measured = step_seconds(local)
        elif runner is None:
            runner = RayRunner(job)
            measured = step_seconds(runner)
        else:
            runner.reform(job)
            measured = step_seconds(runner)
        error = predicted / measured - 1
        errors.append(abs(error))
        print(
            f"| {graph.removesuffix('_graph')} | {len(job.topology.agents)} | {d} | {layers} "
            f"| {batch} | {', '.join(model.values()) or 'H2'} | {actors} | {1e3 * predicted:.2f} "
            f"| {1e3 * measured:.2f} | {error:+.0%} |",
            flush=True,
        )
    assert runner is not None
    with closing(runner):
        print(f"\nmedian error {median(errors):.0%}, largest {max(errors):.0%}", flush=True)


def foresee(here: Calibration, machines: int, latency: float, bandwidth: float) -> None:
    """Print predictions for many agents: tori, d = 16, 4 layers, batches of 64."""
    there = replace(here, latency=latency, bandwidth=bandwidth)
    title = f"{machines} cores, {1e6 * latency:.0f} µs, {bandwidth / 1e6:.0f} MB/s"
    print(f"\n| agents | edges | one process, s | {here.cores} cores of this machine, s ", end="")
    print(f"| {title}, s | of it arithmetic | latency | bytes |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for M in MANY:
        side = isqrt(M)
        args = {"m": side, "n": side, "periodic": True}
        job = job_of("grid_2d_graph", args, 16, 4, 64, {})
        one, few = (
            predict(job, packed(job, actors, actors), here, here.cores).seconds
            for actors in (1, here.cores)
        )
        cost = predict(job, packed(job, machines, machines), there, machines)
        print(
            f"| {side**2} | {len(job.topology.edges) // 2} | {one:.3g} | {few:.3g} "
            f"| {cost.seconds:.3g} | {cost.arithmetic:.3g} | {cost.latency:.3g} "
            f"| {cost.transfer:.3g} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = ArgumentParser(description="the time of a step, predicted and measured")
    parser.add_argument("--machines", type=int, default=64, help="cores of the cluster")
    parser.add_argument("--latency", type=float, default=100e-6, help="its network's, in seconds")
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="its network's, in bytes/s")
    o = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(machine())
    here = calibrate(tell=lambda what: print("measuring", what, flush=True))
    print(here)
    compare(here)
    foresee(here, o.machines, o.latency, o.bandwidth)


if __name__ == "__main__":
    main()
