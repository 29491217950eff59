"""What each process of a job does in a few steps, moment by moment, as a Chrome trace.

Recorded only where it is asked for: what records stands between a worker and its agents, transport
and copies for these steps, and is gone after them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from hdnn_dist.errors import few
from hdnn_dist.exchange import Round
from hdnn_dist.node import Exchange
from hdnn_dist.replicas import Replicas
from hdnn_dist.transport import Mail, Relay, Transport

Result = TypeVar("Result")
PINGS = 8  # of which the fastest tells best how far apart two clocks are
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Slice(NamedTuple):
    """A while in which a process did one thing.

    Attributes:
        kind: "compute", for an agent; "send", which is to put messages together, hand them over and
            take them apart; or "wait", for other processes.
        what: the round for which it was; after the last, the action that ends.
        step: from 1.
        start, seconds: on this process's `time.perf_counter`.
        agent: who computed.
        peer: the rank of the process that was waited for longest; None where that is not known, and
            where all had come already and was but taken in.
    """

    kind: str
    what: str
    step: int
    start: float
    seconds: float
    agent: str | None = None
    peer: int | None = None


@dataclass(frozen=True)
class Track:
    """What an actor did.

    Attributes:
        agents: its agents.
        slices: in the order in which they ended.
        node: the machine; empty for the process that asks.
        ahead: seconds by which its clock is ahead of that of the process that asks.
        error: seconds by which `ahead` may be wrong, at most.
    """

    agents: tuple[str, ...]
    slices: tuple[Slice, ...]
    node: str = ""
    ahead: float = 0.0
    error: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all that is told."""
        return sum(each.seconds for each in self.slices)

    @property
    def busy(self) -> float:
        """Seconds in which it did not wait."""
        return sum(each.seconds for each in self.slices if each.kind != "wait")


def watched(
    action: Exchange[Result], tell: Callable[[str, float, float], None]
) -> Exchange[Result]:
    """An agent's action, each part of which is told: for what, from when on, how many seconds.

    It was for the round that the agent then asks for; the last part is for the action that ends.
    """
    inbox: dict[int, Tensor] | None = None
    while True:
        started = time.perf_counter()
        try:
            request = action.send(inbox)  # type: ignore[arg-type]
        except StopIteration as stop:
            what = getattr(action, "__name__", "end")
            tell(what, started, time.perf_counter() - started)
            result: Result = stop.value
            return result
        tell(request[0].name, started, time.perf_counter() - started)
        inbox = yield request


class Recorder:
    """Takes down what a process does.

    Attributes:
        slices: so far.
        step: the one under way.
    """

    def __init__(self) -> None:
        self.slices: list[Slice] = []
        self.step = 0

    def transport(self, inner: Transport) -> Transport:
        """A transport whose rounds are taken down."""
        return _Recorded(inner, self)

    def replicas(self, inner: Replicas) -> Replicas:
        """Copies whose sums are taken down; one alone has none."""
        return inner if inner.copies == 1 else _RecordedSums(inner, self)

    def computed(self, agent: str, what: str, started: float, seconds: float) -> None:
        """An agent was at work (see `watched`)."""
        self.slices.append(Slice("compute", what, self.step, started, seconds, agent))

    def exchanged(self, what: str, started: float, waited: float, peer: int | None = None) -> None:
        """Something was sent and received from `started` on, the last part of which was waiting."""
        sent = time.perf_counter() - started - waited
        self.slices.append(Slice("send", what, self.step, started, sent))
        if waited:
            self.slices.append(Slice("wait", what, self.step, started + sent, waited, None, peer))


class _Recorded(Relay):
    """See `Recorder.transport`."""

    def __init__(self, inner: Transport, recorder: Recorder) -> None:
        super().__init__(inner)
        self._recorder = recorder

    def post(self, phase: Round, mail: Mail, batch: int) -> None:
        started = time.perf_counter()
        super().post(phase, mail, batch)
        if mail:
            self._recorder.exchanged(phase.name, started, 0.0)

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        started, before, waited = time.perf_counter(), self.waited_for, self.waited
        arrived = super().exchange(phase, mail, batch)
        longer = {peer: s - before.get(peer, 0.0) for peer, s in self.waited_for.items()}
        slept = [peer for peer, seconds in longer.items() if seconds > 0]
        peer = max(slept, key=longer.__getitem__, default=None)
        if mail or arrived:
            self._recorder.exchanged(phase.name, started, self.waited - waited, peer)
        return arrived


class _RecordedSums(Replicas):
    """See `Recorder.replicas`."""

    def __init__(self, inner: Replicas, recorder: Recorder) -> None:
        super().__init__(inner.copy, inner.copies, inner.group, inner.device)
        self._inner, self._recorder = inner, recorder

    def add(self, summands: Sequence[Tensor]) -> None:
        started, waited = time.perf_counter(), self._inner.waited
        self._inner.add(summands)
        waited = self._inner.waited - waited
        self.waited += waited
        self._recorder.exchanged("sums over the copies", started, waited)


def clock() -> tuple[str, float]:
    """What tells this machine from others, and its `time.perf_counter`, the same for all of it."""
    try:
        machine = BOOT.read_text().strip()
    except OSError:  # not Linux
        machine = platform.node()
    return machine, time.perf_counter()


def clock_ahead(ask: Callable[[], tuple[str, float]]) -> tuple[float, float]:
    """Seconds by which another's clock is ahead of the one here, and how wrong that may be.

    Args:
        ask: returns the other's `clock`, after a while.
    """
    best = 0.0, float("inf")
    for _ in range(PINGS):
        here, before = clock()
        there, theirs = ask()
        after = time.perf_counter()
        if here == there:
            return 0.0, 0.0
        best = min(best, (theirs - (before + after) / 2, (after - before) / 2), key=lambda x: x[1])
    return best


def chrome(tracks: Sequence[Track], slow: Collection[int]) -> dict[str, Any]:
    """Tracks in the Trace Event Format that Perfetto and Chrome show, in microseconds.

    Args:
        tracks: by rank.
        slow: ranks of the actors for which the others wait.
    """
    starts = [each.start - track.ahead for track in tracks for each in track.slices]
    origin = min(starts, default=0.0)
    events: list[dict[str, Any]] = []
    for rank, track in enumerate(tracks):
        where = f" on {track.node}" if track.node else ""
        labels = ["the others wait for it"] if rank in slow else []
        labels += [f"clock ± {1e3 * track.error:.2g} ms"] if track.error else []
        about = [
            _about("process_name", rank, name=f"actor {rank}: {few(track.agents)}{where}"),
            _about("process_sort_index", rank, sort_index=rank),
            _about("process_labels", rank, labels=", ".join(labels)),
        ]
        rows = {None: 0} | {name: k for k, name in enumerate(track.agents, 1)}
        for name, row in rows.items():
            about += [
                _about("thread_name", rank, row, name="messages" if name is None else name),
                _about("thread_sort_index", rank, row, sort_index=row),
            ]
        events += about
        events += (
            _event(each, rank, rows[each.agent], each.start - track.ahead - origin)
            for each in track.slices
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _about(what: str, rank: int, row: int = 0, **args: object) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": row, "args": args}


def _event(each: Slice, rank: int, row: int, start: float) -> dict[str, Any]:
    args: dict[str, object] = {"round": each.what, "step": each.step}
    if each.agent is not None:
        args["agent"] = each.agent
    if each.peer is not None:
        args["for"] = f"actor {each.peer}"
    return {
        "name": f"{each.kind} {each.what}",
        "cat": each.kind,
        "ph": "X",
        "ts": round(1e6 * start, 3),
        "dur": round(1e6 * each.seconds, 3),
        "pid": rank,
        "tid": row,
        "args": args,
    }
