from __future__ import annotations

import torch
from torch import Tensor

from hdnn_dist.hamiltonian import ACTIVATIONS, energy
from hdnn_dist.integrator import SemiImplicitEuler, roughness, roughness_gradient
from hdnn_dist.testing import assert_close

N = 4


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return draw(N, N), draw(N), draw(N, N), draw(N), torch.eye(N) + 0.3 * draw(N, N)


def test_a_step_is_what_the_paper_writes() -> None:
    Kp, bp, Kq, bq, X = weights = layer()
    p, q, h = draw(N), draw(N), 0.3
    new_p = p - h * X.T @ Kq.T @ torch.tanh(Kq @ q + bq)
    new_q = q + h * X @ Kp.T @ torch.tanh(Kp @ new_p + bp)
    step = SemiImplicitEuler(h, ACTIVATIONS["tanh"]).step(p[None], q[None], *weights)
    assert_close(step[0][0], new_p, "p⁺")
    assert_close(step[1][0], new_q, "q⁺")


def test_the_inverse_undoes_the_step() -> None:
    scheme = SemiImplicitEuler(0.7, ACTIVATIONS["relu"])
    p, q, weights = draw(5, N), draw(5, N), layer()
    back = scheme.inverse(*scheme.step(p, q, *weights), *weights)
    assert_close(back[0], p, "p")
    assert_close(back[1], q, "q")


def test_the_energy_error_of_small_steps_is_of_first_order() -> None:
    # Symplectic Euler keeps the energy to O(h): halving the step halves the drift.
    Kp, bp, Kq, bq, _ = layer()
    σ = ACTIVATIONS["tanh"]
    p0, q0 = draw(1, N), draw(1, N)

    def H(p: Tensor, q: Tensor) -> float:
        return (energy(p, Kp, bp, σ) + energy(q, Kq, bq, σ)).item()

    def drift(h: float) -> float:
        p, q = p0, q0
        for _ in range(round(1 / h)):
            p, q = SemiImplicitEuler(h, σ).step(p, q, Kp, bp, Kq, bq, torch.eye(N).double())
        return abs(H(p, q) - H(p0, q0))

    assert drift(1e-3) < 0.02 * H(p0, q0)
    assert 1.8 < drift(1e-3) / drift(5e-4) < 2.2


def test_roughness_and_its_gradient() -> None:
    path = draw(5, 2, 3).requires_grad_()
    value = roughness(path, 0.5)
    explicit = sum(((path[j + 1] - path[j]) ** 2).sum() for j in range(4)) * 0.25
    assert_close(value, explicit, "h/2 Σ‖w_{j+1} - w_j‖²")
    (expected,) = torch.autograd.grad(value, path)
    assert_close(roughness_gradient(path.detach(), 0.5), expected, "gradient")
    assert_close(roughness_gradient(draw(1, 3), 0.5), torch.zeros(1, 3), "a single layer")
