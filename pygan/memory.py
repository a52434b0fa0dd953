"""Whether a training run can fit into memory, found out before it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pygan.data import memory
from pygan.errors import UserError
from pygan.models import Discriminator, Generator

_GIB = 2**30
# A parameter, its gradient and Adam's two moments, all float32.
_BYTES_PER_PARAMETER = 16


def _activations(network: nn.Module, input: Tensor) -> int:
    """Elements that a forward pass keeps for the backward pass: what convolutions and batch
    norms put out; activations work in place."""
    elements = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(input)
    return elements


def memory_needed(
    *, image_size: int, channels: int, batch_size: int, nz: int, ngf: int, ndf: int, amp: bool
) -> float:
    """Bytes that training a DCGAN cannot do without; infinite where sizes overflow.

    A lower bound, taken from the networks themselves without allocating them: parameters,
    gradients, Adam's moments, and the activations of G and of D on real and fake.
    """
    try:
        with torch.device("meta"):
            generator = Generator(image_size, channels, nz, ngf)
            discriminator = Discriminator(image_size, channels, ndf)
            z = torch.empty(batch_size, nz, 1, 1)
            images = torch.empty(batch_size, channels, image_size, image_size)
            elements = _activations(generator, z) + 2 * _activations(discriminator, images)
    except (RuntimeError, OverflowError):
        return float("inf")
    networks = (generator, discriminator)
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    return _BYTES_PER_PARAMETER * parameters + (2 if amp else 4) * elements


def memory_free(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = memory.available()
    return float("inf") if free is None else float(free)


def check_memory(
    device: torch.device, *, batch_size: int, ngf: int, ndf: int, **sizes: Any
) -> None:
    """Refuses a run that is sure not to fit.

    Raises:
        UserError: it needs more than is free; says how much.
    """
    needed = memory_needed(batch_size=batch_size, ngf=ngf, ndf=ndf, **sizes)
    free = memory_free(device)
    if needed > free:
        amount = f"{needed / _GIB:.1f} GiB" if needed < float("inf") else "more than any machine's"
        raise UserError(
            f"batch size {batch_size} with ngf {ngf}, ndf {ndf}, nz {sizes['nz']} and images of "
            f"{sizes['image_size']} pixels needs at least {amount} of memory, and "
            f"{free / _GIB:.1f} GiB are free; lower one of them"
        )
