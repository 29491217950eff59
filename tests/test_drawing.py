from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from hdnn_dist import drawing
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.storage import place, read
from tests.commands import hdnn

GRID = {
    "topology": {"agents": 4, "edges": [["a1", "a2"], ["a1", "a3"], ["a2", "a4"], ["a3", "a4"]]},
    "model": {"layers": 2},
    "data": {"split": {"kind": "patches", "grid": [2, 2]}},
}


def test_alternative_text_says_who_sees_what() -> None:
    said = drawing.topology(Job.load(GRID), [0, 0, 1, 1]).alt
    assert "4 agents and 4 links" in said
    assert "a1, a2 see 16 of 64 features, in actor 0" in said


def test_agents_lie_as_what_they_see_does_in_the_image() -> None:
    at = drawing._layout(Job.load(GRID))
    left, right, top, bottom = (0, 2), (1, 3), (0, 1), (2, 3)
    assert max(at[i][0] for i in left) < min(at[i][0] for i in right)
    assert min(at[i][1] for i in top) > max(at[i][1] for i in bottom)


def test_a_view_is_drawn_as_rectangles_of_the_whole_input() -> None:
    job = Job.load(GRID)
    assert list(drawing._seen(job.views[3], (8, 8), 64)) == [(0.5, 0.5, 0.5, 0.5)]
    odd = Job.load(
        {**GRID, "data": {"split": {"kind": "indices", "indices": {"a1": [0, 1, 3, 8, 9, 11, 24]}}}}
    )
    found = list(drawing._seen(odd.views[0], (8, 8), 64))
    assert found == [(0, 0, 0.25, 0.25), (0.375, 0, 0.125, 0.25), (0, 0.375, 0.125, 0.125)]
    assert list(drawing._seen(odd.views[1], (8, 8), 64)) == []
    row = list(drawing._seen(odd.views[0], None, 64))  # no image: a row of features
    assert row[0] == (0, 0, 2 / 64, 1)


points = st.tuples(st.integers(10, 330), st.integers(10, 280))
LABELLED = st.lists(st.tuples(points, st.integers(1, 64)), min_size=1, max_size=12)


@given(LABELLED, st.integers(4, 60), st.data())
def test_names_lie_on_no_frame_and_on_no_other_name(
    agents: list[tuple[tuple[int, int], int]], side: int, data: st.DataObject
) -> None:
    at = {i: place for i, (place, _) in enumerate(agents)}
    said = {i: "x" * letters for i, (_, letters) in enumerate(agents)}
    pairs = list(combinations(at, 2))
    links = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    area = 346, 294
    found = drawing._labels(said, at, side, links, area)
    frames = [(*place, side / 2, side / 2) for place in at.values()]
    names = [(*found[i], 0.3 * drawing.LABEL * len(said[i]), 0.6 * drawing.LABEL) for i in found]
    for k, name in enumerate(names):
        for other in frames + names[:k]:
            assert any(abs(name[j] - other[j]) > name[2 + j] + other[2 + j] for j in (0, 1))
        assert all(name[2 + j] <= name[j] <= area[j] - name[2 + j] for j in (0, 1))


def test_a_name_keeps_off_links_and_is_left_out_where_there_is_no_place_for_it() -> None:
    at = {0: (100, 100), 1: (100, 20), 2: (100, 180), 3: (180, 100)}
    links = [(0, 1), (0, 2), (0, 3)]
    x, y = drawing._labels({0: "hub"}, at, 20, links, (200, 200))[0]
    assert x < 85  # to the left, where no link goes
    assert y == 100
    below = drawing._labels({0: "hub"}, at, 20, [], (200, 200))[0]
    assert below[0] == 100 > below[1]
    assert drawing._labels({0: "x" * 64}, at, 20, [], (200, 200)) == {}


@given(st.tuples(points, points, points, points).map(np.array))
def test_what_of_a_line_lies_in_a_box(drawn: np.ndarray) -> None:
    start, end, corner, other = drawn
    box = Bbox([np.minimum(corner, other) + 0.5, np.maximum(corner, other) + 0.5])
    line = np.linspace(start, end, 2001)
    inside = ((line > box.min) & (line < box.max)).all(1).mean()
    length = float(np.linalg.norm(end - start))
    assert drawing._length_in(box, np.array([[start, end]] * 2, float)) == pytest.approx(
        2 * inside * length, abs=0.003 * length + 1e-6
    )


def test_a_picture_says_who_is_who_and_how_much_a_width_is() -> None:
    names = [f"sensor-{k}" for k in range(40)]
    crowd = {"agents": names, "edges": [[names[0], name] for name in names[1:]]}
    chart = drawing.topology(
        Job.load({"topology": crowd, "model": {"layers": 1}}), [k % 2 for k in range(40)]
    )
    written = re.findall(r"<text[^>]*>([^<]+)</text>", chart.svg)
    assert "sensor-0, root" in written
    assert {"actor 0", "actor 1", "seen of the input"} <= {*written}
    assert all(name in chart.alt for name in names)  # those too that found no place
    even = Job.load(GRID | {"data": {"split": {"kind": "auto"}}})
    widths = re.findall(r">([^<]+ a step)<", drawing.topology(even, None).svg)
    assert widths == ["65.5 kB to 70.7 kB a step"]
    sizes = [{"name": name, "d": d} for name, d in (("a", 1), ("b", 20), ("c", 20))]
    apart = Job.load({"topology": {"agents": sizes, "edges": [["a", "b"], ["b", "c"]]}})
    svg = drawing.topology(apart, None).svg
    assert len(re.findall(r">[\d.]+ kB a step<", svg)) == 2  # the least and the most
    lone = drawing.topology(Job.load({"topology": {"agents": 1}}), None).svg
    assert "a step" not in lone


def test_agents_on_one_spot_are_drawn() -> None:
    place, side = drawing._fill({0: (0, 0), 1: (0, 0), 2: (1, 0)}, (300, 200), 0.5)
    assert place[0] == place[1] == pytest.approx((drawing.MARGIN + side / 2, 100))
    assert side > 2


def test_a_graph_of_thousands_is_no_picture() -> None:
    ring = {"agents": 401, "edges": {"generator": "cycle_graph", "args": {"n": 401}}}
    job = Job.load(
        {"topology": ring, "model": {"layers": 1}, "data": {"split": {"agents": ["a1", "a2"]}}}
    )
    with pytest.raises(UserError, match="at most 400"):
        drawing.topology(job, None)


def test_a_job_is_drawn_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("drawn.png", "drawn.svg"):
        assert hdnn("topology", "draw", "--out", tmp_path / name) == 0
        assert "a1, a2, a3, a4, a5, a6, a7, a8 see 8 of 64 features." in capsys.readouterr().out
    assert imread(tmp_path / "drawn.png").std() > 0.01
    style = ElementTree.parse(tmp_path / "drawn.svg").find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    assert "prefers-color-scheme:dark" in (style.text or "")
    for where in (f"{tmp_path}/other.SVG", f"file://{tmp_path}/by-url.svg", "memory://drawn.png"):
        assert hdnn("topology", "draw", "--out", where) == 0
    assert read(place("memory://drawn.png"), 1 << 20) == (tmp_path / "drawn.png").read_bytes()
    svg = (tmp_path / "drawn.svg").read_bytes()
    assert {(tmp_path / name).read_bytes() for name in ("other.SVG", "by-url.svg")} == {svg}
    capsys.readouterr()
    assert hdnn("topology", "draw", "--out", tmp_path / "drawn.pdf") == 2
    assert "neither a .png nor an .svg" in capsys.readouterr().err
