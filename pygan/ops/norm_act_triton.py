"""The Triton kernels of :mod:`pygan.ops.norm_act`, which has the definitions.

Tensors are on one GPU: x ``[N, C, *]`` float32, bfloat16 or float16, everything ``[C]`` float32.
Nothing here synchronises; scratch comes from torch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pygan.ops import dispatch, gpu
from pygan.ops.dense import dense
from pygan.ops.native import ACTIVATIONS

if TYPE_CHECKING:
    from pygan.kernels.norm_act import Map
    from pygan.ops.norm_act import Settings

_ADDRESSED = 2**31 - 2**18  # values that a program may count, and go beyond by a block of rows


def supports(x: Tensor) -> str | None:
    """Reason that the kernels cannot take x, or None."""
    if (reason := gpu.unfit(x.dtype)) is not None:
        return reason
    if x.numel() >= _ADDRESSED or x.numel() == 0:
        return f"the input has {x.numel()} values, not 1 to {_ADDRESSED - 1}"
    return dispatch.supports_triton(x)


def _map(x: Tensor, layout: int, groups: int) -> Map:
    from pygan.kernels import norm_act as kernels

    size = x.shape[2:].numel()
    return kernels.cut(x.shape[0] // groups * size, x.shape[1], size, groups, layout == 0)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y, and mean and invstd as ``[2, groups, C]``, ``given`` or of x."""
    from pygan.kernels import norm_act as kernels

    x, layout = dense(x)
    training, momentum, eps, activation, slope, groups, averaged = settings
    y, map, f = torch.empty_like(x), _map(x, layout, groups), ACTIVATIONS[activation]
    running = gpu.both(running_mean, running_var) if given is None else None
    found = given
    if found is None:
        found = x.new_empty((2, groups, x.shape[1]), dtype=torch.float32)
    with gpu.on(x.device):
        if training and given is None:
            _take(y, found, running, averaged, x, weight, bias, map, momentum, eps, f, slope)
        else:
            kernels.values(y, found, running, x, weight, bias, map, eps, f, slope)
    if training and running is not None:
        torch.autograd.graph.increment_version(list(running))
    return y, found


def _take(
    y: Tensor | None,
    found: Tensor,
    running: tuple[Tensor, Tensor] | None,
    averaged: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    map: Map,
    momentum: float,
    *rest: Any,
) -> None:
    """``statistics_and_values`` of the kernels, which takes the ``rest``; running statistics follow
    each group, or the mean of them where ``averaged``."""
    from pygan.kernels import norm_act as kernels

    variance = None if running is None or not averaged else torch.empty_like(found[0])
    followed = running if variance is None else None
    operands = (x, weight, bias, map, momentum)
    kernels.statistics_and_values(y, found, variance, followed, *operands, *rest)
    if running is not None and variance is not None:
        gpu.follow_mean(*running, found[0], variance, momentum)


def coefficients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and invstd as ``[2, groups, C]``, ``given`` or of x, and as ``[groups, 3, C]`` what
    turns a channels_last x into z: mean, scale and shift. Running statistics follow those of x."""
    from pygan.kernels import norm_act_coefficients

    training, momentum, eps, _, _, groups, averaged = settings
    running = gpu.both(running_mean, running_var) if given is None else None
    found = given
    if found is None:
        found = x.new_empty((2, groups, x.shape[1]), dtype=torch.float32)
    result = x.new_empty((groups, 3, x.shape[1]), dtype=torch.float32)
    with gpu.on(x.device):
        if training and given is None:
            map, none = _map(x, 0, groups), ACTIVATIONS["none"]
            _take(None, found, running, averaged, x, None, None, map, momentum, eps, none, 0.0)
        frozen = None if training else running
        norm_act_coefficients.from_statistics(result, found, frozen, weight, bias, eps)
    if training and running is not None:
        torch.autograd.graph.increment_version(list(running))
    return found, result


def merged(
    parts: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """As :func:`coefficients`, of a map whose ``parts`` :mod:`pygan.ops.moments` has."""
    from pygan.kernels import norm_act_coefficients

    groups, channels = parts.shape[0], parts.shape[3]
    running = gpu.both(running_mean, running_var)
    found, result = parts.new_empty((2, groups, channels)), parts.new_empty((groups, 3, channels))
    with gpu.on(parts.device):
        norm_act_coefficients.merge(
            found, result, running, parts, weight, bias, settings.momentum, settings.eps
        )
    if running is not None:
        torch.autograd.graph.increment_version(list(running))
    return found, result


def backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    wants: Sequence[bool],
    settings: Settings,
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each where wanted; ``in_place`` leaves that of x in dy,
    which then has x's layout."""
    from pygan.kernels import norm_act_grad as kernels

    x, layout = dense(x)
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    dx = None
    if wants[0]:
        dx = dy if in_place else torch.empty_like(x)
    dweight = torch.empty_like(weight) if wants[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wants[2] and bias is not None else None
    with gpu.on(x.device):
        kernels.gradients(
            *(dx, dweight, dbias, x, dy, statistics, weight, bias),
            _map(x, layout, settings.groups),
            settings.training,
            ACTIVATIONS[settings.activation],
            settings.negative_slope,
        )
    return dx, dweight, dbias
