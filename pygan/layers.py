"""The hooks by which a fused module's maps reach :mod:`pygan.known_operations`.

Layers that a ``forward`` calls itself keep their very class and get a hook: where its input is a
plain tensor that pygan's kernels take, the layer is given it as a :mod:`pygan.pending` tensor,
whose operations are taken over. Two hooks of the module that was fused do the same with its input,
and see that only plain tensors leave it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from pygan.known_operations import SAME_SIZED, STRIDED, is_left, may_be_pooled, may_enter
from pygan.ops import gpu, strided_conv
from pygan.ops.binary_cross_entropy import with_lost_gradient
from pygan.pending import (
    MOST_LEFT,
    TRIES,
    Readers,
    entered,
    format_of,
    is_little,
    plain,
    taken_in,
)

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def enter(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of a layer with which a chain of known operations may begin."""
    if len(args) != 1 or type(args[0]) is not Tensor:
        return None
    input = args[0]
    readers: Readers | None = vars(layer).get("_readers")
    key = (input.shape, input.dtype, input.device, input.is_contiguous())
    if readers is not None:
        readers.passed = key in readers.left
        if readers.passed:
            return None
    if not may_enter(input):
        return None
    if readers is None:
        readers = vars(layer)["_readers"] = Readers()
    if isinstance(layer, NORMS):
        serves = input.dim() > 1 and _takes_along(input, readers)
    else:
        if torch.is_inference_mode_enabled():
            return None
        # A weight that is computed is not asked for: that may change it.
        weight = layer._parameters.get("weight")
        serves = input.dim() == 4 and not is_little(input, weight)
        serves = serves and _gains(layer, input, readers)
    if not serves and len(readers.left) < MOST_LEFT:
        readers.left.add(key)
    format = format_of(input) if serves else None
    return None if format is None or watched(layer) else (entered(input, format, readers),)


def _takes_along(x: Tensor, readers: Readers) -> bool:
    """Whether a norm of a plain x is worth it, which is where an operation that takes it along
    or is folded with another follows, or the calls to show what does are not over."""
    if gpu.holds(x):
        # No operation but an activation gains.
        behind = readers.after.values()
        return not behind or any(not r.asked or r.foreseen()[0] != "none" for r in behind)
    found = [r for r in readers.after.values() if r.known or not r.asked]
    if is_little(x) or (readers.after and not found):
        return False
    readers.looks += 1
    return readers.looks <= TRIES or any(r.lead_to_fold() or not is_left(x, r) for r in found)


def _gains(layer: nn.Module, x: Tensor, readers: Readers) -> bool:
    """Whether a convolution of a plain map is faster as a known operation. One that torch runs is
    as fast as it comes: only a pooling behind it is worth it, which the first call shows."""
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    transposed = isinstance(layer, nn.ConvTranspose2d)
    ends = (layer.in_channels, layer.out_channels)
    a, b = ends if transposed else reversed(ends)
    size = (a, b // layer.groups, *layer.kernel_size)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if gpu.holds(x):
        return (layer.kernel_size, *geometry) == STRIDED
    if strided_conv.has_kernel(transposed, x.shape, size, geometry):
        return True
    if transposed or (layer.kernel_size, *geometry) != SAME_SIZED:
        return False
    return may_be_pooled(readers.of(F.conv2d))


def show(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook of a layer whose call somebody watches: it sees plain tensors."""
    result = plain(args)
    assert isinstance(result, tuple)
    return result


def take_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of the module that was fused: operations on its maps are taken over."""
    resting = None if torch.compiler.is_dynamo_compiling() else vars(module).get("_resting")
    if resting is not None and resting.begin(module, args):
        return None
    result = _taken(module, args)
    if resting is not None:
        resting.took = result is not None
    return result


def _taken(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    inside = list(module._modules.values())
    for layer in inside:
        if layer is not None:
            if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                _keep_shown(layer)
            inside += layer._modules.values()
    if not args or not may_enter(args[0]) or args[0].dim() != 4 or args[0].shape[2:].numel() == 1:
        return None
    if gpu.holds(args[0]):
        # There only layers gain, which take it in themselves.
        return None
    format = format_of(args[0])
    if format is None or is_little(args[0]) or globally_hooked():
        return None
    readers = vars(module).setdefault("_readers", Readers())
    return (taken_in(args[0], format, readers.of("input")), *args[1:])


def _keep_shown(layer: nn.Module) -> None:
    if watched(layer) and show not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(show)


def hand_out(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook of the module that was fused: others get plain tensors."""
    resting = vars(module).get("_resting")
    if resting is not None and resting.running is not None:
        resting.end(module)
    return None if type(output) is Tensor else plain(output)


def keep_gradient(criterion: nn.Module, args: tuple[Any, ...], loss: Tensor) -> Tensor | None:
    """A forward hook of a ``nn.BCELoss``: what a saturated sigmoid loses is not lost."""
    if len(args) != 2 or torch.compiler.is_compiling():
        return None
    assert isinstance(criterion, nn.BCELoss)
    return with_lost_gradient(loss, *args, criterion.weight, criterion.reduction)


def is_own_hook(hook: Any) -> bool:
    """Whether a hook is one of these."""
    return hook in (enter, show, take_in, hand_out, keep_gradient)


def watched(layer: nn.Module) -> bool:
    """Whether somebody's hook sees what the layer gives."""
    return bool(
        layer._backward_hooks
        or layer._backward_pre_hooks
        or (layer._forward_hooks and not all(map(is_own_hook, layer._forward_hooks.values())))
    )


def globally_hooked() -> bool:
    """Whether something watches every module's call."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )
