"""The Hamiltonian `H(y) = 1ᵀ σ̃(K y + b)`, its gradient, and the activations `σ = σ̃'`.

Notation of arXiv 2105.13205 with the convention `ẏ = J ∂H/∂y = J Kᵀ σ(K y + b)`. Vectors are rows
of a batch: `y_BN`, `K_NN`, `b_N`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hdnn_dist.errors import UserError

_MEND = "give an Activation(value, slope as a function of the value, integral, steepest)"


@dataclass(frozen=True)
class Activation:
    """A pointwise `σ` with what the method needs of it.

    ::

        softsign = Activation(
            lambda x: x / (1 + x.abs()),
            lambda s: (1 - s.abs()) ** 2,
            lambda x: x.abs() - x.abs().log1p(),
            steepest=1.0,
        )

    Attributes:
        value: `σ(x)`; increasing, or at least such that its value tells its slope.
        slope: `σ'(x)` as a function of `s = σ(x)`, so that a backward pass need not keep `x`.
        integral: `σ̃(x)` with `σ̃' = σ`; the energy is its sum, and is not known without it.
        steepest: `sup |σ'|`, which the upper bound of the gradients asks for.
        name: what `activation_of` finds it by; a pickle holds that alone.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor] | None = None
    steepest: float = 1.0
    name: str | None = None

    def __reduce__(self) -> tuple[Callable[..., Activation], tuple[object, ...]]:
        """Pickled by name where it has one, so that modules can be copied and saved."""
        if self.name is not None:
            return activation_of, (self.name,)
        return Activation, (self.value, self.slope, self.integral, self.steepest)


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
        return replace(ACTIVATIONS[name], name=name)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"no activation is named {name!r}",
            f"use {', '.join(ACTIVATIONS)}, or package.module:NAME for one of your own",
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module can raise whatever there is
        raise UserError(
            f"the activation {name!r} cannot be imported: {error}",
            "name an Activation in a module that Python finds on every machine of the job",
        ) from None
    return replace(checked(found, repr(name)), name=name)


def checked(σ: object, name: str) -> Activation:
    """An activation of the user's whose parts agree with one another on [-4, 4].

    Raises:
        UserError: it is no `Activation`, fails, or its parts contradict one another.
    """
    if not isinstance(σ, Activation):
        raise UserError(f"{name} is a {type(σ).__name__}", _MEND)
    x = torch.linspace(-4.01, 4.0, 161, dtype=torch.float64, requires_grad=True)
    try:
        value = σ.value(x)
        slope, exact = σ.slope(value.detach()), _derivative(value, x)
        integrand = None if σ.integral is None else _derivative(σ.integral(x), x)
        bad = next(
            (
                what
                for what, wrong in (
                    ("slope(value(x)) is not σ'(x)", _differ(slope, exact)),
                    ("steepest is below |σ'(x)|", bool(exact.abs().max() > σ.steepest + 1e-6)),
                    (
                        "the derivative of integral(x) is not σ(x)",
                        integrand is not None and _differ(integrand, value),
                    ),
                )
                if wrong
            ),
            None,
        )
    except Exception as error:  # a user's function can raise whatever there is
        raise UserError(f"the activation {name} fails: {error}", _MEND) from None
    if bad:
        raise UserError(f"the activation {name}: {bad}", _MEND)
    return σ


def _derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x)[0]


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-6)
