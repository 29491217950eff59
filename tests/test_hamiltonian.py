from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hdnn_dist.errors import UserError
from hdnn_dist.hamiltonian import ACTIVATIONS, activation_of, energy, energy_gradient, skew
from hdnn_dist.testing import assert_close

x = torch.tensor([-800.0, -3.0, -0.5, 0.3, 2.0, 800.0], dtype=torch.float64)


def derivative(f: object, at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(at).sum(), at)  # type: ignore[operator]
    return gradient


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_integral_has_the_activation_as_its_derivative(name: str) -> None:
    σ = ACTIVATIONS[name]
    assert torch.isfinite(σ.integral(x)).all()  # cosh(800) is not
    assert_close(derivative(σ.integral, x), σ.value(x), "σ̃'")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_slope_is_the_derivative_in_terms_of_the_value(name: str) -> None:
    σ = ACTIVATIONS[name]
    assert_close(σ.slope(σ.value(x)), derivative(σ.value, x), "σ'")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_energy_gradient(name: str) -> None:
    torch.manual_seed(0)
    y, K, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, 3), (3, 3), (3,)))
    expected = derivative(lambda y: energy(y, K, b, ACTIVATIONS[name]), y)
    assert_close(energy_gradient(y, K, b, ACTIVATIONS[name]), expected, "∂H/∂y")


def test_J_is_skew_symmetric() -> None:
    X = torch.randn(3, 3)
    J = skew(X)
    assert torch.equal(J, -J.mT)
    assert torch.equal(J[3:, :3], X)


def test_an_activation_is_found_by_name_and_pickled_by_it() -> None:
    own = activation_of("tanh")
    assert pickle.loads(pickle.dumps(own)) == own
    with pytest.raises(UserError, match="no activation is named 'tan'"):
        activation_of("tan")
    with pytest.raises(UserError, match="cannot be imported"):
        activation_of("no_such_module:NAME")


def test_without_an_integral_there_is_no_energy() -> None:
    σ = replace(ACTIVATIONS["tanh"], integral=None)
    y, K, b = torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(2)
    with pytest.raises(UserError):
        energy(y, K, b, σ)
