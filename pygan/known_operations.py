"""What torch's functions do with :mod:`pygan.pending` tensors: the operations of GANs by pygan's
kernels, or by torch's on a map in channels_last, and never another result than without.

A handler answers NotImplemented where the function is to run on plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.ops import dispatch, gpu, native, norm_act, strided_conv
from pygan.ops.folded_conv import upsample_conv2d
from pygan.ops.layout import is_last
from pygan.ops.norm_act import Settings
from pygan.ops.norm_conv import Conv
from pygan.ops.strided_conv import pair
from pygan.pending import (
    HANDLERS,
    Convolved,
    Map,
    Normed,
    NormedAtOnce,
    Observed,
    Pending,
    Readers,
    Upsampled,
    hand_on,
    in_last,
    is_little_norm,
    plain,
    saving_is_watched,
)


def _made(
    first: Observed,
    func: Any,
    value: Tensor,
    like: Tensor | None = None,
    may_fold: bool = False,
) -> Tensor:
    """A map that ``func`` made of ``first``, and of a weight ``like`` whose layout counts."""
    format = first.format
    if like is not None and value.dim() == 4 and is_last(like):
        format = torch.channels_last
    readers = first.readers.of(func)
    return hand_on(Map(value), value.shape, format, readers, may_fold=may_fold)


def _with_running_statistics(training: bool, mean: Tensor | None, var: Tensor | None) -> bool:
    return (mean is None) == (var is None) and (training or mean is not None)


def _batch_norm(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    def bound(
        input: Any,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if input is not first or not _with_running_statistics(training, running_mean, running_var):
            return NotImplemented
        settings = Settings(training, momentum, eps, "none", 0.0, 1)
        running = (running_mean, running_var)
        return _normed(first, func, running, weight, bias, settings, args, kwargs)

    return bound(*args, **kwargs)


def _instance_norm(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    def bound(
        input: Any,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        running = (running_mean, running_var)
        one_value = first.dim() < 3 or first.shape[2:].numel() < 2
        if input is not first or not _with_running_statistics(use_input_stats, *running):
            return NotImplemented
        averaged = use_input_stats and running_mean is not None
        if one_value or (averaged and not gpu.holds(first)):
            return NotImplemented
        groups = first.shape[0] if use_input_stats else 1
        settings = Settings(use_input_stats, momentum, eps, "none", 0.0, groups, averaged)
        # torch puts out contiguous maps whatever the layout of its input.
        rest = (settings, args, kwargs, torch.contiguous_format)
        return _normed(first, func, running, weight, bias, *rest)

    return bound(*args, **kwargs)


def _normed(
    first: Observed,
    func: Any,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    format: torch.memory_format | None = None,
) -> Tensor:
    x, behind = first.value(), first.readers.of(func)
    if x.numel() == 0 or not norm_act.has_kernel(x, *running, weight, bias):
        return NotImplemented
    if is_left(x, behind):
        # What torch puts out of an instance norm is contiguous, as plain tensors are.
        return NotImplemented if format is not None else _on_map(first, func, args, kwargs)
    settings = norm_act.checked_settings(x, *running, settings)
    source: Normed | NormedAtOnce
    if gpu.holds(x):
        source = NormedAtOnce(x, running, weight, bias, settings, behind)
        first.lent |= source.reads_again
    else:
        source = Normed(x, running, weight, bias, settings)
        first.lent = True
    return hand_on(source, x.shape, format or first.format, behind)


def is_left(x: Tensor, behind: Readers) -> bool:
    """Whether a norm of x whose output has these readers is left to torch."""
    if not (behind.asked or behind.known):
        return is_little_norm(x, convolved=True)  # what follows is yet to be seen
    activated = [found for operation, found in behind.after.items() if operation in ACTIVATIONS]
    if any(operation in _CONVOLVED for found in (behind, *activated) for operation in found.after):
        return is_little_norm(x, convolved=True)
    return is_little_norm(x, alone=not (activated or behind.activated), called=True)


def _activation(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    name, _ = ACTIVATIONS[func]
    slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
    in_place = works_in_place(func, args, kwargs)
    if not args or args[0] is not first or not isinstance(slope, int | float):
        return NotImplemented
    source = first.fresh()
    first.readers.activated |= in_place
    slope = float(slope) if name == "leaky_relu" else 0.0
    activated: Normed | Map | None = None
    if isinstance(source, Normed) and source.settings.activation == "none":
        activated = source.activated(name, slope)
    elif isinstance(source, NormedAtOnce) and (made := source.activated(name, slope)) is not None:
        activated = Map(made)
    if activated is not None:
        if not in_place:
            return hand_on(activated, first.shape, first.format, first.readers.of(func))
        if type(first) is Pending:
            first.become(activated)
            return first
        return NotImplemented
    return _in_place(first, func, args, kwargs) if in_place else _on_map(first, func, args, kwargs)


def works_in_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call changes its first argument, for all activations."""
    _, in_place = ACTIVATIONS.get(func, ("", False))
    at = _TAKES_INPLACE.get(func, len(args))
    return in_place or bool(kwargs.get("inplace", False)) or (at < len(args) and bool(args[at]))


def _in_place(first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if type(first) is not Pending or first.shown is not None or args[0] is not first:
        first.readers.known = True
        return NotImplemented
    value = first.value()
    if first.lent or not isinstance(first.source, Map):
        value = value.clone()
    others = [_in_layout_of(value, other) for other in args[1:]]
    func(value, *others, **kwargs)
    first.become(Map(value))
    return first


def _in_layout_of(map: Tensor, other: Any) -> Any:
    """An operand of ``map``, in its layout where that is quicker to read."""
    if isinstance(other, Observed):
        other = other.value()
    if isinstance(other, Tensor) and other.shape == map.shape and other.stride() != map.stride():
        return in_last(other)
    return other


def _on_map(first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An operation whose result does not depend on the layout, on maps as they are."""
    if first.dim() != 4 or "out" in kwargs:
        return NotImplemented
    map = first.value()

    def taken(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(taken(v) for v in value)
        if isinstance(value, Tensor):
            return _in_layout_of(map, map if value is first else value)
        return value

    result = func(*taken(args), **{name: taken(value) for name, value in kwargs.items()})
    if not isinstance(result, Tensor) or result.dim() != 4:
        return plain(result)
    return _made(first, func, result, may_fold=True)


def _dropout2d(first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # Its random numbers are one for each sample and channel, in the same order in any layout.
    in_place = kwargs.get("inplace", len(args) > 3 and args[3])
    return NotImplemented if in_place else _on_map(first, func, args, kwargs)


def _interpolate(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    if gpu.holds(first):
        return _on_map(first, func, args, kwargs)
    given = dict(zip(("input", "size", "scale_factor", "mode"), args, strict=False)) | kwargs
    doubled = given.pop("scale_factor", None) in (2, (2, 2), [2, 2])
    doubled &= given.pop("mode", "nearest") == "nearest" and given.pop("input", None) is first
    if doubled and first.dim() == 4 and not any(given.values()):
        first.lent = True
        return _doubled(first, func, in_last(first.value()))
    return _on_map(first, func, args, kwargs)


def _doubled(first: Observed, func: Any, x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    shape = torch.Size((n, c, 2 * height, 2 * width))
    return hand_on(Upsampled(x), shape, first.format, first.readers.of(func))


def _avg_pool2d(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    names = ("input", "kernel_size", "stride", "padding")
    given = dict(zip(names, args, strict=False)) | kwargs
    is_first, taps = given.pop("input", None) is first, given.pop("kernel_size", None)
    halved = taps in (2, (2, 2)) and given.pop("stride", None) in (None, 2, (2, 2))
    given.pop("count_include_pad", None)
    source = first.fresh()
    if is_first and halved and isinstance(source, Convolved) and given.pop("padding", 0) == 0:
        y = None if any(given.values()) else source.pooled()
        if y is not None:
            return _made(first, func, y)
    return _on_map(first, func, args, kwargs)


def may_be_pooled(readers: Readers) -> bool:
    """Whether an average pooling was the only reader of what the first call put out, or no call
    has shown yet what is."""
    return _is_pooled(readers) or not (readers.asked or readers.known)


def _is_pooled(readers: Readers) -> bool:
    return set(readers.after) == {F.avg_pool2d} and not readers.others


def _as_it_is(first: Observed, transposed: bool, weight: Tensor, sweep: tuple[Any, ...]) -> bool:
    """Whether a convolution is torch's, of a map that is contiguous as it is shown: nothing is
    gained by looking at it. In channels_last its second derivatives are pygan's."""
    source = first.source
    if not isinstance(source, Map) or first.format is not torch.contiguous_format:
        return False
    x = source.value()
    if not x.is_contiguous() or is_last(x) or is_last(weight):
        return False
    return not strided_conv.has_kernel(transposed, x.shape, weight.shape, sweep)


def _conv2d(first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    def bound(
        input: Any,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if input is not first or type(weight) not in (Tensor, torch.nn.Parameter):
            return NotImplemented
        if first.dim() != 4 or isinstance(padding, str) or weight.dim() != 4:
            return NotImplemented
        geometry = (tuple(weight.shape[2:]), *map(pair, (stride, padding, dilation)), groups)
        folds = not gpu.holds(first)
        pooled = geometry == SAME_SIZED and folds and may_be_pooled(first.readers.of(func))
        if not pooled and _as_it_is(first, False, weight, geometry[1:]):
            return NotImplemented
        source = first.fresh()
        y = None
        if geometry == STRIDED and isinstance(source, Normed):
            y = source.convolved(Conv("down", weight, bias))
        elif geometry == SAME_SIZED and isinstance(source, Upsampled):
            y = upsample_conv2d(source.small(), weight, bias)
        elif geometry == POINTWISE and isinstance(source, Upsampled):
            # The same values four times: computed once.
            return _doubled(first, func, F.conv2d(source.small(), weight, bias))
        elif geometry == SAME_SIZED and folds and _is_pooled(first.readers.of(func)):
            first.lent = True
            shape = torch.Size((first.shape[0], weight.shape[0], *first.shape[2:]))
            later = Convolved(in_last(first.value()), weight, bias)
            return hand_on(later, shape, first.format, first.readers.of(func))
        if y is None:
            x = first.value()
            if pooled or strided_conv.has_kernel(False, x.shape, weight.shape, geometry[1:]):
                x = in_last(x)
            y = strided_conv.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return _made(first, func, y, weight)

    return bound(*args, **kwargs)


def _conv_transpose2d(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    def bound(
        input: Any,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if input is not first or type(weight) not in (Tensor, torch.nn.Parameter):
            return NotImplemented
        if first.dim() != 4 or weight.dim() != 4:
            return NotImplemented
        geometry = (tuple(weight.shape[2:]), *map(pair, (stride, padding, dilation)), groups)
        if _as_it_is(first, True, weight, geometry[1:]):
            return NotImplemented
        source = first.fresh()
        y = None
        if geometry == STRIDED and isinstance(source, Normed):
            y = source.convolved(Conv("up", weight, bias, pair(output_padding)))
        if y is None:
            x = first.value()
            if strided_conv.has_kernel(True, x.shape, weight.shape, geometry[1:]):
                x = in_last(x)
            y = strided_conv.conv_transpose2d(
                x, weight, bias, stride, padding, output_padding, groups, dilation
            )
        return _made(first, func, y, weight)

    return bound(*args, **kwargs)


def conv_activation_taken(
    first: Observed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The handler of :func:`pygan.compile.conv_activation`."""
    x, weight, bias, activation, slope = args
    if x is not first or type(weight) not in (Tensor, torch.nn.Parameter):
        return NotImplemented
    source = first.fresh()
    y = None
    if isinstance(source, Normed):
        conv = Conv("down", weight, bias, activation=activation, negative_slope=slope)
        y = source.convolved(conv)
    if y is None:
        y = strided_conv.down(in_last(first.value()), weight, bias, activation, slope)
    return _made(first, func, y, weight)


STRIDED = ((4, 4), (2, 2), (1, 1), (1, 1), 1)
SAME_SIZED = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1), 1)

# name, and whether it works in place
ACTIVATIONS: dict[Any, tuple[str, bool]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), ("relu", False)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), ("relu", True)),
    F.leaky_relu: ("leaky_relu", False),
    torch._C._nn.leaky_relu_: ("leaky_relu", True),
    **dict.fromkeys((torch.tanh, Tensor.tanh), ("tanh", False)),
    **dict.fromkeys((torch.tanh_, Tensor.tanh_), ("tanh", True)),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), ("sigmoid", False)),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), ("sigmoid", True)),
}
_CONVOLVED = (F.conv2d, F.conv_transpose2d)
_TAKES_INPLACE = {F.relu: 1, F.leaky_relu: 2}

_ON_MAPS = (
    *(F.elu, F.prelu, torch.prelu, Tensor.prelu, F.gelu, F.silu, F.softplus),
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub),
    *(Tensor.__sub__, Tensor.__rsub__, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    *(torch.div, Tensor.div, Tensor.__truediv__, torch.neg, Tensor.neg, Tensor.__neg__),
    *(torch.cat, torch.concat, F.pad, torch._C._nn.pad, F.pixel_shuffle, F.max_pool2d),
)
_IN_PLACE = (Tensor.add_, Tensor.__iadd__, Tensor.mul_, Tensor.__imul__, Tensor.sub_)

HANDLERS |= {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
HANDLERS |= dict.fromkeys(ACTIVATIONS, _activation)
HANDLERS |= {F.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d}
HANDLERS |= {F.interpolate: _interpolate, F.avg_pool2d: _avg_pool2d, F.dropout2d: _dropout2d}
HANDLERS |= dict.fromkeys(_ON_MAPS, _on_map)
HANDLERS |= dict.fromkeys(_IN_PLACE, _in_place)


def may_enter(x: Any) -> bool:
    """Whether operations on a plain tensor may be taken over."""
    return (
        type(x) is Tensor
        and x.dtype in (gpu.DTYPES if gpu.holds(x) else native.DTYPES if x.is_cpu else ())
        and dispatch.wished() == "auto"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not saving_is_watched()
    )
