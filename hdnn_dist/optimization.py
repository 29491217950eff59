"""Local optimisation: every agent runs its own optimiser on its own weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hdnn_dist.spec import SGD, Adam, Constant, Cosine, OneCycle, Optimizer, Schedule, Step


def build_optimizer(spec: Optimizer, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimiser that the spec names."""
    if isinstance(spec, SGD):
        return torch.optim.SGD(
            weights, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    kind = torch.optim.Adam if isinstance(spec, Adam) else torch.optim.AdamW
    return kind(weights, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True)


def fits(state: Mapping[str, Tensor], weight: Tensor, spec: Optimizer) -> bool:
    """Whether `state` is what the optimiser keeps for a weight; nothing before its first step."""
    shapes = {"momentum_buffer": weight.shape}
    if not isinstance(spec, SGD):
        shapes = {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
    return not state or (
        {key: value.shape for key, value in state.items()} == shapes
        and all(value.dtype == weight.dtype for key, value in state.items() if key != "step")
        and all(value.is_floating_point() for value in state.values())
    )


def learning_rate(spec: Schedule, peak: float, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of a step, a pure function: a resumed run needs no scheduler state.

    Args:
        spec: the schedule.
        peak: `optimizer.lr`.
        step: from 0.
        steps: of the whole run.
        per_epoch: steps an epoch.
    """
    match spec:
        case Constant():
            return peak
        case Step():
            return peak * spec.gamma ** (step // per_epoch // spec.every)
        case Cosine():
            return _cosine(peak, peak * spec.final, step / steps)
        case OneCycle():
            top = max(1.0, spec.warmup * steps)
            if step < top:
                return _cosine(peak / spec.start, peak, step / top)
            return _cosine(peak, peak / spec.end, (step - top) / max(1.0, steps - top))


def _cosine(start: float, end: float, part: float) -> float:
    """Half a cosine from start (part 0) to end (part 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2
