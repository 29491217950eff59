from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from hdnn_dist.cli_exits import interrupt_sets
from tests.commands import hdnn


def test_a_second_interrupt_does_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt_sets(threading.Event()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again ends at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("command", ["train --local", "check", "schema"])
def test_an_interrupt_is_told_wherever_it_comes(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for where in ("api.launch", "check.examine", "reader.json_schema"):
        monkeypatch.setattr(f"hdnn_dist.{where}", Mock(side_effect=KeyboardInterrupt))
    assert hdnn(*command.split()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_during_imports_ends_at_once() -> None:
    code = (  # as an import that wraps whatever comes into an error of its own
        "import os, signal, hdnn_dist.cli as cli, hdnn_dist.reader as reader\n"
        "def schema():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException: raise RuntimeError\n"
        "reader.json_schema = schema\n"
        "cli.main(['schema'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
