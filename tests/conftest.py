"""Settings for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from hdnn_dist import data, mnist
from hdnn_dist.data import DataInfo
from tests.mnist_files import COUNTS, write

# Machines differ and tests share their cores: no test passes or fails by the clock.
settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
settings.load_profile("project")
# Ray's own reporting has no place in a test.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device that there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here, or a torch that is not built for CUDA")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray of our own with two cores, joined by this process and shared by the tests."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A small MNIST: the contents by file name, and the library made to expect it."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(mnist, "SAMPLES", COUNTS)
    monkeypatch.setitem(data.SETS, "mnist", DataInfo("mnist", 784, 10, (28, 28), *COUNTS.values()))
    arrays = {}
    for (part, content), (stem, _) in mnist.FILES.items():
        shape, top = ((COUNTS[part], 28, 28), 256) if content == "images" else ((COUNTS[part],), 10)
        arrays[stem] = rng.integers(0, top, shape, np.uint8)
    return arrays


@pytest.fixture
def folder(small: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """The files of `small`."""
    return write(tmp_path / "mnist", small)
