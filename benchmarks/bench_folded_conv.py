"""A 3x3 convolution behind a nearest upsampling or before an average pooling, forward and backward.

torch runs the pair in both layouts, pygan the one folded operation, as ``pygan.fuse`` has it run.
Weights are float32; in bfloat16 the sides run under autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.correct import (
    CONVOLUTION_FACTOR,
    DTYPE,
    WEIGHT_GRADIENT_FACTOR,
    relative_error,
    require_right,
)
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import Work, folded_conv_work
from pygan.functional import conv2d_avg_pool, upsample_conv2d
from pygan.ops import native
from pygan.ops.folded_conv import conv2d_avg_pool_ref, upsample_conv2d_ref

PLAIN = {"up": upsample_conv2d_ref, "down": conv2d_avg_pool_ref}
OURS = {"up": upsample_conv2d, "down": conv2d_avg_pool}
RESULTS = ("y", "dx", "dweight", "dbias")
# Some calls take a second on a small machine.
AT_MOST = {"rounds": 9, "sample_seconds": 0.06, "warmup_seconds": 0.1}


class Layer(NamedTuple):
    """``conv_pass`` "up" or "down", of ``[batch, given, size, size]`` to ``made`` channels."""

    conv_pass: str
    batch: int
    given: int
    made: int
    size: int

    @property
    def label(self) -> str:
        target = 2 * self.size if self.conv_pass == "up" else self.size // 2
        return f"{self.given}→{self.made} {self.size}x{self.size}→{target}x{target}"


LAYERS = (
    Layer("up", 64, 128, 128, 16),
    Layer("up", 64, 128, 64, 32),
    Layer("up", 64, 64, 3, 32),
    Layer("down", 64, 64, 128, 32),
)
QUICK = ((LAYERS[2], True, "fp32"),)  # layer, with backward, type


class Problem(NamedTuple):
    """Operands of a layer, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


@functools.lru_cache(maxsize=2)
def _problem(layer: Layer, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(layer.batch, layer.given, layer.size, layer.size, generator=generator)
    weight = torch.randn(layer.made, layer.given, 3, 3, generator=generator) * 0.02
    bias = torch.randn(layer.made, generator=generator) * 0.02
    target = 2 * layer.size if layer.conv_pass == "up" else layer.size // 2
    dy = torch.randn(layer.batch, layer.made, target, target, generator=generator)
    return Problem(
        x.to(device=device, dtype=dtype), weight.to(device), bias.to(device),
        dy.to(device=device, dtype=dtype),
    )  # fmt: skip


def way(
    function: Callable[..., Tensor],
    problem: Problem,
    memory_format: torch.memory_format,
    backward: bool,
) -> Callable[[], list[Tensor]]:
    """One side: the output and, with ``backward``, the gradients of ``RESULTS``."""
    x, weight, dy = (
        each.detach().clone(memory_format=memory_format)
        for each in (problem.x, problem.weight, problem.dy)
    )
    leaves = [x, weight, problem.bias.detach().clone()]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    autocast = x.dtype == torch.bfloat16

    def call() -> list[Tensor]:
        enabled = torch.autocast(x.device.type, torch.bfloat16, enabled=autocast)
        with torch.set_grad_enabled(backward), enabled:
            y = function(*leaves)
        if not backward:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return call


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Name of a side: whether it is pygan's, and its layout.
SIDES: Mapping[str, tuple[bool, str]] = {
    "torch contiguous": (False, "contiguous"),
    "torch channels_last": (False, "channels_last"),
    "pygan contiguous": (True, "contiguous"),
    "pygan channels_last": (True, "channels_last"),
}


class Task(NamedTuple):
    """What the sides of a case do."""

    layer: Layer
    precision: str
    backward: bool

    def call(self, name: str, device: torch.device) -> Callable[[], list[Tensor]]:
        ours, layout = SIDES[name]
        function = (OURS if ours else PLAIN)[self.layer.conv_pass]
        problem = _problem(self.layer, DTYPE[self.precision], device)
        return way(function, problem, FORMATS[layout], self.backward)

    def work(self) -> Work:
        layer = self.layer
        up = layer.conv_pass == "up"
        small = (layer.size, layer.given) if up else (layer.size // 2, layer.made)
        big_channels = layer.made if up else layer.given
        passes = 3 if self.backward else 1
        return folded_conv_work(
            layer.batch, *small, big_channels, passes, DTYPE[self.precision].itemsize
        )


def check(task: Task, device: torch.device, sides: Sequence[Side]) -> None:
    """Every element against float64."""
    layer, precision, backward = task
    problem = _problem(layer, DTYPE[precision], device)
    exact = Problem(*(each.double() for each in problem))
    truth = way(PLAIN[layer.conv_pass], exact, torch.contiguous_format, backward)()

    def errors(name: str) -> dict[str, float]:
        made = task.call(name, device)()
        return {
            what: relative_error([ours], [true])
            for what, ours, true in zip(RESULTS, made, truth, strict=False)
        }

    plain = errors("torch contiguous")
    for side in sides:
        found = errors(side.name)
        weight = {what: found.pop(what) for what in ("dweight",) if what in found}
        require_right(side.name, precision, found, plain, CONVOLUTION_FACTOR[precision])
        require_right(side.name, precision, weight, plain, WEIGHT_GRADIENT_FACTOR)


def missing(name: str, device: torch.device) -> str | None:
    """Why a side does not run here, or None."""
    if not SIDES[name][0]:
        return None
    if device.type != "cpu":
        return "pygan's convolution kernels are for a CPU"
    return native.reason()


def _case(task: Task) -> Case:
    layer, precision, backward = task
    up = layer.conv_pass == "up"
    kind = "upsampling, then 3x3 convolution" if up else "3x3 convolution, then pooling"
    ending = "forward_backward" if backward else "forward"

    def build(name: str, device: torch.device) -> Call:
        return task.call(name, device)

    return Case(
        name=(
            f"folded_conv-{layer.given}-{layer.made}-{layer.size}x{layer.size}-"
            f"{layer.conv_pass}-{ending}-{precision}"
        ),
        about=(
            f"{kind}, {layer.label}, {ending.replace('_', ' and ')}, {precision}, "
            f"batch {layer.batch}"
        ),
        images=layer.batch,
        sides=tuple(
            Side(
                name=name,
                precision=precision,
                build=functools.partial(build, name),
                work=task.work(),
                baseline=not ours,
                full_only=(layer, backward, precision) not in QUICK,
                missing=functools.partial(missing, name),
            )
            for name, (ours, _) in SIDES.items()
        ),
        check=functools.partial(check, task),
        at_most=AT_MOST,
    )


CASES = {
    case.name: case
    for case in (
        _case(Task(layer, precision, backward))
        for layer in LAYERS
        for backward in (False, True)
        for precision in DTYPE
    )
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_folded_conv(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
