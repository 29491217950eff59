from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.console import LiveView, PlainView, duration, size, view
from hdnn_dist.job import Job
from hdnn_dist.metrics import JsonLines, TensorBoard
from hdnn_dist.trainer import Listener, LocalRunner, Progress, Runner

TWO_STEPS_AN_EPOCH = cast(Runner, SimpleNamespace(job=SimpleNamespace(steps_per_epoch=2)))


def step(k: int, loss: float = 0.5) -> list[StepResult]:
    return [StepResult(k, loss, 3, 4, 0.01, None)]


def at(k: int) -> Progress:
    return Progress(k, 4, 1, 2, 0.5, 0.75, 100.0, 65.0)


def play(listener: Listener, start: int, stop: int, runner: Runner = TWO_STEPS_AN_EPOCH) -> None:
    """Train from step to step, two an epoch."""
    listener.started(runner, start)
    for k in range(start + 1, stop + 1):
        listener.stepped(step(k), at(k))
        if k % 2 == 0:
            listener.evaluated(k, k // 2, Evaluation(0.25, 0.9, 10))
    listener.close()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_record_a_step_and_an_evaluation(tmp_path: Path) -> None:
    play(JsonLines(tmp_path), 0, 2)
    assert records(tmp_path)[1:] == [
        {
            "kind": "train",
            "step": 2,
            "epoch": 1,
            "loss": 0.5,
            "accuracy": 0.75,
            "lr": 0.01,
            "grad_norm": None,
            "samples_per_second": 100.0,
        },
        {"kind": "eval", "step": 2, "epoch": 1, "loss": 0.25, "accuracy": 0.9, "samples": 10},
    ]


def test_records_are_on_disk_at_once_and_hold_no_nan(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path)
    lines.started(TWO_STEPS_AN_EPOCH, 0)
    lines.stepped(step(1, math.nan), at(1))
    assert records(tmp_path)[0]["loss"] is None
    lines.close()


def test_a_resumed_run_drops_what_was_past_its_checkpoint(tmp_path: Path) -> None:
    play(JsonLines(tmp_path), 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # torn by a crash
    play(JsonLines(tmp_path), 2, 4)
    assert [(r["kind"], r["step"]) for r in records(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]


def test_tensorboard_events(tmp_path: Path) -> None:
    play(TensorBoard(tmp_path), 0, 3)
    play(TensorBoard(tmp_path), 2, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("test/accuracy")] == [2, 4]
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(0.9)


def test_the_console_chooses_its_view() -> None:
    assert isinstance(view(Console(file=io.StringIO())), PlainView)
    assert isinstance(view(Console(file=io.StringIO(), force_terminal=True)), LiveView)


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    plain = PlainView(Console(file=out))
    for k in range(1, 5):
        now += 2.0
        plain.stepped(step(k), at(k))
    plain.evaluated(4, 2, Evaluation(0.25, 0.9, 10))
    assert out.getvalue().splitlines() == [
        "epoch   1  step 3/4  loss 0.5000  accuracy  75.0%  100 samples/s  1:05 left",
        "epoch   2  step 4  test accuracy 90.00%  loss 0.2500",
    ]


def test_the_live_view_shows_where_the_run_stands() -> None:
    out = io.StringIO()
    runner = LocalRunner(Job.load(None, ["data.train_samples=128"]))
    live = LiveView(Console(file=out, force_terminal=True, width=120))
    play(live, 0, 2, runner)
    shown = out.getvalue()
    for part in ("ring8 learns digits: 8 agents in this process", "1/20", "2/40", "1:05 left"):
        assert part in shown
    assert "2.13 MB/step" in shown
    assert "test accuracy 90.00%" in shown


def test_figures_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "5e+03 TB",
    ]
    assert [duration(s) for s in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
