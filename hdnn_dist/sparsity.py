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

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import accumulate, cycle
from operator import or_

import torch
from torch import Tensor

from hdnn_dist.errors import SpecError
from hdnn_dist.family import FAMILY, Update
from hdnn_dist.hamiltonian import J1, J2, skew
from hdnn_dist.spec import Spec
from hdnn_dist.topology import Topology, layer_edges

MAX_DENSE = 4096  # rows of J


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

    @cached_property
    def _sets(self) -> tuple[frozenset[int], ...]:
        return tuple(map(frozenset, self.rows))

    def __contains__(self, entry: tuple[int, int]) -> bool:
        i, l = entry
        return l in self._sets[i]

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

    def keep(self, agents: Sequence[int]) -> BlockPattern:
        """The rows and columns of some agents, given in ascending order, numbered anew."""
        position = {i: k for k, i in enumerate(agents)}
        return BlockPattern(
            tuple(tuple(position[l] for l in self.rows[i] if l in position) for i in agents)
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
        R: the pattern of `X` or `J`, the same in every layer.
        S: who may talk to whom: `S[i, l] = 1` if a message may go from `l` to `i`.
        updates: the half steps of a layer, which say what the patterns mean.
    """

    sizes: tuple[int, ...]
    T: tuple[BlockPattern, ...]
    R: BlockPattern
    S: BlockPattern
    updates: tuple[Update, ...]

    def factors(self, update: Update, T: BlockPattern) -> tuple[BlockPattern, ...]:
        """The patterns that the source of an update passes, the first one first."""
        argument = {"K": T, "-KT": T.T, "K-KT": T | T.T}[update.argument]
        coupling = {"": (), "J": (self.R,), "X": (self.R,), "XT": (self.R.T,)}[update.coupling]
        return (argument, *((T.T,) if update.pull else ()), *coupling)

    @cached_property
    def K(self) -> BlockPattern:
        """The union of `T` over the layers: where any layer's `K` may be non-zero."""
        return union(dict.fromkeys(self.T))

    def keep(self, agents: Sequence[int]) -> Patterns:
        """What is left of them on the graph of some agents, given in ascending order."""
        return replace(
            self,
            sizes=tuple(self.sizes[i] for i in agents),
            T=tuple(T.keep(agents) for T in self.T),
            R=self.R.keep(agents),
            S=self.S.keep(agents),
        )

    @property
    def layers(self) -> int:
        """Depth `N`."""
        return len(self.T)

    @cached_property
    def composed(self) -> BlockPattern:
        """The union of the composed patterns of all half steps: `RᵀTᵀT ∪ R TᵀT` for H2."""
        return union(
            reduce(lambda P, Q: Q @ P, self.factors(update, T))
            for T in dict.fromkeys(self.T)
            for update in self.updates
        )

    @property
    def single_exchange(self) -> bool:
        """The paper's condition, `RᵀTᵀT ≤ S` and (for the q update) `R TᵀT ≤ S` with H2.

        Where it holds, a whole half step can be computed from one exchange of the states of
        neighbours (arXiv 2105.13205, the section on distributed H-DNNs).
        """
        return self.composed <= self.S

    def dependencies(self) -> Iterator[tuple[list[int], list[int]]]:
        """After 0, 1, 2, … layers: whose inputs each agent's `p` and its `q` depend on.

        As bit sets: bit `l` of entry `i` says that `i` depends on `l`, so that a layer costs the
        number of edges and not that of dependent pairs. Past the last layer the layers' patterns
        are gone through again, without end.
        """
        own = [1 << i for i in range(len(self.sizes))]
        states = dict.fromkeys({update.target for update in self.updates}, own)
        yield states.get("p", own), states.get("q", own)
        for T in cycle(self.T):
            for update in self.updates:
                more = _through(self.factors(update, T), states[update.source])
                states[update.target] = _either(states[update.target], more)
            yield states.get("p") or states["y"], states.get("q") or states["y"]

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


def patterns_of(
    topology: Topology, spec: Spec, J: Tensor | None = None, X: Tensor | None = None
) -> Patterns:
    """Where the graph enters: `T`, `R` and `S` of a resolved spec.

    `A[i, l] = 1` for an edge `l → i` ("i uses l's state"). `model.graph` puts `A + I` into `T`, `R`
    or both; `model.layer_graphs` replaces the `A` in `T` layer by layer. `S` is `I ∪ A`, with `Aᵀ`
    where links are two-way. MS2's `A - Aᵀ` is trained above the diagonal alone.

    Args:
        topology: the graph.
        spec: the model.
        J: what `interconnection` gave.
        X: what `given_X` gave.

    Raises:
        SpecError: the member cannot have the graph where the spec puts it, or some agent would
            use the state of another that the topology does not link it to.
    """
    M, model = len(topology.agents), spec.model
    member = FAMILY[model.name]
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
    if model.graph != "K" and model.name not in ("H1", "H2"):
        raise SpecError(
            ("model", "graph"),
            f"the J of {model.name} is fixed by its K, so that the graph can enter K alone",
            "set model.graph to K, or model.name to H1 or H2",
        )
    S = A | A.T if topology.two_way else A
    T = [eye] if model.graph == "J" else [along(g) for g in graphs] if graphs else [A]
    for k, pattern in enumerate(T):
        _refuse_outside(topology, pattern - S, ("model", "layer_graphs", k), "this graph")
    if member.upper:
        for pattern in T:
            for i, l in (pattern - pattern.T).entries:
                raise SpecError(
                    ("model", "name"),
                    f"MS2 has an antisymmetric K, in which each uses the other's state, but "
                    f"{topology.names[l]!r} does not use that of {topology.names[i]!r}",
                    "set topology.directed to false, or model.name to MS1, MS3, H1 or H2",
                )
        T = [BlockPattern.of(M, ((i, l) for i, l in P.entries if i <= l)) for P in T]
    R = eye if model.graph == "K" else A
    agent = torch.arange(M).repeat_interleave(torch.tensor(topology.sizes))  # of each row
    for name, C, owner in (("J", J, agent.repeat(2)), ("X", X, agent)):
        if C is not None:
            entries = C.reshape(-1, *C.shape[-2:]).any(0).nonzero()
            blocks = (owner[entries] @ torch.tensor([M, 1])).unique()  # an entry each: many
            R = eye | BlockPattern.of(M, (divmod(block, M) for block in blocks.tolist()))
            _refuse_outside(topology, R - S, ("model", name), name)
    return Patterns(
        sizes=topology.sizes,
        T=tuple(T[j % len(T)] for j in range(model.layers)),
        R=R,
        S=S,
        updates=member.updates,
    )


def interconnection(topology: Topology, spec: Spec) -> Tensor | None:
    """H1's `J`, `(2n, 2n)` or one a layer, on `y = [p; q]`; None for the other members.

    Without one in the spec it is `J1`, or with the graph in it `[[0, -Xᵀ], [X, 0]]` with the `X`
    that H2 starts from: `X[i, i] = I`, `X[i, l] = I/(1 + |neighbours|)`.

    Raises:
        SpecError: the matrix is not skew-symmetric or of another size, or the member takes none.
    """
    model, sizes = spec.model, topology.sizes
    N, loc = 2 * sum(sizes), ("model", "J")
    if model.name != "H1":
        if model.J is not None:
            raise SpecError(
                loc, f"J is given, but that of {model.name} is fixed", "leave J out, or use H1"
            )
        return None
    if N > MAX_DENSE:
        raise SpecError(
            ("topology", "d"),
            f"y = [p; q] has 2 Σ d = {N} entries, and H1 keeps its J as a whole",
            f"stay within {MAX_DENSE}, or set model.name to H2",
        )
    like = torch.empty(N, dtype=torch.float64)
    if model.J is None and model.graph != "K":
        X = torch.zeros(N // 2, N // 2, dtype=torch.float64)
        rows = offsets(sizes)
        neighbours = Counter(i for _, i in topology.edges)
        for l, i in (*topology.edges, *((i, i) for i in range(len(sizes)))):
            share = 1 if l == i else 1 + neighbours[i]
            X[rows[i], rows[l]] = torch.eye(sizes[i], sizes[l], dtype=torch.float64) / share
        return skew(X)
    if model.graph != "K":
        raise SpecError(
            loc, "J is given, and the graph would enter it as well", "set model.graph to K"
        )
    if model.J is None or isinstance(model.J, str):
        return J2(like) if model.J == "J2" else J1(like)
    J = _tensor(loc, model.J)
    if J.shape not in ((N, N), (model.layers, N, N)):
        raise SpecError(
            loc,
            f"J is {' x '.join(map(str, J.shape))}, but y = [p; q] has 2 Σ d = {N} entries",
            f"give it as {N} x {N}, or {model.layers} of them for the layers",
        )
    if not torch.equal(J, -J.mT):
        raise SpecError(loc, "J is not skew-symmetric", "give a J with Jᵀ = -J")
    return J


def given_X(topology: Topology, spec: Spec) -> Tensor | None:
    """A user's `X` of H2, `(n, n)`; None if the spec has none.

    Raises:
        SpecError: it is not square, of another size, or the member has none.
    """
    model, n, loc = spec.model, sum(topology.sizes), ("model", "X")
    if model.X is None:
        return None
    if model.name != "H2":
        raise SpecError(loc, f"X is given, but {model.name} has none", "leave X out, or use H2")
    if model.graph != "K":
        raise SpecError(
            loc, "X is given, and the graph would enter it as well", "set model.graph to K"
        )
    X = _tensor(loc, model.X)
    if X.shape != (n, n):
        raise SpecError(
            loc,
            f"X is {' x '.join(map(str, X.shape))}, but p has Σ d = {n} entries",
            f"give it as {n} x {n}",
        )
    return X


def _tensor(loc: tuple[str, ...], rows: object) -> Tensor:
    assert isinstance(rows, list), "resolve() comes first"
    try:
        return torch.tensor(rows, dtype=torch.float64)
    except ValueError:
        raise SpecError(
            loc, f"the rows of {loc[-1]} are not equally long", "give a square matrix"
        ) from None


def _refuse_outside(
    topology: Topology, outside: BlockPattern, loc: tuple[str | int, ...], what: str
) -> None:
    for i, l in outside.entries:
        source, target = topology.names[l], topology.names[i]
        raise SpecError(
            loc,
            f"{target!r} would use the state of {source!r}, but the topology has no link "
            f"from {source!r} to {target!r}",
            f"add the edge [{source}, {target}] to topology.edges or drop it from {what}",
        )
