"""A ``nn.Sequential`` that runs neighbouring layers as one operation.

Which layers those are is read off the layers at every call, so that hooks and exchanged layers
count at once; what they compute is in :mod:`pygan.ops`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pygan.known_operations import may_enter
from pygan.layers import globally_hooked, is_own_hook, watched
from pygan.ops import dispatch, gpu
from pygan.ops.folded_conv import conv2d_avg_pool, upsample_conv2d
from pygan.ops.layout import is_last
from pygan.ops.moments import Moments
from pygan.ops.norm_act import Settings, current_groups, grouping, norm_act
from pygan.ops.norm_conv import Conv, norm_conv
from pygan.ops.strided_conv import DIRECT_CHANNELS, conv2d, conv_transpose2d, down, up
from pygan.pending import (
    MOST_LEFT,
    Map,
    Observed,
    Readers,
    format_of,
    hand_on,
    in_last,
    is_little,
    is_little_norm,
)

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU)
_HEADS = frozenset((*CONVOLUTIONS, *BATCH_NORMS, nn.Upsample, nn.UpsamplingNearest2d))
FOLDED = ("upsample and convolution", "convolution and pool")


def why_opaque(layer: nn.Module) -> str | None:
    """Why a layer has to be called as a module (something may watch or replace the call)."""
    if watched(layer) or not all(map(is_own_hook, layer._forward_pre_hooks.values())):
        return "it has hooks"
    if "forward" in vars(layer):
        return "its forward has been replaced"
    return None


def is_strided(layer: nn.Module) -> bool:
    """Whether it is of the kind that has kernels: 4x4, stride 2, padding 1."""
    return (
        isinstance(layer, CONVOLUTIONS)
        and layer.kernel_size == (4, 4)
        and layer.stride == (2, 2)
        and layer.padding == (1, 1)
    )


def _is_dense(layer: nn.Module) -> bool:
    """Whether it is one product of matrices for maps of one size: a 1x1 map for a transposed
    convolution, a map of the kernel's size for another."""
    return (
        isinstance(layer, CONVOLUTIONS)
        and layer.kernel_size != (1, 1)
        and layer.padding == (0, 0)
        and layer.output_padding == (0, 0)
    )


def why_not_convolution(layer: nn.Module) -> str | None:
    """Why a convolution of a kind that is fused has to be called as a module."""
    assert isinstance(layer, CONVOLUTIONS)
    if type(layer) not in CONVOLUTIONS:
        return f"{type(layer).__name__} is a class of its own"
    if layer.padding_mode != "zeros":
        return f"its padding_mode is {layer.padding_mode}"
    if layer.dilation != (1, 1) or layer.groups != 1:
        return "it has groups or a dilation"
    return why_opaque(layer)


def _is_convolution(layer: nn.Module) -> bool:
    return (is_strided(layer) or _is_dense(layer)) and why_not_convolution(layer) is None


def _is_tanh(layer: nn.Module) -> bool:
    return type(layer) is nn.Tanh and why_opaque(layer) is None


def _taken_activations(layer: nn.Module) -> tuple[type[nn.Module], ...]:
    """Activations that the kernels of a convolution run as well: of images there are some."""
    if not isinstance(layer, CONVOLUTIONS) or not is_strided(layer):
        return ()
    if isinstance(layer, nn.Conv2d):
        return PIECEWISE_LINEAR if layer.in_channels <= DIRECT_CHANNELS else ()
    return (nn.Tanh,) if layer.out_channels <= DIRECT_CHANNELS else ()


def _is_upsampling(layer: nn.Module) -> bool:
    """Whether it is the nearest upsampling by 2 and nothing else."""
    return (
        type(layer) in (nn.Upsample, nn.UpsamplingNearest2d)
        and isinstance(layer, nn.Upsample)
        and layer.mode == "nearest"
        and layer.size is None
        and layer.scale_factor in (2, (2, 2))
        and not layer.recompute_scale_factor
        and why_opaque(layer) is None
    )


def _is_pool(layer: nn.Module) -> bool:
    """Whether it is the average over windows of 2x2 and nothing else."""
    return (
        type(layer) is nn.AvgPool2d
        and layer.kernel_size in (2, (2, 2))
        and layer.stride in (2, (2, 2))
        and layer.padding in (0, (0, 0))
        and not layer.ceil_mode
        and layer.divisor_override is None
        and why_opaque(layer) is None
    )


def _is_same_sized(layer: nn.Module) -> bool:
    """Whether it is a plain 3x3 convolution whose map keeps its size."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding == (1, 1)
        and why_not_convolution(layer) is None
    )


def _folded(layer: nn.Module, follower: nn.Module) -> str | None:
    """Which of ``FOLDED`` the two layers are, if any."""
    if _is_upsampling(layer) and _is_same_sized(follower):
        return FOLDED[0]
    return FOLDED[1] if _is_same_sized(layer) and _is_pool(follower) else None


# Index of a layer that is called, how it runs, and the layer that it takes along.
Run = tuple[int, str, nn.Module | None]


def fused_runs(layers: list[nn.Module]) -> Iterator[Run]:
    """Index of every layer that is called, whether it runs as an operation ("convolution",
    "norm", one of ``FOLDED``) or as a "module", and the activation, or the second layer of those
    folded, that it takes along."""
    i = 0
    while i < len(layers):
        if type(layers[i]) not in _HEADS:
            yield i, "module", None
            i += 1
            continue
        if i + 1 < len(layers) and (pair := _folded(layers[i], layers[i + 1])) is not None:
            yield i, pair, layers[i + 1]
            i += 2
            continue
        kind: str = "module"
        taken: Container[type[nn.Module]] = ()
        if type(layers[i]) in BATCH_NORMS and why_opaque(layers[i]) is None:
            kind, taken = "norm", ACTIVATIONS
        elif _is_convolution(layers[i]):
            kind, taken = "convolution", _taken_activations(layers[i])
        follower = layers[i + 1] if i + 1 < len(layers) else None
        if type(follower) not in taken or (follower and why_opaque(follower) is not None):
            follower = None
        yield i, kind, follower
        i += 1 if follower is None else 2


def _convolution_layer(
    layer: nn.Module, activation: nn.Module | None, x: Tensor, moments: Moments | None = None
) -> Tensor:
    """What ``activation(layer(x))`` computes, and the ``moments`` of that."""
    assert isinstance(layer, CONVOLUTIONS)
    if activation is not None and isinstance(layer, nn.ConvTranspose2d):
        activated = ACTIVATIONS[type(activation)]
        return up(x, layer.weight, layer.bias, layer.output_padding, activated)
    if activation is not None:
        return down(
            x,
            layer.weight,
            layer.bias,
            ACTIVATIONS[type(activation)],
            getattr(activation, "negative_slope", 0.0),
        )
    if isinstance(layer, nn.ConvTranspose2d):
        assert not isinstance(layer.padding, str)
        return conv_transpose2d(
            x,
            layer.weight,
            layer.bias,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.groups,
            layer.dilation,
            moments=moments,
        )
    return conv2d(
        *(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups),
        moments=moments,
    )


def _folded_layers(first: nn.Module, second: nn.Module | None, x: Tensor) -> Tensor:
    """What ``second(first(x))`` computes."""
    if isinstance(first, nn.Conv2d):
        return conv2d_avg_pool(x, first.weight, first.bias)
    assert isinstance(second, nn.Conv2d)
    return upsample_conv2d(x, second.weight, second.bias)


def _strided(
    layer: nn.Module, activation: nn.Module | None, moments: Moments | None
) -> Conv | None:
    """The convolution as an operation, where it is 4x4 of stride 2."""
    assert isinstance(layer, CONVOLUTIONS)
    if not is_strided(layer):
        return None
    activated = "none" if activation is None else ACTIVATIONS[type(activation)]
    if isinstance(layer, nn.ConvTranspose2d):
        given = (layer.weight, layer.bias, layer.output_padding)
        return Conv("up", *given, activated, moments=moments)
    return Conv(
        "down",
        layer.weight,
        layer.bias,
        activation=activated,
        negative_slope=getattr(activation, "negative_slope", 0.0),
        moments=moments,
    )


class _Statistics(NamedTuple):
    """Which statistics a batch norm takes at this call."""

    by_batch: bool
    tracked: bool
    groups: int
    apart: bool  # one group after the other: a cumulative average has another momentum for each


def _statistics(norm: nn.Module) -> _Statistics:
    assert isinstance(norm, BATCH_NORMS)
    by_batch = norm.training or norm.running_mean is None
    tracked = norm.training and norm.track_running_stats
    groups = current_groups() if by_batch else 1
    return _Statistics(by_batch, tracked, groups, norm.momentum is None and tracked and groups > 1)


def _moments_for(runs: list[Run], layers: list[nn.Module], at: int, x: Tensor) -> Moments | None:
    """What the convolution of run ``at`` on x's batch is to tell the batch norm behind it; None
    where there is none, or it does not ask."""
    _, _, activation = runs[at]
    if activation is not None or at + 1 == len(runs) or runs[at + 1][1] != "norm":
        return None
    by_batch, _, groups, apart = _statistics(layers[runs[at + 1][0]])
    return Moments(groups) if by_batch and not apart and x.shape[0] % groups == 0 else None


def _norm_act_layers(
    norm: nn.Module,
    activation: nn.Module | None,
    x: Tensor,
    conv: Conv | None = None,
    given: Moments | None = None,
) -> Tensor:
    """What ``activation(norm(x))`` computes, ``num_batches_tracked`` and all, and behind it
    ``conv``; ``given`` are x's."""
    assert isinstance(norm, BATCH_NORMS)
    norm._check_input_dim(x)
    statistics = _statistics(norm)
    if statistics.apart:
        alone = statistics._replace(groups=1)
        conv = None if conv is None else conv._replace(moments=None)
        parts = x.chunk(statistics.groups)
        return torch.cat([_one_group(norm, activation, part, alone, conv) for part in parts])
    return _one_group(norm, activation, x, statistics, conv, given)


def _one_group(
    norm: nn.Module,
    activation: nn.Module | None,
    x: Tensor,
    statistics: _Statistics,
    conv: Conv | None,
    given: Moments | None = None,
) -> Tensor:
    assert isinstance(norm, BATCH_NORMS)
    by_batch, tracked, groups, _ = statistics
    momentum = norm.momentum
    if tracked and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(groups)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    follows = tracked or not by_batch
    running = (norm.running_mean, norm.running_var) if follows else (None, None)
    settings = Settings(
        by_batch,
        0.0 if momentum is None else momentum,
        norm.eps,
        "none" if activation is None else ACTIVATIONS[type(activation)],
        getattr(activation, "negative_slope", 0.0),
        groups,
    )
    if conv is not None:
        return norm_conv(x, *running, norm.weight, norm.bias, settings, conv, given)
    return norm_act(x, *running, norm.weight, norm.bias, **settings._asdict(), given=given)


# What does the same to a map in any layout.
_LAYOUT_FREE = frozenset(
    (
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.Identity,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
        nn.PixelShuffle,
        nn.ReLU,
        nn.LeakyReLU,
        nn.PReLU,
        nn.ELU,
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Sigmoid,
        nn.AvgPool2d,
        nn.MaxPool2d,
        nn.Dropout2d,
        nn.ZeroPad2d,
        nn.ReflectionPad2d,
        nn.ReplicationPad2d,
    )
)


class FusedSequential(nn.Sequential):
    """A ``nn.Sequential`` that runs each batch norm with the activation behind it, and with a
    strided convolution behind both, and convolutions that pygan has a faster form of by that,
    those of images with theirs. Contiguous maps go through it in channels_last where it convolves
    them.

    Hooks are looked for at every call, so one that is added later is honoured. While something
    traces or compiles the module it is a plain ``nn.Sequential``. It may become one while it runs:
    another thread's call of the module around it may leave it to torch (:mod:`pygan.resting`).
    """

    def forward(self, input: Tensor) -> Tensor:
        traced = (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
        )
        known = type(input) is Tensor or isinstance(input, Observed)
        if traced or not known or globally_hooked():
            return nn.Sequential.forward(self, input)
        layers = list(self._modules.values())
        readers: Readers | None = vars(self).get("_readers")
        if readers is None:
            readers = self._readers = Readers()
        key = _key(input, layers)
        readers.passed = key in readers.left
        if readers.passed:
            return nn.Sequential.forward(self, input)
        runs = list(fused_runs(layers))
        taken = False
        shown = _shown(input, layers)
        pending = iter(enumerate(runs))
        told: Moments | None = None  # what the convolution before told of its output
        for at, (i, kind, activation) in pending:
            given, told = told, None
            if kind == "module":
                before = runs[at - 1][1:] if at else None
                input = _called(self, i, layers[i], input, shown, before == ("convolution", None))
                if isinstance(input, Observed):
                    shown = input.format
                elif shown is not None and type(layers[i]) not in _LAYOUT_FREE:
                    shown = format_of(input) or shown
                continue
            conv = None
            if kind == "norm" and at + 1 < len(runs) and runs[at + 1][1] == "convolution":
                told = _moments_for(runs, layers, at + 1, input)
                conv = _strided(layers[runs[at + 1][0]], runs[at + 1][2], told)
            if _is_torchs(layers[i], activation, kind, input, conv):
                for layer in (layers[i], activation):
                    if layer is not None:
                        own = layer is activation and kind == "convolution"
                        input = _called(self, i, layer, input, shown, own)
                told = None
                continue
            taken = True
            if kind == "norm":
                # A norm alone is as fast in any layout.
                input = _opened(input, None if conv is None else shown)
                input = _norm_act_layers(layers[i], activation, input, conv, given)
                if conv is None:
                    told = None
                else:
                    shown = _shown_behind(shown, layers[runs[at + 1][0]])
                    next(pending)
            elif kind == "convolution":
                told = _moments_for(runs, layers, at, input)
                input = _convolution_layer(layers[i], activation, _opened(input, shown), told)
                shown = _shown_behind(shown, layers[i])
            else:
                input = _folded_layers(layers[i], activation, _opened(input, shown))
                convolution = activation if kind == FOLDED[0] else layers[i]
                assert convolution is not None
                shown = _shown_behind(shown, convolution)
        if not taken and len(readers.left) < MOST_LEFT and not any(map(why_opaque, layers)):
            readers.left.add(key)
        return _shown_to(self, "output", input, shown)


def _called(
    container: nn.Module,
    i: int,
    layer: nn.Module,
    input: Tensor,
    shown: torch.memory_format | None,
    own: bool,
) -> Tensor:
    """A layer that is called as a module; ``own`` tells that nobody else reads its input."""
    if _is_tanh(layer) and own and type(input) is Tensor:
        # What a convolution puts out is nobody else's, and no gradient needs it.
        return torch.tanh_(input)
    if type(layer) not in _LAYOUT_FREE or layer._forward_hooks or layer._forward_pre_hooks:
        input = _shown_to(container, i, input, shown)
    output: Tensor = layer(input)
    return output


def _shown_to(
    container: nn.Module, reader: Any, x: Tensor, shown: torch.memory_format | None
) -> Tensor:
    """The map as others may see it."""
    if shown is None or type(x) is not Tensor or x.dim() != 4:
        return x
    if shown is torch.contiguous_format and x.is_contiguous() and not is_last(x):
        return x
    readers: Readers = vars(container)["_readers"]
    return hand_on(Map(x), x.shape, shown, readers.of(reader))


# A network prints as it did; pickles go by the qualified name.
FusedSequential.__name__ = nn.Sequential.__name__


def _shown(input: Tensor, layers: list[nn.Module]) -> torch.memory_format | None:
    """The layout to show of maps that go through the layers in channels_last, or None where they
    go through as they come."""
    if isinstance(input, Observed):
        return input.format
    if not may_enter(input) or input.dim() != 4 or not input.is_contiguous() or gpu.holds(input):
        return None
    convolutions = [layer for layer in layers if isinstance(layer, CONVOLUTIONS)]
    # Only parameters: to ask for a weight that is computed may change it.
    weights = [layer._parameters.get("weight") for layer in convolutions]
    if not convolutions or any(w is not None and w.dim() == 4 and is_last(w) for w in weights):
        return None
    return torch.contiguous_format


def _shown_behind(
    shown: torch.memory_format | None, convolution: nn.Module
) -> torch.memory_format | None:
    """The layout to show of what a convolution puts out: one with its weight's channels last leads
    into that."""
    weight = convolution._parameters.get("weight")
    last = shown is not None and weight is not None and weight.dim() == 4 and is_last(weight)
    return torch.channels_last if last else shown


def modes() -> tuple[Any, ...]:
    """What decides, beside the inputs of a call, how its layers run.

    Every call asks, and behind a convolution each function takes some ten times as long as in a
    loop of its own: the name of a device, by which torch tells of its autocast, took 25 of a call's
    3,000 microseconds."""
    return dispatch.encoded_wish(), grouping.groups, torch._C._is_any_autocast_enabled()


def _key(input: Tensor, layers: list[nn.Module]) -> Any:
    """What decides whether all layers are left to torch, beside what the user may change in one."""
    kind = (input.shape, input.dtype, input.device, input.is_contiguous())
    return (*modes(), *kind, *map(id, layers))


def _is_torchs(
    layer: nn.Module, follower: nn.Module | None, kind: str, input: Tensor, conv: Conv | None
) -> bool:
    """Whether layers that could run as one operation are left to torch: they take too little time
    to gain by that, or it is not the map of one size that makes a convolution a product."""
    if kind == "convolution" and not is_strided(layer):
        assert isinstance(layer, CONVOLUTIONS)
        height, width = (1, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.kernel_size
        if input.dim() != 4 or input.shape[2:] != (height, width):
            return True
    if dispatch.wished() != "auto" or current_groups() > 1:
        return False
    if kind == "norm":
        if conv is not None:
            return is_little(input)  # the map that is not written is the gain
        return is_little_norm(input, alone=follower is None)
    convolution = follower if kind == FOLDED[0] else layer
    assert convolution is not None
    weight = convolution._parameters.get("weight")
    # A product of matrices is as quick to reach as torch's convolution.
    return weight is not None and not _is_dense(convolution) and is_little(input, weight)


def _opened(x: Tensor, shown: torch.memory_format | None) -> Tensor:
    if isinstance(x, Observed):
        x = x.value()
    return x if shown is None or x.dim() != 4 else in_last(x)
