"""Networks of a script that knows nothing of pygan, fused at their first call.

``nn.Module.__call__`` looks up ``_compiled_call_impl``, which is None in the class, before it does
anything else. :func:`install` puts a function there, which is asked about calls without a hook and
without anything on the modules themselves. torch's own layers, which hold no others, keep the None.

Who is called first, from outside of any module, is a network. Its layers have pygan's classes and
hooks only while a call of it runs. Whoever looks at them at any other time, to print, copy, save,
initialise or compile them, finds torch's own.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pygan.fuse import fuse
from pygan.layers import enter, hand_out, is_own_hook, show, take_in
from pygan.ops.binary_cross_entropy import binary_cross_entropy
from pygan.pending import Readers, plain
from pygan.resting import SLOT

_NO_LAYERS = ("container", "module", "transformer")  # of torch.nn.modules
_HOLD_MODULES = (
    nn.MultiheadAttention,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.TripletMarginWithDistanceLoss,
)
_CALLS_THE_NETWORK = nn.parallel.DistributedDataParallel  # as nn.DataParallel does
_set = object.__setattr__  # nn.Module's looks for parameters first
_HOOK = -1  # the key of pygan's; torch counts upwards from 0


class _Exchanged:
    """A layer, torch's class of it and pygan's, whether it gets a hook, and what was seen of its
    readers."""

    __slots__ = ("fused", "hooked", "layer", "own", "readers")

    def __init__(
        self, layer: nn.Module, own: type[nn.Module], fused: type[nn.Module], hooked: bool
    ) -> None:
        # None for the network itself, which would live forever otherwise.
        self.layer: nn.Module | None = layer
        self.own, self.fused, self.hooked = own, fused, hooked
        self.readers: Readers | None = None


class _Network:
    """A module that is called from outside of any module."""

    def __init__(self) -> None:
        self.layers: list[_Exchanged] = []
        self.entry: list[str] = []  # in the report: its class, and what was fused
        self.known: set[int] = set()  # ids of the modules that it was seen to call
        self.grown = False
        self.tries = 8  # while there are hooks, which a summary of the layers, say, takes away

    def enter(self, module: nn.Module) -> None:
        for each in self.layers:
            layer = module if each.layer is None else each.layer
            # A parametrization, say, may have given it yet another class.
            if type(layer) is each.own:
                _set(layer, "__class__", each.fused)
            if each.hooked:
                layer._forward_pre_hooks[_HOOK] = enter
            if each.readers is not None:
                layer.__dict__["_readers"] = each.readers

    def leave(self, module: nn.Module) -> None:
        for each in self.layers:
            layer = module if each.layer is None else each.layer
            if type(layer) is each.fused:
                _set(layer, "__class__", each.own)
            if each.hooked:
                layer._forward_pre_hooks.pop(_HOOK, None)
            if (readers := layer.__dict__.pop("_readers", None)) is not None:
                each.readers = readers
        for layer in module.modules():
            if layer._forward_pre_hooks:
                _remove(layer, show)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.layers or _is_recorded(args):
            return _untouched(module._call_impl, *args, **kwargs)
        _now.network = self
        with _lock:
            _entered.append((self, module))
            self.enter(module)
        try:
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return _call_watched(module, args, kwargs)
            taken = take_in(module, args)
            output = module._call_impl(*(args if taken is None else taken), **kwargs)
            return output if type(output) is Tensor else plain(output)
        finally:
            _now.network = None
            _end()


class _Now(threading.local):
    """The network that runs in this thread."""

    network: _Network | None = None


_now = _Now()
_lock = threading.Lock()
_entered: list[tuple[_Network, nn.Module]] = []  # in all threads
_ended = 0  # of those calls
_outside = _Network()  # stands for modules that run as they are
_networks: dict[int, _Network] = {}
_forget: dict[int, weakref.ref[nn.Module]] = {}
_report: list[list[str]] = []


def _end() -> None:
    """A call has ended: with the last of those at the same time, the layers get their classes."""
    global _ended
    with _lock:
        _ended += 1
        if _ended == len(_entered):
            for network, module in _entered:
                network.leave(module)
            _entered.clear()
            _ended = 0


def _call_watched(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call whose hooks get plain tensors."""
    before = module.register_forward_pre_hook(take_in)
    after = module.register_forward_hook(hand_out, prepend=True)
    try:
        return module._call_impl(*args, **kwargs)
    finally:
        before.remove()
        after.remove()


def _untouched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call in which every layer is torch's, unless another thread is in a network."""
    before = _now.network
    left = _entered[:] if before not in (None, _outside) and len(_entered) == 1 else []
    for network, module in left:
        network.leave(module)
    _now.network = _outside
    try:
        return function(*args, **kwargs)
    finally:
        _now.network = before
        for network, module in left:
            network.enter(module)


def _is_recorded(args: tuple[Any, ...]) -> bool:
    """Whether the operations that run now are recorded by a tracer or by a mode such as a counter
    of operations, or transformed by ``torch.func``."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(each, torch.fx.Proxy) for each in args)
    )


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``nn.Module.__call__`` does first."""
    if torch.compiler.is_compiling():
        return module._call_impl(*args, **kwargs)
    if (running := _now.network) is not None:
        if module._modules and running is not _outside and id(module) not in running.known:
            running.known.add(id(module))
            running.grown = True
        return module._call_impl(*args, **kwargs)
    if not module._modules or isinstance(module, _CALLS_THE_NETWORK):
        return module._call_impl(*args, **kwargs)
    network = _networks.get(id(module))
    if network is None or network.grown:
        with _lock:
            network = _first_called(module, args)
    return network.call(module, args, kwargs)


def _first_called(module: nn.Module, args: tuple[Any, ...]) -> _Network:
    """The network that a module is, and ``_outside`` where that cannot be told in this call."""
    if _entered:
        return _outside  # another thread may be in some of its layers
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return _outside  # its classes change in this call
    devices = {parameter.device.type for parameter in module.parameters()}
    if "meta" in devices or _is_recorded(args):
        return _outside
    network = _networks.get(id(module)) or _Network()
    network.layers, network.grown = [], False
    _remember(module, network)
    if (reason := _why_not(module, devices)) is not None:
        _write(network, module, reason)
        return network
    hooked = any(map(is_own_hook, module._forward_hooks.values()))
    classes = [(layer, type(layer)) for layer in module.modules()]
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer, _ in classes):
        network.tries -= 1
        network.grown = network.tries > 0
    entering = [enter in layer._forward_pre_hooks.values() for layer, _ in classes]
    report = fuse(module)
    exchanged = []
    for (layer, own), before in zip(classes, entering, strict=True):
        added = not before and _remove(layer, enter)
        exchanged.append(_Exchanged(layer, own, type(layer), added))
    network.known.update(id(layer) for layer, _ in classes)
    _write(network, module, str(report))
    if not report.fused:
        return network
    if not hooked:
        _remove(module, take_in)
        _remove(module, hand_out)
        del module.__dict__["_resting"]
    itself, *inside = exchanged
    itself.layer = None
    network.layers = [itself, *(e for e in inside if e.hooked or e.own is not e.fused)]
    network.leave(module)
    return network


def _remove(layer: nn.Module, hook: Callable[..., Any]) -> bool:
    """Takes a hook away, and tells whether it was there."""
    found = False
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key in [key for key, each in hooks.items() if each is hook]:
            del hooks[key]
            found = True
    return found


def _why_not(module: nn.Module, devices: set[str]) -> str | None:
    """Why a module and all in it stay as they are."""
    if devices - {"cpu"}:
        return f"left: its parameters are on {' and '.join(sorted(devices))}"
    for layer in module.modules():
        kind = type(layer)
        if isinstance(layer, torch.jit.ScriptModule):
            return "left: it is a script of torch.jit"
        if isinstance(layer, torch.fx.GraphModule):
            return "left: it is a graph of torch.fx"
        if kind.__module__.startswith("torch._dynamo") or vars(layer).get(SLOT) is not None:
            return "left: it is compiled by torch"
        if kind.__module__.startswith("torch.distributed"):
            return f"left: it holds a {kind.__name__}"
    return None


def _write(network: _Network, module: nn.Module, text: str) -> None:
    if type(module).__module__.startswith("torch.nn.utils"):
        return  # a parametrization
    if not network.entry:
        _report.append(network.entry)
    network.entry[:] = type(module).__name__, text


def _remember(module: nn.Module, network: _Network) -> None:
    """Keeps what was found out as long as the module lives."""
    key = id(module)

    def forget(_: weakref.ref[nn.Module]) -> None:
        _networks.pop(key, None)
        _forget.pop(key, None)

    _networks[key] = network
    _forget[key] = weakref.ref(module, forget)


def install() -> None:
    """From now on every network is fused at its first call."""
    nn.Module._compiled_call_impl = _called
    for kind in vars(nn).values():
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            continue
        if kind.__module__.rpartition(".")[2] not in _NO_LAYERS and kind not in _HOLD_MODULES:
            kind._compiled_call_impl = None
    theirs = torch.utils.checkpoint.checkpoint

    # What is computed again has to be computed in the same way.
    @functools.wraps(theirs)
    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return theirs(function, *args, **kwargs)
        return theirs(functools.partial(_untouched, function), *plain(args), **plain(kwargs))

    torch.utils.checkpoint.checkpoint = checkpoint
    # nn.BCELoss calls it, too.
    F.binary_cross_entropy = functools.wraps(F.binary_cross_entropy)(binary_cross_entropy)


def report() -> str:
    """The networks in the order of their first calls, and what was fused in each."""
    rows = []
    for (name, text), count in Counter(map(tuple, _report)).items():
        times = f" ({count} of them)" if count > 1 else ""
        rows.append(f"{name}{times}")
        rows += [f"  {line}" for line in text.splitlines()]
    return "\n".join(rows) or "no network was called"
