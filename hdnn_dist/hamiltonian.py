"""The Hamiltonian `H(y) = 1ᵀ σ̃(K y + b)`, its gradient, and the activations `σ = σ̃'`.

Notation of arXiv 2105.13205 with the convention `ẏ = J ∂H/∂y = J Kᵀ σ(K y + b)`. Vectors are rows
of a batch: `y_BN`, `K_NN`, `b_N`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hdnn_dist.errors import UserError

_MEND = "give it as Activation(value, slope, integral)"


@dataclass(frozen=True)
class Activation:
    """A pointwise `σ` with what the method needs of it.

    Attributes:
        value: `σ(x)`.
        slope: `σ'(x)` as a function of `s = σ(x)`, so that a backward pass need not keep `x`.
        integral: `σ̃(x)` with `σ̃' = σ`; the energy is its sum, and is not known without it.
        steepest: `sup |σ'|`, which the upper bound of the gradients asks for.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor] | None = None
    steepest: float = 1.0


def _log_cosh(x: Tensor) -> Tensor:
    # |x| + log(1 + e^(-2|x|)) - log 2: cosh itself overflows.
    return x.abs() + F.softplus(-2 * x.abs()) - math.log(2)


LEAK = 0.01  # slope of leaky_relu for x < 0

ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda s: 1 - s * s, _log_cosh),
    "relu": Activation(torch.relu, lambda s: (s > 0).to(s.dtype), lambda x: x.relu() ** 2 / 2),
    "leaky_relu": Activation(
        lambda x: F.leaky_relu(x, LEAK),
        lambda s: torch.full_like(s, LEAK).masked_fill(s > 0, 1.0),
        lambda x: F.leaky_relu(x, LEAK) * x / 2,
    ),
    "elu": Activation(
        F.elu,
        lambda s: torch.where(s > 0, 1.0, s + 1),
        lambda x: torch.where(x > 0, x * x / 2, x.clamp(max=0).expm1() - x),
    ),
    "sigmoid": Activation(torch.sigmoid, lambda s: s * (1 - s), F.softplus, steepest=0.25),
}


def times(W_MN: Tensor, y_BN: Tensor) -> Tensor:
    """`W y` of every row `y` of a batch: `(…, B, N) -> (…, B, M)`.

    The product is taken, and kept in memory, as the paper writes it, with states as columns: with a
    handful of features that is several times as fast as with rows.
    """
    return (W_MN @ y_BN.mT).mT


def affine(K_MN: Tensor, y_BN: Tensor, b_M: Tensor) -> Tensor:
    """`K y + b` of every row `y` of a batch: `(…, B, N) -> (…, B, M)`."""
    return times(K_MN, y_BN) + b_M


def energy(y_BN: Tensor, K_NN: Tensor, b_N: Tensor, activation: Activation) -> Tensor:
    """`H(y) = Σ σ̃(K y + b)` per sample, shape `(B,)`.

    Raises:
        UserError: the activation has no integral.
    """
    if activation.integral is None:
        raise UserError("the energy Σ σ̃(K y + b) needs the integral σ̃ of σ", _MEND)
    return activation.integral(affine(K_NN, y_BN, b_N)).sum(-1)


def energy_gradient(y_BN: Tensor, K_NN: Tensor, b_N: Tensor, activation: Activation) -> Tensor:
    """`∂H/∂y = Kᵀ σ(K y + b)`, shape `(B, N)`."""
    return times(K_NN.mT, activation.value(affine(K_NN, y_BN, b_N)))


def skew(X_NN: Tensor) -> Tensor:
    """`J = [[0, -Xᵀ], [X, 0]]`, the skew-symmetric matrix of H2-DNN on `y = (p, q)`."""
    zero = torch.zeros_like(X_NN)
    return torch.cat([torch.cat([zero, -X_NN.mT], 1), torch.cat([X_NN, zero], 1)], 0)


def J1(like_N: Tensor) -> Tensor:
    """`[[0, I], [-I, 0]]`, as large and of the type of a vector `(N,)`, `N` even."""
    n = len(like_N) // 2
    return -skew(torch.eye(n, dtype=like_N.dtype, device=like_N.device))


def J2(like_N: Tensor) -> Tensor:
    """+1 above the diagonal, -1 below, as large and of the type of a vector `(N,)`."""
    ones = torch.ones(len(like_N), len(like_N), dtype=like_N.dtype, device=like_N.device)
    return ones.triu(1) - ones.tril(-1)


def activation_of(name: str) -> Activation:
    """An activation by its name in `ACTIVATIONS`, or a user's own as `"package.module:NAME"`.

    Raises:
        UserError: there is none of this name, or it is no `Activation`.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"no activation is named {name!r}",
            f"use {', '.join(ACTIVATIONS)}, or package.module:NAME for one of your own",
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the activation {name!r} cannot be imported: {error}",
            "name an Activation in a module that Python finds on every machine of the job",
        ) from None
    if not isinstance(found, Activation):
        raise UserError(f"{name!r} is a {type(found).__name__}", "name an Activation")
    return found
