"""Block sparsity patterns as values.

A pattern `P` over `M` agents is a binary `M×M` matrix. A matrix with blocks `W[i, l] ∈ R^{d_i×d_l}`
*has* the pattern `P` when `W[i, l]` is zero wherever `P[i, l] = 0`::

          l=0 l=1 l=2
    i=0 [  ■   ■   ·  ]      P.rows == ((0, 1), (0, 1, 2), (1, 2))
    i=1 [  ■   ■   ■  ]
    i=2 [  ·   ■   ■  ]

`P[i, l] = 1` reads "agent i uses what agent l holds": a row is what an agent needs, a column is
who needs it. The algebra (product, transpose, `<=`) is that of Boolean matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate, cycle
from operator import or_

import torch
from torch import Tensor

from hdnn_dist.errors import SpecError
from hdnn_dist.spec import Spec
from hdnn_dist.topology import Topology, layer_edges


@dataclass(frozen=True)
class BlockPattern:
    """A Boolean `M×M` matrix, kept as the sorted column indices of each row.

    Attributes:
        rows: `rows[i]` are the `l` with `P[i, l] = 1`, ascending.
    """

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, size: int, entries: Iterable[tuple[int, int]]) -> BlockPattern:
        """The pattern with ones at the `(i, l)` in `entries`."""
        rows: list[set[int]] = [set() for _ in range(size)]
        for i, l in entries:
            rows[i].add(l)
        return cls(tuple(tuple(sorted(row)) for row in rows))

    @classmethod
    def identity(cls, size: int) -> BlockPattern:
        """`I`: every agent uses its own alone."""
        return cls(tuple((i,) for i in range(size)))

    @property
    def size(self) -> int:
        """The number of agents `M`."""
        return len(self.rows)

    @property
    def entries(self) -> Iterable[tuple[int, int]]:
        """The `(i, l)` with `P[i, l] = 1`, row by row."""
        return ((i, l) for i, row in enumerate(self.rows) for l in row)

    @cached_property
    def nnz(self) -> int:
        """How many blocks may be non-zero."""
        return sum(map(len, self.rows))

    @cached_property
    def T(self) -> BlockPattern:
        """The transpose."""
        return BlockPattern.of(self.size, ((l, i) for i, l in self.entries))

    @cached_property
    def is_local(self) -> bool:
        """Whether no agent uses another's: the pattern is within `I`."""
        return all(l == i for i, l in self.entries)

    def __contains__(self, entry: tuple[int, int]) -> bool:
        i, l = entry
        return l in self.rows[i]

    def __le__(self, other: BlockPattern) -> bool:
        return all(set(a) <= set(b) for a, b in zip(self.rows, other.rows, strict=True))

    def __or__(self, other: BlockPattern) -> BlockPattern:
        return BlockPattern.of(self.size, (*self.entries, *other.entries))

    def __sub__(self, other: BlockPattern) -> BlockPattern:
        gone = set(other.entries)
        return BlockPattern.of(self.size, (e for e in self.entries if e not in gone))

    def __matmul__(self, other: BlockPattern) -> BlockPattern:
        """The pattern of the product of two matrices with these patterns."""
        return BlockPattern(
            tuple(tuple(sorted(set().union(*(other.rows[l] for l in row)))) for row in self.rows)
        )

    def __str__(self) -> str:
        width = range(self.size)
        return "\n".join(
            " ".join("■" if l in set(row) else "·" for l in width) for row in self.rows
        )

    def mask(self, sizes: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
        """The pattern blown up to `n×n`, `n = Σ sizes`: ones in the blocks that may be non-zero."""
        heights = torch.tensor(sizes)
        blocks = torch.zeros(self.size, self.size, dtype=dtype)
        for i, row in enumerate(self.rows):
            blocks[i, list(row)] = 1
        return blocks.repeat_interleave(heights, 0).repeat_interleave(heights, 1)


def union(patterns: Iterable[BlockPattern]) -> BlockPattern:
    """The smallest pattern that holds them all."""
    return reduce(BlockPattern.__or__, patterns)


def offsets(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where each agent's rows lie in the stacked vector: `slice(start, start + d_i)`."""
    return tuple(slice(end - d, end) for end, d in zip(accumulate(sizes), sizes, strict=True))


@dataclass(frozen=True)
class Patterns:
    """What the graph says about the model: the symbols of the design, one value.

    Attributes:
        sizes: `d_i`, the size of each agent's `p` and of its `q`.
        T: per layer, the pattern of `Kp` and `Kq`.
        R: the pattern of `X`, the same in every layer.
        S: who may talk to whom: `S[i, l] = 1` if a message may go from `l` to `i`.
    """

    sizes: tuple[int, ...]
    T: tuple[BlockPattern, ...]
    R: BlockPattern
    S: BlockPattern

    @cached_property
    def K(self) -> BlockPattern:
        """The union of `T` over the layers: where any layer's `K` may be non-zero."""
        return union(dict.fromkeys(self.T))

    @property
    def layers(self) -> int:
        """Depth `N`."""
        return len(self.T)

    @cached_property
    def single_exchange(self) -> bool:
        """The paper's condition `RᵀTᵀT ≤ S`, for the p and (with `R` for `Rᵀ`) for the q update.

        Where it holds, a whole half step can be computed from one exchange of the states of
        neighbours (arXiv 2105.13205, the section on distributed H-DNNs).
        """
        return all(X @ T.T @ T <= self.S for T in dict.fromkeys(self.T) for X in (self.R, self.R.T))

    def dependencies(self) -> Iterator[tuple[list[int], list[int]]]:
        """After 0, 1, 2, … layers: whose inputs each agent's `p` and its `q` depend on.

        As bit sets: bit `l` of entry `i` says that `i` depends on `l`, so that a layer costs the
        number of edges and not that of dependent pairs. Past the last layer the layers' patterns
        are gone through again, without end.
        """
        p = q = [1 << i for i in range(len(self.sizes))]
        yield p, q
        for T in cycle(self.T):
            p = _either(p, _through((T, T.T, self.R.T), q))
            q = _either(q, _through((T, T.T, self.R), p))
            yield p, q

    def layers_to_cross(self) -> int | None:
        """Layers until each agent's state depends on each agent's input; None if it never does."""
        everyone = (1 << len(self.sizes)) - 1
        before, unchanged = None, 0
        for depth, (p, q) in enumerate(self.dependencies()):
            if all(inputs == everyone for inputs in _either(p, q)):
                return depth
            unchanged = unchanged + 1 if (p, q) == before else 0
            if unchanged == self.layers:  # dependencies only grow: they will not any more
                return None
            before = p, q
        raise AssertionError("dependencies() ended")


def _through(patterns: Iterable[BlockPattern], inputs: list[int]) -> list[int]:
    """What agents depend on after a product with each of the patterns, the first one first."""
    for P in patterns:
        inputs = [reduce(or_, (inputs[l] for l in row), 0) for row in P.rows]
    return inputs


def _either(some: list[int], others: list[int]) -> list[int]:
    return [a | b for a, b in zip(some, others, strict=True)]


def patterns_of(topology: Topology, spec: Spec) -> Patterns:
    """Where the graph enters: `T`, `R` and `S` of a resolved spec.

    `A[i, l] = 1` for an edge `l → i` ("i uses l's state"). `model.graph` puts `A + I` into `T`, `R`
    or both; `model.layer_graphs` replaces the `A` in `T` layer by layer. `S` is `I ∪ A`, with `Aᵀ`
    where links are two-way.

    Raises:
        SpecError: `model.layer_graphs` with a model whose `K` is not on the graph, or outside the
            topology's links.
    """
    M, model = len(topology.agents), spec.model
    eye = BlockPattern.identity(M)

    def along(edges: Iterable[tuple[int, int]]) -> BlockPattern:
        return eye | BlockPattern.of(M, ((i, l) for l, i in edges))

    A = along(topology.edges)
    graphs = layer_edges(spec)
    if graphs is not None and model.graph == "J":
        raise SpecError(
            ("model", "layer_graphs"),
            "graphs per layer shape K, but model.graph is J, where K is block-diagonal",
            "set model.graph to K or both, or leave layer_graphs out",
        )
    S = A | A.T if topology.two_way else A
    T = [eye] if model.graph == "J" else [along(g) for g in graphs] if graphs else [A]
    for k, pattern in enumerate(T):
        for i, l in (pattern - S).entries:
            source, target = topology.names[l], topology.names[i]
            raise SpecError(
                ("model", "layer_graphs", k),
                f"{target!r} would use the state of {source!r}, but the topology has no link "
                f"from {source!r} to {target!r}",
                f"add the edge [{source}, {target}] to topology.edges or drop it from this graph",
            )
    return Patterns(
        sizes=topology.sizes,
        T=tuple(T[j % len(T)] for j in range(model.layers)),
        R=eye if model.graph == "K" else A,
        S=S,
    )
