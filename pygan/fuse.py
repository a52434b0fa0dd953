"""``pygan.fuse(module)``: faster blocks in somebody else's network, and nothing else changed.

A ``nn.Sequential`` keeps its children, parameters, buffers, hooks and ``state_dict``; its class is
exchanged for :class:`pygan.sequential.FusedSequential`. Layers that a ``forward`` calls itself get
a hook of :mod:`pygan.layers`, which runs them with what follows them, whatever that turns out to
be. Two hooks on the module take its input in and hand plain tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pygan import layers as _layers
from pygan.errors import UserError
from pygan.ops import dispatch, gpu
from pygan.pending import TRIES, Readers
from pygan.resting import Resting
from pygan.sequential import (
    BATCH_NORMS,
    CONVOLUTIONS,
    FOLDED,
    FusedSequential,
    fused_runs,
    globally_hooked,
    is_strided,
    why_opaque,
)


@dataclass
class FuseReport:
    """What :func:`fuse` did: names of fused runs of layers, and (name, reason) of those left."""

    fused: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(name, "fused") for name in self.fused] + self.skipped
        if not rows:
            return (
                "nothing to fuse: the module holds no batch or instance norm and no 2-D convolution"
            )
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in rows)


def fuse(
    module: nn.Module, *, strict: bool = False, example_inputs: Sequence[Any] | None = None
) -> FuseReport:
    """Makes a network faster in place: same parameters, buffers, ``state_dict``, hooks, numbers.

    Batch and instance norms run together with the ReLU, LeakyReLU, Tanh or Sigmoid behind them,
    called as modules or as functions; 4x4 convolutions of stride 2 and padding 1, transposed or
    not, by native kernels, inside a ``nn.Sequential`` with 1 to 4 channels together with the ReLU
    or LeakyReLU behind them, and elsewhere together with the norm before them; 3x3 convolutions
    behind a nearest upsampling by 2 or before an average pooling by 2 as one convolution of that
    kind; convolutions of a 1x1 map, or to one, and 4x4 ones of few positions, as products of
    matrices. Other 2-D convolutions, with a weight that is computed too, hand their maps on to any
    of these. Contiguous maps go through the network in channels_last, and leave it contiguous. What
    a ``forward`` does with a map is found out while it runs, so any code may stand between the
    layers. Layers too little to gain are left to torch. A ``nn.BCELoss`` behind a sigmoid gets the
    gradient of :func:`pygan.functional.binary_cross_entropy`, wherever the sigmoid is.

    Deep copies, pickles, ``.to``, train and eval mode and a second call all work; :func:`unfuse`
    undoes it. On a GPU norms run together with the activation behind them, and 4x4 convolutions of
    stride 2 by kernels where these are faster, all in the layout they come in; 3x3 convolutions are
    torch's. On other devices the network runs as it did.

    Args:
        module: any network, or a ``nn.BCELoss``.
        strict: raise where a batch norm or a 4x4 convolution of stride 2 has to be left as it is.
        example_inputs: arguments of a call, which is made now, without gradients, and leaves
            buffers and random numbers as they are: what it finds out need not be found out in the
            first calls, and the report tells what follows each layer.

    Returns:
        What was fused, and what was left and why. Prints as a table.

    Raises:
        UserError: ``strict`` and something was skipped, with the first reason.
    """
    report = FuseReport()
    if isinstance(module, torch.jit.ScriptModule):
        report.skipped.append((type(module).__name__, "it is a script of torch.jit"))
    inside: set[nn.Module] = set()
    containers: list[nn.Sequential] = []
    for name, container in module.named_modules():
        if type(container) is not nn.Sequential and not isinstance(container, FusedSequential):
            continue
        before = len(report.fused)
        _describe(name, container, inside, report)
        if type(container) is nn.Sequential and len(report.fused) > before:
            containers.append(container)
    leaves: list[tuple[nn.Module, str]] = []
    criteria: dict[nn.Module, str] = {}
    for name, layer in module.named_modules():
        title = f"{name} {type(layer).__name__}" if name else type(layer).__name__
        if type(layer) is nn.BCELoss:
            criteria[layer] = title
        if layer in inside or not _is_leaf(layer):
            continue
        reason = _why_not_leaf(layer)
        if reason is None:
            leaves.append((layer, title))
        else:
            report.skipped.append((title, reason))
    if strict and report.skipped:
        name, reason = report.skipped[0]
        raise UserError(f"{name} cannot be fused: {reason}; pass strict=False to leave it")
    for container in containers:
        container.__class__ = FusedSequential
    for layer, _ in leaves:
        if _layers.enter not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_layers.enter)
    for criterion in criteria:
        if _layers.keep_gradient not in criterion._forward_hooks.values():
            criterion.register_forward_hook(_layers.keep_gradient)
    if (report.fused or leaves) and _layers.hand_out not in module._forward_hooks.values():
        module.register_forward_hook(_layers.hand_out, prepend=True)
        module.register_forward_pre_hook(_layers.take_in)
    if _layers.hand_out in module._forward_hooks.values():
        vars(module)["_resting"] = Resting()
    if example_inputs is not None:
        _try(module, example_inputs)
    for layer, title in leaves:
        # The first operation is the layer's own.
        behind = _operations(vars(layer).get("_readers"))[1:] or ["what follows it"]
        report.fused.append(f"{title} (with {', '.join(behind)})")
    own = vars(module).get("_readers")
    if names := _operations(own.after.get("input") if own is not None else None):
        report.fused.append(f"the input: {', '.join(names)}")
    report.fused += [f"{title} (with the gradient of the logits)" for title in criteria.values()]
    return report


def _try(module: nn.Module, args: Sequence[Any]) -> None:
    """Calls that only their readers remember: each finds out what reads one layer further."""
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            for _ in range(TRIES):
                module(*args)
        finally:
            for name, buffer in module.named_buffers():
                if name in state:
                    buffer.copy_(state[name])


def _operations(readers: Readers | None) -> list[str]:
    """Those that were seen to read a tensor, and what they made of it, one after the other."""
    names: list[str] = []
    while readers is not None and readers.after:
        operations = list(readers.after)
        names.append(" and ".join(getattr(f, "__name__", "an operation") for f in operations))
        readers = readers.after[operations[0]] if len(operations) == 1 else None
    return names


def _why_not_here(layer: nn.Module) -> str | None:
    """Why the kernels do not take the tensors that a layer has."""
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if is_lazy(tensor):
            return "it is lazy and not initialized yet"
        if (kind := tensor.device.type) == "cuda":
            return dispatch.gpu_reason()
        if kind != "cpu":
            return f"its parameters are on {kind}, and the kernels are for CPUs and NVIDIA GPUs"
    return None


def _is_leaf(layer: nn.Module) -> bool:
    """Whether a layer outside a ``nn.Sequential`` may run with what follows it, or by a kernel."""
    if isinstance(layer, CONVOLUTIONS):
        if any(gpu.holds(tensor) for tensor in layer.parameters(recurse=False)):
            return is_strided(layer)  # folded forms have no kernels there
        plain = type(layer) in CONVOLUTIONS or _is_parametrized(layer)
        return is_strided(layer) or (plain and layer.groups == 1 and layer.dilation == (1, 1))
    return isinstance(layer, _layers.NORMS)


def _why_not_leaf(layer: nn.Module) -> str | None:
    """Why such a layer has to be called as it is."""
    if (reason := _why_not_here(layer)) is not None:
        return reason
    if type(layer) not in (*_layers.NORMS, *CONVOLUTIONS) and not _is_parametrized(layer):
        return f"{type(layer).__name__} is a class of its own"
    if isinstance(layer, CONVOLUTIONS) and (layer.groups != 1 or layer.dilation != (1, 1)):
        return "it has groups or a dilation"
    if _layers.watched(layer):
        return "it has hooks"
    return "its forward has been replaced" if "forward" in vars(layer) else None


def _is_parametrized(layer: nn.Module) -> bool:
    """Whether torch made the class, for a weight that is computed, of one of its own."""
    parametrized = nn.utils.parametrize.is_parametrized(layer)
    return parametrized and type(layer).__bases__[0] in (*_layers.NORMS, *CONVOLUTIONS)


def _describe(
    name: str, container: nn.Sequential, inside: set[nn.Module], report: FuseReport
) -> None:
    keys, layers = list(container._modules), list(container)
    prefix = f"{name}." if name else ""
    if any(_why_not_here(layer) is not None for layer in layers):
        return
    convolution: list[str] = []  # one that may head the row of the batch norm behind it
    for i, kind, activation in fused_runs(layers):
        layer = layers[i]
        if kind != "module":
            inside.update(each for each in (layer, activation) if each is not None)
        title = f"{prefix}{keys[i]} {type(layer).__name__}"
        behind = (
            "" if activation is None else f" + {prefix}{keys[i + 1]} {type(activation).__name__}"
        )
        if convolution and kind != "norm":
            report.fused += convolution
            convolution = []
        if kind == "convolution":
            title = title if is_strided(layer) else f"{title} ({_taken_maps(layer)})"
            convolution = [title + behind]
        elif kind in FOLDED:
            convolution = [title + behind]
        elif kind == "norm":
            report.fused.append(" + ".join([*convolution, title]) + behind)
            convolution = []
    report.fused += convolution


def _taken_maps(layer: nn.Module) -> str:
    assert isinstance(layer, CONVOLUTIONS)
    height, width = (1, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.kernel_size
    return f"of {height}x{width} maps"


def unfuse(module: nn.Module) -> None:
    """Undoes :func:`fuse`: every layer is of torch's own class again."""
    for layer in module.modules():
        if type(layer) is FusedSequential:
            layer.__class__ = nn.Sequential  # type: ignore[assignment]
        for name in ("_readers", "_resting"):
            vars(layer).pop(name, None)
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if _layers.is_own_hook(hook):
                    del hooks[key]


_SAMPLE_WISE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.LayerNorm,
    nn.GroupNorm,
)


def why_not_mergeable(module: nn.Module) -> str | None:
    """Why one call on two batches may differ from two calls, or None where it cannot.

    None only if every layer treats samples one by one, or is a batch norm that follows
    ``batch_groups``, and every ``forward`` is known. Random layers count as different: their draws
    would come in another order.
    """
    from pygan.models import Discriminator

    if globally_hooked():
        return "there are global module hooks"
    grouped = {
        layer
        for container in module.modules()
        if isinstance(container, FusedSequential)
        for layer in container
        if type(layer) in BATCH_NORMS
    }
    for name, layer in module.named_modules():
        known = isinstance(layer, FusedSequential)
        known |= type(layer) in (nn.Sequential, Discriminator, *_SAMPLE_WISE)
        if not known and layer not in grouped:
            return f"{name or 'the module'} ({type(layer).__name__}) may mix samples"
        if (reason := why_opaque(layer)) is not None:
            return f"{name or 'the module'} ({type(layer).__name__}): {reason}"
    return None
