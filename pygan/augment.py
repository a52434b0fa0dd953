"""Augmentation of what a discriminator sees, differentiable so that G learns through it.

Real and generated images are changed alike, by chance, so D cannot learn the change, nor know its
few real images by heart. Source: Zhao et al. 2020, arXiv:2006.10738.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError

SHIFT, HOLE = 0.125, 0.5  # shares of the side

Draw = Callable[[Tensor], Tensor]  # fills with uniform numbers of [0, 1)


def _of_each(x: Tensor, draw: Draw) -> Tensor:
    """A number for each image, ``[N, 1, 1, 1]``."""
    return draw(torch.empty((len(x), 1, 1, 1), dtype=x.dtype, device=x.device))


def _color(x: Tensor, draw: Draw) -> Tensor:
    x = x + (_of_each(x, draw) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * _of_each(x, draw))
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (_of_each(x, draw) + 0.5)


def _offsets(x: Tensor, most: int, draw: Draw) -> Tensor:
    """Whole numbers from 0 to ``most``, ``[N]``."""
    drawn = draw(torch.empty(len(x), device=x.device))
    return (drawn * (most + 1)).long().clamp_(max=most)


def _translation(x: Tensor, draw: Draw) -> Tensor:
    height, width = x.shape[2:]
    reach = [int(side * SHIFT + 0.5) for side in (height, width)]
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0])).permute(0, 2, 3, 1)
    rows, columns = (
        _offsets(x, 2 * most, draw)[:, None] + torch.arange(side, device=x.device)
        for most, side in zip(reach, (height, width), strict=True)
    )
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, draw: Draw) -> Tensor:
    kept = []
    for side in x.shape[2:]:
        size = int(side * HOLE + 0.5)
        # Its middle lies anywhere, so a part of the hole may lie outside.
        start = _offsets(x, side - size % 2, draw)[:, None] - size // 2
        places = torch.arange(side, device=x.device)
        kept.append((places < start) | (places >= start + size))
    rows, columns = kept
    return x * (rows[:, None, :, None] | columns[:, None, None, :]).to(x.dtype)


POLICIES = {"color": _color, "translation": _translation, "cutout": _cutout}


def checked_policy(policy: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        UserError: one is not known.
    """
    unknown = [name for name in policy if name not in POLICIES]
    if unknown:
        raise UserError(
            f"augmentation {unknown[0]!r} is not known; take any of {', '.join(POLICIES)}"
        )
    return tuple(dict.fromkeys(policy))


def diff_augment(
    images: Tensor, policy: Sequence[str], *, generator: torch.Generator | None = None
) -> Tensor:
    """Images changed by chance, each in its own way.

    Args:
        images: ``[N, C, H, W]``, floating.
        policy: in this order: "color" (brightness by up to 0.5, saturation 0 to 2 times, contrast
            0.5 to 1.5 times), "translation" (by up to an eighth of each side, zeros move in),
            "cutout" (zeros in a square of half the side).
        generator: of the images' device; the default one where None.

    Returns:
        As ``images``, differentiable with respect to them to any order.

    Raises:
        UserError: an unknown policy, or images of another shape or type.

    Source: Zhao et al. 2020, arXiv:2006.10738.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}; give floating [N, C, H, W]"
        )

    def draw(empty: Tensor) -> Tensor:
        return empty.uniform_(generator=generator)

    for name in checked_policy(policy):
        images = POLICIES[name](images, draw)
    return images
