"""Forward and backward of an H2 stack: the engine against plain autograd, from one run.

    python benchmarks/engine.py                    # four sizes, one thread, about two minutes
    python benchmarks/engine.py --sizes 16x64x125

`masked` is the formulation of the paper's public code, with states as rows: in every half step
the whole `K` is multiplied by its mask and by `J`, and autograd keeps a node an operation.
`autograd` is the same model as `HDNN` has it: masked once a step, only the blocks `Kp` and `Kq`,
`X = I` left out; `--compile` adds what `torch.compile` makes of it. `dense` and `rows` are the
layouts of `hdnn_dist.engine`, `rows` with weights that are kept as block rows; a star marks the one
that its model of the cost chooses. Gradients are of all weights and of the first state.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from timing import alternated, machine, product_rate
from torch import Tensor
from torch.nn import functional as F

from hdnn_dist import engine
from hdnn_dist.family import FAMILY
from hdnn_dist.hamiltonian import activation_of, skew
from hdnn_dist.sparsity import BlockPattern

H = 0.1
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """A ring of agents: `features` in all, so that `d = features / (2 agents)`."""

    features: int
    layers: int
    batch: int
    agents: int = 8
    with_reference: bool = True

    @property
    def n(self) -> int:
        """Size of `p`."""
        return self.features // 2

    @property
    def d(self) -> int:
        """Size of an agent's `p`."""
        return self.n // self.agents

    @property
    def pattern(self) -> BlockPattern:
        """`A + I` of the ring."""
        ring = nx.cycle_graph(self.agents)
        edges = [*ring.edges, *((j, i) for i, j in ring.edges), *((i, i) for i in ring)]
        return BlockPattern.of(self.agents, edges)

    @property
    def flops(self) -> int:
        """Of the six products of a half step, forward and backward, on the non-zero blocks."""
        return 2 * self.layers * 6 * 2 * self.pattern.nnz * self.d**2 * self.batch


SIZES = {
    "16x64x125": Size(16, 64, 125),
    "128x16x128": Size(128, 16, 128),
    "256x8x512": Size(256, 8, 512),
    "8192x4x128": Size(8192, 4, 128, agents=64, with_reference=False),
}


def masked(y_BN: Tensor, K: Tensor, b: Tensor, mask: Tensor, J: Tensor) -> Tensor:
    """H2 as the public code computes it, but for `K` in place of `Kᵀ`.

    `K` is `(N, N, L)`, masked twice in each half step, and `J Kᵀ` is formed in full. There the new
    half is written into its place in `y`, whose gradients torch refuses by now.
    """
    n = J.shape[0] // 2
    halves, y = (slice(0, n), slice(n, None)), list(y_BN.split(n, 1))
    for j in range(K.shape[2]):
        for new, old in ((0, 1), (1, 0)):
            to, of = halves[new], halves[old]
            s = torch.tanh(F.linear(y[old], (K[:, :, j] * mask)[of, of], b[of, 0, j]))
            force = torch.matmul(J, (K[:, :, j] * mask).T)[to, of]
            y[new] = y[new] + H * F.linear(s, force)
    return torch.cat(y, 1)


def contestants(size: Size, compiled: bool = False) -> dict[str, Run]:
    """Forward and backward of each formulation, on the same numbers: `∂/∂y_0`, `(B, N)`."""
    torch.manual_seed(0)
    n, L = size.n, size.layers
    mask = size.pattern.mask([size.d] * size.agents, torch.float32)
    Kp, Kq = (torch.randn(L, n, n) * mask / (3 * size.d) ** 0.5 for _ in range(2))
    bp, bq = torch.randn(L, n), torch.randn(L, n)
    y, y_bar = torch.randn(size.batch, 2 * n), torch.randn(size.batch, 2 * n)
    rows = engine.Rows.of(size.pattern, size.d)
    member = FAMILY["H2"](H, activation_of("tanh"))
    dense = {"Kp": Kp, "Kq": Kq, "bp": bp, "bq": bq}
    blocks = dense | {"Kp": rows.take(Kp), "Kq": rows.take(Kq)}

    def of(stack: engine.Stack, weights: dict[str, Tensor]) -> Run:
        ws = {name: w.clone().requires_grad_() for name, w in weights.items()}
        buffers = engine.Buffers()
        return gradient(lambda y: engine.run(stack, member, y.T, ws, buffers).T, list(ws.values()))

    def gradient(forward: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Run:
        y_0, wanted = y.clone().requires_grad_(), list(weights)
        return lambda: torch.autograd.grad(forward(y_0), [y_0, *wanted], y_bar)[0]

    calls = {}
    if size.with_reference:
        zero = torch.zeros_like(mask)
        whole = torch.cat([torch.cat([mask, zero], 1), torch.cat([zero, mask], 1)])
        K = torch.stack([torch.block_diag(a, b) for a, b in zip(Kp, Kq, strict=True)])
        b = torch.cat([bp, bq], 1).T[:, None]  # the layers last, as there
        ws = [K.movedim(0, 2).contiguous().requires_grad_(), b.contiguous().requires_grad_()]
        J = skew(torch.eye(n))
        calls["masked"] = gradient(lambda y: masked(y, *ws, whole, J), ws)
        named = {name: w.clone().requires_grad_() for name, w in dense.items()}

        def plain(y: Tensor) -> Tensor:
            layers = {k: (w * mask if w.dim() == 3 else w).unbind() for k, w in named.items()}
            each = [{k: ws[j] for k, ws in layers.items()} for j in range(L)]
            return member.propagate(y, each)[-1]

        calls["autograd"] = gradient(plain, list(named.values()))
        if compiled:
            calls["autograd, compiled"] = gradient(torch.compile(plain), list(named.values()))
    calls["dense"] = of(engine.Stack.of(member, coupled=False), dense)
    calls["rows"] = of(engine.Stack.of(member, coupled=False, rows=rows), blocks)
    calls["rows, recompute"] = of(
        engine.Stack.of(member, coupled=False, rows=rows, recompute=True), blocks
    )
    return calls


def chosen(size: Size, device: torch.device) -> str:
    """The formulation that the engine takes."""
    of = size.pattern, size.d, size.batch, device, torch.float32
    return "rows" if engine.rows_are_faster(*of) else "dense"


def table(sizes: dict[str, Size], o: Namespace) -> str:
    """Times, ratios and the share of the machine's rate, as Markdown."""
    rate = product_rate()
    lines = [
        f"{machine()}; float32; matrix product {rate / 1e9:.0f} GFLOP/s; "
        f"medians of {o.rounds} rounds",
        "",
        "| features x layers x batch | formulation | ms | times faster than masked "
        "| than autograd | of the rate, non-zero FLOPs | over dense x density |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, size in sizes.items():
        calls = contestants(size, o.compile)
        first, *others = (call() for call in calls.values())
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)
        times = alternated(calls, o.rounds if size.with_reference else max(3, o.rounds // 20))
        best = chosen(size, torch.device("cpu"))
        density = size.pattern.nnz / size.pattern.size**2
        for formulation, seconds in times.items():
            ratios = [
                f"{times[other] / seconds:.2f}" if other in times else "-"
                for other in ("masked", "autograd")
            ]
            lines.append(
                f"| {name} | {formulation}{'*' * (formulation == best)} | {seconds * 1e3:.2f} "
                f"| {' | '.join(ratios)} | {size.flops / seconds / rate:.0%} "
                f"| {seconds / times['dense'] / density:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = ArgumentParser(description="the engine against plain autograd")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too (needs a C++ compiler)"
    )
    o = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(table({name: SIZES[name] for name in o.sizes}, o))


if __name__ == "__main__":
    main()
