"""Distorted images: the formula written once more, what is drawn, and who sees which part."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdnn_dist.data import generator
from hdnn_dist.distortion import Distortion
from hdnn_dist.spec import Distort

ALL = Distort(rotate=20, scale=0.2, shear=15, shift=2, elastic=1.5, sigma=3)
distorts = st.builds(
    Distort,
    rotate=st.floats(0, 180),
    scale=st.floats(0, 0.9),
    shear=st.floats(0, 60),
    shift=st.floats(0, 5),
    elastic=st.sampled_from([0.0, 0.5, 3.0]),
    sigma=st.floats(1, 50),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def drawn(shape: tuple[int, int], batch: int, seed: int = 0) -> torch.Tensor:
    images = np.random.default_rng(seed).integers(0, 256, (batch, math.prod(shape)), np.uint8)
    return torch.from_numpy(images)


def whole(spec: Distort, shape: tuple[int, int]) -> Distortion:
    return Distortion(spec, shape, range(math.prod(shape)))


def displacements(spec: Distort, step: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """`u` and `x` at the inner pixels, found from images that show where each pixel came from."""
    size, inner = 41, np.s_[:, 15:-15, 15:-15]
    x = np.stack(np.indices((size, size))) - (size - 1) / 2.0
    u = []
    for component in x:
        image = torch.from_numpy(component).float().reshape(1, -1).expand(batch, -1)
        seen = whole(spec, (size, size))(image, 0, step).numpy().reshape(batch, size, size)
        u.append((seen - component)[inner])
    return np.stack(u, axis=1), x[inner]


@given(shapes, st.integers(1, 5), st.integers(0, 99))
def test_no_distortion_leaves_images_as_they_are(
    shape: tuple[int, int], batch: int, step: int
) -> None:
    images = drawn(shape, batch)
    np.testing.assert_allclose(whole(Distort(), shape)(images, 0, step), images, atol=1e-3)


@settings(max_examples=25)
@given(distorts, shapes, st.integers(0, 9))
def test_against_a_loop(spec: Distort, shape: tuple[int, int], step: int) -> None:
    images, (height, width) = drawn(shape, 2), shape
    random = generator(7, step, use=3)
    draws = random.uniform(-1, 1, (6, 2))
    down, across = (
        spec.sigma * (np.arange(n) - (n - 1) / 2)
        for n in (math.ceil((size - 1) / spec.sigma) + 5 for size in shape)
    )
    noise = random.standard_normal((2, 2, len(down), len(across)), np.float32)
    expected = np.zeros((2, height, width))
    for b, (turn, slant, *rest) in enumerate(draws.T):
        a, k = math.radians(spec.rotate * turn), math.tan(math.radians(spec.shear * slant))
        A = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        A = A @ [[1, 0], [k, 1]] @ np.diag(1 + spec.scale * np.array(rest[:2]))
        image = np.pad(images[b].numpy().reshape(shape).astype(float), 1)
        for r in range(height):
            for c in range(width):
                x = np.array([r - (height - 1) / 2, c - (width - 1) / 2])
                w = np.exp(
                    -((x[0] - down[:, None]) ** 2 + (x[1] - across) ** 2) / 2 / spec.sigma**2
                )
                e = (w / np.sqrt((w**2).sum()) * noise[b]).sum((1, 2))
                source = A @ x + spec.shift * np.array(rest[2:]) + spec.elastic * e
                at = source + (np.array(shape) - 1) / 2
                r0, c0 = np.floor(at).astype(int)
                for i in (r0, r0 + 1):
                    for j in (c0, c0 + 1):
                        if 0 <= i < height and 0 <= j < width:
                            weight = (1 - abs(at[0] - i)) * (1 - abs(at[1] - j))
                            expected[b, r, c] += weight * image[i + 1, j + 1]
    seen = whole(spec, shape)(images, 7, step)
    assert seen.dtype == torch.float32
    np.testing.assert_allclose(seen.reshape(2, height, width), expected, atol=0.02)


@given(distorts, shapes, st.integers(0, 9), st.randoms(use_true_random=False))
def test_agents_see_parts_of_the_same_image(
    spec: Distort, shape: tuple[int, int], step: int, random: Random
) -> None:
    images, columns = drawn(shape, 3), list(range(math.prod(shape)))
    random.shuffle(columns)
    part = columns[: len(columns) // 2 + 1]
    seen = Distortion(spec, shape, part)(images, 1, step)
    np.testing.assert_allclose(seen, whole(spec, shape)(images, 1, step)[:, part], atol=0.02)


def test_maps_differ_by_seed_and_step_and_come_again() -> None:
    images = drawn((8, 8), 1).expand(4, -1)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    seen = [whole(ALL, (8, 8))(images, *key) for key in keys]
    rows = torch.cat(seen)
    assert len(rows.unique(dim=0)) == len(rows)
    for key, before in zip(keys, seen, strict=True):
        assert torch.equal(whole(ALL, (8, 8))(images, *key), before)


@pytest.mark.parametrize("sigma", [2.0, 4.0, 10.0])
def test_the_elastic_part_is_as_large_everywhere_as_it_is_said_to_be(sigma: float) -> None:
    u, _ = displacements(Distort(elastic=1.5, sigma=sigma), 0, 4000)
    np.testing.assert_allclose(np.sqrt((u**2).mean(0)), 1.5, rtol=0.05)
    neighbours = (u[:, :, 1:] * u[:, :, :-1]).mean() / (u**2).mean()
    assert neighbours == pytest.approx(math.exp(-1 / (4 * sigma**2)), abs=0.01)


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ({"rotate": 10}, lambda x: 2 * math.sin(math.radians(5)) * np.hypot(*x)),
        ({"shift": 2}, lambda x: math.hypot(2, 2) + 0 * x[0]),
        ({"scale": 0.1}, lambda x: 0.1 * np.hypot(*x)),
        ({"shear": 10}, lambda x: math.tan(math.radians(10)) * abs(x[0])),
    ],
)
def test_affine_parts_go_as_far_as_they_are_said_to(
    values: dict[str, float], largest: Callable[[np.ndarray], np.ndarray]
) -> None:
    u, x = displacements(Distort(**values), 0, 3000)
    far = np.hypot(u[:, 0], u[:, 1]).max(0)
    assert (far <= largest(x) + 1e-3).all()
    assert (far >= 0.9 * largest(x) - 1e-3).all()
    assert abs(u.mean()) < 0.1
