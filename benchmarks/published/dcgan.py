"""DCGAN (Radford et al. 2015, figure 1): as attributes, as a Sequential, and with upsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weights_init(m: nn.Module) -> None:
    """Goes by the class name, as DCGAN code does."""
    name = m.__class__.__name__
    if name.find("Conv") != -1:
        m.weight.data.normal_(0.0, 0.1)
    elif name.find("BatchNorm") != -1:
        m.weight.data.normal_(1.0, 0.02)
        m.bias.data.fill_(0)


class SequentialGenerator(nn.Module):
    def __init__(self, ngpu: int = 1, nz: int = 12, ngf: int = 8, nc: int = 3) -> None:
        super().__init__()
        self.ngpu = ngpu
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.apply(weights_init)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and self.ngpu > 1:
            output = nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        else:
            output = self.main(input)
        return output


class SequentialDiscriminator(nn.Module):
    def __init__(self, ngpu: int = 1, ndf: int = 8, nc: int = 3) -> None:
        super().__init__()
        self.ngpu = ngpu
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )
        self.apply(weights_init)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and self.ngpu > 1:
            output = nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        else:
            output = self.main(input)
        return output.view(-1, 1).squeeze(1)


class AttributeGenerator(nn.Module):
    """Layers as attributes, a bias before batch norm, functional activations."""

    def __init__(self, nz: int = 12, d: int = 8) -> None:
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(nz, d * 4, 4, 1, 0)
        self.deconv1_bn = nn.BatchNorm2d(d * 4)
        self.deconv2 = nn.ConvTranspose2d(d * 4, d * 2, 4, 2, 1)
        self.deconv2_bn = nn.BatchNorm2d(d * 2)
        self.deconv3 = nn.ConvTranspose2d(d * 2, d, 4, 2, 1)
        self.deconv3_bn = nn.BatchNorm2d(d)
        self.deconv4 = nn.ConvTranspose2d(d, 1, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.deconv1_bn(self.deconv1(z.view(z.size(0), -1, 1, 1))))
        x = F.relu(self.deconv2_bn(self.deconv2(x)))
        x = torch.relu(self.deconv3_bn(self.deconv3(x)))
        return torch.tanh(self.deconv4(x))


class AttributeDiscriminator(nn.Module):
    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, d, 4, 2, 1)
        self.conv2 = nn.Conv2d(d, d * 2, 4, 2, 1)
        self.conv2_bn = nn.BatchNorm2d(d * 2)
        self.conv3 = nn.Conv2d(d * 2, d * 4, 4, 2, 1)
        self.conv3_bn = nn.BatchNorm2d(d * 4)
        self.conv4 = nn.Conv2d(d * 4, 1, 4, 1, 0)

    def forward(self, image: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(image), 0.2)
        x = F.leaky_relu(self.conv2_bn(self.conv2(x)), 0.2)
        x = F.leaky_relu(self.conv3_bn(self.conv3(x)), 0.2, inplace=True)
        return torch.sigmoid(self.conv4(x)).view(x.shape[0])


class UpsampleGenerator(nn.Module):
    """Batch norm whose second argument, meant as a momentum, is its eps."""

    def __init__(self, latent_dim: int = 10, size: int = 16, channels: int = 1, d: int = 8) -> None:
        super().__init__()
        self.d, self.init_size = d, size // 4
        self.l1 = nn.Sequential(nn.Linear(latent_dim, 2 * d * self.init_size**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(2 * d),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * d, 2 * d, 3, stride=1, padding=1),
            nn.BatchNorm2d(2 * d, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * d, d, 3, stride=1, padding=1),
            nn.BatchNorm2d(d, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(d, channels, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        out = self.l1(z)
        out = out.view(out.shape[0], 2 * self.d, self.init_size, self.init_size)
        return self.conv_blocks(out)


class DropoutDiscriminator(nn.Module):
    def __init__(self, size: int = 16, channels: int = 1, d: int = 8) -> None:
        super().__init__()

        def block(cin: int, cout: int, bn: bool = True) -> list[nn.Module]:
            layers: list[nn.Module] = [
                nn.Conv2d(cin, cout, 3, 2, 1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(0.25),
            ]
            if bn:
                layers.append(nn.BatchNorm2d(cout, 0.8))
            return layers

        self.model = nn.Sequential(
            *block(channels, d, bn=False), *block(d, 2 * d), *block(2 * d, 2 * d)
        )
        self.adv_layer = nn.Sequential(nn.Linear(2 * d * (size // 8) ** 2, 1), nn.Sigmoid())

    def forward(self, img: Tensor) -> Tensor:
        out = self.model(img)
        return self.adv_layer(out.view(out.shape[0], -1))[:, 0]
