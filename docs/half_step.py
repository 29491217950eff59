"""The picture of a half step on a graph: `python docs/half_step.py` writes docs/half-step.svg."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, SOFT, PAPER, THERE, BACK = "#1c1d1f", "#5e6167", "#fdfdfc", "#0069a8", "#c94f00"
AGENTS = {"a": (0.0, 0.0), "b": (2.2, 1.0), "c": (4.4, 0.0)}
LINKS = (("a", "b"), ("b", "c"))


def draw() -> Figure:
    """Both rounds of `p⁺ = p - h Kᵀ σ(K q + b)` on three agents in a row."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor=PAPER)
    FigureCanvasSVG(figure)
    first, second = figure.subplots(1, 2)
    _frame(first, "1. states", "s = σ(Σ K q + b)")
    _frame(second, "2. states*: the pull-back", "p⁺ = p - h Σ Kᵀ s")
    for l, i in LINKS:
        for source, target in ((l, i), (i, l)):
            _arrow(first, source, target, THERE, f"q^{source}")
            _arrow(second, source, target, BACK, f"K[{source},{target}]ᵀ s^{source}")
    return figure


def _frame(axes: Axes, title: str, then: str) -> None:
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set(xlim=(-0.9, 5.3), ylim=(-1.2, 2.1))
    axes.set_title(title, color=INK, fontsize=12)
    for name, (x, y) in AGENTS.items():
        axes.annotate(
            name,
            (x, y),
            ha="center",
            va="center",
            fontsize=13,
            color=INK,
            bbox={"boxstyle": "circle,pad=0.55", "facecolor": PAPER, "edgecolor": INK},
            zorder=3,
        )
    axes.text(2.2, -1.1, f"then each agent: {then}", ha="center", color=SOFT, fontsize=11)


def _arrow(axes: Axes, source: str, target: str, colour: str, says: str) -> None:
    (x0, y0), (x1, y1) = AGENTS[source], AGENTS[target]
    axes.annotate(
        "",
        (x1, y1),
        (x0, y0),
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "connectionstyle": "arc3,rad=-0.25",
            "shrinkA": 22,
            "shrinkB": 22,
            "linewidth": 1.6,
        },
    )
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    out = 0.62  # on the arrow's own side of the link
    x, y = (x0 + x1) / 2 - out * (y1 - y0) / length, (y0 + y1) / 2 + out * (x1 - x0) / length
    axes.text(x, y, says, ha="center", va="center", color=colour, fontsize=10)


if __name__ == "__main__":
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "hdnn_dist", "text.parse_math": False}
    ):
        draw().savefig(
            Path(__file__).with_name("half-step.svg"),
            format="svg",
            metadata={"Date": None, "Creator": None},
        )
