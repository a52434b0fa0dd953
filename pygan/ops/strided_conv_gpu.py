"""The passes of ``strided_conv`` on a GPU: who runs each, Triton's kernels in one of their
configurations, CUDA's where big is an image, or torch's.

On first use of a shape, outside the capture of a graph, the configurations of its three passes are
timed against torch's own (cuDNN), which stays where none is faster beyond noise; see
:mod:`pygan.ops.tuning`. A shape first met during capture is torch's for that call. Asked for by
name the kernels always run. float32 is multiplied as TF32 where torch's convolutions are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pygan.ops import cuda_native, dispatch, gpu, image_conv_cuda, tuning

PASSES = ("up", "down", "weight_grad")
CUDA = "cuda"  # stands for the one configuration that its kernels have
_TORCH = "torch"
_LAST = torch.channels_last
_PROGRAMS = 2  # of weight_grad for each multiprocessor
# Their index is 32 bits wide, and the last tile and the last split go beyond them.
_MOST_POSITIONS = (1 << 31) - (1 << 20)
_MOST_WEIGHTS = 1 << 31


class Shape(NamedTuple):
    """All that a choice depends on beside the device."""

    dtype: torch.dtype
    weight_format: torch.memory_format
    small_size: tuple[int, ...]
    big_size: tuple[int, ...]
    precision: str

    @property
    def key(self) -> str:
        layout = "last" if self.weight_format is _LAST else "first"
        sizes = ["x".join(map(str, size)) for size in (self.small_size, self.big_size)]
        return " ".join((str(self.dtype), self.precision, layout, *sizes))


class Passes(NamedTuple):
    """The kernels' configuration of each pass, or None where torch is to run it."""

    shape: Shape
    up: Any
    down: Any
    weight_grad: Any

    @property
    def take_activation(self) -> bool:
        """Whether a ReLU or LeakyReLU behind down may run with all three."""
        return self[1:] == (CUDA, CUDA, CUDA)


class _Unmeasured(Exception):
    """A graph is being captured, and nothing can be timed."""


def precision(dtype: torch.dtype) -> str:
    """How torch's convolutions multiply float32 now: "tf32" or "ieee"."""
    if dtype is not torch.float32:
        return "tf32"  # of no meaning
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # before torch 2.9 it is not there
        return "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
    return "tf32" if cudnn.allow_tf32 else "ieee"


def supports(tensors: Sequence[Tensor], autocast: torch.dtype | None) -> str | None:
    """Reason that the kernels cannot take tensors of these devices and types, or None."""
    if (reason := dispatch.supports_triton(*tensors)) is not None:
        return reason
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}, not a plain one"
    dtypes = {t.dtype for t in tensors}
    if autocast is None and len(dtypes) > 1:
        return "input, weight and bias have different dtypes"
    for dtype in dtypes if autocast is None else {*dtypes, autocast}:
        if (reason := gpu.unfit(dtype)) is not None:
            return reason
    return None


def supports_sizes(small_size: tuple[int, ...], big_size: tuple[int, ...]) -> str | None:
    """Reason that the kernels cannot take maps of these sizes, or None."""
    if any(not 0 <= big_size[i] - 2 * small_size[i] < 2 for i in (2, 3)):
        return f"maps of {small_size} and {big_size} do not lie over each other"
    if min(*small_size, *big_size) < 1:
        return "a map is empty"
    if small_size[0] * (small_size[2] + 1) * (small_size[3] + 1) >= _MOST_POSITIONS:
        return f"{small_size} has {_MOST_POSITIONS} positions or more"
    if 16 * small_size[1] * big_size[1] >= _MOST_WEIGHTS:
        return f"a weight between {small_size[1]} and {big_size[1]} channels has too many values"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _timed(run: Callable[[], Any]) -> float:
    return tuning.cuda_timer(run)


@functools.cache
def _tuner(stamp: str) -> tuning.Tuner:
    return tuning.Tuner(stamp, _timed)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def passes(shape: Shape, device: torch.device, named: str | None) -> Passes:
    """Who runs each pass; kernels that are ``named``, "triton" or "cuda", run all."""
    if named == CUDA:
        return Passes(shape, CUDA, CUDA, CUDA)
    try:
        return _passes(shape, device, named)
    except _Unmeasured:
        return _unmeasured(shape, device, named)


def _unmeasured(shape: Shape, device: torch.device, named: str | None) -> Passes:
    first = (_configs(shape, device, conv_pass)[0] if named else None for conv_pass in PASSES)
    return Passes(shape, *first)


def _configs(shape: Shape, device: torch.device, conv_pass: str) -> tuple[Any, ...]:
    """What may run the pass here, forms that run on any GPU first."""
    from pygan.kernels.strided_conv_configs import configs, with_descriptors

    small, big = shape.small_size, shape.big_size
    given = (conv_pass, small[1], big[1], shape.dtype, shape.precision)
    found = configs(*given)
    if gpu.copies_tensors(device) and (
        conv_pass == "up" or all(big[i] == 2 * small[i] for i in (2, 3))
    ):
        found += with_descriptors(*given)
    return found


@functools.lru_cache(maxsize=1024)
def _passes(shape: Shape, device: torch.device, named: str | None) -> Passes:
    if _interpreted():
        return _unmeasured(shape, device, "triton")
    with gpu.on(device):
        return Passes(shape, *(_choice(shape, device, named, conv_pass) for conv_pass in PASSES))


def _choice(shape: Shape, device: torch.device, named: str | None, conv_pass: str) -> Any:
    tuner = _tuner(tuning.device_stamp(device))
    by_name = {_name(config): config for config in _configs(shape, device, conv_pass)}
    if named is None and _has_images(shape) and cuda_native.reason() is None:
        by_name[CUDA] = CUDA
    names = by_name if named else {_TORCH: None} | by_name
    key = f"strided_conv {conv_pass} {shape.key}{' named' if named else ''}"
    choice = tuner.known(key, names)
    if choice is None:
        if _capturing():
            raise _Unmeasured
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            candidates = _candidates(shape, device, named, conv_pass, by_name)
            choice = tuner.choose(key, candidates, None if named else _TORCH)
    return by_name.get(choice)


def _has_images(shape: Shape) -> bool:
    return shape.big_size[1] <= image_conv_cuda.BIG_CHANNELS


def _name(config: Any) -> str:
    return "-".join(str(int(part)) for part in config)


def _candidates(
    shape: Shape, device: torch.device, named: str | None, conv_pass: str, by_name: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """What runs the pass once, on maps of its own."""

    # Nobody else's random numbers are other ones for this.
    generator = torch.Generator(device).manual_seed(0)

    def made(size: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        values = torch.randn(size, dtype=dtype, device=device, generator=generator)
        return values.contiguous(memory_format=layout)

    small = made(shape.small_size, shape.dtype, _LAST)
    big = made(shape.big_size, shape.dtype, _LAST)
    size = (shape.small_size[1], shape.big_size[1], 4, 4)
    weight = made(size, torch.float32, shape.weight_format)
    candidates: dict[str, Callable[[], Any]] = {}
    if not named:
        odd = tuple(shape.big_size[i] - 2 * shape.small_size[i] for i in (2, 3))
        kind = shape.dtype
        candidates[_TORCH] = {
            "up": lambda: F.conv_transpose2d(small, weight.to(kind), None, 2, 1, odd),
            "down": lambda: F.conv2d(big, weight.to(kind), None, 2, 1),
            "weight_grad": lambda: (
                conv2d_weight(big, size, small, 2, 1)
                .float()
                .contiguous(memory_format=shape.weight_format)
            ),
        }[conv_pass]
    for name, config in by_name.items():
        candidates[name] = {
            "up": functools.partial(up, shape, config, small, weight, None),
            "down": functools.partial(down, shape, config, big, weight, None),
            "weight_grad": functools.partial(weight_grad, shape, config, small, big),
        }[conv_pass]
    return candidates


def up(
    shape: Shape,
    config: Any,
    small: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
) -> Tensor:
    """big in channels_last of ``small [N, A, H, W]``, ``weight [A, B, 4, 4]`` in float32. Only
    passes that take an activation take a ``gate``."""
    if config == CUDA:
        odd = (shape.big_size[2] - 2 * small.shape[2], shape.big_size[3] - 2 * small.shape[3])
        return image_conv_cuda.up(small, weight, bias, odd, "none", gate, negative_slope)
    return _convolve("up", shape.big_size, shape, config, small, weight, bias)


def down(
    shape: Shape,
    config: Any,
    big: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """small in channels_last of ``big [N, B, .., ..]``, ``weight [A, B, 4, 4]`` in float32. Only
    passes that take an activation are given one."""
    if config == CUDA:
        return image_conv_cuda.down(big, weight, bias, activation, negative_slope)
    return _convolve("down", shape.small_size, shape, config, big, weight, bias)


def _convolve(
    conv_pass: str,
    size: tuple[int, ...],
    shape: Shape,
    config: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    from pygan.kernels import strided_conv as kernels
    from pygan.kernels.strided_conv_weight import pack

    x = x.contiguous(memory_format=_LAST)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_LAST)
    small, big = (x, y) if conv_pass == "up" else (y, x)
    with gpu.on(x.device):
        weight = pack(weight.contiguous(memory_format=shape.weight_format), x.dtype)
        kernels.run(conv_pass, small, big, weight, config, shape.precision, bias)
    return y


def weight_grad(
    shape: Shape,
    config: Any,
    small: Tensor,
    big: Tensor,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
) -> Tensor:
    """float32 ``[A, B, 4, 4]`` in the weight's memory format; ``gate`` as in :func:`up`."""
    if config == CUDA:
        return image_conv_cuda.weight_grad(small, big, gate, negative_slope, shape.weight_format)
    from pygan.kernels import strided_conv_weight as kernels

    small, big = small.contiguous(memory_format=_LAST), big.contiguous(memory_format=_LAST)
    size = (shape.small_size[1], shape.big_size[1], 4, 4)
    dweight = torch.empty(
        size, dtype=torch.float32, device=small.device, memory_format=shape.weight_format
    )
    with gpu.on(small.device):
        programs = _programs(small.device)
        kernels.weight_grad(dweight, small, big, config, shape.precision, programs)
    return dweight


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
