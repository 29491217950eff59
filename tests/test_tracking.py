from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from urllib.request import urlopen

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hdnn_dist
from hdnn_dist import tracking
from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.errors import UserError
from hdnn_dist.figures import Chart
from hdnn_dist.job import Job
from hdnn_dist.tracking import MLflow, TensorBoard, Tracker, WandB, serve
from hdnn_dist.trainer import Listener, Progress, Runner
from tests.commands import hdnn

SPEC = {
    "topology": {"name": "line", "agents": 3, "d": 2, "edges": [["a1", "a2"], ["a2", "a3"]]},
    "model": {"layers": 2},
    "data": {"train_samples": 96, "test_samples": 50},
    "training": {"epochs": 2, "batch_size": 32},
}
NUMBERS = {
    "train/loss",
    "train/accuracy",
    "train/lr",
    "train/samples_per_second",
    "test/loss",
    "test/accuracy",
    "gradients/y_0000",
    "gradients/y_0001",
    "gradients/y_0002",
    "time/compute",
    "time/send",
    "time/wait",
}
FIGURES = {"topology", "gradients", "times", "confusion"}


class Told(Tracker):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.drawn: list[tuple[int, str]] = []

    def begin(self, job: Job, step: int) -> None:
        assert job.topology.name == "line"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.names |= values.keys()

    def figure(self, step: int, chart: Chart) -> None:
        self.drawn.append((step, chart.name))


@pytest.fixture
def job() -> Job:
    return Job.load(SPEC)


def train(job: Job, run: Path, *listeners: Listener) -> hdnn_dist.Summary:
    return hdnn_dist.train(job, run=run, local=True, listeners=listeners)


def test_the_last_figures_are_drawn_and_others_as_time_allows(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(tracking, "IDLE", 1e6)
    train(job, tmp_path / "seldom", told)
    assert told.names == NUMBERS
    last = [(6, "confusion"), (6, "gradients"), (6, "times")]
    assert sorted(told.drawn) == [(0, "topology"), *last]
    told = Told()
    monkeypatch.setattr(tracking, "IDLE", 0.0)
    train(job, tmp_path / "always", told)
    first = [(3, "confusion"), (3, "gradients"), (3, "times")]
    assert sorted(told.drawn) == [(0, "topology"), *first, *last]


def test_of_targets_there_are_rmse_and_r2(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 3))
    spec = SPEC | {"data": hdnn_dist.write_table(tmp_path / "table", (x, x), (x, x))}
    told = Told()
    train(Job.load(spec), tmp_path / "run", told)
    scores = {f"{part}/{name}" for part in ("train", "test") for name in ("rmse", "r2")}
    assert told.names == NUMBERS - {"train/accuracy", "test/accuracy"} | scores
    assert {name for _, name in told.drawn} == FIGURES - {"confusion"}


def test_an_evaluation_counts_who_is_taken_for_whom(job: Job) -> None:
    runner = hdnn_dist.LocalRunner(job)
    runner.train(3)
    found = runner.evaluate()
    assert [len(row) for row in found.confusion] == [10] * 10
    assert sum(map(sum, found.confusion)) == found.samples == 50
    assert sum(found.confusion[c][c] for c in range(10)) == round(found.accuracy * 50)


def test_tensorboard_has_numbers_and_figures(job: Job, tmp_path: Path) -> None:
    train(job, tmp_path / "run", TensorBoard(tmp_path / "run", figures=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == NUMBERS
    assert set(events.Tags()["images"]) == FIGURES
    image = events.Images("confusion")[-1]
    assert (image.step, image.width > 300) == (6, True)
    assert len(events.Scalars("train/loss")) == 6


def test_tensorboard_forgets_what_was_past_the_checkpoint(job: Job, tmp_path: Path) -> None:
    def play(start: int, stop: int) -> None:
        board = TensorBoard(tmp_path)
        board.started(cast(Runner, SimpleNamespace(job=job)), start)
        for k in range(start + 1, stop + 1):
            progress = Progress(k, 4, 1, 2, 0.5, 0.75, 100.0, 65.0)
            board.stepped([StepResult(k, 0.5, 3, 4, 0.01, None)], progress)
            if k % 2 == 0:
                board.evaluated(k, k // 2, Evaluation(0.25, 0.9, 10))
        board.close()

    play(0, 3)
    time.sleep(1.1)  # TensorBoard reads its files in the order of the second they were made in
    play(2, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("test/accuracy")] == [2, 4]
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(0.9)


def test_of_targets_rmse_and_r2_are_told(job: Job, tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.started(cast(Runner, SimpleNamespace(job=job)), 0)
    progress = Progress(1, 4, 1, 2, 0.5, None, 100.0, 65.0)
    board.stepped([StepResult(1, 0.5, None, 4, 0.01, None, 9.0, 1.0)], progress)
    board.evaluated(1, 1, Evaluation(0.25, None, 10, 4.0, 0.5))
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = {"train/rmse": 3.0, "train/r2": 0.5, "test/rmse": 2.0, "test/r2": 0.5}
    assert {name: events.Scalars(name)[0].value for name in told} == told
    assert "train/accuracy" not in events.Tags()["scalars"]


def test_tensorboard_is_served_to_this_machine_alone(job: Job, tmp_path: Path) -> None:
    train(job, tmp_path / "run")
    address = serve(tmp_path / "run")
    assert address.startswith("http://127.0.0.1:")
    until, tags = time.monotonic() + 30, {}
    while not tags and time.monotonic() < until:  # it reads the events by and by
        with urlopen(f"{address}data/plugin/scalars/tags") as answer:
            tags = json.load(answer)
        time.sleep(0.1)
    assert tags["tensorboard"].keys() == NUMBERS


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLflow's own store of files; the extra's client knows no other one on disk."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"file:{tmp_path / 'mlruns'}")
    return uri


def test_mlflow_has_settings_numbers_and_figures(job: Job, tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    run = tmp_path / "run"
    train(job, run, MLflow(run))
    client = MlflowClient(store)
    [experiment] = client.search_experiments(filter_string="name = 'hdnn_dist'")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == json.loads((run / "tracking.json").read_text())["mlflow"]
    assert (found.data.params["model.layers"], found.data.params["training.epochs"]) == ("2", "2")
    assert found.data.metrics.keys() == NUMBERS
    assert [m.step for m in client.get_metric_history(found.info.run_id, "test/loss")] == [3, 6]
    images = {item.path for item in client.list_artifacts(found.info.run_id, "images")}
    for name in FIGURES:
        assert any(re.match(rf"images/{name}\W", path) for path in images), name


def test_a_run_that_goes_on_goes_on_in_mlflow(job: Job, tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    run = tmp_path / "run"
    train(job, run, MLflow(run))
    longer = hdnn_dist.LocalRunner(Job.load(run / "spec.yaml", ["training.epochs=3"]))
    hdnn_dist.fit(longer, run, [MLflow(run)])
    client = MlflowClient(store)
    [id] = json.loads((run / "tracking.json").read_text()).values()
    assert [m.step for m in client.get_metric_history(id, "test/loss")] == [3, 6, 9]


def test_a_store_that_takes_no_run_is_told_at_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    with pytest.raises(UserError, match=r"mlflow takes no run: .*gopher"):
        train(job, tmp_path / "run", MLflow(tmp_path / "run"))


def test_what_a_tracker_comes_to_does_not_end_a_run(
    job: Job,
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    def unreachable(*_: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(MlflowClient, "log_batch", unreachable)
    with caplog.at_level(logging.WARNING, "hdnn_dist"):
        assert train(job, tmp_path / "run", MLflow(tmp_path / "run")).epochs == 2
    assert [r.message for r in caplog.records] == [
        r"mlflow is told no more of this run: no route\nto host"
    ]


@pytest.mark.parametrize(("kind", "extra"), [(MLflow, "mlflow"), (WandB, "wandb")])
def test_a_package_that_is_not_there_is_named_with_its_extra(
    kind: type[Listener], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(UserError, match=rf"pip install .hdnn_dist\[{extra}\]"):
        kind(tmp_path)  # type: ignore[call-arg]


def test_weights_and_biases_is_told_offline(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    run, told, shown = tmp_path / "run", [], []
    log = wandb.sdk.wandb_run.Run.log

    def spy(self: object, data: dict[str, object]) -> None:
        told.append(data)
        shown.extend(name for name, value in data.items() if isinstance(value, wandb.Image))
        log(self, data)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", spy)
    train(job, run, WandB(run))
    assert {name for data in told for name in data} == NUMBERS | FIGURES | {"step"}
    assert set(shown) == FIGURES
    [folder] = (run / "wandb").glob("offline-run-*")
    [written] = folder.glob("*.wandb")
    known = json.loads((run / "tracking.json").read_text())
    assert known == {"wandb": written.stem.removeprefix("run-")}
    until = time.monotonic() + 30
    while b"gradients/y_0002" not in written.read_bytes():  # its own process writes on for a moment
        assert time.monotonic() < until
        time.sleep(0.1)


def test_train_shows_itself_and_tells_who_is_named(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["training.epochs=1", "data.train_samples=64", "data.test_samples=30"]
    changes = [f"--set={change}" for change in small]
    run = tmp_path / "run"
    assert hdnn("train", "--local", "--run", run, "--ui", "--track", "mlflow", *changes) == 0
    assert "TensorBoard, until this command ends: http://127.0.0.1:" in capsys.readouterr().out
    assert json.loads((run / "tracking.json").read_text()).keys() == {"mlflow"}
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == FIGURES


def test_what_has_no_events_cannot_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert hdnn("train", "--local", "--run", "memory://elsewhere", "--ui") == 2
    assert "choose a local --run" in capsys.readouterr().err
