"""Three hosts with their own addresses, a raylet on each (see `tests.islands`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import hdnn_dist
from hdnn_dist.actor import AgentActor, actor_class
from hdnn_dist.check import examine
from hdnn_dist.cluster import RayRunner
from hdnn_dist.errors import PlacementError
from hdnn_dist.job import Job
from hdnn_dist.joining import cluster_nodes
from hdnn_dist.trainer import Runner
from hdnn_dist.transport import PointToPoint
from tests.islands import HEAD, NETWORK, hosts, skip_where_there_are_none
from tests.test_chaos import TIMEOUT, Loses, apart, same_weights

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.chaos]

SETTINGS = (
    *("topology.d=2", "model.layers=2", "data.split.kind=auto", "data.train_samples=320"),
    *("training.batch_size=32", "training.eval_every=100", f"cluster.timeout={TIMEOUT}"),
)
LINE = "topology.edges=[[a, b], [b, c]]"


def pinned(*hosts: int) -> str:
    """a, b, c on these hosts."""
    agents = (
        f"{{name: {name}, labels: {{host: '{k}'}}}}" for name, k in zip("abc", hosts, strict=True)
    )
    return f"topology.agents=[{', '.join(agents)}]"


def train_across_hosts(folder: Path) -> None:
    with hosts(3):
        place_as_labels_say()
        use_the_cluster_s_network_alone()
        job = Job.load(None, [*SETTINGS, pinned(4, 3, 2), LINE, "training.epochs=2"])
        summary = hdnn_dist.train(job, run=folder / "run")
        assert summary.placement == "3 agents on 3 Ray actors, 3 nodes"
    assert same_weights(folder / "run", folder / "quiet")


def place_as_labels_say() -> None:
    """What `check` forecasts is what Ray does; what cannot be is told of each host."""
    nodes = cluster_nodes(HEAD)
    job = Job.load(None, [*SETTINGS, pinned(4, 3, 2), LINE])
    forecast = examine(job, nodes)
    with contextlib.closing(RayRunner(job)) as runner:
        assert [actor.node for actor in forecast.actors] == runner._nodes
    on = [f"{NETWORK}.{k}" for k in (4, 3, 2)]
    assert [str(actor.node).split()[0] for actor in forecast.actors] == on
    crossings = {(c.source.split()[0], c.target.split()[0]): c.links for c in forecast.crossings}
    assert crossings == {
        (on[0], on[1]): (("a", "b"),),
        (on[1], on[0]): (("b", "a"),),
        (on[1], on[2]): (("b", "c"),),
        (on[2], on[1]): (("c", "b"),),
    }
    job = Job.load(None, [*SETTINGS, pinned(4, 3, 5), LINE, "cluster.timeout=2"])
    started = time.monotonic()
    with pytest.raises(
        PlacementError, match=r"of c, asks for 1 CPU, the label host=5; .*its host is 2"
    ):
        RayRunner(job)
    assert time.monotonic() - started < 10


def use_the_cluster_s_network_alone() -> None:
    """New sockets of the actors, and the bytes that pass their interfaces, in some steps."""

    def sockets(_: object) -> set[tuple[str, int, str]]:
        own = psutil.Process().net_connections("inet")
        ends = [(c.laddr.ip, c.laddr.port, c.raddr.ip if c.raddr else "") for c in own]
        mapped = "::ffff:"  # IPv4 on a socket that speaks both
        return {(a.removeprefix(mapped), port, b.removeprefix(mapped)) for a, port, b in ends}

    def sent_by(_: object) -> dict[str, int]:
        return {n: c.bytes_sent for n, c in psutil.net_io_counters(pernic=True).items()}

    def near(actor: AgentActor) -> int:
        transport = actor.worker.transport
        assert isinstance(transport, PointToPoint)
        return 0 if transport.near is None else len(transport.near.peers)

    def ask(what: Callable[[Any], Any]) -> list[Any]:
        return ray.get([actor.__ray_call__.remote(what) for actor in actors])

    def on(node: str) -> Any:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        return actor_class(AgentActor).options(num_cpus=0, scheduling_strategy=where).remote()

    job = Job.load(None, [*SETTINGS, "topology.agents=3", "topology.edges.args.n=3"])
    nodes = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
    addresses = [f"{NETWORK}.{k}" for k in (2, 3, 4)]
    actors = [on(nodes[address]) for address in addresses]
    before = ask(sockets)
    meeting = ray.get(actors[0].open_store.remote(TIMEOUT))
    ray.get([a.join.remote(meeting, rank, 3, TIMEOUT) for rank, a in enumerate(actors)])
    packing = ((0,), (1,), (2,))
    ray.get([a.host.remote(job.spec, packing[rank], packing) for rank, a in enumerate(actors)])
    ray.get([actor.connect.remote() for actor in actors])
    first = ask(sent_by)
    ray.get([actor.train.remote(10) for actor in actors])
    passed = [
        {name: after - then[name] for name, after in now.items()}
        for now, then in zip(ask(sent_by), first, strict=True)
    ]
    new = [now - then for now, then in zip(ask(sockets), before, strict=True)]
    assert ask(near) == [0, 0, 0], "no sockets of one machine lead to another"
    sent = [sum(own.values()) for own in ray.get([actor.sent.remote() for actor in actors])]
    for address, own, by_interface, least in zip(addresses, new, passed, sent, strict=True):
        assert {here for here, _, there in own if not there} == {address}, own  # who listens
        # Ray talks to its own on the same host by the loopback interface too.
        ends = {(here, there) for here, _, there in own if there} - {("127.0.0.1",) * 2}
        assert {here for here, _ in ends} == {address}, own
        others = set(addresses) - {address}
        assert others <= {there for _, there in ends} <= {address, *others}, own
        assert by_interface["eth0"] >= least
        assert by_interface["eth1"] < least / 10
    for actor in actors:
        ray.kill(actor)


@pytest.mark.timeout(300)
def test_a_job_trains_across_hosts_where_its_labels_say_by_their_network_alone(
    tmp_path: Path,
) -> None:
    skip_where_there_are_none()
    apart(train_across_hosts, tmp_path)


class Course(Loses):
    """Also where the actors are."""

    def __init__(self, *happens: Callable[[], None]) -> None:
        super().__init__(*happens)
        self.on: list[set[str]] = []

    def started(self, runner: Runner, step: int) -> None:
        assert isinstance(runner, RayRunner)
        self.runner = runner
        self.on.append({node.split()[0] for node in runner._nodes})
        super().started(runner, step)


def cut_a_host_off_and_take_it_back(folder: Path) -> None:
    with hosts(3) as there:

        def rejoin() -> None:
            there.mend(2)
            watch.at = time.monotonic()
            ray.kill(watch.runner._actors[0])

        watch = Course(lambda: there.cut(2), rejoin)
        more = "cluster.agents_per_actor=auto", "training.epochs=120"
        agents = "topology.agents=6", "topology.edges.args.n=6"
        job = Job.load(None, [*SETTINGS, *agents, *more])
        summary = hdnn_dist.train(job, run=folder / "cut", listeners=[watch])
    first, second = ({f"{NETWORK}.{k}" for k in own} for own in ((2, 3, 4), (3, 4)))
    assert watch.on == [first, second, first]
    assert summary.restarts == 2
    cause, _ = watch.causes
    assert f" on node {NETWORK}.2 " in cause
    assert "its network is cut" in cause
    assert watch.seconds[0] < TIMEOUT
    assert same_weights(folder / "cut", folder / "quiet")


@pytest.mark.timeout(600)
def test_a_host_that_is_cut_off_is_done_without_and_used_again_when_it_is_back(
    tmp_path: Path,
) -> None:
    skip_where_there_are_none()
    apart(cut_a_host_off_and_take_it_back, tmp_path)
