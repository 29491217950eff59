"""Opening run directories, new ones and those of runs that go on; `checkpoint` has the layout."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from hdnn_dist.checkpoint import (
    Manifest,
    checkpoints,
    from_latest,
    read_absent,
    verify,
    write_absent,
    write_text,
)
from hdnn_dist.errors import CheckpointError, UserError, did_you_mean
from hdnn_dist.job import Job
from hdnn_dist.reader import dump_spec
from hdnn_dist.trainer import Summary, check_belongs, read_summary

# What a run that goes on may change: a checkpoint remains a state of the changed job, and its step
# the same place in the same order of samples.
MAY_CHANGE = re.compile(
    r"cluster(\..*)?"
    r"|data\.dir"
    r"|topology\.agents\.\d+\.(cpu|gpu|resources|labels)(\..*)?"
    r"|training\.(epochs|eval_every|checkpoint_every|keep_last|keep_best|on_nonfinite)"
    r"|training\.(clip_norm|alpha|shift|schedule(\..*)?)"
    r"|training\.optimizer\.(lr|momentum|betas|weight_decay)(\..*)?"
)
_SHOWN = 5  # changed keys that an error names


def vacant(job: Job, path: Path | None = None) -> Path:
    """Where a new run of a job goes; nothing is written yet.

    Args:
        job: the job.
        path: the run directory; default: `runs/<topology>-<data>-<time>`.

    Raises:
        CheckpointError: the path is a file, a directory that is not empty, or cannot be made.
    """
    if path is None:
        name = re.sub(r"[^\w.-]+", "-", f"{job.topology.name}-{job.data.name}").strip(".-")
        stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (stem.with_name(f"{stem.name}-{k}") if k > 1 else stem for k in count(1))
        path = next(path for path in names if not path.exists())
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is a file"
        raise CheckpointError(
            f"{path} {what}, and a new run needs a directory of its own",
            f"name another with --run, or continue it with --resume {path}",
        )
    check_can_be_made(path, "--run")
    return path


def check_can_be_made(folder: Path, option: str) -> None:
    """A folder that an option names is there and can be written to, or can be made.

    Raises:
        CheckpointError: a file is in its place, or it may not be written to.
    """
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise CheckpointError(
            f"the folder {folder} cannot be made: {there} {what}", f"name another with {option}"
        )


def create(job: Job, path: Path | None = None) -> Path:
    """Make the directory of a new run, with the resolved spec in it.

    Raises:
        CheckpointError: as `vacant`.
    """
    run = vacant(job, path)
    run.mkdir(parents=True, exist_ok=True)
    write_spec(job, run)
    return run


def write_spec(job: Job, run: Path) -> None:
    """Write the resolved spec into a run directory, whole or not at all."""
    write_text(run / "spec.yaml", dump_spec(job.spec))


def reopen(run: Path, overrides: Sequence[str] = ()) -> Job:
    """The job of a run, with overrides that leave its checkpoints meaningful (`MAY_CHANGE`).

    Args:
        run: the run directory.
        overrides: `"section.key=value"`, as for `--set`.

    Raises:
        CheckpointError: not a run directory, or a key is changed that must stay.
        SpecError: an override is wrong.
    """
    file = run / "spec.yaml"
    if not file.is_file():
        raise CheckpointError(
            f"{run} is no run directory: it has no spec.yaml", "name one that a training run wrote"
        )
    job = Job.load(file, overrides)
    if overrides:
        before, after = (j.spec.model_dump(mode="json") for j in (Job.load(file), job))
        changed = [
            f"{key} is {_show(old)}, not {_show(new)}"
            for key, old, new in _differences(before, after)
            if not MAY_CHANGE.fullmatch(key)
        ]
        if changed:
            more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise CheckpointError(
                f"{run}: {', '.join(changed[:_SHOWN])}{more} in this run, and cannot change",
                "leave it as it is, or train a new run",
            )
    return job.without(read_absent(run))


def regroup(run: Path, leave: Collection[str] = (), join: Collection[str] = ()) -> tuple[str, ...]:
    """Have agents of a run leave it or join it when it next writes a checkpoint or goes on.

    Those that leave keep nothing; those that join start from their initial weights.

    Args:
        run: the run directory.
        leave: names of agents.
        join: names of agents.

    Returns:
        All that will be absent.

    Raises:
        CheckpointError: not a run directory.
        UserError: an agent is not the spec's, leaves or joins twice, or those that are left cannot
            go on.
    """
    job = reopen(run)
    absent = set(job.absent)
    for name in (*leave, *join):
        if name not in job.names:
            raise UserError(f"there is no agent {name!r}", did_you_mean(name, job.names))
    for name in leave:
        if name in absent:
            raise UserError(f"agent {name!r} takes no part already", "leave it out")
    for name in join:
        if name not in absent:
            raise UserError(f"agent {name!r} takes part already", "leave it out")
    regrouped = job.without((absent | set(leave)) - set(join))
    write_absent(run, regrouped.absent)
    return regrouped.absent


def steps_taken(job: Job, run: Path) -> int:
    """The steps of a run's latest whole checkpoint, after a look at whose it is.

    Raises:
        CheckpointError: as `hdnn_dist.trainer.restore`.
    """

    def look(folder: Path, manifest: Manifest) -> int:
        check_belongs(job, run, folder, manifest)
        verify(folder, manifest)
        return manifest.step

    return from_latest(run, look)


def finished(job: Job, run: Path) -> Summary | None:
    """The summary of a run that has taken all steps of its job; None if there is more to do.

    Raises:
        CheckpointError: as `steps_taken`, but for a run without a checkpoint.
    """
    if not has_checkpoint(run):
        return None
    step = steps_taken(job, run)
    return read_summary(run, step) if step == job.steps else None


def has_checkpoint(run: Path) -> bool:
    """Whether a run has come as far as its first checkpoint."""
    return bool(checkpoints(run))


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of all leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif isinstance(old, list) and isinstance(new, list):
        for k, (a, b) in enumerate(zip_longest(old, new)):
            yield from _differences(a, b, f"{at}.{k}")
    elif old != new:
        yield at, old, new


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
