"""The figures of a report page, each once as PNG and once as SVG that follows light and dark.

A figure is drawn in the colours of `LIGHT`. In the SVG each of them is a CSS variable, which the
page (or, for a file of its own, the SVG) sets by the reader's preference. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, MaxNLocator

# Series have three to one against the paper at least, in both.
LIGHT = {
    "ink": "#1c1d1f",
    "soft": "#5e6167",
    "grid": "#d9dbdf",
    "paper": "#fdfdfc",
    "c0": "#0069a8",
    "c1": "#c94f00",
    "c2": "#00825f",
    "c3": "#a03d8e",
    "c4": "#8f6a00",
    "c5": "#106f80",
    "c6": "#8a1f4f",
    "c7": "#54575c",
}
DARK = {
    "ink": "#e9eaec",
    "soft": "#a6aab1",
    "grid": "#3c4046",
    "paper": "#17191c",
    "c0": "#5db5f0",
    "c1": "#ff9a56",
    "c2": "#47cfa2",
    "c3": "#e492d6",
    "c4": "#e3c650",
    "c5": "#6ad2e2",
    "c6": "#f78db4",
    "c7": "#b9bcc2",
}
SERIES = [name for name in LIGHT if name.startswith("c")]
STYLES = ("-", "--", "-.", ":")
SHOWN = 64  # agents, or classes, up to which a figure says who they are
LISTED = 16  # agents up to which alternative text says the time of all
POINTS = 300  # of a curve at most
DOTS = 2000  # of a cloud at most
_FLOOR, _CEILING = 1e-200, 1e200  # what is lower or higher is drawn at these
_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["soft"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": LIGHT["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.facecolor": LIGHT["paper"],
    "font.size": 10,
    "grid.color": LIGHT["grid"],
    "legend.fontsize": "small",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hdnn_dist",
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names are the user's
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
}


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        name: of its PNG file, without the suffix.
        title: a few words.
        alt: what it shows, with the numbers that matter.
        png: the file.
        svg: an `<svg>` element whose colours are variables.
    """

    name: str
    title: str
    alt: str
    png: bytes
    svg: str

    @property
    def svg_file(self) -> bytes:
        """The SVG as a file of its own, light or dark by the reader's preference."""
        head, end, rest = self.svg.partition(">")
        return f"{head}{end}<style>{theme()}</style>{rest}".encode()


def theme() -> str:
    """The CSS variables of the colours, light and dark."""

    def block(colours: Mapping[str, str]) -> str:
        return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"

    return f"{block(LIGHT)}@media(prefers-color-scheme:dark){{{block(DARK)}}}"


def chart(
    name: str,
    title: str,
    alt: str,
    draw: Callable[[Figure], None],
    shape: tuple[float, float] = (4.3, 3.0),
) -> Chart:
    """Draw a `Chart` of so many inches."""
    with rc_context(_RC):
        figure = Figure(figsize=shape, dpi=160, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whatever the machine's default backend
        draw(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return Chart(name, title, alt, png.getvalue(), _element(svg.getvalue().decode(), name, alt))


def _element(svg: str, name: str, alt: str) -> str:
    """An `<svg>` that can stand beside others in a page, with colours as variables."""
    svg = svg[svg.index("<svg") :]
    # Ids are those of the file, and several files share a page.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable})")
    said = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{said}"', 1)


def series(k: int) -> str:
    """The colour of the k-th series."""
    return LIGHT[SERIES[k % len(SERIES)]]


class _Plain(LogFormatter):
    """Labels of a logarithmic axis as numbers; the default ones are mathematics."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.4g}" if super().__call__(x, pos) else ""


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain())


def _describe(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


# --- curves of training --------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Values by step: of a run's training batches (faint) or of its evaluations (marked).

    Attributes:
        run: number of the run.
        label: for the legend.
        points: (step, value); a value that is no number is NaN.
        marked: whether the points are few and each counts.
    """

    run: int
    label: str
    points: tuple[tuple[int, float], ...]
    marked: bool


def curves(
    name: str, title: str, what: str, given: Sequence[Curve], logarithmic: bool = False
) -> Chart:
    """Curves over the steps of training."""
    drawn = [curve for curve in given if curve.points]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in drawn:
            x, y = zip(*(curve.points if curve.marked else _thinned(curve.points)), strict=True)
            axes.plot(
                x,
                [_within(v) for v in y] if logarithmic else y,
                color=series(curve.run),
                linestyle=STYLES[curve.run % len(STYLES)] if curve.marked else "-",
                marker="o" if curve.marked and len(x) <= 60 else None,
                markersize=3.5,
                linewidth=1.6 if curve.marked else 0.9,
                alpha=1.0 if curve.marked else 0.55,
                label=curve.label,
            )
        if logarithmic:
            _make_logarithmic(axes)
        _describe(axes, "step", what)
        if drawn:
            axes.legend()

    said = " ".join(_course(curve) for curve in drawn) or "There are no records of it."
    return chart(name, title, f"{title} by training step. {said}", draw)


def _course(curve: Curve) -> str:
    """A curve in a sentence."""
    values = [(step, value) for step, value in curve.points if math.isfinite(value)]
    if not values:
        return f"{curve.label}: no finite number."
    (first, a), (last, b) = values[0], values[-1]
    low, high = min(values, key=lambda p: p[1]), max(values, key=lambda p: p[1])
    return (
        f"{curve.label}: {a:.4g} at step {first}, {b:.4g} at step {last}; "
        f"lowest {low[1]:.4g} at step {low[0]}, highest {high[1]:.4g} at step {high[0]}."
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of equal runs of points, at most `POINTS` of them."""
    many = math.ceil(len(points) / POINTS)
    parts = (np.array(points[k : k + many]).mean(0) for k in range(0, len(points), many))
    return [(float(step), float(value)) for step, value in parts]


def _within(value: float) -> float:
    """A value where a logarithmic axis can show it."""
    return value if math.isnan(value) else min(max(value, _FLOOR), _CEILING)


# --- what goes through the layers ----------------------------------------------------------------


def gradients(name: str, records: Sequence[tuple[int, Sequence[float]]]) -> Chart:
    """`‖∂loss/∂y_j‖` by layer, for some epochs from the first (faint) to the last.

    Args:
        name: of the chart.
        records: epoch and norms of `y_0 … y_N`; at least one.
    """
    shown = sorted({*range(0, len(records), 1 + len(records) // 5), len(records) - 1})

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for rank, k in enumerate(shown, 1):
            epoch, norms = records[k]
            axes.plot(
                range(len(norms)),
                [_within(norm) for norm in norms],
                color=LIGHT["c0"],
                alpha=0.25 + 0.75 * rank / len(shown),
                linewidth=1.0 + rank / len(shown),
                marker="o" if len(norms) <= 33 else None,
                markersize=3,
                label=f"epoch {epoch}",
            )
        _make_logarithmic(axes)
        _describe(axes, "layer j (0: the input's state)", "‖∂loss/∂y_j‖")
        axes.legend()

    said = [
        f"Epoch {epoch}: {norms[0]:.3g} at the first state, {norms[-1]:.3g} at the last, "
        f"least {min(norms):.3g}."
        for epoch, norms in (records[0], records[-1])[: len(records)]
    ]
    title = "Gradient norm per layer"
    return chart(name, title, f"{title}, in an epoch's last step. {' '.join(said)}", draw)


def sensitivities(
    name: str,
    norms: Sequence[Sequence[float]],
    log10_bounds: Sequence[float],
    samples: int,
    exact: bool = True,
) -> Chart:
    """`‖M_k‖` of some samples, with the upper bound from the weights and the lower bound 1.

    Args:
        name: of the chart.
        norms: for `k = 1 … N`, of each sample.
        log10_bounds: of the upper bounds.
        samples: how many.
        exact: whether the norms are those; else estimates from below.
    """
    k = range(1, len(norms) + 1)
    least, largest = [min(row) for row in norms], [max(row) for row in norms]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = ([_within(v) for v in row] for row in (least, largest))
        dots = {"marker": "o", "markersize": 3} if len(norms) <= 33 else {}
        axes.fill_between(k, low, high, color=LIGHT["c0"], alpha=0.25, linewidth=0)
        axes.plot(k, high, color=LIGHT["c0"], label="‖M_k‖, largest", **dots)  # type: ignore[arg-type]
        axes.plot(k, low, color=LIGHT["c0"], linestyle=":", label="‖M_k‖, least")
        bounds = [10 ** min(log, math.log10(_CEILING)) for log in log10_bounds]
        axes.plot(k, bounds, color=LIGHT["c1"], linestyle="--", label="upper bound")
        axes.axhline(1, color=LIGHT["ink"], linewidth=0.9, label="1")
        _make_logarithmic(axes)
        _describe(axes, "layers k back from the output", "norm")
        axes.legend()

    title = "Backward sensitivities and their bounds"
    alt = (
        f"{title}, of {samples} test samples. Of the last layer the norm is {least[0]:.4g} to "
        f"{largest[0]:.4g}, of all {len(norms)} layers {least[-1]:.4g} to {largest[-1]:.4g}; the "
        f"least of all is {min(least):.4g}. The upper bound from the weights is "
        f"10^{log10_bounds[0]:.2f} for the last layer and 10^{log10_bounds[-1]:.2f} for all."
    )
    alt += "" if exact else " The norms are estimates from below."
    return chart(name, title, alt, draw)


# --- time ----------------------------------------------------------------------------------------

PARTS = ("compute", "send", "wait")


def times(name: str, agents: Sequence[str], seconds: Sequence[Sequence[float]]) -> Chart:
    """Where a training step's time goes, agent by agent.

    Args:
        name: of the chart.
        agents: their names.
        seconds: per agent, of each of `PARTS` in a step.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        start = np.zeros(len(agents))
        for part, colour, hatch, column in zip(
            PARTS, ("c0", "c1", "grid"), ("", "//", ""), zip(*seconds, strict=True), strict=True
        ):
            width = 1e3 * np.array(column)
            axes.barh(
                range(len(agents)),
                width,
                left=start,
                color=LIGHT[colour],
                label=part,
                hatch=hatch,
                edgecolor=LIGHT["paper"],
                linewidth=0.5,
            )
            start += width
        many = len(agents) > SHOWN
        axes.set_yticks([] if many else range(len(agents)), [] if many else agents)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        _describe(axes, "milliseconds a step", "agent" if many else "")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)

    said = [
        f"{agent}: "
        + ", ".join(f"{part} {1e3 * s:.3g} ms" for part, s in zip(PARTS, own, strict=True))
        + "."
        for agent, own in list(zip(agents, seconds, strict=True))[:LISTED]
    ]
    title = "Time of a training step"
    height = max(3.0, min(12.0, 1.0 + 0.22 * len(agents)))
    return chart(name, title, f"{title}, by agent. {' '.join(said)}", draw, (4.3, height))


# --- right and wrong -----------------------------------------------------------------------------


def confusion(name: str, counts: npt.NDArray[np.int64], classes: Sequence[str]) -> Chart:
    """How often samples of each class (rows) were taken for each class (columns).

    Args:
        name: of the chart.
        counts: of samples.
        classes: what they are called.
    """
    C, total = len(counts), int(counts.sum())
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = C > SHOWN

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.set_aspect("equal")
        axes.set(xlim=(-0.5, C - 0.5), ylim=(C - 0.5, -0.5))
        for true, taken in np.argwhere(counts):
            colour = LIGHT["c2" if true == taken else "c1"]
            # A single mistake has to be seen.
            alpha = 0.15 + 0.45 * float(share[true, taken])
            corner = taken - 0.47, true - 0.47
            axes.add_patch(
                Rectangle(corner, 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0)
            )
            if many:
                continue
            axes.text(
                taken,
                true,
                f"{counts[true, taken]}",
                ha="center",
                va="center",
                fontsize=8 if total < 10_000 else 7,
            )
        axes.set(xlabel="taken for", ylabel="is")
        if many:
            axes.set(xticks=[], yticks=[])
            return
        said = [f"{called[:15]}…" if len(called) > 16 else called for called in classes]
        upright = C * max(map(len, said)) > 40  # names that would run into one another
        axes.set_xticks(range(C), said, rotation=90 if upright else 0)
        axes.set_yticks(range(C), said)

    right = int(np.trace(counts))
    recall = np.diag(share)
    worst = int(np.where(counts.sum(1) > 0, recall, np.inf).argmin())
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    pairs = [(int(k) // C, int(k) % C) for k in order if wrong.flat[k]]
    mistakes = (
        ", ".join(f"{classes[i]} taken for {classes[j]} ({wrong[i, j]})" for i, j in pairs)
        or "none"
    )
    title = "Confusion matrix"
    alt = (
        f"{title} of {total} test samples, {right} of them right ({right / total:.2%}). Class "
        f"{classes[worst]} is recognised least often ({recall[worst]:.1%}). Most frequent "
        f"mistakes: {mistakes}."
    )
    return chart(name, title, alt, draw, (4.3, 4.0))


def fit(
    name: str, true_BC: npt.NDArray[np.float64], predicted_BC: npt.NDArray[np.float64], r2: float
) -> Chart:
    """What was predicted of targets over what they are, all in their own units.

    Args:
        name: of the chart.
        true_BC: the targets.
        predicted_BC: what was predicted.
        r2: of both.
    """
    true, predicted = true_BC.ravel(), predicted_BC.ravel()
    total = len(true)
    some = slice(None, None, max(1, math.ceil(total / DOTS)))
    low, high = (
        float(end([true.min(), predicted.min(), true.max(), predicted.max()])) for end in (min, max)
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_aspect("equal")
        axes.plot((low, high), (low, high), color=LIGHT["ink"], linewidth=0.9)
        dots = {"s": 5, "linewidths": 0, "alpha": 0.5, "color": LIGHT["c0"]}
        axes.scatter(true[some], predicted[some], **dots)  # type: ignore[arg-type]
        axes.set(xlabel="is", ylabel="predicted")

    title = "Predicted and true"
    off = np.abs(predicted - true)
    alt = (
        f"{title} numbers: {total} of the test set, from {true.min():.4g} to {true.max():.4g}. R² "
        f"is {r2:.4f}; half of the predictions are off by less than {np.median(off):.3g}, one in "
        f"twenty by more than {np.quantile(off, 0.95):.3g}."
    )
    return chart(name, title, alt, draw, (4.3, 4.0))


def errors(name: str, what: Sequence[str], rmse: Sequence[float]) -> Chart:
    """The error of each agent's targets, or of each target.

    Args:
        name: of the chart.
        what: whose.
        rmse: root of the mean square of standardised errors: 1 is that of the training mean.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(range(len(what)), rmse, color=LIGHT["c1"])
        axes.axvline(1, color=LIGHT["ink"], linewidth=0.9)
        many = len(what) > SHOWN
        axes.set_yticks([] if many else range(len(what)), [] if many else what)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("RMSE over the target's deviation")

    order = np.argsort(rmse)
    best, worst = int(order[0]), int(order[-1])
    title = "Error by agent or target"
    alt = (
        f"{title}: RMSE over the deviation of the targets, of {len(what)}. Least {rmse[best]:.3g} "
        f"({what[best]}), largest {rmse[worst]:.3g} ({what[worst]})."
    )
    height = max(3.0, min(12.0, 1.0 + 0.22 * len(what)))
    return chart(name, title, alt, draw, (4.3, height))
