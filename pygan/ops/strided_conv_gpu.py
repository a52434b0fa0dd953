"""The passes of ``strided_conv`` on a GPU: who runs each, Triton's kernels in one of their
configurations, CUDA's where big is an image, or torch's.

On first use of a shape, outside the capture of a graph, the configurations of its three passes are
timed against torch's own (cuDNN), which stays where none is faster beyond noise; see
:mod:`pygan.ops.tuning`. A shape first met during capture is torch's for that call. Asked for by
name the kernels always run. float32 is multiplied as TF32 where torch's convolutions are.

Triton's kernels can normalize and activate a map as they read it, and take the statistics of the
one that they write; :mod:`pygan.ops.norm_conv_gpu` measures where either pays.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pygan.ops import cuda_native, dispatch, gpu, image_conv_cuda, tuning
from pygan.ops.moments import Moments

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

    def given(self, conv_pass: str) -> tuple[str, int, int, torch.dtype, str]:
        """What the configurations of a pass depend on."""
        a, b = self.small_size[1], self.big_size[1]
        return conv_pass, a, b, self.dtype, self.precision


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


class Unmeasured(Exception):
    """A graph is being captured, and nothing can be timed."""


class Normalized(NamedTuple):
    """The map that a pass reads as max(z, slope * z), z = (x - mean) * scale + shift."""

    map: str  # "small" or "big"
    coefficients: Tensor  # [groups, 3, channels] mean, scale and shift; as many groups as moments
    slope: float


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


def interpreted() -> bool:
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
    except Unmeasured:
        return _unmeasured(shape, device, named)


def _unmeasured(shape: Shape, device: torch.device, named: str | None) -> Passes:
    first = (configs(shape, device, conv_pass)[0] if named else None for conv_pass in PASSES)
    return Passes(shape, *first)


def configs(
    shape: Shape, device: torch.device, conv_pass: str, statistics: bool = False
) -> tuple[Any, ...]:
    """What may run the pass here, and take the ``statistics`` of its output, forms that run on any
    GPU first."""
    from pygan.kernels import strided_conv_configs as kernels

    given = shape.given(conv_pass)
    found = kernels.with_statistics(*given) if statistics else kernels.configs(*given)
    big, small = shape.big_size, shape.small_size
    if gpu.copies_tensors(device) and (
        conv_pass == "up" or all(big[i] == 2 * small[i] for i in (2, 3))
    ):
        found += kernels.with_descriptors(*given, statistics)
    return found


@functools.lru_cache(maxsize=1024)
def _passes(shape: Shape, device: torch.device, named: str | None) -> Passes:
    if interpreted():
        return _unmeasured(shape, device, "triton")
    return Passes(shape, *(_choice(shape, device, named, conv_pass) for conv_pass in PASSES))


def _choice(
    shape: Shape, device: torch.device, named: str | None, conv_pass: str, activation: str = "none"
) -> Any:
    by_name = {name_of(config): config for config in configs(shape, device, conv_pass)}
    if named is None and _has_images(shape) and cuda_native.reason() is None:
        by_name[CUDA] = CUDA
    names = by_name if named else {_TORCH: None} | by_name
    behind = "" if activation == "none" else f" with {activation}"
    key = f"strided_conv {conv_pass}{behind} {shape.key}{' named' if named else ''}"
    choice = measured(
        *(device, key, names, None if named else _TORCH),
        lambda: _candidates(shape, device, named, conv_pass, by_name, activation),
    )
    return by_name.get(choice)


def up_with_tanh(passes: Passes, device: torch.device, named: str | None) -> Any:
    """Who runs up where a tanh follows, as in ``Passes``: CUDA's kernels put it out with their
    sums, behind others it is torch's."""
    if named is not None or not _has_images(passes.shape) or interpreted():
        return passes.up
    try:
        return _up_with_tanh(passes.shape, device)
    except Unmeasured:
        return passes.up


@functools.lru_cache(maxsize=1024)
def _up_with_tanh(shape: Shape, device: torch.device) -> Any:
    return _choice(shape, device, None, "up", "tanh")


def measured(
    device: torch.device,
    key: str,
    names: Iterable[str],
    baseline: str | None,
    candidates: Callable[[], dict[str, Callable[[], Any]]],
) -> str:
    """The fastest of the candidates ``names``, which are made where it is not known yet.

    Raises:
        Unmeasured: it is not, and a graph is being captured.
        RuntimeError: no candidate runs.
    """
    tuner = _tuner(tuning.device_stamp(device))
    choice = tuner.known(key, dict.fromkeys(names))
    if choice is None:
        if _capturing():
            raise Unmeasured
        with gpu.on(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
            choice = tuner.choose(key, candidates(), baseline)
    return choice


def _has_images(shape: Shape) -> bool:
    return shape.big_size[1] <= image_conv_cuda.BIG_CHANNELS


def name_of(config: Any) -> str:
    return "-".join(str(int(part)) for part in config)


class Maps(NamedTuple):
    """A small and a big map and their weight, to time a pass with."""

    small: Tensor
    big: Tensor
    weight: Tensor


def random_maps(shape: Shape, device: torch.device) -> Maps:
    # Nobody else's random numbers are other ones for this.
    generator = torch.Generator(device).manual_seed(0)

    def made(size: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        values = torch.randn(size, dtype=dtype, device=device, generator=generator)
        return values.contiguous(memory_format=layout)

    return Maps(
        made(shape.small_size, shape.dtype, _LAST),
        made(shape.big_size, shape.dtype, _LAST),
        made((shape.small_size[1], shape.big_size[1], 4, 4), torch.float32, shape.weight_format),
    )


def run(
    shape: Shape,
    config: Any,
    conv_pass: str,
    maps: Maps,
    normalized: Normalized | None = None,
    moments: Moments | None = None,
    activation: str = "none",
) -> Tensor:
    """A pass without bias, which is torch's where the configuration is None, and behind up an
    ``activation``: "none" or "tanh". Only Triton's kernels take ``normalized`` and ``moments``."""
    small, big, weight = maps
    if activation != "none":
        if config == CUDA:
            return up(shape, config, small, weight, None, activation=activation)
        return torch.tanh_(run(shape, config, conv_pass, maps, normalized, moments))
    if conv_pass == "weight_grad":
        if config is not None:
            return weight_grad(shape, config, small, big, normalized=normalized)
        dweight = conv2d_weight(big, weight.shape, small, 2, 1).float()
        return dweight.contiguous(memory_format=shape.weight_format)
    if config is not None:
        x, function = (small, up) if conv_pass == "up" else (big, down)
        return function(shape, config, x, weight, None, normalized=normalized, moments=moments)
    weight = weight.to(shape.dtype)
    if conv_pass == "down":
        return F.conv2d(big, weight, None, 2, 1)
    odd = tuple(shape.big_size[i] - 2 * shape.small_size[i] for i in (2, 3))
    return F.conv_transpose2d(small, weight, None, 2, 1, odd)


def _candidates(
    shape: Shape,
    device: torch.device,
    named: str | None,
    conv_pass: str,
    by_name: dict[str, Any],
    activation: str,
) -> dict[str, Callable[[], Any]]:
    """What runs the pass once, on maps of its own."""
    maps = random_maps(shape, device)
    ways = by_name if named else {_TORCH: None} | by_name
    return {
        name: functools.partial(run, shape, config, conv_pass, maps, activation=activation)
        for name, config in ways.items()
    }


def up(
    shape: Shape,
    config: Any,
    small: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
    *,
    activation: str = "none",
    normalized: Normalized | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """big in channels_last of ``small [N, A, H, W]``, ``weight [A, B, 4, 4]`` in float32. Only
    CUDA's kernels take an ``activation`` and, where they run all passes, a ``gate``; only Triton's
    what follows."""
    if config == CUDA:
        odd = (shape.big_size[2] - 2 * small.shape[2], shape.big_size[3] - 2 * small.shape[3])
        return image_conv_cuda.up(small, weight, bias, odd, activation, gate, negative_slope)
    return _convolve("up", shape.big_size, shape, config, small, weight, bias, normalized, moments)


def down(
    shape: Shape,
    config: Any,
    big: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    negative_slope: float = 0.0,
    *,
    normalized: Normalized | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """small in channels_last of ``big [N, B, .., ..]``, ``weight [A, B, 4, 4]`` in float32. Only
    passes that take an activation are given one, only Triton's kernels take what follows."""
    if config == CUDA:
        return image_conv_cuda.down(big, weight, bias, activation, negative_slope)
    return _convolve(
        "down", shape.small_size, shape, config, big, weight, bias, normalized, moments
    )


def _convolve(
    conv_pass: str,
    size: tuple[int, ...],
    shape: Shape,
    config: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    normalized: Normalized | None,
    moments: Moments | None,
) -> Tensor:
    from pygan.kernels import strided_conv as kernels
    from pygan.kernels.strided_conv_weight import pack

    x = x.contiguous(memory_format=_LAST)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_LAST)
    small, big = (x, y) if conv_pass == "up" else (y, x)
    parts, coefficients, slope, groups = None, None, 0.0, 1
    if moments is not None:
        groups = moments.groups
        parts = kernels.partials(conv_pass, small, big, groups, config)
    if normalized is not None:
        _, coefficients, slope = normalized
        groups = coefficients.shape[0]
    with gpu.on(x.device):
        weight = pack(weight.contiguous(memory_format=shape.weight_format), x.dtype)
        extra = (bias, parts, coefficients, slope, groups)
        kernels.run(conv_pass, small, big, weight, config, shape.precision, *extra)
    if moments is not None:
        moments.parts = parts
    return y


def weight_grad(
    shape: Shape,
    config: Any,
    small: Tensor,
    big: Tensor,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
    *,
    normalized: Normalized | None = None,
) -> Tensor:
    """float32 ``[A, B, 4, 4]`` in the weight's memory format; the rest as in :func:`up`."""
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
        extra = ("none", None, 0.0) if normalized is None else normalized
        kernels.weight_grad(dweight, small, big, config, shape.precision, programs, *extra)
    return dweight


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
