"""The two layouts of a map ``[N, C, H, W]``, and ways between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LAST, _FIRST = torch.channels_last, torch.contiguous_format


def is_last(x: Tensor) -> bool:
    """Whether torch's convolutions take x for channels_last, by strides alone as they do."""
    _, c, h, w = x.shape
    n_step, c_step, h_step, w_step = x.stride()
    return (
        w_step >= c * c_step
        and h_step >= w * w_step
        and n_step >= h * h_step
        and h * h_step != c_step
        and x.numel() > 0
    )


def contiguous(x: Tensor) -> Tensor:
    """x contiguous, by its strides too where one channel or one position leaves them open."""
    x = x.contiguous()
    return x.flatten().view(x.shape) if x.dim() == 4 and is_last(x) else x


class _Reordered(torch.autograd.Function):
    """A map in the other layout, whose gradient has the layout of the map: operations that meet
    both in different ones are many times slower."""

    @staticmethod
    def forward(x: Tensor, format: torch.memory_format) -> Tensor:
        return contiguous(x) if format is _FIRST else x.contiguous(memory_format=format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.format = _LAST if is_last(inputs[0]) else _FIRST

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.contiguous(memory_format=ctx.format), None


def reordered(x: Tensor, format: torch.memory_format) -> Tensor:
    """A map in a layout, itself where it has that, with gradients in the layout of x."""
    differs = x.dim() == 4 and not x.is_contiguous(memory_format=format)
    if differs and x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Reordered.apply(x, format)
        return result
    return contiguous(x) if format is _FIRST else x.contiguous(memory_format=format)
