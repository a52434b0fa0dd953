"""The whole D+G step of DCGAN: eager PyTorch as people write it, tuned by hand, and pygan.

Besides the two usual networks there are a large batch, and networks whose channels are no powers
of two, with the sides that decide.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pygan
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.same_update import Build, Models, Stepper, require_same_updates
from benchmarks.steps import DCGAN_ADAM, Adam, EagerStep, Networks, Writing, networks
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


def pygan_step(amp: str, *, kernels: bool = True, graph: str = "auto") -> Build:
    """pygan's step; without ``kernels`` the networks stay unfused, which leaves the algorithm."""

    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        nets = networks(models, device, channels_last=True, fused_adam=True, adam=adam)
        if kernels:
            pygan.fuse(nets.generator)
            pygan.fuse(nets.discriminator)
        step = pygan.AdversarialStep(
            nets.generator, nets.discriminator, nets.opt_g, nets.opt_d, amp=amp, graph=graph
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
    Way("eager fp32 channels_last", "fp32", eager(Writing(channels_last=True)), baseline=True),
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
    Way("pygan fp32 no program", "fp32", pygan_step("off", graph="off"), full_only=True),
    Way("pygan bf16 no program", "bf16", pygan_step("bf16", graph="off"), full_only=True),
    Way("pygan fp32", "fp32", pygan_step("off")),
    Way("pygan bf16", "bf16", pygan_step("bf16")),
)

# The same training in plain torch, whose error sets the limit of each precision.
PLAIN = {"fp32": eager(Writing()), "bf16": eager(Writing(channels_last=True, bf16=True))}


# The peers as people write them and as experts do, and pygan.
DECIDING = (
    "eager fp32",
    "eager fp32 by hand",
    "eager bf16 by hand",
    "pygan fp32",
    "pygan bf16",
)


class Setup(NamedTuple):
    """Images ``[C, H, W]``, how many at a time, and the width of the networks (ngf and ndf)."""

    image: tuple[int, int, int]
    batch: int = BATCH
    width: int = 64

    def models(self) -> Models:
        channels, size, _ = self.image
        return dcgan(image_size=size, channels=channels, nz=NZ, ngf=self.width, ndf=self.width)

    def real(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.rand(batch, *self.image, generator=generator) * 2 - 1


# Image, width, device and side of what has been found right: cases may differ in the batch alone.
_right: set[tuple[Any, ...]] = set()


def check(setup: Setup, device: torch.device, sides: Sequence[Side]) -> None:
    """Every side makes the updates that float64 makes, on the same data."""
    keys = {(setup.image, setup.width, device, side.name): side for side in sides}
    if new := [side for key, side in keys.items() if key not in _right]:
        names = {side.name for side in new}
        require_right_steps(setup, device, [way for way in WAYS if way.name in names])
        _right.update(keys)


def require_right_steps(
    setup: Setup,
    device: torch.device,
    ways: Sequence[Way],
    batch: int = CHECK_BATCH,
    steps: int = CHECK_STEPS,
) -> None:
    """Every way makes the updates that float64 makes, on ``steps`` batches of ``batch`` images.

    Raises:
        CheckFailed: one does not.
    """
    torch.manual_seed(0)
    models = setup.models()
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            setup.real(batch, generator).to(device),
            torch.randn(batch, NZ, 1, 1, generator=generator).to(device),
        )
        for _ in range(steps)
    ]
    chosen = {way.name: (way.precision, way.build) for way in ways}
    # D's last map is 4x4; its channels double from `width` at half the image's size.
    smallest = batch * 16 * (setup.image[1] * setup.width // 8)

    def plainly(nets: Networks) -> Any:
        return EagerStep(nets, NZ, Writing()).step

    require_same_updates(models, chosen, PLAIN, data, plainly, smallest)


def side_of(way: Way, setup: Setup, *, full_only: bool = False) -> Side:
    """What is timed of a way: its steps on one batch, latents drawn in each."""

    def build(device: torch.device) -> Call:
        torch.manual_seed(0)
        stepper = way.build(setup.models(), device, DCGAN_ADAM)
        real = setup.real(setup.batch, torch.Generator().manual_seed(2)).to(device)
        return stepper.timed(real) if stepper.timed else lambda: stepper.step(real)

    with torch.device("meta"):
        models = setup.models()
    itemsize = 2 if way.precision == "bf16" else 4
    return Side(
        name=way.name,
        precision=way.precision,
        build=build,
        work=train_step_work(*models, (NZ, 1, 1), setup.image, setup.batch, itemsize),
        baseline=way.baseline,
        full_only=full_only or way.full_only,
    )


def _case(
    name: str,
    setup: Setup,
    sides: Collection[str] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> Case:
    """With all sides, or with those named. --quick takes the smallest case."""
    shape = "x".join(map(str, setup.image))
    width = "" if setup.width == 64 else f", ngf = ndf = {setup.width}"
    return Case(
        name=name,
        about=f"whole D+G step, images {shape}, batch {setup.batch}, nz {NZ}{width}",
        images=setup.batch,
        sides=tuple(
            side_of(way, setup, full_only=name != "dcgan32")
            for way in WAYS
            if sides is None or way.name in sides
        ),
        check=functools.partial(check, setup),
        at_most=at_most or {},
    )


CASES = {
    case.name: case
    for case in (
        _case("dcgan64", Setup((3, 64, 64))),
        _case("dcgan32", Setup((1, 32, 32))),
        # A step takes seconds.
        _case(
            "dcgan64-batch512",
            Setup((3, 64, 64), batch=512),
            DECIDING,
            at_most={"rounds": 7, "warmup_calls": 2},
        ),
        _case("dcgan64-width48", Setup((3, 64, 64), width=48), DECIDING, at_most={"rounds": 9}),
    )
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_train_step(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
