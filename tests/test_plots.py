from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from hdnn_dist.analysis import counterexample
from hdnn_dist.plots import save_counterexample, save_figures


def network(name: str, size: float, depth: int) -> dict[str, object]:
    return {
        "name": name,
        "norms": [[size, size * 2]] * depth,
        "defects": [[0.0, size]] * depth,
        "exact": True,
        "log10_bounds": [400.0] * depth,
        "gradients": [{"epoch": e, "norms": [size] * (depth + 1)} for e in range(1, 20)],
    }


@pytest.mark.parametrize("depth", [1, 100])
def test_each_figure_is_a_picture(tmp_path: Path, depth: int) -> None:
    vanished = network("MLP", 0.0, depth)
    report = {"networks": [network("H2", 1.5, depth), vanished], "energy": [[1.0, 2.0]] * depth}
    made = save_figures(report, tmp_path)
    names = ["sensitivity.png", "defect.png", "energy.png", "gradients.png"]
    assert [file.name for file in made] == names
    for file in (*made, save_counterexample(counterexample(), tmp_path / "c.png")):
        picture = imread(file)
        assert picture.std() > 0.01  # not blank
        assert file.stat().st_size < 100_000


def test_what_there_are_no_numbers_for_is_left_out(tmp_path: Path) -> None:
    report = {"networks": [network("H2", 1.5, 2) | {"gradients": []}], "energy": None}
    assert len(save_figures(report, tmp_path)) == 2
