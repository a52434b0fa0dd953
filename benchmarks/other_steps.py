"""One update of D and of G for networks and losses beside DCGAN's, as scripts write them.

The order is that of `benchmarks.steps`. ``upsample32``, ``resnet32`` and ``pix2pix256`` are the
networks of `benchmarks.dropin_networks` with their losses: of logits; hinge (Miyato et al. 2018);
conditional, with 100 times the L1 distance for G (Isola et al. 2017). ``wgan-gp32`` is DCGAN's
generator with a critic of three strided convolutions without norm, and the gradient penalty of
weight 10 (Gulrajani et al. 2017), here with one update of the critic for one of the generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.dropin_networks import (
    NETWORKS,
    ResidualDiscriminator,
    ResidualGenerator,
    patch_discriminator,
    unet256,
)
from benchmarks.same_update import Models
from benchmarks.steps import Adam, Losses, Networks, Writing
from pygan.models import dcgan

L1_WEIGHT = 100.0
PENALTY_WEIGHT = 10.0


def bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


class Game(NamedTuple):
    """What is trained against what.

    ``d_loss(D, real, fake, z)`` gives D's loss and its logits of real and of fake, ``g_loss(D,
    real, fake, z)`` G's loss and the logits. ``step_loss`` is what `pygan.AdversarialStep` calls
    this, None where it has no such update. ``seen`` is what D takes, ``penalties`` how often it is
    differentiated twice. ``make_narrow`` makes fewer channels, for the check, where five updates in
    float64 of the whole networks would take minutes. ``kinks`` counts the activations of a layer of
    ``check_batch`` images whose jumps decide how far rounding carries.
    """

    make: Callable[[], Models]
    latent: tuple[int, ...]
    image: tuple[int, int, int]
    batch: int
    adam: Adam
    d_loss: Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    g_loss: Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    step_loss: str | None
    check_batch: int
    kinks: int
    seen: tuple[int, int, int] = (3, 32, 32)
    penalties: int = 0
    make_narrow: Callable[[], Models] | None = None

    def real(self, batch: int, generator: torch.Generator) -> Tensor:
        """Images ``[N, C, H, W]`` in [-1, 1]."""
        return torch.rand(batch, *self.image, generator=generator) * 2 - 1

    def drawn(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """What G is given: latents, or images to translate."""
        return torch.randn(batch, *self.latent, generator=generator)


class GameStep:
    """The update in eager torch: ``step(real, z) -> Losses``."""

    def __init__(self, nets: Networks, game: Game, writing: Writing) -> None:
        self.nets, self.game, self.writing = nets, game, writing

    def step(self, real: Tensor, z: Tensor) -> Losses:
        nets, game, writing = self.nets, self.game, self.writing
        if writing.channels_last:
            real = real.to(memory_format=torch.channels_last)
        autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=writing.bf16)
        with autocast:
            fake = nets.generator(z)

        nets.opt_d.zero_grad()
        with autocast:
            loss_d, of_real, of_fake = game.d_loss(nets.discriminator, real, fake.detach(), z)
        loss_d.backward()
        nets.opt_d.step()

        nets.opt_g.zero_grad()
        if writing.by_hand:
            nets.discriminator.requires_grad_(False)
        with autocast:
            loss_g, after = game.g_loss(nets.discriminator, real, fake, z)
        loss_g.backward()
        if writing.by_hand:
            nets.discriminator.requires_grad_(True)
        nets.opt_g.step()
        means = (torch.sigmoid(t.detach()).mean() for t in (of_real, of_fake, after))
        return Losses(loss_d.detach(), loss_g.detach(), *means)


def _logits(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _bce_d(
    network: nn.Module, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_real, of_fake = _logits(network(real)), _logits(network(fake))
    return bce(of_real, 1.0) + bce(of_fake, 0.0), of_real, of_fake


def _bce_g(network: nn.Module, real: Tensor, fake: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(network(fake))
    return bce(logits, 1.0), logits


def _hinge_d(
    network: nn.Module, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_real, of_fake = _logits(network(real)), _logits(network(fake))
    return F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean(), of_real, of_fake


def _score_g(network: nn.Module, real: Tensor, fake: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(network(fake))
    return -logits.mean(), logits


def _pairs_d(
    network: nn.Module, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_fake = _logits(network(torch.cat([z, fake], 1)))
    of_real = _logits(network(torch.cat([z, real], 1)))
    return 0.5 * (bce(of_fake, 0.0) + bce(of_real, 1.0)), of_real, of_fake


def _pairs_g(network: nn.Module, real: Tensor, fake: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(network(torch.cat([z, fake], 1)))
    return bce(logits, 1.0) + L1_WEIGHT * F.l1_loss(fake, real), logits


def _penalty_d(
    network: nn.Module, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_real, of_fake = network(real), network(fake)
    share = torch.rand(real.shape[0], 1, 1, 1, device=real.device).to(real.dtype)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(network(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return of_fake.mean() - of_real.mean() + PENALTY_WEIGHT * penalty, of_real, of_fake


class Critic(nn.Sequential):
    """``[N, 3, 32, 32]`` to ``[N, 1, 1, 1]``."""

    def __init__(self, ndf: int = 64) -> None:
        super().__init__(
            nn.Conv2d(3, ndf, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, 2 * ndf, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * ndf, 4 * ndf, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(4 * ndf, 1, 4, 1, 0),
        )


def _wgan() -> Models:
    return dcgan(image_size=32, channels=3)[0], Critic()


SLOW_ADAM = Adam(lr=2e-4, betas=(0.0, 0.9))

GAMES = {
    "upsample32": Game(
        NETWORKS["upsample32"].make, (100,), (3, 32, 32), 64, Adam(),
        _bce_d, _bce_g, "bce", 16, 16 * 128 * 4,
    ),
    "resnet32": Game(
        NETWORKS["resnet32"].make, (128,), (3, 32, 32), 16, SLOW_ADAM,
        _hinge_d, _score_g, "hinge", 4, 4 * 32 * 64,
        make_narrow=lambda: (ResidualGenerator(64), ResidualDiscriminator(32)),
    ),
    "pix2pix256": Game(
        NETWORKS["pix2pix256"].make, (3, 256, 256), (3, 256, 256), 1, Adam(),
        _pairs_d, _pairs_g, None, 1, 64 * 32 * 32, seen=(6, 256, 256),
        make_narrow=lambda: (unet256(16), patch_discriminator(16)),
    ),
    "wgan-gp32": Game(
        _wgan, (100, 1, 1), (3, 32, 32), 64, SLOW_ADAM,
        _penalty_d, _score_g, None, 16, 16 * 256 * 16, penalties=1,
    ),
}  # fmt: skip
