"""Waveforms: WaveGAN (Donahue et al. 2019, tables 3 and 4) and HiFi-GAN (Kong et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm


class WaveGenerator(nn.Module):
    def __init__(self, nz: int = 10, d: int = 8) -> None:
        super().__init__()
        self.d = d
        self.fc1 = nn.Linear(nz, 16 * d)
        self.tconv1 = nn.ConvTranspose1d(d, d, 25, 4, 11, output_padding=1)
        self.tconv2 = nn.ConvTranspose1d(d, 1, 25, 4, 11, output_padding=1)
        self.bn0, self.bn1 = nn.BatchNorm1d(d), nn.BatchNorm1d(d)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.fc1(z).view(-1, self.d, 16)))
        x = F.relu(self.bn1(self.tconv1(x)))
        return torch.tanh(self.tconv2(x))


class PhaseShuffle(nn.Module):
    """Shifts all channels by a few samples, a draw for each call, reflected at the ends."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        shift = int(torch.randint(-self.n, self.n + 1, ()))
        if shift == 0:
            return x
        if shift > 0:
            return F.pad(x[..., :-shift], (shift, 0), mode="reflect")
        return F.pad(x[..., -shift:], (0, -shift), mode="reflect")


class WaveDiscriminator(nn.Module):
    random = True

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, d, 25, 4, 11)
        self.conv2 = nn.Conv1d(d, d * 2, 25, 4, 11)
        self.shuffle = PhaseShuffle(2)
        self.fc1 = nn.Linear(16 * d * 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(F.leaky_relu(self.conv1(x), 0.2))
        x = F.leaky_relu(self.conv2(x), 0.2)
        return self.fc1(F.pad(x, (0, 16 - x.shape[-1])).reshape(x.shape[0], -1)).view(-1)


class DilatedBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            weight_norm(
                nn.Conv1d(channels, channels, kernel, 1, dilation=d, padding=(kernel * d - d) // 2)
            )
            for d in dilations
        )
        self.convs2 = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, 1, padding=kernel // 2))
            for _ in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for c1, c2 in zip(self.convs1, self.convs2, strict=True):
            xt = c1(F.leaky_relu(x, 0.1))
            x = c2(F.leaky_relu(xt, 0.1)) + x
        return x


class HiFiGenerator(nn.Module):
    """From a spectrogram; the mean of several residual blocks behind each upsampling."""

    def __init__(self, mels: int = 10, ch: int = 16) -> None:
        super().__init__()
        self.conv_pre = weight_norm(nn.Conv1d(mels, ch, 7, 1, padding=3))
        self.ups = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(ch // 2**i, ch // 2 ** (i + 1), k, u, (k - u) // 2))
            for i, (u, k) in enumerate([(4, 8), (2, 4)])
        )
        self.resblocks = nn.ModuleList(
            DilatedBlock(ch // 2 ** (i + 1), k, (1, 3)) for i in range(2) for k in (3, 7)
        )
        self.conv_post = weight_norm(nn.Conv1d(ch // 4, 1, 7, 1, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            first, second = self.resblocks[2 * i], self.resblocks[2 * i + 1]
            xs = first(x)
            xs += second(x)
            x = xs / 2
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


class PeriodDiscriminator(nn.Module):
    """Folds the waveform to a map as wide as the period; returns the logits only."""

    def __init__(self, period: int = 3, d: int = 8) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.period = period
        self.convs = nn.ModuleList(
            [
                norm(nn.Conv2d(1, d, (5, 1), (3, 1), padding=(2, 0))),
                norm(nn.Conv2d(d, d * 2, (5, 1), (3, 1), padding=(2, 0))),
                norm(nn.Conv2d(d * 2, d * 2, (5, 1), 1, padding=(2, 0))),
            ]
        )
        self.conv_post = norm(nn.Conv2d(d * 2, 1, (3, 1), 1, padding=(1, 0)))

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        b, c, t = x.shape
        if t % self.period:
            pad = self.period - t % self.period
            x = F.pad(x, (0, pad), "reflect")
            t += pad
        x = x.view(b, c, t // self.period, self.period)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return torch.flatten(self.conv_post(x), 1, -1)
