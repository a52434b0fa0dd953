"""Triton's strided convolutions on a GPU against cuDNN's, on the layers of a 64 pixel DCGAN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_accurate_convolution
from torch import Tensor

from pygan.functional import conv2d, conv_transpose2d
from pygan.ops import gpu
from pygan.ops import strided_conv as op

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

LAST = torch.channels_last
LAYERS = [
    (16, 512, 4, 4, 256),
    (16, 256, 8, 8, 128),
    (16, 128, 16, 16, 64),
    (16, 64, 32, 32, 3),
    (3, 40, 7, 5, 17),
    (5, 72, 6, 10, 192),
]
KINDS = [
    (torch.bfloat16, "tf32"),
    (torch.float16, "tf32"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
]
PASSES = ("up", "down", "weight_grad")


@pytest.fixture(autouse=True)
def torchs_own_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def maps(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """small, big and weight; an odd layer has odd big sizes."""
    n, a, h, w, b = size
    g = torch.Generator("cuda").manual_seed(5)

    def made(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g, device="cuda").to(dtype)
        return x.contiguous(memory_format=LAST)

    odd = h % 2
    return made(n, a, h, w), made(n, b, 2 * h + odd, 2 * w + odd), made(a, b, 4, 4) * 0.05


def reference(conv_pass: str, small: Tensor, big: Tensor, weight: Tensor) -> Tensor:
    odd = [big.shape[i] - 2 * small.shape[i] for i in (2, 3)]
    if conv_pass == "up":
        return op.up_ref(small, weight, None, odd)
    if conv_pass == "down":
        return op.down_ref(big, weight, None)
    return op.weight_grad_ref(small, big)


@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("size", LAYERS, ids=str)
def test_every_configuration(
    size: tuple[int, ...], dtype: torch.dtype, precision: str, conv_pass: str
) -> None:
    from pygan.kernels import strided_conv, strided_conv_weight
    from pygan.kernels.strided_conv_configs import configs, with_descriptors, with_statistics

    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    small, big, weight = maps(size, dtype)
    plain = reference(conv_pass, small, big, weight)
    oracle = reference(conv_pass, small.double(), big.double(), weight.double())
    given = (conv_pass, size[1], size[4], dtype, precision)
    copies = gpu.copies_tensors(small.device) and (conv_pass == "up" or size[2] % 2 == 0)
    found = [(config, False) for config in configs(*given)]
    if conv_pass != "weight_grad":
        found += [(config, True) for config in with_statistics(*given)]
    for statistics in (False, True) if copies else ():
        found += [(config, statistics) for config in with_descriptors(*given, statistics)]
    for config, statistics in found:
        about = f"{conv_pass} {size} {dtype} {precision} {config} {statistics}"
        if conv_pass == "weight_grad":
            y = torch.full_like(weight, torch.nan, dtype=torch.float32)
            strided_conv_weight.weight_grad(y, small, big, config, precision, 264)
        else:
            y = torch.full_like(big if conv_pass == "up" else small, torch.nan)
            pair = (small, y) if conv_pass == "up" else (y, big)
            partials = None
            if statistics:
                partials = strided_conv.partials(conv_pass, *pair, 1, config).fill_(torch.nan)
            strided_conv.run(conv_pass, *pair, weight, config, precision, statistics=partials)
            if partials is not None:
                count, mean, _ = partials.double().unbind(2)
                averages = [t.double().mean((0, 2, 3)) for t in (plain, oracle)]
                triple = ((count * mean).sum((0, 1)) / count.sum((0, 1)), *averages)
                assert_accurate_convolution(f"mean {about}", *triple, dtype)
        weight_grad = conv_pass == "weight_grad"
        assert_accurate_convolution(about, y, plain, oracle, dtype, weight_grad=weight_grad)


@pytest.mark.parametrize("conv_pass", PASSES[:2])
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("size", LAYERS[2:], ids=str)
def test_gradients_under_autocast(size: tuple[int, ...], impl: str, conv_pass: str) -> None:
    small, big, weight = maps(size, torch.float32)
    x, dy = (small, big) if conv_pass == "up" else (big, small)
    odd = [big.shape[i] - 2 * small.shape[i] for i in (2, 3)]

    def result(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, weight)]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            if conv_pass == "up":
                y = conv_transpose2d(*leaves, None, 2, 1, odd, impl=impl)
            else:
                y = conv2d(*leaves, None, 2, 1, impl=impl)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    results = result(impl, torch.float32), result("torch", torch.float32)
    for name, ours, plain, oracle in zip(
        ("y", "dx", "dweight"), *results, result("torch", torch.float64), strict=True
    ):
        assert ours.dtype == plain.dtype and ours.stride() == plain.stride(), name
        weight_grad = name == "dweight"
        triple = (ours, plain, oracle)
        assert_accurate_convolution(name, *triple, torch.bfloat16, weight_grad=weight_grad)


def test_captured_as_a_graph() -> None:
    _, big, weight = maps(LAYERS[1], torch.bfloat16)
    expected = conv2d(big, weight, None, 2, 1, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = conv2d(big, weight, None, 2, 1, impl="triton")
        # Never met before: cuDNN runs it, and nothing is timed.
        other = conv2d(big[:5], weight, None, 2, 1)
    graph.replay()
    assert torch.equal(first, expected)
    torch.testing.assert_close(other, op.down_ref(big[:5], weight, None))


@pytest.mark.parametrize("conv_pass", PASSES[:2])
def test_descriptors_captured_as_a_graph(conv_pass: str) -> None:
    from pygan.kernels import strided_conv
    from pygan.kernels.strided_conv_configs import with_descriptors

    small, big, weight = maps(LAYERS[1], torch.bfloat16)
    if not gpu.copies_tensors(small.device):
        pytest.skip("this GPU copies no tensors")
    y, x = (big, small) if conv_pass == "up" else (small, big)
    for config in with_descriptors(conv_pass, 256, 128, torch.bfloat16, "tf32"):
        given = (conv_pass, small, big, weight, config, "tf32")
        strided_conv.run(*given)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            strided_conv.run(*given)
        x.copy_(torch.randn_like(x))
        strided_conv.run(*given)
        expected = y.clone()
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected), config
