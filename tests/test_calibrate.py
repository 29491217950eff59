from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from hdnn_dist import calibrate
from hdnn_dist.cost import Calibration, predict
from hdnn_dist.trainer import LocalRunner

BLANK = Calibration("h", "d", "t", 2, 0.0, 0.0, 0.0, 0.0, 1e10, 1e11, 0.0, 0.0, 1.0)


def test_a_large_product_is_done_at_a_higher_rate() -> None:
    small, large = calibrate._product_rates()
    assert 0 < small < large


def test_what_was_measured_predicts_other_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of two, as this machine may be busy: benchmarks/cost.py is the measure."""
    monkeypatch.setattr(calibrate, "SECONDS", 0.2)
    small, large = calibrate._product_rates()
    found = calibrate._with_arithmetic(replace(BLANK, small=small, large=large))
    ratios = []
    for arguments in (
        ("path_graph", {"n": 5}, 8, 6, 32),
        ("star_graph", {"n": 9}, 4, 3, 64),
        ("cycle_graph", {"n": 12}, 24, 2, 128),
    ):
        job = calibrate.small_job(*arguments)
        runner = LocalRunner(job)
        runner.worker.load_data()
        packing = (tuple(range(len(job.topology.agents))),)
        predicted = predict(job, packing, found, found.cores).seconds
        ratios.append(predicted / calibrate.step_seconds(runner))
    assert 0.5 < median(ratios) < 2, ratios


@pytest.mark.cluster
@pytest.mark.slow
def test_messages_between_actors_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS", 0.2)
    told: list[str] = []
    found = calibrate.calibrate(tell=told.append)
    assert found.latency + found.send > 1e-6
    assert 1e6 < found.bandwidth < 1e12
    assert len(told) == 3
