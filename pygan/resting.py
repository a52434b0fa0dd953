"""Layers of a fused module that are torch's alone while it is called.

A layer with a hook is called in a slower way, and the hook looks at what comes; a fused Sequential
looks as well. Where nothing is gained even that is too much: behind a convolution, which leaves
little of the interpreter in the caches, some ten microseconds each. So once a few calls have shown
which layers are left to torch, those are as torch made them while calls with such arguments run.
Before and after, and to whoever calls a layer without the module, they are fused.

Where all layers are left, the module's own two hooks are too much as well. The class of the module
then gets a function in ``_compiled_call_impl``, which ``nn.Module.__call__`` asks before it does
anything else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pygan.layers import enter, hand_out, take_in
from pygan.pending import MOST_LEFT, TRIES, Readers, plain
from pygan.sequential import FusedSequential, modes

CALLS = TRIES + 2  # after which it is settled which layers are left to torch

SLOT = "_compiled_call_impl"
_set = object.__setattr__  # nn.Module's looks for parameters first

_Place = tuple[dict[int, Any], int, Any]  # hooks of a layer, a key, and the hook that it stands for


class _Kind:
    """What calls of one kind have shown."""

    def __init__(self) -> None:
        self.calls = 0
        self.hooks: list[_Place] = []  # of layers that rest
        self.sequentials: list[nn.Module] = []  # that rest
        self.all_rest = False
        self.all_hooks: list[_Place] = []  # the module's as well, where all rest


class Resting:
    """Of a module that was fused: its layers that are left to torch, by the kind of its call."""

    def __init__(self) -> None:
        self.took = False  # whether operations on the call's own input were to be taken over
        self.running: _Kind | None = None
        self.kinds: dict[Any, _Kind] = {}
        self._hooks: list[_Place] = []  # that are off now
        self._sequentials: list[nn.Module] = []  # that are torch's now

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """The module is called; whether nothing in it is anything but torch's."""
        if self.running is not None:  # a call that failed
            self._wake()
        key = _key_of(args)
        kind = self.running = self.kinds.get(key)
        if kind is None:
            if key is None or len(self.kinds) == MOST_LEFT:
                return False
            kind = self.running = self.kinds[key] = _Kind()
        if kind.calls < CALLS:
            for layer in module.modules():
                if (readers := vars(layer).get("_readers")) is not None:
                    readers.passed = False
            return False
        for place in kind.hooks:
            hooks, at, _ = place
            # Another hook would come first when this one is back.
            if len(hooks) == 1 and hooks.pop(at, None) is not None:
                self._hooks.append(place)
        for layer in kind.sequentials:
            if type(layer) is FusedSequential:
                _set(layer, "__class__", nn.Sequential)
                self._sequentials.append(layer)
        return kind.all_rest

    def end(self, module: nn.Module) -> None:
        """The call of the module has ended: its layers are fused again."""
        kind = self.running
        self._wake()
        if kind is not None and kind.calls < CALLS:
            kind.calls += 1
            if kind.calls == CALLS:
                self._settle(module, kind)

    def _wake(self) -> None:
        # Another thread may do the same.
        while self._hooks:
            hooks, at, hook = self._hooks.pop()
            hooks[at] = hook
        while self._sequentials:
            layer = self._sequentials.pop()
            if type(layer) is nn.Sequential:
                _set(layer, "__class__", FusedSequential)
        self.running = None

    def _settle(self, module: nn.Module, kind: _Kind) -> None:
        kind.all_rest = not self.took
        for layer in module.modules():
            places = _places(layer._forward_pre_hooks, enter)
            sequential = type(layer) is FusedSequential
            if not places and not sequential:
                continue
            readers: Readers | None = vars(layer).get("_readers")
            if readers is None or not readers.passed:
                kind.all_rest = False
            elif not sequential:
                kind.hooks += places
            elif layer is not module:  # which runs already when it is asked
                kind.sequentials.append(layer)
        if kind.all_rest and _asks_first(type(module)):
            own = _places(module._forward_pre_hooks, take_in)
            own += _places(module._forward_hooks, hand_out)
            kind.all_hooks = own + kind.hooks

    def __reduce__(self) -> tuple[type[Resting], tuple[()]]:
        return Resting, ()  # a copy sees for itself


def _places(hooks: dict[int, Any], wanted: Any) -> list[_Place]:
    return [(hooks, at, hook) for at, hook in hooks.items() if hook is wanted]


def _asks_first(kind: type[nn.Module]) -> bool:
    """Whether calls of such modules come to :func:`_called` from now on. Those of Sequentials do
    not, of which a network may hold many."""
    if issubclass(kind, nn.Sequential) or getattr(kind, SLOT, _called) not in (None, _called):
        return False
    setattr(kind, SLOT, _called)
    return True


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``nn.Module.__call__`` does first: modules at rest are called as they are."""
    if is_dynamo_compiling() or (resting := module.__dict__.get("_resting")) is None:
        return module._call_impl(*args, **kwargs)
    kind = resting.kinds.get(_key_of(args))
    if kind is None or not kind.all_hooks or not _is_free(kind):
        # A call in another thread may take away the hook that hands plain tensors out.
        return plain(module._call_impl(*args, **kwargs))
    for hooks, at, _ in kind.all_hooks:
        hooks.pop(at, None)
    for layer in kind.sequentials:
        _set(layer, "__class__", nn.Sequential)
    try:
        return module._call_impl(*args, **kwargs)
    finally:
        for hooks, at, hook in kind.all_hooks:
            hooks[at] = hook
        for layer in kind.sequentials:
            _set(layer, "__class__", FusedSequential)


def _is_free(kind: _Kind) -> bool:
    """Whether all that may rest is fused now and has no hook of the user's, which would come first
    when the other is back."""
    for hooks, _, _ in kind.all_hooks:
        if len(hooks) != 1:
            return False
    for layer in kind.sequentials:  # noqa: SIM110 - a loop calls no generator, and every call asks
        if type(layer) is not FusedSequential:
            return False
    return True


def _key_of(args: tuple[Any, ...]) -> Any:
    """What the layers' inputs follow from, as far as a call tells; None where it tells nothing.

    Two inputs of one key may differ in more, as a sparse one and a dense do: layers at rest are
    right for any."""
    kinds: list[Any] = []
    try:
        for x in args:
            if type(x) is Tensor:
                kinds += x.shape, x.dtype, x.get_device(), x.is_contiguous()
            elif isinstance(x, Tensor):
                return None
    except RuntimeError:  # it has no order of memory
        return None
    return (*modes(), *kinds) if kinds else None
