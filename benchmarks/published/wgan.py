"""WGAN with clipped weights and with a gradient penalty (Gulrajani et al. 2017): MLPs and
convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLPGenerator(nn.Module):
    def __init__(
        self, latent_dim: int = 10, shape: tuple[int, ...] = (1, 8, 8), width: int = 16
    ) -> None:
        super().__init__()
        self.shape = shape

        def block(cin: int, cout: int, normalize: bool = True) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Linear(cin, cout)]
            if normalize:
                layers.append(nn.BatchNorm1d(cout, 0.8))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim, width, normalize=False),
            *block(width, 2 * width),
            *block(2 * width, 3 * width),
            nn.Linear(3 * width, shape[0] * shape[1] * shape[2]),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        img = self.model(z)
        return img.view(img.shape[0], *self.shape)


class MLPCritic(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (1, 8, 8), width: int = 24) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(shape[0] * shape[1] * shape[2], 2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(2 * width, width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(width, 1),
        )

    def forward(self, img: Tensor) -> Tensor:
        return self.model(img.view(img.shape[0], -1))[:, 0]


class ConvGenerator(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.preprocess = nn.Sequential(
            nn.Linear(12, 16 * 2 * dim), nn.BatchNorm1d(16 * 2 * dim), nn.ReLU(True)
        )
        self.block1 = nn.Sequential(
            nn.ConvTranspose2d(2 * dim, dim, 2, stride=2), nn.BatchNorm2d(dim), nn.ReLU(True)
        )
        self.deconv_out = nn.ConvTranspose2d(dim, 3, 2, stride=2)
        self.tanh = nn.Tanh()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        output = self.preprocess(input)
        output = output.view(-1, 2 * self.dim, 4, 4)
        output = self.deconv_out(self.block1(output))
        return self.tanh(output).view(-1, 3, 16, 16)


class ConvCritic(nn.Module):
    """No batch norm, which a gradient penalty forbids; instance norm in its place."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 3, 2, padding=1)
        self.conv2 = nn.Conv2d(dim, 2 * dim, 3, 2, padding=1)
        self.norm2 = nn.InstanceNorm2d(2 * dim, affine=True)
        self.linear = nn.Linear(4 * 4 * 2 * dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        output = F.leaky_relu(self.conv1(input))
        output = F.leaky_relu(self.norm2(self.conv2(output)))
        return self.linear(output.view(output.size(0), -1)).view(-1)
