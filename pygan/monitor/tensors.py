"""Norms of a network's tensors, and where NaN or infinity is in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def gradients(module: nn.Module) -> tuple[list[str], Tensor | None]:
    """Names of the parameters that have a gradient, and the norms of these, float32 ``[n]`` on the
    device (None without any)."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return [], None
    norms = torch._foreach_norm([grad.detach() for _, grad in named])
    return [name for name, _ in named], torch.stack([norm.float() for norm in norms])


def largest(module: nn.Module) -> Tensor:
    """Largest size of an element of any parameter or buffer, ``[]`` on the device: NaN or infinity
    exactly where one of these is."""
    found = [t.detach() for _, t in _tensors(module) if t.numel()]
    norms = torch._foreach_norm(found, float("inf"))
    return torch.stack([norm.float() for norm in norms]).sum()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"parameter {name}", parameter
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            yield f"buffer {name}", buffer


def _finite(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_finite(item) for item in value)
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _first_layer(module: nn.Module, x: Tensor) -> tuple[str | None, Tensor | None]:
    """The first layer whose output on ``x`` is not finite, and the output of the whole."""
    found: list[str] = []

    def look(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, inputs: object, output: object) -> None:
            if not found and not _finite(output):
                found.append(f"{name} ({type(layer).__name__})")

        handles.append(layer.register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    modes = [(m, m.training) for m in module.modules()]
    try:
        for name, layer in module.named_modules():
            if name and not any(layer.children()):
                look(name, layer)
        module.eval()
        with torch.no_grad():
            output = module(x)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes:
            part.training = mode
    return (found[0] if found else None), output if isinstance(output, Tensor) else None


def nonfinite(G: nn.Module, D: nn.Module, z: Tensor | None = None) -> str | None:
    """Where NaN or infinity is, in words, or None: the first parameter, buffer or gradient of D and
    G, and the first layer that puts it out for the latents ``z`` (in eval mode).

    Reads from the device: for when something is known to be wrong.
    """
    words = []
    for letter, module in (("G", G), ("D", D)):
        grads = ((f"gradient of {n}", p.grad) for n, p in module.named_parameters())
        for name, tensor in (*_tensors(module), *grads):
            if tensor is not None and not _finite(tensor):
                words.append(f"{name} of {letter}")
                break
    if z is not None:
        layer, fake = _first_layer(G, z)
        letter = "G"
        if layer is None and fake is not None:
            layer, letter = _first_layer(D, fake)[0], "D"
        if layer is not None:
            words.append(f"layer {layer} of {letter}")
    return ", ".join(words) or None
