"""A whole stack of layers as one differentiable operation with a hand-written adjoint.

Every half step of every member (`hdnn_dist.family.Update`) has the form, with states as columns::

    t ← t + c G s,   s = σ(A y + b)        forward
    s̄ = Gᵀ t̄,  ā = σ'(s) s̄                 backward
    ȳ ← ȳ + c Aᵀ ā
    Ā = c ā yᵀ,  b̄ = c ā 1,  Ḡ = c t̄ sᵀ

with `A` = `K`, `-Kᵀ` or `K - Kᵀ`, and `G` = `Kᵀ`, `I` or `C Kᵀ`, made of the weights for all layers
at once. Autograd sees one node in place of a dozen a half step; a half step is a few calls, each
into a buffer that is there already, and the gradients of the weights are batched products over a
chunk of layers.

With `recompute` no state is stored but the last one. The backward pass takes the half steps back,
a chunk of layers at a time: its memory does not depend on the depth.

Two layouts of a stack of matrices are known::

    Dense   (L, n, n)
    Rows    (L, M, d, D)   block row i, D = d · (most blocks in a row), blocks of one size

In the second a product gathers the states that each row reads, and a transposed one scatters and
adds, so that the cost is that of the blocks. Blocks that fill up shorter rows are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hdnn_dist.family import Member
from hdnn_dist.hamiltonian import Activation
from hdnn_dist.sparsity import BlockPattern

CHUNK = 16  # layers at most whose gradients are one product, and that are rebuilt at once
BUFFER = 2**18  # numbers in a buffer of a chunk, about: what a cache holds


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the blocks of `(L, M, d, D)` lie in a matrix of a pattern.

    Attributes:
        agents: `M`.
        d: size of a block.
        reads: per row the columns of blocks, filled up to the longest row, `(M · most,)`.
        mask: `(M, 1, D)`, zeros where a row is filled up; None where none is.
    """

    agents: int
    d: int
    reads: Tensor
    mask: Tensor | None

    @property
    def most(self) -> int:
        """The most blocks that a row has."""
        return len(self.reads) // self.agents

    @classmethod
    def of(cls, pattern: BlockPattern, d: int, device: torch.device | None = None) -> Rows:
        """The rows of a pattern of `d × d` blocks."""
        most = max(map(len, pattern.rows))
        filled = [(*row, *[i] * (most - len(row))) for i, row in enumerate(pattern.rows)]
        lengths = torch.tensor([len(row) for row in pattern.rows])
        mask = (torch.arange(most) < lengths[:, None]).repeat_interleave(d, 1)[:, None]
        reads = torch.tensor(filled, device=device).flatten()
        return cls(pattern.size, d, reads, None if mask.all() else mask.to(device))

    def take(self, dense: Tensor) -> Tensor:
        """The blocks `(L, M, d, D)` of matrices `(L, n, n)`; zero where a row is filled up."""
        rows: Tensor = dense.unflatten(1, (self.agents, self.d))
        blocks = rows.gather(3, self._columns(len(dense)))
        return blocks if self.mask is None else blocks * self.mask

    def put(self, blocks: Tensor) -> Tensor:
        """The adjoint of `take`: the matrices `(L, n, n)` of blocks."""
        blocks = blocks if self.mask is None else blocks * self.mask
        rows = blocks.new_zeros(len(blocks), self.agents, self.d, self.agents * self.d)
        return rows.scatter_add(3, self._columns(len(blocks)), blocks).flatten(1, 2)

    def _columns(self, layers: int) -> Tensor:
        columns = self.reads[:, None] * self.d + torch.arange(self.d, device=self.reads.device)
        return columns.reshape(1, self.agents, 1, -1).expand(layers, -1, self.d, -1)


def rows_are_faster(
    pattern: BlockPattern, d: int, batch: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether products by rows cost less than dense ones, by a model in products of two numbers.

    Fitted to the machines of docs/performance.md. One core: batched products of small blocks run at
    `1 / (1.1 + 4/d)` of the rate of large ones, a number that is gathered or scattered costs six
    products, and the calls 1e5 products a half step. A GPU makes far more products in the time that
    a number or a call takes, with TF32 eight times as many again.
    """
    M, n = pattern.size, pattern.size * d
    read = M * d * max(map(len, pattern.rows))
    number, calls = 10.0, 1e5  # six, and the four of 1.1 + 4/d
    if device.type == "cuda":
        number, calls = (800.0, 2.4e9) if _by_tf32(dtype) else (100.0, 3e8)
    return bool(read * (1.1 * d + number) + calls / batch < n * n)


def _by_tf32(dtype: torch.dtype) -> bool:
    """Whether a GPU rounds the factors of products to TF32, in whichever way torch was told to."""
    told = torch.backends.cuda.matmul
    newer = getattr(told, "fp32_precision", None)  # where it was told so, the older name raises
    return dtype == torch.float32 and (told.allow_tf32 if newer is None else newer == "tf32")


@dataclass(frozen=True)
class HalfStep:
    """`t ← t + c G σ(A y + b)`: which of the states are `t` and `y`, and what `G` is.

    Attributes:
        target, source: positions in the stacked state, 0 for all of it or for `p`, 1 for `q`.
        c: `± h`.
        G: "AT" for `Aᵀ`, "I", or "own" for a matrix of its own.
    """

    target: int
    source: int
    c: float
    G: str


@dataclass(frozen=True)
class Stack:
    """What a stack of layers does, beside its weights.

    Attributes:
        steps: the half steps of a layer.
        activation: `σ`.
        parts: states that a `y` consists of: 1, or 2 for `[p; q]`.
        rows: the layout `Rows`; None for dense matrices.
        recompute: whether states are rebuilt in the backward pass.
    """

    steps: tuple[HalfStep, ...]
    activation: Activation
    parts: int
    rows: Rows | None = None
    recompute: bool = False

    @classmethod
    def of(cls, member: Member, coupled: bool, rows: Rows | None = None, **options: bool) -> Stack:
        """The stack of a member.

        Args:
            member: of the family.
            coupled: whether a matrix `J` or `X` is among the weights.
            rows: for weights as `Rows`, which only half steps with `G = Kᵀ` can use.
            options: `recompute`.
        """
        place = {"y": 0, "p": 0, "q": 1}
        steps = tuple(
            HalfStep(
                place[u.target],
                place[u.source],
                u.sign * member.h,
                "I" if not u.pull else "own" if u.coupling and coupled else "AT",
            )
            for u in member.updates
        )
        assert rows is None or all(step.G == "AT" for step in steps), "rows want G = Kᵀ"
        assert len({step.source for step in steps}) == len(steps), "each state is read once"
        return cls(steps, member.activation, 1 if member.whole else 2, rows, **options)


def run(
    stack: Stack,
    member: Member,
    y_NB: Tensor,
    weights: Mapping[str, Tensor],
    buffers: Buffers | None = None,
) -> Tensor:
    """`y_N` of `y_0`, both `(N, B)`, through all layers.

    Args:
        stack: of this member.
        member: of the family.
        y_NB: the states as columns.
        weights: by name, stacked over the layers; `X`, and a `J` of two axes, for all of them.
        buffers: of earlier passes; default: new ones.
    """
    buffers = Buffers() if buffers is None else buffers
    operands: list[Tensor] = []
    for update, step in zip(member.updates, stack.steps, strict=True):
        K, b = weights[update.K], weights[update.b]
        A = {"K": lambda K: K, "-KT": lambda K: -K.mT, "K-KT": lambda K: K - K.mT}
        operands += [A[update.argument](K), b]
        if step.G == "own":
            C = weights[update.coupling.removesuffix("T")]
            operands.append((C.mT if update.coupling == "XT" else C) @ K.mT)
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, (y_NB, *operands))):
        return plain(stack, y_NB, operands)  # torch.func wants operations that it can look into
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (y_NB, *operands))):
        operands = [w.contiguous() for w in operands]
        return _Sweep(stack, buffers, y_NB.shape, operands).forward_in_place(y_NB)
    result: Tensor = _Run.apply(stack, buffers, y_NB, *operands)[0]  # type: ignore[no-untyped-call]
    return result


def plain(stack: Stack, y: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """`run` by one autograd node an operation: what it is tested against, and its derivatives'."""
    states = list(y.chunk(stack.parts))
    steps = _of_steps(stack, operands)
    for j in range(len(operands[0])):
        for step, (A, b, *G) in zip(stack.steps, steps, strict=True):
            W = A[j] if stack.rows is None else stack.rows.put(A[j : j + 1])[0]
            s = stack.activation.value(W @ states[step.source] + b[j, :, None])
            u = s if step.G == "I" else (G[0][j] if G else W.mT) @ s
            states[step.target] = states[step.target] + step.c * u
    return torch.cat(states)


def _of_steps(stack: Stack, operands: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Operands as `(A, b)`, or `(A, b, G)` where `G` is a matrix of its own, of each half step."""
    left = iter(operands)
    return [tuple(next(left) for _ in range(3 if s.G == "own" else 2)) for s in stack.steps]


class _Run(torch.autograd.Function):
    """`run` with its adjoint. A derivative of the derivative is `plain`'s."""

    @staticmethod
    def forward(stack: Stack, buffers: Buffers, y: Tensor, *operands: Tensor) -> tuple[Tensor, Any]:
        sweep = _Sweep(stack, buffers, y.shape, [w.contiguous() for w in operands])
        return sweep.forward(y), sweep

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.stack, ctx.sweep = inputs[0], output[1]
        ctx.save_for_backward(output[0], *inputs[2:])

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        last, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            pull_back = torch.func.vjp(lambda y, *w: plain(ctx.stack, y, w), *inputs)[1]
            return None, None, *pull_back(y_bar)
        return None, None, *ctx.sweep.backward(last, y_bar, any(ctx.needs_input_grad[3:]))


class Buffers:
    """Buffers of passes that are over, for those to come: fresh memory costs as much as a product.

    Those of one size of batch are kept, and let go when another comes. A copy has none.
    """

    def __init__(self) -> None:
        self._size: object = None
        self._free: dict[int, list[Tensor]] = {}

    def __deepcopy__(self, memo: object) -> Buffers:
        return Buffers()

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()

    def take(self, layers: int, like: Tensor, n: int, B: int) -> Tensor:
        """Room for `layers` states `(n, B)`, whatever is in it."""
        size = n, B, like.dtype, like.device
        if size != self._size:
            self._size, self._free = size, {}
        free = self._free.get(layers)
        return free.pop() if free else like.new_empty(layers, n, B)

    def give(self, taken: list[Tensor]) -> None:
        """Have buffers back that nobody reads any more."""
        for room in taken:
            if (*room.shape[1:], room.dtype, room.device) == self._size:
                self._free.setdefault(len(room), []).append(room)


class _Sweep:
    """One pass through a stack and back, with its buffers.

    `self.y[part]` are the states, `(layers + 1, n, B)`, and `self.s[k]` the `s` of half step `k`,
    `(layers, n, B)`: of all layers, or with `recompute` of a chunk, made anew for each.
    """

    def __init__(
        self, stack: Stack, buffers: Buffers, shape: torch.Size, operands: Sequence[Tensor]
    ) -> None:
        self._buffers, self._taken = buffers, list[Tensor]()
        steps = self.steps = stack.steps
        self.parts, self.recompute, self.layers = stack.parts, stack.recompute, len(operands[0])
        self.n, self.B = shape[0] // stack.parts, shape[1]
        kernels = _kernels(stack.activation, operands[0].dtype)
        self.value, self.slope = kernels.value, kernels.slope
        self.operands = _of_steps(stack, operands)
        self._like = operands[0]
        scratch = [] if stack.rows is None else self._room(stack.rows.most, 2)
        self.products: list[_Dense | _Blocks] = [
            _Dense(kernels.scale, step, *operands)
            if stack.rows is None
            else _Blocks(kernels.scale, stack.rows, scratch, *operands)
            for step, operands in zip(steps, self.operands, strict=True)
        ]
        # Whether a half step of layer j reads the state y_{j+1} and not y_j ...
        self.late = [
            any(s.target == step.source for s in steps[:k]) for k, step in enumerate(steps)
        ]
        # ... and whether its cotangent t̄ is that of y_j and not of y_{j+1}.
        self.early = [
            any(s.source == step.target for s in steps[k + 1 :]) for k, step in enumerate(steps)
        ]
        self.chunk = min(CHUNK, self.layers, max(1, BUFFER // (self.n * max(1, self.B))))

    def __del__(self) -> None:  # the graph that this pass belongs to is gone
        self._buffers.give(self._taken)

    def _room(self, layers: int, count: int) -> list[Tensor]:
        room = [self._buffers.take(layers, self._like, self.n, self.B) for _ in range(count)]
        self._taken += room
        return room

    def forward(self, y_0: Tensor) -> Tensor:
        """`y_N`, and what the backward pass needs in the buffers."""
        if self.recompute:
            return self.forward_in_place(y_0)
        self.y = self._room(self.layers + 1, self.parts)
        self.s = self._room(self.layers, len(self.steps))
        for room, part in zip(self.y, y_0.chunk(self.parts), strict=True):
            room[0].copy_(part)
        y, plan = self._unbound()
        for start in self._loaded():
            for j in range(start, min(start + CHUNK, self.layers)):
                for step, product, late, s in plan:
                    product.affine(j - start, y[step.source][j + late], s[j])
                    self.value(s[j])
                    old, new = y[step.target][j : j + 2]
                    product.pull(j - start, old, s[j], step.c, new)
        return torch.cat([part[-1] for part in y])

    def _loaded(self) -> Iterator[int]:
        """The first layer of each chunk, whose matrices the products have at hand."""
        for start in range(0, self.layers, CHUNK):
            for product in self.products:
                product.load(start, start + CHUNK)
            yield start

    def forward_in_place(self, y_0: Tensor) -> Tensor:
        """`y_N` alone."""
        y_N = y_0.clone(memory_format=torch.contiguous_format)
        parts, [[s]] = y_N.chunk(self.parts), self._room(1, 1)
        for start in self._loaded():
            for k in range(min(CHUNK, self.layers - start)):
                for step, product in zip(self.steps, self.products, strict=True):
                    product.affine(k, parts[step.source], s)
                    self.value(s)
                    product.pull(k, parts[step.target], s, step.c, parts[step.target])
        return y_N

    def _unbound(self) -> tuple[list[tuple[Tensor, ...]], list[Any]]:
        s = [room.unbind() for room in self.s]
        plan = list(zip(self.steps, self.products, self.late, s, strict=True))
        return [room.unbind() for room in self.y], plan

    def _rebuild(self, count: int) -> None:
        """The states and `s` of a chunk from the state after it, `self.y[…][count]`."""
        y, plan = self._unbound()
        for k in reversed(range(count)):
            for step, product, late, s in reversed(plan):
                product.affine(k, y[step.source][k + late], s[k])
                self.value(s[k])
                product.pull(k, y[step.target][k + 1], s[k], -step.c, y[step.target][k])

    def backward(self, y_N: Tensor, y_bar: Tensor, weights_too: bool) -> tuple[Tensor | None, ...]:
        """The cotangents of `y_0` and of the operands (None if not `weights_too`)."""
        gradients = [
            tuple(torch.empty_like(w) if weights_too else None for w in ws) for ws in self.operands
        ]
        kept = len(self._taken)
        bars = self._room(self.chunk + 1, self.parts)
        a_bars = self._room(self.chunk, len(self.steps))
        now, after = y_bar.chunk(self.parts), y_N.chunk(self.parts)
        if self.recompute:
            self.y = self._room(self.chunk + 1, self.parts)
            self.s = self._room(self.chunk, len(self.steps))
        for stop in range(self.layers, 0, -self.chunk):
            start = max(0, stop - self.chunk)
            count, first = stop - start, 0 if self.recompute else start
            for product in self.products:
                product.load(start, stop)
            for bar, value in zip(bars, now, strict=True):
                bar[count].copy_(value)
            if self.recompute:
                for room, value in zip(self.y, after, strict=True):
                    room[count].copy_(value)
                self._rebuild(count)
                after = tuple(room[0] for room in self.y)
            s = [room[first : first + count] for room in self.s]
            self._pull_back(count, bars, a_bars, s)
            now = tuple(bar[0] for bar in bars)
            if weights_too:
                for k, step in enumerate(self.steps):
                    y = self.y[step.source][first + self.late[k] :][:count]
                    t_bar = bars[step.target][1 - self.early[k] :][:count]
                    own = [w[start:stop] for w in gradients[k] if w is not None]
                    self.products[k].gradients(own, y, s[k], t_bar, a_bars[k][:count], step.c)
        y_bar = torch.cat(now)
        self._buffers.give(self._taken[kept:])  # a graph that is retained comes back here
        del self._taken[kept:]
        return y_bar, *(w for ws in gradients for w in ws)

    def _pull_back(
        self, count: int, bars: list[Tensor], a_bars: list[Tensor], s: list[Tensor]
    ) -> None:
        """`ȳ` and `ā` of a chunk, from the cotangent of the state after it, `bars[…][count]`."""
        y_bar = [bar.unbind() for bar in bars]
        plan = list(
            zip(
                self.steps,
                self.products,
                self.early,
                [room.unbind() for room in a_bars],
                [room.unbind() for room in s],
                strict=True,
            )
        )[::-1]
        for k in reversed(range(count)):
            for step, product, early, a_bar, s_ in plan:
                product.push(k, y_bar[step.target][k + 1 - early], a_bar[k])
                self.slope(a_bar[k], s_[k])
                source = y_bar[step.source]
                product.push_back(k, source[k + 1], a_bar[k], step.c, source[k])


class _Dense:
    """Products with `A` and `G` of a layer, both `(n, n)`."""

    def __init__(
        self, scale: float, step: HalfStep, A: Tensor, b: Tensor, G: Tensor | None = None
    ) -> None:
        self.scale, self.kind = scale, step.G
        self.stacked = A, scale * b[:, :, None], A.mT if G is None else G

    def load(self, start: int, stop: int) -> None:
        """Have the layers `start … stop - 1` at hand, as 0, 1, …."""
        A, b, G = (w[start:stop] for w in self.stacked)
        self.A, self.AT, self.b = A.unbind(), A.mT.unbind(), b.unbind()
        self.G, self.GT = G.unbind(), G.mT.unbind()

    def affine(self, j: int, y: Tensor, out: Tensor) -> None:
        """`scale · (A y + b)`."""
        torch.addmm(self.b[j], self.A[j], y, alpha=self.scale, out=out)

    def pull(self, j: int, t: Tensor, s: Tensor, c: float, out: Tensor) -> None:
        """`t + c G s`."""
        if self.kind == "I":
            torch.add(t, s, alpha=c, out=out)
        else:
            torch.addmm(t, self.G[j], s, alpha=c, out=out)

    def push(self, j: int, t_bar: Tensor, out: Tensor) -> None:
        """`Gᵀ t̄`."""
        if self.kind == "I":
            out.copy_(t_bar)
        else:
            torch.mm(self.GT[j], t_bar, out=out)

    def push_back(self, j: int, y_bar: Tensor, a_bar: Tensor, c: float, out: Tensor) -> None:
        """`ȳ + c Aᵀ ā`."""
        torch.addmm(y_bar, self.AT[j], a_bar, alpha=c, out=out)

    def gradients(
        self, own: list[Tensor], y: Tensor, s: Tensor, t_bar: Tensor, a_bar: Tensor, c: float
    ) -> None:
        """`Ā`, `b̄`, `Ḡ` of a chunk of layers into `own`."""
        torch.bmm(a_bar, y.mT, out=own[0])
        if self.kind == "AT":
            own[0].baddbmm_(s, t_bar.mT, beta=c, alpha=c)
        else:
            own[0].mul_(c)
        torch.sum(a_bar, -1, out=own[1]).mul_(c)
        if self.kind == "own":
            torch.bmm(t_bar, s.mT, out=own[2]).mul_(c)


class _Blocks:
    """The same with `A` as block rows `(M, d, D)` and `G = Aᵀ`."""

    def __init__(
        self, scale: float, rows: Rows, scratch: list[Tensor], A: Tensor, b: Tensor
    ) -> None:
        self.scale, self.rows, (L, M, d, D) = scale, rows, A.shape
        self.read, self.sent = (room.view(M * rows.most, d, -1) for room in scratch)
        self.stacked = A, (scale * b).view(L, M, d, 1)
        self.by_agent, self.by_row = (M, d, -1), (M, D, -1)

    def load(self, start: int, stop: int) -> None:
        A, b = (w[start:stop] for w in self.stacked)
        self.A, self.AT, self.b = A.unbind(), A.mT.unbind(), b.unbind()

    def _gather(self, y: Tensor) -> Tensor:
        torch.index_select(y.view(self.by_agent), 0, self.rows.reads, out=self.read)
        return self.read.view(self.by_row)

    def affine(self, j: int, y: Tensor, out: Tensor) -> None:
        Y, out = self._gather(y), out.view(self.by_agent)
        torch.baddbmm(self.b[j], self.A[j], Y, alpha=self.scale, out=out)

    def pull(self, j: int, t: Tensor, s: Tensor, c: float, out: Tensor) -> None:
        if out is not t:
            out.copy_(t)
        torch.bmm(self.AT[j], s.view(self.by_agent), out=self.sent.view(self.by_row))
        out.view(self.by_agent).index_add_(0, self.rows.reads, self.sent, alpha=c)

    push_back = pull

    def push(self, j: int, t_bar: Tensor, out: Tensor) -> None:
        torch.bmm(self.A[j], self._gather(t_bar), out=out.view(self.by_agent))

    def gradients(
        self, own: list[Tensor], y: Tensor, s: Tensor, t_bar: Tensor, a_bar: Tensor, c: float
    ) -> None:
        # Āᵀ, as products of wide matrices with narrow ones are the faster way round
        A_barT = torch.empty_like(own[0][0].mT, memory_format=torch.contiguous_format)
        for A_bar, y_, s_, t_, a_ in zip(own[0], y, s, t_bar, a_bar, strict=True):
            torch.bmm(self._gather(y_), a_.view(self.by_agent).mT, out=A_barT)
            A_barT.baddbmm_(self._gather(t_), s_.view(self.by_agent).mT, beta=c, alpha=c)
            A_bar.copy_(A_barT.mT)
        if self.rows.mask is not None:
            own[0].mul_(self.rows.mask)
        torch.sum(a_bar, -1, out=own[1]).mul_(c)


@dataclass(frozen=True)
class _Kernels:
    """An activation in place: `value` makes `σ(a)` of `scale · a`, and `slope(·, s)` `ā` of `s̄`."""

    scale: float
    value: Callable[[Tensor], object]
    slope: Callable[[Tensor, Tensor], object]


def _kernels(σ: Activation, dtype: torch.dtype) -> _Kernels:
    if σ.name == "tanh" and dtype in _MINUS_ONE:
        return _Kernels(2.0, _tanh_of_half, _tanh_slope)
    return _Kernels(1.0, lambda a: a.copy_(σ.value(a)), lambda s_bar, s: s_bar.mul_(σ.slope(s)))


# A number of Python's, or one of another type, costs as much as the sum of a thousand.
_MINUS_ONE = {dtype: torch.tensor(-1.0, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def _tanh_of_half(a: Tensor) -> None:
    """`tanh(a/2) = 2/(1 + e^(-a)) - 1`, right to two roundings of 1, in a quarter of the time."""
    torch.add(_MINUS_ONE[a.dtype], a.sigmoid_(), alpha=2, out=a)


def _tanh_slope(s_bar: Tensor, s: Tensor) -> None:
    torch.ops.aten.tanh_backward.grad_input(s_bar, s, grad_input=s_bar)
