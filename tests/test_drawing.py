from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from hdnn_dist import drawing
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from tests.commands import hdnn

GRID = {
    "topology": {"agents": 4, "edges": [["a1", "a2"], ["a1", "a3"], ["a2", "a4"], ["a3", "a4"]]},
    "model": {"layers": 2},
    "data": {"split": {"kind": "patches", "grid": [2, 2]}},
}


def test_alternative_text_says_who_sees_what() -> None:
    said = drawing.topology(Job.load(GRID), [0, 0, 1, 1]).alt
    assert "4 agents and 4 links" in said
    assert "a2 sees 16 of 64 features, in actor 0" in said


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
        assert "a1 sees 8 of 64 features, in actor 0." in capsys.readouterr().out
    assert imread(tmp_path / "drawn.png").std() > 0.01
    style = ElementTree.parse(tmp_path / "drawn.svg").find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    assert "prefers-color-scheme:dark" in (style.text or "")
    assert hdnn("topology", "draw", "--out", tmp_path / "drawn.pdf") == 2
    assert "neither a .png nor an .svg" in capsys.readouterr().err
