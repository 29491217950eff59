"""The package in a few calls: what the command line does, for notebooks and programs.

::

    summary = hdnn_dist.train("topologies/ring8.yaml", overrides=["training.epochs=5"])
    model = hdnn_dist.load(summary.run)            # an ordinary nn.Module
    with hdnn_dist.open_run(summary.run) as (agents, step):
        agents.evaluate()
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from hdnn_dist.checkpoint import Manifest, from_latest, latest_checkpoint, load_agent
from hdnn_dist.data import ensure_available
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.metrics import JsonLines, TensorBoard
from hdnn_dist.model import HDNN
from hdnn_dist.run import (
    create,
    has_checkpoint,
    reopen,
    steps_taken,
    vacant,
    write_spec,
)
from hdnn_dist.trainer import (
    Listener,
    LocalRunner,
    Runner,
    Summary,
    Trainer,
    restore,
)


def launch(job: Job, *, local: bool = False, address: str | None = None) -> Runner:
    """The agents of a job with their initial weights; `close()` them in the end.

    Args:
        job: the job.
        local: all agents in this process, without Ray.
        address: a Ray cluster to join; default: the spec's, then `$RAY_ADDRESS`, then one of its
            own on this machine.

    Raises:
        DataError: the data set cannot be had.
        PlacementError: the cluster is not there, or cannot hold the job.
        UserError: both `local` and `address` are given.
    """
    if local and address is not None:
        raise UserError(
            "a local run joins no cluster, but an address is given too", "leave one of them out"
        )
    ensure_available(job.spec.data, progress=sys.stderr.isatty())
    if local:
        return LocalRunner(job)
    from hdnn_dist.cluster import RayRunner  # Ray is needed by none who stays local

    return RayRunner(job, address)


def fit(
    runner: Runner,
    run: Path,
    listeners: Sequence[Listener] = (),
    *,
    tensorboard: bool = True,
    stop: Event | None = None,
) -> Summary:
    """Train launched agents to the end of their job, from the run's latest checkpoint if any.

    Args:
        runner: from `launch`.
        run: the run directory (see `hdnn_dist.checkpoint`).
        listeners: are told of the run's course, beside those that write its metrics.
        tensorboard: whether to write TensorBoard events.
        stop: when it is set, the run saves a checkpoint and ends with a KeyboardInterrupt.
    """
    if has_checkpoint(run):
        steps_taken(runner.job, run)  # one that cannot go on is refused before its spec is touched
    write_spec(runner.job, run)
    writers = [JsonLines(run), *([TensorBoard(run)] if tensorboard else [])]
    with ExitStack() as stack:
        for listener in (*listeners, *writers):
            stack.callback(listener.close)
        return Trainer(runner, run, (*listeners, *writers), stop).fit()


def train(
    spec: Job | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    run: str | os.PathLike[str] | None = None,
    local: bool = False,
    address: str | None = None,
    listeners: Sequence[Listener] = (),
) -> Summary:
    """Train a job in a new run directory.

    Args:
        spec: a job, or what `Job.load` takes: a spec file, a mapping, or None.
        overrides: `"section.key=value"`, for a spec file.
        run: the run directory; default: a new one below `runs/`.
        local: as for `launch`.
        address: as for `launch`.
        listeners: as for `fit`.

    Raises:
        SpecError: the spec cannot be a job.
        CheckpointError: the run directory is in use.
        UserError: overrides for a job that is fitted together already.
    """
    if isinstance(spec, Job) and overrides:
        raise UserError(
            "overrides change a spec, but a Job is given", "give them to Job.load instead"
        )
    job = spec if isinstance(spec, Job) else Job.load(spec, overrides)
    folder = vacant(job, None if run is None else Path(run))  # before a cluster is started for it
    with closing(launch(job, local=local, address=address)) as runner:
        return fit(runner, create(job, folder), listeners)


@contextmanager
def open_run(
    run: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    local: bool = False,
    address: str | None = None,
) -> Iterator[tuple[Runner, int]]:
    """The agents of a run as its latest checkpoint has them, and the steps it has taken.

    Args:
        run: the run directory.
        overrides: changes that leave the checkpoint meaningful (see `hdnn_dist.run`).
        local: as for `launch`.
        address: as for `launch`.

    Raises:
        CheckpointError: the run or its checkpoint cannot be used.
    """
    job = reopen(Path(run), overrides)
    latest_checkpoint(Path(run))  # a run without one is refused before a cluster is started
    with closing(launch(job, local=local, address=address)) as runner:
        yield runner, restore(runner, Path(run))


def load(run: str | os.PathLike[str]) -> HDNN:
    """The dense model with the weights of a run's latest checkpoint, in this process.

    This gathers all agents' weights in one place, which training never does.

    Raises:
        CheckpointError: the run or its checkpoint cannot be used.
    """
    job = reopen(Path(run))

    def weights(folder: Path, manifest: Manifest) -> dict[int, dict[str, Tensor]]:
        return {
            i: {
                key.removeprefix("weights/"): value
                for key, value in load_agent(folder, name, manifest).items()
                if key.startswith("weights/")
            }
            for i, name in enumerate(job.topology.names)
        }

    parts = from_latest(Path(run), weights)
    model = HDNN(job.architecture, job.dtype, fast=True)
    model.load_state_dict(job.architecture.assemble(parts))
    return model
