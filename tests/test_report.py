from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import prune

import hdnn_dist
from hdnn_dist.data import epoch_order, load_features, load_labels
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.model import HDNN
from hdnn_dist.testing import assert_close
from hdnn_dist.trainer import LocalRunner
from tests.commands import hdnn

TINY = [
    "topology.agents=4",
    "topology.edges.args.n=4",
    "topology.d=2",
    "model.layers=3",
    "data.split.kind=auto",
    "data.train_samples=96",
    "training.batch_size=32",
    "training.epochs=2",
    "training.dtype=float64",
    "training.clip_norm=1.0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(hdnn_dist.train(overrides=TINY, run=tmp_path_factory.mktemp("r"), local=True).run)


def test_gradient_norms_during_training_are_those_of_the_dense_model() -> None:
    job = Job.load(None, [*TINY, "training.batch_size=96", "training.clip_norm=null"])
    runner = LocalRunner(job)
    runner.train(1)  # an epoch of one step
    model = HDNN(job.architecture, torch.float64)
    index = torch.from_numpy(epoch_order(job.spec.training.seed, 0, 96))
    x = torch.from_numpy(load_features(job.spec.data, "train", range(64)))[index].double()
    labels = torch.from_numpy(load_labels(job.spec.data, "train"))[index]
    states = model.propagate(model.encode(x))
    scores = F.linear(states[-1], model.weight("readout.weight"), model.weight("readout.bias"))
    bars = torch.autograd.grad(F.cross_entropy(scores, labels), states)
    expected = torch.stack([bar.square().sum() for bar in bars])
    assert_close(runner.gradient_squares(), expected, "‖∂loss/∂y_j‖²")


def test_every_epoch_leaves_a_record_of_its_gradients(run: Path) -> None:
    records = [record for record in read_metrics(run) if record["kind"] == "gradients"]
    assert [(record["step"], record["epoch"]) for record in records] == [(3, 1), (6, 2)]
    assert all(len(record["norms"]) == 4 and min(record["norms"]) > 0 for record in records)


def test_analyze_writes_numbers_and_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hdnn("analyze", str(run), "--local", "--samples", "2") == 0
    assert "ResNet (trained)" in capsys.readouterr().out
    report = json.loads((run / "analysis" / "analysis.json").read_text())
    model, *others = report["networks"]
    assert [model["name"], *(n["name"] for n in others)] == [
        "H2",
        "MLP (trained)",
        "ResNet (trained)",
    ]
    assert max(map(max, model["defects"])) < 1e-10
    assert min(map(max, (d for n in others for d in n["defects"]))) > 1e-3
    assert min(map(min, model["norms"])) >= 1
    for network in report["networks"]:
        assert len(network["norms"]) == 3
        assert [len(record["norms"]) for record in network["gradients"]] == [4, 4]
        for norms, log10 in zip(network["norms"], network["log10_bounds"], strict=True):
            assert max(norms) <= 10**log10
    figures = {file.name for file in (run / "analysis").glob("*.png")}
    assert figures == {"sensitivity.png", "defect.png", "energy.png", "gradients.png"}


def test_analyze_without_training_the_baselines(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--local", "--json", "--samples", "1", "--out", str(tmp_path / "out")]
    assert hdnn("analyze", str(run), *options, "--baselines", "initial") == 0
    report = json.loads(capsys.readouterr().out)
    assert [n["name"] for n in report["networks"]] == ["H2", "MLP (initial)", "ResNet (initial)"]
    assert hdnn("analyze", str(run), *options, "--baselines", "none") == 0
    assert len(json.loads(capsys.readouterr().out)["networks"]) == 1


def test_a_baseline_that_diverges_costs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, "model.activation=relu", "training.clip_norm=null", "model.layers=8"]
    overrides += ["data.train_samples=320"]  # ten steps an epoch
    run = hdnn_dist.train(overrides=overrides, run=tmp_path / "run", local=True).run
    hot = ["--set", "training.optimizer.lr=1e6", "--set", "training.epochs=40"]
    assert hdnn("analyze", run, "--local", "--samples", "1", *hot) == 0
    assert "MLP (diverged)" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
    assert report["networks"][0]["norms"][0][0] >= 1
    assert len(list((tmp_path / "run" / "analysis").glob("*.png"))) == 4


SOFTSIGN = """
from hdnn_dist import Activation
known = Activation(lambda x: x / (1 + x.abs()), lambda s: (1 - s.abs()) ** 2,
                   lambda x: x.abs() - x.abs().log1p())
bare = Activation(known.value, known.slope)
"""


def test_an_activation_of_ones_own_from_spec_to_analysis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(SOFTSIGN)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("known", "bare"):
        overrides = [*TINY, f"model.activation=own:{name}"]
        run = hdnn_dist.train(overrides=overrides, run=tmp_path / name, local=True).run
        report = hdnn_dist.analyze(run, local=True, samples=1, baselines="none")
        assert (report["energy"] is None) == (name == "bare")
    for name, reason in (("own:none", "no attribute"), ("broken:x", "division"), ("swish", "use")):
        with pytest.raises(UserError, match=reason):
            Job.load(None, [f"model.activation={name}"])


@pytest.mark.parametrize("member", ["H1", "H2", "MS1", "MS2", "MS3"])
def test_layers_of_any_network_are_analysed_in_one_call(member: str) -> None:
    layers = hdnn_dist.Layers(member, 4, 5)
    prune.l1_unstructured(layers, layers.member.matrices[0], amount=0.2)
    with pytest.raises(UserError, match=r"\(B, 4\)"):
        hdnn_dist.analyze_layers(layers, torch.zeros(2, 5))
    images = torch.randn(2, 4, 3, 3)
    found = hdnn_dist.analyze_layers(layers, images)
    norms = torch.tensor(found["norms"])
    assert norms.shape == torch.tensor(found["energy"]).shape == (5, 18)
    assert (norms.log10().amax(1) <= torch.tensor(found["log10_bounds"])).all()
    assert layers.member.name in found["name"]
    if member in ("H2", "MS3"):
        assert max(map(max, found["defects"])) < 1e-12


def test_analyze_says_what_it_cannot_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn("analyze", str(run), "--local", "--samples", "100000") == 2
    assert "the test set has" in capsys.readouterr().err
    assert hdnn("analyze", str(tmp_path), "--local") == 2
    (tmp_path / "file").touch()
    assert hdnn("analyze", str(run), "--out", str(tmp_path / "file")) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_counterexample_is_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn("counterexample", "--out", str(tmp_path)) == 0
    assert "t = 20.00" in capsys.readouterr().out
    assert (tmp_path / "counterexample.png").stat().st_size > 0
    assert json.loads((tmp_path / "counterexample.json").read_text())["norms"][-1] > 3
