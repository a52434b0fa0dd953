"""Residual GANs: SNGAN (Miyato et al. 2018, table 4), BigGAN (Brock et al. 2019, figure 15) and
R3GAN (Huang et al. 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

CLASSES = 5


class SNGenBlock(nn.Module):
    """Pre-activation: batch norm, ReLU in place, nearest upsampling, convolution."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.activation = nn.ReLU(True)
        self.b1 = nn.BatchNorm2d(cin)
        self.c1 = nn.Conv2d(cin, cout, 3, 1, 1)
        self.b2 = nn.BatchNorm2d(cout)
        self.c2 = nn.Conv2d(cout, cout, 3, 1, 1)
        self.c_sc = nn.Conv2d(cin, cout, 1)

    def residual(self, x: Tensor) -> Tensor:
        h = self.activation(self.b1(x))
        h = self.c1(F.interpolate(h, scale_factor=2))
        return self.c2(self.activation(self.b2(h)))

    def shortcut(self, x: Tensor) -> Tensor:
        return self.c_sc(F.interpolate(x, scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class SNGenerator(nn.Module):
    def __init__(self, nz: int = 10, ngf: int = 12, last: int = 8) -> None:
        super().__init__()
        self.l1 = nn.Linear(nz, 4 * 4 * ngf)
        self.block2 = SNGenBlock(ngf, ngf)
        self.block3 = SNGenBlock(ngf, last)
        self.b5 = nn.BatchNorm2d(last)
        self.c5 = nn.Conv2d(last, 3, 3, 1, 1)
        self.activation = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l1(x)
        h = self.block3(self.block2(h.view(x.shape[0], -1, 4, 4)))
        h = self.activation(self.b5(h))
        return torch.tanh(self.c5(h))


class SNDisBlock(nn.Module):
    """Its first ReLU works in place on the block's input: the shortcut reads ReLU(x)."""

    def __init__(self, cin: int, cout: int, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.activation = nn.ReLU(True)
        self.c1 = spectral_norm(nn.Conv2d(cin, cout, 3, 1, 1))
        self.c2 = spectral_norm(nn.Conv2d(cout, cout, 3, 1, 1))
        self.c_sc = spectral_norm(nn.Conv2d(cin, cout, 1, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(x)
        h = self.c2(self.activation(self.c1(h)))
        shortcut = self.c_sc(x)
        if self.downsample:
            return F.avg_pool2d(h, 2) + F.avg_pool2d(shortcut, 2)
        return h + shortcut


class SNFirstBlock(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            spectral_norm(nn.Conv2d(cin, cout, 3, 1, 1)),
            nn.ReLU(inplace=True),
            spectral_norm(nn.Conv2d(cout, cout, 3, 1, 1)),
            nn.AvgPool2d(2),
        )
        self.bypass = nn.Sequential(nn.AvgPool2d(2), spectral_norm(nn.Conv2d(cin, cout, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.bypass(x)


class SNDiscriminator(nn.Module):
    def __init__(self, ndf: int = 8) -> None:
        super().__init__()
        self.block1 = SNFirstBlock(3, ndf)
        self.block2 = SNDisBlock(ndf, ndf, downsample=True)
        self.block3 = SNDisBlock(ndf, ndf, downsample=False)
        self.l5 = spectral_norm(nn.Linear(ndf, 1))
        self.activation = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block3(self.block2(self.block1(x)))
        h = self.activation(h)
        return self.l5(torch.sum(h, dim=(2, 3))).view(-1)


class ConditionalNorm(nn.Module):
    """Batch norm whose gain and bias come from the class and the latent."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
        self.gain = parametrizations.spectral_norm(nn.Linear(inputs, channels, bias=False))
        self.bias = parametrizations.spectral_norm(nn.Linear(inputs, channels, bias=False))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain = (1 + self.gain(y)).view(y.size(0), -1, 1, 1)
        bias = self.bias(y).view(y.size(0), -1, 1, 1)
        return self.bn(x) * gain + bias


class BigGenBlock(nn.Module):
    def __init__(self, cin: int, cout: int, inputs: int) -> None:
        super().__init__()
        conv = parametrizations.spectral_norm
        self.bn1, self.bn2 = ConditionalNorm(cin, inputs), ConditionalNorm(cout, inputs)
        self.conv1 = conv(nn.Conv2d(cin, cout, 3, padding=1))
        self.conv2 = conv(nn.Conv2d(cout, cout, 3, padding=1))
        self.conv_sc = conv(nn.Conv2d(cin, cout, 1))
        self.activation = nn.ReLU(inplace=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.activation(self.bn1(x, y))
        h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
        h = self.activation(self.bn2(self.conv1(h), y))
        return self.conv2(h) + self.conv_sc(x)


class BigGenerator(nn.Module):
    """The latent is split: a part for each block, beside the class."""

    def __init__(self, nz: int = 12, ch: int = 8) -> None:
        super().__init__()
        self.shared = nn.Embedding(CLASSES, 4)
        self.linear = parametrizations.spectral_norm(nn.Linear(4, 16 * ch))
        self.blocks = nn.ModuleList([BigGenBlock(ch, ch, 8) for _ in range(2)])
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(ch),
            nn.ReLU(inplace=True),
            parametrizations.spectral_norm(nn.Conv2d(ch, 3, 3, padding=1)),
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        y = self.shared(labels)
        parts = torch.split(z, 4, 1)
        h = self.linear(parts[0]).view(z.size(0), -1, 4, 4)
        for part, block in zip(parts[1:], self.blocks, strict=True):
            h = block(h, torch.cat([y, part], 1))
        return torch.tanh(self.output_layer(h))


class ProjectionDiscriminator(nn.Module):
    def __init__(self, ch: int = 8) -> None:
        super().__init__()
        self.block1 = SNFirstBlock(3, ch)
        self.block2 = SNDisBlock(ch, ch, downsample=True)
        self.linear = spectral_norm(nn.Linear(ch, 1))
        self.embed = spectral_norm(nn.Embedding(CLASSES, ch))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = torch.sum(F.relu(self.block2(self.block1(x))), [2, 3])
        return (self.linear(h) + torch.sum(self.embed(labels) * h, 1, keepdim=True))[:, 0]


class R3Block(nn.Module):
    """1x1, grouped 3x3, 1x1; no norm; leaky ReLU with a gain before each of the latter two."""

    def __init__(self, channels: int, group_size: int = 4) -> None:
        super().__init__()
        wide = 2 * channels
        self.linear1 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bias1 = nn.Parameter(torch.zeros(wide))
        self.linear2 = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide // group_size, bias=False)
        self.bias2 = nn.Parameter(torch.zeros(wide))
        self.linear3 = nn.Conv2d(wide, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gain = (2 / (1 + 0.2**2)) ** 0.5
        y = self.linear1(x) + self.bias1.view(1, -1, 1, 1)
        y = self.linear2(F.leaky_relu(y, 0.2) * gain) + self.bias2.view(1, -1, 1, 1)
        return x + self.linear3(F.leaky_relu(y, 0.2) * gain)


class R3Generator(nn.Module):
    def __init__(self, nz: int = 10, ch: int = 8) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(ch, 4, 4))
        self.linear = nn.Linear(nz, ch, bias=False)
        self.main = nn.ModuleList([R3Block(ch), R3Block(ch)])
        self.out = nn.Conv2d(ch, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.basis.view(1, -1, 4, 4) * self.linear(z).view(z.shape[0], -1, 1, 1)
        for block in self.main:
            up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(up)
        return self.out(x)


class R3Discriminator(nn.Module):
    def __init__(self, ch: int = 8) -> None:
        super().__init__()
        self.extract = nn.Conv2d(3, ch, 1)
        self.main = nn.ModuleList([R3Block(ch), R3Block(ch)])
        self.basis = nn.Conv2d(ch, ch, 4, groups=ch, bias=False)
        self.linear = nn.Linear(ch, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.extract(x)
        for block in self.main:
            x = F.avg_pool2d(block(x), 2)
        return self.linear(self.basis(x).view(x.shape[0], -1)).view(x.shape[0])
