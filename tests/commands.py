"""The command line, as tests call it."""

from __future__ import annotations

import pytest

from hdnn_dist.cli import main


def hdnn(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
