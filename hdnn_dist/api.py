"""The package in a few calls: what the command line does, for notebooks and programs.

::

    summary = hdnn_dist.train("topologies/ring8.yaml", overrides=["training.epochs=5"])
    model = hdnn_dist.load(summary.run)            # an ordinary nn.Module
    with hdnn_dist.open_run(summary.run) as (agents, step):
        agents.evaluate()
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import psutil

from hdnn_dist.checkpoint import (
    Manifest,
    check_tensors,
    from_latest,
    latest_checkpoint,
    load_agent,
)
from hdnn_dist.console import LogView
from hdnn_dist.data import ensure_available
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.logs import configure
from hdnn_dist.metrics import JsonLines
from hdnn_dist.model import HDNN
from hdnn_dist.run import (
    check_is_shared,
    create,
    has_checkpoint,
    reopen,
    steps_taken,
    vacant,
    write_spec,
)
from hdnn_dist.storage import Place, Where, place
from hdnn_dist.tracking import TensorBoard
from hdnn_dist.trainer import (
    Listener,
    LocalRunner,
    Runner,
    Summary,
    Trainer,
    check_belongs,
    restore,
)

log = logging.getLogger("hdnn_dist")


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
        UserError: both `local` and `address` are given, or this machine has too little memory.
    """
    if local and address is not None:
        raise UserError(
            "a local run joins no cluster, but an address is given too", "leave one of them out"
        )
    configure(job.spec.cluster.logs, node=platform.node())
    ensure_available(job.spec.data, progress=sys.stderr.isatty())
    if local:
        needed = 4 * job.parameters * job.dtype.itemsize  # weights, gradients, optimiser
        if needed > (memory := psutil.virtual_memory().total):
            raise UserError(
                f"to train {job.parameters} numbers takes {needed >> 20} MiB, but this machine "
                f"has {memory >> 20} MiB of memory",
                "lower topology.d or model.layers, or spread the agents over machines",
            )
        return LocalRunner(job)
    from hdnn_dist.cluster import RayRunner  # Ray is needed by none who stays local

    return RayRunner(job, address)


def fit(
    runner: Runner,
    run: Where,
    listeners: Sequence[Listener] = (),
    *,
    tensorboard: bool = True,
    stop: Event | None = None,
    profile: int = 0,
) -> Summary:
    """Train launched agents to the end of their job, from the run's latest checkpoint if any.

    Args:
        runner: from `launch`.
        run: the run directory, a path or a URL (see `hdnn_dist.checkpoint`).
        listeners: are told of the run's course, beside those that write its metrics.
        tensorboard: whether to write TensorBoard events, numbers alone, into a local run directory;
            not if a `TensorBoard` is among the listeners.
        stop: when it is set, the run saves a checkpoint and ends with a KeyboardInterrupt.
        profile: steps of which `trace.json` tells who did what when (see `Trainer`).
    """
    run = place(run)
    if not isinstance(runner, LocalRunner):
        check_is_shared(run)
    if has_checkpoint(run):
        steps_taken(runner.job, run)  # one that cannot go on is refused before its spec is touched
    write_spec(runner.job, run)
    writers: list[Listener] = [JsonLines(run)]
    tensorboard &= not any(isinstance(listener, TensorBoard) for listener in listeners)
    if tensorboard and isinstance(run, Path):
        writers.append(TensorBoard(run))
    elif tensorboard:
        log.warning("TensorBoard events go to local run directories alone: %s has none", run)
    if runner.job.spec.cluster.logs == "json":
        writers.append(LogView())
    with ExitStack() as stack:
        for listener in (*listeners, *writers):
            stack.callback(listener.close)
        return Trainer(runner, run, (*listeners, *writers), stop, profile).fit()


def train(
    spec: Job | Mapping[str, Any] | Where | None = None,
    *,
    overrides: Sequence[str] = (),
    run: Where | None = None,
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
    folder = vacant(job, run)  # before a cluster is started for it
    if not local:
        check_is_shared(folder)
    with closing(launch(job, local=local, address=address)) as runner:
        return fit(runner, create(job, folder), listeners)


@contextmanager
def open_run(
    run: Where,
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
    run = place(run)
    if not local:
        check_is_shared(run)
    job = reopen(run, overrides)
    _, manifest = latest_checkpoint(run)  # refused, if none, before a cluster is started
    job = job.among(manifest.files)
    with closing(launch(job, local=local, address=address)) as runner:
        yield runner, restore(runner, run)


def load(run: Where) -> HDNN:
    """The dense model with the weights of a run's latest checkpoint, in this process.

    This gathers all agents' weights in one place, which training never does.

    Raises:
        CheckpointError: the run or its checkpoint cannot be used.
    """
    run = place(run)
    whole = reopen(run)

    def model(folder: Place, manifest: Manifest) -> HDNN:
        check_belongs(whole, run, folder, manifest)
        job = whole.among(manifest.files)
        model, parts = HDNN(job.architecture, job.dtype, fast=True), {}
        for i, name in enumerate(job.topology.names):
            expected = job.architecture.split(model.state_dict(), i)
            tensors = load_agent(folder, name, manifest)
            check_tensors(name, expected, tensors)
            parts[i] = {key: tensors[f"weights/{key}"] for key in expected}
        model.load_state_dict(job.architecture.assemble(parts))
        return model

    return from_latest(run, model)
