from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import pytest

from tests.commands import hdnn


@pytest.mark.parametrize(
    "arguments", ["frobnicate", "train --epochs 3", "eval", "eval x --part valid"]
)
def test_usage_errors_exit_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hdnn(*arguments.split()) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_want_of_memory_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Mock(side_effect=MemoryError("Unable to allocate 1 TiB"))
    monkeypatch.setattr("hdnn_dist.reader.json_schema", full)
    assert hdnn("schema") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (Unable to allocate 1 TiB); take")
    assert said.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert hdnn("--version") == 0
    assert capsys.readouterr().out.startswith("hdnn-dist ")


def test_help_and_bad_specs_do_not_wait_for_torch_and_ray() -> None:
    code = (
        "import sys, hdnn_dist.cli as cli\n"
        "try: cli.main(['train', '--set', 'model.layers=none'])\n"
        "except SystemExit as exit: assert exit.code == 2, exit.code\n"
        "print([m for m in ('torch', 'ray', 'networkx') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_python_m_runs_the_command_line() -> None:
    command = [sys.executable, "-m", "hdnn_dist", "--version"]
    assert subprocess.run(command, capture_output=True).stdout.startswith(b"hdnn-dist ")
