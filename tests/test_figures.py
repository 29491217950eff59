from __future__ import annotations

import io
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from hdnn_dist import figures
from hdnn_dist.errors import UserError
from hdnn_dist.figures import Chart, Curve
from hdnn_dist.job import Job
from tests.commands import hdnn

GRID = {
    "topology": {"agents": 4, "edges": [["a1", "a2"], ["a1", "a3"], ["a2", "a4"], ["a3", "a4"]]},
    "model": {"layers": 2},
    "data": {"split": {"kind": "patches", "grid": [2, 2]}},
}


def charts() -> list[Chart]:
    job = Job.load(GRID)
    wild = Curve(0, "_<$x_1$>", ((1, math.nan), (2, 0.0), (3, 1e300)), marked=True)
    dense = Curve(1, "batches", tuple((k, 1 / (k + 1)) for k in range(5000)), marked=False)
    return [
        figures.topology(job, [0, 0, 1, 1]),
        figures.curves("loss", "Loss", "cross-entropy", [wild, dense], logarithmic=True),
        figures.curves("none", "Accuracy", "share", []),
        figures.gradients("gradients", [(k, [0.1, 0.0, math.nan]) for k in range(1, 20)]),
        figures.sensitivities("bsm", [[1.0, 2.0]] * 100, [400.0] * 100, 2),
        figures.times("times", ["a1", "a2"], [[1e-3, 0, 2e-3], [3e-3, 0, 0]]),
        figures.confusion("confusion", np.array([[5, 1, 0], [0, 4, 2], [0, 0, 0]])),
    ]


@pytest.fixture(scope="module", params=charts(), ids=lambda chart: chart.name)
def chart(request: pytest.FixtureRequest) -> Chart:
    return request.param  # type: ignore[no-any-return]


def test_a_figure_is_a_picture_and_an_element_of_a_page(chart: Chart) -> None:
    assert imread(io.BytesIO(chart.png)).std() > 0.01  # not blank
    element = ElementTree.fromstring(chart.svg)
    assert element.get("role") == "img"
    assert element.get("aria-label") == chart.alt
    assert len(chart.svg) < 150_000


def test_every_colour_follows_the_readers_preference(chart: Chart) -> None:
    assert not re.findall(r"(?:fill|stroke): (?!none|var|url)[^;\"]+", chart.svg)
    assert set(re.findall(r"var\(--(\w+)\)", chart.svg)) <= figures.LIGHT.keys()
    assert figures.LIGHT.keys() == figures.DARK.keys()
    for colours in (figures.LIGHT, figures.DARK):
        for name in ("ink", "soft", *figures.SERIES):
            assert contrast(colours[name], colours["paper"]) > (
                3 if name in figures.SERIES else 4.5
            )


def contrast(a: str, b: str) -> float:
    """The contrast of two colours by WCAG 2."""

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_two_figures_share_no_id() -> None:
    ids = [i for chart in charts() for i in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids)) > 50


def test_alternative_text_says_the_numbers() -> None:
    topology, loss, none, gradients, bsm, times, confusion = (chart.alt for chart in charts())
    assert "4 agents and 4 links" in topology
    assert "a2 sees 16 of 64 features, in actor 0" in topology
    assert "batches: 1 at step 0, 0.0002 at step 4999" in loss
    assert "no records" in none
    assert "Epoch 19: 0.1 at the first state" in gradients
    assert "1 to 2" in bsm
    assert "10^400.00" in bsm
    assert "a1: compute 1 ms, send 0 ms, wait 2 ms" in times
    assert "12 test samples, 9 of them right (75.00%)" in confusion
    assert "Class 1 is recognised least often (66.7%)" in confusion
    assert "1 taken for 2 (2), 0 taken for 1 (1)" in confusion


def test_agents_lie_as_what_they_see_does_in_the_image() -> None:
    at = figures._layout(Job.load(GRID))
    left, right, top, bottom = (0, 2), (1, 3), (0, 1), (2, 3)
    assert max(at[i][0] for i in left) < min(at[i][0] for i in right)
    assert min(at[i][1] for i in top) > max(at[i][1] for i in bottom)


def test_a_view_is_drawn_as_rectangles_of_the_whole_input() -> None:
    job = Job.load(GRID)
    assert list(figures._seen(job.views[3], (8, 8), 64)) == [(0.5, 0.5, 0.5, 0.5)]
    odd = Job.load(
        {**GRID, "data": {"split": {"kind": "indices", "indices": {"a1": [0, 1, 3, 8, 9, 11, 24]}}}}
    )
    found = list(figures._seen(odd.views[0], (8, 8), 64))
    assert found == [(0, 0, 0.25, 0.25), (0.375, 0, 0.125, 0.25), (0, 0.375, 0.125, 0.125)]
    assert list(figures._seen(odd.views[1], (8, 8), 64)) == []
    row = list(figures._seen(odd.views[0], None, 64))  # no image: a row of features
    assert row[0] == (0, 0, 2 / 64, 1)


def test_a_graph_of_thousands_is_no_picture() -> None:
    ring = {"agents": 401, "edges": {"generator": "cycle_graph", "args": {"n": 401}}}
    job = Job.load(
        {"topology": ring, "model": {"layers": 1}, "data": {"split": {"agents": ["a1", "a2"]}}}
    )
    with pytest.raises(UserError, match="at most 400"):
        figures.topology(job, None)


def test_a_job_is_drawn_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("drawn.png", "drawn.svg"):
        assert hdnn("topology", "draw", "--out", tmp_path / name) == 0
        assert "a1 sees 8 of 64 features, in actor 0." in capsys.readouterr().out
    assert imread(tmp_path / "drawn.png").std() > 0.01
    style = ElementTree.parse(tmp_path / "drawn.svg").find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    assert "prefers-color-scheme:dark" in (style.text or "")
    assert hdnn("topology", "draw", "--out", tmp_path / "drawn.pdf") == 2
    assert "neither a .png nor an .svg" in capsys.readouterr().err
