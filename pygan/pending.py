"""Tensors whose values are made when somebody reads them.

Layers of other people's code hand maps on one by one, in the layout the script chose. Inside a
fused module they hand on a :class:`Pending` tensor instead: to everybody a tensor of the right
shape, type, layout and gradient, which remembers how its values come about. Where the next reader
is an operation that pygan knows, both run as one, or on the map in channels_last; any other reader
gets the values, made at that moment. So nothing has to be known about a network's code beforehand:
whatever it does with a map is right, and what it does usually is fast.

A tensor without values has no memory that foreign code could look at. So a layer hands one on only
after its first call has shown a reader that can do with that (:class:`Readers`); the first time it
hands on an :class:`Observed` tensor, which holds its values and sees who reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pygan.ops import few_positions, gpu, norm_act, norm_conv
from pygan.ops.folded_conv import conv2d_avg_pool
from pygan.ops.layout import is_last, reordered
from pygan.ops.norm_act import Settings
from pygan.ops.wanted import wanted_gradients

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# Below these a kernel gains less than it takes to get there: elements of a map, and multiply-adds
# of a convolution.
LEAST_ELEMENTS = 1 << 16
LEAST_MACS = 1 << 23
# The same of a norm, with a convolution behind it, and with an activation alone, of a contiguous
# float32 map.
LEAST_CONVOLVED = 1 << 17
LEAST_NORMED = 3 << 17
TRIES = 4  # calls, each of which may show one reader more
MOST_LEFT = 64  # inputs of which a layer remembers that they are left to torch


def is_little(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether an operation on x, which is a convolution where there is a weight, is left to torch
    for the little time that it takes; on a GPU a launch that is saved counts."""
    if gpu.holds(x):
        return False
    if weight is None:
        return x.numel() < LEAST_ELEMENTS
    # Every weight once per position: of the output, which is smaller where a stride is.
    macs = x.shape[0] * x.shape[2:].numel() * weight.numel()
    return macs < LEAST_MACS and weight.numel() < few_positions.LEAST_WEIGHT


def is_little_norm(
    x: Tensor, *, alone: bool = False, called: bool = False, convolved: bool = False
) -> bool:
    """Whether a norm of x is left to torch, which takes less of the time of other maps than of
    contiguous float32 ones.

    Args:
        x: what it normalizes.
        alone: it has no activation behind it, which is a reading and a writing less to gain.
        called: it is a layer called by itself, so that handing on what it puts out costs as well.
        convolved: a convolution is behind it, or may be: not to write the map is to gain most.
    """
    if gpu.holds(x):
        return False
    if convolved:
        return x.numel() < LEAST_CONVOLVED
    quick = x.dtype is torch.bfloat16 or x.dim() == 2 or not x.is_contiguous()
    return x.numel() < LEAST_NORMED << (2 * quick + alone + called)


class Readers:
    """What reads the output of one place in a network, as its first call shows."""

    __slots__ = (
        *("activated", "activation", "after", "asked", "known"),
        *("left", "looks", "others", "passed", "varies"),
    )

    def __init__(self) -> None:
        self.asked = False
        # With its slope; what varies from call to call is not foreseen.
        self.activation: tuple[str, float] | None = None
        self.varies = False
        self.known = False  # an operation that takes a pending tensor
        self.others = False  # one that needs the values
        self.after: dict[Any, Readers] = {}
        self.activated = False  # by an activation in place, which makes no other output
        self.looks = 0  # calls that were to show what reads it
        # Inputs that turned out to be left to torch, as a layer tells them apart.
        self.left: set[Any] = set()
        self.passed = False  # whether its last call was with one of them

    def of(self, operation: Any) -> Readers:
        """Those of what ``operation`` makes of that output."""
        return self.after.setdefault(operation, Readers())

    def foreseen(self) -> tuple[str, float]:
        """The activation that will read the output, as far as can be told."""
        return ("none", 0.0) if self.varies or self.activation is None else self.activation

    def lead_to_fold(self) -> bool:
        """Whether an upsampling with a convolution behind it, or a convolution with a pooling
        behind it, reads this or what is made of it."""
        function = torch.nn.functional
        behind = {function.interpolate: function.conv2d, function.conv2d: function.avg_pool2d}
        return any(
            behind.get(operation) in found.after or found.lead_to_fold()
            for operation, found in self.after.items()
        )

    def __reduce__(self) -> tuple[type[Readers], tuple[()]]:
        return Readers, ()  # a copy sees for itself


class Map:
    """Values that exist, in a layout that may not be the one shown."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def value(self) -> Tensor:
        return self._value

    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors that the values follow from, for their gradients."""
        return (self._value,)


class Normed:
    """``activation(batch_norm(x))`` of statistics that are taken already."""

    def __init__(
        self,
        x: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        weight: Tensor | None,
        bias: Tensor | None,
        settings: Settings,
        given: Tensor | None = None,
    ) -> None:
        self._arguments = (x, *running, weight, bias)
        self._versions = _versions(self._arguments)
        self.settings = settings
        self._given = given
        self._made: Tensor | None = None
        if settings.training and given is None:
            self._given = norm_act.statistics(x, *running, settings)
            self._versions = _versions(self._arguments)

    def inputs(self) -> tuple[Tensor, ...]:
        x, _, _, weight, bias = self._arguments
        return tuple(t for t in (x, weight, bias) if t is not None)

    def activated(self, activation: str, negative_slope: float) -> Normed:
        """With an activation behind it."""
        x, mean, var, weight, bias = self._arguments
        settings = self.settings._replace(activation=activation, negative_slope=negative_slope)
        return Normed(x, (mean, var), weight, bias, settings, self._given)

    def convolved(self, conv: norm_conv.Conv) -> Tensor | None:
        """With a strided convolution behind it; None where the values are there already."""
        if self._made is not None:
            return None
        _check(self, "batch norm")
        return norm_conv.norm_conv(*self._arguments, self.settings, conv, self._given)

    def value(self) -> Tensor:
        if self._made is None:
            _check(self, "batch norm")
            self._made = norm_act.norm_act(
                *self._arguments, **self.settings._asdict(), given=self._given
            )
        return self._made


class NormedAtOnce:
    """``activation(batch_norm(x))`` on a GPU: made when the batch norm is called, in one launch
    with the activation that followed in the call before. Where something else follows now, the
    batch norm alone is made once more, with no effect on the running statistics."""

    def __init__(
        self,
        x: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        weight: Tensor | None,
        bias: Tensor | None,
        settings: Settings,
        readers: Readers,
    ) -> None:
        self._activation, slope = self._foreseen = readers.foreseen()
        self._settings, self._readers = settings, readers
        self._graph = torch.is_grad_enabled()
        arguments = (x, *running, weight, bias)
        made = settings._replace(activation=self._activation, negative_slope=slope)
        self._made = norm_act.norm_act(*arguments, **made._asdict())
        if settings.training:
            arguments = (x, None, None, weight, bias)
        self._arguments = arguments
        self._versions = _versions(arguments)

    @property
    def reads_again(self) -> bool:
        """Whether x may be read once more."""
        return self._activation != "none"

    def inputs(self) -> tuple[Tensor, ...]:
        x, _, _, weight, bias = self._arguments
        return tuple(t for t in (x, weight, bias) if t is not None)

    def activated(self, activation: str, negative_slope: float) -> Tensor | None:
        """With an activation behind it, None where it was not made with that one."""
        seen = (activation, negative_slope)
        if self._readers.activation not in (None, seen):
            self._readers.varies = True
        self._readers.activation = seen
        as_now = self._graph == torch.is_grad_enabled()
        return self._made if seen == self._foreseen and as_now else None

    def value(self) -> Tensor:
        if self._activation != "none":
            _check(self, "batch norm")
            self._readers.varies = True
            with torch.set_grad_enabled(self._graph):
                self._made = norm_act.norm_act(*self._arguments, **self._settings._asdict())
            self._activation, self._foreseen = "none", ("none", 0.0)
        return self._made


class Upsampled:
    """The nearest upsampling by 2 of a map."""

    def __init__(self, x: Tensor) -> None:
        self._arguments = (x,)
        self._versions = _versions(self._arguments)
        self._made: Tensor | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        return self._arguments

    def small(self) -> Tensor:
        """The map before it."""
        _check(self, "upsampling")
        return self._arguments[0]

    def value(self) -> Tensor:
        if self._made is None:
            self._made = torch.nn.functional.interpolate(self.small(), scale_factor=2.0)
        return self._made


class Convolved:
    """A 3x3 convolution whose map keeps its size."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._arguments = (x, weight, bias)
        self._versions = _versions(self._arguments)
        self._made: Tensor | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self._arguments if t is not None)

    def pooled(self) -> Tensor | None:
        """With an average pooling by 2 behind it; None where the values are there already."""
        if self._made is not None:
            return None
        _check(self, "convolution")
        return conv2d_avg_pool(*self._arguments)

    def value(self) -> Tensor:
        if self._made is None:
            _check(self, "convolution")
            self._made = torch.nn.functional.conv2d(*self._arguments, padding=1)
        return self._made


Source = Map | Normed | NormedAtOnce | Upsampled | Convolved


def _check(source: Normed | NormedAtOnce | Upsampled | Convolved, what: str) -> None:
    if _versions(source._arguments) != source._versions:
        raise RuntimeError(
            f"what a fused {what} reads was changed in place before its output was read; "
            "read it earlier, or call pygan.unfuse(module)"
        )


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None or t.is_inference() else t._version for t in tensors]


# What torch functions do with such tensors: handler(first, function, args, kwargs), where the
# first tensor among the arguments that is Observed decides; filled by pygan.known_operations.
Handler = Callable[["Observed", Any, tuple[Any, ...], dict[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {}

# Questions that the tensor answers without its values.
_PROPERTIES = ("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "layout", "requires_grad")
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__),
    *(Tensor.__hash__, Tensor.get_device, Tensor.element_size),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}


class Observed(Tensor):
    """A tensor with its values, and with who read it."""

    source: Source
    readers: Readers
    format: torch.memory_format
    shown: Tensor | None  # the values in the layout shown
    lent: bool  # whether another source still has to read the values as they are now
    promised: list[Source]  # what a gradient that comes by autograd's own means goes through
    _modes: tuple[bool, bool]  # grad and autocast, in which the source was made

    def read(self) -> Tensor:
        """The values as a plain tensor in the layout shown, always the same one."""
        self.readers.others = True
        if self.shown is None:
            graph, autocast = self._modes
            kind = self.device.type
            with torch.set_grad_enabled(graph), torch.autocast(kind, enabled=autocast):
                self.shown = reordered(self.source.value(), self.format)
        return self.shown

    def become(self, source: Source) -> None:
        """Takes other values, as an operation in place gives them."""
        self.source, self.shown, self.lent = source, None, False
        self.promised[0] = source

    def value(self) -> Tensor:
        """The values in any layout, for an operation that is known."""
        self.readers.known = True
        return self.source.value() if self.shown is None else self.shown

    def fresh(self) -> Source | None:
        """The source, where nobody has read the values yet."""
        self.readers.known = True
        return self.source if self.shown is None else None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None and not saving_is_watched():
            first = args[0] if args and isinstance(args[0], Observed) else _first(args, kwargs)
            result = handler(first, func, args, kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*plain(args), **plain(kwargs))
        # What changes a tensor in place gives that tensor back.
        given = args[0] if args else None
        name = getattr(func, "__name__", "")
        in_place = result is not None and (name.rstrip("_") != name or kwargs.get("inplace"))
        if in_place and isinstance(given, Observed) and isinstance(result, Tensor):
            if result is not given.shown:
                return result
            given.become(Map(result))
            given.shown = result
            return given
        return result


class Pending(Observed):
    """A tensor whose values are yet to be made."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Only what does not ask __torch_function__ gets here, below autograd: the body of an
        # autograd.Function, say, whose gradient arrives in _Promise.
        return func(*_detached(args), **_detached(kwargs or {}))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observed:
    for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Observed):
            return leaf
    raise AssertionError("called without such a tensor")


def plain(values: Any) -> Any:
    """The same with plain tensors, which hold their values, in nested tuples, lists and dicts."""
    if isinstance(values, Observed):
        return values.read()
    if type(values) in (tuple, list):
        return type(values)(plain(value) for value in values)
    if type(values) is dict:
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, (tuple, list, dict)):
        return torch.utils._pytree.tree_map_only(Observed, Observed.read, values)
    return values


def _detached(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Observed, lambda t: t.read().detach(), values)


def _strides(shape: torch.Size, last: bool) -> list[int]:
    order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= max(shape[dimension], 1)
    return strides


class _Promise(torch.autograd.Function):
    """Ties a pending tensor to what it follows from, for readers that ask for its gradient only
    by autograd's own means."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        tensor = _without_values(*made)
        ctx.promised = tensor.promised
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graph, inputs = torch.is_grad_enabled(), ctx.saved_tensors
        with torch.enable_grad():
            value = ctx.promised[0].value()
        wants = wanted_gradients(ctx)[1:]
        asked = [t for t, wants_it in zip(inputs, wants, strict=True) if wants_it]
        found = iter(
            torch.autograd.grad(
                value, asked, grads[0], retain_graph=True, create_graph=graph, allow_unused=True
            )
        )
        return (None, *(next(found) if wants_it else None for wants_it in wants))


def _without_values(source: Source, shape: torch.Size, like: Tensor, last: bool) -> Pending:
    tensor = Tensor._make_wrapper_subclass(
        Pending, shape, strides=_strides(shape, last), dtype=like.dtype, device=like.device
    )
    tensor.source, tensor.promised, tensor.shown, tensor.lent = source, [source], None, False
    return tensor


def saving_is_watched() -> bool:
    """Whether somebody counts the tensors that are saved for a backward, as checkpoints do: they
    have to be the same in every call, so nothing may depend on what readers did before."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None


def hand_on(
    source: Source,
    shape: torch.Size,
    format: torch.memory_format,
    readers: Readers,
    *,
    may_fold: bool = False,
) -> Tensor:
    """What a layer gives to whoever called it: pending where a known operation is the reader.
    Values in the layout shown are handed on as they are, but for those that ``may_fold``: to be
    seen by what a convolution is folded with."""
    like, *_ = source.inputs()
    little = shape.numel() < LEAST_ELEMENTS and not gpu.holds(like)
    if saving_is_watched() or little:
        return reordered(source.value(), format)
    there = isinstance(source, Map) and source.value().is_contiguous(memory_format=format)
    may_fold &= not gpu.holds(like)
    if there and (not may_fold or (readers.asked and not readers.lead_to_fold())):
        return reordered(source.value(), format)
    graph = torch.is_grad_enabled()
    tensor: Any
    if readers.known:
        made = (source, shape, like, format is not torch.contiguous_format)
        inputs = source.inputs() if graph else ()
        if any(t.requires_grad for t in inputs):
            tensor = _Promise.apply(made, *inputs)
        else:
            tensor = _without_values(*made)
    else:
        value = reordered(source.value(), format)
        if readers.asked:
            return value
        readers.asked = True
        tensor = value.as_subclass(Observed)
        tensor.shown = value if isinstance(source, Map) else None
        tensor.source, tensor.promised, tensor.lent = source, [source], False
    tensor.readers, tensor.format = readers, format
    tensor._modes = graph, torch.is_autocast_enabled(like.device.type)
    return tensor


def taken_in(x: Tensor, format: torch.memory_format, readers: Readers) -> Tensor:
    """A plain tensor that is handed to a network from outside."""
    if saving_is_watched() or (readers.asked and not readers.known):
        return x
    if readers.known:
        return entered(x, format, readers)
    readers.asked = True
    tensor: Any = x.as_subclass(Observed)
    tensor.source, tensor.promised, tensor.lent, tensor.shown = Map(x), [Map(x)], False, x
    tensor.readers, tensor.format = readers, format
    tensor._modes = torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
    return tensor


def entered(x: Tensor, format: torch.memory_format, readers: Readers) -> Observed:
    """A plain tensor for one call of an operation that is known."""
    tensor = _without_values(Map(x), x.shape, x, format is not torch.contiguous_format)
    tensor.shown, tensor.readers, tensor.format = x, readers, format
    tensor._modes = torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
    return tensor


def format_of(x: Tensor) -> torch.memory_format | None:
    """The layout of a plain tensor, None where it is neither of the usual ones."""
    if x.dim() == 4 and is_last(x) and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.is_contiguous():
        return torch.contiguous_format
    last = _LAST.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else None


def in_last(x: Tensor) -> Tensor:
    """A map with its channels last; anything else as it is, and what is on a GPU, where a copy is a
    launch more."""
    last = _LAST.get(x.dim())
    return x if last is None or gpu.holds(x) else reordered(x, last)
