"""torch's layers under their own names, which hand on :mod:`pygan.pending` tensors.

``pygan.fuse`` exchanges the class of a layer for the one here. It differs in one thing: where its
input is a plain tensor that pygan's kernels take, its operation is done by
:mod:`pygan.known_operations`. The hooks of the fused module do the same with its input, and see
that only plain tensors leave it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from pygan.known_operations import may_enter
from pygan.pending import Readers, entered, format_of, plain, taken_in

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class _Entering(nn.Module):
    """Where a chain of known operations begins."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if may_enter(input) and not (args or kwargs) and self._serves(input):
            format = format_of(input)
            if format is not None:
                input = entered(input, format, self._seen())
        return super().forward(input, *args, **kwargs)

    def _seen(self) -> Readers:
        readers: Readers | None = vars(self).get("_readers")
        if readers is None:
            readers = vars(self)["_readers"] = Readers()
        return readers

    def _serves(self, input: Tensor) -> bool:
        raise NotImplementedError


class _Norm(_Entering):
    def _serves(self, input: Tensor) -> bool:
        # Worth it only where an operation takes the activation along.
        found = self._seen().after.values()
        return input.dim() > 1 and (not found or any(r.known or not r.asked for r in found))


class _Convolution(_Entering):
    def _serves(self, input: Tensor) -> bool:
        return input.dim() == 4 and not torch.is_inference_mode_enabled()


class BatchNorm1d(_Norm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``."""


class BatchNorm2d(_Norm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``."""


class BatchNorm3d(_Norm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``."""


class InstanceNorm1d(_Norm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``."""


class InstanceNorm2d(_Norm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``."""


class InstanceNorm3d(_Norm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``."""


class Conv2d(_Convolution, nn.Conv2d):
    """``torch.nn.Conv2d``."""


class ConvTranspose2d(_Convolution, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``."""


# Each class of torch, and the one in its place.
EXCHANGED: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, layer.__name__): layer
    for layer in (
        *(BatchNorm1d, BatchNorm2d, BatchNorm3d, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
        *(Conv2d, ConvTranspose2d),
    )
}


def globally_hooked() -> bool:
    """Whether something watches every module's call."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def take_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of the module that was fused: operations on its maps are taken over."""
    if not args or not may_enter(args[0]) or args[0].dim() != 4 or args[0].shape[2:].numel() == 1:
        return None
    format = format_of(args[0])
    if format is None or globally_hooked():
        return None
    readers = vars(module).setdefault("_readers", Readers())
    return (taken_in(args[0], format, readers.of("input")), *args[1:])


def hand_out(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook of the module that was fused: others get plain tensors."""
    return None if type(output) is Tensor else plain(output)


def is_own_hook(hook: Any) -> bool:
    """Whether a hook is one of these two."""
    return hook is take_in or hook is hand_out
