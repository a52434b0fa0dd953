"""A product of matrices whose outputs lie where maps do (``map_memory``).

    y = x w + bias;  dx = dy w^T,  dw = x^T dy,  dbias = sum of dy over rows

Shapes: x ``[N, K]``, w ``[K, M]`` (or the transpose of a contiguous one), bias ``[M]``, y
``[N, M]``. Under autocast x, w and bias are cast, and w's gradient comes back in the type of w.
Saved: x where w wants a gradient, w where x does. Gradient order: x, w, bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pygan.ops import map_memory
from pygan.ops.wanted import wanted_gradients


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype is dtype or torch.is_grad_enabled():
        return x.to(dtype)
    if x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous():
        return _cast(x.t(), dtype).t()
    return map_memory.empty(x.shape, dtype).copy_(x)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return a @ b
    out = map_memory.empty((a.shape[0], b.shape[1]), a.dtype)
    # Of a column and a row torch's product takes up to twice as long.
    return torch.mul(a, b, out=out) if a.shape[1] == 1 else torch.mm(a, b, out=out)


def _run(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = map_memory.empty((x.shape[0], w.shape[1]), dtype)
    x, w = _cast(x, dtype), _cast(w, dtype)
    if bias is None:
        return torch.mm(x, w, out=y)
    return torch.addmm(_cast(bias, dtype), x, w, out=y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        wants = ctx.needs_input_grad
        ctx.save_for_backward(x if wants[1] else None, w if wants[0] else None)
        ctx.dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype
        ctx.transposed = not w.is_contiguous()
        return _run(x, w, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, w), wants = grads, ctx.saved_tensors, wanted_gradients(ctx, {2: 1})
        dx = dw = dbias = None
        if wants[0]:
            dx = _cast(_mm(dy, _cast(w, dy.dtype).t()), ctx.dtypes[0])
        if wants[1]:
            x = _cast(x, dy.dtype)
            # In w's own memory order, so that it becomes the parameter's gradient as it is.
            dw = _mm(dy.t(), x).t() if ctx.transposed else _mm(x.t(), dy)
            dw = _cast(dw, ctx.dtypes[1])
        if wants[2]:
            dbias = dy.sum(0).to(ctx.dtypes[2])
        return dx, dw, dbias, None


def matrix_product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ w + bias`` of plain CPU tensors, differentiable to any order."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if torch.is_grad_enabled():
        return _Product.apply(x, w, bias, dtype)
    return _run(x, w, bias, dtype)
