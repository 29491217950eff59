"""Jobs handed to a cluster elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hdnn_dist.cli import main
from hdnn_dist.errors import UserError
from hdnn_dist.submission import State, command, elsewhere


def test_the_driver_is_the_command_of_this_package() -> None:
    assert command("s3://bucket/a b") == (
        "exec python -m hdnn_dist train spec.yaml --run 's3://bucket/a b'"
        ' --address "$RAY_ADDRESS"'
    )
    assert command("/runs/a", ["training.epochs=3"], resume=True) == (
        "exec python -m hdnn_dist train --resume /runs/a --set training.epochs=3"
        ' --address "$RAY_ADDRESS"'
    )


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_drivers(status: str, code: int | None, expected: int) -> None:
    state = State("job", status, "", None, None, code, None)
    assert state.over
    assert state.exit_code == expected
    assert not replace(state, status="RUNNING").over


@pytest.mark.parametrize("place", [None, "runs/first", "."])
def test_a_place_must_mean_the_same_elsewhere(place: str | None) -> None:
    with pytest.raises(UserError, match=r"--run: .*, but the job runs elsewhere; name a URL"):
        elsewhere(place, "--run")
    for good in "/runs/first", "s3://bucket/first":
        assert elsewhere(good, "--run") == good


def hdnn(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("http://127.0.0.1:1", "no Ray job server answers at http://127.0.0.1:1"),
        ("127.0.0.1:6379", "127.0.0.1:6379 is no address of a job server; name that of"),
        ("ray://127.0.0.1:10001", "is no address of a job server"),
        ("http://:8265", "is no address of a job server"),
    ],
)
def test_an_address_that_does_not_answer_is_told_in_one_line(
    address: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")  # by which Ray's own client would go
    assert hdnn("status", "--address", address) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line
