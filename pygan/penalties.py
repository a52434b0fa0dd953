"""Penalties on the gradient of D with respect to images, for any D that differentiates twice.

Both are computed in float32, whatever autocast says: a squared gradient leaves the range of shorter
types soon.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _squared_norms(D: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``[N]``: the squared length of every image's gradient."""
    with torch.autocast(images.device.type, enabled=False):
        images = images.detach().float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(D(images).float().sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1)


def r1_penalty(D: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Mean squared length of D's gradient at real images: add ``gamma / 2`` times it to D's loss.

    Args:
        D: images to logits.
        real: ``[N, C, H, W]``.

    Returns:
        float32 ``[]``, differentiable with respect to D's parameters.

    Source: Mescheder et al. 2018, arXiv:1801.04406, equation 9.
    """
    return _squared_norms(D, real).mean()


def gradient_penalty(
    D: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared distance from 1 of the length of D's gradient, at images that lie by chance
    between a real and a generated one: add ``lambda`` (10 as a rule) times it to D's loss.

    Args:
        D: images to logits, without batch norm, which would mix the images.
        real, fake: ``[N, C, H, W]`` both.
        generator: of the images' device; the default one where None.

    Returns:
        float32 ``[]``, differentiable with respect to D's parameters.

    Source: Gulrajani et al. 2017, arXiv:1704.00028, equation 3.
    """
    real, fake = real.detach().float(), fake.detach().float()
    share = torch.rand((len(real), 1, 1, 1), device=real.device, generator=generator)
    between = real + share * (fake - real)
    # Not the bare root, whose derivative at a gradient of zero is infinite.
    return (_squared_norms(D, between).add(1e-12).sqrt() - 1).square().mean()
