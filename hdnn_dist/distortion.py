"""Distorted images to train on: a smooth random map of the plane a sample, and one agent's part.

A pixel at `x` shows what was at `x + u(x)` (Simard, Steinkraus, Platt 2003), `x` in pixels down and
right of the centre; `u` is made of fixed smooth functions with drawn coefficients::

    u(x) = (A - I) x + t + elastic Σ_k w_k(x) n_k,      n_k ~ N(0, I)
    A = R(rotation) [[1, 0], [shear, 1]] diag(scales)

The knots `k` lie `sigma` apart on a square lattice, `w_k` is a Gaussian of deviation `sigma` around
each, and `Σ_k w_k(x)² = 1`. So every agent's part of `u` is one product of the coefficients, which
come from the seed and the step, by functions of its own pixels: all agents see parts of the same
distorted image and tell one another nothing.

Shapes: B samples, F pixels of an agent, P coefficients a component.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hdnn_dist.data import generator
from hdnn_dist.spec import Distort


class Distortion:
    """What an agent sees of distorted images.

    Args:
        spec: how far images are distorted.
        image: their (height, width).
        columns: the pixels that the agent sees, in raster order of the image.
    """

    def __init__(self, spec: Distort, image: tuple[int, int], columns: Sequence[int]) -> None:
        self.spec, self.image = spec, image
        centre = (torch.tensor(image) - 1) / 2
        down, right = np.unravel_index(np.asarray(columns, np.intp), image)
        self._x_2F = torch.from_numpy(np.stack([down, right])).float() - centre[:, None]
        affine = torch.cat([self._x_2F, torch.ones(1, len(columns))])
        self._functions_PF = torch.cat([affine, self._bumps()])

    def _bumps(self) -> Tensor:
        """`w_k(x)`: a product of one Gaussian down and one across."""
        down, across = (
            torch.exp(-((z - k[:, None]) ** 2) / (2 * self.spec.sigma**2))
            for z, k in zip(self._x_2F, _knots(self.spec, self.image), strict=True)
        )
        bumps = (down[:, None] * across[None]).flatten(0, 1)
        return F.normalize(bumps, dim=0)

    def __call__(
        self, images: Tensor, seed: int, step: int, first: int = 0, batch: int | None = None
    ) -> Tensor:
        """Own pixels of the distorted images of a step, on the scale of the images, `(B, F)`.

        Between pixels images are bilinear, and outside they are black.

        Args:
            images: the samples of the step, `(B, height · width)`, of any type.
            seed: chooses the maps, together with the step.
            step: from 0.
            first: which sample of the step the first image is.
            batch: samples of the step; default: these alone.
        """
        height, width = self.image
        samples = len(images) if batch is None else batch
        coefficients = _coefficients(self.spec, self.image, seed, step, samples)
        u_B2F = coefficients[first : first + len(images)] @ self._functions_PF
        at = (self._x_2F + u_B2F) / (torch.tensor(self.image) / 2)[:, None]
        grid = at.flip(1).mT[:, None]  # (B, 1, F, 2): right, down; from -1 to 1
        planes = images.reshape(-1, 1, height, width).float()
        return F.grid_sample(planes, grid, align_corners=False).flatten(1)


def _knots(spec: Distort, image: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where knots lie down and across, two past either edge; none without an elastic part."""
    if not spec.elastic:
        return torch.empty(0), torch.empty(0)
    counts = [math.ceil((size - 1) / spec.sigma) + 5 for size in image]
    down, across = (spec.sigma * (torch.arange(n) - (n - 1) / 2) for n in counts)
    return down, across


@lru_cache(maxsize=1)  # agents that share a process draw once
def _coefficients(
    spec: Distort, image: tuple[int, int], seed: int, step: int, batch: int
) -> Tensor:
    """`[A - I, t, elastic n]` of each sample of a step, `(B, 2, P)`."""
    random = generator(seed, step, use=3)
    turn, slant, *rest = torch.from_numpy(random.uniform(-1, 1, (6, batch)))
    scales, t = 1 + spec.scale * torch.stack(rest[:2]), spec.shift * torch.stack(rest[2:])
    turn, slant = math.radians(spec.rotate) * turn, math.radians(spec.shear) * slant
    cos, sin, shear = turn.cos(), turn.sin(), slant.tan()
    A = torch.stack([cos - sin * shear, -sin, sin + cos * shear, cos]).unflatten(0, (2, 2)) * scales
    affine = torch.cat([A - torch.eye(2)[:, :, None], t[:, None]], dim=1)  # (2, 3, B)
    knots = math.prod(map(len, _knots(spec, image)))
    n = torch.from_numpy(random.standard_normal((batch, 2, knots), np.float32))
    return torch.cat([affine.permute(2, 0, 1).float(), spec.elastic * n], dim=2)
