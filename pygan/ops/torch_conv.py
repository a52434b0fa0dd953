"""Convolutions that torch runs, with second derivatives that keep maps in channels_last.

The first derivatives are torch's. Torch makes the second ones of transposed and grouped
convolutions of other layers, slower ones in channels_last, and hands them on contiguous, so that
the pointwise operations before them meet maps in two layouts. With (dx, dw) the gradients of
y = conv(x, w), both bilinear, and (ddx, ddw) those of a function of them:

    ddy = conv(ddx, w) + conv(x, ddw),   x: dx(dy, ddw),   w: dw(dy, ddx)

are again a convolution and its gradients, and so on to any order. Shapes: x ``[N, C, H, W]``, w as
torch holds it. Saved: x, w and, for the second derivatives, dy. Gradient order: x, w, bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.ops import dispatch
from pygan.ops.wanted import wanted_gradients


class Sweep(NamedTuple):
    """How a weight is swept over its map, in the order of ``torch.convolution``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = (1, 1)
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)
    groups: int = 1


def _is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep) -> Tensor:
    """``conv2d`` or ``conv_transpose2d`` of ``[N, C, H, W]``."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    kept = (
        torch.is_grad_enabled()
        and x.dim() == weight.dim() == 4
        and (_is_last(x) or _is_last(weight))
        and any(t.requires_grad for t in tensors)
        and all(t.dtype is x.dtype for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and dispatch.supports_cpu(*tensors) is None
    )
    if kept:
        y: Tensor = _Conv.apply(x, weight, bias, sweep)
        return y
    if not sweep.transposed:
        return F.conv2d(x, weight, bias, *sweep[:3], sweep.groups)
    stride, padding, dilation, _, output_padding, groups = sweep
    return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, sweep: Sweep, wants: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    def run(dy: Tensor, x: Tensor, wants: Sequence[bool]) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.ops.aten.convolution_backward(
            dy, x, weight, None, *sweep, (*wants, False)
        )
        return found

    large = weight.numel() > x.numel() + dy.numel()
    if not (wants[1] and large and x.is_contiguous(memory_format=torch.channels_last)):
        dx, dweight, _ = run(dy, x, wants)
        return dx, dweight
    # From channels_last maps the gradient of the weight comes in channels_last too, through a
    # reordering of some nanoseconds an element: copies of both maps cost less here.
    dx = run(dy, x, (True, False))[0] if wants[0] else None
    return dx, run(dy.contiguous(), x.contiguous(), (False, True))[1]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sweep = sweep
        return torch.convolution(x, weight, bias, *sweep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight), wants = grads, ctx.saved_tensors, wanted_gradients(ctx, {2: 1})[:3]
        dbias = dy.sum((0, 2, 3)) if wants[2] else None
        if not any(wants[:2]):
            return None, None, dbias, None
        gradients = _ConvBackward.apply if torch.is_grad_enabled() else _gradients
        return (*gradients(dy, x, weight, ctx.sweep, wants[:2]), dbias, None)


class _ConvBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, sweep: Sweep, wants: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        ctx.sweep = sweep
        return _gradients(dy, x, weight, sweep, wants)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy, x, weight), (ddx, ddweight), sweep = ctx.saved_tensors, grads, ctx.sweep
        if ddx is not None and x.is_contiguous(memory_format=torch.channels_last):
            ddx = ddx.contiguous(memory_format=torch.channels_last)
        wants = wanted_gradients(ctx)
        ddy = dx = dweight = None
        if wants[0]:
            pairs = ((ddx, weight), (x, ddweight))
            parts = [conv(a, b, None, sweep) for a, b in pairs if a is not None and b is not None]
            ddy = sum(parts[1:], parts[0]) if parts else None
        gradients = _ConvBackward.apply if torch.is_grad_enabled() else _gradients
        if wants[1] and ddweight is not None:
            dx = gradients(dy, x, ddweight, sweep, (True, False))[0]
        if wants[2] and ddx is not None:
            dweight = gradients(dy, ddx, weight, sweep, (False, True))[1]
        return ddy, dx, dweight, None, None
