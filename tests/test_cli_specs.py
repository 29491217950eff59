from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdnn_dist.reader import json_schema
from tests.commands import error_of, hdnn


def test_check_and_train_refuse_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    for text, says in (
        ("topology: {agents: [a], colour: red}", "bad.yaml:1: topology.colour: unknown key"),
        ("topology:\n  agents: [a]\n  edges: [[a, z]]", "bad.yaml:3: topology.edges.0"),
        ("topology:\n  agents: 2", "model.readout"),  # no path to the root
        ("topology: {agents: 1}\nmodel: {layers: none}", "bad.yaml:2: model.layers"),
        ("topology: {agents: 1}\nmodel:\n  encoder: pad", "bad.yaml:3: model.encoder"),
        ("topology: [", "not YAML"),
    ):
        bad.write_text(text)
        assert hdnn("check", bad) == 2
        refused = error_of(capsys)
        assert says in refused
        assert hdnn("train", bad, "--local", "--run", tmp_path / "no") == 2
        assert error_of(capsys) == refused
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "port"),
    [
        (["--address", "127.0.0.1:1"], 1),
        (["--set", "cluster.address=127.0.0.1:2"], 2),
        ([], 3),
    ],
)
def test_check_joins_the_cluster_that_training_would(arguments: list[str], port: int) -> None:
    # In a process of its own: this one may have joined a Ray, which would be used as it is.
    done = subprocess.run(
        [sys.executable, "-m", "hdnn_dist", "check", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:3"},
    )
    assert done.returncode == 2
    assert f"no Ray cluster answers at '127.0.0.1:{port}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_schema_is_that_of_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    assert hdnn("schema") == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
