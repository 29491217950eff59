"""Real Ray clusters, with a token and without, each with a head on loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hdnn_dist.errors import PlacementError
from hdnn_dist.joining import admits, start
from tests.ports import free_port

pytestmark = pytest.mark.cluster

TINY = ["topology.d=2", "model.layers=2", "training.dtype=float64", "cluster.timeout=30"]


def test_a_cluster_that_is_not_there_is_named() -> None:
    # In a process of its own: this one has joined a Ray already.
    code = (
        "from hdnn_dist.cluster import RayRunner; from hdnn_dist.job import Job\n"
        "RayRunner(Job.load(None), '127.0.0.1:1')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "PlacementError: no Ray cluster answers at '127.0.0.1:1'" in done.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://head"])
def test_who_would_join_a_job_server_is_told_what_it_is_for(address: str) -> None:
    told = f"'{address}' is the address of a job server, .*; hand the job to it with `hdnn-dist sub"
    with pytest.raises(PlacementError, match=told):
        start(address)


@pytest.fixture(scope="module")
def heads() -> Iterator[tuple[str, str, Path]]:
    """The addresses of a cluster that asks for a token and of one that does not; a home with it."""
    processes: list[subprocess.Popen[bytes]] = []
    addresses: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hdnn") as folder:  # Ray's sockets need short paths
        for name, token in ("token", "secret" * 6), ("open", None):
            home = Path(folder) / name
            (home / ".ray").mkdir(parents=True)
            if token:
                (home / ".ray" / "auth_token").write_text(token)
            port = free_port()
            addresses.append(f"127.0.0.1:{port}")
            command = [
                *("ray", "start", "--head", "--block", "--num-cpus=1", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--port={port}"),
                *(f"--ray-client-server-port={free_port()}", f"--temp-dir={home / 'tmp'}"),
            ]
            with (home / "log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
                        env=environment(home),
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        try:
            for address in addresses:
                for _ in range(240):
                    if admits(address) is not None:
                        break
                    time.sleep(0.25)
            yield addresses[0], addresses[1], Path(folder)
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Of a machine whose user has this home."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    return {**ours, "HOME": str(home), **variables}


def hdnn_dist(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hdnn_dist", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_token_is_shown_to_a_cluster_that_asks_for_one(
    heads: tuple[str, str, Path], tmp_path: Path
) -> None:
    guarded, _, folder = heads
    run = ["train", "--address", guarded, "--run", str(tmp_path / "run")]
    settings = [*TINY, "training.epochs=1", "topology.agents=1", "topology.edges=[]"]
    done = hdnn_dist(
        [*run, *(word for setting in settings for word in ("--set", setting))],
        environment(folder / "token"),
    )
    assert done.returncode == 0, done.stderr
    assert "asks for no token" not in done.stderr


def test_a_token_is_shown_by_a_program_that_imported_ray_before(
    heads: tuple[str, str, Path],
) -> None:
    guarded, _, folder = heads
    code = f"import ray; from hdnn_dist.joining import cluster_nodes; cluster_nodes({guarded!r})"
    env = environment(folder / "open", RAY_AUTH_TOKEN="secret" * 6)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_ray_of_ones_own_asks_for_a_token_from_the_start() -> None:
    code = (
        "import ray; from hdnn_dist.cluster import RayRunner; from hdnn_dist.job import Job\n"
        "from hdnn_dist.joining import admits, token\n"
        f"RayRunner(Job.load(None, {[*TINY, 'topology.agents=1', 'topology.edges=[]']}))\n"
        "address = ray.get_runtime_context().gcs_address\n"
        "print(admits(address), admits(address, 'guess' * 8), admits(address, token()[1]))"
    )
    with tempfile.TemporaryDirectory(prefix="hdnn") as home:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(Path(home)),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout == "False False True\n", done.stderr


def test_a_cluster_without_a_token_is_joined_with_a_warning(heads: tuple[str, str, Path]) -> None:
    _, unguarded, folder = heads
    for home in "token", "open":  # a token of one's own is not in the way
        done = hdnn_dist(["check", "--address", unguarded], environment(folder / home))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("asks for no token: who can reach it can run code there") == 1


@pytest.mark.parametrize(
    ("guarded", "variables", "complaint"),
    [
        (True, {}, "and there is none in"),
        (True, {"RAY_AUTH_TOKEN": "guess" * 8}, r"and refuses that of \$RAY_AUTH_TOKEN; put there"),
        (True, {"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "and there is none in /nowhere"),
        (True, {"RAY_AUTH_MODE": "disabled"}, "leave RAY_AUTH_MODE unset"),
        (True, {"RAY_AUTH_MODE": "token"}, "and there is none in"),
        (False, {"RAY_AUTH_MODE": "token"}, "asks for no token, but RAY_AUTH_MODE is token"),
    ],
)
def test_who_cannot_join_is_told_why(
    heads: tuple[str, str, Path], guarded: bool, variables: dict[str, str], complaint: str
) -> None:
    address = heads[0] if guarded else heads[1]
    done = hdnn_dist(["check", "--address", address], environment(heads[2] / "open", **variables))
    assert done.returncode == 2, done.stderr
    assert re.search(complaint, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr
