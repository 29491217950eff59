from __future__ import annotations

import datetime
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from hdnn_dist.agent import CPU
from hdnn_dist.errors import AgreementError
from hdnn_dist.exchange import Message, Round
from hdnn_dist.job import Job
from hdnn_dist.node import Exchange
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.trainer import LocalRunner
from hdnn_dist.transport import Agreement, InProcess, Mail, PointToPoint, Staged, _Route, drive
from hdnn_dist.wires import SPARE, STAMP, Frame, Gloo, Sockets, connect
from hdnn_dist.worker import Worker, agreement_of

phase = Round("states", (Message(0, 1, 2),))
links = BlockPattern.of(3, [(0, 0), (1, 0), (1, 1), (2, 2)])  # 1 may hear from 0, not 0 from 1
NAMES = ("ann", "ben", "eve")
TIMEOUT = 3.0  # seconds


def agreed(
    links: BlockPattern = links,
    per_sample: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    job: str = "job",
) -> Agreement:
    return Agreement(links, NAMES, dtype, per_sample, job)


def in_process(per_sample: torch.dtype = torch.float32) -> InProcess:
    return InProcess(agreed(per_sample=per_sample))


def test_a_message_arrives_and_is_counted() -> None:
    transport = in_process()
    mail = {(0, 1): torch.ones(2, 3)}
    assert transport.exchange(phase, mail, batch=3) == mail
    assert transport.sent == {(0, 1): 2 * 3 * 4}


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_narrow_message_is_rounded_and_counted_as_such(narrow: torch.dtype) -> None:
    transport = in_process(narrow)
    numbers = torch.tensor([[1 / 3, 1e-9, 70000.0], [1.0, -2.5, 0.0]])
    came = transport.exchange(phase, {(0, 1): numbers}, batch=3)[0, 1]
    assert came.dtype == torch.float32
    assert torch.equal(came, numbers.to(narrow).float())
    assert not torch.equal(came, numbers)
    assert transport.sent == {(0, 1): 2 * 3 * 2}


def test_what_there_is_not_one_of_per_sample_is_never_narrow() -> None:
    transport, norm = in_process(torch.bfloat16), Round("norm", phase.messages, per_sample=False)
    numbers = torch.tensor([[1 / 3], [1e-9]])
    assert torch.equal(transport.exchange(norm, {(0, 1): numbers}, batch=3)[0, 1], numbers)
    assert transport.sent == {(0, 1): 2 * 4}


@pytest.mark.parametrize(
    ("round_", "mail", "complaint"),
    [
        (phase, {}, "'ann' sends nothing to agent 'ben', where 2x3 float32 is planned"),
        (phase, {(0, 1): torch.ones(3, 3)}, "sends 3x3 float32 to"),
        (phase, {(0, 1): torch.ones(2, 4)}, "sends 2x4 float32 to"),
        (phase, {(0, 1): torch.ones(2, 3).double()}, "sends 2x3 float64 to"),
        (
            phase,
            {(0, 1): torch.ones(2, 3), (2, 1): torch.ones(2, 3)},
            "'eve' sends a message to agent 'ben', where none is planned",
        ),
        (
            phase,
            {(0, 1): torch.ones(2, 3), (0, 7): torch.ones(2, 3)},
            "'ann' sends a message to agent number 7, where none",
        ),
        (
            Round("x", (Message(1, 0, 2),)),
            {(1, 0): torch.ones(2, 3)},
            "round x: agent 'ben' sends a message to agent 'ann', where no link is planned",
        ),
    ],
)
def test_what_is_not_in_the_plan_is_not_sent(
    round_: Round, mail: dict[tuple[int, int], Tensor], complaint: str
) -> None:
    transport = in_process()
    with pytest.raises(AgreementError, match=complaint):
        transport.exchange(round_, mail, batch=3)


pull = Round("pull", (Message(0, 1, 2),))


def waiting(*rounds: Round, outbox: dict[int, Tensor] | None = None) -> Exchange[None]:
    for wanted in rounds:
        yield wanted, outbox or {}


@pytest.mark.parametrize(
    ("agents", "complaint"),
    [
        ({1: (pull,)}, "ben is in round pull, where the plan has states"),
        ({1: ()}, "ben ended before round states"),
        ({1: (phase, phase)}, "ben is in round states at the plan's end"),
        ({2: (pull,)}, "eve is in round pull at the plan's end"),
    ],
)
def test_agents_out_of_step_are_named(agents: dict[int, tuple[Round, ...]], complaint: str) -> None:
    right = {0: waiting(phase, outbox={1: torch.ones(2, 3)}), 1: waiting(phase)}
    wrong = {i: waiting(*rounds) for i, rounds in agents.items()}
    with pytest.raises(AgreementError, match=complaint):
        drive(right | wrong, in_process(), 3, [phase])


def test_agents_are_resumed_in_their_own_rounds_alone() -> None:
    """Of three in a row, each round of a tree: ann, then ben and eve, and ben once more alone."""

    class Recorder(InProcess):
        def exchange(self, phase: Round, mail: dict, batch: int) -> dict:
            seen.append(phase.name)
            return super().exchange(phase, mail, batch)

    def agent(i: int, *rounds: Round) -> Exchange[float]:
        total = float(i)
        for wanted in rounds:
            inbox = yield (
                wanted,
                {m.target: torch.full((1, 3), total) for m in wanted.outbound.get(i, ())},
            )
            total += sum(value[0, 0].item() for value in inbox.values())
            seen.append(i)
        return total

    seen: list[object] = []
    first, second = (Round(f"{s} to {t}", (Message(s, t, 1),)) for s, t in ((2, 1), (1, 0)))
    agents = {0: agent(0, second), 1: agent(1, first, second), 2: agent(2, first)}
    pattern = BlockPattern.of(3, [(1, 2), (0, 1)])
    transport = Recorder(agreed(pattern))
    assert drive(agents, transport, 3, [first, second]) == {0: 3.0, 1: 3.0, 2: 2.0}
    assert seen == ["2 to 1", 1, 2, "1 to 0", 0, 1]


def test_what_leaves_the_process_is_on_its_way_before_the_others_compute() -> None:
    """Ann and ben are here; ben sends to eve, who is elsewhere."""
    seen: list[str] = []

    class Recorder(Gloo):
        def post(self, outbound: Mapping[int, Frame], inbound: Mapping[int, Frame]) -> None:
            seen.extend(f"to {rank}: {frame.numbers.tolist()}" for rank, frame in outbound.items())

        def wait(self) -> None:
            seen.append("waits")

    def agent(i: int, message: Tensor) -> Exchange[None]:
        for k in range(2):
            seen.append(NAMES[i])
            yield both, {i + 1: message + k}

    both = Round("states", (Message(0, 1, 1), Message(1, 2, 1)))
    pattern = BlockPattern.of(3, [(1, 0), (2, 1)])
    agents = {i: agent(i, torch.full((1, 1), 10.0 * i)) for i in (0, 1)}
    drive(agents, PointToPoint(agreed(pattern), (0, 0, 1), 0, Recorder()), 1, [both, both])
    first, second = (["ben", f"to 1: [[{x}]]", "ann", "waits"] for x in (10.0, 11.0))
    assert seen == first + second


def test_what_leaves_the_process_goes_by_host_memory() -> None:
    """On a device that is made up: nothing is computed, but where tensors lie is known."""
    seen: dict[tuple[int, int], str] = {}

    class Wire(PointToPoint):
        def __init__(self) -> None:
            InProcess.__init__(self, agreed())
            self.host, self.rank = (0, 1, 0), 0

        def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
            seen.update((link, tensor.device.type) for link, tensor in mail.items())
            return {(0, 2): mail[0, 2], (1, 0): torch.ones(2, 3)}

    with FakeTensorMode():
        device = torch.device("cuda", 0)
        there = {(0, 1): torch.ones(2, 3, device=device), (0, 2): torch.ones(2, 3, device=device)}
        arrived = Staged(Wire(), device).exchange(phase, there, 3)
    assert seen == {(0, 1): "cpu", (0, 2): "cuda"}
    assert {tensor.device for tensor in arrived.values()} == {device}
    assert arrived[0, 2] is there[0, 2]


# --- agents on devices and agents without, in one group ------------------------------------------


def mixed(rank: int, folder: Path) -> None:
    """Train the agents of a rank; those of rank 1 are on a device, which the CPU stands in for."""
    torch.set_num_threads(1)
    group(rank, dist.FileStore(str(folder / "meeting"), 3))
    job, host = mixed_job(), (0, 1, 2, 0, 1, 2)
    wired = PointToPoint(agreement_of(job), host, rank, Gloo())
    agents = [i for i, own in enumerate(host) if own == rank]
    on_device = rank == 1
    worker = Worker(job, agents, Staged(wired, CPU) if on_device else wired)
    results = worker.train(3)
    states = {agent.name: agent.state() for agent in worker.agents.values()}
    waited_for = worker.transport.waited_for
    assert waited_for.keys() == {other for other in range(3) if other != rank}
    assert 0 < sum(waited_for.values()) <= worker.transport.waited
    torch.save(([r.loss for r in results], states, dict(wired.sent)), folder / f"{rank}.pt")
    dist.barrier()


def mixed_job() -> Job:
    agents = [{"name": f"a{i}", "d": 2, "gpu": float(i in (1, 4))} for i in range(6)]
    edges = {"generator": "cycle_graph", "args": {"n": 6}}
    training = {"messages": "bf16", "batch_size": 16, "clip_norm": 0.5}
    topology = {"agents": agents, "edges": edges}
    sections = {"topology": topology, "model": {"layers": 2}, "training": training}
    return Job.of(spec_from_dict(sections))


def test_agents_with_a_gpu_and_agents_without_train_as_one_process_does(tmp_path: Path) -> None:
    spawn(mixed, (tmp_path,), nprocs=3)
    job = mixed_job()
    alone = LocalRunner(job)
    losses = [result.loss for result in alone.train(3)]
    sent: dict[tuple[int, int], int] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for rank in range(3):
        theirs, own, counted = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert theirs in (losses, [])
        states |= own
        sent |= counted
    assert sent == alone.sent()
    for agent in alone.worker.agents.values():
        for key, value in agent.state().items():
            assert torch.equal(states[agent.name][key], value), f"{agent.name}: {key}"


# --- between processes: ann, ben and eve have one each, and ben keeps to the plan -----------------

MAIL = {(0, 1): torch.arange(6.0).view(2, 3)}
Near = Sockets | None
Action = Callable[[Near], object]


def transport(near: Near, job: str = "job", dtype: torch.dtype = torch.float32) -> PointToPoint:
    made = PointToPoint(agreed(links, dtype, dtype, job), (0, 1, 2), dist.get_rank(), Gloo())
    made.near = near
    return made


def send(near: Near, message: Tensor) -> None:
    if near is not None:
        near.peers[1].send(message.view(torch.uint8).numpy().data)
        return
    work = dist.isend(message, 1)
    assert work is not None
    work.wait()


def frame() -> Tensor:
    """What the plan has ann send to ben, stamps and all."""
    [(_, planned)] = _Route(transport(None), phase, 3).sends
    planned.numbers.copy_(MAIL[0, 1])
    planned.seal("job 1")
    return planned.bytes


def out_of_step(near: Near) -> None:
    sender = transport(near)
    sender._rounds = 6
    sender.exchange(phase, MAIL, 3)


def of_others(near: Near) -> None:
    eve_too, only = Round("states", (Message(2, 1, 2),)), BlockPattern.of(3, [(1, 2)])
    sender = PointToPoint(agreed(only), (1, 1, 0), 0, Gloo())
    sender.near = near
    sender.exchange(eve_too, {(2, 1): MAIL[0, 1]}, 3)


def silent(near: Near) -> None:
    pass


MISDEEDS: dict[str, tuple[Action, str]] = {
    "another shape": (
        lambda near: transport(near).exchange(
            Round("states", (Message(0, 1, 4),)), {(0, 1): torch.ones(4, 3)}, 3
        ),
        "'job 1 states 4x3 float32 [^']*', where 'job 1 states 2x3 float32",
    ),
    "fewer rows": (
        lambda near: transport(near).exchange(
            Round("states", (Message(0, 1, 1),)), {(0, 1): torch.ones(1, 3)}, 3
        ),
        "'job 1 states 1x3 float32 [^']*', where 'job 1 states 2x3 float32",
    ),
    "another batch": (
        lambda near: transport(near).exchange(phase, {(0, 1): torch.ones(2, 5)}, 5),
        "'job 1 states 2x5 float32",
    ),
    "another dtype": (
        lambda near: transport(near, dtype=torch.float64).exchange(
            phase, {(0, 1): MAIL[0, 1].double()}, 3
        ),
        "'job 1 states 2x3 float64",
    ),
    "another round": (
        lambda near: transport(near).exchange(Round("pull", phase.messages), MAIL, 3),
        "'job 1 pull 2x3 float32",
    ),
    "a later round": (out_of_step, "'job 7 states 2x3 float32"),
    "another job": (
        lambda near: transport(near, "other").exchange(phase, MAIL, 3),
        "'other 1 states 2x3 float32",
    ),
    "another agent's message": (of_others, "'job 1 states 2x3 float32"),
    "no message": (
        lambda near: send(near, torch.full((200,), 7.0)),
        "something that is no message",
    ),
    "more numbers": (
        lambda near: send(
            near, torch.cat([frame()[:-STAMP], torch.ones(16, dtype=torch.uint8), frame()[-STAMP:]])
        ),
        CUT := "'job 1 states 2x3 float32 [^']*' with fewer or more numbers than it says",
    ),
}
# A socket has no end of a message to tell: what is missing is waited for, what is too much is taken
# for the beginning of the next (see `test_wires`).
OF_GLOO: dict[str, tuple[Action, str]] = {
    "fewer numbers": (lambda near: send(near, frame()[: STAMP + 12]), CUT),
    "fewer numbers and the stamp": (
        lambda near: send(near, torch.cat([frame()[: STAMP + 12], frame()[-STAMP:]])),
        CUT,
    ),
    "more behind the stamp": (
        lambda near: send(near, torch.cat([frame(), torch.zeros(16, dtype=torch.uint8)])),
        CUT,
    ),
}
ON_WIRES = [
    *((wire, misdeed) for misdeed in MISDEEDS for wire in ("gloo", "sockets")),
    *(("gloo", misdeed) for misdeed in OF_GLOO),
]


def group(rank: int, store: dist.Store) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=limit)


def attempt(action: Callable[[], object], record: Path) -> None:
    """Write down how long something took, and its result or its error."""
    started = time.monotonic()
    try:
        said = repr(action())
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    record.write_text(f"{time.monotonic() - started}\n{said}")


def ben(near: Near) -> object:
    return transport(near).exchange(phase, {}, 3)[0, 1].tolist()


def misdeeds(rank: int, folder: Path) -> None:
    """Ann's misdeeds, each in a group of its own; then eve sends what nobody awaits."""
    store = dist.FileStore(str(folder / "meeting"), 3)
    casts: dict[tuple[str, str], tuple[Action, Action, Action]] = {
        (wire, misdeed): ((MISDEEDS | OF_GLOO)[misdeed][0], ben, silent)
        for wire, misdeed in ON_WIRES
    }
    casts["gloo", "eve"] = (
        lambda near: transport(near).exchange(phase, MAIL, 3),
        ben,
        lambda near: send(near, torch.zeros(8)),
    )
    casts["sockets", "silence"] = (silent, ben, silent)
    casts["sockets", "death"] = (lambda near: near and near.close(), ben, silent)
    for (wire, misdeed), cast in casts.items():
        name = f"{wire} {misdeed}"
        group(rank, dist.PrefixStore(name, store))
        peers = [r for r in range(3) if r != rank]
        near = None
        if wire == "sockets":
            near = Sockets(connect(store, name, rank, peers, 60), TIMEOUT)
        attempt(lambda cast=cast, near=near: cast[rank](near), folder / f"{name} {rank}")  # type: ignore[misc]
        store.set(f"done {name} {rank}", "")
        store.wait([f"done {name} {other}" for other in range(3)], datetime.timedelta(seconds=60))
        dist.destroy_process_group()
        if near is not None:
            near.close()


def flood(rank: int, folder: Path) -> None:
    group(rank, dist.FileStore(str(folder / "meeting"), 3))
    too_much = torch.zeros(2 * SPARE, dtype=torch.uint8)
    acts: tuple[Action, ...] = (lambda near: send(near, too_much), ben, silent)
    attempt(lambda: acts[rank](None), folder / f"flood {rank}")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """By wire, misdeed and rank: the seconds that it took, and what came of it."""
    folder = tmp_path_factory.mktemp("misdeeds")
    spawn(misdeeds, (folder,), nprocs=3)
    records = {p.name: p.read_text().split("\n", 1) for p in folder.iterdir() if " " in p.name}
    return {name: (float(seconds), said) for name, (seconds, said) in records.items()}


@pytest.mark.parametrize(("wire", "misdeed"), ON_WIRES)
def test_a_process_that_sends_something_else_is_named(
    said: dict[str, tuple[float, str]], wire: str, misdeed: str
) -> None:
    seconds, complaint = said[f"{wire} {misdeed} 1"]
    named = "AgreementError: round states: the process of agent.s. ann sent "
    assert re.search(named + (MISDEEDS | OF_GLOO)[misdeed][1], complaint), complaint
    assert seconds < TIMEOUT


@pytest.mark.parametrize(
    ("misdeed", "complaint"), [("silence", "no news within 3 s"), ("death", "it has hung up")]
)
def test_a_process_that_sends_nothing_is_named(
    said: dict[str, tuple[float, str]], misdeed: str, complaint: str
) -> None:
    _, error = said[f"sockets {misdeed} 1"]
    named = "TransportError: round states: the process of agent(s) ann did not answer: "
    assert error == named + complaint


def test_what_nobody_awaits_is_not_read_and_its_sender_fails(
    said: dict[str, tuple[float, str]],
) -> None:
    assert said["gloo eve 1"][1] == repr(MAIL[0, 1].tolist())
    seconds, complaint = said["gloo eve 2"]
    assert "Timed out" in complaint
    assert seconds < 3 * TIMEOUT


def test_a_flood_ends_the_process_and_is_not_read(tmp_path: Path) -> None:
    """gloo does that: it is why a frame has room to spare."""
    with pytest.raises(ProcessExitedException) as death:
        spawn(flood, (tmp_path,), nprocs=3)
    assert death.value.error_index == 1
    assert death.value.exit_code == -signal.SIGABRT
    assert not (tmp_path / "flood 1").exists()
