"""Images of dcgan64's generator in eval mode: torch, compilers and runtimes, and pygan.

A call takes 64 latents and returns their images, as each library hands them out. ONNX Runtime and
OpenVINO take part where they are installed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pygan
from benchmarks.correct import CONVOLUTION_FACTOR, relative_error, require_right
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import forward_work
from pygan.models import dcgan

BATCH = 64
NZ = 100

# Latents [N, nz, 1, 1] to images [N, 3, 64, 64], in what the library computes with.
Sampler = Callable[[], Any]
Build = Callable[[nn.Module, Tensor], Sampler]


@functools.cache
def _generator() -> nn.Module:
    """Untrained, but with the running statistics of its own activations, so that eval mode gives
    images of the range that a trained one gives."""
    torch.manual_seed(0)
    generator = dcgan(nz=NZ)[0]
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for _ in range(2):
            generator(torch.randn(BATCH, NZ, 1, 1))
    for norm in norms:
        norm.momentum = 0.1
    return generator.eval()


def _latents() -> Tensor:
    return torch.randn(BATCH, NZ, 1, 1, generator=torch.Generator().manual_seed(7))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _called(network: Callable[[Tensor], Tensor], z: Tensor, bf16: bool) -> Sampler:
    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
            return network(z)

    return call


def eager(*, channels_last: bool = False, bf16: bool = False) -> Build:
    """The module as it is."""

    def build(generator: nn.Module, z: Tensor) -> Sampler:
        layout = torch.channels_last if channels_last else torch.preserve_format
        return _called(generator.to(memory_format=layout), z, bf16)  # type: ignore[call-overload]

    return build


def compiled(*, bf16: bool = False) -> Build:
    """torch.compile with its defaults, for this batch."""

    def build(generator: nn.Module, z: Tensor) -> Sampler:
        return _called(torch.compile(generator, dynamic=False), z, bf16)

    return build


def onnx_runtime(generator: nn.Module, z: Tensor) -> Sampler:
    """ONNX Runtime on a CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/generator.onnx"
        torch.onnx.export(
            generator, (z,), model, input_names=["z"], output_names=["images"], dynamo=False
        )
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = {"z": z.numpy()}
    return lambda: session.run(None, given)[0]


def openvino(precision: str) -> Build:
    """OpenVINO on a CPU, with as many threads as torch."""

    def build(generator: nn.Module, z: Tensor) -> Sampler:
        import openvino as ov

        with _quiet():
            model = ov.convert_model(generator, example_input=z)
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        network = ov.compile_model(model, "CPU", settings)
        given = z.numpy()
        return lambda: network(given)[0]

    return build


def fused(*, channels_last: bool = False, bf16: bool = False) -> Build:
    """pygan.fuse."""

    def build(generator: nn.Module, z: Tensor) -> Sampler:
        pygan.fuse(generator)
        return eager(channels_last=channels_last, bf16=bf16)(generator, z)

    return build


class Way(NamedTuple):
    """A row of the table. ``needs`` are packages, of which one that is missing is a reason."""

    name: str
    precision: str
    build: Build
    needs: tuple[str, ...] = ()
    cpu_only: bool = False
    compiles: bool = False


WAYS = {
    way.name: way
    for way in (
        Way("eager fp32", "fp32", eager()),
        Way("eager fp32 channels_last", "fp32", eager(channels_last=True)),
        Way("compile fp32", "fp32", compiled(), compiles=True),
        Way("ONNX Runtime fp32", "fp32", onnx_runtime, ("onnxruntime", "onnx"), cpu_only=True),
        Way("OpenVINO fp32", "fp32", openvino("f32"), ("openvino",), cpu_only=True),
        Way("eager bf16", "bf16", eager(bf16=True)),
        Way("eager bf16 channels_last", "bf16", eager(channels_last=True, bf16=True)),
        Way("compile bf16", "bf16", compiled(bf16=True), compiles=True),
        Way("OpenVINO bf16", "bf16", openvino("bf16"), ("openvino",), cpu_only=True),
        Way("pygan fp32", "fp32", fused()),
        Way("pygan fp32 channels_last", "fp32", fused(channels_last=True)),
        Way("pygan bf16", "bf16", fused(bf16=True)),
        Way("pygan bf16 channels_last", "bf16", fused(channels_last=True, bf16=True)),
    )
}


def missing(way: Way, device: torch.device) -> str | None:
    """Why a side does not run here, or None."""
    if way.cpu_only and device.type != "cpu":
        return f"{way.name} is measured on a CPU only"
    for package in way.needs:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if way.compiles and device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang")):
        return "torch.compile finds no C++ compiler"
    return None


def _built(way: Way, device: torch.device) -> Sampler:
    return way.build(copy.deepcopy(_generator()).to(device), _latents().to(device))


def check(device: torch.device, sides: Sequence[Side]) -> None:
    """Every pixel against float64."""
    with torch.inference_mode():
        truth = copy.deepcopy(_generator()).double()(_latents().double())

    def error(way: Way) -> dict[str, float]:
        return {"images": relative_error([torch.as_tensor(_built(way, device)())], [truth])}

    plain = {name: error(WAYS[f"eager {name}"]) for name in {side.precision for side in sides}}
    for side in sides:
        factor = CONVOLUTION_FACTOR[side.precision]
        require_right(
            side.name, side.precision, error(WAYS[side.name]), plain[side.precision], factor
        )


def _side(way: Way) -> Side:
    def build(device: torch.device) -> Call:
        return _built(way, device)

    with torch.device("meta"):
        generator = dcgan(nz=NZ)[0]
    return Side(
        name=way.name,
        precision=way.precision,
        build=build,
        work=forward_work(generator, (NZ, 1, 1), BATCH, 2 if way.precision == "bf16" else 4),
        baseline=not way.name.startswith("pygan"),
        full_only=way.compiles,
        missing=functools.partial(missing, way),
    )


CASES = {
    "sampling-dcgan64": Case(
        name="sampling-dcgan64",
        about=f"dcgan64's generator in eval mode, batch {BATCH}",
        images=BATCH,
        sides=tuple(_side(way) for way in WAYS.values()),
        check=check,
    )
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_sampling(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
