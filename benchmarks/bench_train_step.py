"""The whole D+G step of DCGAN: eager PyTorch as people write it, tuned by hand, and pygan."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pygan
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.same_update import Build, Models, Stepper, require_same_updates
from benchmarks.steps import DCGAN_ADAM, Adam, EagerStep, Writing, networks
from benchmarks.work import train_step_work
from pygan.models import dcgan

BATCH = 64
NZ = 100
CHECK_BATCH = 16
CHECK_STEPS = 3


def eager(writing: Writing) -> Build:
    """A loop in eager PyTorch."""

    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        nets = networks(
            models,
            device,
            channels_last=writing.channels_last,
            fused_adam=writing.by_hand,
            adam=adam,
        )
        return Stepper(nets, EagerStep(nets, NZ, writing).step)

    return build


def pygan_step(amp: str, *, kernels: bool = True) -> Build:
    """pygan's step; without ``kernels`` the networks stay unfused, which leaves the algorithm."""

    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        nets = networks(models, device, channels_last=True, fused_adam=True, adam=adam)
        if kernels:
            pygan.fuse(nets.generator)
            pygan.fuse(nets.discriminator)
        step = pygan.AdversarialStep(
            nets.generator, nets.discriminator, nets.opt_g, nets.opt_d, amp=amp
        )
        return Stepper(nets, step)

    return build


class Way(NamedTuple):
    """A row of the table."""

    name: str
    precision: str
    build: Build
    baseline: bool = False
    full_only: bool = False


WAYS = (
    Way("eager fp32", "fp32", eager(Writing()), baseline=True),
    Way("eager fp32 channels_last", "fp32", eager(Writing(channels_last=True))),
    Way(
        "eager fp32 by hand",
        "fp32",
        eager(Writing(channels_last=True, by_hand=True)),
        baseline=True,
    ),
    Way("eager bf16", "bf16", eager(Writing(bf16=True)), baseline=True, full_only=True),
    Way(
        "eager bf16 channels_last",
        "bf16",
        eager(Writing(channels_last=True, bf16=True)),
        baseline=True,
    ),
    Way(
        "eager bf16 by hand",
        "bf16",
        eager(Writing(channels_last=True, by_hand=True, bf16=True)),
        baseline=True,
    ),
    Way("pygan fp32 step only", "fp32", pygan_step("off", kernels=False), full_only=True),
    Way("pygan bf16 step only", "bf16", pygan_step("bf16", kernels=False), full_only=True),
    Way("pygan fp32", "fp32", pygan_step("off")),
    Way("pygan bf16", "bf16", pygan_step("bf16")),
)

# The same training in plain torch, whose error sets the limit of each precision.
PLAIN = {"fp32": eager(Writing()), "bf16": eager(Writing(channels_last=True, bf16=True))}


def _models(image: tuple[int, int, int]) -> Models:
    torch.manual_seed(0)
    channels, size, _ = image
    return dcgan(image_size=size, channels=channels, nz=NZ)


def _real(image: tuple[int, int, int], batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, *image, generator=generator) * 2 - 1


def check(image: tuple[int, int, int], device: torch.device, sides: Sequence[Side]) -> None:
    """Every side makes the updates that float64 makes, on the same data."""
    models = _models(image)
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            _real(image, CHECK_BATCH, generator).to(device),
            torch.randn(CHECK_BATCH, NZ, 1, 1, generator=generator).to(device),
        )
        for _ in range(CHECK_STEPS)
    ]
    builds = {way.name: (way.precision, way.build) for way in WAYS}
    chosen = {side.name: builds[side.name] for side in sides}
    # The widest map is D's last, 4x4; its width doubles from 64 channels at half the image's size.
    smallest = CHECK_BATCH * 16 * (image[1] * 8)
    require_same_updates(models, chosen, PLAIN, data, NZ, smallest)


def _side(way: Way, image: tuple[int, int, int]) -> Side:
    def build(device: torch.device) -> Call:
        stepper = way.build(_models(image), device, DCGAN_ADAM)
        real = _real(image, BATCH, torch.Generator().manual_seed(2)).to(device)
        return lambda: stepper.step(real)

    channels, size, _ = image
    with torch.device("meta"):
        models = dcgan(image_size=size, channels=channels, nz=NZ)
    return Side(
        name=way.name,
        precision=way.precision,
        build=build,
        work=train_step_work(*models, NZ, image, BATCH, 2 if way.precision == "bf16" else 4),
        baseline=way.baseline,
        full_only=way.full_only,
    )


def _case(name: str, image: tuple[int, int, int]) -> Case:
    shape = "x".join(map(str, image))
    return Case(
        name=name,
        about=f"whole D+G step, images {shape}, batch {BATCH}, nz {NZ}",
        images=BATCH,
        sides=tuple(_side(way, image) for way in WAYS),
        check=functools.partial(check, image),
    )


CASES = {case.name: case for case in (_case("dcgan64", (3, 64, 64)), _case("dcgan32", (1, 32, 32)))}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_train_step(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
