"""CUDA graphs, and without a GPU what can be known of them and of other devices.

In a process of its own a device is made up, on which nothing is computed but everything checked: to
mix its tensors with others, or to wait for it, is an error, as it is in the recording of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hdnn_dist import node
from hdnn_dist.agent import Agent
from hdnn_dist.architecture import Architecture
from hdnn_dist.capture import Captured, cuda_graph
from hdnn_dist.job import Job
from hdnn_dist.transport import InProcess
from hdnn_dist.worker import Worker
from tests.strategies import in_process

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
