"""4x4 convolutions of stride 2 and padding 1 of maps with few positions.

In the middle of a U-Net the weight is many times larger than its maps, and the time is that of
reading it. A convolution of P positions is a product of matrices with the weight as it lies in
memory,

    y[p, o]        = sum_k patches[p, k] weight[o, k],    k over channels and taps
    patches[p, ok] = sum_c x[p, c] weight[c, ok],         transposed,

so nothing is packed or transposed, and one of the gradients is the other product. What the weight's
gradient costs most is memory that is new to the process, so it lies where maps do. P counts the
positions of the smaller map over the batch. Derivatives of any order are those of torch's own
functions. Source: Chellapilla, Puri and Simard 2006, "High performance convolutional neural
networks for document processing".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from pygan.ops.matrix_product import matrix_product

# Measured against torch's convolutions with 256 to 1024 channels: 1.3 to 4 times as fast with up
# to this many positions, and no faster with four times as many.
POSITIONS = 64
LEAST_WEIGHT = 1 << 20


def is_small(conv_pass: str, x: Tensor, weight: Tensor) -> bool:
    """Whether "up" or "down" of x is faster this way.

    Args:
        x: ``[N, C, H, W]``, the map that is convolved.
        weight: ``[small channels, big channels, 4, 4]``.
    """
    stride = 1 if conv_pass == "up" else 2
    n, _, height, width = x.shape
    return (
        weight.numel() >= LEAST_WEIGHT
        and 0 < n * (height // stride) * (width // stride) <= POSITIONS
        and weight.is_contiguous()
    )


def down(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(x, weight, bias, 2, 1)``, in channels_last: ``[N, C, H, W]`` to ``[N, O, ...]``."""
    n, _, height, width = x.shape
    patches = F.unfold(x, 4, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    y = matrix_product(patches, weight.flatten(1).t(), bias)
    return y.view(n, height // 2, width // 2, -1).permute(0, 3, 1, 2)


def up(x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]) -> Tensor:
    """``conv_transpose2d(x, weight, bias, 2, 1, output_padding)``, contiguous: ``[N, C, H, W]`` to
    ``[N, O, H', W']``."""
    n, _, height, width = x.shape
    patches = matrix_product(x.flatten(2).transpose(1, 2).flatten(0, 1), weight.flatten(1))
    size = tuple(2 * s + extra for s, extra in zip((height, width), output_padding, strict=True))
    y = F.fold(patches.view(n, height * width, -1).transpose(1, 2), size, 4, padding=1, stride=2)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]
