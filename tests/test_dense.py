from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hdnn_dist
from hdnn_dist.data import load_features
from hdnn_dist.model import HDNN
from hdnn_dist.run import reopen
from tests.commands import hdnn

TINY = [
    "topology.agents=4",
    "topology.edges.args.n=4",
    "topology.d=2",
    "model.layers=3",
    "data.train_samples=96",
    "data.test_samples=50",
    "training.batch_size=32",
    "training.epochs=2",
    "training.optimizer.lr=0.1",
]
# A member of the family each, with the graph in K, in J and in both.
MEMBERS = [
    ("H2", "both", ["training.dtype=float64"]),
    ("H1", "J", []),
    ("MS1", "K", []),
    ("MS2", "K", []),
    ("MS3", "K", []),
]


def trained(folder: Path, *overrides: str) -> tuple[Path, np.ndarray, torch.Tensor]:
    """A run, its agents' answers to the test set, and the test set."""
    run = Path(hdnn_dist.train(overrides=[*TINY, *overrides], run=folder, local=True).run)
    with hdnn_dist.open_run(run, local=True) as (agents, _):
        answers, job = agents.predict("test"), agents.job
    x = torch.from_numpy(load_features(job.spec.data, "test", range(64))).to(job.dtype)
    return run, answers, x


@pytest.mark.parametrize(("member", "graph", "more"), MEMBERS)
def test_a_program_answers_as_the_agents_do(
    member: str, graph: str, more: list[str], tmp_path: Path
) -> None:
    names = [f"model.name={member}", f"model.graph={graph}", *more]
    run, answers, x = trained(tmp_path / "run", *names)
    files = hdnn_dist.export(run)
    assert [file.name for file in files] == ["model.pt2", "model.safetensors", "model.json"]
    program = torch.export.load(files[0]).module()
    for rows in (slice(None), slice(0, 1)):  # of any batch
        found = program(x[rows]).softmax(1).numpy()
        np.testing.assert_allclose(found, answers[rows], atol=1e-5)
    state = load_file(files[1])
    job = reopen(run)
    model = HDNN(job.architecture, job.dtype)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    np.testing.assert_allclose(model(x).softmax(1).detach().numpy(), answers, atol=1e-5)


def test_a_program_is_of_the_agents_that_take_part(tmp_path: Path) -> None:
    run, before, x = trained(tmp_path / "run")
    hdnn_dist.regroup(run, leave=["a3"])
    hdnn_dist.fit(hdnn_dist.LocalRunner(reopen(run, ["training.epochs=3"])), run)
    with hdnn_dist.open_run(run, local=True) as (agents, _):
        answers = agents.predict("test")
    program = torch.export.load(hdnn_dist.export(run, tmp_path / "out")[0]).module()
    np.testing.assert_allclose(program(x).softmax(1).numpy(), answers, atol=1e-5)
    assert np.abs(answers - before).max() > 1e-3
    assert json.loads((tmp_path / "out" / "model.json").read_text())["absent"] == ["a3"]


def test_onnx_answers_as_the_agents_do(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    run, answers, x = trained(tmp_path / "run")
    assert hdnn("export", run, "--onnx", "--out", tmp_path / "out") == 0
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    [given] = session.get_inputs()
    for rows in (slice(None), slice(0, 1)):
        [scores] = session.run(None, {given.name: x[rows].numpy()})
        found = torch.from_numpy(scores).softmax(1).numpy()
        np.testing.assert_allclose(found, answers[rows], atol=1e-5)


def test_what_the_numbers_are_is_written_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = trained(tmp_path / "run")
    assert hdnn("export", run) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "export" / "model.json")
    said = json.loads((run / "export" / "model.json").read_text())
    assert said["step"] == 6
    assert said["input"]["image"] == [8, 8]
    raw, x = np.full((1, 64), 16.0), said["input"]
    scaled = (raw / x["white"] - x["mean"]) / x["std"]
    np.save(tmp_path / "white.npy", raw)
    with hdnn_dist.open_run(run, local=True) as (agents, _):
        answers = agents.predict(tmp_path / "white.npy")
    program = torch.export.load(run / "export" / "model.pt2").module()
    found = program(torch.from_numpy(scaled).float()).softmax(1).numpy()
    np.testing.assert_allclose(found, answers, atol=1e-5)


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert hdnn("export", tmp_path, "--onnx") == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
