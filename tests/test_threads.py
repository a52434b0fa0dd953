"""Trainers in threads of one process end with the weights that each ends with alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

import pygan
from pygan.ops import map_memory, native
from pygan.tricks import Tricks

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.load() is None, reason="the native extension is not there"),
]

STEPS = 4


class Trainer(NamedTuple):
    """What one thread trains; the seed is that of everything it draws."""

    seed: int
    size: int
    channels: int
    batch: int
    width: int
    amp: str
    tricks: Tricks

    def networks(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        torch.manual_seed(self.seed)
        norm = "none" if self.tricks.gradient_penalty else "batch"
        return pygan.models.dcgan(
            self.size, self.channels, nz=16, ngf=self.width, ndf=self.width, d_norm=norm
        )

    def train(self, networks: tuple[torch.nn.Module, torch.nn.Module]) -> list[bytes]:
        """Every parameter and buffer after ``STEPS`` updates."""
        G, D = networks
        pygan.fuse(G)
        pygan.fuse(D)
        drawn = torch.Generator().manual_seed(self.seed)
        optimizers = [torch.optim.Adam(m.parameters(), 2e-4, betas=(0.5, 0.999)) for m in (G, D)]
        step = pygan.AdversarialStep(
            G, D, *optimizers, amp=self.amp, generator=drawn, tricks=self.tricks
        )
        shape = (4 * self.batch, self.size, self.size, self.channels)
        images = torch.randint(256, shape, generator=drawn, dtype=torch.uint8)
        for _ in range(STEPS):
            step.gathered(images, torch.randint(len(images), (self.batch,), generator=drawn))
        tensors = [*G.state_dict().values(), *D.state_dict().values()]
        return [tensor.numpy().tobytes() for tensor in tensors]


TRAINERS = [
    Trainer(0, 32, 1, 16, 16, "off", Tricks()),
    Trainer(1, 32, 3, 24, 16, "bf16", Tricks()),
    Trainer(2, 64, 3, 8, 16, "off", Tricks()),
    Trainer(3, 64, 1, 8, 8, "bf16", Tricks()),
    Trainer(4, 16, 3, 64, 32, "off", Tricks(augment=("color", "translation", "cutout"))),
    Trainer(5, 32, 3, 8, 24, "bf16", Tricks(n_critic=2)),
    Trainer(6, 32, 1, 8, 16, "off", Tricks(gradient_penalty=10.0)),
    Trainer(7, 32, 3, 8, 16, "off", Tricks(r1=10.0, r1_every=2)),
]


@pytest.fixture
def often() -> Iterator[None]:
    """One CPU thread for each trainer, and Python's lock changing hands often."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def test_trainers_in_threads_end_as_they_do_alone(
    often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [trainer.train(trainer.networks()) for trainer in TRAINERS]
    # The first weights come from torch's one generator of random numbers.
    networks = [trainer.networks() for trainer in TRAINERS]
    # What is made once is to be made by several threads at once.
    monkeypatch.setattr(map_memory, "_made", [])
    together = threading.Barrier(len(TRAINERS))

    def train(i: int) -> list[bytes]:
        together.wait()
        return TRAINERS[i].train(networks[i])

    with ThreadPoolExecutor(len(TRAINERS)) as pool:
        found = list(pool.map(train, range(len(TRAINERS))))
    for trainer, ours, alone in zip(TRAINERS, found, expected, strict=True):
        assert ours == alone, trainer
