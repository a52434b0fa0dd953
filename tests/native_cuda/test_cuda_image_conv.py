"""The image layers in CUDA against float64, by the shim and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import CONVOLUTION_FACTOR, assert_accurate_convolution
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pygan.ops import image_conv_cuda

CASES = [
    # dtype, N, A, B, H, W, output padding, channels_last weight
    (torch.float32, 1, 5, 1, 1, 1, (0, 0), False),
    (torch.bfloat16, 2, 64, 3, 9, 18, (0, 1), False),
    (torch.float16, 1, 40, 4, 8, 16, (1, 0), True),
    (torch.bfloat16, 3, 8, 1, 7, 5, (1, 1), True),
    (torch.float32, 2, 33, 2, 3, 17, (0, 0), True),
    (torch.float32, 1, 36, 3, 10, 3, (0, 0), False),
]
LAST = torch.channels_last


def accurate(name: str, ours: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    # float16 keeps more digits than bfloat16: the factor of float32.
    factor = CONVOLUTION_FACTOR.get(dtype, CONVOLUTION_FACTOR[torch.float32])
    assert factor <= CONVOLUTION_FACTOR[torch.bfloat16]
    if dtype in CONVOLUTION_FACTOR:
        assert_accurate_convolution(name, ours.cpu(), plain, oracle, dtype)
    else:
        from accuracy import assert_accurate

        assert_accurate(name, ours.cpu(), plain, oracle, dtype)


@pytest.mark.parametrize(("dtype", "n", "a", "b", "h", "w", "extra", "last"), CASES)
def test_image_conv(
    dtype: torch.dtype,
    n: int,
    a: int,
    b: int,
    h: int,
    w: int,
    extra: tuple[int, int],
    last: bool,
    device: torch.device,
) -> None:
    g = torch.Generator().manual_seed(a)
    small = torch.randn(n, a, h, w, generator=g).to(dtype)
    big = torch.randn(n, b, 2 * h + extra[0], 2 * w + extra[1], generator=g).to(dtype)
    gate = torch.randn(n, a, h, w, generator=g).to(dtype)
    memory_format = LAST if last else torch.contiguous_format
    weight = (torch.randn(a, b, 4, 4, generator=g) * 0.2).contiguous(memory_format=memory_format)
    bias_a, bias_b = torch.randn(a, generator=g), torch.randn(b, generator=g)

    def on(x: Tensor) -> Tensor:
        return x.to(device)

    def plain(t: torch.dtype) -> dict[str, Tensor]:
        s, x, v, through = small.to(t), big.to(t), weight.to(t), (gate > 0).to(t)
        gated = s * (through + (1 - through) * torch.tensor(0.2, dtype=t))
        return {
            "up": torch.tanh(F.conv_transpose2d(s, v, bias_b.to(t), 2, 1, extra)),
            "gated up": F.conv_transpose2d(gated, v, None, 2, 1, extra),
            "down": F.leaky_relu(F.conv2d(x, v, bias_a.to(t), 2, 1), 0.2),
            "weight_grad": conv2d_weight(x, (a, b, 4, 4), s, 2, 1),
            "gated weight_grad": conv2d_weight(x, (a, b, 4, 4), gated, 2, 1),
        }

    ours = {
        "up": image_conv_cuda.up(on(small), on(weight), on(bias_b), extra, "tanh"),
        "gated up": image_conv_cuda.up(
            on(small), on(weight), None, extra, gate=on(gate), negative_slope=0.2
        ),
        "down": image_conv_cuda.down(on(big), on(weight), on(bias_a), "leaky_relu", 0.2),
        "weight_grad": image_conv_cuda.weight_grad(on(small), on(big), memory_format=memory_format),
        "gated weight_grad": image_conv_cuda.weight_grad(on(small), on(big), on(gate), 0.2),
    }
    oracle, same = plain(torch.float64), plain(dtype)
    for name in oracle:
        if "weight_grad" in name:
            assert ours[name].dtype is torch.float32
            # A float32 result: better than plain torch's, which rounds to the type.
            accurate(name, ours[name], same[name], oracle[name], dtype)
        else:
            assert ours[name].is_contiguous(memory_format=LAST)
            accurate(name, ours[name], same[name], oracle[name], dtype)


def test_image_conv_keeps_within_its_map(device: torch.device) -> None:
    """Maps that are a part of NaN ones: a read outside of them shows."""
    for pad in (1, 8):
        whole = torch.full((3, 8, 9, 9), float("nan")).contiguous(memory_format=LAST)
        small = whole[1:2]
        small.copy_(torch.randn(1, 8, 9, 9))
        big = torch.full((3, 3, 18, 18), float("nan")).contiguous(memory_format=LAST)[1:2]
        big.copy_(torch.randn(1, 3, 18, 18))
        weight = torch.randn(8 * pad, 3, 4, 4)[:8]
        assert not image_conv_cuda.up(small.to(device), weight.to(device)).isnan().any()
        assert not image_conv_cuda.down(big.to(device), weight.to(device)).isnan().any()
        grad = image_conv_cuda.weight_grad(small.to(device), big.to(device))
        assert not grad.isnan().any()
