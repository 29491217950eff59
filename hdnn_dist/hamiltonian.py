"""The Hamiltonian `H(y) = 1ᵀ σ̃(K y + b)`, its gradient, and the activations `σ = σ̃'`.

Notation of arXiv 2105.13205 with the convention `ẏ = J ∂H/∂y = J Kᵀ σ(K y + b)`. Vectors are rows
of a batch: `y_BN`, `K_NN`, `b_N`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """A pointwise `σ` with what the method needs of it.

    Attributes:
        value: `σ(x)`.
        slope: `σ'(x)` as a function of `s = σ(x)`, so that a backward pass need not keep `x`.
        integral: `σ̃(x)` with `σ̃' = σ`; the energy is its sum.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]


def _log_cosh(x: Tensor) -> Tensor:
    # |x| + log(1 + e^(-2|x|)) - log 2: cosh itself overflows.
    return x.abs() + F.softplus(-2 * x.abs()) - math.log(2)


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda s: 1 - s * s, _log_cosh),
    "relu": Activation(torch.relu, lambda s: (s > 0).to(s.dtype), lambda x: x.relu() ** 2 / 2),
    "sigmoid": Activation(torch.sigmoid, lambda s: s * (1 - s), F.softplus),
}


def energy(y_BN: Tensor, K_NN: Tensor, b_N: Tensor, activation: Activation) -> Tensor:
    """`H(y) = Σ σ̃(K y + b)` per sample, shape `(B,)`."""
    return activation.integral(F.linear(y_BN, K_NN, b_N)).sum(-1)


def energy_gradient(y_BN: Tensor, K_NN: Tensor, b_N: Tensor, activation: Activation) -> Tensor:
    """`∂H/∂y = Kᵀ σ(K y + b)`, shape `(B, N)`."""
    return activation.value(F.linear(y_BN, K_NN, b_N)) @ K_NN


def skew(X_NN: Tensor) -> Tensor:
    """`J = [[0, -Xᵀ], [X, 0]]`, the skew-symmetric matrix of H2-DNN on `y = (p, q)`."""
    zero = torch.zeros_like(X_NN)
    return torch.cat([torch.cat([zero, -X_NN.mT], 1), torch.cat([X_NN, zero], 1)], 0)
