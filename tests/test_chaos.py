"""Recovery from real losses, on several raylets on this machine (see `tests.chaos`)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import hdnn_dist
from hdnn_dist.checkpoint import checkpoints
from hdnn_dist.cluster import RayRunner
from hdnn_dist.errors import LostError, PlacementError
from hdnn_dist.job import Job
from hdnn_dist.run import reopen
from hdnn_dist.trainer import Listener, Progress, Runner
from tests.chaos import DEATHS, STOPS
from tests.islands import wait_for
from tests.processes import machine, tree

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.chaos]

TIMEOUT = 15  # cluster.timeout
SETTINGS = (
    *("topology.agents=4", "topology.edges.args.n=4", "topology.d=2", "model.layers=2"),
    *("data.split.kind=auto", "data.train_samples=320", "training.batch_size=32"),
    *("training.epochs=100", "training.eval_every=100", "cluster.placement=spread"),
    *("cluster.agents_per_actor=auto", f"cluster.timeout={TIMEOUT}"),
)


def kill(kills: int, seed: int) -> dict[str, Any]:
    """What `tests.chaos` found, in a process of its own: this one may have joined a Ray already."""
    command = [sys.executable, "-m", "tests.chaos", "--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2100)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"], "the weights are not those of a quiet run"
    assert sum(found["kills"].values()) == kills, done.stdout
    assert found["restarts"] >= kills
    assert not found["misreported"]
    assert found["most steps lost"] <= found["steps a checkpoint"]
    for kind, (_, most) in found["seconds to detection"].items():
        assert most < (10 if kind in DEATHS else TIMEOUT), kind
    return found


@pytest.mark.timeout(600)
def test_a_run_that_loses_a_machine_and_a_process_has_the_weights_of_a_quiet_one() -> None:
    assert kill(2, seed=9)["kills"].keys() == {"machine", "stopped process"}


@pytest.mark.timeout(2400)
def test_so_has_one_with_twenty_deaths_and_ten_stops() -> None:
    assert kill(30, seed=0)["kills"] == dict.fromkeys(DEATHS + STOPS, 5)


def same_weights(run: Path, quiet: Path) -> bool:
    ours = hdnn_dist.load(run).state_dict()
    hdnn_dist.train(reopen(run), run=quiet, local=True)
    return all(torch.equal(ours[n], w) for n, w in hdnn_dist.load(quiet).state_dict().items())


def apart(function: Callable[[Path], None], folder: Path) -> None:
    """Call a function of a module in a process of its own, which joins a Ray of its own."""
    module, name = Path(function.__code__.co_filename).stem, function.__name__
    code = f"import pathlib, tests.{module} as t; t.{name}(pathlib.Path({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},  # whether this machine has a token or not
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]


class Loses(Listener):
    """Once each time that training starts, a second later, something happens to it."""

    def __init__(self, *happens: Callable[[], None]) -> None:
        self.happens = list(happens)
        self.at = 0.0
        self.seconds: list[float] = []  # until it was noticed
        self.causes: list[str] = []
        self.actors: list[int] = []
        self.timer: threading.Timer | None = None

    def started(self, runner: Runner, step: int) -> None:
        assert isinstance(runner, RayRunner)
        self.actors.append(len(runner._actors))
        self.timer = None
        if self.happens:
            self.timer = threading.Timer(1.0, self.happen, (self.happens.pop(0),))
            self.timer.start()

    def stepped(self, results: object, progress: Progress) -> None:
        if self.timer is not None and progress.step > 0.8 * progress.steps:
            self.timer.join()  # the run is not to end before it

    def happen(self, what: Callable[[], None]) -> None:
        self.at = time.monotonic()
        what()

    def lost(self, cause: LostError, restart: int) -> None:
        self.seconds.append(time.monotonic() - self.at)
        self.causes.append(str(cause))


def go_on_with_fewer_machines(folder: Path) -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def lose_one() -> None:
        for process in machine(nodes.pop()):
            process.kill()

    # Two losses, and the run ends on the one machine that is left.
    job = Job.load(None, [*SETTINGS, "topology.agents=6", "topology.edges.args.n=6"])
    watch = Loses(lose_one, lose_one)
    summary = hdnn_dist.train(job, run=folder / "fewer", listeners=[watch])
    assert watch.actors == [3, 2, 1]
    assert summary.restarts == 2
    assert max(watch.seconds) < 10
    assert same_weights(folder / "fewer", folder / "quiet")
    # A third: there is no room, which is said in time, and the checkpoint is good.
    run, long = folder / "none", [*SETTINGS, "training.epochs=150", "cluster.timeout=30"]
    watch = Loses(lose_one)
    with pytest.raises(PlacementError, match="no machine with a core"):
        hdnn_dist.train(Job.load(None, long), run=run, listeners=[watch])
    assert time.monotonic() - watch.at < 2 * 30
    assert checkpoints(run)
    cluster.add_node(num_cpus=1)
    job = reopen(run)
    with contextlib.closing(RayRunner(job)) as runner:
        hdnn_dist.fit(runner, run)
    assert same_weights(run, folder / "quiet-2")
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(600)
def test_a_run_goes_on_with_the_machines_that_are_left_or_says_that_there_are_none(
    tmp_path: Path,
) -> None:
    apart(go_on_with_fewer_machines, tmp_path)


def go_on_without_a_core_that_is_not_let_go_of(folder: Path) -> None:
    """As when a machine did not hear that its actor was given up; here somebody else is quicker."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    holders: list[Any] = []

    class Placed(Loses):
        def started(self, runner: Runner, step: int) -> None:
            assert isinstance(runner, RayRunner)
            self.on = [[n.node_id[:8] in on for n in nodes] for on in runner._nodes]
            self.runner = runner
            super().started(runner, step)

    def lose_a_core() -> None:
        there = NodeAffinitySchedulingStrategy(nodes[1].node_id, soft=False)
        holder = ray.remote(num_cpus=1)(type("Holder", (), {}))
        holders.append(holder.options(scheduling_strategy=there).remote())  # next in its queue
        ray.kill(watch.runner._actors[watch.on.index([False, True])])

    watch = Placed(lose_a_core)
    job = Job.load(None, [*SETTINGS])
    summary = hdnn_dist.train(job, run=folder / "held", listeners=[watch])
    assert watch.actors == [2, 1]
    assert watch.on == [[True, False]]
    assert summary.restarts == 1
    ray.shutdown()
    cluster.shutdown()
    assert same_weights(folder / "held", folder / "quiet")


@pytest.mark.timeout(600)
def test_a_run_goes_on_without_a_core_that_is_not_let_go_of(tmp_path: Path) -> None:
    apart(go_on_without_a_core_that_is_not_let_go_of, tmp_path)


def lose_machines_while_the_group_forms(folder: Path) -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(4)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    kinds = ["stopped machine", "machine", "raylet"]
    told: list[tuple[str, float, str]] = []
    struck: list[psutil.Process] = []
    form = RayRunner._form

    def strike(kind: str, runner: RayRunner) -> None:
        node = next(n for n in nodes if any(n.node_id[:8] in on for on in runner._nodes))
        nodes.remove(node)  # where an actor is: two of them leave one of three machines alone
        for process in machine(node)[: 1 if kind == "raylet" else None]:
            struck.append(process)
            process.send_signal(signal.SIGSTOP if kind in STOPS else signal.SIGKILL)

    def form_but(runner: RayRunner) -> None:
        if not kinds:
            return form(runner)
        kind, start = kinds.pop(), time.monotonic() + 1
        timer = threading.Timer(1, strike, (kind, runner))
        timer.start()
        try:
            form(runner)
            raise AssertionError(f"formed in spite of it: {kind}")
        except LostError as error:
            told.append((kind, time.monotonic() - start, str(error)))
            raise
        finally:
            timer.join()

    RayRunner._form = form_but  # type: ignore[method-assign]
    summary = hdnn_dist.train(Job.load(None, [*SETTINGS]), run=folder / "run")
    assert summary.placement.endswith("1 Ray actor, 1 node")
    for kind, seconds, cause in told:
        assert re.match(r"the actor of agents? .+ on node \S+ \(\w{8}\) (died|did not)", cause), (
            cause
        )
        assert ("did not answer" in cause) == (kind in STOPS), cause
        assert seconds < (TIMEOUT if kind in STOPS else 10), (kind, seconds)
    assert len(told) == 3
    ray.shutdown()
    for process in struck:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.shutdown()
    assert same_weights(folder / "run", folder / "quiet")


@pytest.mark.timeout(600)
def test_machines_that_are_lost_while_the_group_forms_are_named_in_time(tmp_path: Path) -> None:
    apart(lose_machines_while_the_group_forms, tmp_path)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Train in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-m", "hdnn_dist", "train", *map(str, arguments), "--no-tensorboard"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )


def settings(*more: str) -> list[str]:
    return [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]


def below(pid: int, name: str) -> list[psutil.Process]:
    """All processes below one, of which some have this name."""
    _, *found = tree(pid)
    assert any(name in process.name() for process in found)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def local_cluster() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


@pytest.mark.timeout(600)
def test_the_actors_of_a_killed_driver_leave_the_cluster(
    tmp_path: Path, local_cluster: Cluster
) -> None:
    run, address = tmp_path / "run", ["--address", local_cluster.address]
    process = start(*settings(), "--run", run, *address)
    wait_for(checkpoints, run)
    actors = [p for p in machine(local_cluster.head_node) if "AgentActor" in p.name()]
    assert len(actors) == 2
    process.kill()
    process.communicate()
    wait_for(gone, actors)
    process = start("--resume", run, *address)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert same_weights(run, tmp_path / "quiet")


@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_leaves_no_process_and_its_run_goes_on(tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(0)
    arguments: list[object] = [*settings(), "--run", run]
    for _ in range(2):
        before = checkpoints(run)
        process = start(*arguments)
        wait_for(lambda before=before: checkpoints(run) != before)
        time.sleep(moments.uniform(0, 1))
        rays = below(process.pid, "raylet")
        names = {p: p.name() for p in rays}
        process.kill()
        process.communicate()
        # Ray's agents for its dashboard, which hold nothing of a job, look for it for a minute.
        wait_for(gone, [p for p in rays if "Agent" not in names[p] or "AgentActor" in names[p]])
        arguments = ["--resume", run]
    process = start(*arguments)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert same_weights(run, tmp_path / "quiet")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_reaches_every_process_and_ends_in_good_order(tmp_path: Path, times: int) -> None:
    run = tmp_path / "run"
    process = start(*settings("training.epochs=100000"), "--run", run)
    wait_for(lambda: checkpoints(run))
    rays = below(process.pid, "raylet")
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: hdnn-dist train --resume {run}" in told
    wait_for(gone, rays)
    if times == 1:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        last = max(json.loads(line)["step"] for line in lines)
        assert checkpoints(run)[-1].name == f"step-{last:08d}"
