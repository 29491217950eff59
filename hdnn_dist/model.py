"""The family in one process: ordinary `nn.Module`s, and the oracle for everything distributed."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdnn_dist import engine
from hdnn_dist.architecture import Architecture
from hdnn_dist.errors import UserError
from hdnn_dist.family import FAMILY, roughness
from hdnn_dist.hamiltonian import J1, J2, Activation, activation_of, checked


class Layers(nn.Module):
    """`N` layers of a member of the family: `y -> y_N`, of the shape of `y`.

    Vectors `(B, features)`, or images `(B, features, …)` on whose every pixel the layers act alike.
    Weights are stacked over the layers: `K (layers, …)`, Gaussian with variance 1/inputs, `b` zero.

    Args:
        member: "H1", "H2", "MS1", "MS2" or "MS3" (see `hdnn_dist.family`).
        features: `N`, the size of `y = [p, q]`; even but for H1 with a `J` of its own and for MS2.
        layers: depth.
        h: step of the discretisation.
        activation: name of `σ`, or an `Activation`.
        J: for H1: "J1", "J2", a skew-symmetric matrix `(N, N)`, or one a layer `(layers, N, N)`.
        X: for H2: any matrix `(N/2, N/2)`; default: the identity. Like `J`, in the default type.
        train_X: whether `X` is trained.
        activations: "store" the states for the backward pass, or "recompute" them by the inverse of
            each layer, in memory that does not depend on the depth: H2, MS1 and MS3.

    Raises:
        UserError: an unknown name, an odd size, or a `J` or `X` that the member does not take.
    """

    def __init__(
        self,
        member: str,
        features: int,
        layers: int,
        h: float = 0.1,
        activation: str | Activation = "tanh",
        J: str | Tensor | None = None,
        X: Tensor | None = None,
        train_X: bool = False,
        activations: Literal["store", "recompute"] = "store",
    ) -> None:
        super().__init__()
        if member not in FAMILY:
            raise UserError(f"no member {member!r} in the family", f"use one of {[*FAMILY]}")
        if not (features >= 1 and layers >= 1 and 0 < h < math.inf):
            raise UserError(
                f"features = {features}, layers = {layers}, h = {h}", "give positive numbers"
            )
        if isinstance(activation, str):
            self.member = FAMILY[member](h, activation_of(activation))
        else:
            self.member = FAMILY[member](h, checked(activation, "given"))
        self.features, self.layers = features, layers
        if activations not in ("store", "recompute"):
            raise UserError(f"activations = {activations!r}", "use store or recompute")
        if activations == "recompute" and not self.member.invertible:
            raise UserError(
                f"{member} has no closed inverse that activations could be recomputed by",
                "use activations='store', or H2, MS1 or MS3",
            )
        self.activations = activations
        self._rooms = engine.Buffers()
        needs_halves = member in ("H2", "MS1", "MS3") or (
            member == "H1" and (J is None or (isinstance(J, str) and J == "J1"))
        )
        if features % 2 and needs_halves:
            raise UserError(f"{member} splits y into p and q, but features = {features}", "add one")
        size = features if self.member.whole else features // 2
        for name in self.member.matrices:
            K = torch.randn(layers, size, size) / size**0.5
            self.register_parameter(name, nn.Parameter(K.triu(1) if self.member.upper else K))
        for name in self.member.vectors:
            length = features if self.member.whole else features // 2
            self.register_parameter(name, nn.Parameter(torch.zeros(layers, length)))
        if J is not None:
            if member != "H1":
                raise UserError(f"J given, but that of {member} is fixed", "leave J out, or use H1")
            self.register_buffer("J", _skew_symmetric(J, features, layers))
        if X is not None or train_X:
            if member != "H2":
                raise UserError(f"X given, but {member} has none", "leave X out, or use H2")
            like = self.get_parameter(self.member.matrices[0])
            X = torch.eye(size) if X is None else torch.as_tensor(X).to(like)
            if X.shape != (size, size):
                raise UserError(f"X is {tuple(X.shape)}", f"give it as ({size}, {size})")
            if train_X:
                self.register_parameter("X", nn.Parameter(X.clone()))
            else:
                self.register_buffer("X", X.clone())

    def weights(self) -> list[dict[str, Tensor]]:
        """Each layer's weights by name, as `Member.step` takes them."""
        return _layered(self._named(), self.layers)

    def _named(self) -> dict[str, Tensor]:
        names = (*self.member.matrices, *self.member.vectors, "J", "X")
        return {name: self._weight(name) for name in names if hasattr(self, name)}

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        return weight.triu(1) if self.member.upper and name in self.member.matrices else weight

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{self.member.name}, features={self.features}, layers={self.layers}, h={self.member.h}"
        )

    def propagate(self, y: Tensor) -> list[Tensor]:
        """The states `y_0 … y_N`, features last: each `(B, …, features)`."""
        return self.member.propagate(y, self.weights())

    def forward(self, y: Tensor) -> Tensor:
        """`y_N` of `y_0`, `(B, features)` or `(B, features, …)`.

        Raises:
            UserError: the second axis of `y` is not the features.
        """
        self.check_states(y)
        columns = y.movedim(1, 0)  # every pixel of every sample is a state of its own
        weights = self._named()
        if self.member.name == "H1" and "J" not in weights:
            weights["J"] = J1(weights["b"][0])
        coupled, recompute = "J" in weights or "X" in weights, self.activations == "recompute"
        stack = engine.Stack.of(self.member, coupled, recompute=recompute)
        states = engine.run(stack, self.member, columns.flatten(1), weights, self._rooms)
        return states.reshape(columns.shape).movedim(0, 1)

    def check_states(self, y: Tensor) -> None:
        """Refuse what `forward` cannot take.

        Raises:
            UserError: the second axis of `y` is not the features.
        """
        if y.dim() < 2 or y.shape[1] != self.features:
            raise UserError(
                f"y is {tuple(y.shape)}",
                f"give it as (B, {self.features}) or (B, {self.features}, …)",
            )

    def regulariser(self) -> Tensor:
        """`h/2 Σ_j (‖K_{j+1} - K_j‖² + ‖b_{j+1} - b_j‖²)`, to be weighted by α."""
        names = (*self.member.matrices, *self.member.vectors)
        return torch.stack([roughness(self._weight(n), self.member.h) for n in names]).sum()


class HDNN(nn.Module):
    """`x -> y = E x + e -> N layers of the family -> W y + c` on a graph, with dense weights.

    Entries that no agent owns are zero and stay so: each weight is multiplied by its mask. Names
    and shapes of the weights are those of `hdnn_dist.architecture`.

    Args:
        architecture: sizes, patterns and the rest.
        dtype: of the weights.
        fast: whether `forward` uses `hdnn_dist.engine`, on block rows where these cost less; if
            not, it is plain autograd.
    """

    def __init__(
        self, architecture: Architecture, dtype: torch.dtype = torch.float32, fast: bool = False
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self._rooms = engine.Buffers() if fast else None
        self.member = architecture.member
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

    def weights(self) -> list[dict[str, Tensor]]:
        """Each layer's masked weights by name, as `Member.step` takes them."""
        return _layered(self._named(), self.architecture.patterns.layers)

    def _named(self) -> dict[str, Tensor]:
        names = (*self.member.matrices, *self.member.vectors, *self.architecture.coupling)
        return {name: self.weight(name) for name in names}

    def encode(self, x: Tensor) -> Tensor:
        """Input `(B, F)` to the first state `y = [p; q]`, `(B, 2n)`."""
        return F.linear(x, self.weight("encoder.weight"), self.weight("encoder.bias"))

    def propagate(self, y: Tensor) -> list[Tensor]:
        """The states `y_0 … y_N`, each `(B, 2n)`."""
        return self.member.propagate(y, self.weights())

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `(B, C)` of the input `(B, F)`."""
        y = self.encode(x)
        y = self.propagate(y)[-1] if self._rooms is None else self._run(y, self._rooms)
        return F.linear(y, self.weight("readout.weight"), self.weight("readout.bias"))

    def _run(self, y: Tensor, buffers: engine.Buffers) -> Tensor:
        """`y_N` of `y_0` by the engine."""
        patterns, member = self.architecture.patterns, self.member
        weights, sizes, rows = self._named(), set(patterns.sizes), None
        if member.name in ("H2", "MS3") and not self.architecture.coupling and len(sizes) == 1:
            [d] = sizes
            if engine.rows_are_faster(patterns.K, d, len(y), y.device, y.dtype):
                rows = engine.Rows.of(patterns.K, d, y.device)
                weights |= {name: rows.take(weights[name]) for name in member.matrices}
        stack = engine.Stack.of(member, bool(self.architecture.coupling), rows)
        return engine.run(stack, member, y.T, weights, buffers).T

    def regulariser(self) -> Tensor:
        """`h/2 Σ_j (‖K_{j+1} - K_j‖² + ‖b_{j+1} - b_j‖²)`, to be weighted by α."""
        path = [self.weight(name) for name in (*self.member.matrices, *self.member.vectors)]
        return torch.stack([roughness(w, self.architecture.h) for w in path]).sum()


def _layered(named: dict[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
    """Stacked weights layer by layer; `X`, and a `J` that is the same everywhere, in each."""
    per_layer = {
        name: [w] * layers if name == "X" or (name == "J" and w.dim() == 2) else list(w.unbind())
        for name, w in named.items()
    }
    return [{name: ws[j] for name, ws in per_layer.items()} for j in range(layers)]


def _skew_symmetric(J: str | Tensor, features: int, layers: int) -> Tensor:
    """A named `J`, or a given one that has been looked at, of the default type."""
    if isinstance(J, str):
        named = {"J1": J1, "J2": J2}
        if J not in named:
            raise UserError(f"no J is named {J!r}", "use J1, J2 or a skew-symmetric matrix")
        return named[J](torch.empty(features))
    J = torch.as_tensor(J).to(torch.get_default_dtype())
    if J.shape not in ((features, features), (layers, features, features)):
        raise UserError(
            f"J is {tuple(J.shape)}",
            f"give it as ({features}, {features}), or ({layers}, {features}, {features})",
        )
    if not torch.equal(J, -J.mT):
        raise UserError("J is not skew-symmetric", "give a J with Jᵀ = -J")
    return J.clone()


def _ownership(architecture: Architecture, i: int) -> dict[str, Tensor]:
    """Ones in the shape of each of agent `i`'s weights, zeros where a layer may have no entry."""
    ones = {name: torch.ones_like(value) for name, value in architecture.initial(i).items()}
    for name in architecture.member.matrices:
        ones[name] = architecture.mask(i).expand_as(ones[name]).to(ones[name].dtype)
    return ones
