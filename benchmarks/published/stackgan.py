"""StackGAN (Zhang et al. 2017, figure 2): conditioning augmentation, a second stage that refines
the first, text embeddings spread over a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEXT, CONDITION = 12, 6


def up_block(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(cin, cout, 3, 1, 1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(True),
    )


class ResBlock(nn.Module):
    """The last ReLU works in place on the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        out += x
        return self.relu(out)


class Augmentation(nn.Module):
    """Mean and logarithm of the variance; the noise is an argument here, to compare two runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(TEXT, CONDITION * 2)
        self.relu = nn.ReLU()

    def forward(self, text: Tensor, noise: Tensor) -> Tensor:
        x = self.relu(self.fc(text))
        mu, logvar = x[:, :CONDITION], x[:, CONDITION:]
        return noise.mul(logvar.mul(0.5).exp()).add_(mu)


class Generator(nn.Module):
    """Both stages; returns a list of the images."""

    def __init__(self, nz: int = 8, ngf: int = 8) -> None:
        super().__init__()
        self.ca_net = Augmentation()
        self.fc = nn.Sequential(
            nn.Linear(nz + CONDITION, ngf * 2 * 16, bias=False),
            nn.BatchNorm1d(ngf * 2 * 16),
            nn.ReLU(True),
        )
        self.upsample = up_block(ngf * 2, ngf)
        self.img1 = nn.Sequential(nn.Conv2d(ngf, 3, 3, 1, 1, bias=False), nn.Tanh())
        self.encoder = nn.Sequential(
            nn.Conv2d(3, ngf, 3, 1, 1, bias=False),
            nn.ReLU(True),
            nn.Conv2d(ngf, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
        )
        self.hr_joint = nn.Sequential(
            nn.Conv2d(ngf * 2 + CONDITION, ngf * 2, 3, 1, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
        )
        self.residual = ResBlock(ngf * 2)
        self.upsample2 = nn.Sequential(up_block(ngf * 2, ngf), up_block(ngf, ngf))
        self.img2 = nn.Sequential(nn.Conv2d(ngf, 3, 3, 1, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor, text: Tensor, noise: Tensor) -> list[Tensor]:
        code = self.ca_net(text, noise)
        h = self.fc(torch.cat((z, code), 1)).view(z.shape[0], -1, 4, 4)
        first = self.img1(self.upsample(h))
        encoded = self.encoder(first)
        maps = code.view(-1, CONDITION, 1, 1).repeat(1, 1, *encoded.shape[2:])
        h = self.hr_joint(torch.cat([encoded, maps], 1))
        return [first, self.img2(self.upsample2(self.residual(h)))]


class Discriminator(nn.Module):
    def __init__(self, ndf: int = 8) -> None:
        super().__init__()
        self.encode_img = nn.Sequential(
            nn.Conv2d(3, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.get_cond_logits = nn.Sequential(
            nn.Conv2d(ndf * 2 + TEXT, ndf * 2, 3, 1, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 4, 4),
            nn.Sigmoid(),
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        encoded = self.encode_img(image)
        maps = text.view(-1, TEXT, 1, 1).repeat(1, 1, *encoded.shape[2:])
        return self.get_cond_logits(torch.cat((encoded, maps), 1)).view(-1)
