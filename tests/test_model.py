from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.func import jacrev

from hdnn_dist.job import Job
from hdnn_dist.model import HDNN
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.testing import assert_close, assert_respects, assert_symplectic
from tests.strategies import in_order, jobs


def job(**model: object) -> Job:
    return Job.of(
        spec_from_dict(
            {
                "topology": {
                    "agents": [{"name": "a", "d": 2}, {"name": "b", "d": 1}, {"name": "c", "d": 3}],
                    "edges": [["a", "b"], ["b", "c"]],
                    "directed": True,
                },
                "model": {"layers": 3, **model},
                "data": {"name": "double_moons", "split": {"kind": "auto", "agents": ["a", "b"]}},
                "training": {"dtype": "float64"},
            }
        )
    )


@pytest.mark.parametrize("graph", ["K", "J", "both"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_against_finite_differences(graph: str, activation: str) -> None:
    model = HDNN(job(graph=graph, activation=activation, train_J=True).architecture, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(3, 2, dtype=torch.float64)

    def scores(*weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    weights = tuple(w.detach().clone().requires_grad_() for w in model.parameters())
    assert torch.autograd.gradcheck(scores, weights)


@pytest.mark.parametrize("graph", ["K", "J", "both"])
def test_the_sensitivity_matrix_is_symplectic(graph: str) -> None:
    model = HDNN(job(graph=graph, layers=30).architecture, torch.float64)
    y0 = torch.randn(2 * model.architecture.n, dtype=torch.float64)
    A = jacrev(lambda y: model.propagate(y[None])[-1][0])(y0)  # A[b, a] = ∂y_N[b]/∂y_0[a]
    assert_symplectic(A.mT.detach(), model.member.J(model.weights()[0]).detach())
    norm = torch.linalg.matrix_norm
    assert norm(A, 2) * norm(A.mT, 2) >= 1


@settings(max_examples=25)
@given(jobs())
def test_training_keeps_the_sparsity(job: Job) -> None:
    model = HDNN(job.architecture, job.dtype)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(4, job.data.features, dtype=job.dtype)).square().sum().backward()
        optimiser.step()
    architecture, patterns = job.architecture, job.architecture.patterns
    for name in job.architecture.member.matrices:
        for K, T in zip(in_order(architecture, model.get_parameter(name)), patterns.T, strict=True):
            assert_respects(K, T, architecture.sizes)
    for name in architecture.coupling:
        C = in_order(architecture, model.weight(name))
        assert_respects(C, patterns.R, architecture.sizes)


def test_it_is_an_ordinary_module(device: torch.device) -> None:
    architecture = job(graph="both").architecture
    model, other = HDNN(architecture).to(device), HDNN(architecture).to(device)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(1)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 2, device=device)
    assert torch.equal(model(x), other(x))
    assert set(model.state_dict()) == set(architecture.shapes())
    assert model.double()(x.double()).dtype == torch.float64
    assert not any("X" in name for name, _ in model.named_parameters())


def test_the_input_enters_p_or_q_with_the_encoder_pad() -> None:
    spec = spec_from_dict(
        {
            "topology": {"agents": 3, "d": 2, "edges": [["a1", "a2"], ["a2", "a3"]]},
            "model": {"encoder": "pad"},
            "data": {
                "name": "swiss_roll",
                "split": {
                    "kind": "indices",
                    "indices": {"a1": [0], "a3": [1]},
                    "enter": {"a3": "q"},
                },
            },
        }
    )
    y = HDNN(Job.of(spec).architecture).encode(torch.tensor([[5.0, 7.0]]))
    expected = torch.zeros(1, 12)
    expected[0, 0], expected[0, 6 + 4] = 5, 7  # p of a1, q of a3
    assert_close(y, expected, "y_0")


def test_energy_is_the_hamiltonian_of_both_states() -> None:
    model = HDNN(job().architecture, torch.float64)
    y = torch.randn(2, 12, dtype=torch.float64)
    p, q = y.chunk(2, -1)
    expected = (p @ model.Kp[1].T + model.bp[1]).cosh().log().sum(-1) + (
        q @ model.Kq[1].T + model.bq[1]
    ).cosh().log().sum(-1)
    assert_close(model.member.energy(y, model.weights()[1]), expected, "H")
