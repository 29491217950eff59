from __future__ import annotations

import pytest
import torch

from hdnn_dist.optimization import build_optimizer, learning_rate
from hdnn_dist.spec import SGD, Adam, AdamW, Constant, Cosine, OneCycle, Step

STEPS, PER_EPOCH, PEAK = 40, 10, 0.1


def curve(spec: Constant | Step | Cosine | OneCycle) -> list[float]:
    return [learning_rate(spec, PEAK, step, STEPS, PER_EPOCH) for step in range(STEPS)]


def torch_curve(make: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant() -> None:
    assert curve(Constant()) == [PEAK] * STEPS


def test_step_and_cosine_are_those_of_torch() -> None:
    schedulers = torch.optim.lr_scheduler
    ours = curve(Step(name="step", every=2, gamma=0.5))
    assert ours == pytest.approx(
        torch_curve(lambda o: schedulers.StepLR(o, 2 * PER_EPOCH, gamma=0.5))
    )
    ours = curve(Cosine(name="cosine", final=0.1))
    assert ours == pytest.approx(
        torch_curve(lambda o: schedulers.CosineAnnealingLR(o, STEPS, eta_min=0.1 * PEAK))
    )


def test_one_cycle() -> None:
    rates = curve(OneCycle(name="one-cycle", warmup=0.25, start=10, end=100))
    assert rates[0] == pytest.approx(PEAK / 10)
    assert max(rates) == rates[10] == pytest.approx(PEAK)
    assert rates[-1] == pytest.approx(PEAK / 100, rel=0.3)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "spec", [SGD(name="sgd", lr=0.1), Adam(lr=0.1), AdamW(name="adamw", lr=0.1, weight_decay=0.5)]
)
def test_optimizers_descend(spec: SGD | Adam | AdamW) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(spec, [weight])
    for key, value in spec.model_dump(exclude={"name"}).items():
        assert optimizer.param_groups[0][key] == value
    for _ in range(30):
        weight.grad = 2 * weight.detach()
        optimizer.step()
    assert weight.norm() < 1
