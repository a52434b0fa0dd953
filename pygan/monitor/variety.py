"""Variety of generated images against that of real ones, from small features of both.

Features of an image are, for each channel, mean and standard deviation in an 8 x 8 grid of cells:
they tell layouts and textures apart, need no trained network, and mean the same at every step.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError

# The names of what `Variety.signals` returns, in its order.
SIGNALS: Final = ("spread", "duplicates", "missing", "copies", "gap", "nearest")
CLUSTERS: Final = 10
_CELLS: Final = 8
_CHUNK: Final = 64
# A cluster counts as missing below this part of its share among the real images.
_TENTH: Final = 0.1
# A copy is this much nearer to a real image than that image's nearest neighbour.
_NEAR: Final = 0.5


def features(images: Tensor) -> Tensor:
    """float ``[N, C, H, W]`` in [-1, 1], or uint8, as float32 ``[N, 128 C]``."""
    found = []
    for chunk in images.split(_CHUNK):
        x = chunk / 127.5 - 1 if chunk.dtype == torch.uint8 else chunk.float()
        mean = F.adaptive_avg_pool2d(x, _CELLS)
        square = F.adaptive_avg_pool2d(x * x, _CELLS)
        deviation = (square - mean * mean).clamp(min=0).sqrt()
        found.append(torch.cat([mean.flatten(1), deviation.flatten(1)], 1))
    return torch.cat(found)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The way by a matrix product loses the distance of near-copies to rounding.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest_other(x: Tensor) -> Tensor:
    """``[N]`` distance of each row to the nearest other."""
    apart = _distances(x, x)
    apart.fill_diagonal_(float("inf"))
    return apart.min(1).values


def _spread(x: Tensor) -> Tensor:
    """Mean distance of two different rows."""
    return _distances(x, x).sum() / (len(x) * (len(x) - 1))


def _clusters(x: Tensor, count: int) -> Tensor:
    """Centres ``[count, d]`` of k-means (Lloyd 1982), begun from rows that are far apart."""
    chosen = [0]
    while len(chosen) < count:
        nearest = _distances(x, x[chosen]).min(1).values
        chosen.append(int(nearest.argmax()))
    centres = x[chosen].clone()
    for _ in range(20):
        which = F.one_hot(_distances(x, centres).argmin(1), count).to(x.dtype)
        sizes = which.sum(0)[:, None]
        centres = torch.where(sizes > 0, which.T @ x / sizes.clamp(min=1), centres)
    return centres


class Variety:
    """What real images look like, and how a batch of generated ones compares.

    Args:
        real: ``[M, C, H, W]``, float in [-1, 1] or uint8, M at least 16; some hundred from all over
            the data.
        count: of the generated images that will be compared.

    Raises:
        UserError: another shape, or too few images.

    Source of "duplicates": Arora and Zhang 2017, arXiv:1706.08224; of "missing": Richardson and
    Weiss 2018, arXiv:1805.12462; of "copies": Meehan et al. 2020, arXiv:2004.05675.
    """

    def __init__(self, real: Tensor, count: int) -> None:
        if real.dim() != 4 or len(real) < 16:
            raise UserError(
                f"real has shape {list(real.shape)}; give [M, C, H, W] with M of at least 16"
            )
        with torch.no_grad():
            self._real = x = features(real)
            self._mean = x.mean(0)
            self._apart = _nearest_other(x)
            self._usual = self._apart.median()
            self._spread = _spread(x)
            groups = [x[i : i + count] for i in range(0, len(x), count)]
            nearest = torch.cat([_nearest_other(g) for g in groups if len(g) > 1])
            # What one in a hundred real images has for a double among as many others.
            self._double = nearest.quantile(0.01)
            self._centres = _clusters(x, min(CLUSTERS, len(x) // 8))
            self._shares = self._share(x)

    def to(self, device: torch.device) -> Variety:
        """Moves what it keeps to a device, in place."""
        kept = ("_real", "_mean", "_apart", "_usual", "_spread", "_double", "_centres", "_shares")
        for name in kept:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _share(self, x: Tensor) -> Tensor:
        which = _distances(x, self._centres).argmin(1)
        return F.one_hot(which, len(self._centres)).float().mean(0)

    def signals(self, fake: Tensor) -> Tensor:
        """float32 ``[6]`` on the device, from ``fake [N, C, H, W]`` in [-1, 1]:

        - spread: mean distance of two of them, divided by that of two real images;
        - duplicates: the share with a double among them as near as one real image in a hundred has;
        - missing: the share of real images in clusters that next to none of them falls into;
        - copies: the share that lies much nearer to a real image than its own neighbours do;
        - gap: how far their mean lies from that of the real images, divided by the mean distance of
          two real images; 0.09 for 64 images as good as real ones;
        - nearest: the median distance of one to the nearest real image, divided by that of a real
          image to the nearest other.
        """
        with torch.no_grad():
            x = features(fake)
            spread = _spread(x) / self._spread.clamp(min=1e-12)
            duplicates = (_nearest_other(x) < self._double).float().mean()
            rare = self._share(x) < _TENTH * self._shares
            missing = (self._shares * rare).sum()
            distance, which = _distances(x, self._real).min(1)
            copies = (distance < _NEAR * self._apart[which]).float().mean()
            gap = (x.mean(0) - self._mean).norm() / self._spread.clamp(min=1e-12)
            nearest = distance.median() / self._usual.clamp(min=1e-12)
            return torch.stack([spread, duplicates, missing, copies, gap, nearest])
