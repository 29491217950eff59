"""Which blocks of the network's weights belong to which agent, and their initial values.

Legend of the shapes: `n = Σ d_i` rows of `p` (and of `q`), `L` layers, `F` features, `C` outputs,
`D_i = Σ_{l: K[i,l]≠0} d_l` what agent `i` reads. The dense weights and the agent's part of each,
for H2 (others have other `K` and `b`, of `d_i` or of `2d_i` rows: see `hdnn_dist.family`)::

    encoder.weight  (2n, F)     rows of p^i and q^i, columns of the features i sees    (2d_i, F_i)
    encoder.bias    (2n,)       rows of p^i and q^i                                    (2d_i,)
    Kp, Kq          (L, n, n)   block row i, columns of the agents it reads            (L, d_i, D_i)
    bp, bq          (L, n)      rows of i                                              (L, d_i)
    X               (n, n)      block row i, columns of the agents in R's row          (d_i, D_i')
    J (H1)          (2n, 2n)    rows of p^i and q^i, or (L, 2n, 2n)                    (2d_i, 2D_i')
    readout.weight  (C, 2n)     columns of p^i and q^i; readers only                   (C, 2d_i)
    readout.bias    (C,)        the root alone                                         (C,)

Where agents read out for themselves, the readout's rows and bias too are those of an agent: `C_i`
of its own in place of `C`.

Where a matrix acts on the whole state `y = [p; q]`, the order in an agent's part is
`[p^i; q^i]`, agent after agent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from hdnn_dist.family import Member
from hdnn_dist.sparsity import Patterns, offsets
from hdnn_dist.topology import Tree

Index = tuple[Tensor | slice, ...]


@dataclass(frozen=True)
class Architecture:
    """An H-DNN on a graph, without its weights: all that its dense and distributed forms share.

    Attributes:
        names: the agents.
        patterns: `d_i`, `T`, `R`, `S`.
        columns: per agent, the input features that it sees.
        features, outputs: sizes of the whole input and of the output.
        readers: the agents with a term `W^i [p^i; q^i]` in the outputs.
        tree: the tree that the terms are summed up; its root holds the labels.
        member: of the family, with its step `h` and its `σ`.
        encoder: "linear" for `[p; q] = E x + e`, "pad" for features copied into a state.
        enter: per agent, the state ("p" or "q") that "pad" writes to.
        train_X: whether `X` is trained.
        seed: of the initial weights.
        J: H1's skew-symmetric matrix, `(2n, 2n)` or `(L, 2n, 2n)`; None for the other members.
        X: H2's, `(n, n)`, where a user gives one.
        own: per agent, the outputs that it reads out by itself; None where all are summed up the
            tree.
    """

    names: tuple[str, ...]
    patterns: Patterns
    columns: tuple[tuple[int, ...], ...]
    features: int
    outputs: int
    readers: tuple[int, ...]
    tree: Tree
    member: Member
    encoder: Literal["linear", "pad"]
    enter: tuple[Literal["p", "q"], ...]
    train_X: bool
    seed: int
    J: Tensor | None = field(default=None, compare=False)
    X: Tensor | None = field(default=None, compare=False)
    own: tuple[tuple[int, ...], ...] | None = None

    @property
    def h(self) -> float:
        """Step of the discretisation."""
        return self.member.h

    @cached_property
    def n(self) -> int:
        """Size of the whole `p`, and of the whole `q`."""
        return sum(self.patterns.sizes)

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Where each agent's `p^i` lies in `p` (and `q^i` in `q`)."""
        return offsets(self.patterns.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each agent's state that a layer's matrix acts on: `d_i`, or `2 d_i`."""
        return tuple((2 if self.member.whole else 1) * d for d in self.patterns.sizes)

    @cached_property
    def coupling(self) -> tuple[str, ...]:
        """The matrix that couples states, if it is stored: "J" for H1, "X" where it is not `I`."""
        if self.J is not None:
            return ("J",)
        if self.member.name != "H2":
            return ()
        is_I = self.X is None and not self.train_X and self.patterns.R.is_local
        return () if is_I else ("X",)

    @property
    def constants(self) -> frozenset[str]:
        """Names of the weights that are not trained."""
        constant = {"encoder.weight", "encoder.bias"} if self.encoder == "pad" else set()
        return frozenset(constant | {"J"} | (set() if self.train_X else {"X"}))

    @cached_property
    def _reading(self) -> frozenset[int]:
        return frozenset(self.readers)

    def reads_out(self, i: int) -> tuple[int, ...]:
        """The outputs that agent `i` has a part in: its own, or the sums on their way."""
        return tuple(range(self.outputs)) if self.own is None else self.own[i]

    def finishes(self, i: int) -> bool:
        """Whether outputs are complete at agent `i`, which then holds the labels and a bias."""
        return i == self.tree.root if self.own is None else bool(self.own[i])

    def stacked(self, agents: tuple[int, ...], whole: bool = False) -> Tensor:
        """Positions in `p` of the states of `agents`, one after the other; if whole, in `y`."""
        rows = [torch.arange(self.n)[self.rows[l]] for l in agents]
        return torch.cat([torch.cat([r, self.n + r]) if whole else r for r in rows])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the dense weights."""
        n, L, C, N = self.n, self.patterns.layers, self.outputs, sum(self.sizes)
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.weight": (2 * n, self.features),
            "encoder.bias": (2 * n,),
            **dict.fromkeys(self.member.matrices, (L, N, N)),
            **dict.fromkeys(self.member.vectors, (L, N)),
            "readout.weight": (C, 2 * n),
            "readout.bias": (C,),
        }
        if self.J is not None:
            shapes["J"] = tuple(self.J.shape)
        return shapes | ({"X": (n, n)} if "X" in self.coupling else {})

    def blocks(self, i: int) -> dict[str, Index]:
        """Agent `i`'s part of each dense weight, as an index into it."""
        whole = self.member.whole
        both, rows = self.stacked((i,), whole=True), self.stacked((i,), whole)
        everything = slice(None)
        reads = self.stacked(self.patterns.K.rows[i], whole)
        blocks: dict[str, Index] = {
            "encoder.weight": (both[:, None], torch.tensor(self.columns[i], dtype=torch.long)),
            "encoder.bias": (both,),
            **dict.fromkeys(self.member.matrices, (everything, rows[:, None], reads)),
            **dict.fromkeys(self.member.vectors, (everything, rows)),
        }
        if self.coupling:
            couples = (rows[:, None], self.stacked(self.patterns.R.rows[i], whole))
            per_layer = self.J is not None and self.J.dim() == 3
            blocks[self.coupling[0]] = (everything, *couples) if per_layer else couples
        outputs = torch.tensor(self.reads_out(i), dtype=torch.long)
        if i in self._reading:
            blocks["readout.weight"] = (outputs[:, None], both)
        if self.finishes(i):
            blocks["readout.bias"] = (outputs,)
        return blocks

    def mask(self, i: int) -> Tensor:
        """`(L, rows, columns)` or `(L, 1, columns)`: where `i`'s part of `K` may be non-zero.

        Columns are those of the union of the layers' graphs, of which a layer may use fewer. Of an
        upper triangular matrix, so is the agent's own block.
        """
        row = self.patterns.K.rows[i]
        sizes = torch.tensor([self.sizes[l] for l in row])
        allowed = [torch.tensor([l in T.rows[i] for l in row]) for T in self.patterns.T]
        mask = torch.stack(allowed).repeat_interleave(sizes, dim=1)[:, None, :]
        if not self.member.upper:
            return mask
        r = self.sizes[i]  # the own block comes first: no agent before i is in an upper row
        own = torch.ones(r, mask.shape[2], dtype=torch.bool)
        own[:, :r] = own[:, :r].triu(1)
        return mask & own

    def _inputs(self, i: int) -> Tensor:
        """`(L, rows)`: how many entries of `y` each row of the layer's `K` (of `A - Aᵀ`) uses."""
        if not self.member.upper:
            return self.mask(i).sum(2).expand(-1, self.sizes[i])
        reads = [sum(self.sizes[l] for l in (T | T.T).rows[i]) - 1 for T in self.patterns.T]
        return torch.tensor(reads)[:, None].expand(-1, self.sizes[i])

    def initial(self, i: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Agent `i`'s initial weights; they depend on the seed and its name, not on packing.

        Gaussian with variance 1 over the number of inputs, biases zero. `X[i, i] = I` and
        `X[i, l] = I/(1 + |neighbours|)` (a rectangular identity if `d_i ≠ d_l`), so that its
        diagonal dominates and `J` is regular.
        """
        digest = hashlib.sha256(f"{self.seed}/{self.names[i]}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest[:7]))

        def gaussian(*shape: int, inputs: int, dtype: torch.dtype = dtype) -> Tensor:
            # Drawn in float64 whatever the dtype, so that both precisions start at one point.
            draw = torch.randn(*shape, generator=random, dtype=torch.float64)
            return draw.div(max(inputs, 1) ** 0.5).to(dtype)

        d, seen = self.patterns.sizes[i], len(self.columns[i])
        L, C = self.patterns.layers, len(self.reads_out(i))
        mask, N_i = self.mask(i), self.sizes[i]
        if self.encoder == "linear":
            encoder = gaussian(2 * d, seen, inputs=seen)
        else:
            encoder = torch.zeros(2 * d, seen, dtype=dtype)
            encoder[torch.arange(seen) + (d if self.enter[i] == "q" else 0), range(seen)] = 1
        weights = {"encoder.weight": encoder, "encoder.bias": torch.zeros(2 * d, dtype=dtype)}
        scale = self._inputs(i).clamp(min=1).double().rsqrt()[:, :, None] * mask
        for K, b in zip_longest(self.member.matrices, self.member.vectors):
            if K is not None:
                draw = gaussian(L, N_i, mask.shape[2], inputs=1, dtype=torch.float64)
                weights[K] = (draw * scale).to(dtype)
            weights[b] = torch.zeros(L, N_i, dtype=dtype)
        if self.J is not None:
            weights["J"] = self.J[self.blocks(i)["J"]].to(dtype)
        if self.X is not None:
            weights["X"] = self.X[self.blocks(i)["X"]].to(dtype)
        elif "X" in self.coupling:
            row = self.patterns.R.rows[i]
            weights["X"] = torch.cat(
                [
                    torch.eye(d, self.patterns.sizes[l], dtype=dtype) / (1 if l == i else len(row))
                    for l in row
                ],
                dim=1,
            )
        if i in self._reading:
            states = self.n if self.own is None else d
            weights["readout.weight"] = gaussian(C, 2 * d, inputs=2 * states)
        if self.finishes(i):
            weights["readout.bias"] = torch.zeros(C, dtype=dtype)
        return weights

    def assemble(self, parts: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The dense weights from every agent's: zeros where no agent owns an entry."""
        dtype = parts[0]["encoder.bias"].dtype
        dense = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.shapes().items()}
        for i, part in parts.items():
            for name, index in self.blocks(i).items():
                dense[name][index] = part[name]
        return dense

    def split(self, dense: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
        """Agent `i`'s part of the dense weights (or of their gradients)."""
        return {name: dense[name][index] for name, index in self.blocks(i).items()}

    def keep(self, agents: tuple[int, ...], readers: tuple[int, ...], tree: Tree) -> Architecture:
        """The network of some agents, numbered anew; blocks between them stay what they are.

        Args:
            agents: who is kept, in ascending order.
            readers: the readers among them, by their new numbers.
            tree: the tree that is left, by their new numbers.
        """
        own, outputs = self.own, self.outputs
        if own is not None:  # outputs are those of somebody
            left = sorted(k for i in agents for k in own[i])
            place = {k: new for new, k in enumerate(left)}
            own = tuple(tuple(place[k] for k in own[i]) for i in agents)
            outputs = len(left)
        y = self.stacked(agents)
        both = torch.cat([y, self.n + y])
        return replace(
            self,
            names=tuple(self.names[i] for i in agents),
            patterns=self.patterns.keep(agents),
            columns=tuple(self.columns[i] for i in agents),
            enter=tuple(self.enter[i] for i in agents),
            readers=readers,
            tree=tree,
            own=own,
            outputs=outputs,
            J=None if self.J is None else self.J[..., both[:, None], both],
            X=None if self.X is None else self.X[y[:, None], y],
        )

    def common_columns(self, i: int, weight: str, other: Architecture) -> tuple[Tensor, Tensor]:
        """Where the blocks that an agent has here and in `other` lie, in its part of a weight.

        Args:
            i: the agent, by its number here.
            weight: a `K`, `X` or `J`, whose columns are those of the agents that `i` reads.
            other: a network of other agents of the same job, `i` among them.

        Returns:
            Positions among the columns here, and those of the same numbers there.
        """

        def places(a: Architecture, i: int) -> dict[str, slice]:
            row = (a.patterns.R if weight in a.coupling else a.patterns.K).rows[i]
            return dict(
                zip((a.names[l] for l in row), offsets([a.sizes[l] for l in row]), strict=True)
            )

        here, there = places(self, i), places(other, other.names.index(self.names[i]))
        common = [name for name in here if name in there]

        def positions(of: dict[str, slice]) -> Tensor:
            return torch.cat([torch.arange(of[name].start, of[name].stop) for name in common])

        return positions(here), positions(there)

    def count(self, i: int, zeros: bool = False) -> int:
        """How many numbers agent `i` trains.

        Args:
            i: the agent.
            zeros: whether to count those too that are stored among them and stay zero: the rest of
                a triangle, and where other layers have an edge.
        """
        d, C, rows = self.patterns.sizes[i], len(self.reads_out(i)), self.sizes[i]
        graphs = [self.patterns.K] * self.patterns.layers if zeros else self.patterns.T
        entries = sum(sum(self.sizes[l] for l in T.rows[i]) for T in graphs) * rows
        if self.member.upper and not zeros:  # the own block is so too
            entries -= self.patterns.layers * rows * (rows + 1) // 2
        total = len(self.member.matrices) * entries
        total += len(self.member.vectors) * self.patterns.layers * rows
        if self.encoder == "linear":
            total += 2 * d * (len(self.columns[i]) + 1)
        if self.train_X:
            total += d * sum(self.patterns.sizes[l] for l in self.patterns.R.rows[i])
        return total + (2 * d * C if i in self._reading else 0) + (C if self.finishes(i) else 0)

    def count_dense(self) -> int:
        """How many numbers the same model trains on the complete graph."""
        n, C, N, L = self.n, self.outputs, sum(self.sizes), self.patterns.layers
        entries = N * (N - 1) // 2 if self.member.upper else N * N
        total = L * (len(self.member.matrices) * entries + len(self.member.vectors) * N)
        total += 2 * n * C + C
        if self.encoder == "linear":
            total += 2 * n * (self.features + 1)
        return total + (n * n if self.train_X else 0)
