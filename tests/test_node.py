from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from torch import Tensor

from hdnn_dist.exchange import Round
from hdnn_dist.job import Job
from hdnn_dist.node import BlockRow, Exchange
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.sparsity import offsets
from hdnn_dist.testing import (
    assert_adjoint,
    assert_close,
    assert_follows_plan,
    assert_matches_dense,
)
from hdnn_dist.transport import InProcess, drive
from hdnn_dist.worker import Worker
from tests.strategies import in_process, jobs, numbers


def run(
    agents: dict[int, Exchange[Tensor]], job: Job, rounds: Iterable[Round]
) -> dict[int, Tensor]:
    return drive(agents, in_process(job), 2, rounds)


@given(jobs())
def test_scatter_is_the_adjoint_of_gather(job: Job) -> None:
    """Both as one linear map on the stacked vectors of all agents."""
    patterns, sizes = job.architecture.patterns, job.architecture.patterns.sizes
    for pattern in {*patterns.T, patterns.R}:
        phase = Round.along("states", pattern, sizes)
        there, back = ([r] if r.messages else [] for r in (phase, phase.adjoint))
        rows = {i: BlockRow(i, pattern, sizes, phase) for i in range(len(sizes))}
        stacked = [sum(sizes[l] for l in row) for row in pattern.rows]

        def gather(y: Tensor) -> Tensor:
            parts = [y[part] for part in offsets(sizes)]
            out = run({i: row.gather(parts[i]) for i, row in rows.items()}, job, there)  # noqa: B023
            return torch.cat([out[i] for i in sorted(out)])

        def scatter(z: Tensor) -> Tensor:
            parts = [z[part] for part in offsets(stacked)]  # noqa: B023
            out = run({i: row.scatter(parts[i]) for i, row in rows.items()}, job, back)  # noqa: B023
            return torch.cat([out[i] for i in sorted(out)])

        y = torch.randn(sum(sizes), 2, dtype=torch.float64)
        z = torch.randn(sum(stacked), 2, dtype=torch.float64)
        assert_adjoint(gather, scatter, y, z)


@given(jobs())
def test_spread_is_the_adjoint_of_collect(job: Job) -> None:
    agents = Worker(job, range(len(job.architecture.names)), in_process(job))
    nodes = {i: agent.node for i, agent in agents.agents.items()}
    on_tree = sorted(job.architecture.tree.depth)
    C, own = job.architecture.outputs, job.plan.collect_of
    up = job.plan.collect
    down = [phase.adjoint for phase in reversed(up)]

    def collect(y: Tensor) -> Tensor:
        zero = torch.zeros(C, 2, dtype=torch.float64)
        parts = dict(zip(on_tree, y.split(C), strict=True))
        out = run({i: n.collect(own, parts.get(i, zero)) for i, n in nodes.items()}, job, up)
        return out[job.root]

    def spread(z: Tensor) -> Tensor:
        zero = torch.zeros_like(z)
        start = {i: z if i == job.root else zero for i in nodes}
        out = run({i: n.spread(own, start[i]) for i, n in nodes.items()}, job, down)
        return torch.cat([out[i] for i in on_tree])

    y = torch.randn(C * len(on_tree), 2, dtype=torch.float64)
    assert_adjoint(collect, spread, y, torch.randn(C, 2, dtype=torch.float64))


@given(job=jobs())
def test_a_distributed_step_is_the_dense_one(device: torch.device, job: Job) -> None:
    """Loss, all gradients, and the bytes on every edge, on any graph, in one process."""
    transport = in_process(job)
    worker = Worker(job, range(len(job.architecture.names)), transport, device=device)
    [result] = worker.train(1)
    gradients = {
        i: {name: gradient.cpu() for name, gradient in agent.node.gradients.items()}
        for i, agent in worker.agents.items()
    }
    assert_matches_dense(job, result, gradients)
    assert_follows_plan(transport.sent, job)


@given(jobs())
def test_the_rounds_run_in_the_order_of_the_plan(job: Job) -> None:
    class Recorder(InProcess):
        def exchange(self, phase: Round, mail: dict, batch: int) -> dict:
            seen.append(phase)
            return super().exchange(phase, mail, batch)

    seen: list[Round] = []
    Worker(job, range(len(job.architecture.names)), in_process(job, Recorder)).train(1)
    assert seen == list(job.plan.training_step)


@given(jobs())
def test_so_do_those_of_an_analysis(job: Job) -> None:
    architecture = job.architecture
    worker = Worker(job, range(len(architecture.names)), in_process(job))
    sums = worker.sensitivities(2, torch.ones(2 * architecture.n, 1, dtype=torch.float64))
    assert sums.gram.shape[:2] == (architecture.patterns.layers + 1, 2)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "H2", "graph": "both"},
        {"name": "H1", "graph": "J"},
        {"name": "MS1"},
        {"name": "MS2"},
        {"name": "MS3"},
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["to a root", "read out by themselves"])
def test_no_message_can_be_left_out(model: dict[str, str], own: bool) -> None:
    """Whichever is lost, the gradients, the loss or the norm are others: the plan is minimal."""
    topology = {"agents": 3, "d": 1, "edges": [["a1", "a2"], ["a2", "a3"]]}
    training = {"batch_size": 2, "clip_norm": 1e-3, "dtype": "float64"}
    spec = {"topology": topology, "model": {**model, "layers": 1, "h": 0.5}, "training": training}
    if own:
        targets = {f"a{k}": [f"y{k}"] for k in (1, 2, 3)}
        spec["data"] = numbers() | {"targets": targets}
    job = Job.load(spec)

    class Lossy(InProcess):
        lost: tuple[int, tuple[int, int]] | None = None
        rounds = 0

        def exchange(self, phase: Round, mail: dict, batch: int) -> dict:
            came = super().exchange(phase, mail, batch)
            self.rounds += 1
            return {
                link: torch.zeros_like(tensor) if self.lost == (self.rounds, link) else tensor
                for link, tensor in came.items()
            }

    transport = in_process(job, Lossy)
    worker = Worker(job, range(3), transport)
    agents = worker.agents.values()
    initial = [{name: w.clone() for name, w in agent.state().items()} for agent in agents]

    def step(lost: tuple[int, tuple[int, int]] | None) -> tuple[object, list[Tensor]]:
        for agent, state in zip(agents, initial, strict=True):
            agent.load_state(state)
        transport.lost, transport.rounds, worker.step = lost, 0, 0
        result = worker.train(1)
        return result, [g.clone() for agent in agents for g in agent.node.gradients.values()]

    whole, gradients = step(None)
    for k, phase in enumerate(job.plan.training_step, 1):
        for m in phase.messages:
            result, found = step((k, (m.source, m.target)))
            same = all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))
            assert result != whole or not same, f"{phase.name}: {m}"


@pytest.mark.parametrize("encoder", ["pad", "linear"])
def test_both_encoders_and_agents_without_input(encoder: str) -> None:
    split = {"kind": "indices", "indices": {"a1": [0], "a3": [1]}}
    job = Job.of(
        spec_from_dict(
            {
                "topology": {
                    "agents": 4,
                    "d": 2,
                    "edges": {"generator": "path_graph", "args": {"n": 4}},
                },
                "model": {"encoder": encoder, "layers": 3},
                "data": {
                    "name": "double_circles",
                    "split": split | ({"enter": {"a3": "q"}} if encoder == "pad" else {}),
                },
                "training": {"dtype": "float64"},
            }
        )
    )
    worker = Worker(job, range(4), in_process(job))
    [result] = worker.train(1)
    assert_matches_dense(job, result, {i: a.node.gradients for i, a in worker.agents.items()})


def test_a_deep_network_keeps_its_accuracy() -> None:
    """Rounding does not build up over 200 layers on the default ring."""
    job = Job.load(None, ["model.layers=200", "model.h=0.05", "training.dtype=float64"])
    worker = Worker(job, range(8), in_process(job))
    [result] = worker.train(1)
    assert_matches_dense(job, result, {i: a.node.gradients for i, a in worker.agents.items()})
    first = worker.agents[0].node.gradients["Kp"][0]
    assert_close(first, first.clamp(-1e3, 1e3), "gradients at the first layer")
    assert first.norm() > 1e-6, "the gradient vanishes"


@pytest.mark.parametrize("member", ["H2", "MS1", "MS3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_recomputed_states_give_the_gradients_of_stored_ones_at_1024_layers(
    member: str, dtype: str, tolerance: float
) -> None:
    losses, found = [], []
    for activations in ("store", "recompute"):
        settings = [f"training.activations={activations}", f"training.dtype={dtype}"]
        depth = ["model.layers=1024", "model.h=0.004", f"model.name={member}"]
        small = ["topology.agents=2", "topology.edges.args.n=2", "training.batch_size=8"]
        job = Job.load(None, [*depth, *settings, *small])
        worker = Worker(job, range(2), in_process(job))
        losses += worker.train(1)
        found.append(
            [g for _, agent in sorted(worker.agents.items()) for g in agent.node.gradients.values()]
        )
    assert losses[0] == losses[1]
    for stored, recomputed in zip(*found, strict=True):
        assert (stored - recomputed).abs().max() <= tolerance * stored.abs().max()


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_what_a_forward_pass_keeps_grows_with_the_depth_only_where_states_are_stored(
    activations: str,
) -> None:
    kept = []
    for layers in (2, 16):
        settings = f"model.layers={layers}", f"training.activations={activations}"
        job = Job.load(None, settings)
        agents = Worker(job, range(8), in_process(job)).agents
        actions = {i: agent.node.forward(agent.draw(0)[0]) for i, agent in agents.items()}
        drive(actions, in_process(job), job.batch, job.plan.forward)
        kept.append([len(agent.node._tape) for agent in agents.values()])
    assert kept == ([[4] * 8, [32] * 8] if activations == "store" else [[0] * 8, [0] * 8])


def test_a_state_that_is_not_finite_is_found_where_none_is_stored() -> None:
    for activations in ("store", "recompute"):
        job = Job.load(None, [f"training.activations={activations}", "model.activation=relu"])
        worker = Worker(job, range(8), in_process(job))
        worker.agents[2].weights["Kp"].data[2] = 1e30
        worker.train(1)
        assert min(worker.faults()).what == "the state y_3", activations
