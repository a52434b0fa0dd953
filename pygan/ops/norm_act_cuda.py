"""The CUDA kernels of :mod:`pygan.ops.norm_act`, which has the definitions: statistics per group
of the batch, running statistics, forward and backward, in both memory layouts.

Tensors are on a GPU: x ``[N, C, *]`` float32, bfloat16 or float16, everything ``[C]`` float32.
Nothing here synchronises; scratch comes from torch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygan.ops import cuda_native, dispatch, gpu
from pygan.ops.dense import dense
from pygan.ops.native import ACTIVATIONS, address


def supports(x: Tensor) -> str | None:
    """Reason that the kernels cannot take x, or None."""
    if x.numel() == 0:
        return "the input is empty"
    return dispatch.supports_cuda(x)


def _shape(x: Tensor, layout: int, settings: Any) -> Any:
    return cuda_native.module().NormActShape(
        gpu.DTYPES[x.dtype],
        layout,
        x.shape[0],
        x.shape[1],
        x.shape[2:].numel(),
        settings.groups,
        ACTIVATIONS[settings.activation],
        settings.negative_slope,
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Any,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and mean and invstd as ``[2, groups, C]``, ``given`` or of x."""
    x, layout = dense(x.detach())
    y = torch.empty_like(x)
    found = _run_forward(
        x, layout, weight, bias, running_mean, running_var, settings, y=y, given=given
    )
    return y, found


def coefficients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Any,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and invstd as ``[2, groups, C]``, ``given`` or of x, and as ``[groups, 3, C]`` what
    turns a channels_last x into z: mean, scale and shift. Running statistics follow those of x."""
    result = x.new_empty((settings.groups, 3, x.shape[1]), dtype=torch.float32)
    found = _run_forward(
        *(x.detach(), 0, weight, bias, running_mean, running_var, settings),
        coefficients=result,
        given=given,
    )
    return found, result


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, settings: Any
) -> Tensor:
    """Mean and invstd of x as ``[2, groups, C]``; the running statistics follow them."""
    x, layout = dense(x.detach())
    return _run_forward(x, layout, None, None, running_mean, running_var, settings)


def _run_forward(
    x: Tensor,
    layout: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Any,
    *,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    if y is None and coefficients is None and given is None and not settings.training:
        assert running_mean is not None and running_var is not None
        return torch.stack([running_mean, torch.rsqrt(running_var + settings.eps)]).view(2, 1, -1)
    module, shape = cuda_native.module(), _shape(x, layout, settings)
    training, found = settings.training and given is None, given
    running = gpu.both(running_mean, running_var) if given is None else None
    if found is None:
        found = x.new_empty((2, settings.groups, x.shape[1]), dtype=torch.float32)
    averaged = training and running is not None and settings.averaged
    variance = torch.empty_like(found[0]) if averaged else None
    followed = (None, None) if running is None or averaged else running
    scratch = x.new_empty(module.norm_act_scratch(shape), dtype=torch.float64)
    cuda_native.run(
        module.norm_act_forward,
        x,
        shape,
        x.data_ptr(),
        address(weight),
        address(bias),
        training,
        settings.eps,
        settings.momentum,
        *map(address, followed),
        address(y),
        *_halves(found),
        address(coefficients),
        address(variance),
        scratch.data_ptr(),
    )
    if training and running is not None:
        if variance is not None:
            gpu.follow_mean(*running, found[0], variance, settings.momentum)
        torch.autograd.graph.increment_version(list(running))
    return found


def _halves(found: Tensor) -> tuple[int, int]:
    """Addresses of mean and invstd."""
    mean = found.data_ptr()
    return mean, mean + found.numel() // 2 * found.element_size()


def backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    wants: Sequence[bool],
    settings: Any,
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each where wanted; ``in_place`` leaves that of x in dy,
    which then has x's layout."""
    module = cuda_native.module()
    x, layout = dense(x.detach())
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    shape = _shape(x, layout, settings)
    dx = None
    if wants[0]:
        dx = dy if in_place else torch.empty_like(x)
    dweight = torch.empty_like(weight) if wants[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wants[2] and bias is not None else None
    scratch = x.new_empty(module.norm_act_scratch(shape), dtype=torch.float64)
    cuda_native.run(
        module.norm_act_backward,
        x,
        shape,
        x.data_ptr(),
        dy.data_ptr(),
        address(weight),
        address(bias),
        *_halves(statistics),
        settings.training,
        address(dx),
        address(dweight),
        address(dbias),
        scratch.data_ptr(),
    )
    return dx, dweight, dbias
