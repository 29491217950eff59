from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from hdnn_dist.agent import Evaluation
from hdnn_dist.console import LiveView, LogView, PlainView, duration, size, view, waiting
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner, Progress, Summary
from hdnn_dist.worker import Times

RUNNER = LocalRunner(Job.load(None, ["data.train_samples=128", "training.epochs=220"]))

SUMMARY = Summary.__new__(Summary)  # nothing of it is looked at


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
        plain.stepped([], Progress(k, 4, 1, 2, 0.5, 0.75, 100.0, 65.0))
    plain.evaluated(4, 2, Evaluation(0.25, 0.9, 10))
    assert out.getvalue().splitlines() == [
        "epoch   1  step 3/4  loss 0.5000  accuracy  75.0%  100 samples/s  1:05 left",
        "epoch   2  step 4  test accuracy 90.00%  loss 0.2500",
    ]


def test_targets_have_an_error_in_place_of_an_accuracy() -> None:
    out = io.StringIO()
    plain = PlainView(Console(file=out, width=200))
    plain._last = -math.inf
    plain.stepped([], Progress(3, 4, 1, 2, 0.5, None, 100.0, 65.0, 0.25, 1.0))
    plain.evaluated(4, 2, Evaluation(0.25, None, 10, 16.0, 1.0))
    assert out.getvalue().splitlines() == [
        "epoch   1  step 3/4  loss 0.5000  RMSE 0.5  R² 0.500  100 samples/s  1:05 left",
        "epoch   2  step 4  test RMSE 4  R² 0.7500  loss 0.2500",
    ]


def test_targets_have_an_error_in_log_records_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "hdnn_dist"):
        view = LogView()
        view.stepped([], Progress(3, 4, 1, 2, 0.5, None, 100.0, 65.0, 0.25, 1.0))
        view.evaluated(4, 2, Evaluation(0.25, None, 10, 16.0, 1.0))
    steps, test = (record.__dict__ for record in caplog.records)
    assert (steps["rmse"], steps["r2"], "accuracy" in steps) == (0.5, 0.5, False)
    assert (test["test_rmse"], test["test_r2"], "test_accuracy" in test) == (4.0, 0.75, False)


@pytest.mark.parametrize(("width", "rows"), [(120, 2), (80, 2), (60, 3)])
def test_the_live_view_cuts_no_figure(width: int, rows: int) -> None:
    out = io.StringIO()
    live = LiveView(Console(file=out, force_terminal=True, color_system=None, width=width))
    live.started(RUNNER, 2 * RUNNER.job.steps_per_epoch)
    live.evaluated(6, 3, Evaluation(0.25, 0.9, 10))
    live.stepped([], Progress(396, 440, 198, 220, 0.0007, 1.0, 123456.0, 3723.0))
    live._bar.refresh()
    shown = out.getvalue()
    live.close()
    assert "ring8 learns digits: 8 agents in this process" in shown
    assert "epoch 3/220" in shown  # before the first report
    assert "test accuracy 90.00%" in shown
    last = shown.split("\x1b[2K")[-1].splitlines()
    assert len(last) == rows
    assert max(map(len, last)) <= width
    assert "…" not in shown
    for part in (
        "epoch 198/220",
        "━" * 10,
        "396/440",
        "1:02:03 left",
        "loss 0.0007",
        "accuracy 100.0%",
        "123,456 samples/s",
        " MB/step",
    ):
        assert part in "\n".join(last)


def test_the_actors_for_which_the_others_waited_are_named_in_the_end() -> None:
    def times(*waits: float) -> list[Times]:
        return [
            Times((f"a{k}", f"b{k}"), 10, 0.04, (0.01, 0.01), wait) for k, wait in enumerate(waits)
        ]

    assert waiting(times(0.03, 0.0, 0.02)) == (
        "the others wait for the actor of a1, b1: it was at work for 4 ms of a step of 4 ms, and "
        "the others for 1.5 ms on average"
    )
    assert (waiting(times(0.03, 0.0, 0.002)) or "").startswith(
        "the others wait for the actors of a1, b1, a2, b2: they were at work for 4 ms"
    )
    assert waiting(times(0.036, 0.034, 0.038)) is None, "not long"
    assert waiting(times(0.0)) is None
    out = io.StringIO()
    for plain in PlainView(Console(file=out)), PlainView(Console(file=out)):
        plain.ended(SUMMARY)  # a run that was not timed has nothing to say
        plain.timed(10, times(0.03, 0.0))
        plain.ended(SUMMARY)
    assert out.getvalue().count("the others wait for the actor of a1, b1") == 2


def test_figures_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "5e+03 TB",
    ]
    assert [duration(s) for s in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
