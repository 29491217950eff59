"""What one agent computes, as a function of its weights and of what arrived. No network here.

Each operation that needs a neighbour is a generator: it yields `(round, {target: tensor})` and is
sent back `{source: tensor}`. Who carries the tensors is `hdnn_dist.transport`'s business, so the
same code runs in one process and over Ray actors.

Vectors are columns as in the paper: `y_dB` is agent i's state for a batch, `y_DB` the states of all
agents in its row of `T` stacked, `D = Σ_l d_l`. A bar is a cotangent: `ȳ = ∂loss/∂y`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from hdnn_dist.architecture import Architecture
from hdnn_dist.exchange import Plan, Round
from hdnn_dist.hamiltonian import ACTIVATIONS
from hdnn_dist.sparsity import BlockPattern

Result = TypeVar("Result")
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
        if not self.phase.messages:
            return y_dB
        inbox = yield self.phase, dict.fromkeys(self.serves, y_dB)
        return torch.cat([y_dB if l == self.i else inbox[l] for l in self.row])

    def scatter(self, z_DB: Tensor) -> Exchange[Tensor]:
        """Each block of `z_DB` out to the agent that it is for; the sum of own blocks `z_dB` in."""
        if not self.phase.messages:
            return z_DB
        parts = dict(zip(self.row, z_DB.split(self.sizes), strict=True))
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
        weights: agent `i`'s part of the weights (see `hdnn_dist.architecture`); used in place.

    Attributes:
        gradients: `∂loss/∂weight` by name, overwritten by every `backward`.
    """

    def __init__(
        self, architecture: Architecture, plan: Plan, i: int, weights: Mapping[str, Tensor]
    ) -> None:
        self.i, self.plan, self.h = i, plan, architecture.h
        self.activation = ACTIVATIONS[architecture.activation]
        self.constants = architecture.constants
        self.weights = dict(weights)
        self.gradients = {
            name: torch.zeros_like(value)
            for name, value in weights.items()
            if name not in self.constants
        }
        self.is_root = i == architecture.tree.root
        self.is_reader = i in architecture.readers
        self.classes = architecture.classes
        patterns = architecture.patterns
        rows: dict[Round, BlockRow] = {}  # layers with one graph share a round
        for T, phase in zip(patterns.T, plan.states, strict=True):
            if phase not in rows:
                rows[phase] = BlockRow(i, T, patterns.sizes, phase)
        self.rows = [rows[phase] for phase in plan.states]
        self.mix = BlockRow(i, patterns.R, patterns.sizes, plan.mix)
        # Columns of each layer's K within those kept, where graphs per layer keep fewer.
        mask = architecture.layer_mask(i)
        self.columns = None if mask.all() else [row.nonzero().flatten() for row in mask]
        self._tape: list[tuple[Tensor, Tensor, Tensor]] = []
        self._input = self._output = torch.empty(0)

    # --- forward ----------------------------------------------------------------------------

    def forward(self, x_FB: Tensor) -> Exchange[Tensor]:
        """Own features `(F_i, B)` to the class scores `(C, B)`, complete at the root alone."""
        self._tape.clear()
        self._input = x_FB
        y = torch.addmm(self._bias("encoder.bias"), self.weights["encoder.weight"], x_FB)
        p, q = y.chunk(2)
        for layer in range(len(self.rows)):
            u = yield from self._force(layer, "q", q)
            p = torch.sub(p, u, alpha=self.h)
            u = yield from self._force(layer, "p", p)
            q = torch.add(q, u, alpha=self.h)
        self._output = torch.cat([p, q])
        return (yield from self._readout(self._output))

    def _force(self, layer: int, state: str, y_dB: Tensor) -> Exchange[Tensor]:
        """Agent `i`'s rows of `Xᵀ Kqᵀ σ(Kq q + bq)`, or of `X Kpᵀ σ(Kp p + bp)`."""
        row, K = self.rows[layer], self._K(layer, state)
        y_DB = yield from row.gather(y_dB)
        s = self.activation.value(torch.addmm(self.weights["b" + state][layer, :, None], K, y_DB))
        z = yield from row.scatter(K.T @ s)
        if "X" in self.weights:
            if state == "p":
                z = yield from self.mix.gather(z)
                u = self.weights["X"] @ z
            else:
                u = yield from self.mix.scatter(self.weights["X"].T @ z)
        else:
            u = z
        self._tape.append((y_DB, s, z))
        return u

    def _readout(self, y: Tensor) -> Exchange[Tensor]:
        """`Σ_i W^i [p^i; q^i] + c`, summed up the tree."""
        if self.is_reader:
            scores = self.weights["readout.weight"] @ y
        else:
            scores = y.new_zeros(self.classes, y.shape[1])
        if self.is_root:
            scores = scores + self._bias("readout.bias")
        return (yield from self.collect(self.plan.collect, scores))

    # --- backward ---------------------------------------------------------------------------

    def backward(self, scores_bar: Tensor | None) -> Exchange[None]:
        """From `∂loss/∂scores` `(C, B)`, given at the root alone, to all `gradients`."""
        for gradient in self.gradients.values():
            gradient.zero_()
        y_bar = yield from self._readout_adjoint(scores_bar)
        p_bar, q_bar = y_bar.chunk(2)
        for layer in reversed(range(len(self.rows))):
            p_bar = p_bar + (yield from self._force_adjoint(layer, "p", self.h * q_bar))
            q_bar = q_bar + (yield from self._force_adjoint(layer, "q", -self.h * p_bar))
        if "encoder.weight" in self.gradients:
            y_bar = torch.cat([p_bar, q_bar])
            self.gradients["encoder.weight"].addmm_(y_bar, self._input.T)
            self.gradients["encoder.bias"] += y_bar.sum(1)

    def _force_adjoint(self, layer: int, state: str, u_bar: Tensor) -> Exchange[Tensor]:
        """The adjoint of `_force`: `ū` to `ȳ`, each round of it turned round, in reverse.

        With `a = K y + b`, `s = σ(a)`, `z = Kᵀ s`: `z̄ = X ū` (or `Xᵀ ū`), `s̄ = K z̄`,
        `ā = σ'(a) s̄`, `ȳ = Kᵀ ā`, `K̄ = s z̄ᵀ + ā yᵀ`, `b̄ = ā 1`.
        """
        row, K = self.rows[layer], self._K(layer, state)
        y_DB, s, z = self._tape.pop()
        if "X" in self.weights:
            if state == "p":  # u = X gather(z)
                self._accumulate("X", u_bar @ z.T)
                z_bar = yield from self.mix.scatter(self.weights["X"].T @ u_bar)
            else:  # u = scatter(Xᵀ z)
                u_bar_DB = yield from self.mix.gather(u_bar)
                self._accumulate("X", z @ u_bar_DB.T)
                z_bar = self.weights["X"] @ u_bar_DB
        else:
            z_bar = u_bar
        z_bar_DB = yield from row.gather(z_bar)
        a_bar = self.activation.slope(s) * (K @ z_bar_DB)
        self._add_K(layer, state, (s, z_bar_DB), (a_bar, y_DB))
        self.gradients["b" + state][layer] += a_bar.sum(1)
        return (yield from row.scatter(K.T @ a_bar))

    def _readout_adjoint(self, scores_bar: Tensor | None) -> Exchange[Tensor]:
        """`ȳ^i = W^iᵀ s̄`, `W̄^i = s̄ y^iᵀ`, `c̄ = s̄ 1`: the cotangent comes down the tree."""
        y = self._output
        if scores_bar is None:
            scores_bar = y.new_zeros(self.classes, y.shape[1])
        scores_bar = yield from self.spread(self.plan.collect, scores_bar)
        if self.is_root:
            self.gradients["readout.bias"] += scores_bar.sum(1)
        if not self.is_reader:
            return torch.zeros_like(y)
        self.gradients["readout.weight"].addmm_(scores_bar, y.T)
        return self.weights["readout.weight"].T @ scores_bar

    # --- sums over a tree -------------------------------------------------------------------

    def collect(self, rounds: tuple[Round, ...], value: Tensor) -> Exchange[Tensor]:
        """The sum of everybody's value, complete at the root: children's sums are added."""
        for phase in rounds:
            inbox = yield phase, {m.target: value for m in phase.outbound.get(self.i, ())}
            for m in phase.inbound.get(self.i, ()):
                value = value + inbox[m.source]
        return value

    def spread(self, rounds: tuple[Round, ...], value: Tensor) -> Exchange[Tensor]:
        """The adjoint of `collect`: the root's value, copied down to everybody."""
        for phase in reversed(rounds):
            down = phase.adjoint
            inbox = yield down, {m.target: value for m in down.outbound.get(self.i, ())}
            for m in down.inbound.get(self.i, ()):
                value = inbox[m.source]
        return value

    # --- weights ----------------------------------------------------------------------------

    def _bias(self, name: str) -> Tensor:
        return self.weights[name][:, None]

    def _K(self, layer: int, state: str) -> Tensor:
        K = self.weights["K" + state][layer]
        return K if self.columns is None else K[:, self.columns[layer]]

    def _add_K(self, layer: int, state: str, *outer: tuple[Tensor, Tensor]) -> None:
        """`K̄ += u vᵀ` for each pair."""
        K_bar = self.gradients["K" + state][layer]
        for u, v in outer:
            if self.columns is None:
                K_bar.addmm_(u, v.T)
            else:
                K_bar[:, self.columns[layer]] += u @ v.T

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        if name in self.gradients:
            self.gradients[name] += gradient
