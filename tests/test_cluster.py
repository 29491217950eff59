"""Real Ray actors and a real torch.distributed group."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from ray.util.placement_group import placement_group, remove_placement_group
from torch import Tensor

from hdnn_dist.actor import AgentActor, actor_class
from hdnn_dist.agent import Evaluation, whole
from hdnn_dist.api import fit
from hdnn_dist.checkpoint import Manifest, Totals, load_agent
from hdnn_dist.cluster import RayRunner
from hdnn_dist.data import Part, load_features, load_images
from hdnn_dist.errors import AgreementError, LostError, PlacementError, RunError
from hdnn_dist.job import Job
from hdnn_dist.placement import Packing, hosts
from hdnn_dist.run import create, regroup
from hdnn_dist.testing import assert_close, assert_follows_plan, assert_matches_dense
from hdnn_dist.trainer import Listener, LocalRunner
from hdnn_dist.transport import PointToPoint
from tests.strategies import jobs, numbers

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]

# Workers cannot import a test module: its classes travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TINY = ["topology.d=2", "model.layers=2", "training.dtype=float64", "cluster.timeout=30"]


class Probe(AgentActor):
    """An actor that a test may look into; nothing of this is in the package."""

    def gradients(self) -> dict[int, dict[str, Tensor]]:
        return {i: agent.node.gradients for i, agent in self.worker.agents.items()}

    def holds(self, canaries: list[bytes]) -> list[bool]:
        """Whether any live tensor or array has these bytes in it, by rows or by columns."""
        gc.collect()
        blobs: set[bytes] = set()
        # Plain arrays are not tracked themselves, but what holds them is.
        for thing in gc.get_referents(*gc.get_objects()):
            if isinstance(thing, Tensor):
                thing = thing.detach().numpy()
            if type(thing) is np.ndarray and thing.dtype.kind in "fu":
                blobs |= {thing.tobytes("C"), thing.tobytes("F")}
        return [any(canary in blob for blob in blobs) for canary in canaries]


def call(actors: list[Any], method: str, *arguments: Any) -> list[Any]:
    return ray.get([getattr(actor, method).remote(*arguments) for actor in actors])


@pytest.fixture(scope="module")
def three(cluster: None) -> Iterator[list[Any]]:
    """Three actors in a group, for any number of jobs one after the other."""
    actors = [actor_class(Probe).options(num_cpus=0).remote() for _ in range(3)]
    meeting = ray.get(actors[0].open_store.remote(30))
    ray.get([a.join.remote(meeting, rank, 3, 30) for rank, a in enumerate(actors)])
    yield actors
    for actor in actors:
        ray.kill(actor)


def host(actors: list[Any], job: Job) -> Packing:
    """Deal a job's agents to the actors in turn, so that neighbours are apart."""
    M, size = len(job.topology.agents), len(actors)
    packing = tuple(tuple(range(rank, M, size)) for rank in range(size))
    digests = ray.get(
        [
            actor.host.remote(job.spec, packing[rank], packing, job.absent)
            for rank, actor in enumerate(actors)
        ]
    )
    assert set(digests) == {job.digest}
    if job.spec.cluster.wire == "auto":
        call(actors, "connect")
    return packing


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(job=jobs(max_agents=6))
def test_a_step_on_actors_is_the_dense_one(three: list[Any], job: Job) -> None:
    """Loss, all gradients and the bytes on every edge, on any graph."""
    host(three, job)
    result = whole([result for results in call(three, "train", 1) for result in results])
    gradients = {i: own for part in call(three, "gradients") for i, own in part.items()}
    assert_matches_dense(job, result, gradients)
    sent = {link: size for part in call(three, "sent") for link, size in part.items()}
    assert_follows_plan(sent, job)


def test_recomputed_states_give_the_gradients_of_stored_ones_at_1024_layers(
    three: list[Any],
) -> None:
    found: list[dict[int, dict[str, Tensor]]] = []
    for activations in ("store", "recompute"):
        deep = "model.layers=1024", "model.h=0.004", "topology.agents=3", "topology.edges.args.n=3"
        how = f"training.activations={activations}", "training.batch_size=8"
        job = Job.load(None, [*TINY, *deep, *how])
        host(three, job)
        call(three, "train", 1)
        found.append({i: own for part in call(three, "gradients") for i, own in part.items()})
    stored, recomputed = found
    for i, own in stored.items():
        for name, gradient in own.items():
            error = (gradient - recomputed[i][name]).abs().max()
            assert error <= 1e-10 * gradient.abs().max(), f"{i}: {name}"


@pytest.mark.parametrize("distort", [False, True])
def test_an_actor_holds_no_other_agents_input_weights_or_optimiser_state(
    distort: bool, three: list[Any]
) -> None:
    """But for whole training images, where these are distorted."""
    job = Job.load(None, [*TINY, *["training.distort.rotate=10"] * distort])
    packing = host(three, job)
    call(three, "train", 3)
    local = LocalRunner(job)  # the same run, to know what the others' weights look like
    local.train(3)
    part: Part = "test" if distort else "train"
    canaries: list[bytes] = []
    owners: list[int] = []
    for i, agent in local.worker.agents.items():
        columns = load_features(job.spec.data, part, job.views[i].columns)
        state = agent.state()
        for secret in (
            torch.from_numpy(columns).double()[:40],
            *(state[f"weights/{name}"][0] for name in ("Kp", "Kq", "encoder.weight")),
            state["optimizer/Kp/exp_avg"][0],
            agent.node.gradients["Kq"][0],
        ):
            canaries.append(secret.contiguous().numpy().tobytes())
            owners.append(i)
    rank_of = hosts(packing)
    for rank, held in enumerate(call(three, "holds", canaries)):
        assert held == [rank_of[owner] == rank for owner in owners]
    if distort:
        images = load_images(job.spec.data, "train")
        assert all(call(three, "holds", [images[:40].tobytes()])), "SECURITY.md says so"


@pytest.mark.parametrize(
    ("per_actor", "wire", "messages"),
    [(1, "auto", "full"), (3, "auto", "bf16"), (1, "gloo", "fp16"), (3, "gloo", "full")],
)
def test_packing_and_wires_do_not_change_the_numbers(
    per_actor: int, wire: str, messages: str, tmp_path: Path
) -> None:
    job = Job.load(
        None,
        [
            *TINY,
            "topology.agents=6",
            "topology.edges.args.n=6",
            "training.clip_norm=0.5",
            "training.distort={rotate: 10, elastic: 1}",
            f"cluster.agents_per_actor={per_actor}",
            f"cluster.wire={wire}",
            f"training.messages={messages}",
        ],
    )

    def sockets(actor: AgentActor) -> int:
        transport = actor.worker.transport
        assert isinstance(transport, PointToPoint)
        return 0 if transport.near is None else len(transport.near.peers)

    runner, local = RayRunner(job), LocalRunner(job)
    try:
        apart = 6 // per_actor
        assert len(runner.packing) == apart
        open_ = [ray.get(actor.__ray_call__.remote(sockets)) for actor in runner._actors]
        assert open_ == [min(2, apart - 1) if wire == "auto" else 0] * apart
        assert runner.train(4) == local.train(4)
        times = runner.times()
        assert [own.agents for own in times] == [
            tuple(job.topology.names[i] for i in agents) for agents in runner.packing
        ]
        for own in times:
            assert own.steps == 4
            assert own.node
            assert own.wait > 0 < min(own.compute)
            assert own.wait + sum(own.compute) < own.total
        assert runner.evaluate() == local.evaluate()
        assert runner.sent() == local.sent()
        assert (runner.predict("test") == local.predict("test")).all()
        files = runner.save(tmp_path / "ours")
        assert files == local.save(tmp_path / "theirs")  # SHA-256 of weights and optimiser states
        assert set(files) == set(job.topology.names)
        assert {f.stem for f in (tmp_path / "ours").iterdir()} == set(job.topology.names)
    finally:
        runner.close()
    assert ray.is_initialized(), "a Ray that was there before is left alone"


@pytest.mark.parametrize(
    ("gpu", "device", "gpus", "direct"),
    [
        ((1, 1), "auto", ["x", "y"], True),
        ((0.5, 0.5), "auto", ["x", "x"], False),  # they share one
        ((1, 1), "auto", ["x", None], False),  # this torch cannot use the other
        ((1, 1), "cpu", ["x", "y"], False),
        ((0, 0), "auto", ["x", "y"], False),
        ((1, 0), "auto", ["x", "y"], False),  # one computes on the CPU, whatever its machine has
        ((1, 0), "auto", ["x", None], False),
    ],
)
def test_nccl_is_for_actors_that_have_a_gpu_each(
    gpu: tuple[float, float], device: str, gpus: list[str | None], direct: bool
) -> None:
    agents = f"topology.agents=[{{name: a, gpu: {gpu[0]}}}, {{name: b, gpu: {gpu[1]}}}]"
    job = Job.load(None, [agents, "topology.edges=[[a, b]]", f"cluster.device={device}"])
    runner = object.__new__(RayRunner)
    runner.job, runner.packing = job, ((0,), (1,))
    runner._all = lambda method, *_: gpus  # type: ignore[method-assign]
    assert runner._has_gpus_apart() == direct


def spoil(actor: AgentActor) -> None:
    actor.worker.agents[0].weights["Kp"].detach()[0, 0, 0] += 1e-9


@pytest.mark.parametrize(("copies", "per_actor"), [(2, 2), (3, 4)])
def test_copies_of_the_graph_train_as_one(copies: int, per_actor: int, tmp_path: Path) -> None:
    """Two actors or one to a copy, batches that do not divide, three steps and a checkpoint."""
    job = Job.load(
        None,
        [
            *(*TINY, "topology.agents=4", "topology.edges.args.n=4", "training.batch_size=16"),
            *("training.shift=1", "training.clip_norm=0.5", "data.split.kind=stripes"),
            *(f"cluster.replicas={copies}", f"cluster.agents_per_actor={per_actor}"),
        ],
    )
    runner, local = RayRunner(job), LocalRunner(job)
    try:
        assert f"4 agents, {copies} copies of each, on {copies * 4 // per_actor} Ray" in (
            runner.describe()
        )
        ours, theirs = runner.train(3), local.train(3)
        assert [r.loss for r in ours] == pytest.approx([r.loss for r in theirs], abs=1e-10)
        assert [r.correct for r in ours] == [r.correct for r in theirs]
        assert [r.grad_norm for r in ours] == pytest.approx([r.grad_norm for r in theirs])
        assert runner.evaluate().loss == pytest.approx(local.evaluate().loss, abs=1e-10)
        assert_close(torch.tensor(runner.predict("test")), torch.tensor(local.predict("test")), "P")
        assert_close(runner.gradient_squares(), local.gradient_squares(), "‖∂loss/∂y_j‖²")
        expected = Counter(job.plan.traffic(job.plan.forward, 2 * job.data.test, 8))
        for _ in range(3):
            expected += Counter(job.traffic(job.plan.training_step))
        assert runner.sent() == expected
        files = runner.save(tmp_path)  # which compares the copies bit by bit
        manifest = Manifest(step=3, state="", files=files, totals=Totals())
        for i, agent in local.worker.agents.items():
            saved = load_agent(tmp_path, agent.name, manifest)
            for key, value in agent.state().items():
                assert_close(saved[key], value, f"agent {i}: {key}")
        # One copy is lost, all start anew, from one state.
        ray.kill(runner._actors[-1])
        with pytest.raises(LostError, match=rf"\(copy {copies}\) on node .* died"):
            runner.train(10**6)
        runner.reform(job)
        runner.load(tmp_path, manifest)
        assert runner.train(1)[0].loss == pytest.approx(local.train(1)[0].loss, abs=1e-10)
        # One copy that has come to other weights is found.
        second = runner._actors[len(runner.packing)]
        ray.get(second.__ray_call__.remote(spoil))
        with pytest.raises(AgreementError, match=r"a1, .*\(copy 2\) .* another state of a1"):
            runner.save(tmp_path)
    finally:
        runner.close()


@pytest.fixture
def path() -> Iterator[RayRunner]:
    """a1 - a2 - a3, an actor each, in the middle of a run."""
    job = Job.load(
        None,
        [
            *(*TINY, "topology.agents=3", "topology.edges.generator=path_graph"),
            *("topology.edges.args.n=3", "cluster.timeout=5"),
        ],
    )
    runner = RayRunner(job)
    runner.train(1)
    yield runner
    runner.close()


def test_a_dead_actor_ends_the_run_at_once_and_is_named(path: RayRunner) -> None:
    threading.Timer(1.0, ray.kill, (path._actors[0],)).start()
    started = time.monotonic()
    with pytest.raises(RunError, match=r"the actor of agent a1 on node \S+ \(\w{8}\) died"):
        path.train(10**6)
    assert time.monotonic() - started < 20


def test_a_stopped_actor_is_named_and_not_those_who_wait_for_it(path: RayRunner) -> None:
    pid = ray.get(path._actors[0].__ray_call__.remote(lambda _: os.getpid()))
    threading.Timer(1.0, os.kill, (pid, signal.SIGSTOP)).start()
    started = time.monotonic()
    try:
        with pytest.raises(
            RunError, match=r"the actor of agent a1 on node \S+ \(\w{8}\) did not answer"
        ):
            path.train(10**6)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - started < 1 + 5


@pytest.mark.chaos
def test_a_stopped_actor_that_nobody_waits_for_is_noticed() -> None:
    job = Job.load(None, [*TINY, "cluster.agents_per_actor=8", "cluster.timeout=5"])
    runner = RayRunner(job)
    pid = ray.get(runner._actors[0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        with pytest.raises(LostError, match=r"a1, .*a8 on node \S+ \(\w{8}\) did not answer"):
            runner.train(10**6)
        assert time.monotonic() - started < 5
    finally:
        os.kill(pid, signal.SIGCONT)
        runner.close()


@pytest.mark.chaos
def test_a_run_goes_on_without_an_actor_that_died_and_with_it_again(tmp_path: Path) -> None:
    changes = ["topology.agents=4", "topology.edges.args.n=4", "cluster.on_agent_loss=drop"]
    changes += ["data.train_samples=64", "training.batch_size=16", "training.epochs=9"]
    job, run, course = Job.load(None, [*TINY, *changes]), tmp_path / "run", list[tuple[Any, ...]]()
    leaver = next(i for i in range(4) if i != job.root)

    class Course(Listener):
        def evaluated(self, step: int, epoch: int, evaluation: Evaluation) -> None:
            course.append((step, len(runner.job.topology.agents)))
            if step == 8 and not runner.job.absent:
                ray.kill(runner._actors[leaver])
            if step == 20 and runner.job.absent:
                regroup(run, join=[job.topology.names[leaver]])

        def lost(self, cause: LostError, restart: int) -> None:
            assert cause.agents == (job.topology.names[leaver],)

    runner = RayRunner(job)
    try:
        summary = fit(runner, create(job, run), [Course()], tensorboard=False)
    finally:
        runner.close()
    # The actor dies before it can write its part of the checkpoint of step 8.
    assert course == [
        (4, 4), (8, 4), (4, 3), (8, 3), (12, 3), (16, 3), (20, 3), (20, 4), (24, 4), (28, 4),
        (32, 4), (36, 4),
    ]  # fmt: skip
    assert (summary.restarts, summary.absent) == (1, ())


def test_actors_that_see_another_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.load(None, [*TINY, "topology.agents=1", "topology.edges=[]"])
    object.__setattr__(job, "digest", "0" * 64)
    with pytest.raises(AgreementError, match="one version of hdnn_dist"):
        RayRunner(job)


def test_the_data_plane_listens_on_the_nodes_interface_alone() -> None:
    def listening(_: object) -> set[tuple[str, int]]:
        own = psutil.Process().net_connections("inet")
        return {(c.laddr.ip, c.laddr.port) for c in own if c.status == psutil.CONN_LISTEN}

    actors = [actor_class(AgentActor).options(num_cpus=0).remote() for _ in range(2)]
    before = [ray.get(actor.__ray_call__.remote(listening)) for actor in actors]
    meeting = ray.get(actors[0].open_store.remote(30))
    ray.get([a.join.remote(meeting, rank, 2, 30) for rank, a in enumerate(actors)])
    job = Job.load(None, [*TINY, "topology.agents=2", "topology.edges=[[a1, a2]]"])
    packing = ((0,), (1,))
    ray.get([a.host.remote(job.spec, packing[rank], packing) for rank, a in enumerate(actors)])
    call(actors, "train", 1)
    after = [ray.get(actor.__ray_call__.remote(listening)) for actor in actors]
    for actor in actors:
        ray.kill(actor)
    new = [there - earlier for there, earlier in zip(after, before, strict=True)]
    assert all(new)
    assert meeting in new[0]
    assert {ip for there in new for ip, _ in there} == {ray.util.get_node_ip_address()}


def hdnn_dist_train(
    run: Path, settings: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """On a Ray of its own."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "hdnn_dist", "train", "--run", str(run)),
            *(word for setting in settings for word in ("--set", setting)),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "token", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_the_cluster_lacks_is_named_at_once_and_not_waited_for_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    agents = "topology.agents=[{name: a, resources: {camera: 2}, labels: {site: b}}]"
    job = Job.load(None, [*TINY, agents, "topology.edges=[]", "cluster.timeout=1"])
    lacking = r"1 of 1 actors find no place; the first, of a, asks for 1 CPU, 2 camera, the label "
    lacking += r"site=b; \S+ \(\w{8}\): no label site, no camera"
    with pytest.raises(PlacementError, match=rf"not hold 1 actors within 1 s: {lacking}; give"):
        RayRunner(job)
    [record] = caplog.records
    assert re.fullmatch(f"{lacking}; waiting 1 s for machines", record.getMessage())


def test_what_others_hold_is_told(caplog: pytest.LogCaptureFixture) -> None:
    job = Job.load(None, [*TINY, "topology.agents=1", "topology.edges=[]", "cluster.timeout=1"])
    other = actor_class(AgentActor).options(num_cpus=2).remote()
    ray.get(other.alive.remote())
    with pytest.raises(PlacementError, match=r"held by other jobs .*; free: 0 of 2 CPU"):
        RayRunner(job)
    ray.kill(other)
    [record] = caplog.records
    told = r"1 actors wait for the cluster: .* free: 0 of 2 CPU; from now on what is free will do"
    assert re.fullmatch(told, record.getMessage())


@pytest.mark.chaos
def test_agents_are_packed_for_the_core_that_is_free_when_the_other_does_not_come() -> None:
    more = "topology.agents=4", "topology.edges.args.n=4", "cluster.timeout=4"
    job = Job.load(None, [*TINY, *more, "cluster.agents_per_actor=auto"])
    other = placement_group([{"CPU": 1}])
    assert other.wait(10)
    started = time.monotonic()
    with contextlib.closing(RayRunner(job)) as runner:
        assert time.monotonic() - started > 2
        assert runner.packing == ((0, 1, 2, 3),)
        runner.train(1)
        remove_placement_group(other)
        runner.reform(job)
        assert len(runner.packing) == 2


def test_on_this_machine_alone_a_job_that_does_not_fit_ends_without_waiting(tmp_path: Path) -> None:
    agents = "topology.agents=[{name: a, labels: {site: b}}]"
    settings = [*TINY, agents, "topology.edges=[]", "cluster.timeout=1000"]
    done = hdnn_dist_train(tmp_path / "run", settings)
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert "asks for 1 CPU, the label site=b; " in said
    assert "no label site; give the job" in said
    assert "waiting" not in said


def test_a_torch_without_gloos_tls_says_so(tmp_path: Path) -> None:
    settings = [*TINY, "topology.agents=2", "topology.edges=[[a1, a2]]"]
    done = hdnn_dist_train(tmp_path / "run", settings, GLOO_DEVICE_TRANSPORT="TCP_TLS")
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert "is built without that transport; unset GLOO_DEVICE_TRANSPORT and" in said
    assert "Traceback" not in said


def test_agents_on_actors_read_out_for_themselves_as_in_one_process(tmp_path: Path) -> None:
    """Training, evaluation and prediction, in two copies, after a loss too; no scores travel."""
    own = {"a1": ["y6"], "a2": ["y0", "y3"], "a4": ["y2"]}
    job = Job.load(
        {
            "topology": {
                "agents": 4,
                "d": 2,
                "edges": {"generator": "cycle_graph", "args": {"n": 4}},
            },
            "model": {"layers": 2},
            "data": numbers() | {"targets": own},
            "training": {"batch_size": 6, "dtype": "float64", "clip_norm": 0.5},
            "cluster": {"replicas": 2, "agents_per_actor": 2, "timeout": 30.0},
        }
    )
    runner, local = RayRunner(job), LocalRunner(job)
    try:
        ours, theirs = runner.train(3), local.train(3)
        for result, expected in zip(ours, theirs, strict=True):
            assert result.step == expected.step
            assert result.scores == pytest.approx(expected.scores, abs=1e-10)
        assert runner.evaluate().scores == pytest.approx(local.evaluate().scores, abs=1e-10)
        assert_close(torch.tensor(runner.predict("test")), torch.tensor(local.predict("test")), "y")
        files = runner.save(tmp_path)  # which compares the copies bit by bit
        for i, agent in local.worker.agents.items():
            saved = load_agent(
                tmp_path, agent.name, Manifest(step=3, state="", files=files, totals=Totals())
            )
            for key, value in agent.state().items():
                assert_close(saved[key], value, f"agent {i}: {key}")
        runner.reform(job.without(["a1"]))
        assert runner.predict("test").shape == (10, 3)
    finally:
        runner.close()
