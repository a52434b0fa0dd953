"""The image layers in CUDA against float64, by the shim and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import CONVOLUTION_FACTOR, assert_accurate_convolution
from test_strided_conv_triton import tuner
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import pygan
from pygan.ops import cuda_native, image_conv_cuda, strided_conv, strided_conv_gpu, tuning

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
assert tuner  # a fixture


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


@pytest.mark.parametrize(
    ("dtype", "n", "a", "b", "h", "w", "extra"),
    [
        (torch.float32, 2, 33, 3, 3, 5, (0, 0)),
        (torch.bfloat16, 3, 16, 3, 4, 8, (1, 0)),
        (torch.float16, 1, 8, 4, 2, 3, (0, 1)),
        (torch.float32, 2, 5, 1, 1, 2, (1, 1)),
    ],
    ids=str,
)
def test_tanh_behind_up(
    dtype: torch.dtype,
    n: int,
    a: int,
    b: int,
    h: int,
    w: int,
    extra: tuple[int, int],
    device: torch.device,
) -> None:
    g = torch.Generator().manual_seed(b)
    x = torch.randn(n, a, h, w, generator=g).to(dtype).contiguous(memory_format=LAST)
    weight = (torch.randn(a, b, 4, 4, generator=g) * a**-0.5 / 2).contiguous(memory_format=LAST)
    bias = torch.randn(b, generator=g)
    dy = torch.randn(n, b, 2 * h + extra[0], 2 * w + extra[1], generator=g).to(dtype)

    def result(how: str, kind: torch.dtype) -> list[Tensor]:
        target = device if how == "cuda" else torch.device("cpu")
        leaves = [t.to(target, kind if kind != dtype else t.dtype) for t in (x, weight, bias)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        half = kind == dtype != torch.float32
        with torch.autocast(target.type, dtype if half else torch.bfloat16, enabled=half):
            if how == "cuda":
                y = strided_conv.up(*leaves, extra, "tanh", impl="cuda")
                # In one operation, with nothing behind it.
                assert type(y.grad_fn).__name__ == "ConvBackward"
            else:
                y = torch.tanh(strided_conv.up_ref(*leaves, extra))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(target, y.dtype))]

    sides = (result("cuda", dtype), result("plain", dtype), result("plain", torch.float64))
    for name, ours, plain, oracle in zip(("y", "dx", "dw", "db"), *sides, strict=True):
        triple = (ours.cpu(), plain, oracle)
        assert_accurate_convolution(name, *triple, dtype, weight_grad=name == "dw")
    assert sides[0][0].is_contiguous(memory_format=LAST)


def test_grad_of_grad_of_tanh_behind_up(device: torch.device) -> None:
    g = torch.Generator().manual_seed(8)
    values = [torch.randn(size, generator=g) * 0.3 for size in ((2, 6, 3, 4), (6, 3, 4, 4), (3,))]
    dy = torch.randn(2, 3, 6, 8, generator=g)

    def result(how: str, kind: torch.dtype) -> list[Tensor]:
        target = device if how == "cuda" else torch.device("cpu")
        leaves = [t.to(target, kind).requires_grad_() for t in values]
        if how == "cuda":
            y = strided_conv.up(*leaves, (0, 0), "tanh", impl="cuda")
        else:
            y = torch.tanh(strided_conv.up_ref(*leaves, (0, 0)))
        grads = torch.autograd.grad(y, leaves, dy.to(target, kind), create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in grads), leaves))

    sides = [
        result(how, kind)
        for how, kind in (("cuda", torch.float32), ("", torch.float32), ("", torch.float64))
    ]
    for name, ours, plain, oracle in zip(("x", "weight", "bias"), *sides, strict=True):
        triple = (ours.cpu(), plain, oracle)
        assert_accurate_convolution(name, *triple, torch.float32, weight_grad=name == "weight")


IMAGES = strided_conv_gpu.Shape(torch.float32, LAST, (2, 6, 3, 4), (2, 3, 6, 8), "tf32")
PLAIN = strided_conv_gpu.Passes(IMAGES, None, None, None)
CPU = torch.device("cpu")


def test_tanh_is_cudas_where_that_is_faster(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "reason", lambda: None)
    monkeypatch.setattr(image_conv_cuda, "up", lambda *given: None)
    tuner.capturing = True
    assert strided_conv_gpu.up_with_tanh(PLAIN, CPU, None) is None
    tuner.capturing = False
    assert tuner.asked == []
    assert strided_conv_gpu.up_with_tanh(PLAIN, CPU, None) is None
    assert len(tuner.asked) == 1
    tuner.times = {"cuda": 0.5}
    other = PLAIN._replace(shape=IMAGES._replace(precision="ieee"))
    assert strided_conv_gpu.up_with_tanh(other, CPU, None) == "cuda"
    # What runs by name, or between other maps, is not asked for.
    wide = PLAIN._replace(shape=IMAGES._replace(big_size=(2, 5, 6, 8)))
    for passes, named in ((PLAIN, "triton"), (wide, None)):
        assert strided_conv_gpu.up_with_tanh(passes, CPU, named) is None
    assert len(tuner.asked) == 2


def test_every_candidate_with_tanh_runs(
    on_shim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []

    def timer(run: Callable[[], Tensor]) -> float:
        found.append(run())
        return 1.0

    stand_in = tuning.Tuner("a GPU", timer, tmp_path)
    monkeypatch.setattr(tuning, "device_stamp", lambda device: "a GPU")
    monkeypatch.setattr(strided_conv_gpu, "_tuner", lambda stamp: stand_in)
    monkeypatch.setattr(cuda_native, "reason", lambda: None)
    monkeypatch.setattr(strided_conv_gpu, "configs", lambda *given: ())
    strided_conv_gpu._up_with_tanh.cache_clear()
    assert strided_conv_gpu.up_with_tanh(PLAIN, CPU, None) is None
    strided_conv_gpu._up_with_tanh.cache_clear()
    assert len(found) >= 2
    assert found[0].abs().max() <= 1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fastest", ["cuda", "torch"])
def test_an_image_layer_as_on_a_gpu(
    fastest: str, tuner: Any, on_shim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner.times = {"cuda": 0.5 if fastest == "cuda" else 9.0}
    monkeypatch.setattr(cuda_native, "reason", lambda: None)
    monkeypatch.setattr(strided_conv, "_supports_cpu", lambda *given: "this is a GPU")
    asked: list[str] = []
    up = image_conv_cuda.up

    def watched(*given: Any) -> Tensor:
        asked.append(given[4])
        return up(*given)

    monkeypatch.setattr(image_conv_cuda, "up", watched)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh()).to(memory_format=LAST)
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    found = []
    for network in (plain, fused):
        x = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=LAST).requires_grad_()
        y = network(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in network.parameters())])
        with torch.no_grad():
            found[-1].append(network(x))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert asked == (["tanh"] * 2 if fastest == "cuda" else [])
