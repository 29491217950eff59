"""Commands of jobs on a cluster elsewhere: submit one, see how it stands, stop it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from hdnn_dist.cli_exits import report_error, tidy_up_from_here
from hdnn_dist.cli_options import (
    AsJson,
    DataDir,
    Profile,
    Resume,
    Set,
    SpecArgument,
    changes_of,
    load_job,
    refuse_beside_resume,
)
from hdnn_dist.errors import RunError, on_a_line

if TYPE_CHECKING:
    from hdnn_dist.submission import Jobs

JobServer = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard."
    ),
]
JOB_SERVER = "http://127.0.0.1:8265"
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="By the name that `submit` told.")]


def submit(
    spec: SpecArgument = None,
    overrides: Set = None,
    data_dir: DataDir = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Of the new run: a URL, or a path on all its machines."),
    ] = None,
    resume: Resume = None,
    address: JobServer = JOB_SERVER,
    profile: Profile = 0,
    follow: Annotated[bool, typer.Option(help="Show what it prints until it ends.")] = True,
) -> None:
    """Train a job, or continue a run, on a cluster elsewhere; package and spec are sent there."""
    refuse_beside_resume(resume, spec, run)
    from hdnn_dist.submission import Jobs, command, elsewhere

    where = elsewhere(run, "--run") if resume is None else elsewhere(resume, "--resume")
    if data_dir is not None:
        elsewhere(data_dir, "--data-dir")
    changes = changes_of(overrides, data_dir)
    if resume is None:
        from hdnn_dist.reader import read_spec

        if (folder := read_spec(spec, changes)[0].data.dir) is not None:
            elsewhere(folder, "data.dir")
        resolved, entry = load_job(spec, changes).spec, command(where, profile=profile)
    else:
        resolved, entry = None, command(where, changes, resume=True, profile=profile)
    tidy_up_from_here()
    jobs = Jobs(address)
    id = jobs.submit(entry, resolved)
    print(f"job {id} on {address}, run {where}", flush=True)
    if follow:
        _follow(jobs, id)
    print(_how_to_go_on(jobs, id))


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Default: all of the cluster's.")
    ] = None,
    address: JobServer = JOB_SERVER,
    as_json: AsJson = False,
) -> None:
    """How the jobs of a cluster stand."""
    from hdnn_dist.submission import Jobs

    jobs = Jobs(address)
    states = jobs.all() if job is None else [jobs.state(job)]
    if as_json:
        print(json.dumps([asdict(state) for state in states], indent=2))
    for state in () if as_json else states:
        code = "" if state.code is None else f" (exit code {state.code})"
        until = f" to {state.ended}" if state.ended else ""
        print(f"{state.id}  {state.status}{code}  {state.started}{until}  {state.command}")


def logs(
    job: JobArgument,
    address: JobServer = JOB_SERVER,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until it ends; then exit with its code.")
    ] = False,
) -> None:
    """What a job has printed."""
    from hdnn_dist.submission import Jobs

    tidy_up_from_here()
    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    print(jobs.logs(job), end="")


def stop(job: JobArgument, address: JobServer = JOB_SERVER) -> None:
    """Have a job save a checkpoint of this very step and end."""
    from hdnn_dist.submission import Jobs

    state = Jobs(address).stop(job)
    print(f"job {job}: {state.status}")


def _follow(jobs: Jobs, job: str) -> NoReturn:
    """Show what a job prints until it ends, and exit with its code."""
    try:
        state = jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(_how_to_go_on(jobs, job), file=sys.stderr)
        raise typer.Exit(130) from None
    except RunError as error:
        code = report_error(error)
        print(_how_to_go_on(jobs, job), file=sys.stderr)
        raise typer.Exit(code) from None
    if state.code is None:  # it never ran, or was stopped
        print(f"job {job}: {state.status}: {on_a_line(state.message or '')}", file=sys.stderr)
    raise typer.Exit(state.exit_code)


def _how_to_go_on(jobs: Jobs, job: str) -> str:
    at = f"{job} --address {jobs.address}"
    return (
        f"job {job} goes on by itself\n"
        f"follow it with: hdnn-dist logs --follow {at}\n"
        f"stop it with: hdnn-dist stop {at}"
    )
