"""Jobs on a Ray cluster elsewhere: handed to its job server, followed, looked at, stopped.

The cluster's machines need Ray, torch and the other dependencies; hdnn_dist itself and the spec
travel with each job. The driver then is `python -m hdnn_dist train` on the cluster, so that what it
prints, writes and exits with is what it would be here. With `cluster`, which the driver goes on to
use, this is where Ray is known.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from hdnn_dist.errors import RunError, UserError, did_you_mean
from hdnn_dist.joining import token
from hdnn_dist.reader import dump_spec
from hdnn_dist.spec import Spec

ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray's own name for where its job server is
CONNECT_TIMEOUT = 5.0  # seconds until a job server that does not answer is taken to be away
POLL = 0.5  # seconds between two looks at a job that is about to end
STOP_TIME = 60  # seconds that a job which is stopped is given to save a checkpoint
INTERRUPTED = 130

for name in "dashboard_sdk", "job.sdk":  # which tell of every upload
    logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)


@dataclass(frozen=True)
class State:
    """How a job stands.

    Attributes:
        id: by which the job server knows it.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        command: what the cluster runs.
        started, ended: local times, as far as it has come.
        code: what the driver exited with, where it did.
        message: what the job server says of it.
    """

    id: str
    status: str
    command: str
    started: str | None
    ended: str | None
    code: int | None
    message: str | None

    @property
    def over(self) -> bool:
        """Whether it has ended, in one way or another."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """The driver's own, as a shell would tell it; 130 if stopped, 1 if it never ran."""
        if self.code is not None:
            return self.code if self.code >= 0 else 128 - self.code
        return {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(self.status, 1)


def command(
    run: str, overrides: Sequence[str] = (), *, resume: bool = False, profile: int = 0
) -> str:
    """What the cluster runs: training of the spec that is sent along, or of a run that goes on.

    Args:
        run: the run directory, as the cluster's machines know it.
        overrides: `"section.key=value"`, for a run that goes on.
        resume: whether it goes on.
        profile: steps that are traced.
    """
    where = ["--resume", run] if resume else ["spec.yaml", "--run", run]
    where += ["--profile", str(profile)] if profile else []
    sets = [word for override in overrides for word in ("--set", override)]
    words = shlex.join(["python", "-m", "hdnn_dist", "train", *where, *sets])
    # Ray names its own address there. The shell gives way, so that a signal finds the driver.
    return f'exec {words} --address "$RAY_ADDRESS"'


def elsewhere(place: str | os.PathLike[str] | None, option: str) -> str:
    """A place that an option names, if it means the same on all machines.

    Raises:
        UserError: it is a relative path, or not given.
    """
    if place is not None and ("://" in str(place) or Path(place).is_absolute()):
        return str(place)
    given = "is not given" if place is None else f"{place} is relative to this folder"
    raise UserError(
        f"{option}: {given}, but the job runs elsewhere",
        "name a URL (s3://…), or the absolute path of a folder that all machines there share",
    )


class Jobs:
    """The jobs of a Ray cluster.

    Args:
        address: `http://…` of its dashboard, which is its job server.

    Raises:
        UserError: no job server answers there, or it wants another token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        if importlib.util.find_spec("aiohttp") is None:
            raise UserError(
                "Ray's client for jobs is not installed here", "pip install 'hdnn_dist[submit]'"
            )
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"--address: {address} is no address of a job server",
                "name that of the cluster's dashboard, such as http://HEAD:8265",
            )
        with self._telling():
            port = url.port or {"http": 80, "https": 443}[url.scheme]
            # Ray's client has no time-outs.
            socket.create_connection((url.hostname, port), timeout=CONNECT_TIMEOUT).close()
            with _named(address):
                self._client = self._enter()

    def _enter(self) -> JobSubmissionClient:
        """Show the token of this machine where the cluster asks for one, and not elsewhere."""
        with suppress(AuthenticationError):
            return JobSubmissionClient(self.address)
        mend = "put there what `ray get-auth-token` prints on the cluster's head"
        place, shown = token()
        if not shown:
            problem = f"the cluster at {self.address} asks for a token, and there is none in"
            raise UserError(f"{problem} {place}", mend)
        try:
            headers = {"Authorization": f"Bearer {shown}"}
            return JobSubmissionClient(self.address, headers=headers)
        except AuthenticationError:
            problem = f"the cluster at {self.address} asks for a token, and refuses that of {place}"
            raise UserError(problem, mend) from None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Errors of the connection as those of the package."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            said = str(error).partition("\n")[0]
            raise UserError(
                f"no Ray job server answers at {self.address} ({said})"
                if isinstance(error, OSError)
                else f"what answers at {self.address} is no Ray job server, or fails: {said}",
                "see that the cluster runs with a dashboard (ray[default]) and that its port "
                "reaches here; deploy/README.md has the tunnels",
            ) from None

    def submit(self, command: str, spec: Spec | None = None) -> str:
        """Hand over a job with this package and its spec; its id.

        Args:
            command: from `command`.
            spec: a resolved one.
        """
        environment: dict[str, Any] = {
            "py_modules": [str(Path(__file__).parent)],
            "excludes": ["__pycache__"],
            # To stop a job is to press Ctrl-C: it saves a checkpoint.
            "env_vars": {
                "RAY_JOB_STOP_SIGNAL": "SIGINT",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIME),
            },
        }
        with tempfile.TemporaryDirectory() as folder, self._telling():
            if spec is not None:
                Path(folder, "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
                environment["working_dir"] = folder
            id: str = self._client.submit_job(entrypoint=command, runtime_env=environment)
        return id

    def all(self) -> list[State]:
        """All jobs that were handed to the cluster, the oldest first."""
        with self._telling():
            found = [_state(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda state: state.started or "")

    def state(self, id: str) -> State:
        """How a job stands.

        Raises:
            UserError: the cluster knows no such job.
        """
        states = {state.id: state for state in self.all()}
        if id not in states:
            raise UserError(
                f"the cluster at {self.address} knows no job {id!r}",
                did_you_mean(id, states, None if states else "it has had none"),
            )
        return states[id]

    def logs(self, id: str) -> str:
        """All that a job has printed so far."""
        self.state(id)
        with self._telling():
            text: str = self._client.get_job_logs(id)
        return text

    def follow(self, id: str, write: Callable[[str], object]) -> State:
        """Pass on what a job prints, from its start to its end; how it ended.

        Raises:
            RunError: the connection is lost; the job is not.
        """
        self.state(id)
        from aiohttp import ClientError

        async def tail() -> None:
            async for text in self._client.tail_job_logs(id):
                write(text)

        try:
            asyncio.run(tail())
        except (ClientError, OSError, RuntimeError) as error:
            raise RunError(
                f"the connection to {self.address} was lost ({error}); the job goes on there"
            ) from None
        return self._end(id)

    def stop(self, id: str) -> State:
        """Have a job save a checkpoint and end; how it ended."""
        self.state(id)
        with self._telling():
            self._client.stop_job(id)
        return self._end(id)

    def _end(self, id: str) -> State:
        while not (state := self.state(id)).over:
            time.sleep(POLL)
        return state


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Ray's client goes by its environment, whatever address it is given: give it there too."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        if before is not None:
            os.environ[ADDRESS] = before


def _state(job: JobDetails) -> State:
    def when(milliseconds: int | None) -> str | None:
        if not milliseconds:
            return None
        return datetime.datetime.fromtimestamp(milliseconds / 1000).isoformat(" ", "seconds")

    return State(
        id=str(job.submission_id),
        status=job.status.value,
        command=job.entrypoint,
        started=when(job.start_time),
        ended=when(job.end_time),
        code=job.driver_exit_code,
        message=job.message,
    )
