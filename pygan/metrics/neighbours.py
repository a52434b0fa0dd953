"""Fidelity and variety apart, from nearest neighbours in a space of features.

A set's manifold is the union of balls about its members, each as wide as the distance to its k-th
nearest other member:

- precision: the share of generated images inside the manifold of the real ones (k = 3);
- recall: the share of real images inside the manifold of the generated ones (k = 3);
- density: in how many real balls a generated image lies, divided by k (k = 5); it may pass 1;
- coverage: the share of real balls that hold a generated image (k = 5);
- copies: the share of generated images nearer to a real one than all but a hundredth of the real
  images are to their nearest neighbours; about 0.01 for images as different from the data as these
  are from each other.

Sources: Kynkäänniemi et al. 2019, arXiv:1904.06991 (precision, recall); Naeem et al. 2020,
arXiv:2002.09797 (density, coverage).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pygan.metrics.kernel import checked_features

MANIFOLD_K, DENSITY_K = 3, 5
COPY_QUANTILE = 0.01
_BLOCK = 1024  # rows whose distances to a whole set are held at a time


class Neighbours(NamedTuple):
    """See the module."""

    precision: float
    recall: float
    density: float
    coverage: float
    copies: float


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The way by a product of matrices gives equal rows a distance; float64 leaves it at 1e-7.
    return torch.cdist(a, b)


def _nearest_others(x: Tensor, k: int) -> Tensor:
    """``[n, k]`` distances of each row to its k nearest others, ascending."""
    found = []
    for start in range(0, len(x), _BLOCK):
        block = _distances(x[start : start + _BLOCK], x)
        rows = torch.arange(len(block))
        block[rows, start + rows] = torch.inf
        found.append(block.topk(k, dim=1, largest=False).values)
    return torch.cat(found)


def neighbours(real: ArrayLike, fake: ArrayLike) -> Neighbours:
    """Precision, recall, density, coverage and copies of generated images.

    Args:
        real, fake: features ``[n, d]``, n may differ and is more than 5: arrays or CPU tensors.
            Compare values of equal numbers only.

    Raises:
        UserError: features of other shapes, too few rows, NaN or infinity.
    """
    r, f = (
        torch.from_numpy(np.ascontiguousarray(each))
        for each in checked_features(real, fake, least=DENSITY_K + 1)
    )
    real_near = _nearest_others(r, DENSITY_K)
    real_manifold, real_ball = real_near[:, MANIFOLD_K - 1], real_near[:, DENSITY_K - 1]
    fake_manifold = _nearest_others(f, MANIFOLD_K)[:, -1]
    double = real_near[:, 0].quantile(COPY_QUANTILE)
    precise = copied = within = 0
    recalled = torch.zeros(len(r), dtype=torch.bool)
    covered = torch.zeros(len(r), dtype=torch.bool)
    for start in range(0, len(f), _BLOCK):
        apart = _distances(f[start : start + _BLOCK], r)
        inside = apart <= real_ball
        precise += int((apart <= real_manifold).any(1).sum())
        within += int(inside.sum())
        copied += int((apart.min(1).values < double).sum())
        covered |= inside.any(0)
        recalled |= (apart <= fake_manifold[start : start + _BLOCK, None]).any(0)
    return Neighbours(
        precision=precise / len(f),
        recall=recalled.double().mean().item(),
        density=within / (DENSITY_K * len(f)),
        coverage=covered.double().mean().item(),
        copies=copied / len(f),
    )
