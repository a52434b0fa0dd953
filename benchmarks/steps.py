"""One D+G update, written the ways people write it: the peers of the training step.

The order is the same everywhere: D on the real batch, D on the fake batch, D's optimizer, D on the
same fake batch with its new weights, G's optimizer. Batch norm sees real and fake apart. Nothing
is read back inside a step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adam(NamedTuple):
    """Settings of Adam; the defaults are those of DCGAN."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8


DCGAN_ADAM = Adam()


class Losses(NamedTuple):
    """Losses and mean probabilities of one update, as 0-d tensors on the device."""

    loss_d: Tensor
    loss_g: Tensor
    d_real: Tensor
    d_fake: Tensor
    d_fake_after: Tensor


@dataclass
class Networks:
    """Generator and discriminator with their optimizers."""

    generator: nn.Module
    discriminator: nn.Module
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer


@dataclass(frozen=True)
class Writing:
    """How a loop is written.

    ``by_hand``: what an expert adds by hand: D's weight gradients off in the G step, fused Adam.
    ``bf16``: the forward passes under autocast.
    """

    channels_last: bool = False
    by_hand: bool = False
    bf16: bool = False


def networks(
    models: tuple[nn.Module, nn.Module],
    device: torch.device,
    *,
    channels_last: bool = False,
    fused_adam: bool = False,
    dtype: torch.dtype = torch.float32,
    adam: Adam = DCGAN_ADAM,
) -> Networks:
    """Copies of ``models`` on ``device`` with their optimizers.

    On a GPU a fused Adam may be part of a CUDA graph.
    """
    layout = torch.channels_last if channels_last else torch.preserve_format
    generator, discriminator = (
        copy.deepcopy(model).to(device=device, dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]
        for model in models
    )
    opt_g, opt_d = (
        torch.optim.Adam(
            model.parameters(),
            **adam._asdict(),
            fused=fused_adam or None,
            capturable=fused_adam and device.type == "cuda",
        )
        for model in (generator, discriminator)
    )
    return Networks(generator, discriminator, opt_g, opt_d)


class EagerStep:
    """The DCGAN loop in eager PyTorch. ``step(real, z=None) -> Losses``.

    ``real [N, C, H, W]``, float in [-1, 1]; ``z [N, nz, 1, 1]``, drawn when not given.
    """

    def __init__(self, nets: Networks, nz: int, writing: Writing) -> None:
        self.nets = nets
        self.nz = nz
        self.writing = writing

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.writing.bf16)

    def step(self, real: Tensor, z: Tensor | None = None) -> Losses:
        generator, discriminator = self.nets.generator, self.nets.discriminator
        if self.writing.channels_last:
            real = real.to(memory_format=torch.channels_last)
        if z is None:
            z = torch.randn(real.shape[0], self.nz, 1, 1, device=real.device)

        discriminator.zero_grad()
        with self._autocast(real.device):
            logits = discriminator(real)
            loss_real = _bce(logits, 1.0)
        loss_real.backward()
        d_real = torch.sigmoid(logits.detach()).mean()

        with self._autocast(real.device):
            fake = generator(z)
            logits = discriminator(fake.detach())
            loss_fake = _bce(logits, 0.0)
        loss_fake.backward()
        d_fake = torch.sigmoid(logits.detach()).mean()
        self.nets.opt_d.step()

        generator.zero_grad()
        if self.writing.by_hand:
            discriminator.requires_grad_(False)
        with self._autocast(real.device):
            logits = discriminator(fake)
            loss_g = _bce(logits, 1.0)
        loss_g.backward()
        if self.writing.by_hand:
            discriminator.requires_grad_(True)
        d_fake_after = torch.sigmoid(logits.detach()).mean()
        self.nets.opt_g.step()
        loss_d = loss_real.detach() + loss_fake.detach()
        return Losses(loss_d, loss_g.detach(), d_real, d_fake, d_fake_after)


def _bce(logits: Tensor, target: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
