"""The commands of benchmarks/paper, made tiny."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import depth
import mnist
import pytest
import regulariser
import ring
import torch
import two_d


@pytest.fixture(autouse=True)
def _threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_two_d_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
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
    two_d.main([*few, "--seeds", "1", "--epochs", "1"])
    with pytest.raises(SystemExit) as exit:
        two_d.main([*few, "--seeds", "1", "--epochs", "2"])
    assert exit.value.code == 2
    assert "another --out" in capsys.readouterr().err


def test_replicas_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The seeds of a stacked net are trained as if alone."""
    cells = []
    for seeds in ("1", "2"):
        few = ["--sets", "double_moons", "--layers", "2", "--models", "H2", "--epochs", "1"]
        two_d.main([*few, "--seeds", seeds, "--out", str(tmp_path / seeds)])
        record = json.loads((tmp_path / seeds / "two_d.json").read_text())
        cells.append(record["cells"]["H2 2"]["double_moons"])
    assert cells[1][0] == pytest.approx(cells[0][0], abs=0.1)


def test_ring_tells_the_two_graphs_apart(tmp_path: Path) -> None:
    few = ["--layers", "1", "--epochs", "1", "--seeds", "1", "--ray-seeds", "0"]
    ring.main([*few, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "ring.json").read_text())["cells"]
    assert rows["ring"]["parameters"] < rows["full"]["parameters"]
    assert rows["ring"]["bytes_per_step"] < rows["full"]["bytes_per_step"]


@pytest.mark.cluster
def test_ring_on_actors_has_the_weights_of_the_local_run(tmp_path: Path, cluster: None) -> None:
    # The complete graph too: its readout tree hands one actor several copies of one message.
    few = ["--layers", "2", "--epochs", "1", "--seeds", "1", "--ray-seeds", "1"]
    ring.main([*few, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "ring.json").read_text())["cells"]
    for row in rows.values():
        assert row["ray_accuracy"] == row["accuracy"]
        assert row["weight_difference"] == row["loss_difference"] == [0]


def test_depth_sees_the_gradient_vanish_in_an_MLP_alone(tmp_path: Path) -> None:
    few = ["--layers", "64", "--seeds", "1", "--steps", "3", "--out", str(tmp_path)]
    depth.main([*few, "--models", "MLP", "H2", "H2-T"])
    cells = json.loads((tmp_path / "depth.json").read_text())["cells"]
    assert cells["MLP 64"]["initial"][0] < 0.5
    assert min(cells["H2 64"]["initial"][0], cells["H2-T 64"]["trained"][0]) > 1
    assert "| 64 | " in (tmp_path / "depth.md").read_text()


def test_cells_can_be_run_by_several_processes(tmp_path: Path) -> None:
    few = ["--layers", "4", "--seeds", "1", "--steps", "2", "--models", "MLP", "H2"]
    for jobs in ("1", "2"):
        depth.main([*few, "--jobs", jobs, "--out", str(tmp_path / jobs)])
    once, twice = (json.loads((tmp_path / j / "depth.json").read_text())["cells"] for j in "12")
    assert once == twice


def test_mnist_with_and_without_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--data-dir", str(folder), "--layers", "1", "--models", "H2", "--seeds", "1"]
    mnist.main([*few, "--samples", "200", "--epochs", "1", "--out", str(tmp_path)])
    cells = json.loads((tmp_path / "mnist.json").read_text())["cells"]
    assert cells.keys() == {"none 0 0", "H2 1 0"}
    assert "Without layers" in (tmp_path / "mnist.md").read_text()


@pytest.mark.parametrize(
    ("command", "arguments", "reason"),
    [
        (mnist, ["--data-dir", "/nowhere", "--layers", "1", "--seeds", "1"], "nowhere"),
        (two_d, ["--seeds", "0"], "above 0"),
        (ring, ["--layers", "0"], "above 0"),
        (ring, ["--seeds", "1", "--ray-seeds", "2"], "each is compared to its own"),
        (depth, ["--features", "5", "--layers", "1", "--models", "H2"], "add one"),
    ],
)
def test_mistakes_are_told(
    command: ModuleType,
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main([*arguments, "--out", str(tmp_path)])
    assert exit.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_layers_of_the_mnist_net_act() -> None:
    net, x = mnist.Net("H2", 1, Namespace(kernel=3)), torch.randn(2, 1, 28, 28)
    before = net(x)
    assert net.hamiltonian is not None
    with torch.no_grad():
        net.hamiltonian.Kp *= 2
    assert not torch.allclose(net(x), before)
    assert mnist.Net("none", 0, Namespace(kernel=3)).hamiltonian is None


def test_mnist_moves_each_image_by_a_pixel_at_most() -> None:
    x = torch.arange(2 * mnist.BATCH * 784.0).view(-1, 1, 28, 28)
    moved = list(mnist.batches(x, torch.arange(len(x)), 0, Namespace(shift=1), seed=0))
    image, label = (torch.cat(z) for z in zip(*moved, strict=True))
    assert sorted(label.tolist()) == list(range(len(x)))
    difference = (image - x[label])[:, 0, 9, 9].abs()
    assert set(difference.tolist()) == {0, 1, 27, 28, 29}


def test_the_regulariser_lowers_the_bound(tmp_path: Path) -> None:
    regulariser.main(["--epochs", "3", "--seeds", "1", "--out", str(tmp_path)])
    cells = json.loads((tmp_path / "regulariser.json").read_text())["cells"]
    assert list(cells) == ["0.0", "0.0005", "0.005", "0.05"]
    bound, largest, _ = regulariser.COLUMNS
    assert cells["0.05"][bound] < cells["0.0"][bound]
    assert all(cell[largest] < cell[bound] for cell in cells.values())
