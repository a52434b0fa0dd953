"""Batch norm + activation, forward and backward, on dcgan64's shapes in channels_last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.correct import DTYPE, relative_error, require_right
from benchmarks.measure import Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import norm_act_work
from pygan.functional import norm_act

BATCH = 64
SLOPE = 0.2
EPS, MOMENTUM = 1e-5, 0.1


class Layer(NamedTuple):
    """A normalised activation of dcgan64; ``groups`` parts of the batch have own statistics."""

    network: str
    channels: int
    size: int
    activation: str
    groups: int
    batch: int = BATCH

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch * self.groups, self.channels, self.size, self.size)


LAYERS = (
    Layer("G", 512, 4, "relu", 1),
    Layer("G", 256, 8, "relu", 1),
    Layer("G", 128, 16, "relu", 1),
    Layer("G", 64, 32, "relu", 1),
    Layer("D", 128, 16, "leaky_relu", 2),
    Layer("D", 256, 8, "leaky_relu", 2),
    Layer("D", 512, 4, "leaky_relu", 2),
)
QUICK_LAYERS = (LAYERS[0], LAYERS[-1])


class Problem(NamedTuple):
    """Input, weight, bias, running mean and variance, gradient of the output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    dy: Tensor


def _problem(layer: Layer, dtype: torch.dtype, device: torch.device) -> Problem:
    """Input of mean 0.5 and deviation 2. Per-channel tensors are float32, as under autocast."""
    generator = torch.Generator().manual_seed(3)
    c = layer.channels
    x, dy = (
        torch.randn(layer.shape, generator=generator)
        .to(device=device, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    x = x * 2 + 0.5
    weight = torch.randn(c, generator=generator) * 0.02 + 1
    bias = torch.randn(c, generator=generator) * 0.02
    return Problem(
        x,
        weight.to(device),
        bias.to(device),
        torch.zeros(c, device=device),
        torch.ones(c, device=device),
        dy,
    )


class Result(NamedTuple):
    """Output, running statistics, and the gradients of input, weight and bias."""

    y: Tensor
    running: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def _activate_(y: Tensor, activation: str) -> Tensor:
    return F.relu_(y) if activation == "relu" else F.leaky_relu_(y, SLOPE)


class Parts(NamedTuple):
    """A result still in the parts in which it was computed."""

    y: Sequence[Tensor]
    running: tuple[Tensor, Tensor]
    dx: Sequence[Tensor]
    dweight: Tensor
    dbias: Tensor

    def joined(self) -> Result:
        return Result(
            torch.cat(list(self.y)),
            torch.stack(self.running),
            torch.cat(list(self.dx)),
            self.dweight,
            self.dbias,
        )


def torch_way(layer: Layer, problem: Problem) -> Callable[[], Parts]:
    """batch_norm and an in-place activation; a call for each part of the batch."""
    parts = [part.requires_grad_() for part in problem.x.detach().clone().chunk(layer.groups)]
    gradients = list(problem.dy.chunk(layer.groups))
    weight, bias = problem.weight.clone().requires_grad_(), problem.bias.clone().requires_grad_()
    mean, var = problem.mean.clone(), problem.var.clone()

    def call() -> Parts:
        made = [
            _activate_(
                F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS), layer.activation
            )
            for x in parts
        ]
        *dparts, dweight, dbias = torch.autograd.grad(made, [*parts, weight, bias], gradients)
        return Parts(made, (mean, var), dparts, dweight, dbias)

    return call


def pygan_way(layer: Layer, problem: Problem) -> Callable[[], Parts]:
    """pygan.functional.norm_act on the whole batch."""
    x = problem.x.detach().clone().requires_grad_()
    weight, bias = problem.weight.clone().requires_grad_(), problem.bias.clone().requires_grad_()
    mean, var = problem.mean.clone(), problem.var.clone()

    def call() -> Parts:
        y = norm_act(
            x,
            mean,
            var,
            weight,
            bias,
            True,
            MOMENTUM,
            EPS,
            activation=layer.activation,
            negative_slope=SLOPE,
            groups=layer.groups,
        )
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), problem.dy)
        return Parts([y.detach()], (mean, var), [dx], dweight, dbias)

    return call


WAYS = {"torch": torch_way, "pygan": pygan_way}


def check(layer: Layer, precision: str, device: torch.device, sides: Sequence[Side]) -> None:
    """Output, running statistics and every gradient against float64."""
    problem = _problem(layer, DTYPE[precision], device)
    exact = Problem(*(each.double() for each in problem))
    truth = torch_way(layer, exact)().joined()
    plain = _errors(torch_way(layer, problem)().joined(), truth)
    for side in sides:
        errors = _errors(WAYS[side.name](layer, problem)().joined(), truth)
        require_right(side.name, precision, errors, plain)


def _errors(result: Result, truth: Result) -> dict[str, float]:
    return {
        name: relative_error([getattr(result, name)], [getattr(truth, name)])
        for name in Result._fields
    }


def _side(name: str, layer: Layer, precision: str) -> Side:
    dtype = DTYPE[precision]
    elements = torch.Size(layer.shape).numel()
    return Side(
        name=name,
        precision=precision,
        build=lambda device: WAYS[name](layer, _problem(layer, dtype, device)),
        work=norm_act_work(elements, dtype.itemsize),
        baseline=name == "torch",
        full_only=layer not in QUICK_LAYERS,
    )


def case_of(layer: Layer, precision: str) -> Case:
    """All ways on a layer."""
    shape = f"{layer.channels}x{layer.size}x{layer.size}"
    groups = f" in {layer.groups} groups" if layer.groups > 1 else ""
    return Case(
        name=f"norm_act-{layer.network}-{shape}-{precision}",
        about=f"batch norm + {layer.activation}, {precision}, batch {layer.shape[0]}{groups}, "
        "forward + backward",
        images=layer.shape[0],
        sides=tuple(_side(name, layer, precision) for name in WAYS),
        check=functools.partial(check, layer, precision),
    )


CASES = {
    case.name: case for layer in LAYERS for case in (case_of(layer, "fp32"), case_of(layer, "bf16"))
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_norm_act(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
