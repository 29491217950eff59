"""Sockets between threads of this process; `test_transport` has real processes, on both wires."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hdnn_dist import wires
from hdnn_dist.wires import STAMP, Frame, PeerError, Sockets, connect

TIMEOUT = 2.0  # seconds


def frame(size: int = 6, number: float = 0.0, time: str = "now") -> Frame:
    made = Frame("numbers", (size,), torch.float32)
    made.numbers.fill_(number)
    made.seal(time)
    return made


def inbox(size: int = 6) -> Frame:
    made = Frame("numbers", (size,), torch.float32)
    made.expect("now")
    return made


def together(actions: Sequence[Callable[[], object]]) -> list[object]:
    """What some actions at once return or raise."""

    def attempt(action: Callable[[], object]) -> object:
        try:
            return action()
        except PeerError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(attempt, actions))


@pytest.fixture
def pair() -> Iterator[tuple[Sockets, socket.socket]]:
    """A wire to peer 1, and the other end of its socket."""
    here, there = socket.socketpair()
    wire = Sockets({1: here}, TIMEOUT)
    yield wire, there
    wire.close()
    there.close()


@settings(max_examples=20)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.dictionaries(
            st.sampled_from([(a, b) for a in range(n) for b in range(n) if a != b]),
            st.sampled_from([1, 1000, 10**6]),
            min_size=1,
        )
    )
)
def test_all_messages_of_a_round_arrive_whatever_their_sizes(
    sizes: dict[tuple[int, int], int],
) -> None:
    """4 MB are more than a socket holds: both ends are then sending before either receives."""
    n = 1 + max(map(max, sizes))
    peers: list[dict[int, socket.socket]] = [{} for _ in range(n)]
    for a, b in combinations(range(n), 2):
        peers[a][b], peers[b][a] = socket.socketpair()
    wire = [Sockets(sockets, 10 * TIMEOUT) for sockets in peers]

    def process(rank: int) -> bool:
        out = {b: frame(size, rank) for (a, b), size in sizes.items() if a == rank}
        into = {a: inbox(size) for (a, b), size in sizes.items() if b == rank}
        for _ in range(2):
            wire[rank].post(out, into)
            wire[rank].wait()
        return all(f.begun and f.ended and (f.numbers == a).all() for a, f in into.items())

    assert together([lambda r=r: process(r) for r in range(n)]) == [True] * n  # type: ignore[misc]
    for each in wire:
        each.close()


def test_it_is_told_for_whom_was_waited_and_how_long(pair: tuple[Sockets, socket.socket]) -> None:
    wire, there = pair
    assert wire.waited.get(1, 0.0) == 0
    started = time.perf_counter()
    timer = threading.Timer(0.2, there.sendall, [bytes(frame().view)])
    timer.start()
    wire.post({}, {1: inbox()})
    wire.wait()
    timer.join()
    assert wire.waited.keys() == {1}
    assert 0.1 < wire.waited[1] <= time.perf_counter() - started


def test_a_peer_that_hangs_up_is_told_of_at_once(pair: tuple[Sockets, socket.socket]) -> None:
    wire, there = pair
    threading.Timer(0.2, there.close).start()
    wire.post({}, {1: inbox()})
    start = time.monotonic()
    with pytest.raises(PeerError, match="hung up") as error:
        wire.wait()
    assert error.value.peer == 1
    assert time.monotonic() - start < TIMEOUT
    with pytest.raises(PeerError, match="Broken pipe"):
        wire.post({1: frame()}, {})


def test_a_peer_that_hangs_up_is_told_of_while_another_is_waited_for() -> None:
    (a, _silent), (b, there) = socket.socketpair(), socket.socketpair()
    wire = Sockets({1: a, 2: b}, TIMEOUT)
    wire.post({}, {1: inbox(), 2: inbox()})
    there.send(b"half a message")
    threading.Timer(0.2, there.close).start()
    with pytest.raises(PeerError, match="hung up") as error:
        wire.wait()
    assert error.value.peer == 2


def test_what_a_peer_sent_before_it_hung_up_is_received(
    pair: tuple[Sockets, socket.socket],
) -> None:
    wire, there = pair
    there.sendall(frame(number=3.0).view)
    there.close()
    received = inbox()
    wire.post({}, {1: received})
    wire.wait()
    assert received.ended
    assert (received.numbers == 3).all()


@pytest.mark.parametrize("sends", [0, 40, STAMP + 12])
def test_a_peer_that_stops_is_given_up_after_the_timeout(
    pair: tuple[Sockets, socket.socket], sends: int
) -> None:
    wire, there = pair
    there.sendall(frame().view[:sends])
    wire.post({}, {1: inbox()})
    start = time.monotonic()
    with pytest.raises(PeerError, match="no news within 2 s") as error:
        wire.wait()
    assert error.value.peer == 1
    assert TIMEOUT - 0.1 < time.monotonic() - start < 2 * TIMEOUT


def test_a_peer_that_takes_nothing_is_given_up_after_the_timeout(
    pair: tuple[Sockets, socket.socket],
) -> None:
    wire, _there = pair
    wire.post({1: frame(10**6)}, {})
    with pytest.raises(PeerError, match="no news"):
        wire.wait()


def test_a_message_that_begins_otherwise_is_not_read_on(
    pair: tuple[Sockets, socket.socket],
) -> None:
    wire, there = pair
    there.sendall(frame(time="then").view[: STAMP + 4])
    received = inbox(10**6)
    wire.post({}, {1: received})
    wire.wait()
    assert not received.begun


def test_a_message_with_more_numbers_does_not_end_as_expected(
    pair: tuple[Sockets, socket.socket],
) -> None:
    wire, there = pair
    there.sendall(frame(7).view)
    received = inbox(6)
    wire.post({}, {1: received})
    wire.wait()
    assert received.begun
    assert not received.ended


# --- who meets whom -------------------------------------------------------------------------------

ALL = {rank: {0, 1, 2} - {rank} for rank in range(3)}


def meet(store: dist.Store, peers: dict[int, set[int]] = ALL) -> list[dict[int, socket.socket]]:
    calls = [lambda r=r: connect(store, "x", r, peers[r], TIMEOUT) for r in peers]  # type: ignore[misc]
    found: list[dict[int, socket.socket]] = []
    for result in together(calls):
        assert isinstance(result, dict), result
        found.append(result)
    return found


def hang_up(found: Sequence[dict[int, socket.socket]]) -> None:
    for sockets in found:
        for each in sockets.values():
            each.close()


@pytest.mark.parametrize("peers", [ALL, {0: {1}, 1: {0, 2}, 2: {1}}, {0: set(), 1: {2}, 2: {1}}])
def test_processes_of_one_machine_meet_and_leave_nothing_behind(peers: dict[int, set[int]]) -> None:
    gc.collect()
    before = psutil.Process().num_fds()
    found = meet(dist.HashStore(), peers)
    assert [set(sockets) for sockets in found] == [*peers.values()]
    for rank, sockets in enumerate(found):
        for peer, end in sockets.items():
            end.sendall(bytes([10 * rank + peer]))
    for rank, sockets in enumerate(found):
        assert {p: end.recv(2)[0] for p, end in sockets.items()} == {
            p: 10 * p + rank for p in peers[rank]
        }
    assert psutil.Process().num_fds() == before + sum(map(len, peers.values()))
    hang_up(found)


def test_who_listens_elsewhere_is_left_to_the_other_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of another machine, or of a container with its own network, leads nowhere here."""
    call = wires._call

    def calls(name: str, hello: bytes, timeout: float) -> socket.socket | None:
        _, rank = wires.HELLO.unpack(hello)
        return call(f"{name}-elsewhere" if rank == 0 else name, hello, timeout)

    monkeypatch.setattr(wires, "_call", calls)
    found = meet(dist.HashStore())
    assert [set(sockets) for sockets in found] == [set(), {2}, {1}]
    hang_up(found)


def test_another_users_process_is_left_to_the_other_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert meet(dist.HashStore()) == [{}, {}, {}]


SECRET = "s" * 32


@pytest.mark.parametrize(
    ("hello", "of_this_user", "rank"),
    [
        (wires.HELLO.pack(SECRET.encode(), 7), True, 7),
        (wires.HELLO.pack(b"guess" * 6, 7), True, None),
        (b"hello", True, None),
        pytest.param(
            wires.HELLO.pack(SECRET.encode(), 7),
            False,
            None,
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user"),
        ),
    ],
)
def test_who_calls_is_of_this_user_and_knows_the_secret(
    hello: bytes, of_this_user: bool, rank: int | None
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        name = wires._listen(listener, TIMEOUT)
        if not (child := os.fork()):
            if not of_this_user:
                os.setuid(65534)
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(f"\0{name}")
            caller.sendall(hello)
            os._exit(0)
        os.waitpid(child, 0)
        answering, _ = listener.accept()
        with answering:
            assert wires._answer(answering, SECRET, TIMEOUT) == rank


def test_a_stranger_does_not_keep_others_from_meeting() -> None:
    store = dist.HashStore()
    strangers: list[socket.socket] = []

    def early(rank: int) -> dict[int, socket.socket]:
        store.wait(["x 1"])
        _, name = store.get("x 1").decode().split(" ")
        for hello in b"hello", wires.HELLO.pack(b"guess" * 6, 0), b"":
            strangers.append(caller := socket.socket(socket.AF_UNIX))
            caller.connect(f"\0{name}")
            caller.sendall(hello)
            caller.shutdown(socket.SHUT_WR)
        return connect(store, "x", rank, [1], TIMEOUT)

    found = together([lambda: early(0), lambda: connect(store, "x", 1, [0], TIMEOUT)])
    assert [set(f) for f in found] == [{1}, {0}]  # type: ignore[call-overload]
    hang_up(found)  # type: ignore[arg-type]
    for each in strangers:
        each.close()


def test_a_peer_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    for rank, peer in (0, 1), (1, 0):
        with pytest.raises(PeerError) as error:
            connect(store, f"meeting of {rank}", rank, [peer], 0.2)
        assert error.value.peer == peer
