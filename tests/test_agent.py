from __future__ import annotations

import numpy as np
import pytest
import torch

from hdnn_dist.agent import CPU, cross_entropy
from hdnn_dist.data import background, load_images, scaled
from hdnn_dist.distortion import Distortion
from hdnn_dist.errors import CheckpointError
from hdnn_dist.job import Job
from hdnn_dist.testing import assert_close, dense_step
from hdnn_dist.worker import Worker
from tests.strategies import in_process

BASE = ["model.layers=2", "training.dtype=float64", "topology.d=2"]


def worker(*overrides: str, device: torch.device = CPU) -> Worker:
    job = Job.load(None, [*BASE, *overrides])
    return Worker(job, range(8), in_process(job), device=device)


def weights(of: Worker) -> dict[str, torch.Tensor]:
    parts = {i: {n: w.detach().cpu() for n, w in a.weights.items()} for i, a in of.agents.items()}
    return of.job.architecture.assemble(parts)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_ten_steps_are_those_of_the_dense_model(optimizer: str, device: torch.device) -> None:
    """Optimiser, schedule, regulariser and clipping, step by step against torch's own."""
    overrides = [
        f"training.optimizer.name={optimizer}",
        "training.optimizer.weight_decay=0.01",
        "training.schedule.name=cosine",
        "training.alpha=0.01",
        "training.clip_norm=0.5",
    ]
    ours = worker(*overrides, device=device)
    job = ours.job
    model, _ = dense_step(job)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings = job.spec.training.optimizer.model_dump(exclude={"name"})
    dense = kind[optimizer](model.parameters(), **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(dense, job.steps)
    for step in range(10):
        model, expected = dense_step(job, step, model)
        [result] = ours.train(1)
        assert result.loss == pytest.approx(expected.loss, abs=1e-9)
        assert result.grad_norm == pytest.approx(expected.grad_norm, abs=1e-9)
        assert result.lr == pytest.approx(scheduler.get_last_lr()[0])
        dense.step()
        scheduler.step()
    mine = weights(ours)
    for name, weight in model.named_parameters():
        assert_close(mine[name], weight.detach(), name, 1e-8)


def test_a_row_of_K_stays_zero_where_its_layer_has_no_edge() -> None:
    of = worker(
        "model.layer_graphs=[none, topology]", "training.alpha=0.5", "training.optimizer.lr=0.1"
    )
    of.train(3)
    K = weights(of)["Kp"]
    mask = of.job.architecture.patterns.T[0].mask(of.job.topology.sizes)
    assert (K[0][~mask] == 0).all()
    assert (K[1][~mask] != 0).any()


def test_cross_entropy_and_its_gradient() -> None:
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.nn.functional.cross_entropy(scores.T, labels, reduction="sum")
    loss, correct, bar = cross_entropy(scores.detach(), labels)
    assert loss.item() == pytest.approx(expected.item())
    assert int(correct) == int((scores.argmax(0) == labels).sum())
    assert_close(bar, torch.autograd.grad(expected, scores)[0], "∂loss/∂scores")


def test_labels_are_the_roots_alone() -> None:
    of = worker()
    of.train(1)
    assert [i for i, agent in of.agents.items() if agent._labels] == [of.job.root]
    other = next(agent for i, agent in of.agents.items() if i != of.job.root)
    with pytest.raises(AssertionError, match="labels"):
        other.labels("train")


def test_augmentation_shifts_every_agents_part_alike() -> None:
    of = worker("training.shift=1", "data.split.axis=columns")
    plain = worker("data.split.axis=columns")
    index = of.agents[0]._batch(0)
    moved = {i: agent._inputs(0, index) for i, agent in of.agents.items()}
    still = {i: agent._inputs(0, index) for i, agent in plain.agents.items()}
    fill = background("digits")
    seen = set()
    for b in range(len(index)):
        fits = {i: set() for i in moved}
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                for i in moved:
                    x = still[i][:, b].reshape(8, 1).numpy()
                    y = np.full_like(x, fill)
                    if dx == 0:
                        rows = slice(max(dy, 0), 8 + min(dy, 0))
                        y[rows] = x[max(-dy, 0) : 8 + min(-dy, 0)]
                    if np.allclose(moved[i][:, b].reshape(8, 1).numpy(), y, atol=1e-6):
                        fits[i].add((dy, dx))
        common = set.intersection(*fits.values())
        assert common, f"no shift explains sample {b}"
        seen |= common
    assert len(seen) > 1


@pytest.mark.parametrize("kind", ["stripes", "auto"])
def test_distortion_shows_every_agent_its_part_of_the_same_images(kind: str) -> None:
    of = worker("training.distort={rotate: 20, elastic: 1}", f"data.split={{kind: {kind}}}")
    data, training = of.job.spec.data, of.job.spec.training
    images = torch.from_numpy(load_images(data, "train"))
    assert training.distort is not None
    for step in (0, 1):
        index = of.agents[0]._batch(step)
        whole = Distortion(training.distort, (8, 8), range(64))(images[index], 0, step)
        expected = torch.from_numpy(scaled("digits", whole.numpy())).double()
        seen = torch.cat([agent._inputs(step, index) for agent in of.agents.values()])
        assert_close(seen, expected.T, "the distorted images", 1e-5)


def test_what_is_not_trained_on_is_not_distorted() -> None:
    of, plain = worker("training.distort.rotate=90"), worker()
    for part in ("train", "test"):
        assert torch.equal(of.agents[1].features(part), plain.agents[1].features(part))
    assert of.evaluate("train") == plain.evaluate("train")


def test_a_state_of_another_shape_is_refused() -> None:
    one, two = worker(), worker("topology.d=3")
    with pytest.raises(CheckpointError, match=r"agent 'a1': .*resume with the spec"):
        two.agents[0].load_state(one.agents[0].state())


def test_state_holds_all_that_the_next_step_depends_on(device: torch.device) -> None:
    """And is as good on another device."""
    one = worker("training.optimizer.lr=0.05", device=device)
    two = worker("training.optimizer.lr=0.05", device=device)
    one.train(3)
    for i in one.agents:
        state = one.agents[i].state().items()
        two.agents[i].load_state({k: v.to(CPU, copy=True) for k, v in state})
    two.step = one.step
    assert one.train(2) == two.train(2)
    mine, theirs = weights(one), weights(two)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
