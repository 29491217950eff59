"""CUDA graphs, and without a GPU what can be known of them and of other devices.

In a process of its own a device is made up, on which nothing is computed but everything checked: to
mix its tensors with others, or to wait for it, is an error, as it is in the recording of a graph.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hdnn_dist import node
from hdnn_dist.agent import Agent
from hdnn_dist.architecture import Architecture
from hdnn_dist.capture import Captured, _Streams, cuda_graph
from hdnn_dist.exchange import Round
from hdnn_dist.job import Job
from hdnn_dist.node import Exchange
from hdnn_dist.transport import InProcess, Mail, drive
from hdnn_dist.worker import Worker, agreement_of
from tests.strategies import in_process

CPU = torch.device("cpu")
SETTINGS = (
    *("model.layers=2", "topology.d=2", "training.dtype=float64", "training.batch_size=16"),
    *("training.shift=1", "training.clip_norm=0.5", "data.train_samples=100"),
)


def worker(device: torch.device, *settings: str, job: Job | None = None) -> Worker:
    job = job or Job.load(None, [*SETTINGS, *settings])
    of = Worker(job, range(8), in_process(job), device=device)
    of._may_capture = False
    return of


def captured(of: Worker) -> Captured:
    transport = of.transport
    assert isinstance(transport, InProcess)

    def again(action: Callable[[], None]) -> Callable[[], None]:
        """In place of a graph: the same operations on the same memory, past the transport."""

        def replay() -> None:
            before = transport.sent
            action()
            transport.count({link: before[link] - n for link, n in transport.sent.items()})

        return replay

    device = next(iter(of.agents.values())).device
    with torch.no_grad():
        return Captured(
            of.agents,
            transport,
            of.job.plan.differentiation,
            step=7,
            record=cuda_graph if device.type == "cuda" else again,
        )


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_recorded_steps_are_those_taken_one_by_one(device: torch.device, activations: str) -> None:
    setting = f"training.activations={activations}"
    one, at_once = worker(device, setting), worker(device, setting)
    at_once._captured = captured(at_once)
    assert at_once.train(5) == one.train(5)
    assert at_once.transport.sent == one.transport.sent
    assert torch.equal(at_once.gradient_squares(), one.gradient_squares())
    for mine, theirs in zip(at_once.agents.values(), one.agents.values(), strict=True):
        for key, value in theirs.state().items():
            assert torch.equal(mine.state()[key], value), f"{mine.name}: {key}"


def test_the_next_batch_is_drawn_once_and_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    of, draw, drawn = worker(CPU), Agent.draw, Counter[int]()

    def counted(agent: Agent, step: int) -> list[torch.Tensor]:
        drawn[step] += 1
        return draw(agent, step)

    monkeypatch.setattr(Agent, "draw", counted)
    of._captured = captured(of)  # with the batch of step 7
    of.train(3)
    assert drawn == dict.fromkeys([0, 1, 2, 3, 7], 8)


def test_a_state_that_is_not_finite_is_found_all_the_same(device: torch.device) -> None:
    """And steps after it are taken as if nothing had happened."""
    settings = "training.on_nonfinite=skip", "model.activation=relu", "training.dtype=float32"
    one, at_once = worker(device, *settings), worker(device, *settings)
    at_once._captured = captured(at_once)
    for of in one, at_once:
        weight = of.agents[2].node.weights["Kp"]
        good = weight.clone()
        weight[1] = 1e30
        of.train(1)
        assert min(of.faults()).what == "the state y_2"
        weight.copy_(good)
    assert at_once.train(2) == one.train(2)
    assert at_once.transport.sent == one.transport.sent
    assert not at_once.faults()


def test_what_cannot_be_recorded_is_taken_one_by_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("it waits for the device")

    monkeypatch.setattr("hdnn_dist.worker.Captured", refuse)
    one, at_once = worker(device), worker(device)
    at_once._may_capture = True
    assert at_once.train(2) == one.train(2)
    assert caplog.text.count("not recorded as a CUDA graph: it waits for the device") == 1


# --- streams that are made up ---------------------------------------------------------------------


class Stream:
    """Computes nothing, but knows how much of each stream has surely been done before what is next.

    Attributes:
        before: by stream, how many pieces of work; of itself, how many it has been given.
    """

    current: ClassVar[Stream]

    def __init__(self) -> None:
        self.before: Counter[Stream] = Counter()

    def record_event(self) -> Counter[Stream]:
        return self.before.copy()

    def wait_event(self, event: Counter[Stream]) -> None:
        self.before |= event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def work(self) -> None:
        self.before[self] += 1

    def follows(self, done: tuple[Stream, int]) -> bool:
        stream, count = done
        return self.before[stream] >= count


class Uses:
    """Sees that messages are read when they are there, and their memory free when they are read."""

    def __init__(self) -> None:
        self.written: dict[int, tuple[Stream, int]] = {}  # by message
        self.reads: dict[int, list[tuple[Stream, int]]] = {}
        self.early: list[str] = []  # which must not be
        self.freed = 0

    def _now(self) -> tuple[Stream, int]:
        return Stream.current, Stream.current.before[Stream.current]

    def write(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self.written:
                self.written[id(tensor)], self.reads[id(tensor)] = self._now(), []
                weakref.finalize(tensor, self._free, id(tensor))

    def read(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self.reads[id(tensor)].append(self._now())
            if not Stream.current.follows(self.written[id(tensor)]):
                self.early.append("read before it was there")

    def _free(self, key: int) -> None:
        self.freed += 1
        maker, reads = self.written.pop(key)[0], self.reads.pop(key)
        if not all(maker.follows(done) for done in reads):
            self.early.append("free before it was read")

    def of(self, action: Exchange[None]) -> Exchange[None]:
        inbox: dict[int, torch.Tensor] = {}
        request = next(action)
        while True:
            Stream.current.work()
            self.read(inbox.values())
            self.write(request[1].values())
            inbox = yield request
            try:
                request = action.send(inbox)
            except StopIteration:
                Stream.current.work()
                self.read(inbox.values())
                return


@pytest.mark.parametrize("messages", ["full", "bf16"])
@pytest.mark.parametrize("more", [(), ("model.graph=both", "model.train_J=true")])
@pytest.mark.parametrize("fault", [None, "wait_event", "_held"])
def test_streams_wait_for_messages_and_memory_for_those_who_read_them(
    monkeypatch: pytest.MonkeyPatch, messages: str, more: tuple[str, ...], fault: str | None
) -> None:
    uses, of = Uses(), worker(CPU, f"training.messages={messages}", *more)

    class Watched(InProcess):
        def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
            if self.is_rounded(phase):
                Stream.current.work()
                uses.read(mail.values())
            arrived = super().exchange(phase, mail, batch)
            uses.write(arrived.values())
            return arrived

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    Stream.current = everyone = Stream()
    monkeypatch.setattr("torch.cuda.current_stream", lambda: Stream.current)
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", on)
    if fault == "wait_event":
        monkeypatch.setattr(Stream, "wait_event", lambda *_: None)
    elif fault == "_held":
        nothing = property(lambda _: {}, lambda *_: None)
        monkeypatch.setattr(_Streams, "_held", nothing, raising=False)
    with torch.no_grad():
        actions = {i: a.propagate(*a.draw(0)) for i, a in of.agents.items()}
        streams = _Streams(
            Watched(agreement_of(of.job)), {i: uses.of(action) for i, action in actions.items()}
        )
        drive(streams.actions, streams, 16, of.job.plan.differentiation)
        streams.join()
    assert uses.freed > 100
    assert (
        sorted(set(uses.early))
        == {
            None: [],
            "wait_event": ["free before it was read", "read before it was there"],
            "_held": ["free before it was read"],
        }[fault]
    )
    if fault is None:
        assert all(everyone.follows((s, s.before[s])) for s in streams._own.values())


# --- a device that is made up --------------------------------------------------------------------

CASES = (
    (),
    ("model.layer_graphs=[topology, none]",),
    ("training.activations=recompute",),
    ("model.graph=both", "model.train_J=true"),
    ("model.name=H1", "model.J=J1"),
    ("model.name=MS1",),
    ("model.name=MS2",),
    ("model.name=MS3", "model.activation=leaky_relu"),
    ("model.readout={agents: [a1, a3], root: a3}", "model.activation=elu"),
)


class Together(TorchDispatchMode):
    """No operation has tensors of two devices, be it to copy one to the other or as an index."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        given = devices(args, kwargs)
        assert len(given) <= 1, func
        assert not given or devices(result) <= given, func  # a copy has but one argument
        return result


def devices(*values: object) -> set[torch.device]:
    return {leaf.device for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def pretend(_: int) -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretended")
    device, mode = torch.device("pretended", 0), FakeTensorMode()

    def really(function: Callable[..., object]) -> Callable[..., object]:
        def outside(*arguments: object) -> object:
            with unset_fake_temporarily():
                result = function(*arguments)
            return tree_map_only(torch.Tensor, mode.from_tensor, result)

        return outside

    def drawn(agent: Agent, step: int) -> list[torch.Tensor]:
        x = torch.empty(len(agent.view.columns), 16, dtype=torch.float64, device=device)
        labels = torch.empty(16, dtype=torch.int64, device=device)
        return [x, labels] if agent.is_root else [x]

    # What depends on numbers is done before anything is moved to a device.
    node._kept = really(node._kept)  # type: ignore[assignment]
    Architecture.initial = really(Architecture.initial)  # type: ignore[method-assign, assignment]
    Agent.draw = drawn  # type: ignore[method-assign]
    for settings in CASES:
        job = Job.load(None, [*SETTINGS, *settings])
        with mode:
            of = worker(device, job=job)
            with Together():
                captured(of)
            for agent in of.agents.values():
                tensors = [*agent.weights.values(), *agent.summands, agent.node.finite()]
                assert {tensor.device for tensor in tensors} == {device}


def test_nothing_waits_for_a_device_and_all_of_a_step_is_on_it() -> None:
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot make up a device")
    spawn(pretend, nprocs=1)
