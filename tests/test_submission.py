"""Jobs handed to a real Ray head on loopback, which asks for a token."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from hdnn_dist.errors import UserError
from hdnn_dist.reader import read_spec
from hdnn_dist.submission import Jobs, State, command, elsewhere
from tests.commands import hdnn
from tests.ports import free_port

TOKEN = "secret" * 6
SPEC = """\
topology: {name: line, agents: [a, b], d: 2, edges: {file: graph.edgelist}}
model: {layers: 2}
data: {name: digits, train_samples: 96, test_samples: 50}
training: {epochs: 1, batch_size: 32}
cluster: {agents_per_actor: 2}
"""


def test_the_driver_is_the_command_of_this_package() -> None:
    assert command("s3://bucket/a b") == (
        "exec python -m hdnn_dist train spec.yaml --run 's3://bucket/a b'"
        ' --address "$RAY_ADDRESS"'
    )
    assert command("/runs/a", ["training.epochs=3"], resume=True) == (
        "exec python -m hdnn_dist train --resume /runs/a --set training.epochs=3"
        ' --address "$RAY_ADDRESS"'
    )
    assert "--run /runs/a --profile 3 --address" in command("/runs/a", profile=3)


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


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, Path]]:
    """The address of a job server that asks for a token, and a home that has it."""
    with tempfile.TemporaryDirectory(prefix="hdnn") as folder:  # Ray's sockets need short paths
        home = Path(folder)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(TOKEN)
        names = (
            "",
            "dashboard-",
            "ray-client-server-",
            "metrics-export-",
            "dashboard-agent-listen-",
        )
        ports = {f"{name}port": free_port() for name in names}
        binaries = Path(sys.executable).parent
        arguments = [
            *("start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--{name}={port}" for name, port in ports.items()),
            *("--disable-usage-stats", f"--temp-dir={home / 'tmp'}"),
        ]
        ours = {"HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}"}
        others = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_AUTH") and name != "PYTHONPATH"  # the package is sent
        }
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [binaries / "ray", *arguments],
                env={**others, **ours},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            agent = f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}/api/healthz"
            for _ in range(240):
                assert process.poll() is None, (home / "log").read_text()
                try:
                    urlopen(agent, timeout=2).close()
                    break
                except (URLError, OSError):
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{ports['dashboard-port']}", home
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def token(head: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.1)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_is_sent_followed_left_stopped_and_resumed(
    head: tuple[str, Path], token: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, _ = head
    spec, run, at = tmp_path / "line.yaml", tmp_path / "run", ("--address", address)
    spec.write_text(SPEC)
    (tmp_path / "graph.edgelist").write_text("a b\n")  # which the cluster does not get to see

    # Endless, without following.
    endless = ("--set", "training.epochs=100000", "--set", "training.checkpoint_every=100000")
    assert hdnn("submit", spec, *at, "--run", run, *endless, "--no-follow") == 0
    told = capsys.readouterr().out.splitlines()
    id = told[0].split()[1]
    assert told[0] == f"job {id} on {address}, run {run}"
    assert told[-1] == f"stop it with: hdnn-dist stop {id} --address {address}"
    wait_for(run / "metrics.jsonl")
    assert "graph.edgelist" not in (run / "spec.yaml").read_text()

    # Ctrl-C leaves it alone.
    follower = subprocess.Popen(
        [sys.executable, "-m", "hdnn_dist", "logs", id, *at, "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    for line in follower.stdout:
        if "line learns digits: 2 agents on 1 Ray actor, 1 node" in line:
            break
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert said.splitlines()[0] == f"job {id} goes on by itself"
    assert hdnn("status", id, *at, "--json") == 0
    [state] = json.loads(capsys.readouterr().out)
    assert (state["id"], state["status"], state["code"]) == (id, "RUNNING", None)

    # To stop it is to have it save a checkpoint.
    assert hdnn("stop", id, *at) == 0
    assert capsys.readouterr().out == f"job {id}: STOPPED\n"
    [checkpoint] = (run / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert step == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert hdnn("logs", id, *at) == 0
    assert "saving a checkpoint" in capsys.readouterr().out

    # It goes on as another job, whose exit code is that of its driver.
    epochs = step // 3 + 1
    more = ("--resume", run, "--set", f"training.epochs={epochs}")
    assert hdnn("submit", *at, *more) == 0
    shown = capsys.readouterr().out
    assert f"continues after step {step} of {3 * epochs}" in shown
    assert f"run: {run}" in shown
    assert hdnn("status", *at) == 0
    shown = capsys.readouterr().out
    assert f"{id}  STOPPED  " in shown
    assert "SUCCEEDED (exit code 0)" in shown


@pytest.mark.cluster
def test_package_and_spec_are_sent_and_the_exit_code_comes_back(
    head: tuple[str, Path], token: None
) -> None:
    jobs = Jobs(head[0])
    printed: list[str] = []
    code = "import hdnn_dist, os; print(hdnn_dist.__file__, *os.listdir()); raise SystemExit(2)"
    spec, _ = read_spec()
    state = jobs.follow(jobs.submit(f"exec python -c '{code}'", spec), printed.append)
    assert (state.status, state.exit_code) == ("FAILED", 2), state.message
    assert re.search(r"/py_modules_files/.*/hdnn_dist/__init__\.py spec\.yaml\n", "".join(printed))


@pytest.mark.cluster
@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_an_unknown_job_is_told_in_one_line(
    verb: str, head: tuple[str, Path], token: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn(verb, "nobody", "--address", head[0]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the cluster at {head[0]} knows no job 'nobody'; ")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "and there is none in /nowhere; put there what"),
        ({"RAY_AUTH_TOKEN": "guess" * 8}, "and refuses that of $RAY_AUTH_TOKEN; put there what"),
    ],
)
def test_who_has_no_token_or_another_is_told(
    variables: dict[str, str],
    complaint: str,
    head: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hdnn("status", "--address", head[0]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the cluster at {head[0]} asks for a token, ")
    assert complaint in line


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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "--run: is not given, but the job runs elsewhere"),
        ("--run runs/first", "--run: runs/first is relative to this folder, but"),
        ("--resume runs/first", "--resume: runs/first is relative to this folder, but"),
        ("--run /runs/first --data-dir data", "--data-dir: data is relative to this folder, but"),
        ("--run /runs/first --set data.dir=data", "data.dir: data is relative to this folder, but"),
        ("line.yaml --resume /runs/first", "a SPEC is given with --resume"),
        ("--run /runs/first --set model.layers=none", "model.layers"),
    ],
)
def test_what_cannot_be_a_job_there_is_refused_here(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn("submit", *arguments.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line
