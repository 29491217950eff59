"""What the family is compared with: networks of the same shape without its structure.

======  =========================  ==========================
MLP     y⁺ = σ(W y + b)            Jacobian at most L ‖W‖
ResNet  y⁺ = y + h σ(W y + b)      Jacobian at most 1 + h L ‖W‖
======  =========================  ==========================

`L = sup|σ'|`. Weights are Gaussian with variance 1/inputs and biases zero, as those of the family.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.hamiltonian import Activation, activation_of


class MLP(nn.Module):
    """`N` layers `y⁺ = σ(W_j y + b_j)`.

    Args:
        features: size of `y`.
        layers: depth.
        activation: name of `σ`, or an `Activation`.
    """

    def __init__(self, features: int, layers: int, activation: str | Activation = "tanh") -> None:
        super().__init__()
        self.activation = activation_of(activation) if isinstance(activation, str) else activation
        self.W = nn.Parameter(torch.randn(layers, features, features) / features**0.5)
        self.b = nn.Parameter(torch.zeros(layers, features))

    def step(self, y: Tensor, j: int) -> Tensor:
        """Layer `j`: `(…, features) -> (…, features)`."""
        return self.activation.value(F.linear(y, self.W[j], self.b[j]))

    def propagate(self, y: Tensor) -> list[Tensor]:
        """The states `y_0 … y_N`."""
        states = [y]
        for j in range(len(self.W)):
            states.append(self.step(states[-1], j))
        return states

    def forward(self, y: Tensor) -> Tensor:
        """`y_N` of `y_0`."""
        return self.propagate(y)[-1]

    def log_bounds(self) -> list[float]:
        """`log` of the upper bound on the norm of each layer's Jacobian."""
        norms = torch.linalg.matrix_norm(self.W.detach(), 2) * self.activation.steepest
        logs: list[float] = norms.log().tolist()
        return logs


class ResNet(MLP):
    """`N` layers `y⁺ = y + h σ(W_j y + b_j)`.

    Args:
        features, layers, activation: as for `MLP`.
        h: step.
    """

    def __init__(
        self,
        features: int,
        layers: int,
        h: float = 0.1,
        activation: str | Activation = "tanh",
    ) -> None:
        super().__init__(features, layers, activation)
        self.h = h

    def step(self, y: Tensor, j: int) -> Tensor:
        """Layer `j`: `(…, features) -> (…, features)`."""
        return torch.add(y, super().step(y, j), alpha=self.h)

    def log_bounds(self) -> list[float]:
        """`log` of the upper bound on the norm of each layer's Jacobian."""
        return [math.log1p(self.h * math.exp(log)) for log in super().log_bounds()]
