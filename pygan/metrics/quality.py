"""Everything that is said of a set of samples, set against real images in one space of features."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pygan.data import ImageSet
from pygan.metrics.describe import Space
from pygan.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from pygan.metrics.kernel import kernel_distance
from pygan.metrics.neighbours import neighbours

SORTED = 1000
# Real images whose neighbours are looked for, and those that are described at all.
NEIGHBOURS, REAL = 10_000, 50_000


class Quality(NamedTuple):
    """``distance`` is Fréchet's, ``kernel`` the kernel distance; ``shares`` of 1,000 samples in
    each class (empty without a classifier); ``variety`` the mean distance between two samples
    relative to that between two real images; the rest as in `pygan.metrics.Neighbours`."""

    distance: float
    shares: list[float]
    variety: float
    kernel: float
    precision: float
    recall: float
    density: float
    coverage: float
    copies: float


def spread(features: Tensor) -> float:
    """Mean Euclidean distance between two different rows."""
    n = len(features)
    return torch.cdist(features.double(), features.double()).sum().item() / (n * (n - 1))


def _sorted(scores: Tensor | None) -> list[float]:
    if scores is None:
        return []
    found = scores[:SORTED].argmax(1)
    shares: list[float] = (torch.bincount(found, minlength=scores.shape[1]) / len(found)).tolist()
    return shares


class Reference:
    """Real images in a space: at most 50,000, drawn with ``seed``; 10,000 where neighbours are
    looked for."""

    def __init__(self, real: ImageSet, space: Space, seed: int = 0) -> None:
        # Sets may come sorted by class, and what follows takes the first ones.
        order = np.random.default_rng(seed).permutation(len(real))[:REAL]
        images = real.images if len(order) == len(real) else real.images[np.sort(order)]
        self.space = space
        self.count = len(images)
        features, scores = space.describe(images)
        place = torch.from_numpy(order.argsort().argsort())
        self._features = features[place]
        self._scores = None if scores is None else scores[place]
        self._statistics: FeatureStatistics = feature_statistics(self._features.numpy())
        self._spread = spread(self._features[:SORTED])

    def quality(self, samples: np.ndarray) -> Quality:
        """Of uint8 samples ``[N, H, W, C]``."""
        features, scores = self.space.describe(samples)
        return Quality(
            distance=frechet_distance(feature_statistics(features.numpy()), self._statistics),
            shares=_sorted(scores),
            variety=spread(features[:SORTED]) / self._spread,
            kernel=kernel_distance(features, self._features).mean,
            **neighbours(self._features[:NEIGHBOURS], features)._asdict(),
        )

    @functools.cached_property
    def halves(self) -> Quality:
        """One half of the real images against the other: as good as samples get."""
        one, other = self._features[0::2], self._features[1::2]
        return Quality(
            distance=frechet_distance(*(feature_statistics(half.numpy()) for half in (one, other))),
            shares=_sorted(None if self._scores is None else self._scores[0::2]),
            variety=spread(one[:SORTED]) / self._spread,
            kernel=kernel_distance(one, other).mean,
            **neighbours(other[:NEIGHBOURS], one[:NEIGHBOURS])._asdict(),
        )
