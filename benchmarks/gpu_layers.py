"""The strided convolutions of DCGAN on a GPU, layer by layer: cuDNN's own time and pygan's.

``python -m benchmarks.gpu_layers --out FILE.jsonl --name layers`` times each pass of each layer in
bfloat16 on channels_last maps: torch, which is cuDNN there, with its weight in bfloat16 already,
and each implementation of pygan, which takes the float32 weight under autocast as in training. Each
is checked against float64 first. Data of several calls are taken in turn, more than the caches
hold.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import gpu_records
from benchmarks.bench_strided_conv import PASSES, Layer, Problem, torch_pass
from benchmarks.correct import (
    CONVOLUTION_FACTOR,
    WEIGHT_GRADIENT_FACTOR,
    relative_error,
    require_right,
    without_search,
)
from benchmarks.gpu_records import Part
from benchmarks.gpu_replay import Replay
from benchmarks.measure import QUICK, Call, interleave, warm_up
from benchmarks.ratio import speed_ratio, spread
from benchmarks.work import strided_conv_work
from pygan import functional

PROG = "python -m benchmarks.gpu_layers"
LAYERS = {
    "dcgan64": (Layer(512, 256, 4), Layer(256, 128, 8), Layer(128, 64, 16), Layer(64, 3, 32)),
    "dcgan32": (Layer(256, 128, 4), Layer(128, 64, 8), Layer(64, 1, 16)),
}
TINY = {"tiny": (Layer(5, 3, 2),)}
BATCHES = (128, 1024)
CUDNN = "cuDNN"
CACHE_BYTES = 128 * 2**20
MOST_SETS = 12
CHECKED = 4
ROUNDS, SAMPLE_SECONDS = 7, 0.01


class Shape(NamedTuple):
    """A pass of a layer of a network."""

    network: str
    layer: Layer
    conv_pass: str
    batch: int

    def problem(self, device: torch.device, seed: int) -> Problem:
        layer, generator = self.layer, torch.Generator(device).manual_seed(seed)
        sizes = ((layer.small, layer.size), (layer.big, 2 * layer.size))
        small, big = (
            torch.randn(self.batch, c, n, n, generator=generator, device=device)
            .to(dtype=torch.bfloat16, memory_format=torch.channels_last)
            for c, n in sizes
        )  # fmt: skip
        weight = torch.randn(layer.small, layer.big, 4, 4, generator=generator, device=device)
        return Problem(small, big, (weight * 0.02).to(memory_format=torch.channels_last))

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "layer": self.layer.label,
            "pass": self.conv_pass,
            "batch": self.batch,
        }


Build = Callable[[Problem, str], Callable[[], Tensor]]


def cudnn(problem: Problem, conv_pass: str) -> Callable[[], Tensor]:
    """torch's own."""
    return torch_pass(conv_pass, problem, torch.channels_last)


def pygan_way(impl: str) -> Build:
    """One of pygan's implementations, by name."""

    def build(problem: Problem, conv_pass: str) -> Callable[[], Tensor]:
        device = problem.small.device.type
        cast = functools.partial(torch.autocast, device, torch.bfloat16, cache_enabled=False)
        small, big, weight = problem
        if conv_pass == "weight_grad":
            learning = weight.detach().requires_grad_()
            with cast():
                y = functional.conv2d(big, learning, stride=2, padding=1, impl=impl)
            return lambda: torch.autograd.grad(y, learning, small, retain_graph=True)[0]
        going_up = conv_pass == "up"
        run = functional.conv_transpose2d if going_up else functional.conv2d
        x = small if going_up else big

        def call() -> Tensor:
            with torch.no_grad(), cast():
                return run(x, weight, stride=2, padding=1, impl=impl)

        return call

    return build


def ways(device: torch.device) -> dict[str, Build]:
    """What is to be timed on a device."""
    implementations = ("triton", "cuda") if device.type == "cuda" else ("cpu", "triton", "cuda")
    return {CUDNN: cudnn, **{name: pygan_way(name) for name in implementations}}


@functools.lru_cache(maxsize=1)
def _exact(shape: Shape, device: torch.device) -> tuple[Problem, Tensor, float]:
    """Data, the float64 result of `_seen` of them, and the error of cuDNN."""
    problem = shape.problem(device, seed=1)
    exact = Problem(*(each.double() for each in _seen(shape, problem)))
    with without_search():
        truth = torch_pass(shape.conv_pass, exact, torch.channels_last)()
    return problem, truth, relative_error([_result(shape, cudnn, problem)], [truth])


def _ends(maps: Tensor) -> Tensor:
    return torch.cat([maps[:CHECKED], maps[-CHECKED:]]) if len(maps) > 2 * CHECKED else maps


def _seen(shape: Shape, problem: Problem) -> Problem:
    """All for the weight's gradient; else, image by image alike, the first and the last ones."""
    if shape.conv_pass == "weight_grad":
        return problem
    return Problem(_ends(problem.small), _ends(problem.big), problem.weight)


def _result(shape: Shape, build: Build, problem: Problem) -> Tensor:
    made = build(problem, shape.conv_pass)()
    return made if shape.conv_pass == "weight_grad" else _ends(made)


def _check(shape: Shape, name: str, build: Build, device: torch.device) -> None:
    problem, truth, plain = _exact(shape, device)
    error = relative_error([_result(shape, build, problem)], [truth])
    weight_grad = shape.conv_pass == "weight_grad"
    factor = WEIGHT_GRADIENT_FACTOR if weight_grad else CONVOLUTION_FACTOR["bf16"]
    require_right(name, "bf16", {shape.conv_pass: error}, {shape.conv_pass: plain}, factor)


def _replay(shape: Shape, build: Build, device: torch.device, tiny: bool) -> Replay:
    layer = shape.layer
    work = strided_conv_work(shape.batch, layer.size, layer.small, layer.big, 2)
    sets = 1 if tiny else max(1, min(MOST_SETS, math.ceil(CACHE_BYTES / work.bytes)))
    builds: list[Callable[[], Call]] = [
        functools.partial(lambda seed: build(shape.problem(device, seed), shape.conv_pass), seed)
        for seed in range(2, 2 + sets)
    ]
    return Replay(builds, device, repeats=1 if tiny else 2)


def time_shape(part: Part, shape: Shape) -> None:
    """Records of all ways of one pass."""
    replays: dict[str, Replay] = {}
    for name, build in ways(part.device).items():
        try:
            if name != CUDNN:
                _check(shape, name, build, part.device)
            replays[name] = _replay(shape, build, part.device, part.tiny)
        except Exception as error:
            part.missing("layer", error, **shape.facts, side=name)
    seconds = rounds(list(replays.values()), part)
    layer = shape.layer
    work = strided_conv_work(shape.batch, layer.size, layer.small, layer.big, 2)
    for (name, replay), own in zip(replays.items(), seconds, strict=True):
        median, q1, q3 = spread(own)
        record = {
            **shape.facts,
            "side": name,
            "how": replay.how,
            "microseconds": 1e6 * median,
            "microseconds_q1": 1e6 * q1,
            "microseconds_q3": 1e6 * q3,
            "rounds": len(own),
            "tflop_per_s": work.flops / median / 1e12,
            "share_of_peak_flops": work.flops / median / 1e9 / part.peaks["gflops_bf16"],
            "gb_per_s": work.bytes / median / 1e9,
            "share_of_peak_bandwidth": work.bytes / median / 1e9 / part.peaks["gb_per_s"],
        }
        if CUDNN in replays and name != CUDNN:
            baseline = seconds[list(replays).index(CUDNN)]
            record["ratio"] = speed_ratio(own, baseline)._asdict()
        part.add("layer", record)


def rounds(replays: Sequence[Replay], part: Part) -> list[list[float]]:
    """Seconds of one call of each, in each round, timed in turn."""
    plan = QUICK
    once = [warm_up(replay, plan, part.device) for replay in replays]
    least = 0.0 if part.tiny else SAMPLE_SECONDS
    times = [max(1, math.ceil(least / seconds)) for seconds in once]
    found = interleave(replays, times, 2 if part.tiny else ROUNDS, part.device)
    return [
        [duration / (count * replay.count) for duration in row]
        for replay, count, row in zip(replays, times, found, strict=True)
    ]


def _measure(part: Part, options: Any) -> None:
    layers, batches = (TINY, (2,)) if part.tiny else (LAYERS, BATCHES)
    for batch in batches:
        for network, of_network in layers.items():
            for layer in of_network:
                for conv_pass in PASSES:
                    shape = Shape(network, layer, conv_pass, batch)
                    if part.left() <= 0:
                        part.missing("layer", "the time was up", **shape.facts, side="all")
                        continue
                    time_shape(part, shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the part and returns its exit status (see `pygan.cli`)."""
    parser = gpu_records.parser(PROG, "Convolutions of DCGAN by layer, cuDNN and pygan.")
    return gpu_records.run(parser, arguments, _measure)


if __name__ == "__main__":
    sys.exit(main())
