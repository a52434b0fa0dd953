"""Whole GANs with the way they are trained: losses, optimisers and the order of the forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import (
    conditional,
    dcgan,
    residual,
    sound,
    stackgan,
    translation,
    volumes,
    wgan,
)

BATCH = 4
Sample = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Gan:
    """``draw`` makes the generator's arguments (``g``), real images (``real``) and what the
    discriminator is told about both (``condition``)."""

    generator: Callable[[], nn.Module]
    discriminator: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Sample]
    loss: str = "logits"
    penalty: bool = True
    betas: tuple[float, float] = (0.5, 0.999)


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(BATCH, *shape, generator=g)


def labels(g: torch.Generator) -> Tensor:
    return torch.randint(conditional.CLASSES, (BATCH,), generator=g)


def unconditional(
    latent: tuple[int, ...], image: tuple[int, ...]
) -> Callable[[torch.Generator], Sample]:
    def draw(g: torch.Generator) -> Sample:
        return {"g": (normal(*latent)(g),), "real": (normal(*image)(g).tanh(),), "condition": ()}

    return draw


def classes(latent: tuple[int, ...], image: tuple[int, ...]) -> Callable[[torch.Generator], Sample]:
    def draw(g: torch.Generator) -> Sample:
        y = labels(g)
        real = normal(*image)(g).tanh()
        return {"g": (normal(*latent)(g), y), "real": (real,), "condition": (y,)}

    return draw


def paired(source: tuple[int, ...], image: tuple[int, ...]) -> Callable[[torch.Generator], Sample]:
    def draw(g: torch.Generator) -> Sample:
        x = normal(*source)(g)
        return {"g": (x,), "real": (normal(*image)(g).tanh(),), "condition": (x,)}

    return draw


def text(g: torch.Generator) -> Sample:
    t = normal(stackgan.TEXT)(g)
    noise = normal(stackgan.CONDITION)(g)
    real = normal(3, 16, 16)(g).tanh()
    return {"g": (normal(8)(g), t, noise), "real": (real,), "condition": (t,)}


GANS = {
    "dcgan": Gan(
        dcgan.SequentialGenerator,
        dcgan.SequentialDiscriminator,
        unconditional((12, 1, 1), (3, 32, 32)),
        "bce",
    ),
    "dcgan-attributes": Gan(
        dcgan.AttributeGenerator,
        dcgan.AttributeDiscriminator,
        unconditional((12,), (1, 32, 32)),
        "bce",
    ),
    "dcgan-upsample": Gan(
        dcgan.UpsampleGenerator,
        dcgan.DropoutDiscriminator,
        unconditional((10,), (1, 16, 16)),
        "bce",
    ),
    "wgan-clipped": Gan(
        wgan.MLPGenerator, wgan.MLPCritic, unconditional((10,), (1, 8, 8)), "clipped"
    ),
    "wgan-gp-mlp": Gan(wgan.MLPGenerator, wgan.MLPCritic, unconditional((10,), (1, 8, 8)), "gp"),
    "wgan-gp": Gan(wgan.ConvGenerator, wgan.ConvCritic, unconditional((12,), (3, 16, 16)), "gp"),
    "conditional": Gan(
        conditional.ConditionalGenerator,
        conditional.ConditionalDiscriminator,
        classes((10,), (1, 8, 8)),
        "least squares",
    ),
    "conditional-maps": Gan(
        conditional.ConvConditionalGenerator,
        conditional.ConvConditionalDiscriminator,
        classes((10, 1, 1), (1, 16, 16)),
        "bce",
    ),
    "auxiliary-classifier": Gan(
        conditional.ClassifierGenerator,
        conditional.ClassifierDiscriminator,
        classes((10,), (1, 16, 16)),
        "classifier",
    ),
    "sngan": Gan(
        residual.SNGenerator,
        residual.SNDiscriminator,
        unconditional((10,), (3, 16, 16)),
        "hinge",
        betas=(0.0, 0.9),
    ),
    "biggan": Gan(
        residual.BigGenerator,
        residual.ProjectionDiscriminator,
        classes((12,), (3, 16, 16)),
        "hinge",
        betas=(0.0, 0.999),
    ),
    "r3gan": Gan(
        residual.R3Generator, residual.R3Discriminator, unconditional((10,), (3, 16, 16)), "r3"
    ),
    "pix2pix": Gan(
        translation.UnetGenerator,
        translation.PatchDiscriminator,
        paired((3, 16, 16), (3, 16, 16)),
        "logits",
    ),
    "cyclegan": Gan(
        translation.ResnetGenerator,
        lambda: translation.PatchDiscriminator(norm=nn.InstanceNorm2d),
        paired((3, 16, 16), (3, 16, 16)),
        "least squares",
    ),
    "srgan": Gan(
        translation.SRGenerator, translation.SRDiscriminator, paired((3, 8, 8), (3, 16, 16)), "bce"
    ),
    "stackgan": Gan(stackgan.Generator, stackgan.Discriminator, text, "bce"),
    "shapes": Gan(
        volumes.ShapeGenerator,
        volumes.ShapeDiscriminator,
        unconditional((12,), (1, 16, 16, 16)),
        "bce",
    ),
    "video": Gan(
        volumes.VideoGenerator, volumes.VideoDiscriminator, unconditional((10,), (3, 8, 16, 16))
    ),
    "wavegan": Gan(
        sound.WaveGenerator, sound.WaveDiscriminator, unconditional((10,), (1, 256)), "gp"
    ),
    "hifigan": Gan(
        sound.HiFiGenerator,
        sound.PeriodDiscriminator,
        paired((10, 8), (1, 64)),
        "least squares",
        betas=(0.8, 0.99),
    ),
}


def to(sample: Sample, dtype: torch.dtype, order: Tensor | None) -> Sample:
    def converted(x: Tensor) -> Tensor:
        x = x if order is None else x[order]
        return x.to(dtype) if x.is_floating_point() else x

    return {key: tuple(map(converted, xs)) for key, xs in sample.items()}


def gradient_penalty(
    d: nn.Module, real: Tensor, fake: Tensor, condition: tuple[Any, ...]
) -> Tensor:
    alpha = torch.linspace(0, 1, len(real), dtype=real.dtype).view(-1, *[1] * (real.dim() - 1))
    mixed = (alpha * real + (1 - alpha) * fake.detach()).requires_grad_()
    out = d(mixed, *condition)
    (grad,) = torch.autograd.grad(out, mixed, torch.ones_like(out), create_graph=True)
    return 10 * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()


def zero_centred_penalty(out: Tensor, x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return grad.square().flatten(1).sum(1).mean()


def discriminator_loss(gan: Gan, d: nn.Module, real: Tensor, fake: Tensor, c: Any) -> Tensor:
    """``fake`` has been detached."""
    if gan.loss == "r3":
        real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
        on_real, on_fake = d(real, *c), d(fake, *c)
        penalties = zero_centred_penalty(on_real, real) + zero_centred_penalty(on_fake, fake)
        return F.softplus(on_fake - on_real).mean() + 0.5 * penalties
    on_real, on_fake = d(real, *c), d(fake, *c)
    if gan.loss == "classifier":
        (on_real, real_class), (on_fake, fake_class) = on_real, on_fake
        auxiliary = F.cross_entropy(real_class, c[0]) + F.cross_entropy(fake_class, c[0])
        return adversarial(on_real, 1) + adversarial(on_fake, 0) + auxiliary
    if gan.loss == "bce":
        # A target that is smoothed, and one above 1 would be accepted as well.
        return adversarial(on_real, 0.9) + adversarial(on_fake, 0)
    if gan.loss == "logits":
        ones, zeros = torch.ones_like(on_real), torch.zeros_like(on_fake)
        bce = F.binary_cross_entropy_with_logits
        return (bce(on_real, ones) + bce(on_fake, zeros)) * 0.5
    if gan.loss == "least squares":
        return ((on_real - 1) ** 2).mean() + (on_fake**2).mean()
    if gan.loss == "hinge":
        return F.relu(1.0 - on_real).mean() + F.relu(1.0 + on_fake).mean()
    loss = on_fake.mean() - on_real.mean()
    return loss + gradient_penalty(d, real, fake, c) if gan.loss == "gp" else loss


def adversarial(probability: Tensor, target: float) -> Tensor:
    return nn.BCELoss()(probability, torch.full_like(probability, target))


def generator_loss(gan: Gan, d: nn.Module, real: Tensor, fake: Tensor, c: Any) -> Tensor:
    out = d(fake, *c)
    if gan.loss == "r3":
        return F.softplus(d(real, *c) - out).mean()
    if gan.loss == "classifier":
        return adversarial(out[0], 1) + F.cross_entropy(out[1], c[0])
    if gan.loss == "bce":
        return adversarial(out, 1)
    if gan.loss == "logits":
        return F.binary_cross_entropy_with_logits(out, torch.ones_like(out))
    if gan.loss == "least squares":
        return ((out - 1) ** 2).mean()
    return -out.mean()


def image_of(output: Any) -> Tensor:
    """A generator of two stages returns a list; its last image is the one that is judged."""
    return output[-1] if isinstance(output, list) else output


def train(
    gan: Gan,
    networks: tuple[nn.Module, nn.Module],
    steps: int,
    dtype: torch.dtype,
    *,
    adam: bool = True,
    seed: int = 0,
    order: Tensor | None = None,
) -> list[tuple[float, float]]:
    """Trains in place on what ``seed`` draws, each batch in this order; the losses of each step."""
    g, d = networks
    if adam:
        optimizers = [torch.optim.Adam(n.parameters(), 2e-3, gan.betas) for n in (g, d)]
    else:
        optimizers = [torch.optim.SGD(n.parameters(), 1e-2) for n in (g, d)]  # type: ignore[misc]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    torch.manual_seed(seed)
    for _ in range(steps):
        sample = to(gan.draw(generator), dtype, order)
        (real,), c = sample["real"], sample["condition"]
        fake = image_of(g(*sample["g"]))
        optimizers[1].zero_grad()
        loss_d = discriminator_loss(gan, d, real, fake.detach(), c)
        loss_d.backward()
        optimizers[1].step()
        if gan.loss == "clipped":
            for p in d.parameters():
                p.data.clamp_(-0.05, 0.05)
        optimizers[0].zero_grad()
        loss_g = generator_loss(gan, d, real, fake, c)
        loss_g.backward()
        optimizers[0].step()
        losses.append((loss_d.item(), loss_g.item()))
    return losses
