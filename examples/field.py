"""Sensors foretell the field at their own places, each reading out for itself: no digits, no root.

Puffs of a tracer drift with a wind and spread, `∂u/∂t + v·∇u = D Δu`. Each starts at a point, at
a time, with an amount, and what follows has a closed form; the wind is another in every sample, and
no sensor knows it. A sensor sees its own last readings, with noise on them, and is to tell the true
field at its own place some time ahead. Sensors that are near enough to hear each other are
neighbours. What blows towards a sensor has passed others before, so that it pays to talk to them;
how much is measured against the same network without a link, and against persistence, which takes
the last reading for the future one.

A sensor's target is a column of its own (`data.targets` by agent): it is read out where it is
known, and no sum of scores travels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import networkx as nx
import numpy as np

import hdnn_dist

READINGS, INTERVAL, AHEAD = 4, 0.1, 0.4
DIFFUSIVITY, NOISE, PUFFS, WIND = 0.01, 0.05, 4, 1.2


def network(sensors: int, seed: int = 1) -> nx.Graph[str]:
    """The first connected random geometric graph of some seeds."""
    graphs = (nx.random_geometric_graph(sensors, 0.4, seed=seed + k) for k in range(1000))
    graph = next(graph for graph in graphs if nx.is_connected(graph))
    return nx.relabel_nodes(graph, {i: f"s{i}" for i in graph})


def field(at: np.ndarray, samples: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What sensors at `at (M, 2)` read, `(samples, M, READINGS)`, and what is to come `(…, M)`."""
    rng = np.random.default_rng(seed)
    angle, speed = rng.uniform(0, 2 * np.pi, samples), rng.uniform(WIND / 2, WIND, samples)
    wind = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    start = rng.uniform(-0.3, 1.3, (samples, PUFFS, 2))  # also outside, to drift in
    amount, age = rng.uniform(0.5, 1.5, (2, samples, PUFFS))
    t = np.array([*(-INTERVAL * np.arange(READINGS)[::-1]), AHEAD])
    time = age[..., None] + t - t[0]  # since the puff, (samples, PUFFS, T)
    centre = start[:, :, None] + wind[:, None, None] * (t - t[0])[:, None]
    r2 = ((at[:, None, None] - centre[:, None]) ** 2).sum(-1)  # (samples, M, PUFFS, T)
    width = 4 * DIFFUSIVITY * time[:, None]
    u = (amount[:, None, :, None] / (np.pi * width) * np.exp(-r2 / width)).sum(2)
    readings = u[..., :-1] + NOISE * u.std() * rng.standard_normal(u[..., :-1].shape)
    return readings, u[..., -1]


def jobs(
    folder: Path, sensors: int = 16, samples: int = 5000, epochs: int = 20
) -> tuple[list[hdnn_dist.Job], float]:
    """On the graph; without a link; likewise, with as many weights; the RMSE of persistence."""
    graph = network(sensors)
    x, y = field(np.array([graph.nodes[name]["pos"] for name in graph]), samples)
    columns = {name: [f"{name} at {k}" for k in range(READINGS)] for name in graph}
    targets = {name: [f"{name} ahead"] for name in graph}
    cut = samples * 4 // 5
    flat = x.reshape(samples, -1)
    data = hdnn_dist.write_table(
        folder,
        (flat[:cut], y[:cut]),
        (flat[cut:], y[cut:]),
        [column for own in columns.values() for column in own],
        [column for own in targets.values() for column in own],
    )
    spec = {
        "model": {"layers": 6, "h": 0.5},
        "data": data | {"targets": targets, "split": {"kind": "columns", "columns": columns}},
        "training": {
            "epochs": epochs,
            "batch_size": 100,
            "optimizer": {"name": "adam", "lr": 0.01},
            "schedule": {"name": "one-cycle"},
        },
    }
    alone = nx.create_empty_copy(graph)
    kinds = (("network", graph, 8), ("alone", alone, 8), ("alone-wide", alone, 18))
    made = [
        hdnn_dist.Job.load(spec | {"topology": hdnn_dist.Topology.from_graph(g, d=d, name=name)})
        for name, g, d in kinds
    ]
    return made, float(np.sqrt(np.mean((x[cut:, :, -1] - y[cut:]) ** 2)))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=Path, default=Path("field"), help="of the table")
    options.add_argument("--ray", action="store_true", help="an actor a sensor")
    given = options.parse_args()
    all_jobs, persistence = jobs(given.folder)
    print(f"persistence: test RMSE {persistence:.4f}")
    for job in all_jobs:
        done = hdnn_dist.train(job, local=not given.ray)
        print(
            f"{job.topology.name}: test RMSE {done.test_rmse:.4f}, R² {done.test_r2:.3f}, "
            f"{done.parameters} parameters, {done.bytes_per_step} bytes a step, "
            f"{done.seconds:.0f} s; run: {done.run}",
            flush=True,
        )
