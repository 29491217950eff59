"""What one agent computes, as a function of its weights and of what arrived. No network here.

Each operation that needs a neighbour is a generator: it yields `(round, {target: tensor})` and is
sent back `{source: tensor}`, for the rounds in which the agent takes part. Who carries the tensors
is `hdnn_dist.transport`'s business, so the same code runs in one process and over Ray actors.

Vectors are columns as in the paper: `y_dB` is agent i's state for a batch (its `p`, its `q`, or
both for a member that updates them at once), `y_DB` those of all agents in its row of `T` stacked,
`D = Σ_l d_l`. A bar is a cotangent: `ȳ = ∂loss/∂y`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from hdnn_dist.architecture import Architecture
from hdnn_dist.exchange import Plan, Round
from hdnn_dist.family import State, Update
from hdnn_dist.sparsity import BlockPattern

Result = TypeVar("Result")
Rounds = tuple[Round, ...]
Request = tuple[Round, dict[int, Tensor]]
Exchange = Generator[Request, dict[int, Tensor], Result]


class BlockRow:
    """The exchange that a product with block row `i`, or with its transpose, needs.

    `gather` and `scatter` are adjoint: `Σ_i <gather(y)^i, z^i> = Σ_l <y^l, scatter(z)^l>`.

    Args:
        i: the agent.
        pattern: of the matrix; row `i` are the agents whose states `i` uses.
        sizes: `d_l` of all agents.
        phase: the round that brings those states.
    """

    def __init__(self, i: int, pattern: BlockPattern, sizes: tuple[int, ...], phase: Round) -> None:
        self.i = i
        self.row = pattern.rows[i]
        self.sizes = [sizes[l] for l in self.row]
        self.phase = phase
        self.asks = [m.source for m in phase.inbound.get(i, ())]
        self.serves = [m.target for m in phase.outbound.get(i, ())]

    def gather(self, y_dB: Tensor) -> Exchange[Tensor]:
        """Own state out to whoever uses it; the stacked states `y_DB` of the row in."""
        if not (self.asks or self.serves):
            return y_dB
        inbox = yield self.phase, dict.fromkeys(self.serves, y_dB)
        return torch.cat([y_dB if l == self.i else inbox[l] for l in self.row])

    def scatter(self, z_DB: Tensor) -> Exchange[Tensor]:
        """Each block of `z_DB` out to the agent that it is for; the sum of own blocks `z_dB` in."""
        if not (self.asks or self.serves):
            return z_DB
        parts = dict(zip(self.row, z_DB.split_with_sizes(self.sizes), strict=True))
        inbox = yield self.phase.adjoint, {l: parts[l] for l in self.asks}
        total: Tensor = parts[self.i]
        for l in self.serves:  # ascending: the same sum however the agents are packed
            total = total + inbox[l]
        return total


class AgentNode:
    """Agent `i`'s share of the network: forward, and the hand-written adjoint of each round.

    Args:
        architecture: the network.
        plan: its rounds.
        i: which agent this is.
        weights: agent `i`'s part of the weights (see `hdnn_dist.architecture`); used in place, on
            the device that they are on.

    Attributes:
        gradients: `∂loss/∂weight` by name, overwritten by every `backward`.

    With `plan.recompute` the tape holds one half step at a time: the backward pass takes the half
    steps back, in the rounds that they took forward, so that memory does not grow with the depth.
    """

    def __init__(
        self, architecture: Architecture, plan: Plan, i: int, weights: Mapping[str, Tensor]
    ) -> None:
        self.i, self.plan, self.h = i, plan, architecture.h
        self.member, self.activation = architecture.member, architecture.member.activation
        self.constants = architecture.constants
        self.weights = dict(weights)
        self.gradients = {
            name: torch.zeros_like(value)
            for name, value in weights.items()
            if name not in self.constants
        }
        self.finishes = architecture.finishes(i)
        self.is_reader = "readout.weight" in weights
        self.outputs = len(architecture.reads_out(i))
        patterns = architecture.patterns
        rows: dict[Round, BlockRow] = {}  # layers with one graph share a round
        for T, phase in zip(patterns.T, plan.states, strict=True):
            if phase not in rows:
                rows[phase] = BlockRow(i, T, architecture.sizes, phase)
        self.rows = [rows[phase] for phase in plan.states]
        self.mix = BlockRow(i, patterns.R, architecture.sizes, plan.mix)
        self.device = next(iter(weights.values())).device
        columns, mask = _kept(architecture, i)
        self.columns = None if columns is None else [row.to(self.device) for row in columns]
        self.mask = None if mask is None else mask.to(self.device)
        self._tape: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        # Of each half step's source, whose sum is finite if all of it is. One tensor: small ones
        # that stay among large ones that go would scatter them over ever more memory.
        updates = len(self.member.updates)
        self._sums = None
        if plan.recompute:
            shape = len(self.rows), updates
            self._sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self._input = self._first = self._output = torch.empty(0)

    # --- forward ----------------------------------------------------------------------------

    def forward(self, x_FB: Tensor) -> Exchange[Tensor]:
        """Own features `(F_i, B)` to outputs `(C, B)`: own ones, or all, complete at the root."""
        self.forget()
        self._input = x_FB
        y = self._first = self.encode(x_FB)
        for layer in range(len(self.rows)):
            y = yield from self.layer(layer, y)
        self._output = y
        return (yield from self._readout(y))

    def encode(self, x_FB: Tensor) -> Tensor:
        """Own features `(F_i, B)` to own first states `(2d, B)`."""
        return torch.addmm(self._bias("encoder.bias"), self.weights["encoder.weight"], x_FB)

    def layer(self, layer: int, y: Tensor) -> Exchange[Tensor]:
        """One layer of own states, `(2d, B) -> (2d, B)`: its updates, one after the other."""
        states = self._states(y)
        for k, update in enumerate(self.member.updates):
            u = yield from self._force(layer, update, states[update.source])
            target = states[update.target]
            states[update.target] = torch.add(target, u, alpha=update.sign * self.h)
            if self._sums is not None:
                self._tape.clear()
                self._sums[layer, k] = states[update.source].sum()
        return _joined(states)

    def _force(self, layer: int, update: Update, y_dB: Tensor) -> Exchange[Tensor]:
        """Agent `i`'s rows of `C g`, `g = Kᵀ s` or `s`, `s = σ(a + b)`, `a = K y`, … (`Update`)."""
        row, K = self.rows[layer], self._K(layer, update.K)
        a, y_DB = yield from self._argument(layer, update, y_dB)
        s = z = self.activation.value(a)
        if update.pull:
            z = yield from row.scatter(K.T @ s)
        u, z = yield from self._couple(layer, update, z)
        self._tape.append((y_dB, y_DB, s, z))
        return u

    def _argument(
        self, layer: int, update: Update, y_dB: Tensor
    ) -> Exchange[tuple[Tensor, Tensor]]:
        """Own rows of `a + b`, and the states `y_DB` that they were made of."""
        row, K = self.rows[layer], self._K(layer, update.K)
        a, y_DB = self.weights[update.b][layer, :, None], y_dB
        if update.argument != "-KT":
            y_DB = yield from row.gather(y_dB)
            a = torch.addmm(a, K, y_DB)
        if update.argument != "K":
            a = a - (yield from row.scatter(K.T @ y_dB))
        return a, y_DB

    def _couple(self, layer: int, update: Update, z: Tensor) -> Exchange[tuple[Tensor, Tensor]]:
        """`C z` with `C` = `J`, `X`, `Xᵀ` or `I`, and `z` as its adjoint wants it."""
        C = self._C(layer, update)
        if C is None:
            return z, z
        if update.coupling == "XT":
            return (yield from self.mix.scatter(C.T @ z)), z
        z = yield from self.mix.gather(z)
        return C @ z, z

    def _readout(self, y: Tensor) -> Exchange[Tensor]:
        """`Σ_i W^i [p^i; q^i] + c`, summed up the tree; `W^i [p^i; q^i] + c^i` without one."""
        if self.is_reader:
            scores = self.weights["readout.weight"] @ y
        else:
            scores = y.new_zeros(self.outputs, y.shape[1])
        if self.finishes:
            scores = scores + self._bias("readout.bias")
        return (yield from self.collect(self.plan.collect_of, scores))

    # --- backward ---------------------------------------------------------------------------

    def backward(self, scores_bar: Tensor | None) -> Exchange[Tensor]:
        """From `∂loss/∂scores` `(C, B)`, given where scores are complete, to all `gradients`.

        Returns:
            Norms of own rows of the cotangents `∂loss/∂y_j` of the states, `j = 0 … N`, in float64.
        """
        for gradient in self.gradients.values():
            gradient.zero_()
        norms = torch.empty(len(self.rows) + 1, dtype=torch.float64, device=self.device)

        def watch(j: int, y_bar: Tensor) -> None:
            norms[j] = torch.linalg.vector_norm(y_bar, dtype=torch.float64)

        y_bar = yield from self._readout_adjoint(scores_bar)
        y_bar = yield from self.pull_back(self._output, y_bar, watch)
        if "encoder.weight" in self.gradients:
            self.gradients["encoder.weight"].addmm_(y_bar, self._input.T)
            self.gradients["encoder.bias"] += y_bar.sum(1)
        return norms

    def pull_back(
        self, y: Tensor, y_bar: Tensor, watch: Callable[[int, Tensor], object]
    ) -> Exchange[Tensor]:
        """The adjoint of all layers: from `ȳ_N` `(2d, B)` to `ȳ_0`; adds to `gradients`.

        Args:
            y: the last state `y_N`, which those before it are recomputed from.
            y_bar: its cotangent.
            watch: is shown `j` and `ȳ_j`, `j = N … 0`.
        """
        states = self._states(y)
        watch(len(self.rows), y_bar)
        for layer in reversed(range(len(self.rows))):
            bars = self._states(y_bar)
            for update in reversed(self.member.updates):
                if self.plan.recompute:
                    u = yield from self._force(layer, update, states[update.source])
                    target = states[update.target]
                    states[update.target] = torch.sub(target, u, alpha=update.sign * self.h)
                u_bar = update.sign * self.h * bars[update.target]
                more = yield from self._force_adjoint(layer, update, u_bar)
                bars[update.source] = bars[update.source] + more
            y_bar = _joined(bars)
            watch(layer, y_bar)
        return y_bar

    def _force_adjoint(self, layer: int, update: Update, u_bar: Tensor) -> Exchange[Tensor]:
        """The adjoint of `_force`: `ū` to `ȳ`, each round of it turned round, in reverse.

        `z̄ = Cᵀ ū`; with a pull-back `s̄ = K z̄`, `K̄ = s z̄ᵀ`, else `s̄ = z̄`; `ā = σ'(a) s̄`, `b̄ = ā 1`;
        from `a = K y`: `ȳ = Kᵀ ā`, `K̄ += ā yᵀ`; from `a = -Kᵀ y`: `ȳ = -K ā`, `K̄ -= y āᵀ`.
        """
        row, K = self.rows[layer], self._K(layer, update.K)
        y_dB, y_DB, s, z = self._tape.pop()
        z_bar = yield from self._couple_adjoint(layer, update, u_bar, z)
        products: list[tuple[Tensor, Tensor]] = []  # K̄ is the sum of their u vᵀ
        if update.pull:
            z_bar_DB = yield from row.gather(z_bar)
            products.append((s, z_bar_DB))
            z_bar = K @ z_bar_DB
        a_bar = self.activation.slope(s) * z_bar
        self.gradients[update.b][layer] += a_bar.sum(1)
        y_bar = torch.zeros_like(y_dB)
        if update.argument != "K":
            a_bar_DB = yield from row.gather(a_bar)
            products.append((-y_dB, a_bar_DB))
            y_bar = -(K @ a_bar_DB)
        if update.argument != "-KT":
            products.append((a_bar, y_DB))
            y_bar = y_bar + (yield from row.scatter(K.T @ a_bar))
        self._add_K(layer, update.K, products)
        return y_bar

    def _couple_adjoint(
        self, layer: int, update: Update, u_bar: Tensor, z: Tensor
    ) -> Exchange[Tensor]:
        """`z̄ = Cᵀ ū`, and the gradient of `C` where it is trained."""
        C = self._C(layer, update)
        if C is None:
            return u_bar
        if update.coupling == "XT":  # u = scatter(Xᵀ z)
            u_bar = yield from self.mix.gather(u_bar)
            self._accumulate("X", z @ u_bar.T)
            return C @ u_bar
        self._accumulate(update.coupling, u_bar @ z.T)  # u = C gather(z)
        return (yield from self.mix.scatter(C.T @ u_bar))

    def _readout_adjoint(self, scores_bar: Tensor | None) -> Exchange[Tensor]:
        """`ȳ^i = W^iᵀ s̄`, `W̄^i = s̄ y^iᵀ`, `c̄ = s̄ 1`: the cotangent comes down the tree."""
        y = self._output
        if scores_bar is None:
            scores_bar = y.new_zeros(self.outputs, y.shape[1])
        scores_bar = yield from self.spread(self.plan.collect_of, scores_bar)
        if self.finishes:
            self.gradients["readout.bias"] += scores_bar.sum(1)
        if not self.is_reader:
            return torch.zeros_like(y)
        self.gradients["readout.weight"].addmm_(scores_bar, y.T)
        return self.weights["readout.weight"].T @ scores_bar

    # --- analysis ---------------------------------------------------------------------------

    def finite(self) -> Tensor:
        """Whether all own states are finite, after a forward pass: a Boolean on the device.

        Every layer adds to a state, so that one that is not finite stays so to the end.
        """
        return torch.isfinite(self._output).all()

    def first_nonfinite_state(self) -> int | None:
        """The first `j` for which own `y_j` is not finite, after a forward pass; None for none."""
        if self.finite():
            return None
        if not torch.isfinite(self._first).all():
            return 0
        updates = len(self.member.updates)
        kept = self._sums.flatten() if self._sums is not None else [y for y, *_ in self._tape]
        for k, y in enumerate(kept):
            if not torch.isfinite(y).all():
                return math.ceil(k / updates)  # the second update's source is new already
        return len(self.rows)

    def forget(self) -> None:
        """Drop what a forward pass without a backward pass has kept."""
        self._tape.clear()

    def energy(self, layer: int, y: Tensor) -> Exchange[Tensor]:
        """Own terms of `H_j(y) = Σ σ̃(K y + b)` of a layer at own states `(2d, B)`: `(B,)`."""
        assert self.activation.integral is not None, "the energy needs the integral of σ"
        states, total = self._states(y), y.new_zeros(y.shape[1])
        for update in self.member.updates:
            a, _ = yield from self._argument(layer, update, states[update.source])
            total = total + self.activation.integral(a).sum(0)
        return total

    def interconnect(self, y: Tensor) -> Exchange[Tensor]:
        """Own rows of `J y` `(2d, B)`: the member's `J` if it is one for all layers, else `J1`."""
        J, X = self.weights.get("J"), self.weights.get("X")
        if J is not None and J.dim() == 2:
            return J @ (yield from self.mix.gather(y))
        p, q = y.chunk(2)
        if X is not None:
            upper = yield from self.mix.scatter(X.T @ q)
            return torch.cat([-upper, X @ (yield from self.mix.gather(p))])
        sign = -1 if self.member.name == "H2" else 1
        return torch.cat([sign * q, -sign * p])

    # --- sums over a tree -------------------------------------------------------------------

    def collect(self, rounds: Mapping[int, Rounds], value: Tensor) -> Exchange[Tensor]:
        """The sum of everybody's value, complete at the root: children's sums are added.

        Args:
            rounds: of the tree, per agent those in which it takes part.
            value: own.
        """
        for phase in rounds.get(self.i, ()):
            inbox = yield phase, {m.target: value for m in phase.outbound.get(self.i, ())}
            for m in phase.inbound.get(self.i, ()):
                value = value + inbox[m.source]
        return value

    def spread(self, rounds: Mapping[int, Rounds], value: Tensor) -> Exchange[Tensor]:
        """The adjoint of `collect`: the root's value, copied down to everybody."""
        for phase in reversed(rounds.get(self.i, ())):
            down = phase.adjoint
            inbox = yield down, {m.target: value for m in down.outbound.get(self.i, ())}
            for m in down.inbound.get(self.i, ()):
                # A copy lies aligned in memory; products of unaligned numbers round differently.
                value = inbox[m.source].clone()
        return value

    # --- weights ----------------------------------------------------------------------------

    def _bias(self, name: str) -> Tensor:
        return self.weights[name][:, None]

    def _states(self, y: Tensor) -> dict[State, Tensor]:
        """Own states by name, as the member updates them."""
        if self.member.whole:
            return {"y": y}
        p, q = y.chunk(2)
        return {"p": p, "q": q}

    def _K(self, layer: int, name: str) -> Tensor:
        K = self.weights[name][layer]
        return K if self.columns is None else K[:, self.columns[layer]]

    def _C(self, layer: int, update: Update) -> Tensor | None:
        """Own rows of the coupling of an update; None for the identity."""
        C = self.weights.get(update.coupling.removesuffix("T"))
        return C if C is None or C.dim() == 2 else C[layer]

    def _add_K(self, layer: int, name: str, products: list[tuple[Tensor, Tensor]]) -> None:
        """`K̄ += u vᵀ` for each pair, where this layer may have entries."""
        K_bar = self.gradients[name][layer]
        for u, v in products:
            if self.columns is None:
                K_bar.addmm_(u, v.T)
            else:
                K_bar[:, self.columns[layer]] += u @ v.T
        if self.mask is not None:
            K_bar *= self.mask[layer]

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        if name in self.gradients:
            self.gradients[name] += gradient


def _kept(architecture: Architecture, i: int) -> tuple[list[Tensor] | None, Tensor | None]:
    """Of each layer's K the columns within those kept, and the mask, where graphs keep fewer."""
    mask = architecture.mask(i)
    columns = mask.any(1)
    if architecture.member.upper:  # the own block comes first, and its first column is empty
        columns[:, : architecture.sizes[i]] = True
    kept = None if columns.all() else [row.nonzero().flatten() for row in columns]
    return kept, None if mask.all() else mask


def _joined(states: dict[State, Tensor]) -> Tensor:
    return states["y"] if "y" in states else torch.cat([states["p"], states["q"]])
