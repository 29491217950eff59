"""The graph of agents as a picture: who talks to whom, how much, and what each agent sees."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, groupby

import networkx as nx
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.transforms import Bbox

from hdnn_dist.console import size
from hdnn_dist.data import View
from hdnn_dist.errors import UserError
from hdnn_dist.figures import LIGHT, SERIES, SHOWN, Chart, chart, series
from hdnn_dist.job import Job

DRAWN = 400  # agents up to which a graph is a picture
LABEL, MARGIN = 8.0, 14.0  # points: the height of a name, and what is left round a graph
Point = tuple[float, float]


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
    inches = (4.8, 4.3) if len(names) <= 25 else (9.0, 8.0)
    rows = _keys(job, hosts, carried.values(), int(72 * inches[0] // 75))

    def draw(figure: Figure) -> None:
        # Lengths are points here, so that names can be laid out with what is drawn.
        figure.set_layout_engine("none")
        width, height = (72 * length for length in inches)
        foot = 16 * len(rows)
        area = width, height - foot
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(-foot, area[1]))
        axes.set_axis_off()
        for k, row in enumerate(rows):
            top = 0.5, (foot - 16 * k) / height
            figure.legend(
                *zip(*row, strict=True), loc="upper center", bbox_to_anchor=top, ncols=len(row)
            )
        place, side = _fill(at, area, 0.56 if details else 0.5)
        most = max(carried.values(), default=1)
        for (i, l), amount in carried.items():
            axes.plot(
                *zip(place[i], place[l], strict=True),
                color=LIGHT["soft"],
                linewidth=_thickness(amount, most),
                solid_capstyle="round",
                zorder=1,
            )
        if graph.directed:
            for l, i in graph.edges:
                axes.add_patch(_arrow(place[l], place[i], side))
        for i, middle in place.items():
            colour = LIGHT["c0"] if hosts is None else series(hosts[i])
            left, bottom = middle[0] - side / 2, middle[1] - side / 2
            frame = Rectangle((left, bottom), side, side, linewidth=1.6, zorder=3)
            frame.set(facecolor=LIGHT["paper"] if details else colour, edgecolor=colour)
            axes.add_patch(frame)
            if not details:
                continue
            for x, y, w, h in _seen(job.views[i], job.data.image, job.data.features):
                corner = left + x * side, bottom + (1 - y - h) * side
                part = Rectangle(
                    corner, w * side, h * side, facecolor=colour, linewidth=0, zorder=4
                )
                axes.add_patch(part)
        said = _said(job) if details else {}
        for i, spot in _labels(said, place, side, carried, area).items():
            axes.text(
                *spot,
                said[i],
                ha="center",
                va="center",
                fontsize=LABEL,
                zorder=5,
                bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.6},
            )

    return chart(name, "Agents", _told(job, hosts, carried), draw, inches)


def _thickness(amount: int, most: int) -> float:
    return 0.6 + 2.6 * amount / most


def _keys(
    job: Job, hosts: Sequence[int] | None, carried: Collection[int], columns: int
) -> list[list[tuple[Artist, str]]]:
    """What is drawn how, in rows: how wide a link is, what fills a frame, whose a colour is."""
    least, most = min(carried, default=0), max(carried, default=0)
    shown = {least: size(least), most: size(most)}
    if least > 0.8 * most:  # the eye takes them for equal
        shown = {most: " to ".join(dict.fromkeys(shown.values()))}
    first: list[tuple[Artist, str]] = [
        (Line2D([], [], color=LIGHT["soft"], linewidth=_thickness(n, most)), f"{said} a step")
        for n, said in shown.items()
        if carried
    ]
    M, actors = len(job.topology.agents), sorted(set(hosts or ()))
    if M <= SHOWN:
        first.append((Rectangle((0, 0), 1, 1, color=LIGHT["soft"]), "seen of the input"))
    colours: list[tuple[Artist, str]] = []
    if 1 < len(actors) < M and len(actors) <= len(SERIES):
        colours = [(Rectangle((0, 0), 1, 1, color=series(k)), f"actor {k}") for k in actors]
    rows = [first, *(colours[k : k + columns] for k in range(0, len(colours), columns))]
    return [row for row in rows if row]


def _said(job: Job) -> dict[int, str]:
    """What stands by the agents, the root's first."""
    names, root = job.topology.names, job.root
    if job.architecture.own is not None:
        return dict(enumerate(names))
    return {root: f"{names[root]}, root"} | {i: n for i, n in enumerate(names) if i != root}


def _fill(at: Mapping[int, Point], area: Point, share: float) -> tuple[dict[int, Point], float]:
    """Agents in the middle of an area, as far apart as it allows, and the side of their frames.

    Args:
        at: where they are, in units of any size.
        area: width and height, from 0.
        share: a frame's, of the distance of the nearest two.
    """
    at_M2 = np.array([*at.values()])
    low, high = at_M2.min(0), at_M2.max(0)
    nearest = min((math.dist(at[i], at[l]) for i, l in combinations(at, 2)), default=1.0)
    side = share * max(nearest, 0.02 * (high - low).max())  # some may lie all but on one another
    scale = min(*((np.array(area) - 2 * MARGIN) / (high - low + side)), 60 / side)
    placed_M2 = np.array(area) / 2 + scale * (at_M2 - (low + high) / 2)
    return {i: (float(x), float(y)) for i, (x, y) in zip(at, placed_M2, strict=True)}, scale * side


def _labels(
    said: Mapping[int, str],
    at: Mapping[int, Point],
    side: float,
    links: Iterable[tuple[int, int]],
    area: Point,
) -> dict[int, Point]:
    """Where the middles of labels go: off all frames and each other, and off links if they can.

    A label for which there is no place is left out.
    """
    ends_L22 = np.array([(at[i], at[l]) for i, l in links], float).reshape(-1, 2, 2)
    reach = side / 2 + 4  # of a frame, so that nobody takes a label for that of another
    frames = {
        i: Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for i, (x, y) in at.items()
    }
    whole = Bbox.from_bounds(0, 0, *area)
    found = dict[int, Point]()
    taken = list[Bbox]()
    for i, text in said.items():
        w, h = 0.62 * LABEL * len(text) + 2, 1.2 * LABEL
        up, out, aside = side / 2 + h / 2 + 3, side / 2 + w / 2 + 3, w / 2 + 3
        beside = [(0.0, -up), (0.0, up), (out, 0.0), (-out, 0.0)]
        beside += [(aside, -up), (-aside, -up), (aside, up), (-aside, up)]
        others = taken + [frame for l, frame in frames.items() if l != i]
        free = []
        for dx, dy in beside:
            x, y = at[i][0] + dx, at[i][1] + dy
            box = Bbox.from_bounds(x - w / 2, y - h / 2, w, h)
            inside = whole.contains(*box.min) and whole.contains(*box.max)
            if inside and not box.count_overlaps(others):
                free.append((_length_in(box, ends_L22), box, (x, y)))
        if free:
            _, box, found[i] = min(free, key=lambda place: place[0])  # the first of the best
            taken.append(box)
    return found


def _length_in(box: Bbox, ends_L22: npt.NDArray[np.float64]) -> float:
    """How much of some straight lines lies in a box."""
    start_L2, way_L2 = ends_L22[:, 0], ends_L22[:, 1] - ends_L22[:, 0]
    way_L2[way_L2 == 0] = 1e-9
    sides_2L2 = (np.stack([box.min, box.max])[:, None] - start_L2) / way_L2  # where they are met
    enter_L = sides_2L2.min(0).max(1).clip(min=0)
    leave_L = sides_2L2.max(0).min(1).clip(max=1)
    return float((leave_L - enter_L).clip(min=0) @ np.linalg.norm(way_L2, axis=1))


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
            f"A training step sends {size(most)} over each link."
            if least == most
            else f"A training step sends {size(most)} over the busiest link, {names[i]} and "
            f"{names[l]}, and {size(least)} over the quietest."
        )
    alike: dict[tuple[int, int | None], list[str]] = {}
    apart = hosts is not None and len(set(hosts)) == len(names)
    for i, name in enumerate(names if len(names) <= SHOWN else ()):
        host = None if hosts is None or apart else hosts[i]
        alike.setdefault((len(job.views[i].columns), host), []).append(name)
    for (seen, host), those in alike.items():
        where = "" if host is None else f", in actor {host}"
        said.append(
            f"{', '.join(those)} see{'s' * (len(those) == 1)} {seen} of {F} features{where}."
        )
    return " ".join(said)
