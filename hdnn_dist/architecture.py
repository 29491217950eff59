"""Which blocks of the network's weights belong to which agent, and their initial values.

Legend of the shapes: `n = Σ d_i` rows of `p` (and of `q`), `L` layers, `F` features, `C` classes,
`D_i = Σ_{l: K[i,l]≠0} d_l` what agent `i` reads. The dense weights and the agent's part of each::

    encoder.weight  (2n, F)     rows of p^i and q^i, columns of the features i sees    (2d_i, F_i)
    encoder.bias    (2n,)       rows of p^i and q^i                                    (2d_i,)
    Kp, Kq          (L, n, n)   block row i, columns of the agents it reads            (L, d_i, D_i)
    bp, bq          (L, n)      rows of i                                              (L, d_i)
    X               (n, n)      block row i, columns of the agents in R's row          (d_i, D_i')
    readout.weight  (C, 2n)     columns of p^i and q^i; readers only                   (C, 2d_i)
    readout.bias    (C,)        the root alone                                         (C,)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hdnn_dist.sparsity import Patterns, offsets
from hdnn_dist.topology import Tree

Index = tuple[Tensor | slice, ...]


@dataclass(frozen=True)
class Architecture:
    """An H2-DNN on a graph, without its weights: all that its dense and distributed forms share.

    Attributes:
        names: the agents.
        patterns: `d_i`, `T`, `R`, `S`.
        columns: per agent, the input features that it sees.
        features, classes: sizes of the whole input and of the output.
        readers: the agents with a term `W^i [p^i; q^i]` in the scores.
        tree: the tree that the terms are summed up; its root holds the labels.
        h: step of the discretisation.
        activation: name of `σ` in `hdnn_dist.hamiltonian.ACTIVATIONS`.
        encoder: "linear" for `[p; q] = E x + e`, "pad" for features copied into a state.
        enter: per agent, the state ("p" or "q") that "pad" writes to.
        train_X: whether `X` is trained.
        seed: of the initial weights.
    """

    names: tuple[str, ...]
    patterns: Patterns
    columns: tuple[tuple[int, ...], ...]
    features: int
    classes: int
    readers: tuple[int, ...]
    tree: Tree
    h: float
    activation: str
    encoder: Literal["linear", "pad"]
    enter: tuple[Literal["p", "q"], ...]
    train_X: bool
    seed: int

    @property
    def n(self) -> int:
        """Size of the whole `p`, and of the whole `q`."""
        return sum(self.patterns.sizes)

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Where each agent's `p^i` lies in `p` (and `q^i` in `q`)."""
        return offsets(self.patterns.sizes)

    @cached_property
    def has_X(self) -> bool:
        """Whether `X` is anything but the identity; if not, it is neither stored nor applied."""
        return self.train_X or not self.patterns.R.is_local

    @property
    def constants(self) -> frozenset[str]:
        """Names of the weights that are not trained."""
        constant = {"encoder.weight", "encoder.bias"} if self.encoder == "pad" else set()
        return frozenset(constant if self.train_X else constant | {"X"})

    def stacked(self, agents: tuple[int, ...]) -> Tensor:
        """Positions in `p` of the states of `agents`, one after the other."""
        return torch.cat([torch.arange(self.n)[self.rows[l]] for l in agents])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the dense weights."""
        n, L, C = self.n, self.patterns.layers, self.classes
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.weight": (2 * n, self.features),
            "encoder.bias": (2 * n,),
            **{"Kp": (L, n, n), "bp": (L, n), "Kq": (L, n, n), "bq": (L, n)},
            "readout.weight": (C, 2 * n),
            "readout.bias": (C,),
        }
        return shapes | ({"X": (n, n)} if self.has_X else {})

    def blocks(self, i: int) -> dict[str, Index]:
        """Agent `i`'s part of each dense weight, as an index into it."""
        rows = torch.arange(self.n)[self.rows[i]]
        both = torch.cat([rows, self.n + rows])
        everything = slice(None)
        reads = self.stacked(self.patterns.K.rows[i])
        blocks: dict[str, Index] = {
            "encoder.weight": (both[:, None], torch.tensor(self.columns[i], dtype=torch.long)),
            "encoder.bias": (both,),
        }
        for state in "pq":
            blocks["K" + state] = (everything, rows[:, None], reads)
            blocks["b" + state] = (everything, rows)
        if self.has_X:
            blocks["X"] = (rows[:, None], self.stacked(self.patterns.R.rows[i]))
        if i in self.readers:
            blocks["readout.weight"] = (everything, both)
        if i == self.tree.root:
            blocks["readout.bias"] = (everything,)
        return blocks

    def layer_mask(self, i: int) -> Tensor:
        """`(L, D_i)`: where layer `j`'s block row of `K` may be non-zero, within the union's."""
        sizes = torch.tensor([self.patterns.sizes[l] for l in self.patterns.K.rows[i]])
        allowed = [
            torch.tensor([l in T.rows[i] for l in self.patterns.K.rows[i]]) for T in self.patterns.T
        ]
        return torch.stack(allowed).repeat_interleave(sizes, dim=1)

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
        L, C = self.patterns.layers, self.classes
        mask = self.layer_mask(i)
        if self.encoder == "linear":
            encoder = gaussian(2 * d, seen, inputs=seen)
        else:
            encoder = torch.zeros(2 * d, seen, dtype=dtype)
            encoder[torch.arange(seen) + (d if self.enter[i] == "q" else 0), range(seen)] = 1
        weights = {"encoder.weight": encoder, "encoder.bias": torch.zeros(2 * d, dtype=dtype)}
        scale = mask.sum(1).clamp(min=1).double().rsqrt()[:, None, None] * mask[:, None, :]
        for state in "pq":
            K = gaussian(L, d, mask.shape[1], inputs=1, dtype=torch.float64)
            weights["K" + state] = (K * scale).to(dtype)
            weights["b" + state] = torch.zeros(L, d, dtype=dtype)
        if self.has_X:
            row = self.patterns.R.rows[i]
            weights["X"] = torch.cat(
                [
                    torch.eye(d, self.patterns.sizes[l], dtype=dtype) / (1 if l == i else len(row))
                    for l in row
                ],
                dim=1,
            )
        if i in self.readers:
            weights["readout.weight"] = gaussian(C, 2 * d, inputs=2 * self.n)
        if i == self.tree.root:
            weights["readout.bias"] = torch.zeros(C, dtype=dtype)
        return weights

    def assemble(self, parts: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The dense weights from every agent's: zeros where no agent owns an entry."""
        dtype = parts[0]["bp"].dtype
        dense = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.shapes().items()}
        for i, part in parts.items():
            for name, index in self.blocks(i).items():
                dense[name][index] = part[name]
        return dense

    def split(self, dense: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
        """Agent `i`'s part of the dense weights (or of their gradients)."""
        return {name: dense[name][index] for name, index in self.blocks(i).items()}

    def count(self, i: int) -> int:
        """How many numbers agent `i` trains."""
        d, C = self.patterns.sizes[i], self.classes
        reads = [sum(self.patterns.sizes[l] for l in T.rows[i]) for T in self.patterns.T]
        total = 2 * sum(d * (D + 1) for D in reads)
        if self.encoder == "linear":
            total += 2 * d * (len(self.columns[i]) + 1)
        if self.train_X:
            total += d * sum(self.patterns.sizes[l] for l in self.patterns.R.rows[i])
        return total + (2 * d * C if i in self.readers else 0) + (C if i == self.tree.root else 0)

    def count_dense(self) -> int:
        """How many numbers the same model trains on the complete graph."""
        n, C = self.n, self.classes
        total = 2 * self.patterns.layers * n * (n + 1) + 2 * n * C + C
        if self.encoder == "linear":
            total += 2 * n * (self.features + 1)
        return total + (n * n if self.train_X else 0)
