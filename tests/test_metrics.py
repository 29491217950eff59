from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hdnn_dist.agent import Evaluation, StepResult
from hdnn_dist.metrics import JsonLines
from hdnn_dist.trainer import Listener, Progress, Runner

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


def test_of_targets_there_are_rmse_and_r2(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path)
    lines.started(TWO_STEPS_AN_EPOCH, 0)
    lines.stepped([StepResult(1, 0.5, None, 4, 0.01, None, 9.0, 1.0)], at(1))
    lines.evaluated(1, 1, Evaluation(0.25, None, 10, 4.0, 0.5))
    lines.close()
    train, test = records(tmp_path)
    assert (train["rmse"], train["r2"], "accuracy" in train) == (3.0, 0.5, False)
    assert (test["rmse"], test["r2"], "accuracy" in test) == (2.0, 0.5, False)


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


@pytest.mark.parametrize(
    "damage", [b"[1]", b"7", b"\xff\xfe", b'{"kind": "train"}', b'{"step": "2"}']
)
def test_lines_that_are_no_records_end_the_file(tmp_path: Path, damage: bytes) -> None:
    play(JsonLines(tmp_path), 0, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage + b'\n{"kind": "train", "step": 1}\n')
    play(JsonLines(tmp_path), 1, 2)
    assert [(r["kind"], r["step"]) for r in records(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]
