"""Layers of a fused module that are torch's alone while it is called.

A layer with a hook is called in a slower way, and the hook looks at what comes; a fused Sequential
looks as well. Where nothing is gained even that is too much: behind a convolution, which leaves
little of the interpreter in the caches, some ten microseconds each. So once a few calls have shown
which layers are left to torch, those are as torch made them while calls with such arguments run.
Before and after, and to whoever calls a layer without the module, they are fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pygan.layers import enter
from pygan.ops import dispatch
from pygan.ops.norm_act import current_groups
from pygan.pending import MOST_LEFT, TRIES, Readers
from pygan.sequential import FusedSequential

CALLS = TRIES + 2  # after which it is settled which layers are left to torch

_set = object.__setattr__  # nn.Module's looks for parameters first


class _Kind:
    """What calls of one kind have shown."""

    def __init__(self) -> None:
        self.calls = 0
        self.hooks: list[tuple[dict[int, Any], int]] = []  # of layers that rest, and their keys
        self.sequentials: list[nn.Module] = []  # that rest
        self.all_rest = False


class Resting:
    """Of a module that was fused: its layers that are left to torch, by the kind of its call."""

    def __init__(self) -> None:
        self.took = False  # whether operations on the call's own input were to be taken over
        self.running: _Kind | None = None
        self._kinds: dict[Any, _Kind] = {}
        self._hooks: list[tuple[dict[int, Any], int]] = []  # that are off now
        self._sequentials: list[nn.Module] = []  # that are torch's now

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """The module is called; whether nothing in it is anything but torch's."""
        if self.running is not None:  # a call that failed
            self._wake()
        key = _key_of(args)
        kind = self.running = self._kinds.get(key)
        if kind is None:
            if key is None or len(self._kinds) == MOST_LEFT:
                return False
            kind = self.running = self._kinds[key] = _Kind()
        if kind.calls < CALLS:
            for layer in module.modules():
                if (readers := vars(layer).get("_readers")) is not None:
                    readers.passed = False
            return False
        for place in kind.hooks:
            hooks, at = place
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
            hooks, at = self._hooks.pop()
            hooks[at] = enter
        while self._sequentials:
            layer = self._sequentials.pop()
            if type(layer) is nn.Sequential:
                _set(layer, "__class__", FusedSequential)
        self.running = None

    def _settle(self, module: nn.Module, kind: _Kind) -> None:
        kind.all_rest = not self.took
        for layer in module.modules():
            hooks = layer._forward_pre_hooks
            places = [(hooks, at) for at, hook in hooks.items() if hook is enter]
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

    def __reduce__(self) -> tuple[type[Resting], tuple[()]]:
        return Resting, ()  # a copy sees for itself


def _key_of(args: tuple[Any, ...]) -> Any:
    """What the layers' inputs follow from, as far as a call tells; None where it tells nothing."""
    kinds: list[Any] = [dispatch.wished(), current_groups()]
    device = None
    for x in args:
        if not isinstance(x, Tensor):
            continue
        if type(x) is not Tensor or x.layout is not torch.strided:
            return None
        if device is None:
            device = x.device
            kinds += device, torch.is_autocast_enabled(device.type)
        kinds += x.shape, x.dtype, x.is_contiguous()
    return None if device is None else tuple(kinds)
