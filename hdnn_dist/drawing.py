"""The graph of agents as a picture: who talks to whom, how much, and what each agent sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby

import networkx as nx
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from hdnn_dist.console import size
from hdnn_dist.data import View
from hdnn_dist.errors import UserError
from hdnn_dist.figures import LIGHT, LISTED, SERIES, SHOWN, Chart, chart, series
from hdnn_dist.job import Job

DRAWN = 400  # agents up to which a graph is a picture


def topology(job: Job, hosts: Sequence[int] | None, name: str = "topology") -> Chart:
    """The agents with what each sees of the input, and the links with what they carry.

    Args:
        job: the job.
        hosts: per agent, the number of its actor; None if that is not known.
        name: of the chart.

    Raises:
        UserError: there are more agents than a picture can hold.
    """
    graph, names = job.topology, job.topology.names
    if len(names) > DRAWN:
        raise UserError(
            f"a picture of {len(names)} agents would show nothing",
            f"draw graphs of at most {DRAWN}",
        )
    carried: dict[tuple[int, int], int] = {}
    sent = job.traffic(job.plan.training_step)
    for (source, target), amount in sent.items():
        link = min(source, target), max(source, target)
        carried[link] = carried.get(link, 0) + amount
    at = _layout(job)
    details = len(names) <= SHOWN
    nearest = min((math.dist(at[i], at[l]) for i, l in combinations(at, 2)), default=1.0)
    side = nearest * (0.56 if details else 0.5)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_aspect("equal")
        most = max(carried.values(), default=1)
        for (i, l), amount in carried.items():
            axes.plot(
                *zip(at[i], at[l], strict=True),
                color=LIGHT["soft"],
                linewidth=0.6 + 3.4 * amount / most,
                solid_capstyle="round",
                zorder=1,
            )
        if graph.directed:
            for l, i in graph.edges:
                axes.add_patch(_arrow(at[l], at[i], side))
        for i, place in at.items():
            colour = LIGHT["c0"] if hosts is None else series(hosts[i])
            left, bottom = place[0] - side / 2, place[1] - side / 2
            frame = Rectangle((left, bottom), side, side, linewidth=1.6, zorder=3)
            frame.set(facecolor=LIGHT["paper"] if details else colour, edgecolor=colour)
            axes.add_patch(frame)
            if not details:
                continue
            for x, y, width, height in _seen(job.views[i], job.data.image, job.data.features):
                part = Rectangle(
                    (left + x * side, bottom + (1 - y - height) * side),
                    width * side,
                    height * side,
                    facecolor=colour,
                    linewidth=0,
                    zorder=4,
                )
                axes.add_patch(part)
            has_root = job.architecture.own is None
            said = f"{names[i]}, root" if has_root and i == job.root else names[i]
            axes.annotate(
                said,
                (place[0], bottom),
                (0, -3),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=9 if len(names) <= 25 else 6,
                zorder=5,
                bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.6},
            )
        actors = sorted(set(hosts or ()))
        if 1 < len(actors) < len(names) and len(actors) <= len(SERIES):
            handles = [Rectangle((0, 0), 1, 1, color=series(k)) for k in actors]
            figure.legend(
                handles, [f"actor {k}" for k in actors], loc="outside lower center", ncols=4
            )
        xs, ys = zip(*at.values(), strict=True)
        axes.set_xlim(min(xs) - side, max(xs) + side)
        axes.set_ylim(min(ys) - 1.1 * side, max(ys) + side)

    shape = (4.8, 4.3) if len(names) <= 25 else (9.0, 8.0)
    return chart(name, "Agents", _told(job, hosts, carried), draw, shape)


def _layout(job: Job) -> dict[int, tuple[float, float]]:
    """Where the agents are drawn: turned so that they lie as what they see does in the input."""
    M = len(job.topology.names)
    links: nx.Graph[int] = nx.Graph(job.topology.edges)
    links.add_nodes_from(range(M))
    if len(links) <= 100 and nx.is_connected(links):
        ring, start = nx.circular_layout(links), nx.spectral_layout(links)
        # The ring moves apart those of which the spectrum knows no difference.
        near = {i: start[i] + 0.05 * ring[i] for i in links}
        found = nx.kamada_kawai_layout(links, pos=near)
    else:
        found = nx.spring_layout(links, seed=0)
    at_M2 = np.array([found[i] for i in range(M)])
    at_M2 -= at_M2.mean(0)
    wanted_M2 = np.array([_middle(job, i) for i in range(M)])
    U, _, Vt = np.linalg.svd(at_M2.T @ wanted_M2)  # Procrustes
    return {i: (float(x), float(y)) for i, (x, y) in enumerate(at_M2 @ U @ Vt)}


def _middle(job: Job, i: int) -> tuple[float, float]:
    """Where the middle of what an agent sees lies from the middle of the input, y upwards."""
    width = job.data.image[1] if job.data.image else job.data.features
    height = job.data.features // width
    if not (columns := np.array(job.views[i].columns)).size:
        return 0.0, 0.0
    x, y = (columns % width).mean(), (columns // width).mean()
    return float((x + 0.5) / width - 0.5), float(0.5 - (y + 0.5) / height)


def _arrow(
    source: tuple[float, float], target: tuple[float, float], side: float
) -> FancyArrowPatch:
    """An arrow head where an edge reaches its agent's frame."""
    distance = math.dist(source, target)
    dx, dy = (target[0] - source[0]) / distance, (target[1] - source[1]) / distance
    gap = side / 2 / max(abs(dx), abs(dy))  # from the centre to the frame
    tip = target[0] - gap * dx, target[1] - gap * dy
    return FancyArrowPatch(
        (tip[0] - 0.1 * side * dx, tip[1] - 0.1 * side * dy),
        tip,
        arrowstyle="-|>",
        mutation_scale=18,
        color=LIGHT["ink"],
        shrinkA=0,
        shrinkB=0,
        zorder=2,
    )


def _seen(
    view: View, image: tuple[int, int] | None, features: int
) -> Iterator[tuple[float, float, float, float]]:
    """What a view covers of the whole input as rectangles in [0, 1]²: x, y from above, w, h.

    An input that is no image is a row of features.
    """
    height, width = image or (1, features)
    by_row: dict[int, list[int]] = {}
    for column in sorted(view.columns):
        by_row.setdefault(column // width, []).append(column % width)
    for runs, rows in groupby(sorted(by_row), key=lambda row: _runs(by_row[row])):
        for block in _runs(list(rows)):  # rows that are alike need not be neighbours
            for run in runs:
                yield run[0] / width, block[0] / height, run[1] / width, block[1] / height


def _runs(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as runs: the first of each, and how many."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return tuple(runs)


def _told(job: Job, hosts: Sequence[int] | None, carried: Mapping[tuple[int, int], int]) -> str:
    names, F = job.topology.names, job.data.features
    kind = "directed" if job.topology.directed else "undirected"
    root = f"{names[job.root]} is the root of the readout."
    if job.architecture.own is not None:
        root = f"{len(job.architecture.readers)} agents read out their own targets."
    said = [
        f"{kind.capitalize()} graph of {len(names)} agents and {len(carried)} links in use.",
        root,
    ]
    if carried:
        (i, l), most = max(carried.items(), key=lambda item: item[1])
        least = min(carried.values())
        said.append(
            f"A training step sends {size(most)} over the busiest link, {names[i]} and {names[l]}, "
            f"and {size(least)} over the quietest."
        )
    for i in range(min(len(names), LISTED)):
        seen = len(job.views[i].columns)
        where = "" if hosts is None else f", in actor {hosts[i]}"
        said.append(f"{names[i]} sees {seen} of {F} features{where}.")
    return " ".join(said)
