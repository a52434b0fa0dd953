"""Image to image: pix2pix (Isola et al. 2017, section 6.1), CycleGAN (Zhu et al. 2017, section
7.2) and SRGAN (Ledig et al. 2017, figure 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UnetBlock(nn.Module):
    """Down, what lies inside, up; the outer layers get both. The LeakyReLU that leads down works
    in place, so what is concatenated is LeakyReLU(x)."""

    def __init__(
        self, outer: int, inner: int, inside: nn.Module | None, *, outermost: int = 0
    ) -> None:
        super().__init__()
        self.outermost = bool(outermost)
        down = nn.Conv2d(outer, inner, 4, 2, 1, bias=False)
        uprelu = nn.ReLU(True)
        layers: list[nn.Module]
        if outermost:
            assert inside is not None
            up = nn.ConvTranspose2d(inner * 2, outermost, 4, 2, 1)
            layers = [down, inside, uprelu, up, nn.Tanh()]
        elif inside is None:
            up = nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)
            layers = [nn.LeakyReLU(0.2, True), down, uprelu, up, nn.BatchNorm2d(outer)]
        else:
            up = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1, bias=False)
            layers = [nn.LeakyReLU(0.2, True), down, nn.BatchNorm2d(inner), inside]
            layers += [uprelu, up, nn.BatchNorm2d(outer), nn.Dropout(0.5)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


class UnetGenerator(nn.Module):
    def __init__(self, ngf: int = 8) -> None:
        super().__init__()
        inside: nn.Module = UnetBlock(ngf * 2, ngf * 2, None)
        inside = UnetBlock(ngf, ngf * 2, inside)
        self.model = UnetBlock(3, ngf, inside, outermost=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PatchDiscriminator(nn.Module):
    """Looks at input and output together; a map of logits."""

    def __init__(self, ndf: int = 8, norm: type[nn.Module] = nn.BatchNorm2d, cin: int = 6) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        self.model = nn.Sequential(
            nn.Conv2d(cin, ndf, 4, 2, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=bias),
            norm(ndf * 2),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf * 2, ndf * 2, 4, 1, 1, bias=bias),
            norm(ndf * 2),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf * 2, 1, 4, 1, 1),
        )

    def forward(self, image: Tensor, *condition: Tensor) -> Tensor:
        return self.model(torch.cat([*condition, image], 1))


class ResnetBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(dim, dim, 3),
            nn.InstanceNorm2d(dim),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(dim, dim, 3),
            nn.InstanceNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    def __init__(self, ngf: int = 4, n_blocks: int = 9) -> None:
        super().__init__()
        model: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, ngf, 7),
            nn.InstanceNorm2d(ngf),
            nn.ReLU(True),
        ]
        for mult in (1, 2):
            model += [
                nn.Conv2d(ngf * mult, ngf * mult * 2, 3, 2, 1),
                nn.InstanceNorm2d(ngf * mult * 2),
                nn.ReLU(True),
            ]
        model += [ResnetBlock(ngf * 4) for _ in range(n_blocks)]
        for mult in (4, 2):
            model += [
                nn.ConvTranspose2d(ngf * mult, ngf * mult // 2, 3, 2, 1, output_padding=1),
                nn.InstanceNorm2d(ngf * mult // 2),
                nn.ReLU(True),
            ]
        model += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*model)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class SRBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(residual))


class SRGenerator(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, channels, 9, padding=4), nn.PReLU())
        self.blocks = nn.Sequential(SRBlock(channels), SRBlock(channels))
        self.block7 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        )
        self.block8 = nn.Sequential(
            nn.Conv2d(channels, channels * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(),
            nn.Conv2d(channels, 3, 9, padding=4),
        )

    def forward(self, x: Tensor) -> Tensor:
        block1 = self.block1(x)
        block7 = self.block7(self.blocks(block1))
        return (torch.tanh(self.block8(block1 + block7)) + 1) / 2


class SRDiscriminator(nn.Module):
    def __init__(self, ndf: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, ndf, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, ndf, 3, stride=2, padding=1),
            nn.BatchNorm2d(ndf),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, ndf * 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(ndf * 2, ndf * 4, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf * 4, 1, 1),
        )

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x).view(x.size(0)))
