"""Conditional GAN (Mirza and Osindero 2014) and auxiliary-classifier GAN (Odena et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class ConditionalGenerator(nn.Module):
    def __init__(self, nz: int = 10, width: int = 16) -> None:
        super().__init__()
        self.label_emb = nn.Embedding(CLASSES, CLASSES)
        self.model = nn.Sequential(
            nn.Linear(nz + CLASSES, width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(width, 2 * width),
            nn.BatchNorm1d(2 * width, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(2 * width, 64),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        img = self.model(torch.cat((self.label_emb(labels), noise), -1))
        return img.view(img.size(0), 1, 8, 8)


class ConditionalDiscriminator(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.label_embedding = nn.Embedding(CLASSES, CLASSES)
        self.model = nn.Sequential(
            nn.Linear(CLASSES + 64, width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(width, width),
            nn.Dropout(0.4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(width, 1),
        )

    def forward(self, img: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat((img.view(img.size(0), -1), self.label_embedding(labels)), -1)
        return self.model(both)[:, 0]


class ConvConditionalGenerator(nn.Module):
    """Latent and one-hot label go through a layer each, and are concatenated as maps."""

    def __init__(self, d: int = 8, nz: int = 10) -> None:
        super().__init__()
        self.deconv1_1 = nn.ConvTranspose2d(nz, d * 2, 4, 1, 0)
        self.deconv1_1_bn = nn.BatchNorm2d(d * 2)
        self.deconv1_2 = nn.ConvTranspose2d(CLASSES, d * 2, 4, 1, 0)
        self.deconv1_2_bn = nn.BatchNorm2d(d * 2)
        self.deconv2 = nn.ConvTranspose2d(d * 4, d, 4, 2, 1)
        self.deconv2_bn = nn.BatchNorm2d(d)
        self.deconv3 = nn.ConvTranspose2d(d, 1, 4, 2, 1)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        onehot = F.one_hot(labels, CLASSES).to(z.dtype)[:, :, None, None]
        x = F.relu(self.deconv1_1_bn(self.deconv1_1(z)))
        y = F.relu(self.deconv1_2_bn(self.deconv1_2(onehot)))
        x = torch.cat([x, y], 1)
        x = F.relu(self.deconv2_bn(self.deconv2(x)))
        return torch.tanh(self.deconv3(x))


class ConvConditionalDiscriminator(nn.Module):
    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.conv1_1 = nn.Conv2d(1, d // 2, 4, 2, 1)
        self.conv1_2 = nn.Conv2d(CLASSES, d // 2, 4, 2, 1)
        self.conv2 = nn.Conv2d(d, d * 2, 4, 2, 1)
        self.conv2_bn = nn.BatchNorm2d(d * 2)
        self.conv3 = nn.Conv2d(d * 2, 1, 4, 1, 0)

    def forward(self, img: Tensor, labels: Tensor) -> Tensor:
        maps = F.one_hot(labels, CLASSES).to(img.dtype)[:, :, None, None]
        maps = maps.expand(-1, -1, *img.shape[2:])
        x = F.leaky_relu(self.conv1_1(img), 0.2)
        y = F.leaky_relu(self.conv1_2(maps), 0.2)
        x = torch.cat([x, y], 1)
        x = F.leaky_relu(self.conv2_bn(self.conv2(x)), 0.2)
        return torch.sigmoid(self.conv3(x)).flatten()


class ClassifierGenerator(nn.Module):
    """The latent is multiplied by an embedding of the label."""

    def __init__(self, nz: int = 10, d: int = 8) -> None:
        super().__init__()
        self.d = d
        self.label_emb = nn.Embedding(CLASSES, nz)
        self.l1 = nn.Sequential(nn.Linear(nz, 2 * d * 4 * 4))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(2 * d),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * d, d, 3, stride=1, padding=1),
            nn.BatchNorm2d(d, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(d, 1, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        out = self.l1(torch.mul(self.label_emb(labels), noise))
        return self.conv_blocks(out.view(out.shape[0], 2 * self.d, 4, 4))


class ClassifierDiscriminator(nn.Module):
    """Returns the validity and the probabilities of the classes."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.conv_blocks = nn.Sequential(
            nn.Conv2d(1, d, 3, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Dropout2d(0.25),
            nn.Conv2d(d, 2 * d, 3, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Dropout2d(0.25),
            nn.BatchNorm2d(2 * d, 0.8),
        )
        self.adv_layer = nn.Sequential(nn.Linear(32 * d, 1), nn.Sigmoid())
        self.aux_layer = nn.Sequential(nn.Linear(32 * d, CLASSES), nn.Softmax(dim=1))

    def forward(self, img: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.conv_blocks(img)
        out = out.view(out.shape[0], -1)
        return self.adv_layer(out)[:, 0], self.aux_layer(out)
