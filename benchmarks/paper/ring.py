"""The paper's distributed example: eight agents, 16 features, a ring against the complete graph.

    python benchmarks/paper/ring.py

x enters p of a1 and y enters q of a5, so on the ring they meet only after layers of messages
between neighbours. The first seeds are trained a second time on Ray actors, and the weights and
the losses of the two are compared.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from record import add_options, chosen, count, fill, spread

import hdnn_dist
from hdnn_dist.trainer import Summary

RING8 = Path(__file__).parents[2] / "topologies" / "ring8.yaml"
GRAPHS = {"ring": "cycle_graph", "full": "complete_graph"}
Row = dict[str, float | list[float]]


def train(o: Namespace, graph: str, seed: int, run: Path, local: bool) -> Summary:
    """One run of ring8.yaml on a graph."""
    overrides = [
        f"topology.edges.generator={GRAPHS[graph]}",
        f"data.name={o.set}",
        f"model.layers={o.layers}",
        f"training.epochs={o.epochs}",
        f"training.seed={seed}",
        f"cluster.agents_per_actor={o.agents_per_actor}",
    ]
    return hdnn_dist.train(RING8, overrides=overrides, run=run, local=local)


def difference(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    weights = [hdnn_dist.load(run).state_dict() for run in (one, other)]
    return max(
        float((a - b).abs().max()) for a, b in zip(*(w.values() for w in weights), strict=True)
    )


def measure(graph: str, o: Namespace) -> Row:
    """All seeds of a graph."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        local = [train(o, graph, s, here / f"{s}", True) for s in range(o.seeds)]
        ray = [train(o, graph, s, here / f"{s}-ray", False) for s in range(o.ray_seeds)]
        pairs = list(zip(ray, local, strict=False))  # each with its own seed
        return {
            "accuracy": [100 * run.test_accuracy for run in local],
            "ray_accuracy": [100 * run.test_accuracy for run in ray],
            "weight_difference": [difference(Path(a.run), Path(b.run)) for a, b in pairs],
            "loss_difference": [abs(a.test_loss - b.test_loss) for a, b in pairs],
            "parameters": local[0].parameters,
            "bytes_per_step": local[0].bytes_per_step,
        }


def table(rows: Mapping[str, Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| graph | test accuracy %, mean ± deviation (worst) | weights | bytes a step "
        "| Ray: accuracy % | largest weight difference | test loss difference |",
        "|---|---|---:|---:|---|---|---|",
    ]
    for graph, row in rows.items():
        seeds = row["accuracy"]
        assert isinstance(seeds, list)
        ray, weight, loss = (
            ", ".join(format(v, form) for v in row[key])  # type: ignore[union-attr]
            for key, form in (
                ("ray_accuracy", ".2f"),
                ("weight_difference", ".1e"),
                ("loss_difference", ".1e"),
            )
        )
        lines.append(
            f"| {graph} | {spread(seeds, '.2f')} "
            f"| {row['parameters']:,} | {row['bytes_per_step']:,} | {ray} | {weight} | {loss} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write `ring.json` and `ring.md`."""
    parser = ArgumentParser(description="the 8-node ring against the complete graph")
    parser.add_argument("--set", choices=("double_circles", "swiss_roll", "double_moons"))
    parser.add_argument("--layers", type=count, default=32)
    parser.add_argument("--epochs", type=count, default=30)
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--ray-seeds", type=int, default=1)
    parser.add_argument("--agents-per-actor", type=count, default=4)
    add_options(parser)
    parser.set_defaults(set="double_circles")
    o = parser.parse_args(argv)
    if not 0 <= o.ray_seeds <= o.seeds:
        parser.error(f"--ray-seeds {o.ray_seeds} of {o.seeds} seeds: each is compared to its own")
    settings = chosen(o, "set", "layers", "epochs", "seeds", "ray_seeds", "agents_per_actor")
    fill(parser, o, "ring", settings, GRAPHS, measure, table)


if __name__ == "__main__":
    main()
