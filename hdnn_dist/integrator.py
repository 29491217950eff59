"""Discretisations: one layer of the network is one step of a scheme, its weights one time instant.

Shapes: `p_BN`, `q_BN` (a batch of rows), `K_NN`, `b_N`, `X_NN`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hdnn_dist.hamiltonian import Activation, energy_gradient


@dataclass(frozen=True)
class SemiImplicitEuler:
    """Symplectic Euler, order 1: the layer of H2-DNN (arXiv 2105.13205, eq. for H2).

    ::

        p⁺ = p - h Xᵀ Kqᵀ σ(Kq q  + bq)
        q⁺ = q + h X  Kpᵀ σ(Kp p⁺ + bp)

    Each half step changes one of the states by a function of the other, so the step is undone
    exactly by taking the half steps back in reverse order.
    """

    h: float
    activation: Activation

    def step(
        self, p: Tensor, q: Tensor, Kp: Tensor, bp: Tensor, Kq: Tensor, bq: Tensor, X: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`(p, q) -> (p⁺, q⁺)`."""
        p = p - self.h * energy_gradient(q, Kq, bq, self.activation) @ X
        q = q + self.h * energy_gradient(p, Kp, bp, self.activation) @ X.mT
        return p, q

    def inverse(
        self, p: Tensor, q: Tensor, Kp: Tensor, bp: Tensor, Kq: Tensor, bq: Tensor, X: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`(p⁺, q⁺) -> (p, q)`."""
        q = q - self.h * energy_gradient(p, Kp, bp, self.activation) @ X.mT
        p = p + self.h * energy_gradient(q, Kq, bq, self.activation) @ X
        return p, q


def roughness(path: Tensor, h: float) -> Tensor:
    """`h/2 Σ_j ‖w_{j+1} - w_j‖²`, the paper's regulariser of weights over depth (before its α).

    Args:
        path: `w_j` stacked along the first axis: the layers' `K` `(N, …)` or `b`.
        h: step of the discretisation.
    """
    return h / 2 * path.diff(dim=0).square().sum()


def roughness_gradient(path: Tensor, h: float) -> Tensor:
    """`∂/∂w_j` of `roughness`: `h ((w_j - w_{j-1}) - (w_{j+1} - w_j))`, one-sided at the ends."""
    difference = h * path.diff(dim=0)
    gradient = torch.zeros_like(path)
    gradient[1:] += difference
    gradient[:-1] -= difference
    return gradient
