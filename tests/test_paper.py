"""The commands of benchmarks/paper, made tiny."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"


def command(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PAPER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_two_d_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    two_d = command("two_d")
    few = ["--sets", "double_moons", "--layers", "4", "--seeds", "2", "--epochs", "3"]
    two_d.main([*few, "--models", "H1-J1", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "two_d.json").read_text())["cells"]
    assert min(first["H1-J1 4"]["double_moons"]) > 80
    two_d.main([*few, "--models", "H1-J1", "MS2", "--out", str(tmp_path)])
    both = json.loads((tmp_path / "two_d.json").read_text())["cells"]
    assert both.keys() == {"H1-J1 4", "MS2 4"}
    assert both["H1-J1 4"] == first["H1-J1 4"]


def test_two_d_does_not_mix_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--sets", "double_moons", "--layers", "1", "--models", "MS2", "--out", str(tmp_path)]
    two_d = command("two_d")
    two_d.main([*few, "--seeds", "1", "--epochs", "1"])
    with pytest.raises(SystemExit) as exit:
        two_d.main([*few, "--seeds", "1", "--epochs", "2"])
    assert exit.value.code == 2
    assert "another --out" in capsys.readouterr().err


def test_replicas_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The seeds of a stacked net are trained as if alone."""
    two_d, cells = command("two_d"), []
    for seeds in ("1", "2"):
        few = ["--sets", "double_moons", "--layers", "2", "--models", "H2", "--epochs", "1"]
        two_d.main([*few, "--seeds", seeds, "--out", str(tmp_path / seeds)])
        record = json.loads((tmp_path / seeds / "two_d.json").read_text())
        cells.append(record["cells"]["H2 2"]["double_moons"])
    assert cells[1][0] == pytest.approx(cells[0][0], abs=0.1)


def test_ring_tells_the_two_graphs_apart(tmp_path: Path) -> None:
    few = ["--layers", "1", "--epochs", "1", "--seeds", "1", "--ray-seeds", "0"]
    command("ring").main([*few, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "ring.json").read_text())["rows"]
    assert rows["ring"]["parameters"] < rows["full"]["parameters"]
    assert rows["ring"]["bytes_per_step"] < rows["full"]["bytes_per_step"]
