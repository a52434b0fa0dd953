"""Networks of other people's GAN code, written as their scripts write them, from the published
tables: containers, attributes, functions, in-place activations.

DCGAN is :mod:`pygan.models`' (Radford et al. 2016). ``upsample32`` is the tutorial form of it with
nearest upsampling, batch norm of eps 0.8, and a discriminator of 3x3 convolutions of stride 2 with
channel dropout. ``resnet32`` is SNGAN's residual pair (Miyato et al. 2018, table 4) with spectral
norm as a hook. ``pix2pix256`` is the U-Net of eight levels and the 70x70 PatchGAN (Isola et al.
2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from pygan.models import dcgan


class UpsampleGenerator(nn.Module):
    """``[N, 100]`` to ``[N, 3, 32, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(100, 128 * 8 * 8)
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, stride=1, padding=1),
            nn.BatchNorm2d(128, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, stride=1, padding=1),
            nn.BatchNorm2d(64, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, 3, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        out = self.l1(z)
        return self.conv_blocks(out.view(out.shape[0], 128, 8, 8))


class UpsampleDiscriminator(nn.Module):
    """``[N, 3, 32, 32]`` to ``[N, 1]``."""

    def __init__(self) -> None:
        super().__init__()

        def block(given: int, made: int, norm: bool = True) -> list[nn.Module]:
            layers: list[nn.Module] = [
                nn.Conv2d(given, made, 3, 2, 1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(0.25),
            ]
            return [*layers, nn.BatchNorm2d(made, 0.8)] if norm else layers

        self.model = nn.Sequential(
            *block(3, 16, norm=False), *block(16, 32), *block(32, 64), *block(64, 128)
        )
        self.adv_layer = nn.Sequential(nn.Linear(128 * 2 * 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        out = self.model(image)
        return self.adv_layer(torch.flatten(out, 1))


class GeneratorBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.b1 = nn.BatchNorm2d(channels)
        self.c1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.b2 = nn.BatchNorm2d(channels)
        self.c2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.c_sc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.b1(x)), scale_factor=2)
        h = self.c2(F.relu(self.b2(self.c1(h))))
        return h + self.c_sc(F.interpolate(x, scale_factor=2))


class ResidualGenerator(nn.Module):
    """``[N, 128]`` to ``[N, 3, 32, 32]``."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.l1 = nn.Linear(128, 4 * 4 * channels)
        self.block2 = GeneratorBlock(channels)
        self.block3 = GeneratorBlock(channels)
        self.block4 = GeneratorBlock(channels)
        self.b5 = nn.BatchNorm2d(channels)
        self.c5 = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.l1(z).view(z.shape[0], self.channels, 4, 4)
        h = self.block4(self.block3(self.block2(h)))
        return torch.tanh(self.c5(F.relu(self.b5(h))))


class FirstBlock(nn.Module):
    """Of the discriminator: no activation before its first convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1 = spectral_norm(nn.Conv2d(3, channels, 3, 1, 1))
        self.c2 = spectral_norm(nn.Conv2d(channels, channels, 3, 1, 1))
        self.c_sc = spectral_norm(nn.Conv2d(3, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.c2(F.relu(self.c1(x))), 2)
        return h + self.c_sc(F.avg_pool2d(x, 2))


class DiscriminatorBlock(nn.Module):
    def __init__(self, channels: int, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.c1 = spectral_norm(nn.Conv2d(channels, channels, 3, 1, 1))
        self.c2 = spectral_norm(nn.Conv2d(channels, channels, 3, 1, 1))
        if downsample:
            self.c_sc = spectral_norm(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.c2(F.relu(self.c1(F.relu(x))))
        if self.downsample:
            return F.avg_pool2d(h, 2) + F.avg_pool2d(self.c_sc(x), 2)
        return h + x


class ResidualDiscriminator(nn.Module):
    """``[N, 3, 32, 32]`` to ``[N, 1]``."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.block1 = FirstBlock(channels)
        self.block2 = DiscriminatorBlock(channels, downsample=True)
        self.block3 = DiscriminatorBlock(channels, downsample=False)
        self.block4 = DiscriminatorBlock(channels, downsample=False)
        self.l5 = spectral_norm(nn.Linear(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.block4(self.block3(self.block2(self.block1(x))))
        return self.l5(F.relu(h).sum((2, 3)))


class UNetBlock(nn.Module):
    """A level of the U-Net around the deeper ones, with its shortcut."""

    def __init__(
        self,
        outer: int,
        inner: int,
        submodule: nn.Module | None = None,
        *,
        outermost: bool = False,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.outermost = outermost
        down: list[nn.Module] = [nn.Conv2d(outer, inner, 4, 2, 1, bias=False)]
        if not outermost:
            down.insert(0, nn.LeakyReLU(0.2, True))
            if submodule is not None:
                down.append(nn.BatchNorm2d(inner))
        given = inner if submodule is None else 2 * inner
        up: list[nn.Module] = [
            nn.ReLU(True),
            nn.ConvTranspose2d(given, outer, 4, 2, 1, bias=outermost),
            nn.Tanh() if outermost else nn.BatchNorm2d(outer),
        ]
        if dropout:
            up.append(nn.Dropout(0.5))
        middle = [] if submodule is None else [submodule]
        self.model = nn.Sequential(*down, *middle, *up)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def unet256(ngf: int = 64) -> nn.Module:
    """``[N, 3, 256, 256]`` to the same shape."""
    block = UNetBlock(8 * ngf, 8 * ngf)
    for _ in range(3):
        block = UNetBlock(8 * ngf, 8 * ngf, block, dropout=True)
    for outer, inner in ((4, 8), (2, 4), (1, 2)):
        block = UNetBlock(outer * ngf, inner * ngf, block)
    return UNetBlock(3, ngf, block, outermost=True)


def patch_discriminator(ndf: int = 64) -> nn.Module:
    """``[N, 6, 256, 256]``, input and output of the U-Net, to ``[N, 1, 30, 30]``."""
    layers: list[nn.Module] = [nn.Conv2d(6, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for given, made, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
        layers += [
            nn.Conv2d(ndf * given, ndf * made, 4, stride, 1, bias=False),
            nn.BatchNorm2d(ndf * made),
            nn.LeakyReLU(0.2, True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))


class Networks(NamedTuple):
    """A pair, and the shapes that each takes."""

    make: Callable[[], tuple[nn.Module, nn.Module]]
    latent: tuple[int, ...]
    image: tuple[int, ...]
    batch: int


NETWORKS = {
    "dcgan64": Networks(lambda: dcgan(), (100, 1, 1), (3, 64, 64), 64),
    "upsample32": Networks(
        lambda: (UpsampleGenerator(), UpsampleDiscriminator()), (100,), (3, 32, 32), 64
    ),
    "resnet32": Networks(
        lambda: (ResidualGenerator(), ResidualDiscriminator()), (128,), (3, 32, 32), 64
    ),
    "pix2pix256": Networks(
        lambda: (unet256(), patch_discriminator()), (3, 256, 256), (6, 256, 256), 1
    ),
}
