"""Convolutions that torch runs, with derivatives of second and third order in channels_last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate_convolution
from torch import Tensor

from pygan.ops.torch_conv import Sweep, conv

LAST = torch.channels_last
SWEEPS = {
    "3x3": (Sweep((1, 1), (1, 1)), (5, 6, 3, 3)),
    "strided": (Sweep((2, 2), (1, 1)), (5, 6, 4, 4)),
    "oblong": (Sweep((2, 1), (0, 2)), (5, 6, 2, 5)),
    "dilated": (Sweep((1, 1), (2, 2), (2, 2)), (5, 6, 3, 3)),
    "grouped": (Sweep((1, 1), (1, 1), groups=2), (4, 3, 3, 3)),
    "depthwise": (Sweep((2, 2), (1, 1), groups=6), (6, 1, 3, 3)),
    "transposed": (Sweep((2, 2), (1, 1), (1, 1), True, (1, 0)), (6, 5, 3, 3)),
    "transposed-dense": (Sweep((2, 2), (1, 1), (1, 1), True), (6, 5, 3, 3)),
    "transposed-grouped": (Sweep((3, 3), (0, 0), (1, 1), True, (0, 0), 3), (6, 2, 3, 3)),
    "more-weights-than-values": (Sweep((1, 1), (0, 0)), (96, 6, 7, 7)),
}


def plainly(x: Tensor, weight: Tensor, bias: Tensor, sweep: Sweep) -> Tensor:
    if sweep.transposed:
        return F.conv_transpose2d(
            x, weight, bias, sweep.stride, sweep.padding, sweep.output_padding, sweep.groups,
            sweep.dilation,
        )  # fmt: skip
    return F.conv2d(x, weight, bias, sweep.stride, sweep.padding, sweep.dilation, sweep.groups)


def derivatives(name: str, ours: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of a penalty on both gradients, and of the square of what comes of it."""
    sweep, size = SWEEPS[name]
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(size[1] * sweep.groups if sweep.transposed else size[0], generator=g)
    x, weight = torch.randn(2, 6, 8, 7, generator=g), torch.randn(size, generator=g)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = (conv if ours else plainly)(leaves[0].contiguous(memory_format=LAST), *leaves[1:], sweep)
    dy = torch.randn(y.shape, generator=g).to(dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    penalty = sum((t.square() + t).sum() for t in first[:2]) + first[2].square().sum()
    inputs = [leaves[0], leaves[1], dy]
    second = torch.autograd.grad(penalty, inputs, create_graph=True)
    names = ("x", "weight", "dy")
    found = {"y": y} | {f"d{k}": t for k, t in zip(("x", "weight", "bias"), first, strict=True)}
    found |= {f"d2{k}": t for k, t in zip(names, second, strict=True)}
    # Of transposed convolutions with an output padding torch has no third derivatives.
    if not any(sweep.output_padding):
        third = torch.autograd.grad(sum(t.square().sum() for t in second), inputs)
        found |= {f"d3{k}": t for k, t in zip(names, third, strict=True)}
    return found


@pytest.mark.native
@pytest.mark.parametrize("name", SWEEPS)
def test_as_torch(name: str) -> None:
    ours, plain = derivatives(name, True), derivatives(name, False)
    oracle = derivatives(name, False, torch.float64)
    assert ours["y"].grad_fn.name() == "_ConvBackward"  # type: ignore[union-attr]
    for key, value in ours.items():
        assert_accurate_convolution(
            key, value.detach(), plain[key], oracle[key], torch.float32, weight_grad="weight" in key
        )


@pytest.mark.native
def test_maps_stay_in_channels_last() -> None:
    x = torch.randn(4, 6, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(5, 6, 3, 3, requires_grad=True)
    y = conv(x, weight, None, Sweep((1, 1), (1, 1)))
    dy = torch.randn_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    # As a pointwise operation behind dx may hand it on.
    ddx = dx.detach().contiguous()
    (ddy,) = torch.autograd.grad(dx, dy, ddx)
    for map_ in (y, dx, ddy):
        assert map_.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    "given",
    [
        (torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)),
        (
            torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True),
            torch.randn(3, 2, 3, 3, dtype=torch.float64),
        ),
        (torch.randn(2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3)),
        (torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3)),
    ],
    ids=["no gradient", "float64", "no batch", "contiguous"],
)
def test_the_rest_is_torch_s_own(given: tuple[Tensor, Tensor]) -> None:
    y = conv(*given, None, Sweep((1, 1), (1, 1)))
    assert torch.equal(y, F.conv2d(*given, None, 1, 1))
    assert y.grad_fn is None or y.grad_fn.name() != "_ConvBackward"


def test_autocast_is_torch_s() -> None:
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x, weight, None, Sweep((1, 1), (1, 1))).dtype is torch.bfloat16
