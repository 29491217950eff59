"""How frames travel from process to process: by torch.distributed, and on one machine by sockets.

A wire is given, for each peer, a frame to send and a frame to receive in, and returns when all have
gone and come. It knows nothing of rounds and agents; `hdnn_dist.transport` says what is in a frame
and looks at what came.
"""

from __future__ import annotations

import contextlib
import datetime
import hmac
import math
import os
import secrets
import select
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

STAMP = 128  # bytes before and after the numbers of a frame; keeps them aligned
# Bytes by which a message may be too long before gloo ends the process that gets it.
SPARE = 1 << 20
BUFFER = 1 << 20  # bytes that a socket holds, as far as the kernel allows: a frame, as a rule
HELLO = struct.Struct("=32sI")  # the secret of who is called, and the rank of the caller


class Frame:
    """Memory for what goes from one process to another in a round: `stamp | numbers | stamp`.

    Args:
        label: what the stamp says of it, whenever it is used.
        shape, dtype: of the numbers.
        guard: what is put where the end of a message is to come, and behind it.
        spare: bytes of room behind the end.
    """

    def __init__(
        self,
        label: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        guard: bytes = b"",
        spare: int = 0,
    ) -> None:
        self.label, self.guard, self.stamp = label, guard, b""
        self.stop = STAMP + math.prod(shape) * dtype.itemsize
        self.bytes = torch.empty(self.stop + STAMP + spare, dtype=torch.uint8)
        self.numbers = self.bytes[STAMP : self.stop].view(dtype).view(shape)
        self.view = self.bytes.numpy().data

    def expect(self, this_time: str) -> None:
        """Make ready to receive a message that says so."""
        self.stamp = f"{this_time} {self.label}".encode().ljust(STAMP)[:STAMP]
        self.view[self.stop : self.stop + len(self.guard)] = self.guard

    def seal(self, this_time: str) -> None:
        """Say so at both ends of a message to send."""
        self.expect(this_time)
        self.view[:STAMP] = self.view[self.stop : self.stop + STAMP] = self.stamp

    @property
    def begun(self) -> bool:
        """Whether what came begins as expected."""
        return self.view[:STAMP] == self.stamp

    @property
    def ended(self) -> bool:
        """Whether it ends as expected, and there."""
        end = self.stamp + self.guard[STAMP:]
        return self.view[self.stop : self.stop + len(end)] == end


class PeerError(Exception):
    """What was to go to another process, or to come from it, did not."""

    def __init__(self, peer: int, problem: str) -> None:
        super().__init__(peer, problem)
        self.peer, self.problem = peer, problem


class Wire(Protocol):
    """Carries frames between this process and others, which it tells by their rank.

    Attributes:
        waited: seconds so far in which it slept until a peer had sent or taken something, by peer.
    """

    waited: dict[int, float]

    def inbox(self, label: str, shape: Sequence[int], dtype: torch.dtype) -> Frame:
        """A frame to receive in."""
        ...

    def post(self, outbound: Mapping[int, Frame], inbound: Mapping[int, Frame]) -> None:
        """Begin to send and to receive frames by peer, without waiting for any.

        Raises:
            PeerError: a peer is gone.
        """
        ...

    def wait(self) -> None:
        """Return when all that was posted has gone and come.

        Raises:
            PeerError: a peer is gone or did not answer in time.
        """
        ...


class Gloo:
    """The default torch.distributed group.

    gloo tells nobody how long a message was, leaves the rest of a buffer as it was if one is
    short, and ends the process if one is longer than the buffer. So a frame to receive in has
    room to spare, and is filled with what no peer can guess where its end is to come.
    """

    def __init__(self) -> None:
        self.waited: dict[int, float] = defaultdict(float)
        self._guard = secrets.token_bytes(2 * STAMP)
        self._pending: list[tuple[int, dist.Work | None]] = []

    def inbox(self, label: str, shape: Sequence[int], dtype: torch.dtype) -> Frame:
        """See `Wire`; so too below."""
        return Frame(label, shape, dtype, self._guard, SPARE)

    def post(self, outbound: Mapping[int, Frame], inbound: Mapping[int, Frame]) -> None:  # noqa: D102
        self._pending = []
        try:
            for rank, frame in inbound.items():
                peer = rank
                self._pending.append((peer, dist.irecv(frame.bytes, peer)))
            for rank, frame in outbound.items():
                peer = rank
                self._pending.append((peer, dist.isend(frame.bytes, peer)))
        except RuntimeError as error:
            raise PeerError(peer, str(error).splitlines()[0]) from error

    def wait(self) -> None:  # noqa: D102
        for peer, work in self._pending:
            if work is None:
                continue
            started = time.perf_counter()
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerError(peer, str(error).splitlines()[0]) from error
            self.waited[peer] += time.perf_counter() - started


class Sockets:
    """Stream sockets to processes of the same machine (see `connect`).

    Args:
        peers: a socket by rank.
        timeout: seconds without news of a peer after which it is given up.
    """

    def __init__(self, peers: Mapping[int, socket.socket], timeout: float) -> None:
        self.peers, self.timeout = dict(peers), timeout
        self.waited: dict[int, float] = defaultdict(float)
        self._out: dict[int, memoryview] = {}  # what is still to go
        self._in: dict[int, tuple[Frame, int]] = {}  # what is still to come, and how much has
        for peer in peers.values():
            peer.setblocking(False)

    def inbox(self, label: str, shape: Sequence[int], dtype: torch.dtype) -> Frame:
        """See `Wire`; so too below."""
        return Frame(label, shape, dtype)

    def post(self, outbound: Mapping[int, Frame], inbound: Mapping[int, Frame]) -> None:  # noqa: D102
        self._out = {rank: frame.view for rank, frame in outbound.items()}
        self._in = {rank: (frame, 0) for rank, frame in inbound.items()}
        self._send()

    def wait(self) -> None:  # noqa: D102
        while True:
            self._receive()
            if self._out:
                self._send()
            if not self._out and not self._in:
                return
            self._sleep()

    def close(self) -> None:
        """Hang up: peers that wait for anything learn of it at once."""
        for peer in self.peers.values():
            peer.close()

    def _sleep(self) -> None:
        """Until something can be done.

        Of several messages the first is waited for: most often the others have come by then, where
        each would have woken this process. That one hangs up is always told.
        """
        first = next(iter(self._in), None)
        poll = select.poll()
        for rank in self._out.keys() | self._in.keys():
            events = select.POLLOUT if rank in self._out else 0
            poll.register(self.peers[rank], events | (select.POLLIN if rank == first else 0))
        awaited = next(iter(self._out)) if first is None else first
        started = time.perf_counter()
        if not poll.poll(self.timeout * 1e3):
            raise PeerError(awaited, f"no news within {self.timeout:g} s")
        self.waited[awaited] += time.perf_counter() - started

    def _send(self) -> None:
        """What the sockets take now."""
        for rank, left in [*self._out.items()]:
            try:
                left = left[self.peers[rank].send(left) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise PeerError(rank, str(error)) from error
            if left:
                self._out[rank] = left
            else:
                del self._out[rank]

    def _receive(self) -> None:
        """What has come by now. A message that does not begin as expected is not read on."""
        for rank, (frame, filled) in [*self._in.items()]:
            try:
                came = self.peers[rank].recv_into(frame.view[filled:])
            except BlockingIOError:
                continue
            except OSError as error:
                raise PeerError(rank, str(error)) from error
            if not came:
                raise PeerError(rank, "it has hung up")
            filled += came
            if filled == len(frame.view) or (filled >= STAMP and not frame.begun):
                del self._in[rank]
            else:
                self._in[rank] = frame, filled


def connect(
    store: dist.Store, meeting: str, rank: int, peers: Iterable[int], timeout: float
) -> dict[int, socket.socket]:
    """Sockets to those of some peers that run on the same machine; all peers call this at once.

    Who listens does so at a random name in Linux's abstract name space, which is gone with the
    socket, and reaches as far as the network of the machine or the container: that a call gets
    through is the proof of being on one machine. The lower rank calls. Each asks the kernel whether
    the other runs as the same user, and who is called asks for the secret that it put in the store.

    Args:
        store: through which the processes of the group tell one another names and secrets.
        meeting: a name that no other meeting has, the same in all processes.
        rank: of this process.
        peers: ranks of those that it has messages for or from.
        timeout: seconds that a peer may take.

    Raises:
        PeerError: a peer did not come in time.
    """
    secret, sockets = secrets.token_hex(16), dict[int, socket.socket]()
    peer = rank

    def told(key: str) -> str:
        store.wait([key], datetime.timedelta(seconds=timeout))
        return store.get(key).decode()

    with socket.socket(socket.AF_UNIX) as listener:
        try:
            store.set(f"{meeting} {rank}", f"{secret} {_listen(listener, timeout)}")
            for peer in sorted(p for p in peers if p > rank):
                theirs, name = told(f"{meeting} {peer}").split(" ")
                called = _call(name, HELLO.pack(theirs.encode(), rank), timeout)
                if called is not None:
                    sockets[peer] = called
                store.set(f"{meeting} {rank} {peer}", "" if called is None else "called")
            callers = set()
            for peer in sorted(p for p in peers if p < rank):
                if told(f"{meeting} {peer} {rank}"):
                    callers.add(peer)
            while callers:
                peer = min(callers)
                caller, _ = listener.accept()
                who = _answer(caller, secret, timeout)
                if who in callers:
                    sockets[who] = caller
                    callers.remove(who)
                else:
                    caller.close()
        except (OSError, RuntimeError) as error:
            for each in sockets.values():
                each.close()
            raise PeerError(peer, str(error).splitlines()[0]) from error
    return sockets


def _listen(listener: socket.socket, timeout: float) -> str:
    """The name that is listened at; none where there are no such names."""
    name = f"hdnn_dist-{secrets.token_hex(16)}"
    try:
        listener.bind(f"\0{name}")
    except OSError:
        return ""
    listener.listen()
    listener.settimeout(timeout)
    return name


def _call(name: str, hello: bytes, timeout: float) -> socket.socket | None:
    """A socket to who listens at a name; None if nobody here does."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(timeout)
    with contextlib.suppress(OSError):  # it is elsewhere
        peer.connect(f"\0{name}")
        if _is_of_this_user(peer):
            peer.sendall(hello)
            return _with_room(peer)
    peer.close()
    return None


def _answer(caller: socket.socket, secret: str, timeout: float) -> int | None:
    """The rank of who calls; None if it is a stranger."""
    caller.settimeout(timeout)
    if not _is_of_this_user(caller):
        return None
    hello = caller.recv(HELLO.size, socket.MSG_WAITALL)
    if len(hello) < HELLO.size:
        return None
    shown, rank = HELLO.unpack(hello)
    _with_room(caller)
    return rank if hmac.compare_digest(shown, secret.encode()) else None


def _is_of_this_user(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return int(user) == os.getuid()


def _with_room(peer: socket.socket) -> socket.socket:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return peer
