"""What is proved of the family, measured: sensitivities, symplecticity, and bounds of both sides.

The backward sensitivity matrix (BSM) of the last `k` layers, in the paper's denominator layout::

    M_k[a, b] = ∂y_N[b] / ∂y_{N-k}[a],   M_0 = I,   ∂loss/∂y_{N-k} = M_k ∂loss/∂y_N

Column `b` is the cotangent `e_b` pulled back through `k` layers, so all columns, of all samples,
are one backward pass. Where `M_k` does not fit, `r < N` orthonormal cotangents `V` stand in for
the identity: `M_k V` has at most the norm of `M_k`, and its two figures are estimates from below.

Of `M_k V` only two `(r, r)` matrices are needed, and each is a sum over the rows of `M_k V`, so
that agents who hold some of the rows each can add them up (`J` couples rows as in the model)::

    gram   Vᵀ M_kᵀ   M_k V        ‖M_k V‖ = √(largest eigenvalue)
    form   Vᵀ M_kᵀ J M_k V        defect = ‖form - Vᵀ J V‖, zero where the BSM is symplectic

Norms are spectral. A symplectic `M_k` has a norm of at least 1: gradients do not vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev

from hdnn_dist.errors import UserError
from hdnn_dist.family import Member, Weights
from hdnn_dist.hamiltonian import J1

Step = Callable[[Tensor], Tensor]
BUDGET = 2**28  # bytes that the cotangents on their way may take


def probes(N: int, most: int) -> Tensor:
    """Cotangents `V` `(N, r)`: the identity if `most` allows `N` of them, else orthonormal."""
    if most >= N:
        return torch.eye(N, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)  # every agent draws the same
    draw = torch.randn(N, max(1, most), generator=random, dtype=torch.float64)
    V: Tensor = torch.linalg.qr(draw).Q
    return V


@dataclass(frozen=True)
class Sums:
    """What the agents' measurements add up to (docs/analysis.md says what this still tells).

    Attributes:
        gram, form: `(N+1, samples, r, r)`, for `k = 0 … N` (see above).
        energy: `H_j(y_j)`, `(N, samples)`; empty if `σ` has no integral.
        blocks: the norms of each matrix's blocks by its name, `(N, agents, agents)`.
    """

    gram: Tensor
    form: Tensor
    energy: Tensor
    blocks: dict[str, Tensor]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.form + other.form,
            self.energy + other.energy,
            {name: norms + other.blocks[name] for name, norms in self.blocks.items()},
        )


@dataclass(frozen=True)
class Sensitivities:
    """Figures of `M_1 … M_N` for some samples.

    Attributes:
        norms: `‖M_k‖`, `(N, samples)`.
        defects: `‖M_kᵀ J M_k - J‖`, `(N, samples)`.
        exact: whether all columns were computed; if not, both are estimates from below.
    """

    norms: Tensor
    defects: Tensor
    exact: bool


def measured(gram: Tensor, form: Tensor, form_0: Tensor) -> tuple[Tensor, Tensor]:
    """`‖M_k V‖` and the defect from `gram`, `form` and `form_0 = Vᵀ J V`, each `(…, r, r)`.

    Infinite where the numbers are not finite. A norm below 1e-162 is zero, as its square is.
    """
    finite = (gram.isfinite() & form.isfinite()).all(-1).all(-1)
    norm = torch.linalg.eigvalsh(_or_zero(gram, finite))[..., -1].clamp(min=0).sqrt()
    defect = torch.linalg.matrix_norm(_or_zero(form - form_0, finite), 2)
    return norm.masked_fill(~finite, math.inf), defect.masked_fill(~finite, math.inf)


def _or_zero(matrix: Tensor, finite: Tensor) -> Tensor:
    return torch.where(finite[..., None, None], matrix, 0.0)


def from_sums(sums: Sums, N: int) -> Sensitivities:
    """The agents' sums as figures, `N` being the size of `y`."""
    norms, defects = measured(sums.gram[1:], sums.form[1:], sums.form[:1])
    return Sensitivities(norms, defects, sums.gram.shape[-1] == N)


def sensitivities(
    steps: Sequence[Step], y_BN: Tensor, J: Tensor | None = None, budget: int = BUDGET
) -> Sensitivities:
    """BSM norms and defects of any network given as its layers, by vector-Jacobian products.

    Args:
        steps: the layers, each `(rows, N) -> (rows, N)`, every row for itself, differentiable.
        y_BN: the first state of some samples, `(B, N)`.
        J: of the defect; default: the canonical `J1`, a yardstick where the network has none.
        budget: bytes that the cotangents may take; below what all `N` take, fewer are used.

    Raises:
        UserError: `J` is left out and `N` is odd, so that there is no `J1`.
    """
    B, N = y_BN.shape
    if J is None and N % 2:
        raise UserError(f"y has {N} features, and J1 needs an even number", "give a J")
    J_NN = (J1(y_BN[0]) if J is None else J).to(torch.float64)
    # A step keeps about eight numbers for each that it is given.
    V = probes(N, budget // (8 * N * B * y_BN.element_size())).to(y_BN.device)
    states = [y_BN.detach()]
    with torch.no_grad():
        for step in steps:
            states.append(step(states[-1]))
    bars = V.T[:, None].to(y_BN.dtype).expand(-1, B, -1)  # (r, B, N)
    norms, defects = [], []
    for step, state in zip(reversed(steps), reversed(states[:-1]), strict=True):
        y = state.expand(len(bars), B, N).flatten(0, 1).clone().requires_grad_()
        with torch.enable_grad():
            (rows,) = torch.autograd.grad(step(y), y, bars.flatten(0, 1))
        bars = rows.unflatten(0, (-1, B))
        M = bars.permute(1, 2, 0).to(torch.float64)  # (B, N, r)
        norm, defect = measured(M.mT @ M, M.mT @ J_NN @ M, V.T @ J_NN @ V)
        norms.append(norm)
        defects.append(defect)
    return Sensitivities(torch.stack(norms), torch.stack(defects), V.shape[1] == N)


def has_one_J(member: Member, J: Tensor | None) -> bool:
    """Whether the model has one `J` in all layers; else `J1` is a yardstick for the defect."""
    return member.name in ("H1", "H2", "MS3") and (J is None or J.dim() == 2)


# --- bounds from the weights -------------------------------------------------------------------


def spectral_norms(member: Member, w: Weights) -> dict[str, float]:
    """`‖·‖` of a layer's matrices by name; for an upper triangular `A`, of `A - Aᵀ`."""
    return {
        name: torch.linalg.matrix_norm(
            W - W.mT if member.upper and name in member.matrices else W, 2
        ).item()
        for name, W in w.items()
        if W.dim() == 2
    }


def block_norms(member: Member, blocks: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """The same per layer from the norms of blocks, and never smaller.

    `‖K‖ ≤ ‖B‖` with `B[i, l] = ‖K[i, l]‖`, as `B` acts on the norms of the parts of a vector.
    """
    whole = {
        name: torch.linalg.matrix_norm(
            B + B.mT if member.upper and name in member.matrices else B, 2
        ).tolist()
        for name, B in blocks.items()
    }
    return [dict(zip(whole, norms, strict=True)) for norms in zip(*whole.values(), strict=True)]


def log_bound(member: Member, norms: Mapping[str, float]) -> float:
    """`log` of an upper bound on the norm of one layer's Jacobian.

    With `L = sup|σ'|`, the force `C Kᵀ σ(K y + b)` of an update has a Jacobian of norm at most
    `c/h = L ‖C‖ ‖K‖²`, or `L ‖K‖` without the pull-back. An update of the whole state is bounded by
    `1 + c`. One that changes `p` by a function of `q` has the Jacobian `[[I, S], [0, I]]`,
    `‖S‖ ≤ c`, whose norm is `(c + √(c² + 4))/2`: the logarithm is `arsinh(c/2)`.

    Args:
        member: of the family.
        norms: of the layer's matrices by name; one that is left out is the identity or `J1`.
    """
    log = 0.0
    for update in member.updates:
        K = norms[update.K]
        c = member.h * member.activation.steepest * norms.get(update.coupling.rstrip("T"), 1.0)
        c *= K * K if update.pull else K
        log += math.log1p(c) if update.target == update.source else math.asinh(c / 2)
    return log


def log_bounds(member: Member, weights: Sequence[Weights]) -> list[float]:
    """`log` of the upper bound on `‖M_k‖`, `k = 1 … N`: the last `k` layers' bounds multiplied."""
    return accumulated([log_bound(member, spectral_norms(member, w)) for w in weights])


def accumulated(logs: Sequence[float]) -> list[float]:
    """Layers' logarithms, first layer first, summed from the last one back."""
    return torch.tensor(logs, dtype=torch.float64).flip(0).cumsum(0).tolist()


# --- along the layers --------------------------------------------------------------------------


def energies(member: Member, weights: Sequence[Weights], states: Sequence[Tensor]) -> Tensor:
    """`H_j(y_j)`, `(N, B)`, of the states `y_0 … y_N`.

    Raises:
        UserError: the activation has no integral.
    """
    pairs = zip(states[:-1], weights, strict=True)
    return torch.stack([member.energy(y, w) for y, w in pairs])


# --- exploding gradients: the paper's counterexample --------------------------------------------


@dataclass(frozen=True)
class Counterexample:
    """The BSM `M(t) = ∂y(T)/∂y(T-t)` of `ẏ = ε J tanh(y)`, from `y(0) = y_0`.

    Attributes:
        t: times, from `h` to `T`.
        norms: `‖M(t)‖`.
        entries: the entries `(1, 1)` and `(2, 2)` of `M(t)`.
        orbit, perturbed_orbit: two solutions that start `γ` apart, at the times `t`.
        distance: of the two, over `γ`.
    """

    t: list[float]
    norms: list[float]
    entries: list[tuple[float, float]]
    orbit: list[tuple[float, float]]
    perturbed_orbit: list[tuple[float, float]]
    distance: list[float]


def counterexample() -> Counterexample:
    """The paper's appendix III: `ẏ = ε J tanh(y)`, `J = [[0, -1], [1, 0]]`, has no bound over time.

    Each orbit is closed, but its period depends on its energy: neighbouring solutions drift apart
    at a constant speed, and the sensitivity grows in proportion to `t`. It is H2 with `K = I`, so
    symplectic Euler integrates it.
    """
    eps, T, h, gamma, y_0 = 1.0, 20.0, 0.05, 0.05, (0.336, -0.486)

    def step(y: Tensor) -> Tensor:
        p, q = y[..., 0], y[..., 1]
        p = p - h * eps * torch.tanh(q)
        return torch.stack([p, q + h * eps * torch.tanh(p)], -1)

    count = round(T / h)
    y = torch.tensor(y_0, dtype=torch.float64)
    pair = torch.stack([y, y * (1 + gamma / y.norm())])  # apart along the ray: on another orbit
    path = [pair]
    for _ in range(count):
        path.append(step(path[-1]))
    M, sensitivity = torch.eye(2, dtype=torch.float64), []
    for state in reversed(path[:-1]):
        M = jacrev(step)(state[0]).mT @ M
        sensitivity.append(M)
    states, matrices = torch.stack(path[1:]), torch.stack(sensitivity)
    return Counterexample(
        t=[h * (k + 1) for k in range(count)],
        norms=torch.linalg.matrix_norm(matrices, 2).tolist(),
        entries=matrices.diagonal(dim1=1, dim2=2).tolist(),
        orbit=states[:, 0].tolist(),
        perturbed_orbit=states[:, 1].tolist(),
        distance=((states[:, 0] - states[:, 1]).norm(dim=1) / gamma).tolist(),
    )
