"""Recovery from real losses, several raylets on this machine (see `tests.chaos`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_run_whose_actors_processes_and_nodes_are_killed_has_the_weights_of_a_quiet_one() -> None:
    # In a process of its own: this one may have joined a Ray already.
    command = [sys.executable, "-m", "tests.chaos", "--kills", "4", "--seed", "6", "--epochs", "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"]
    assert sum(found["kills"].values()) == 4
    assert {"node", "stopped process"} <= found["kills"].keys()
    assert found["stopped processes left over"] == 0
    assert found["restarts"] >= 4
    assert found["most steps lost"] <= found["steps a checkpoint"]
