from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from hdnn_dist.analysis import (
    accumulated,
    block_norms,
    counterexample,
    energies,
    from_sums,
    has_one_J,
    log_bound,
    log_bounds,
    probes,
    sensitivities,
)
from hdnn_dist.baselines import MLP, ResNet
from hdnn_dist.data import load_features
from hdnn_dist.errors import UserError
from hdnn_dist.family import FAMILY
from hdnn_dist.hamiltonian import J1
from hdnn_dist.job import Job
from hdnn_dist.model import HDNN, Layers
from hdnn_dist.testing import assert_close
from hdnn_dist.trainer import LocalRunner, Runner
from tests.strategies import matrix

F64 = torch.float64


def layers(member: str, depth: int = 6, **options: object) -> tuple[Layers, list[object]]:
    torch.manual_seed(0)
    model = Layers(member, 6, depth, h=0.3, **options).double().requires_grad_(False)  # type: ignore[arg-type]
    return model, [lambda y, w=w: model.member.step(y, w) for w in model.weights()]


@pytest.mark.parametrize("member", FAMILY)
def test_the_norms_are_those_of_the_jacobians(member: str) -> None:
    model, steps = layers(member)
    y = torch.randn(3, 6, dtype=F64)
    found = sensitivities(steps, y)
    J = J1(y[0])
    for sample in range(3):
        for k in range(1, 7):
            state = model.propagate(y)[6 - k][sample]

            def rest(y: Tensor, k: int = k) -> Tensor:
                y = y[None]
                for step in steps[6 - k :]:
                    y = step(y)
                return y[0]

            M = jacrev(rest)(state).mT  # M[a, b] = ∂y_N[b]/∂y_{N-k}[a]
            norm = torch.linalg.matrix_norm
            assert_close(found.norms[k - 1, sample], norm(M, 2), "‖M_k‖")
            assert_close(found.defects[k - 1, sample], norm(M.mT @ J @ M - J, 2), "defect")


@pytest.mark.parametrize("member", FAMILY)
def test_norms_lie_under_the_bound_and_symplectic_ones_over_one(member: str) -> None:
    model, steps = layers(member, depth=40)
    found = sensitivities(steps, torch.randn(4, 6, dtype=F64))
    bounds = torch.tensor(log_bounds(model.member, model.weights()), dtype=F64)
    assert (found.norms.log() <= bounds[:, None]).all()
    if member in ("H2", "MS3"):
        assert found.defects.max() < 1e-10
        assert found.norms.min() >= 1 - 1e-12
    else:
        assert found.defects.max() > 1e-3


def test_a_shears_bound_is_met_where_every_inequality_is_an_equality() -> None:
    model, _ = layers("MS1", depth=1)
    c = 0.6  # h L ‖K‖ with K = 2 I, and σ' = 1 at 0
    shear = torch.tensor([[1.0, c], [0.0, 1.0]], dtype=F64)
    half = torch.linalg.matrix_norm(shear, 2).log().item()
    assert log_bound(model.member, {"K": 2.0}) == pytest.approx(2 * half)


@pytest.mark.parametrize("make", [MLP, partial(ResNet, h=0.5)])
def test_the_baselines_lie_under_their_bounds(make: type[MLP]) -> None:
    torch.manual_seed(0)
    model = make(6, 10).double().requires_grad_(False)
    steps = [partial(model.step, j=j) for j in range(10)]
    y = torch.randn(4, 6, dtype=F64)
    found = sensitivities(steps, y)
    bounds = torch.tensor(accumulated(model.log_bounds()), dtype=F64)
    assert (found.norms.log() <= bounds[:, None]).all()
    assert found.exact
    assert_close(model(y), model.propagate(y)[-1], "y_N")


def test_under_a_small_budget_figures_are_estimates_from_below() -> None:
    _, steps = layers("MS1")
    y = torch.randn(2, 6, dtype=F64)
    exact, estimate = sensitivities(steps, y), sensitivities(steps, y, budget=3 * 8 * 6 * 2 * 8)
    assert exact.exact
    assert not estimate.exact
    assert (estimate.norms <= exact.norms + 1e-12).all()
    assert (estimate.defects <= exact.defects + 1e-12).all()
    assert probes(6, 3).shape == (6, 3)
    assert_close(probes(6, 3).T @ probes(6, 3), torch.eye(3, dtype=F64), "VᵀV")


def test_a_module_can_be_a_step() -> None:
    model, steps = layers("H2")
    y = torch.randn(6, 6, dtype=F64)  # as many samples as features
    expected = sensitivities(steps, y).norms[-1]
    assert_close(sensitivities([model], y).norms[-1], expected, "‖M_N‖")


def test_numbers_that_overflow_are_infinite() -> None:
    found = sensitivities([lambda y: y * 1e200, lambda y: y * 1e200], torch.ones(1, 2, dtype=F64))
    assert found.norms.isinf().all()
    assert found.defects.isinf().all()


def test_an_odd_state_has_no_J1() -> None:
    with pytest.raises(UserError, match="even"):
        sensitivities([torch.tanh], torch.zeros(1, 3))


# --- by the agents -------------------------------------------------------------------------------


def job(name: str, graph: str, **model: object) -> Job:
    links = {(0, 1), (1, 2)}
    if graph == "a J a layer":
        return job(name, "K", J=matrix("H1", [2, 1, 3], links, 3, 0))
    if graph == "an X":
        return job(name, "K", X=matrix("H2", [2, 1, 3], links, None, 0))
    return Job.load(
        {
            "topology": {
                "agents": [{"name": "a", "d": 2}, {"name": "b", "d": 1}, {"name": "c", "d": 3}],
                "edges": [["a", "b"], ["b", "c"]],
            },
            "model": {"name": name, "graph": graph, "layers": 3, "h": 0.5, **model},
            "data": {"name": "digits", "split": {"kind": "auto"}},
            "training": {"dtype": "float64"},
        }
    )


def assert_agents_agree_with_dense(runner: Runner) -> None:
    job, samples = runner.job, 2
    model = HDNN(job.architecture, F64).requires_grad_(False)
    weights, member = model.weights(), model.member
    x = load_features(job.spec.data, "test", range(job.data.features))[:samples]
    y = model.encode(torch.from_numpy(x).double())
    J = member.J(weights[0]) if has_one_J(member, job.architecture.J) else None
    dense = sensitivities([lambda y, w=w: member.step(y, w) for w in weights], y, J)
    N = y.shape[1]
    sums = runner.sensitivities(samples, probes(N, N))
    found = from_sums(sums, N)
    assert_close(found.norms, dense.norms, "‖M_k‖")
    assert_close(found.defects, dense.defects, "defect")
    assert_close(sums.energy, energies(member, weights, model.propagate(y)), "H")
    few = from_sums(runner.sensitivities(samples, probes(N, 3)), N)
    assert not few.exact
    assert (few.norms <= dense.norms + 1e-9).all()
    assert (few.norms > 0.1 * dense.norms).all()
    by_blocks = accumulated(
        [log_bound(member, norms) for norms in block_norms(member, sums.blocks)]
    )
    tight = torch.tensor(log_bounds(member, weights))
    assert (torch.tensor(by_blocks) >= tight - 1e-9).all()


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        ("H1", "J"),
        ("H1", "a J a layer"),
        ("H2", "an X"),
        ("H2", "K"),
        ("H2", "J"),
        ("H2", "both"),
        ("MS1", "K"),
        ("MS2", "K"),
        ("MS3", "K"),
    ],
)
def test_the_agents_sums_give_the_dense_figures(name: str, graph: str) -> None:
    assert_agents_agree_with_dense(LocalRunner(job(name, graph)))


@pytest.mark.cluster
def test_the_actors_sums_give_the_dense_figures(cluster: None) -> None:
    from hdnn_dist.cluster import RayRunner

    runner = RayRunner(job("H2", "both"))
    try:
        assert_agents_agree_with_dense(runner)
    finally:
        runner.close()


# --- the counterexample --------------------------------------------------------------------------


def test_the_counterexamples_sensitivity_grows_with_time() -> None:
    found = counterexample()
    assert len(found.t) == len(found.norms) == 400
    assert found.t[-1] == pytest.approx(20)
    assert min(found.norms) >= 1 - 1e-12  # it is symplectic
    quarters = [found.norms[k] for k in (99, 199, 299, 399)]
    assert quarters == sorted(quarters)
    assert quarters[-1] > 3
    assert found.distance[-1] == pytest.approx(found.norms[-1], rel=0.2)
    # The entries oscillate, with an amplitude that grows.
    first, last = (torch.tensor(found.entries[k : k + 200]).abs().max() for k in (0, 200))
    assert last > 1.5 * first
    M = torch.tensor(found.entries, dtype=F64)
    assert (M.abs().max(1).values <= torch.tensor(found.norms, dtype=F64) + 1e-12).all()
