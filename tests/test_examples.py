"""Every example runs, in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import hdnn_dist


def example(name: str) -> ModuleType:
    file = Path(__file__).parent.parent / "examples" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_sensors_tell_the_corner_that_is_heated(tmp_path: Path) -> None:
    job = example("sensors").job(tmp_path / "plate", samples=800, epochs=8)
    assert [len(view.columns) for view in job.views] == [4] * 16
    summary = hdnn_dist.train(job, run=tmp_path / "run", local=True)
    assert summary.test_accuracy > 0.7  # a quarter by chance


def test_sensors_foretell_the_field_better_where_they_talk(tmp_path: Path) -> None:
    [talking, alone, wide], persistence = example("field").jobs(tmp_path, 8, 800, epochs=15)
    assert not alone.plan.training_step
    assert wide.parameters > talking.parameters > alone.parameters
    assert all(phase.name.startswith("states") for phase in talking.plan.training_step)
    errors = [
        hdnn_dist.train(job, run=tmp_path / job.topology.name, local=True).test_rmse
        for job in (talking, alone)
    ]
    assert errors[0] < errors[1] < persistence
