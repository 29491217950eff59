"""The figures of an analysis, as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hdnn_dist.analysis import Counterexample
from hdnn_dist.storage import Place, write

Json = Mapping[str, Any]
_FLOOR = 1e-200  # what a gradient that has vanished is drawn at
_CEILING = 1e200  # what a norm or a bound that is higher is drawn at


def save_figures(report: Json, folder: Place) -> list[Place]:
    """All figures that a report (see `hdnn_dist.report`) has the numbers for."""
    made = [_norms(report, folder / "sensitivity.png"), _defects(report, folder / "defect.png")]
    if report["energy"] is not None:
        made.append(_energy(report, folder / "energy.png"))
    if trained := [network for network in report["networks"] if network["gradients"]]:
        made.append(_gradients(trained, folder / "gradients.png"))
    return made


def save_counterexample(found: Counterexample, file: Place) -> Place:
    """Two solutions that drift apart, and the sensitivity that grows with the time between."""
    figure = _figure()
    plane, axes = figure.subplots(1, 2, width_ratios=(2, 3))
    plane.set_title(r"$\dot y = \varepsilon J \tanh(y)$")
    for orbit, label in ((found.orbit, "y"), (found.perturbed_orbit, "y, γ apart at first")):
        (line,) = plane.plot(*zip(*orbit, strict=True), linewidth=0.8, label=label)
        plane.plot(*orbit[-1], "o", color=line.get_color())
    plane.set_aspect("equal")
    plane.set_xlabel("$y_1$")
    plane.set_ylabel("$y_2$")
    plane.grid(alpha=0.3)
    plane.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, -0.5), frameon=False)
    _describe(axes, "t", r"$M(t) = \partial y(T)/\partial y(T-t)$")
    axes.plot(found.t, found.norms, label="‖M‖")
    axes.plot(found.t, found.distance, "--", label="distance, over γ")
    for k, name in enumerate(("$M_{11}$", "$M_{22}$")):
        axes.plot(found.t, [entry[k] for entry in found.entries], linewidth=0.8, label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":", label="lower bound 1")
    axes.set_title("grows with t")
    return _save(figure, axes, file)


def _norms(report: Json, file: Place) -> Place:
    figure = _figure()
    norms, bounds = figure.subplots(1, 2)
    for network in report["networks"]:
        k = range(1, len(network["norms"]) + 1)
        least, largest = ([_drawn(end(row)) for row in network["norms"]] for end in (min, max))
        (line,) = norms.plot(k, least, label=network["name"], **_dots(least))
        norms.fill_between(k, least, largest, color=line.get_color(), alpha=0.2, linewidth=0)
        bound = [10 ** min(log, math.log10(_CEILING)) for log in network["log10_bounds"]]
        bounds.plot(k, bound, label=network["name"], **_dots(bound))
    for axes, title in ((norms, "least to largest of the samples"), (bounds, "upper bound")):
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":", label="1")
        _describe(axes, "layers k back from the output", "")
        axes.set_yscale("log")
        axes.set_title(title)
    norms.set_ylabel(r"$\|M_k\|$")
    return _save(figure, bounds, file)


def _defects(report: Json, file: Place) -> Place:
    figure, axes = _axes("layers k back from the output", r"$\|M_k^T J M_k - J\|$, largest")
    for network in report["networks"]:
        largest = [_drawn(max(row)) for row in network["defects"]]
        axes.plot(range(1, len(largest) + 1), largest, label=network["name"], **_dots(largest))
    axes.set_yscale("log")
    axes.set_title("Symplecticity defect")
    return _save(figure, axes, file)


def _energy(report: Json, file: Place) -> Place:
    figure, axes = _axes("layer j", r"$H_j(y_j)$")
    for k, energy in enumerate(zip(*report["energy"], strict=True)):
        axes.plot(range(len(energy)), energy, alpha=0.8, label=f"sample {k}", **_dots(energy))
    axes.set_title("Energy along the layers")
    return _save(figure, axes, file)


def _gradients(networks: Sequence[Json], file: Place) -> Place:
    """One panel a network, one line for some of the epochs."""
    figure = _figure()
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        records = network["gradients"]
        for k in sorted({*range(0, len(records), 1 + len(records) // 8), len(records) - 1}):
            colour = colormaps["viridis"](0.9 * k / max(1, len(records) - 1))
            norms = [_drawn(norm) for norm in records[k]["norms"]]
            label = f"epoch {records[k]['epoch']}"
            axes.plot(range(len(norms)), norms, color=colour, label=label, **_dots(norms))
        _describe(axes, "layer j", "")
        axes.set_title(network["name"])
        axes.set_yscale("log")
    panels[0].set_ylabel(r"$\|\partial L/\partial y_j\|$ during training")
    return _save(figure, panels[-1], file)


def _drawn(value: float | None) -> float:
    """A value where a logarithmic axis can show it; nowhere if it is None, JSON's no number."""
    return math.nan if value is None else min(max(value, _FLOOR), _CEILING)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = _figure()
    axes = figure.subplots()
    _describe(axes, x, y)
    return figure, axes


def _figure() -> Figure:
    figure = Figure(figsize=(8.0, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine's default backend
    return figure


def _describe(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _dots(values: Sequence[float]) -> dict[str, Any]:
    """A marker a layer while they can be told apart."""
    return {"marker": "o", "markersize": 3} if len(values) <= 32 else {}


def _save(figure: Figure, axes: Axes, file: Place) -> Place:
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write(file, content.getvalue())
    return file
