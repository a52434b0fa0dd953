"""Convolutions whose weight is larger than their maps, against plain torch and float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate_convolution
from torch import Tensor

from pygan import functional
from pygan.ops import few_positions
from pygan.ops.layout import is_last

LAST = torch.channels_last
SHAPES = ((1, 1, 1), (1, 2, 3), (3, 5, 4), (2, 4, 8))  # batch, and the small map's sides
Results = dict[str, Tensor]


def inputs_of(conv_pass: str, n: int, height: int, width: int, *, odd: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(height)
    given, made = (384, 176) if conv_pass == "up" else (176, 384)
    if conv_pass == "down":
        height, width = 2 * height + odd, 2 * width + odd
    x = torch.randn(n, given, height, width, generator=g)
    weight = torch.randn(384, 176, 4, 4, generator=g) * 0.05
    return [x, weight, torch.randn(made, generator=g)]


def run(conv_pass: str, ours: bool, inputs: list[Tensor], *, odd: bool, second: bool) -> Results:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    place = functional if ours else F
    if conv_pass == "up":
        y = place.conv_transpose2d(*leaves, 2, 1, int(odd))
    else:
        y = place.conv2d(*leaves, 2, 1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    dy.requires_grad_(second)
    grads = torch.autograd.grad(y, leaves, dy, create_graph=second)
    results = {"y": y} | dict(zip(("dx", "dweight", "dbias"), grads, strict=True))
    if second:
        total = grads[0].square().sum() + grads[1].square().sum()
        twice = torch.autograd.grad(total, [leaves[0], leaves[1], dy])
        results |= dict(zip(("d2x", "d2weight", "d2y"), twice, strict=True))
    return results


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name in ("up", "down"):
        theirs = getattr(few_positions, name)

        def counted(*args: object, name: str = name, theirs: object = theirs) -> object:
            seen.append(name)
            return theirs(*args)  # type: ignore[operator]

        monkeypatch.setattr(few_positions, name, counted)
    return seen


@pytest.mark.parametrize("conv_pass", ["up", "down"])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_against_torch(conv_pass: str, odd: bool, dtype: torch.dtype, calls: list[str]) -> None:
    for shape, last in itertools.product(SHAPES, (False, True)):
        exact = [t.double() for t in inputs_of(conv_pass, *shape, odd=odd)]
        given = [t.to(dtype) for t in exact]
        exact = [t.double() for t in given]
        if last:
            given[0] = given[0].contiguous(memory_format=LAST)
        second = dtype == torch.float32
        calls.clear()
        results = [
            run(conv_pass, ours, operands, odd=odd, second=second)
            for ours, operands in ((True, given), (False, given), (False, exact))
        ]
        if dtype == torch.float32:  # weights in bfloat16 have kernels of their own
            assert calls == [conv_pass]
        for name, ours in results[0].items():
            plain, oracle = results[1][name], results[2][name]
            grad = "weight" in name
            assert_accurate_convolution(name, ours, plain, oracle, dtype, weight_grad=grad)
            assert ours.dtype == plain.dtype
        assert is_last(results[0]["y"]) == is_last(results[1]["y"])


@pytest.mark.parametrize("conv_pass", ["up", "down"])
def test_autocast(conv_pass: str, calls: list[str]) -> None:
    operands = inputs_of(conv_pass, 2, 4, 4, odd=False)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (
            run(conv_pass, each, operands, odd=False, second=False) for each in (True, False)
        )
    exact = run(conv_pass, False, [t.double() for t in operands], odd=False, second=False)
    assert calls == [conv_pass]
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype
        assert_accurate_convolution(
            name, value, plain[name], exact[name], torch.bfloat16, weight_grad="weight" in name
        )


def test_others_run_as_they_did(calls: list[str]) -> None:
    x, weight, _ = inputs_of("down", 1, 4, 4, odd=False)
    functional.conv2d(x, weight, None, 2, 1, impl="torch")
    functional.conv2d(x, weight.contiguous(memory_format=LAST), None, 2, 1)
    functional.conv2d(x[:, :64], weight[:, :64].contiguous(), None, 2, 1)
    functional.conv2d(x.repeat(8, 1, 1, 1), weight, None, 2, 1)
    assert not calls
    with pytest.raises(RuntimeError, match=r"Calculated padded input size|Output size"):
        functional.conv2d(x[:, :, :1], weight, None, 2, 1)
    with pytest.raises(RuntimeError, match="channels"):
        functional.conv2d(x[:, :100], weight, None, 2, 1)
    small, weight, _ = inputs_of("up", 1, 2, 2, odd=False)
    with pytest.raises(RuntimeError, match="output padding must be smaller"):
        functional.conv_transpose2d(small, weight, None, 2, 1, 2)
    assert functional.conv_transpose2d(small[0], weight, None, 2, 1).shape == (176, 4, 4)
