"""The 4x4 convolution of stride 2 in each direction: torch in both layouts, and pygan's methods.

Every side gets its operands as it wants them and allocates its result in the call; pygan's scratch
is kept between calls, as its operation keeps it. torch's bfloat16 sides get their weight in
bfloat16, which in a training costs a cast a step; pygan's sides read and write float32 weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.correct import (
    CONVOLUTION_FACTOR,
    DTYPE,
    WEIGHT_GRADIENT_FACTOR,
    CheckFailed,
    relative_error,
    require_right,
)
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import strided_conv_work
from pygan.ops import native

BATCH = 64
PASSES = ("up", "down", "weight_grad")
METHODS = ("automatic", "none", "direct", "f22", "f42")
MOST_DIRECT = 4
CHANNELS_LAST_WEIGHT = 0
# In bfloat16 products the larger tile rounds more than the rule allows, and automatic leaves it
# out. Its check decides whether it takes part; any other side that is red fails its case.
COARSE = ("f42", "bf16")
# Many cases, of some milliseconds a call.
AT_MOST = {"rounds": 9, "sample_seconds": 0.06, "warmup_seconds": 0.1}


class Layer(NamedTuple):
    """From a small map ``[N, small, size, size]`` up to ``[N, big, 2 size, 2 size]``."""

    small: int
    big: int
    size: int

    @property
    def label(self) -> str:
        return f"{self.small}→{self.big} {self.size}x{self.size}→{2 * self.size}x{2 * self.size}"


DCGAN64 = (Layer(512, 256, 4), Layer(256, 128, 8), Layer(128, 64, 16), Layer(64, 3, 32))
DCGAN32_LAST = Layer(64, 1, 16)
QUICK_LAYERS = (DCGAN64[0], DCGAN64[3])


class Problem(NamedTuple):
    """Both maps, in channels_last, and the float32 weight ``[small, big, 4, 4]``."""

    small: Tensor
    big: Tensor
    weight: Tensor


@functools.lru_cache(maxsize=2)
def _problem(layer: Layer, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(6)
    sizes = ((layer.small, layer.size), (layer.big, 2 * layer.size))
    small, big = (
        torch.randn(BATCH, channels, size, size, generator=generator)
        .to(device=device, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels, size in sizes
    )
    weight = torch.randn(layer.small, layer.big, 4, 4, generator=generator) * 0.02
    return Problem(small, big, weight.to(device))


def torch_pass(
    conv_pass: str, problem: Problem, memory_format: torch.memory_format
) -> Callable[[], Tensor]:
    """torch's own, with everything in the type of the maps and in ``memory_format``."""
    small, big, weight = (
        each.to(problem.small.dtype).contiguous(memory_format=memory_format) for each in problem
    )

    def call() -> Tensor:
        with torch.no_grad():
            if conv_pass == "up":
                return F.conv_transpose2d(small, weight, stride=2, padding=1)
            if conv_pass == "down":
                return F.conv2d(big, weight, stride=2, padding=1)
            return torch.ops.aten.convolution_backward(
                small, big, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1,
                [False, True, False],
            )[1]  # fmt: skip

    return call


def _extension() -> ModuleType:
    extension = native.load()
    assert extension is not None
    return extension


def _shape(layer: Layer, dtype: torch.dtype, method: str, threads: int) -> Any:
    return _extension().StridedConvShape(
        dtype=native.DTYPES[dtype],
        weight_layout=CHANNELS_LAST_WEIGHT,
        batch=BATCH,
        height=layer.size,
        width=layer.size,
        big_height=2 * layer.size,
        big_width=2 * layer.size,
        small_channels=layer.small,
        big_channels=layer.big,
        method=METHODS.index(method),
        normalized=0,
        threads=threads,
    )


def resolved(layer: Layer, conv_pass: str, dtype: torch.dtype, method: str = "automatic") -> str:
    """The method that runs when ``method`` is asked for, "none" where torch is to do it."""
    if native.load() is None:
        return "none"
    shape = _shape(layer, dtype, method, torch.get_num_threads())
    return METHODS[_extension().strided_conv_method(shape, PASSES.index(conv_pass))]


def pygan_pass(
    layer: Layer, conv_pass: str, problem: Problem, method: str, threads: int
) -> Callable[[], Tensor]:
    """The native kernel of one method."""
    extension = _extension()
    shape = _shape(layer, problem.small.dtype, method, threads)
    scratch_bytes = extension.strided_conv_scratch(shape, PASSES.index(conv_pass))
    small, big = problem.small, problem.big
    weight = problem.weight.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        scratch = native.scratch(scratch_bytes)
        if conv_pass == "up":
            made = torch.empty_like(big)
            extension.strided_conv_up(
                *(shape, small.data_ptr(), 0, 0, 0, 0.0),
                *(weight.data_ptr(), 0, made.data_ptr(), scratch),
            )
        elif conv_pass == "down":
            made = torch.empty_like(small)
            extension.strided_conv_down(
                *(shape, big.data_ptr(), 0, 0, weight.data_ptr(), 0),
                *(0, 0.0, made.data_ptr(), scratch),
            )
        else:
            made = torch.empty_like(weight)
            extension.strided_conv_weight_grad(
                *(shape, small.data_ptr(), 0, 0, 0, 0.0, big.data_ptr()),
                *(made.data_ptr(), scratch),
            )
        return made

    return call


class Way(NamedTuple):
    """A side of a layer: ``build(layer, conv_pass, problem)`` returns its call.

    ``method`` is "none" for torch; ``threads`` is 0 for as many as torch has.
    """

    build: Callable[[Layer, str, Problem], Callable[[], Tensor]]
    method: str = "none"
    threads: int = 0


Ways = Mapping[str, Way]


def _torch_way(memory_format: torch.memory_format) -> Way:
    return Way(lambda layer, conv_pass, problem: torch_pass(conv_pass, problem, memory_format))


def _pygan_way(method: str, threads: int = 0) -> Way:
    def build(layer: Layer, conv_pass: str, problem: Problem) -> Callable[[], Tensor]:
        return pygan_pass(layer, conv_pass, problem, method, threads or torch.get_num_threads())

    return Way(build, method, threads)


TORCH = {
    "torch contiguous": _torch_way(torch.contiguous_format),
    "torch channels_last": _torch_way(torch.channels_last),
}


class Work(NamedTuple):
    """What the sides of a case do."""

    layer: Layer
    conv_pass: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE[self.precision]

    @property
    def about(self) -> str:
        return (
            f"4x4 convolution of stride 2, {self.layer.label}, {self.conv_pass}, "
            f"{self.precision}, batch {BATCH}"
        )

    def facts(self) -> dict[str, Any]:
        return {
            "layer": self.layer.label,
            "pass": self.conv_pass,
            "automatic": resolved(self.layer, self.conv_pass, self.dtype),
        }


def check(work: Work, ways: Ways, device: torch.device, sides: Sequence[Side]) -> None:
    """Every element against float64."""
    layer, conv_pass, precision = work
    problem = _problem(layer, work.dtype, device)
    exact = Problem(*(each.double() for each in problem))
    truth = torch_pass(conv_pass, exact, torch.contiguous_format)()

    def error(way: Way) -> dict[str, float]:
        return {conv_pass: relative_error([way.build(layer, conv_pass, problem)()], [truth])}

    gradient = conv_pass == "weight_grad"
    factor = WEIGHT_GRADIENT_FACTOR if gradient else CONVOLUTION_FACTOR[precision]
    plain = error(TORCH["torch contiguous"])
    for side in sides:
        require_right(side.name, precision, error(ways[side.name]), plain, factor)


def missing(work: Work, way: Way, device: torch.device) -> str | None:
    """Why a side does not run here, or None."""
    if way.method == "none":
        return None
    if device.type != "cpu":
        return "pygan's convolution kernels are for a CPU"
    if native.load() is None:
        return native.reason()
    if (psutil.cpu_count() or 1) < way.threads:
        return "this machine has one core"
    if resolved(work.layer, work.conv_pass, work.dtype, way.method) != way.method:
        return f"{way.method} does not take {work.conv_pass} of {work.layer.label}"
    if (way.method, work.precision) == COARSE:
        return _too_coarse(work, way.method)
    return None


@functools.cache
def _too_coarse(work: Work, method: str) -> str | None:
    way, device = _pygan_way(method), torch.device("cpu")
    try:
        check(work, {method: way}, device, [_side(method, way, work, baseline=False)])
    except CheckFailed as failure:
        return str(failure)
    return None


def _side(name: str, way: Way, work: Work, *, baseline: bool) -> Side:
    layer, conv_pass, precision = work

    def build(device: torch.device) -> Call:
        return way.build(layer, conv_pass, _problem(layer, work.dtype, device))

    return Side(
        name=name,
        precision=precision,
        build=build,
        work=strided_conv_work(BATCH, layer.size, layer.small, layer.big, work.dtype.itemsize),
        baseline=baseline,
        full_only=bool(way.threads) or layer not in QUICK_LAYERS or work[1:] == ("down", "bf16"),
        missing=functools.partial(missing, work, way),
    )


def _case(name: str, work: Work, ways: Ways, baselines: Iterable[str]) -> Case:
    layer, conv_pass, precision = work
    return Case(
        name=f"{name}-{layer.small}-{layer.big}-{layer.size}x{layer.size}-{conv_pass}-{precision}",
        about=work.about,
        images=BATCH,
        sides=tuple(
            _side(side, way, work, baseline=side in baselines) for side, way in ways.items()
        ),
        check=functools.partial(check, work, ways),
        at_most=AT_MOST,
        facts=work.facts,
    )


def _methods(work: Work) -> Case:
    direct = ("direct",) if work.layer.big <= MOST_DIRECT else ()
    ours = {f"pygan {method}": _pygan_way(method) for method in (*direct, "f22", "f42")}
    return _case("strided_conv", work, TORCH | ours, baselines=TORCH)


def _threads(work: Work, method: str) -> Case:
    one, two = f"pygan {method}, 1 thread", f"pygan {method}, 2 threads"
    ways = {one: _pygan_way(method, threads=1), two: _pygan_way(method, threads=2)}
    return _case(f"strided_conv_threads-{method}", work, ways, baselines=(one,))


CASES = {
    case.name: case
    for case in (
        *(
            _methods(Work(layer, conv_pass, precision))
            for layer in (*DCGAN64, DCGAN32_LAST)
            for conv_pass in PASSES
            for precision in DTYPE
        ),
        *(
            _threads(Work(layer, "up", precision), method)
            for method, layer in (("f22", DCGAN64[1]), ("f42", DCGAN64[1]), ("direct", DCGAN64[3]))
            for precision in DTYPE
        ),
    )
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_strided_conv(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
