"""Sensors on a plate tell which corner is being heated; each knows its own temperatures alone.

    python examples/sensors.py

A source of heat is switched on for a moment somewhere on the plate, and `T(r, t) = Q/(4πDt)
exp(-r²/4Dt)` follows, for a source at the distance `r` and with noise on what is measured. The
sensors that are near enough to hear each other are neighbours; each sees its own readings, and
together they learn the corner. The data is a table that `write_table` makes: a column a sensor and
time, an agent's columns by their names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

import hdnn_dist

TIMES = (0.02, 0.05, 0.1, 0.2)
DIFFUSIVITY, NOISE = 0.5, 0.2


def plate(sensors: int, samples: int, seed: int = 1) -> tuple[nx.Graph[int], np.ndarray, Any]:
    """The sensors' graph, their readings `(samples, sensors · times)`, and the corners."""
    graph = next(
        graph
        for k in range(1000)
        if nx.is_connected(graph := nx.random_geometric_graph(sensors, 0.4, seed=seed + k))
    )
    rng = np.random.default_rng(seed)
    source, heat = rng.random((samples, 1, 2)), rng.uniform(0.5, 1.5, (samples, 1, 1))
    at = np.array([graph.nodes[i]["pos"] for i in graph])
    r2 = ((source - at) ** 2).sum(2)[:, :, None]  # (samples, sensors, 1)
    t = np.array(TIMES)
    T = heat / (4 * np.pi * DIFFUSIVITY * t) * np.exp(-r2 / (4 * DIFFUSIVITY * t))
    T += NOISE * rng.standard_normal(T.shape)
    corner = 2 * (source[:, 0, 1] > 0.5) + (source[:, 0, 0] > 0.5)
    return graph, T.reshape(samples, -1), corner


def job(folder: Path, sensors: int = 16, samples: int = 4000, epochs: int = 15) -> hdnn_dist.Job:
    """The table in a folder, and who sees what of it."""
    graph, x, y = plate(sensors, samples)
    graph = nx.relabel_nodes(graph, {i: f"s{i}" for i in graph})
    names = [f"{name} at {t}" for name in graph for t in TIMES]
    cut = samples * 3 // 4
    data = hdnn_dist.write_table(folder, (x[:cut], y[:cut]), (x[cut:], y[cut:]), names)
    own = {name: [f"{name} at {t}" for t in TIMES] for name in graph}
    return hdnn_dist.Job.load(
        {
            "topology": hdnn_dist.Topology.from_graph(graph, d=4, name="plate"),
            "model": {"layers": 8, "h": 0.5},
            "data": data | {"split": {"kind": "columns", "columns": own}},
            "training": {"epochs": epochs, "optimizer": {"name": "adam", "lr": 0.01}},
        }
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=Path, default=Path("plate"), help="of the table")
    options.add_argument("--ray", action="store_true", help="an actor a sensor")
    given = options.parse_args()
    summary = hdnn_dist.train(job(given.folder), local=not given.ray)
    print(f"test accuracy {summary.test_accuracy:.2%}; run: {summary.run}")
