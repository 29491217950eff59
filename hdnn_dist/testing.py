"""The method's properties as assertions, for tests of this package and of what is built on it.

Each takes the thing itself and says in its name what must hold; `assert_matches_dense` is the
oracle for everything distributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from hdnn_dist.agent import StepResult
from hdnn_dist.data import epoch_order, load_features, load_labels, load_targets, target_moments
from hdnn_dist.job import Job
from hdnn_dist.model import HDNN
from hdnn_dist.sparsity import BlockPattern


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance`, relative to the larger of 1 and the largest expected entry."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} (scale {scale:.3g})"


def assert_adjoint(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    tolerance: float = 1e-12,
) -> None:
    """`<F x, y> = <x, F* y>` for linear F, relative to the size of the products."""
    left, right = (forward(x) * y).sum(), (x * adjoint(y)).sum()
    scale = max(1.0, (forward(x) * y).abs().sum().item())
    assert abs(left - right) <= tolerance * scale, f"<Fx, y> = {left}, <x, F*y> = {right}"


def assert_respects(matrix: Tensor, pattern: BlockPattern, sizes: tuple[int, ...]) -> None:
    """Every block that the pattern leaves out is zero."""
    outside = ~pattern.mask(sizes)
    assert not (matrix[..., outside] != 0).any(), "a block outside the pattern is not zero"


def assert_symplectic(M: Tensor, J: Tensor, tolerance: float = 1e-10) -> None:
    """`Mᵀ J M = J` for a backward sensitivity matrix `M[a, b] = ∂y_N[b]/∂y_0[a]`."""
    assert_close(M.mT @ J @ M, J, "MᵀJM - J", tolerance)


def assert_within(sent: Iterable[tuple[int, int]], links: BlockPattern) -> None:
    """Every (source, target) is a link: `links[target, source] = 1`."""
    stray = [(source, target) for source, target in sent if (target, source) not in links]
    assert not stray, f"messages outside the graph: {stray}"


def dense_step(job: Job, step: int = 0, model: HDNN | None = None) -> tuple[HDNN, StepResult]:
    """The oracle: loss and gradients of a training step by autograd on the dense model.

    Covers forward, cross-entropy or squared error, regulariser and clipping; not the augmentation,
    which has no dense counterpart. Gradients are left in the model's parameters; a model with the
    initial weights is made if none is given.
    """
    model = model or HDNN(job.architecture, job.dtype)
    model.zero_grad()
    spec, data = job.spec, job.data
    epoch, k = divmod(step, job.steps_per_epoch)
    order = epoch_order(spec.training.seed, epoch, data.train)
    index = torch.from_numpy(order[k * job.batch : (k + 1) * job.batch])
    x = torch.from_numpy(load_features(spec.data, "train", range(data.features))).to(job.dtype)
    scores = model(x[index])
    correct, squares = None, {}
    if data.targets:
        targets = torch.from_numpy(load_targets(spec.data, "train", data.targets))[index].to(
            job.dtype
        )
        loss = F.mse_loss(scores, targets)
        _, std = target_moments(spec.data, data.targets)
        errors = torch.from_numpy(std) * (scores - targets).detach()
        squares = {
            "squares": errors.square().mean().item(),
            "variance": targets.square().mean().item(),
        }
    else:
        labels = torch.from_numpy(load_labels(spec.data, "train"))[index]
        loss = F.cross_entropy(scores, labels)
        correct = int((scores.argmax(1) == labels).sum())
    (loss + spec.training.alpha * model.regulariser()).backward()
    norm = None
    if spec.training.clip_norm is not None:
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        for gradient in gradients:
            gradient *= min(1.0, spec.training.clip_norm / norm)
    lr = spec.training.optimizer.lr
    return model, StepResult(step + 1, loss.item(), correct, len(index), lr, norm, **squares)


def assert_matches_dense(
    job: Job, result: StepResult, gradients: dict[int, dict[str, Tensor]], step: int = 0
) -> None:
    """A training step's loss and every agent's gradients are those of the dense model.

    Args:
        job: the job, in float64.
        result: what the root reported.
        gradients: by agent and name, as the agents hold them after the step.
        step: which step it was; weights must be the initial ones.
    """
    model, expected = dense_step(job, step)
    tolerance = 1e-10
    assert abs(result.loss - expected.loss) <= tolerance, f"{result.loss} is not {expected.loss}"
    assert result.correct == expected.correct
    assert result.scores.keys() == expected.scores.keys()
    for name, score in expected.scores.items():
        off = abs(result.scores[name] - score)
        assert off <= tolerance * (1 + abs(score)) or math.isnan(off), f"{name} is off by {off}"
    if expected.grad_norm is not None:
        assert result.grad_norm is not None
        assert abs(result.grad_norm - expected.grad_norm) <= tolerance * (1 + expected.grad_norm)
    dense = {
        n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in model.named_parameters()
    }
    zeros = {n: torch.zeros(s) for n, s in job.architecture.shapes().items() if n not in dense}
    assert gradients.keys() == set(range(len(job.topology.agents)))
    for i, own in gradients.items():
        for name, block in job.architecture.split(dense | zeros, i).items():
            if name in dense:
                assert_close(own[name], block, f"agent {i}'s gradient of {name}")


def assert_follows_plan(sent: dict[tuple[int, int], int], job: Job) -> None:
    """The bytes of one training step are the plan's, edge by edge, and all along links."""
    assert_within(sent, job.architecture.patterns.S)
    assert sent == job.traffic(job.plan.training_step)
