"""Batch norm, activation and the strided convolution behind them, with no map in between.

    y = conv(f(z)),  z = weight_n * (x - mean) * invstd + bias_n,  conv = up or down

as ``norm_act`` and ``strided_conv`` define them, for f(z) = max(z, slope * z): ReLU, LeakyReLU with
a slope up to 1, or nothing. Forward takes the statistics in one pass over x; the convolution's
kernel computes f(z) from x as it reads it, and so does ``weight_grad`` backward:

    df = conv^T(dy, w),  dw = weight_grad(f(z), dy),  dx, dweight_n, dbias_n from df as in norm_act

where dx takes df's place. f(z) is never stored, which saves one map of x's size until backward
and one writing and reading of it. On a CPU that is always faster; on a GPU
:mod:`pygan.ops.norm_conv_gpu` measures where it is, and elsewhere both run one after the other.

Saved: x, both weights and the statistics. Gradient order: x, norm weight, norm bias, weight, bias.
Shapes: x ``[N, C, H, W]`` in channels_last. Source: the recomputation is that of Rota Bulo et al.
2018, arXiv:1712.02616, without their inversion of the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygan.ops import dispatch, norm_act, norm_act_second, norm_act_triton, strided_conv
from pygan.ops.layout import is_last
from pygan.ops.moments import Moments
from pygan.ops.norm_act import Settings
from pygan.ops.norm_conv_gpu import Norm
from pygan.ops.strided_conv import Call
from pygan.ops.wanted import wanted_gradients


class Conv(NamedTuple):
    """The convolution behind: ``strided_conv.up`` or ``down`` with the arguments they take."""

    conv_pass: str  # "up" or "down"
    weight: Tensor
    bias: Tensor | None = None
    output_padding: Sequence[int] = (0, 0)  # of up
    activation: str = "none"  # behind it, of those that it takes
    negative_slope: float = 0.0
    moments: Moments | None = None  # of the output, for a batch norm behind it


def norm_conv_ref(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
    conv: Conv,
) -> Tensor:
    """The definition in torch."""
    y = norm_act.norm_act_ref(x, running_mean, running_var, weight, bias, settings)
    if conv.conv_pass == "up":
        z = strided_conv.up_ref(y, conv.weight, conv.bias, conv.output_padding)
        return norm_act.activate(z, conv.activation, 0.0)
    return strided_conv.down_ref(y, conv.weight, conv.bias, conv.activation, conv.negative_slope)


def _slope(settings: Settings) -> float | None:
    """Of f(z) = max(z, slope * z); None for any other activation."""
    if settings.activation == "leaky_relu":
        return settings.negative_slope if 0 <= settings.negative_slope <= 1 else None
    return {"relu": 0.0, "none": 1.0}.get(settings.activation)


class _Prepared(NamedTuple):
    """What the kernels run: the convolution, and the batch norm's implementation by name."""

    call: Call
    norm: str

    @property
    def kernels(self) -> norm_act.Kernels:
        return norm_act.KERNELS[self.norm]


def _prepared(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    settings: Settings,
    conv: Conv,
    given: Tensor | Moments | None,
) -> _Prepared | None:
    """What the kernels run, None where norm and convolution are to run apart."""
    usual = dispatch.wished() in ("auto", "triton") and x.dim() == 4
    if conv.conv_pass == "down" and conv.activation != "none":
        return None
    if not usual or _slope(settings) is None or not is_last(x):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    norm = norm_act.choose("auto", x, *parameters, averaged=settings.averaged)
    if norm == "torch":
        return None
    moments = conv.moments
    if moments is not None and moments.groups != settings.groups:
        moments = None
    source = "batch" if settings.training else "running"
    if isinstance(given, Moments) and norm_act.parts_for(given, norm, settings) is not None:
        source = "moments"
    call = strided_conv.prepare(
        conv.conv_pass,
        x,
        conv.weight,
        conv.bias,
        conv.output_padding,
        normalized=Norm(source, settings.groups),
        moments=moments,
        activation=conv.activation,
    )
    takes = call is not None and (call.layer.native or call.layer.gpu is not None)
    return _Prepared(call, norm) if call and takes and call.x.dtype is x.dtype else None


_BESIDE = {1: 0, 2: 0, 4: 3}  # in _NormConv's order


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        settings: Settings,
        conv: Conv,
        prepared: _Prepared,
        given: Tensor | Moments | None,
    ) -> Tensor:
        call = prepared.call._replace(x=x, weight=weight, bias=bias)
        prepared = prepared._replace(call=call)
        y, statistics, coefficients = _forward(
            prepared, norm_weight, norm_bias, running_mean, running_var, settings, conv, given
        )
        frozen = (None, None) if settings.training else (running_mean, running_var)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, statistics, coefficients, *frozen)
        ctx.settings, ctx.layer, ctx.last = settings, call.layer, call.last
        ctx.up, ctx.norm = conv.conv_pass == "up", prepared.norm
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, statistics, coefficients, *_ = ctx.saved_tensors
        up, settings, wants = ctx.up, ctx.settings, wanted_gradients(ctx, _BESIDE)
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        dbias = dy.sum((0, 2, 3), dtype=torch.float32) if wants[4] else None
        if torch.is_grad_enabled():
            found = _differentiable(ctx, dy)
            return (*found, dbias, *(None,) * 6)
        through: tuple[Tensor | None, ...] = (None,) * 3
        if any(wants[:3]):
            adjoint = strided_conv.run_down if up else strided_conv.run_up
            df = adjoint(dy, weight, None, ctx.layer, True)
            through = norm_act.KERNELS[ctx.norm].backward(
                x, df, norm_weight, norm_bias, statistics, wants[:3], settings, in_place=True
            )
        dweight = None
        if wants[3]:
            small, big = (x, dy) if up else (dy, x)
            dweight = strided_conv.run_weight_grad(
                small, big, ctx.layer, None, _slope(settings) or 0.0, coefficients
            )
        return (*through, dweight, dbias, *(None,) * 6)


def _differentiable(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """Gradients of x, the norm's weight and bias and the weight as functions of all and dy."""
    x, norm_weight, norm_bias, weight, statistics, _, running_mean, running_var = ctx.saved_tensors
    wants, settings, layer = wanted_gradients(ctx, _BESIDE), ctx.settings, ctx.layer.plain(x.dtype)
    found: list[Tensor | None] = [None] * 4
    if any(wants[:3]):
        df = strided_conv.Conv.apply("down" if ctx.up else "up", dy, weight, None, layer, True)
        arguments = (x, df, norm_weight, norm_bias, statistics, running_mean, running_var)
        found[:3] = norm_act_second.differentiable_backward(*arguments, wants[:3], settings)
    if wants[3]:
        f = norm_act.norm_act(
            x,
            running_mean,
            running_var,
            norm_weight,
            norm_bias,
            **settings._asdict(),
            impl=ctx.norm,
            given=statistics,
        )
        small, big = (f, dy) if ctx.up else (dy, f)
        found[3] = strided_conv.WeightGrad.apply(small, big, layer)
    return found


def _forward(
    prepared: _Prepared,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
    conv: Conv,
    given: Tensor | Moments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the statistics and coefficients of ``norm_act.Kernels``."""
    call, parts = prepared.call, None
    if isinstance(given, Moments):
        parts, given = norm_act.parts_for(given, prepared.norm, settings), None
    norm = (norm_weight, norm_bias, running_mean, running_var, settings)
    if parts is not None:
        found = norm_act_triton.merged(parts, *norm)
    else:
        found = prepared.kernels.coefficients(call.x, *norm, given)
    slope = _slope(settings)
    assert slope is not None
    if conv.conv_pass == "up":
        return strided_conv.run_up(*call, None, slope, found[1], conv.moments), *found
    return strided_conv.run_down(*call, "none", slope, found[1], conv.moments), *found


def norm_conv(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
    conv: Conv,
    given: Tensor | Moments | None = None,
) -> Tensor:
    """``conv`` of ``norm_act`` of x, as one operation where the kernels take both, which is in
    channels_last, else one after the other; ``given`` as in ``norm_act``."""
    settings = norm_act.checked_settings(x, running_mean, running_var, settings)
    parameters = (weight, bias, running_mean, running_var)
    prepared = _prepared(x, parameters, settings, conv, given)
    if prepared is None:
        y = norm_act.norm_act(
            x, running_mean, running_var, weight, bias, **settings._asdict(), given=given
        )
        if conv.conv_pass == "up":
            return strided_conv.up(y, *conv[1:5], moments=conv.moments)
        return strided_conv.down(
            y, *conv[1:3], conv.activation, conv.negative_slope, moments=conv.moments
        )
    if torch.is_grad_enabled():
        call = prepared.call
        y = _NormConv.apply(
            *(x, weight, bias, call.weight, call.bias, running_mean, running_var),
            *(settings, conv, prepared, given),
        )
    else:
        y = _forward(prepared, *parameters, settings, conv, given)[0]
    return strided_conv.activated(y, conv.activation)
