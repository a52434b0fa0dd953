from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.ops import map_memory
from pygan.ops.matrix_product import matrix_product


def operands(dtype: torch.dtype, transposed: bool, bias: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((6, 50), (50, 3000), (3000,)))
    if transposed:
        w = w.t().contiguous().t()
    return [t.requires_grad_() for t in ((x, w, b) if bias else (x, w))]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_torchs_linear(autocast: bool, transposed: bool, bias: bool) -> None:
    results = []
    for product in (matrix_product, lambda x, w, b=None: F.linear(x, w.t(), b)):
        inputs = operands(torch.float32, transposed, bias)
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            y = product(*inputs)
        y.float().square().sum().backward()
        grads = [t.grad for t in inputs]
        assert all(g.stride() == t.stride() for g, t in zip(grads, inputs, strict=True))
        results.append([y, *grads])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_gradients(transposed: bool) -> None:
    inputs = [t.detach()[..., :4].requires_grad_() for t in operands(torch.float64, False, True)]
    x, w, b = inputs[0].detach().requires_grad_(), inputs[1].detach()[:4], inputs[2]
    w = (w.t().contiguous().t() if transposed else w.contiguous()).requires_grad_()
    assert torch.autograd.gradcheck(matrix_product, (x, w, b))
    assert torch.autograd.gradgradcheck(matrix_product, (x, w, b))


def test_its_outputs_lie_with_the_maps() -> None:
    arena = map_memory._arena()
    if arena is None:
        pytest.skip("no address space to reserve")
    x, w = operands(torch.float32, False, False)
    x, w = (t.detach().repeat(20, 1)[:, : t.shape[1]] for t in (x, w[:50]))
    y = matrix_product(x, w[:50].contiguous())
    assert arena._base <= y.data_ptr() < arena._base + arena.size
