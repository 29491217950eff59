from __future__ import annotations

import csv
import errno
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from hdnn_dist.agent import Evaluation
from hdnn_dist.data import PIXELS, load_features
from hdnn_dist.errors import DataError, RunError
from hdnn_dist.spec import DataSpec
from hdnn_dist.storage import Place
from hdnn_dist.trainer import LocalRunner
from tests.commands import error_of, hdnn

SPEC = """\
topology: {name: line, agents: [a, b, c], d: 2, edges: [[a, b], [b, c]]}
model: {layers: 2}
data: {name: digits, train_samples: 96, test_samples: 50}
training: {epochs: 3, batch_size: 32}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "line.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def trained(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    run = tmp_path / "trained"
    assert hdnn("train", spec, "--local", "--run", run, "--no-tensorboard") == 0
    capsys.readouterr()
    return run


def files(run: Path) -> dict[str, bytes]:
    """The weights and optimiser states of the latest checkpoint."""
    folder = sorted((run / "checkpoints").iterdir())[-1]
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(run: Path) -> list[tuple[str, int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r]


def test_train_leaves_a_whole_run_directory(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert hdnn("train", spec, "--local", "--run", run, "--set", "training.epochs=2") == 0
    shown = capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert f"test accuracy {summary['test_accuracy']:.2%}" in shown
    assert f"run: {run}" in shown
    assert summary["steps"] == 6
    assert [step for kind, step, _ in losses(run) if kind == "train"] == [1, 2, 3, 4, 5, 6]
    assert [step for kind, step, _ in losses(run) if kind == "eval"] == [3, 6]
    assert sorted(files(run)) == [f"{name}.safetensors" for name in "abc"]
    assert "epochs: 2" in (run / "spec.yaml").read_text()
    assert list((run / "tensorboard").iterdir())


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    spec: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "cut"
    train = LocalRunner.train

    def interrupted(self: LocalRunner, steps: int) -> object:
        if self.worker.step >= 4:
            raise KeyboardInterrupt
        return train(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(LocalRunner, "train", interrupted)
        patch.setattr("hdnn_dist.trainer.REPORT_EVERY", 0.0)  # steps one by one
        assert hdnn("train", spec, "--local", "--run", run, "--no-tensorboard") == 130
    assert capsys.readouterr().err == (
        f"interrupted; continue with: hdnn-dist train --resume {run} --local\n"
    )
    assert losses(run)[-1][1] == 4  # one past the checkpoint: this record is dropped
    assert hdnn("train", "--resume", run, "--local", "--no-tensorboard") == 0
    assert files(run) == files(trained)
    assert losses(run) == losses(trained)


def test_a_run_cut_before_its_first_checkpoint_starts_again(
    spec: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "early"
    with monkeypatch.context() as patch:
        patch.setattr(LocalRunner, "train", Mock(side_effect=RunError("cut")))
        assert hdnn("train", spec, "--local", "--run", run, "--no-tensorboard") == 1
    assert hdnn("eval", run, "--local") == 2
    assert hdnn("train", "--resume", run, "--local", "--no-tensorboard") == 0
    assert files(run) == files(trained)


def test_agents_leave_a_run_and_join_it_again(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: object) -> str:
        assert hdnn(*arguments) == 0
        return capsys.readouterr().out

    options = ("--resume", trained, "--local", "--no-tensorboard", "--set")
    later = f"from the next checkpoint of {trained} on:"
    assert shown("drop", trained, "a") == f"absent {later} a\n"
    assert "step 9)" in shown("eval", trained, "--local")  # as its last checkpoint has it
    assert "goes on without a from step 9\n" in shown("train", *options, "training.epochs=4")
    assert shown("join", trained, "a") == f"absent {later} nobody\n"
    again = shown("train", *options, "training.epochs=5")
    assert "goes on with a, at initial weights, from step 12\n" in again


def test_a_run_can_be_prolonged(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = "training.epochs=4"
    assert hdnn("train", "--resume", trained, "--local", "--set", longer) == 0
    assert json.loads((trained / "summary.json").read_text())["steps"] == 12
    capsys.readouterr()
    assert hdnn("train", "--resume", trained, "--local") == 0  # 4 is now in its spec
    shown = capsys.readouterr().out
    assert "nothing to train" in shown
    assert "4 epochs in" in shown
    assert hdnn("train", "--resume", trained, "--local", "--set", "training.epochs=2") == 2
    assert "set training.epochs to 4 or more" in error_of(capsys)


def test_eval_is_what_the_summary_says(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hdnn("eval", trained, "--local", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "summary.json").read_text())
    assert (result["accuracy"], result["loss"]) == (summary["test_accuracy"], summary["test_loss"])
    assert (result["part"], result["samples"], result["step"]) == ("test", 50, 9)
    assert hdnn("eval", trained, "--local", "--part", "train") == 0
    assert "(96 samples, step 9)" in capsys.readouterr().out


def test_predict_writes_a_line_a_sample(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn("predict", trained, "--local") == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["index"] for row in rows] == [str(k) for k in range(50)]
    for row in rows:
        p = [float(row[f"p{c}"]) for c in range(10)]
        assert sum(p) == pytest.approx(1, abs=1e-4)
        assert float(row["probability"]) == max(p) == p[int(row["class"])]

    # The same samples as raw pixels in a file.
    white, mean, std = PIXELS["digits"]
    x_BF = load_features(DataSpec(test_samples=50), "test", range(64))
    np.save(tmp_path / "raw.npy", np.rint((x_BF * std + mean) * white))
    out = tmp_path / "out.csv"
    assert hdnn("predict", trained, "--local", "--input", tmp_path / "raw.npy", "--out", out) == 0
    again = list(csv.DictReader(out.open()))
    assert [row["class"] for row in again] == [row["class"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train nowhere.yaml --local", "cannot read nowhere.yaml"),
        ("check --calibration nowhere.json", "there is no nowhere.json; write it by hdnn-dist"),
        ("train --local --set epochs=3", "epochs: unknown key"),
        ("train --local --set training.epochs", "--set training.epochs: this is no override"),
        ("train --local --data-dir .", "digits is built in and reads no folder"),
        ("train --local --address auto", "--local and --address are both given"),
        ("train --resume {run} --local --run other", "--run is given with --resume"),
        ("train spec.yaml --resume {run} --local", "a SPEC is given with --resume"),
        ("train --local --run {run}", "is not empty"),
        ("train --local --run {run}/spec.yaml/x", "spec.yaml is a file"),
        ("train --resume {run} --local --set model.layers=3", "model.layers: 2 -> 3;"),
        ("train --resume nowhere --local", "nowhere is no run directory"),
        ("eval nowhere --local", "nowhere is no run directory"),
        ("eval {run} --local --set training.seed=1", "training.seed: 0 -> 1;"),
        ("predict nowhere --local", "nowhere is no run directory"),
        ("predict {run} --local --input nowhere.npy", "nowhere.npy cannot be read"),
        ("predict {run} --local --out nowhere/out.csv", "there is no folder nowhere"),
        ("check nowhere.yaml", "cannot read nowhere.yaml"),
        ("drop {run} d", "there is no agent 'd'"),
        ("drop {run} b", "'b' is the root of the readout, which alone holds the labels"),
        ("join {run} a", "agent 'a' takes part already"),
        ("drop nowhere a", "nowhere is no run directory"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: str,
    says: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hdnn(*arguments.format(run=trained).split()) == 2
    assert says in error_of(capsys)


def test_a_full_disk_is_told_with_a_hint(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    full = OSError(errno.ENOSPC, "No space left on device")
    saves: list[int] = []

    class Filling(LocalRunner):
        def save(self, folder: Place) -> dict[str, str]:
            saves.append(self.worker.step)
            if len(saves) == 2:
                monkeypatch.setattr("os.fsync", Mock(side_effect=full))
            return super().save(folder)

    monkeypatch.setattr("hdnn_dist.api.LocalRunner", Filling)
    assert hdnn("train", spec, "--local", "--run", run, "--no-tensorboard") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {run}/checkpoints/step-00000006/a.safetensors: cannot be written "
        "(No space left on device); step-00000003 is whole; make room there",
        f"continue with: hdnn-dist train --resume {run} --local",
    ]
    monkeypatch.undo()
    assert hdnn("train", "--resume", run, "--local", "--no-tensorboard") == 0
    assert hdnn("train", spec, "--local", "--run", tmp_path / "quiet", "--no-tensorboard") == 0
    assert files(run) == files(tmp_path / "quiet")
    assert not list(run.rglob(".*"))


def test_a_user_error_amid_training_is_told_with_a_hint(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        LocalRunner, "train", Mock(side_effect=DataError("a file is damaged", "mend it"))
    )
    assert hdnn("train", spec, "--local", "--run", tmp_path / "run", "--no-tensorboard") == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: a file is damaged; mend it"
    assert "--resume" in hint


@pytest.mark.slow
def test_an_interrupt_saves_the_very_step(spec: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--local", "--run", run, "--no-tensorboard", "--set", "training.epochs=100000"]
    options += ["--set", "training.checkpoint_every=100000", "--set", "training.eval_every=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hdnn_dist", "train", spec, *map(str, options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saving a checkpoint" in told
    assert f"continue with: hdnn-dist train --resume {run} --local" in told
    [folder] = (run / "checkpoints").iterdir()
    step = int(folder.name.removeprefix("step-"))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert step == max(steps) > 0


def test_eval_prints_json_that_can_be_read(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalRunner, "evaluate", lambda *_: Evaluation(math.nan, 0.1, 50))
    assert hdnn("eval", trained, "--local", "--json") == 0
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (result["loss"], result["accuracy"]) == (None, 0.1)


def test_predict_refuses_a_folder_before_it_starts(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hdnn_dist.api.open_run", Mock(side_effect=AssertionError("started")))
    assert hdnn("predict", trained, "--local", "--out", tmp_path) == 2
    assert f"--out: {tmp_path} is a folder; name a file" in error_of(capsys)


@pytest.mark.cluster
def test_train_and_eval_on_ray(
    spec: Path,
    trained: Path,
    tmp_path: Path,
    cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "ray"
    two = ("--set", "cluster.agents_per_actor=2")
    assert hdnn("train", spec, *two, "--run", run, "--no-tensorboard", "--profile", 2) == 0
    shown = capsys.readouterr().out
    assert "3 agents on 2 Ray actors" in shown
    assert f"trace: {run / 'trace.json'}" in shown
    slices = json.loads((run / "trace.json").read_text())["traceEvents"]
    slices = [each for each in slices if each["ph"] == "X"]
    assert {(each["pid"], each["args"]["step"]) for each in slices} == {
        (actor, step) for actor in (0, 1) for step in (2, 3)
    }
    waits = {(each["pid"], each["args"].get("for")) for each in slices if each["cat"] == "wait"}
    # No actor where all had come already, as always where the other is always first.
    assert waits <= {(0, "actor 1"), (1, "actor 0"), (0, None), (1, None)}
    # On one axis: nobody ends a step before the other has sent what it needs for it.
    for step in 2, 3:
        spans = [[s for s in slices if s["pid"] == p and s["args"]["step"] == step] for p in (0, 1)]
        starts = [min(each["ts"] for each in span) for span in spans]
        ends = [max(each["ts"] + each["dur"] for each in span) for span in spans]
        assert max(starts) < min(ends)
    # float32 and other shapes of the same sums: close, not equal
    assert [loss for *_, loss in losses(run)] == pytest.approx(
        [loss for *_, loss in losses(trained)], rel=1e-4
    )
    assert hdnn("eval", run, "--json") == 0
    on_ray = json.loads(capsys.readouterr().out)
    assert hdnn("eval", run, "--local", "--json") == 0
    here = json.loads(capsys.readouterr().out)
    assert here["loss"] == pytest.approx(on_ray["loss"], rel=1e-5)
    assert here["step"] == on_ray["step"] == 9
