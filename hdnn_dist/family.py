"""The H-DNN family: one layer of each member is one step of a scheme for `ẏ = J Kᵀ σ(K y + b)`.

======  =====================================  =====================  =================  =========
member  constraint on K                        J                      scheme             invertible
======  =====================================  =====================  =================  =========
H1      none                                   any skew, per layer    forward Euler      no
H2      K = blkdiag(Kp, Kq)                    [[0, -Xᵀ], [X, 0]]     symplectic Euler   exactly
MS1     K = [[0, K̃], [-K̃ᵀ, 0]]                 J Kᵀ = I               Verlet             exactly
MS2     K = A - Aᵀ, A strictly upper           J Kᵀ = I               forward Euler      no
MS3     K = [[0, K1], [K2, 0]]                 J1 = [[0, I], [-I, 0]]  Verlet            exactly
======  =====================================  =====================  =================  =========

H1 and H2 are those of Galimberti et al., arXiv 2105.13205; MS1, MS2 and MS3 are those of Haber and
Ruthotto 2017 and Chang et al. 2018 as that paper writes them. States are rows of a batch,
`y_BN = [p, q]` with `n = N/2` columns each; further axes before these are carried along.

Each member says its layer twice: `step` is the equation on dense matrices, and `updates` is the
same as half steps that a graph of agents can take (see `Update`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hdnn_dist.hamiltonian import J1, Activation, affine, energy, energy_gradient, skew, times

State = Literal["p", "q", "y"]
Weights = Mapping[str, Tensor]
"""A layer's weights by name: the member's own, and `J` or `X` where they are not the default."""


@dataclass(frozen=True)
class Update:
    """A half step `target ← target + sign · h · C g`, `g = Kᵀ s` or `s`, `s = σ(a + b)`.

    Attributes:
        target, source: the state that is changed, and the one that it is changed by.
        K, b: names of the weights.
        sign: +1 or -1.
        argument: `a = K y`, `-Kᵀ y` or `K y - Kᵀ y` with `y` the source.
        pull: whether `g = Kᵀ s`: the gradient of the energy, and not `s` itself.
        coupling: `C`: the matrix `J`, `X`, `Xᵀ`, or "" for the identity.
    """

    target: State
    source: State
    K: str
    b: str
    sign: int = 1
    argument: Literal["K", "-KT", "K-KT"] = "K"
    pull: bool = False
    coupling: Literal["", "J", "X", "XT"] = ""


@dataclass(frozen=True)
class Member:
    """What the members have in common.

    Attributes:
        h: step of the discretisation.
        activation: `σ`.
    """

    h: float
    activation: Activation

    name: ClassVar[str]
    matrices: ClassVar[tuple[str, ...]]
    """Names of the trained matrices of a layer, each `(N, N)` if `whole`, else `(n, n)`."""
    vectors: ClassVar[tuple[str, ...]]
    """Names of the biases, each `(N,)` if `whole`, else `(n,)`."""
    whole: ClassVar[bool]
    """Whether a layer updates `y` at once, and not `p` and `q` in turn."""
    upper: ClassVar[bool] = False
    """Whether a matrix is strictly upper triangular."""
    updates: ClassVar[tuple[Update, ...]]

    @property
    def invertible(self) -> bool:
        """Whether the half steps can be taken back: none changes what it is a function of."""
        return all(update.target != update.source for update in self.updates)

    def step(self, y: Tensor, w: Weights) -> Tensor:
        """One layer: `y -> y⁺`, both `(…, B, N)`."""
        raise NotImplementedError

    def propagate(self, y: Tensor, weights: Sequence[Weights]) -> list[Tensor]:
        """The states `y_0 … y_N` of as many layers as there are `weights`."""
        states = [y]
        for w in weights:
            states.append(self.step(states[-1], w))
        return states

    def inverse(self, y: Tensor, w: Weights) -> Tensor:
        """The layer undone: `y⁺ -> y`.

        Raises:
            NotImplementedError: for H1 and MS2, whose forward Euler step has no closed inverse.
        """
        raise NotImplementedError(f"{self.name} has no closed inverse")

    def K(self, w: Weights) -> Tensor:
        """The layer's `K` in the general form, `(N, N)`."""
        raise NotImplementedError

    def b(self, w: Weights) -> Tensor:
        """The layer's `b` in the general form, `(N,)`, in the order of the rows of `K`."""
        raise NotImplementedError

    def J(self, w: Weights) -> Tensor:
        """The layer's `J` in the general form, `(N, N)`; `K⁻ᵀ` where the constraint says so.

        Raises:
            torch.linalg.LinAlgError: MS1 or MS2 with a singular `K`, for which there is none.
        """
        inverse: Tensor = torch.linalg.inv(self.K(w))
        return inverse.mT

    def energy(self, y: Tensor, w: Weights) -> Tensor:
        """`H(y) = Σ σ̃(K y + b)` of the general form, shape `(…,)`."""
        return energy(y, self.K(w), self.b(w), self.activation)


def _joined(p: Tensor, q: Tensor) -> Tensor:
    """`y = [p, q]`, kept in memory as `times` keeps it."""
    return torch.cat([p.mT, q.mT], -2).mT


def _add(y: Tensor, g: Tensor, h: float) -> Tensor:
    return torch.add(y, g, alpha=h)


class H1(Member):
    """Forward Euler: `y⁺ = y + h J_j K_jᵀ σ(K_j y + b_j)`, `J_j` skew-symmetric.

    Its BSM is not symplectic: forward Euler keeps the flow's structure to first order in `h` only.
    """

    name, matrices, vectors, whole = "H1", ("K",), ("b",), True
    updates = (Update("y", "y", "K", "b", pull=True, coupling="J"),)

    def step(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        g = energy_gradient(y, w["K"], w["b"], self.activation)
        return _add(y, times(self.J(w), g), self.h)

    def K(self, w: Weights) -> Tensor:  # noqa: D102
        return w["K"]

    def b(self, w: Weights) -> Tensor:  # noqa: D102
        return w["b"]

    def J(self, w: Weights) -> Tensor:  # noqa: D102
        return w["J"] if "J" in w else J1(w["b"])


class H2(Member):
    """Symplectic Euler, order 1, with `y = (p, q)`, `J = [[0, -Xᵀ], [X, 0]]`.

    ::

        p⁺ = p - h Xᵀ Kqᵀ σ(Kq q  + bq)
        q⁺ = q + h X  Kpᵀ σ(Kp p⁺ + bp)

    Each half step changes one of the states by a function of the other, so the step is undone
    exactly by taking the half steps back in reverse order. Its BSM is symplectic.
    """

    name, matrices, vectors, whole = "H2", ("Kp", "Kq"), ("bp", "bq"), False
    updates = (
        Update("p", "q", "Kq", "bq", sign=-1, pull=True, coupling="XT"),
        Update("q", "p", "Kp", "bp", sign=+1, pull=True, coupling="X"),
    )

    def step(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        p, q = y.chunk(2, -1)
        p = _add(p, self._XT(energy_gradient(q, w["Kq"], w["bq"], self.activation), w), -self.h)
        q = _add(q, self._X(energy_gradient(p, w["Kp"], w["bp"], self.activation), w), +self.h)
        return _joined(p, q)

    def inverse(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        p, q = y.chunk(2, -1)
        q = _add(q, self._X(energy_gradient(p, w["Kp"], w["bp"], self.activation), w), -self.h)
        p = _add(p, self._XT(energy_gradient(q, w["Kq"], w["bq"], self.activation), w), +self.h)
        return _joined(p, q)

    def _X(self, g: Tensor, w: Weights) -> Tensor:
        return times(w["X"], g) if "X" in w else g

    def _XT(self, g: Tensor, w: Weights) -> Tensor:
        return times(w["X"].mT, g) if "X" in w else g

    def K(self, w: Weights) -> Tensor:  # noqa: D102
        K: Tensor = torch.block_diag(w["Kp"], w["Kq"])
        return K

    def b(self, w: Weights) -> Tensor:  # noqa: D102
        return torch.cat([w["bp"], w["bq"]])

    def J(self, w: Weights) -> Tensor:  # noqa: D102
        n = len(w["bp"])
        return skew(
            w["X"] if "X" in w else torch.eye(n, dtype=w["bp"].dtype, device=w["bp"].device)
        )


class MS1(Member):
    """Verlet for `K = [[0, K̃], [-K̃ᵀ, 0]]`, `J Kᵀ = I`.

    ::

        p⁺ = p + h σ( K̃  q  + bp)
        q⁺ = q + h σ(-K̃ᵀ p⁺ + bq)
    """

    name, matrices, vectors, whole = "MS1", ("K",), ("bp", "bq"), False
    updates = (
        Update("p", "q", "K", "bp", argument="K"),
        Update("q", "p", "K", "bq", argument="-KT"),
    )

    def step(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        p, q = y.chunk(2, -1)
        p = _add(p, self.activation.value(affine(w["K"], q, w["bp"])), self.h)
        q = _add(q, self.activation.value(affine(-w["K"].mT, p, w["bq"])), self.h)
        return _joined(p, q)

    def inverse(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        p, q = y.chunk(2, -1)
        q = _add(q, self.activation.value(affine(-w["K"].mT, p, w["bq"])), -self.h)
        p = _add(p, self.activation.value(affine(w["K"], q, w["bp"])), -self.h)
        return _joined(p, q)

    def K(self, w: Weights) -> Tensor:  # noqa: D102
        return -skew(w["K"].mT)

    def b(self, w: Weights) -> Tensor:  # noqa: D102
        return torch.cat([w["bp"], w["bq"]])


class MS2(Member):
    """Forward Euler for an antisymmetric `K = A - Aᵀ` with `J Kᵀ = I`: `y⁺ = y + h σ(K y + b)`.

    Trained is `A`, strictly upper triangular in the order of the agents, so that no entry of `K`
    has two weights.
    """

    name, matrices, vectors, whole, upper = "MS2", ("K",), ("b",), True, True
    updates = (Update("y", "y", "K", "b", argument="K-KT"),)

    def step(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        return _add(y, self.activation.value(affine(self.K(w), y, w["b"])), self.h)

    def K(self, w: Weights) -> Tensor:  # noqa: D102
        return w["K"] - w["K"].mT

    def b(self, w: Weights) -> Tensor:  # noqa: D102
        return w["b"]


class MS3(Member):
    """Verlet for the two-layer Hamiltonian `K = [[0, K1], [K2, 0]]`, `J = J1`; K1 = Kq, K2 = Kp.

    ::

        p⁺ = p + h Kqᵀ σ(Kq q  + bq)
        q⁺ = q - h Kpᵀ σ(Kp p⁺ + bp)

    It is H2 with `X = -I`, and like it symplectic.
    """

    name, matrices, vectors, whole = "MS3", ("Kp", "Kq"), ("bp", "bq"), False
    updates = (
        Update("p", "q", "Kq", "bq", sign=+1, pull=True),
        Update("q", "p", "Kp", "bp", sign=-1, pull=True),
    )

    def step(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        p, q = y.chunk(2, -1)
        p = _add(p, energy_gradient(q, w["Kq"], w["bq"], self.activation), +self.h)
        q = _add(q, energy_gradient(p, w["Kp"], w["bp"], self.activation), -self.h)
        return _joined(p, q)

    def inverse(self, y: Tensor, w: Weights) -> Tensor:  # noqa: D102
        p, q = y.chunk(2, -1)
        q = _add(q, energy_gradient(p, w["Kp"], w["bp"], self.activation), +self.h)
        p = _add(p, energy_gradient(q, w["Kq"], w["bq"], self.activation), -self.h)
        return _joined(p, q)

    def K(self, w: Weights) -> Tensor:  # noqa: D102
        zero = torch.zeros_like(w["Kp"])
        return torch.cat([torch.cat([zero, w["Kq"]], 1), torch.cat([w["Kp"], zero], 1)], 0)

    def b(self, w: Weights) -> Tensor:  # noqa: D102
        return torch.cat([w["bq"], w["bp"]])

    def J(self, w: Weights) -> Tensor:  # noqa: D102
        return J1(torch.cat([w["bp"], w["bq"]]))


FAMILY: dict[str, type[Member]] = {cls.name: cls for cls in (H1, H2, MS1, MS2, MS3)}


def roughness(path: Tensor, h: float) -> Tensor:
    """`h/2 Σ_j ‖w_{j+1} - w_j‖²`, the paper's regulariser of weights over depth (before its α).

    Args:
        path: `w_j` stacked along the first axis: the layers' `K` or `b`.
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
