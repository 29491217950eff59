"""The H2-DNN in one process: an ordinary `nn.Module`, and the oracle for everything distributed."""

from __future__ import annotations

from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist.architecture import Architecture
from hdnn_dist.hamiltonian import ACTIVATIONS, energy, skew
from hdnn_dist.integrator import SemiImplicitEuler, roughness


class HDNN(nn.Module):
    """`x -> [p; q] = E x + e -> N semi-implicit Euler steps -> W [p; q] + c`, weights dense.

    Entries that no agent owns are zero and stay so: each weight is multiplied by its mask. Names
    and shapes of the weights are those of `hdnn_dist.architecture`.

    Args:
        architecture: sizes, patterns and the rest.
        dtype: of the weights.
    """

    bp: Tensor

    def __init__(self, architecture: Architecture, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.architecture = architecture
        self.scheme = SemiImplicitEuler(architecture.h, ACTIVATIONS[architecture.activation])
        agents = range(len(architecture.names))
        weights = architecture.assemble({i: architecture.initial(i, dtype) for i in agents})
        masks = architecture.assemble({i: _ownership(architecture, i) for i in agents})
        self.encoder, self.readout = nn.Module(), nn.Module()
        for name, value in weights.items():
            module, _, leaf = name.rpartition(".")
            owner = self.get_submodule(module)
            if name in architecture.constants:
                owner.register_buffer(leaf, value)
            else:
                owner.register_parameter(leaf, nn.Parameter(value))
            owner.register_buffer(leaf + "_mask", masks[name].to(dtype), persistent=False)

    def weight(self, name: str) -> Tensor:
        """A masked dense weight by its name, e.g. `"Kp"` or `"readout.weight"`."""
        return cast(Tensor, attrgetter(name)(self) * attrgetter(name + "_mask")(self))

    def coupling(self) -> Tensor:
        """`X (n, n)`; the identity unless the graph or training enters it."""
        if self.architecture.has_X:
            return self.weight("X")
        return torch.eye(self.architecture.n, dtype=self.bp.dtype, device=self.bp.device)

    @property
    def J(self) -> Tensor:
        """`J = [[0, -Xᵀ], [X, 0]]`, shape `(2n, 2n)`."""
        return skew(self.coupling())

    def encode(self, x: Tensor) -> Tensor:
        """Input `(B, F)` to the first state `y = [p; q]`, `(B, 2n)`."""
        return F.linear(x, self.weight("encoder.weight"), self.weight("encoder.bias"))

    def propagate(self, y: Tensor) -> list[Tensor]:
        """The states `y_0 … y_N`, each `(B, 2n)`."""
        Kp, bp, Kq, bq = (self.weight(name) for name in ("Kp", "bp", "Kq", "bq"))
        X, states = self.coupling(), [y]
        p, q = y.chunk(2, dim=-1)
        for j in range(self.architecture.patterns.layers):
            p, q = self.scheme.step(p, q, Kp[j], bp[j], Kq[j], bq[j], X)
            states.append(torch.cat([p, q], dim=-1))
        return states

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `(B, C)` of the input `(B, F)`."""
        y = self.propagate(self.encode(x))[-1]
        return F.linear(y, self.weight("readout.weight"), self.weight("readout.bias"))

    def energy(self, y: Tensor, layer: int) -> Tensor:
        """`H(y) = Σ σ̃(Kp p + bp) + Σ σ̃(Kq q + bq)` with the weights of a layer, shape `(B,)`."""
        p, q = y.chunk(2, dim=-1)
        σ = self.scheme.activation
        Kp, bp, Kq, bq = (self.weight(name)[layer] for name in ("Kp", "bp", "Kq", "bq"))
        return energy(p, Kp, bp, σ) + energy(q, Kq, bq, σ)

    def regulariser(self) -> Tensor:
        """`h/2 Σ_j (‖K_{j+1} - K_j‖² + ‖b_{j+1} - b_j‖²)`, to be weighted by α."""
        path = [self.weight(name) for name in ("Kp", "bp", "Kq", "bq")]
        return torch.stack([roughness(w, self.architecture.h) for w in path]).sum()


def _ownership(architecture: Architecture, i: int) -> dict[str, Tensor]:
    """Ones in the shape of each of agent `i`'s weights, zeros where a layer's graph has no edge."""
    ones = {name: torch.ones_like(value) for name, value in architecture.initial(i).items()}
    for name in ("Kp", "Kq"):
        ones[name] = ones[name] * architecture.layer_mask(i)[:, None, :]
    return ones
