"""3-D GAN (Wu et al. 2016, figure 1) and the two-stream video GAN (Vondrick et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def up3d(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose3d(cin, cout, kernel_size=4, stride=2, bias=False, padding=1),
        nn.BatchNorm3d(cout),
        nn.ReLU(),
    )


class ShapeGenerator(nn.Module):
    def __init__(self, nz: int = 12, d: int = 4) -> None:
        super().__init__()
        self.nz = nz
        self.layer1 = nn.Sequential(
            nn.ConvTranspose3d(nz, d * 4, 4, 2, 0, bias=False), nn.BatchNorm3d(d * 4), nn.ReLU()
        )
        self.layer2 = up3d(d * 4, d * 2)
        self.layer3 = nn.Sequential(nn.ConvTranspose3d(d * 2, 1, 4, 2, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = x.view(-1, self.nz, 1, 1, 1)
        return self.layer3(self.layer2(self.layer1(out)))


class ShapeDiscriminator(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(
            nn.Conv3d(1, d, 4, 2, 1, bias=False), nn.BatchNorm3d(d), nn.LeakyReLU(0.2)
        )
        self.layer2 = nn.Sequential(
            nn.Conv3d(d, d * 2, 4, 2, 1, bias=False), nn.BatchNorm3d(d * 2), nn.LeakyReLU(0.2)
        )
        self.layer3 = nn.Sequential(nn.Conv3d(d * 2, 1, 4, 2, 0, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = x.view(-1, 1, 16, 16, 16)
        return self.layer3(self.layer2(self.layer1(out))).view(-1)


class VideoGenerator(nn.Module):
    """A still background and a moving foreground, mixed by a mask."""

    def __init__(self, nz: int = 10, d: int = 4) -> None:
        super().__init__()
        self.foreground = nn.Sequential(
            nn.ConvTranspose3d(nz, d * 4, (2, 4, 4)),
            nn.BatchNorm3d(d * 4),
            nn.ReLU(True),
            nn.ConvTranspose3d(d * 4, d * 2, 4, 2, 1),
            nn.BatchNorm3d(d * 2),
            nn.ReLU(True),
        )
        self.frames = nn.Sequential(nn.ConvTranspose3d(d * 2, 3, 4, 2, 1), nn.Tanh())
        self.mask = nn.Sequential(nn.ConvTranspose3d(d * 2, 1, 4, 2, 1), nn.Sigmoid())
        self.background = nn.Sequential(
            nn.ConvTranspose2d(nz, d * 4, 4, 1, 0),
            nn.BatchNorm2d(d * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(d * 4, d * 2, 4, 2, 1),
            nn.BatchNorm2d(d * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(d * 2, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        h = self.foreground(z[:, :, None, None, None])
        mask = self.mask(h)
        still = self.background(z[:, :, None, None]).unsqueeze(2).expand(-1, -1, 8, -1, -1)
        return mask * self.frames(h) + (1 - mask) * still


class VideoDiscriminator(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv3d(3, d, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv3d(d, d * 2, 4, 2, 1),
            nn.BatchNorm3d(d * 2, 1e-3),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.linear = nn.Linear(d * 2 * 2 * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.model(x), 1))[:, 0]
