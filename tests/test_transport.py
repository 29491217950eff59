from __future__ import annotations

import datetime
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from hdnn_dist.errors import AgreementError
from hdnn_dist.exchange import Message, Round
from hdnn_dist.node import Exchange
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.transport import SPARE, STAMP, InProcess, Mail, PointToPoint, Staged, _Frame, drive

phase = Round("states", (Message(0, 1, 2),))
links = BlockPattern.of(3, [(0, 0), (1, 0), (1, 1), (2, 2)])  # 1 may hear from 0, not 0 from 1
NAMES = ("ann", "ben", "eve")
TIMEOUT = 3.0  # seconds


def in_process() -> InProcess:
    return InProcess(links, NAMES, torch.float32)


def test_a_message_arrives_and_is_counted() -> None:
    transport = in_process()
    mail = {(0, 1): torch.ones(2, 3)}
    assert transport.exchange(phase, mail, batch=3) == mail
    assert transport.sent == {(0, 1): 2 * 3 * 4}


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
    transport = Recorder(BlockPattern.of(3, [(1, 2), (0, 1)]), NAMES, torch.float32)
    assert drive(agents, transport, 3, [first, second]) == {0: 3.0, 1: 3.0, 2: 2.0}
    assert seen == ["2 to 1", 1, 2, "1 to 0", 0, 1]


def test_what_leaves_the_process_goes_by_host_memory() -> None:
    """On a device that is made up: nothing is computed, but where tensors lie is known."""
    seen: dict[tuple[int, int], str] = {}

    class Wire(PointToPoint):
        def __init__(self) -> None:
            InProcess.__init__(self, links, NAMES, torch.float32)
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


# --- between processes: ann, ben and eve have one each, and ben keeps to the plan -----------------

MAIL = {(0, 1): torch.arange(6.0).view(2, 3)}


def transport(job: str = "job", dtype: torch.dtype = torch.float32) -> PointToPoint:
    return PointToPoint(links, NAMES, dtype, host=(0, 1, 2), job=job)


def send(frame: Tensor) -> None:
    work = dist.isend(frame, 1)
    assert work is not None
    work.wait()


def frame() -> Tensor:
    """What the plan has ann send to ben, stamps and all."""
    planned = _Frame("states", phase.messages, 3, torch.float32, 0)
    planned.numbers.copy_(MAIL[0, 1])
    sender = transport()
    sender._rounds = 1
    planned.view[:STAMP] = planned.view[planned.stop :] = sender._stamp(planned)
    return planned.bytes


def out_of_step() -> None:
    sender = transport()
    sender._rounds = 6
    sender.exchange(phase, MAIL, 3)


def of_others() -> None:
    eve_too = Round("states", (Message(2, 1, 2),))
    sender = PointToPoint(BlockPattern.of(3, [(1, 2)]), NAMES, torch.float32, (1, 1, 0), "job")
    sender.exchange(eve_too, {(2, 1): MAIL[0, 1]}, 3)


CUT = "'job 1 states 2x3 float32 [^']*' with fewer or more numbers than it says"
MISDEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "another shape": (
        lambda: transport().exchange(
            Round("states", (Message(0, 1, 4),)), {(0, 1): torch.ones(4, 3)}, 3
        ),
        "'job 1 states 4x3 float32 [^']*', where 'job 1 states 2x3 float32",
    ),
    "another batch": (
        lambda: transport().exchange(phase, {(0, 1): torch.ones(2, 5)}, 5),
        "'job 1 states 2x5 float32",
    ),
    "another dtype": (
        lambda: transport(dtype=torch.float64).exchange(phase, {(0, 1): MAIL[0, 1].double()}, 3),
        "'job 1 states 2x3 float64",
    ),
    "another round": (
        lambda: transport().exchange(Round("pull", phase.messages), MAIL, 3),
        "'job 1 pull 2x3 float32",
    ),
    "a later round": (out_of_step, "'job 7 states 2x3 float32"),
    "another job": (
        lambda: transport("other").exchange(phase, MAIL, 3),
        "'other 1 states 2x3 float32",
    ),
    "another agent's message": (of_others, "'job 1 states 2x3 float32"),
    "fewer numbers": (lambda: send(frame()[: STAMP + 12]), CUT),
    "fewer numbers and the stamp": (
        lambda: send(torch.cat([frame()[: STAMP + 12], frame()[-STAMP:]])),
        CUT,
    ),
    "more numbers": (lambda: send(torch.cat([frame(), torch.zeros(16, dtype=torch.uint8)])), CUT),
    "no message": (lambda: send(torch.full((200,), 7.0)), "something that is no message"),
}


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


def ben() -> object:
    return transport().exchange(phase, {}, 3)[0, 1].tolist()


def misdeeds(rank: int, folder: Path) -> None:
    """Ann's misdeeds, each in a group of its own; then eve sends what nobody awaits."""
    store = dist.FileStore(str(folder / "meeting"), 3)
    casts: dict[str, tuple[Callable[[], object], ...]] = {
        misdeed: (action, ben, lambda: None) for misdeed, (action, _) in MISDEEDS.items()
    }
    casts["eve"] = (lambda: transport().exchange(phase, MAIL, 3), ben, lambda: send(frame()))
    for misdeed, cast in casts.items():
        group(rank, dist.PrefixStore(misdeed, store))
        attempt(cast[rank], folder / f"{misdeed} {rank}")
        store.set(f"{misdeed} {rank}", "done")
        store.wait([f"{misdeed} {other}" for other in range(3)], datetime.timedelta(seconds=60))
        dist.destroy_process_group()


def flood(rank: int, folder: Path) -> None:
    group(rank, dist.FileStore(str(folder / "meeting"), 3))
    too_much = torch.zeros(2 * SPARE, dtype=torch.uint8)
    attempt((lambda: send(too_much), ben, lambda: None)[rank], folder / f"flood {rank}")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """By misdeed and rank: the seconds that it took, and what came of it."""
    folder = tmp_path_factory.mktemp("misdeeds")
    spawn(misdeeds, (folder,), nprocs=3)
    records = {p.name: p.read_text().split("\n", 1) for p in folder.iterdir() if " " in p.name}
    return {name: (float(seconds), said) for name, (seconds, said) in records.items()}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_process_that_sends_something_else_is_named(
    said: dict[str, tuple[float, str]], misdeed: str
) -> None:
    seconds, complaint = said[f"{misdeed} 1"]
    named = "AgreementError: round states: the process of agent.s. ann sent "
    assert re.search(named + MISDEEDS[misdeed][1], complaint), complaint
    assert seconds < TIMEOUT


def test_what_nobody_awaits_is_not_read_and_its_sender_fails(
    said: dict[str, tuple[float, str]],
) -> None:
    assert said["eve 1"][1] == repr(MAIL[0, 1].tolist())
    seconds, complaint = said["eve 2"]
    assert "Timed out" in complaint
    assert seconds < 3 * TIMEOUT


def test_a_flood_ends_the_process_and_is_not_read(tmp_path: Path) -> None:
    """gloo does that: it is why a frame has room to spare."""
    with pytest.raises(ProcessExitedException) as death:
        spawn(flood, (tmp_path,), nprocs=3)
    assert death.value.error_index == 1
    assert death.value.exit_code == -signal.SIGABRT
    assert not (tmp_path / "flood 1").exists()
