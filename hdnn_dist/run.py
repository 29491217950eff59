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
    latest_checkpoint,
    read_absent,
    verify,
    write_absent,
    write_text,
)
from hdnn_dist.errors import CheckpointError, UserError, did_you_mean
from hdnn_dist.job import Job
from hdnn_dist.reader import dump_spec, spec_from_dict
from hdnn_dist.spec import Spec
from hdnn_dist.storage import Place, Where, in_this_process_alone, kind, names, place
from hdnn_dist.trainer import Summary, check_belongs, read_summary

# What a run that goes on may change: a checkpoint remains a state of the changed job, and its step
# the same place in the same order of samples.
MAY_CHANGE = re.compile(
    r"cluster(\..*)?"
    r"|data\.dir"
    r"|topology\.agents\.[^.]+\.(cpu|gpu|speed|resources|labels)(\..*)?"
    r"|training\.(epochs|eval_every|checkpoint_every|keep_last|keep_best|on_nonfinite)"
    r"|training\.(clip_norm|alpha|shift|activations|messages|(schedule|distort)(\..*)?)"
    r"|training\.optimizer\.(lr|momentum|betas|weight_decay)(\..*)?"
)
ABSENT = "absent"


def vacant(job: Job, path: Where | None = None) -> Place:
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
        free = (stem.with_name(f"{stem.name}-{k}") if k > 1 else stem for k in count(1))
        path = next(path for path in free if not path.exists())
    run = place(path)
    if (found := kind(run)) == "file" or names(run):
        what = "is a file" if found == "file" else "is not empty"
        raise CheckpointError(
            f"{run} {what}, and a new run needs a directory of its own",
            f"name another with --run, or continue it with --resume {run}",
        )
    check_can_be_made(run, "--run")
    return run


def check_can_be_made(folder: Place, option: str) -> None:
    """A folder that an option names is there and can be written to, or can be made.

    What is at a URL makes its folders as they are needed.

    Raises:
        CheckpointError: a file is in its place, or it may not be written to.
    """
    if not isinstance(folder, Path):
        if kind(folder) == "file":
            raise CheckpointError(f"{folder} is a file", f"name another with {option}")
        return
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise CheckpointError(
            f"the folder {folder} cannot be made: {there} {what}", f"name another with {option}"
        )


def check_is_shared(run: Place) -> None:
    """The actors of a cluster, which write their own files, find the run directory too.

    Raises:
        CheckpointError: it is in this process's memory.
    """
    if in_this_process_alone(run):
        raise CheckpointError(
            f"{run} is in the memory of this process, where no Ray actor can write its files",
            "train with --local (local=True), or name a place that all machines reach",
        )


def create(job: Job, path: Where | None = None) -> Place:
    """Make the directory of a new run, with the resolved spec in it.

    Raises:
        CheckpointError: as `vacant`.
        StorageError: it cannot be written to.
    """
    run = vacant(job, path)
    write_spec(job, run)
    return run


def write_spec(job: Job, run: Place) -> None:
    """Write the resolved spec into a run directory, whole or not at all."""
    write_text(run / "spec.yaml", dump_spec(job.spec))


def reopen(run: Where, overrides: Sequence[str] = ()) -> Job:
    """The job of a run, with overrides that leave its checkpoints meaningful (`MAY_CHANGE`).

    Args:
        run: the run directory.
        overrides: `"section.key=value"`, as for `--set`.

    Raises:
        CheckpointError: not a run directory, or a key is changed that must stay, by an override or
            in its `spec.yaml`.
        SpecError: an override is wrong.
    """
    run = place(run)
    file = run / "spec.yaml"
    if kind(file) != "file":
        raise CheckpointError(
            f"{run} is no run directory: it has no spec.yaml", "name one that a training run wrote"
        )
    job = Job.load(file, overrides)
    if has_checkpoint(run):
        check_unchanged(job, *latest_checkpoint(run))
    elif overrides:
        _refuse(run, incompatible(Job.load(file).spec, job.spec))
    return job.without(read_absent(run))


def regroup(run: Where, leave: Collection[str] = (), join: Collection[str] = ()) -> tuple[str, ...]:
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
    run = place(run)
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


def check_unchanged(job: Job, folder: Place, manifest: Manifest) -> None:
    """A job is the one that wrote a checkpoint, but for what may change.

    Raises:
        CheckpointError: it is not; names all that differs.
    """
    if manifest.spec is not None:
        _refuse(folder, incompatible(spec_from_dict(manifest.spec), job.spec))


def _refuse(written: Place, changes: Sequence[str]) -> None:
    if changes:
        raise CheckpointError(
            f"{written}: of another job than the one to go on with: {', '.join(changes)}",
            "leave these as they were, in spec.yaml and in overrides, or train a new run",
        )


def incompatible(before: Spec, after: Spec) -> list[str]:
    """What has changed of a resolved spec that leaves checkpoints without meaning.

    Agents and edges are told by their names, not by their places in a list.

    Returns:
        `"key: old -> new"` of each such key.
    """
    old, new = _by_name(before), _by_name(after)
    changes = [
        f"{key}: {_show(a)} -> {_show(b)}"
        for key, a, b in _differences(old, new)
        if not MAY_CHANGE.fullmatch(key)
    ]
    orders = [list(content["topology"]["agents"]) for content in (old, new)]
    if orders[0] != orders[1] and set(orders[0]) == set(orders[1]):
        changes.append(f"order of topology.agents: {_show(orders[0])} -> {_show(orders[1])}")
    return changes


def differences(specs: Sequence[Spec]) -> list[tuple[str, list[str]]]:
    """Dotted keys in which resolved specs are not alike, with the value of each spec as text."""
    flat = [dict(_leaves(_by_name(spec))) for spec in specs]
    keys = dict.fromkeys(key for own in flat for key in own)
    rows = [(key, [own.get(key, ABSENT) for own in flat]) for key in keys]
    return [
        (key, list(map(_show, values)))
        for key, values in rows
        if any(value != values[0] for value in values)
    ]


def _by_name(spec: Spec) -> dict[str, Any]:
    """A resolved spec as plain data, its agents and edges by name."""
    content = spec.model_dump(mode="json")
    topology = content["topology"]
    topology["agents"] = {agent.pop("name"): agent for agent in topology["agents"]}
    topology["edges"] = {
        " - ".join(edge if topology["directed"] else sorted(edge)): "an edge"
        for edge in topology["edges"]
    }
    return content


def steps_taken(job: Job, run: Place) -> int:
    """The steps of a run's latest whole checkpoint, after a look at whose it is.

    Raises:
        CheckpointError: as `hdnn_dist.trainer.restore`.
    """

    def look(folder: Place, manifest: Manifest) -> int:
        check_unchanged(job, folder, manifest)
        check_belongs(job, run, folder, manifest)
        verify(folder, manifest)
        return manifest.step

    return from_latest(run, look)


def finished(job: Job, run: Place) -> Summary | None:
    """The summary of a run that has taken all steps of its job; None if there is more to do.

    Raises:
        CheckpointError: as `steps_taken`, but for a run without a checkpoint.
    """
    if not has_checkpoint(run):
        return None
    step = steps_taken(job, run)
    return read_summary(run, step) if step == job.steps else None


def has_checkpoint(run: Place) -> bool:
    """Whether a run has come as far as its first checkpoint."""
    return bool(checkpoints(run))


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of all leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            a, b = old.get(key, ABSENT), new.get(key, ABSENT)
            yield from _differences(a, b, f"{at}.{key}" if at else key)
    elif isinstance(old, list) and isinstance(new, list):
        for k, (a, b) in enumerate(zip_longest(old, new, fillvalue=ABSENT)):
            yield from _differences(a, b, f"{at}.{k}")
    elif old != new:
        yield at, old, new


def _leaves(content: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all leaves."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _leaves(value, f"{at}.{key}" if at else f"{key}")
    else:
        yield at, content


def _show(value: Any) -> str:
    text = value if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"
