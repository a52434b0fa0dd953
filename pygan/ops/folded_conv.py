"""A 3x3 convolution beside a nearest upsampling or an average pooling by 2, as one of stride 2.

With v ``[A, B, 3, 3]`` and, along each dimension, K = [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]:

    upsample_conv2d: conv2d(upsample(x), v, padding=1) = up(x, w),
        w[b, a, i, j] = sum_{s, t} K[i, s] K[j, t] v[a, b, s, t]
    conv2d_avg_pool: avg_pool(conv2d(x, v, padding=1)) = down(x, w),
        w[a, b, i, j] = sum_{s, t} K[3 - i, s] K[3 - j, t] v[a, b, s, t] / 4

with up and down of :mod:`pygan.ops.strided_conv`, borders and odd sides included: 16
multiplications in place of 36, and Winograd's fewer ones on top. The map from v to w is linear and
the gradient of v is its transpose at the gradient of w, to any order; everything else comes from up
and down.

Saved: what up and down save. Gradient order: input, weight, bias. The plain pair runs where one of
the three passes has no kernel, or the map is so small that folding v costs more than it saves.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError
from pygan.ops import dispatch
from pygan.ops.strided_conv import (
    METHODS,
    _autocast_dtype,
    _layer,
    _supports_cpu,
    down,
    is_last,
    up,
)

MIN_POSITIONS = 256  # of the small map, in the whole batch

_LAST, _FIRST = torch.channels_last, torch.contiguous_format


def upsample_conv2d_ref(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition in torch."""
    return F.conv2d(F.interpolate(input, scale_factor=2.0, mode="nearest"), weight, bias, 1, 1)


def conv2d_avg_pool_ref(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition in torch."""
    return F.avg_pool2d(F.conv2d(input, weight, bias, 1, 1), 2)


@functools.cache
def _taps(conv_pass: str) -> Tensor:
    """[16, 9]: the share of each of the 3x3 taps in each of the 4x4."""
    # Not an inference tensor, wherever the first call comes from.
    with torch.inference_mode(False):
        rows = [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]
        one = torch.tensor(rows, dtype=torch.float32, device="cpu")
        if conv_pass == "down":
            one = one.flip(0) / 2
        return torch.kron(one, one)


def _times(taps: Tensor, rows: Tensor) -> Tensor:
    """[K, n, C] of [n, m] and [K, m, C], in float32 under autocast too."""
    with torch.autocast("cpu", enabled=False):
        return torch.bmm(taps.expand(rows.shape[0], *taps.shape), rows)


class _Fold(torch.autograd.Function):
    """w, in channels_last as the kernels like it, of a float32 v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, conv_pass: str) -> Tensor:
        ctx.conv_pass, ctx.last = conv_pass, is_last(v)
        if conv_pass == "up":
            # The product takes a transposed matrix as it is, but not one with no dense dimension.
            rows = v.contiguous().flatten(2).permute(1, 2, 0)
        else:
            rows = v.flatten(2).transpose(1, 2)
        return _times(_taps(conv_pass), rows).unflatten(1, (4, 4)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Unfold.apply(grads[0], ctx.conv_pass, ctx.last), None


class _Unfold(torch.autograd.Function):
    """The transpose of :class:`_Fold`, in channels_last where ``last``, else contiguous."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, conv_pass: str, last: bool) -> Tensor:
        ctx.conv_pass = conv_pass
        rows = _times(_taps(conv_pass).t(), w.flatten(2).transpose(1, 2))
        v = rows.permute(2, 0, 1) if conv_pass == "up" else rows.transpose(1, 2)
        return v.unflatten(2, (3, 3)).contiguous(memory_format=_LAST if last else _FIRST)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Fold.apply(grads[0], ctx.conv_pass), None, None


def fold(weight: Tensor, conv_pass: str) -> Tensor:
    """The 4x4 weight of "up" or "down" for a 3x3 ``weight``, in its dtype, summed in float32."""
    return _Fold.apply(weight.float(), conv_pass).to(weight.dtype)


def _supports(conv_pass: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    reason = _supports_cpu(input, weight, bias, 1, (3, 3))
    if reason is None and conv_pass == "down" and min(input.shape[2:]) < 2:
        return f"a map of {tuple(input.shape[2:])} holds no window of 2x2"
    return reason


def _is_faster(conv_pass: str, input: Tensor, weight: Tensor) -> bool:
    """Whether the fold beats the plain pair: by the shape alone, never by trying."""
    (n, b, height, width), a = input.shape, weight.shape[0]
    if conv_pass == "up":
        small, big = (n, b, height, width), (n, a, 2 * height, 2 * width)
    else:
        small, big = (n, a, height // 2, width // 2), (n, b, height, width)
    if n * small[2] * small[3] < MIN_POSITIONS:
        return False
    dtype = _autocast_dtype() or input.dtype
    method = "direct" if weight.dtype is torch.bfloat16 else "auto"
    layer = _layer(dtype, _LAST, small, big, method, False, "none", torch.get_num_threads())
    return None not in (layer.up, layer.down, layer.weight_grad)


def _run(
    conv_pass: str, input: Tensor, weight: Tensor, bias: Tensor | None, method: str, impl: str
) -> Tensor | None:
    """The folded form, or None where the plain pair is to run."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    if impl == "auto":
        impl = dispatch.wished()
    if impl == "auto" and method != "auto":
        impl = "cpu"
    candidates = [
        ("cpu", lambda: _supports(conv_pass, input, weight, bias)),
        ("torch", dispatch.always),
    ]
    if dispatch.choose("folded_conv", impl, candidates) == "torch":
        if method != "auto":
            raise UserError(f"method {method!r} is of the cpu implementation, not of torch's")
        return None
    if impl == "auto" and not _is_faster(conv_pass, input, weight):
        return None
    run = up if conv_pass == "up" else down
    y = run(input, fold(weight, conv_pass), bias, method=method, impl="cpu")
    # The folded weight is in channels_last, which up and down take for a wish.
    return y if is_last(input) or is_last(weight) else y.contiguous()


def upsample_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """See :func:`pygan.functional.upsample_conv2d`."""
    y = _run("up", input, weight, bias, method, impl)
    return upsample_conv2d_ref(input, weight, bias) if y is None else y


def conv2d_avg_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """See :func:`pygan.functional.conv2d_avg_pool`."""
    y = _run("down", input, weight, bias, method, impl)
    return conv2d_avg_pool_ref(input, weight, bias) if y is None else y
