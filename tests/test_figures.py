from __future__ import annotations

import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from hdnn_dist import drawing, figures
from hdnn_dist.figures import Chart, Curve
from hdnn_dist.job import Job


def charts() -> list[Chart]:
    wild = Curve(0, "_<$x_1$>", ((1, math.nan), (2, 0.0), (3, 1e300)), marked=True)
    dense = Curve(1, "batches", tuple((k, 1 / (k + 1)) for k in range(5000)), marked=False)
    return [
        drawing.topology(Job.load(None), [0, 0, 0, 0, 1, 1, 1, 1]),
        figures.curves("loss", "Loss", "cross-entropy", [wild, dense], logarithmic=True),
        figures.curves("none", "Accuracy", "share", []),
        figures.gradients("gradients", [(k, [0.1, 0.0, math.nan]) for k in range(1, 20)]),
        figures.sensitivities("bsm", [[1.0, 2.0]] * 100, [400.0] * 100, 2),
        figures.times("times", ["a1", "a2"], [[1e-3, 0, 2e-3], [3e-3, 0, 0]]),
        figures.confusion("confusion", np.array([[5, 1, 0], [0, 4, 2], [0, 0, 0]]), "abc"),
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


def test_many_classes_are_a_picture_without_names() -> None:
    names = [f"class{k}" for k in range(500)]
    chart = figures.confusion("many", np.diag(np.arange(1, 501)), names)
    assert "class" not in re.sub(r"<svg[^>]*>", "", chart.svg).replace("class=", "")
    assert "Class class0 is recognised" in chart.alt


def test_two_figures_share_no_id() -> None:
    ids = [i for chart in charts() for i in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids)) > 50


def test_alternative_text_says_the_numbers() -> None:
    _, loss, none, gradients, bsm, times, confusion = (chart.alt for chart in charts())
    assert "batches: 1 at step 0, 0.0002 at step 4999" in loss
    assert "no records" in none
    assert "Epoch 19: 0.1 at the first state" in gradients
    assert "1 to 2" in bsm
    assert "10^400.00" in bsm
    assert "a1: compute 1 ms, send 0 ms, wait 2 ms" in times
    assert "12 test samples, 9 of them right (75.00%)" in confusion
    assert "Class b is recognised least often (66.7%)" in confusion
    assert "b taken for c (2), a taken for b (1)" in confusion
