"""Gradients of the gradients of batch norm and activation, for penalties on a network's slope.

With dz = dy * f'(z), M values a channel and group, and all sums over these,

    dx = weight * invstd * (dz - (sum dz + xhat * sum dz * xhat) / M)
    dweight = sum dz * xhat,  dbias = sum dz

Given the gradients ddx, ddweight and ddbias of an objective with respect to these three:

    ddz = weight * invstd * (ddx - (sum ddx + xhat * sum ddx * xhat) / M) + ddweight * xhat + ddbias
    k = sum ddx * dz - (sum ddx * sum dz + sum ddx * xhat * sum dz * xhat) / M
    q = ddweight * dz - weight * invstd * (ddx * sum dz * xhat + dz * sum ddx * xhat) / M

    dy: ddz * f'(z)
    x:  invstd * (q - (sum q + xhat * (sum q * xhat + weight * invstd * k)) / M)
    weight: invstd * k

In evaluation there is no term with M. The kernels of the CPU have this for channels_last maps, into
which others are copied, and activations without a second derivative; the rest, and derivatives of
third order, are those of the reference. Saved: x, dy, weight, bias and the statistics. Gradient
order: x, dy, weight, bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pygan.ops import map_memory, native, norm_act
from pygan.ops.dense import dense
from pygan.ops.layout import reordered
from pygan.ops.wanted import wanted_gradients

if TYPE_CHECKING:
    from pygan.ops.norm_act import Settings


def differentiable_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    wants: Sequence[bool],
    settings: Settings,
) -> Sequence[Tensor | None]:
    """Gradients of x, weight and bias, each where wanted, as functions of dy, x and the parameters;
    the running statistics are read in evaluation."""
    bends = settings.activation in ("tanh", "sigmoid")
    if not bends and norm_act.supports_cpu(x, weight, bias) is None:
        rest = (weight, bias, statistics, running_mean, running_var, wants, settings)
        if dense(x)[1] == 0:
            return _with_kernels(x, dy, *rest)
        # Copies of a map cost a fraction of what the reference does.
        dx, dweight, dbias = _with_kernels(_in_rows(x), _in_rows(dy), *rest)
        return (None if dx is None else _in_planes(dx, x), dweight, dbias)
    y = norm_act.norm_act_ref(x, running_mean, running_var, weight, bias, settings)
    return _grads(y, (x, weight, bias), dy, wants)


def _with_kernels(*arguments: Any) -> Sequence[Tensor | None]:
    found: Sequence[Tensor | None] = _NormActBackward.apply(*arguments)
    return found


def _in_rows(x: Tensor) -> Tensor:
    """``[N, C, *]`` as a 4-D map in channels_last, with gradients in the layout of x."""
    x = x.flatten(2).unsqueeze(2) if x.dim() != 4 else x
    return reordered(x, torch.channels_last)


def _in_planes(x: Tensor, like: Tensor) -> Tensor:
    """Such a map as it was, contiguous and of the shape of ``like``."""
    return reordered(x, torch.contiguous_format).view(like.shape)


def _grads(
    y: Tensor, tensors: Sequence[Tensor | None], dy: Tensor, wants: Sequence[bool]
) -> list[Tensor | None]:
    """Of y with respect to each tensor that is wanted, as functions of all of them and dy."""
    inputs = [t for t, wanted in zip(tensors, wants, strict=True) if wanted and t is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [
        next(found) if wanted and t is not None else None
        for t, wanted in zip(tensors, wants, strict=True)
    ]


# The sums that the gradients of weight and bias are come with dy's.
_BESIDE = {2: 1, 3: 1}


class _NormActBackward(torch.autograd.Function):
    """The backward by the CPU's kernels, and its own, for penalties on gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dy: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        wants: Sequence[bool],
        settings: Settings,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, dy, weight, bias, statistics, running_mean, running_var)
        ctx.set_materialize_grads(False)
        ctx.wants, ctx.settings = wants, settings
        return norm_act.cpu_backward(x, dy, weight, bias, statistics, wants, settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, dy, weight, bias, statistics, running_mean, running_var = ctx.saved_tensors
        wants, settings = wanted_gradients(ctx, _BESIDE), ctx.settings
        if not torch.is_grad_enabled():
            found = _cpu_second(x, dy, weight, bias, statistics, grads, wants, settings)
            # The slope of a ReLU depends on the bias, though it changes nowhere; torch says 0.
            kinked = wants[3] and bias is not None and settings.activation != "none"
            dbias = torch.zeros_like(bias) if kinked else None
            return (*found, dbias, *(None,) * 5)
        made_of = (x, dy, weight, bias)
        third = _third(made_of, running_mean, running_var, grads, ctx.wants, wants[:4], settings)
        return (*third, *(None,) * 5)


def _third(
    made_of: Sequence[Tensor | None],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    cotangents: Sequence[Tensor | None],
    first_wants: Sequence[bool],
    wants: Sequence[bool],
    settings: Settings,
) -> list[Tensor | None]:
    """Gradients of x, dy, weight and bias, which the gradients are made of, each where wanted, as
    functions of them and of the cotangents."""
    # Views, so that a dy that depends on x counts as itself.
    made_of = [None if t is None else t.view_as(t) for t in made_of]
    x, dy, weight, bias = made_of
    assert x is not None and dy is not None
    y = norm_act.norm_act_ref(x, running_mean, running_var, weight, bias, settings)
    first = _grads(y, (x, weight, bias), dy, first_wants)
    pairs = [
        (f, g) for f, g in zip(first, cotangents, strict=True) if f is not None and g is not None
    ]
    inputs = [t for t, wanted in zip(made_of, wants, strict=True) if wanted and t is not None]
    found = iter(
        torch.autograd.grad(
            [f for f, _ in pairs],
            inputs,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if wanted else None for wanted in wants]


def _cpu_second(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    cotangents: Sequence[Tensor | None],
    wants: Sequence[bool],
    settings: Settings,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, dy and weight, each where wanted, of an objective with ``cotangents`` with
    respect to dx, dweight and dbias: ``norm_act_second`` in csrc/pygan.h."""
    module = native.load()
    assert module is not None
    ddx, ddweight, ddbias = cotangents
    x, layout = dense(x)
    dy, ddx = (
        t if t.stride() == x.stride() and t.dtype == x.dtype else map_memory.empty_like(x).copy_(t)
        for t in (dy, torch.zeros_like(x) if ddx is None else ddx)
    )
    ddweight, ddbias = (None if t is None else t.contiguous() for t in (ddweight, ddbias))
    shape = norm_act.shape_of(module, x, layout, settings)
    dx, d_dy = (map_memory.empty_like(x) if wanted else None for wanted in wants[:2])
    dweight = torch.zeros_like(weight) if wants[2] and weight is not None else None
    scratch = torch.empty(module.norm_act_second_scratch(shape), dtype=torch.float64)
    native.run(
        module.norm_act_second,
        shape,
        x,
        dy,
        ddx,
        *(weight, bias, ddweight, ddbias),
        *norm_act.mean_and_invstd(statistics),
        settings.training,
        *(dx, d_dy, dweight),
        scratch,
    )
    return dx, d_dy, dweight
