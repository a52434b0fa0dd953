"""Gradients that a backward pass drops are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pygan
from pygan.ops import strided_conv, wanted
from pygan.ops.wanted import wanted_gradients

SEEN: list[tuple[bool, ...]] = []


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.times = times
        return x * w * times

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        SEEN.append(wanted_gradients(ctx))
        return grads[0] * w * ctx.times, None, grads[0] * x * ctx.times


@pytest.fixture
def xw() -> tuple[Tensor, Tensor]:
    SEEN.clear()
    return torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)


@pytest.mark.parametrize("graph", [False, True])
def test_inputs_of_grad(xw: tuple[Tensor, Tensor], graph: bool) -> None:
    x, w = xw
    for inputs in (x, w, (x, w)):
        torch.autograd.grad(Product.apply(x, 3, w).sum(), inputs, create_graph=graph)
    assert SEEN == [(True, False, False), (False, False, True), (True, False, True)]


def test_backward_wants_what_requires_one(xw: tuple[Tensor, Tensor]) -> None:
    x, w = xw
    Product.apply(x, 3, w).sum().backward()
    Product.apply(x, 3, w).sum().backward(inputs=[w])
    Product.apply(x, 3, w.detach()).sum().backward()
    Product.apply(x.detach(), 3, w).sum().backward()
    found = [(True, False, True), (False, False, True), (True, False, False), (False, False, True)]
    assert found == SEEN


def test_one_graph_asked_twice(xw: tuple[Tensor, Tensor]) -> None:
    x, w = xw
    y = Product.apply(x * 2, 3, w).sum()
    (dx,) = torch.autograd.grad(y, x, retain_graph=True)
    (dw,) = torch.autograd.grad(y, w)
    assert SEEN == [(True, False, False), (False, False, True)]
    assert torch.equal(dx, torch.full((2,), 6.0)) and torch.equal(dw, torch.full((2,), 6.0))


def test_an_inner_pass_asks_for_itself(xw: tuple[Tensor, Tensor]) -> None:
    x, w = xw
    run = torch.utils.checkpoint.checkpoint
    run(lambda a: Product.apply(a, 3, w), x * 1, use_reentrant=True).sum().backward()
    assert SEEN == [(True, False, True)]
    assert w.grad is not None and x.grad is not None


def test_what_costs_nothing_beside_another_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    executes = wanted._executes
    monkeypatch.setattr(wanted, "_executes", lambda node: asked.append(node) or executes(node))
    x, w, b = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = []

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return x + w + b

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            found.append(wanted_gradients(ctx, {2: 1}))
            return grads[0], grads[0], grads[0]

    for inputs, count in (((x, w, b), 2), ((x,), 3), ((b,), 3), ((w,), 2)):
        asked.clear()
        torch.autograd.grad(Sum.apply(x, w, b).sum(), inputs)
        assert len(asked) == count
    # Of what w takes along a gradient that nobody uses may be computed, of others none.
    assert found == [
        (True, True, True),
        (True, False, False),
        (False, False, True),
        (False, True, True),
    ]


@pytest.mark.native
def test_a_gradient_penalty_runs_no_weight_gradient_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 32, 4, 2, 1), nn.LeakyReLU(0.2)
    )
    pygan.fuse(network)
    calls = []
    run = strided_conv.run_weight_grad
    monkeypatch.setattr(strided_conv, "run_weight_grad", lambda *a: calls.append(a) or run(*a))
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    assert not calls
    slope.square().sum().backward(inputs=list(network.parameters()))
    assert calls
