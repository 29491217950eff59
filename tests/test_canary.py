"""Raw inputs, labels, weights, gradients and optimiser states never leave their agent.

They are made recognisable, and everything that a run sends is searched for them, bit by bit.
"""

from __future__ import annotations

import pickle
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from hdnn_dist.actor import AgentActor
from hdnn_dist.cluster import RayRunner
from hdnn_dist.data import epoch_order
from hdnn_dist.exchange import Round
from hdnn_dist.job import Job
from hdnn_dist.trainer import LocalRunner
from hdnn_dist.transport import InProcess, Mail
from hdnn_dist.worker import Worker
from tests.strategies import in_process, numbers

# Workers cannot import a test module: its classes travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

Secrets = dict[str, list[np.ndarray]]
KINDS = ("inputs", "labels", "weights", "optimizer", "gradients")
DTYPES = ["float64", "float32"]


DISTORT = "training.distort={rotate: 20, scale: 0.2, shift: 1, elastic: 1}"


def a_job(dtype: str, encoder: str = "linear", *overrides: str) -> Job:
    return Job.load(
        None,
        [
            *overrides,
            *("topology.agents=4", "topology.edges.args.n=4", "topology.d=16", "model.layers=2"),
            *("training.batch_size=32", "training.clip_norm=1.0", f"training.dtype={dtype}"),
            *(f"model.encoder={encoder}", "cluster.timeout=30", "cluster.agents_per_actor=1"),
        ],
    )


def with_targets(dtype: str) -> Job:
    """Each agent has targets of its own to read out."""
    own = {f"a{k + 1}": [f"y{k}"] for k in range(4)}
    training = {"batch_size": 10, "clip_norm": 1.0, "dtype": dtype}
    ring = {"generator": "cycle_graph", "args": {"n": 4}}
    return Job.load(
        {
            "topology": {"agents": 4, "d": 16, "edges": ring},
            "model": {"layers": 2},
            "data": numbers() | {"targets": own},
            "training": training,
        }
    )


def plant(worker: Worker) -> None:
    """Give every feature one number for all samples, so that its copies are sent side by side."""
    for i, agent in worker.agents.items():
        random = torch.Generator().manual_seed(1000 + i)
        for part in "train", "test":
            x = agent.features(part)
            x.copy_(torch.rand(x.shape[1], generator=random, dtype=torch.float64).expand_as(x))


def secrets(worker: Worker) -> Secrets:
    """What must not leave the agents here, as it is now."""
    job = worker.job
    found: Secrets = {kind: [] for kind in KINDS}
    order = epoch_order(job.spec.training.seed, 0, job.data.train)
    for agent in worker.agents.values():
        found["inputs"] += [agent.features(part)[:8].numpy() for part in ("train", "test")]
        if job.spec.training.distort is not None:
            index = agent._batch(worker.step)
            found["inputs"].append(agent._inputs(worker.step, index).numpy())
        found["gradients"] += [g.numpy() for g in agent.node.gradients.values()]
        for name, value in agent.state().items():
            if value.dim():  # a counter is no secret
                found[name.split("/")[0]].append(value.numpy())
        if agent.finishes:
            labels = agent.labels("train").numpy()
            found["labels"] += [labels, labels[order], agent.labels("test").numpy()]
    return {kind: [np.array(array) for array in arrays] for kind, arrays in found.items()}


def together(moments: Sequence[Secrets]) -> Secrets:
    return {kind: [array for moment in moments for array in moment[kind]] for kind in KINDS}


def leaks(kind: str, arrays: Sequence[np.ndarray], sent: Iterable[bytes]) -> int:
    """How many pieces of secrets were sent.

    A piece is one number of 64 bits, or four of 32 bits in a row along any axis: that one of some
    10⁵ pieces is among some 10⁶ numbers sent by chance has odds below 10⁻⁴, and the seeds are
    fixed. Labels are few, so that a piece is 16 in a row; they are searched for in every type.
    """
    stream = b"".join(blob + bytes(-len(blob) % 8) for blob in sent)
    if kind == "labels" and arrays[0].dtype == np.int64:
        types = (np.uint8, np.int32, np.int64, np.float32, np.float64)
        return sum(hits([a.astype(t) for a in arrays], stream, 16) for t in types)
    return hits(arrays, stream, 1 if arrays[0].itemsize == 8 else 4)


def hits(arrays: Sequence[np.ndarray], stream: bytes, length: int) -> int:
    """How many pieces of arrays of one type, along any axis, are in a stream of such numbers."""
    bits = np.dtype(f"u{arrays[0].itemsize}")
    mine = []
    for array in arrays:
        for axis in range(array.ndim):
            rows = np.ascontiguousarray(np.moveaxis(array, axis, -1))
            if rows.shape[-1] < length:
                continue
            # Zeros and ones alone say nothing: X is the identity, and much is zero at first.
            telling = np.lib.stride_tricks.sliding_window_view(~np.isin(rows, (0, 1)), length, -1)
            mine.append(pieces(rows.view(bits), length)[telling.any(-1)])
    theirs = pieces(np.frombuffer(stream, bits), length)
    return int(np.isin(theirs, np.unique(np.concatenate(mine))).sum())


def pieces(rows: np.ndarray, length: int) -> np.ndarray:
    """A number of 64 bits for each run of some length: the same for the same run."""
    factors = np.random.default_rng(0).integers(0, 2**63, length, np.uint64) * np.uint64(2) + 1
    runs = np.lib.stride_tricks.sliding_window_view(rows, length, -1)
    total = np.zeros(runs.shape[:-1], np.uint64)
    for k, factor in enumerate(factors):
        total += runs[..., k].astype(np.uint64) * factor
    return total


class Recorder(InProcess):
    """Keeps a copy of all that is sent."""

    def exchange(self, phase: Round, mail: Mail, batch: int) -> Mail:
        self.heard.extend(tensor.numpy().tobytes() for tensor in mail.values())
        return super().exchange(phase, mail, batch)

    heard: list[bytes]


@cache
def listen_in(encoder: str, dtype: str, *overrides: str) -> tuple[Secrets, list[bytes]]:
    """A run in one process: its secrets before and after each step, and all that it sent."""
    return overheard(a_job(dtype, encoder, *overrides))


def overheard(job: Job) -> tuple[Secrets, list[bytes]]:
    worker = LocalRunner(job).worker
    recorder = worker.transport = in_process(job, Recorder)
    recorder.heard = []
    plant(worker)
    known = [secrets(worker)]
    for _ in range(2):
        worker.train(1)
        known.append(secrets(worker))
    worker.evaluate()
    return together(known), recorder.heard


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_secret_is_in_what_agents_send(dtype: str) -> None:
    known, sent = listen_in("linear", dtype)
    assert sum(map(len, sent)) > 10**5
    for kind in KINDS:
        assert leaks(kind, known[kind], sent) == 0, kind


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_that_agents_read_out_by_themselves_are_not_sent(dtype: str) -> None:
    known, sent = overheard(with_targets(dtype))
    assert sum(map(len, sent)) > 10**4
    for kind in KINDS:
        assert leaks(kind, known[kind], sent) == 0, kind
    for leak in known["labels"][0], known["labels"][0].T:
        assert leaks("labels", known["labels"], [*sent, leak.tobytes()]) > 0


def test_distorted_inputs_are_not_sent_either() -> None:
    known, sent = listen_in("linear", "float64", DISTORT)
    assert leaks("inputs", known["inputs"], sent) == 0
    distorted = known["inputs"][-1]
    assert leaks("inputs", known["inputs"], [*sent, distorted[:, :4].tobytes()]) > 0
    betrayed, sent = listen_in("pad", "float64", DISTORT)
    assert leaks("inputs", [betrayed["inputs"][2]], sent) > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_that_is_sent_is_found(kind: str, dtype: str) -> None:
    """Be it a single array among all messages, as it lies or transposed."""
    known, sent = listen_in("linear", dtype)
    array = next(a for a in reversed(known[kind]) if (a != 0).any() and max(a.shape) >= 4)
    for leak in array, array.T:
        assert leaks(kind, known[kind], [*sent, leak.tobytes()]) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_encoder_pad_sends_raw_inputs_and_nothing_else(dtype: str) -> None:
    """SECURITY.md says so; and the search is one that can find."""
    known, sent = listen_in("pad", dtype)
    assert leaks("inputs", known["inputs"], sent) > 1000
    for kind in KINDS[1:]:
        assert leaks(kind, known[kind], sent) == 0, kind


class Spy(AgentActor):
    """An actor that keeps a copy of all that it gives to torch.distributed and to any socket."""

    def plant(self) -> None:
        self.heard: list[bytes] = []
        plant(self.worker)
        for name in "isend", "send", "broadcast", "all_reduce", "reduce", "all_gather":
            setattr(dist, name, self.recorded(getattr(dist, name)))
        for name in "send", "sendall", "sendmsg", "sendto":
            setattr(socket.socket, name, self.recorded(getattr(socket.socket, name)))

    def recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def listening(*arguments: Any, **named: Any) -> Any:
            given = [
                a.numpy() if isinstance(a, Tensor) else a for a in (*arguments, *named.values())
            ]
            self.heard += [
                bytes(a) for a in given if isinstance(a, np.ndarray | memoryview | bytes)
            ]
            return function(*arguments, **named)

        return listening

    def secrets(self) -> Secrets:
        return secrets(self.worker)

    def recording(self) -> list[bytes]:
        return self.heard


class Listening(RayRunner):
    """Keeps what actors answer, as it travels through Ray."""

    answers: list[bytes]

    def _ask(self, calls: Sequence[tuple[int, str, tuple[Any, ...]]]) -> list[Any]:
        answers = super()._ask(calls)
        self.answers = [*getattr(self, "answers", []), pickle.dumps(answers)]
        return answers


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("encoder", "dtype", "wire"), [("linear", "float64", "auto"), ("pad", "float32", "gloo")]
)
def test_no_secret_is_in_what_actors_send_or_answer(
    encoder: str, dtype: str, wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hdnn_dist.cluster.AgentActor", Spy)
    runner = Listening(a_job(dtype, encoder, f"cluster.wire={wire}"))

    def asked(method: str) -> list[Any]:  # by the test, not by the run
        return ray.get([getattr(actor, method).remote() for actor in runner._actors])

    try:
        asked("plant")
        moments = asked("secrets")
        for _ in range(2):
            runner.train(1)
            moments += asked("secrets")
        runner.evaluate()
        runner.faults()
        runner.sent()
        runner.gradient_squares()
        runner.save(tmp_path)
        sent = [blob for heard in asked("recording") for blob in heard]
    finally:
        runner.close()
    assert sum(map(len, sent)) > 10**5
    # In a pickle numbers lie anywhere.
    answers = [blob[k:] for blob in runner.answers for k in range(8)]
    for kind, arrays in together(moments).items():
        assert arrays, kind
        raw = encoder == "pad" and kind == "inputs"
        assert (leaks(kind, arrays, sent) > 0) == raw, kind
        assert leaks(kind, arrays, answers) == 0, kind
        betrayed = pickle.dumps(next(a for a in reversed(arrays) if (a != 0).any() and a.size > 16))
        assert leaks(kind, arrays, [betrayed[k:] for k in range(8)]) > 0, kind
