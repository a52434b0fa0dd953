"""The whole D+G step of other GANs: as scripts write it, tuned by hand, and pygan.

pygan's step runs where it knows the loss; else the loop is the one tuned by hand, around networks
that are fused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pygan
from benchmarks.bench_dropin import without_dropout
from benchmarks.measure import Call, Case, Side
from benchmarks.other_steps import GAMES, Game, GameStep
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.same_update import Build, Models, Stepper, require_same_updates
from benchmarks.steps import Adam, Networks, Writing, networks
from benchmarks.work import Work, penalty_work, train_step_work

CHECK_STEPS = 5


def eager(game: Game, writing: Writing) -> Build:
    """A loop in eager PyTorch."""

    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        nets = networks(
            models,
            device,
            channels_last=writing.channels_last,
            fused_adam=writing.by_hand,
            adam=adam,
        )
        return Stepper(nets, GameStep(nets, game, writing).step)

    return build


def with_pygan(game: Game, amp: str) -> Build:
    """pygan's step, or fused networks in the loop that is tuned by hand."""

    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        nets = networks(models, device, channels_last=True, fused_adam=True, adam=adam)
        pygan.fuse(nets.generator)
        pygan.fuse(nets.discriminator)
        if game.step_loss is None:
            writing = Writing(channels_last=True, by_hand=True, bf16=amp == "bf16")
            return Stepper(nets, GameStep(nets, game, writing).step)
        step = pygan.AdversarialStep(
            nets.generator, nets.discriminator, nets.opt_g, nets.opt_d,
            loss=game.step_loss, amp=amp,
        )  # fmt: skip
        return Stepper(nets, step)

    return build


class Way(NamedTuple):
    """A row of the table."""

    name: str
    precision: str
    build: Callable[[Game], Build]
    baseline: bool = False


WAYS = (
    Way("eager fp32", "fp32", lambda game: eager(game, Writing()), baseline=True),
    Way(
        "eager fp32 by hand",
        "fp32",
        lambda game: eager(game, Writing(channels_last=True, by_hand=True)),
        baseline=True,
    ),
    Way(
        "eager bf16 by hand",
        "bf16",
        lambda game: eager(game, Writing(channels_last=True, by_hand=True, bf16=True)),
        baseline=True,
    ),
    Way("pygan fp32", "fp32", lambda game: with_pygan(game, "off")),
    Way("pygan bf16", "bf16", lambda game: with_pygan(game, "bf16")),
)
# Second derivatives in bfloat16 are nobody's practice.
ONLY_FLOAT32 = {"wgan-gp32"}


def _seeded(build: Build) -> Build:
    """The same steps, each with the random numbers of the same seed."""

    def seeded(models: Models, device: torch.device, adam: Adam) -> Stepper:
        stepper = build(models, device, adam)

        def step(real: Tensor, z: Tensor) -> Any:
            torch.manual_seed(3)
            return stepper.step(real, z)

        return Stepper(stepper.nets, step)

    return seeded


def check(name: str, device: torch.device, sides: Sequence[Side]) -> None:
    """Every side makes the updates that float64 makes, on the same data."""
    game = GAMES[name]
    torch.manual_seed(0)
    models = (game.make_narrow or game.make)()
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            game.real(game.check_batch, generator).to(device),
            game.drawn(game.check_batch, generator).to(device),
        )
        for _ in range(CHECK_STEPS)
    ]
    names = {side.name for side in sides}
    chosen = {
        way.name: (way.precision, _seeded(way.build(game))) for way in WAYS if way.name in names
    }
    plain = {
        "fp32": _seeded(eager(game, Writing())),
        "bf16": _seeded(eager(game, Writing(channels_last=True, bf16=True))),
    }

    def plainly(nets: Networks) -> Any:
        return _seeded(lambda *_: Stepper(nets, GameStep(nets, game, Writing()).step))(
            models, device, game.adam
        ).step

    without_dropout(lambda: require_same_updates(models, chosen, plain, data, plainly, game.kinks))


def _side(name: str, way: Way) -> Side:
    game = GAMES[name]

    def build(device: torch.device) -> Call:
        torch.manual_seed(0)
        stepper = way.build(game)(game.make(), device, game.adam)
        real = game.real(game.batch, torch.Generator().manual_seed(2)).to(device)
        return lambda: stepper.step(real, game.drawn(game.batch).to(device))

    with torch.device("meta"):
        generator, discriminator = game.make()
    itemsize = 2 if way.precision == "bf16" else 4
    work = train_step_work(generator, discriminator, game.latent, game.seen, game.batch, itemsize)
    extra = penalty_work(discriminator, game.seen, game.penalties * game.batch, itemsize)
    return Side(
        name=way.name,
        precision=way.precision,
        build=build,
        work=Work(work.flops + extra.flops, work.bytes + extra.bytes),
        baseline=way.baseline,
        full_only=name != "upsample32",
    )


ABOUT = {
    "upsample32": "upsampling generator and its discriminator with dropout, logits",
    "resnet32": "residual networks with spectral norm, hinge loss",
    "pix2pix256": "U-Net and 70x70 PatchGAN, logits and L1",
    "wgan-gp32": "DCGAN against a critic without norm, gradient penalty",
}
CASES = {
    name: Case(
        name=name,
        about=f"whole D+G step, {ABOUT[name]}, images {'x'.join(map(str, game.image))}, "
        f"batch {game.batch}",
        images=game.batch,
        sides=tuple(
            _side(name, way) for way in WAYS if way.precision == "fp32" or name not in ONLY_FLOAT32
        ),
        check=functools.partial(check, name),
        at_most={"rounds": 7, "warmup_calls": 1},
    )
    for name, game in GAMES.items()
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_other_step(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
