"""The image layers on a GPU: :mod:`pygan.ops.strided_conv`'s passes with 1 to 4 big channels.

small ``[N, A, H, W]`` and big ``[N, B, 2H or 2H + 1, 2W or 2W + 1]`` are float32, bfloat16 or
float16 and come back channels_last; w ``[A, B, 4, 4]``, its gradient and biases are float32. An
activation follows the bias. With a ``gate``, a map like small, every value of small counts as
small * (gate > 0 ? 1 : negative_slope): so up and weight_grad go back through the ReLU or
LeakyReLU behind down, whose output is the gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pygan.ops import cuda_native, dispatch, gpu
from pygan.ops.native import ACTIVATIONS, address

BIG_CHANNELS = 4  # at most

_LAST = torch.channels_last


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, side: int) -> str | None:
    """Reason that the kernels cannot take x, whose channels are dimension ``side`` of weight (0 of
    small, 1 of big), or None."""
    if (reason := dispatch.supports_cuda(x)) is not None:
        return reason
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[2:] != (4, 4):
        return f"the shapes are {tuple(x.shape)} and {tuple(weight.shape)}, not 4-D with 4x4 taps"
    if weight.shape[1] > BIG_CHANNELS:
        return f"there are {weight.shape[1]} channels on the big side, not 1 to {BIG_CHANNELS}"
    if x.shape[1] != weight.shape[side]:
        return f"{x.shape[1]} channels do not fit a weight of shape {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[1 - side : 2 - side]:
        return f"a bias of shape {tuple(bias.shape)} does not fit the weight"
    for tensor in (weight, bias):
        if tensor is not None and tensor.device != x.device:
            return f"a parameter is on {tensor.device}, not on {x.device}"
    least = 1 if side == 0 else 2
    if x.numel() == 0 or weight.numel() == 0 or min(x.shape[2:]) < least:
        return "a map is empty"
    return None


def _shape(small: Tensor, big: Tensor, weight: Tensor) -> Any:
    return cuda_native.module().StridedConvShape(
        gpu.DTYPES[small.dtype],
        0 if weight.is_contiguous(memory_format=_LAST) else 1,
        small.shape[0],
        *small.shape[2:],
        *big.shape[2:],
        small.shape[1],
        big.shape[1],
    )


def _last(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=_LAST)


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight = weight.detach().float()
    if not weight.is_contiguous(memory_format=_LAST):
        weight = weight.contiguous()
    return weight, None if bias is None else bias.detach().float().contiguous()


def up(
    small: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    output_padding: tuple[int, int] = (0, 0),
    activation: str = "none",
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
) -> Tensor:
    """``activation(conv_transpose2d(small, weight, bias, 2, 1, output_padding))``; any activation
    but "leaky_relu". ``negative_slope`` is the gate's."""
    small, (weight, bias) = _last(small), _parameters(weight, bias)
    gate = None if gate is None else _last(gate)
    size = [2 * n + extra for n, extra in zip(small.shape[2:], output_padding, strict=True)]
    big = torch.empty(
        (small.shape[0], weight.shape[1], *size),
        dtype=small.dtype,
        device=small.device,
        memory_format=_LAST,
    )
    cuda_native.run(
        cuda_native.module().image_conv_up,
        small,
        _shape(small, big, weight),
        small.data_ptr(),
        address(gate),
        negative_slope,
        weight.data_ptr(),
        address(bias),
        ACTIVATIONS[activation],
        big.data_ptr(),
    )
    return big


def down(
    big: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """``activation(conv2d(big, weight, bias, 2, 1))``; any activation."""
    big, (weight, bias) = _last(big), _parameters(weight, bias)
    small = torch.empty(
        (big.shape[0], weight.shape[0], *(n // 2 for n in big.shape[2:])),
        dtype=big.dtype,
        device=big.device,
        memory_format=_LAST,
    )
    cuda_native.run(
        cuda_native.module().image_conv_down,
        big,
        _shape(small, big, weight),
        big.data_ptr(),
        weight.data_ptr(),
        address(bias),
        ACTIVATIONS[activation],
        negative_slope,
        small.data_ptr(),
    )
    return small


def weight_grad(
    small: Tensor,
    big: Tensor,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """float32 ``[A, B, 4, 4]`` in ``memory_format``."""
    small, big = _last(small), _last(big)
    gate = None if gate is None else _last(gate)
    dweight = torch.empty(
        (small.shape[1], big.shape[1], 4, 4), device=small.device, memory_format=memory_format
    )
    module, shape = cuda_native.module(), _shape(small, big, dweight)
    scratch = small.new_empty(module.image_conv_scratch(shape), dtype=torch.float32)
    cuda_native.run(
        module.image_conv_weight_grad,
        small,
        shape,
        small.data_ptr(),
        address(gate),
        negative_slope,
        big.data_ptr(),
        dweight.data_ptr(),
        scratch.data_ptr(),
    )
    return dweight
