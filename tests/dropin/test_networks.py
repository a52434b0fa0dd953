"""Whole GANs against their fused copies: every pass of each network, and training."""

from __future__ import annotations

import contextlib

import pytest
import torch
from compare import (
    FACTOR,
    FLOOR,
    ORDERS,
    TRIES,
    WEIGHT_GRAD_FACTOR,
    ZERO,
    Inputs,
    Kinks,
    assert_same,
    build,
    clear_of_kinks,
    is_random,
)
from gans import BATCH, GANS, Gan, train
from torch import Tensor, nn

import pygan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.parametrize("gan", GANS.values(), ids=GANS),
]

# Rounding in float64, after the steps below.
EXACT = 1e-9


def test_generator(gan: Gan) -> None:
    def make_input(generator: torch.Generator) -> Inputs:
        return gan.draw(generator)["g"]

    assert_same(gan.generator, make_input, penalty=False)


def test_discriminator(gan: Gan) -> None:
    def make_input(generator: torch.Generator) -> Inputs:
        sample = gan.draw(generator)
        return sample["real"] + sample["condition"]

    assert_same(gan.discriminator, make_input)


def pair(gan: Gan, dtype: torch.dtype, *, fused: bool) -> tuple[nn.Module, nn.Module]:
    networks = (build(gan.generator, 0).to(dtype), build(gan.discriminator, 1).to(dtype))
    if fused:
        for network in networks:
            pygan.fuse(network)
    return networks


def state(networks: tuple[nn.Module, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{which}.{key}": value.detach().clone()
        for which, network in zip("gd", networks, strict=True)
        for key, value in network.state_dict().items()
    }


def test_twenty_steps_in_float64(gan: Gan) -> None:
    plain, fused = (pair(gan, torch.float64, fused=f) for f in (False, True))
    losses = [train(gan, networks, 20, torch.float64) for networks in (plain, fused)]
    torch.testing.assert_close(losses[1], losses[0], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(state(fused), state(plain), rtol=EXACT, atol=EXACT)


STEPS = 2


def trained(
    gan: Gan,
    dtype: torch.dtype,
    seed: int,
    *,
    fused: bool = False,
    order: Tensor | None = None,
    kinks: Kinks | None = None,
) -> dict[str, Tensor]:
    networks = pair(gan, dtype, fused=fused)
    with kinks or contextlib.nullcontext():
        train(gan, networks, STEPS, dtype, adam=False, seed=seed, order=order)
    return state(networks)


def find_seed(gan: Gan) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """The first seed whose training keeps clear of every kink, and what float32 and float64
    make of it."""
    for seed in range(TRIES):
        near, at = Kinks(), Kinks()
        plain = trained(gan, torch.float32, seed, kinks=near)
        exact = trained(gan, torch.float64, seed, kinks=at)
        if clear_of_kinks(near.inputs, at.inputs):
            return seed, plain, exact
    raise AssertionError(f"no data of {TRIES} keep clear of every kink")


def test_steps_in_float32(gan: Gan) -> None:
    """By gradient descent, as Adam makes of a gradient that is nearly zero one of any size."""
    seed, plain, exact = find_seed(gan)
    fused = trained(gan, torch.float32, seed, fused=True)
    plains = [plain]
    if not any(map(is_random, pair(gan, torch.float32, fused=False))):
        for n in range(ORDERS):
            order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(n))
            plains.append(trained(gan, torch.float32, seed, order=order))
    start = state(pair(gan, torch.float64, fused=False))
    changes = {
        key: (v - start[key]).norm().item() for key, v in exact.items() if v.is_floating_point()
    }
    whole = sum(c**2 for c in changes.values()) ** 0.5
    for key, value in exact.items():
        if key not in changes:
            assert torch.equal(fused[key], value)
            continue
        factor = WEIGHT_GRAD_FACTOR if value.dim() > 1 else FACTOR
        allowed = factor * max((p[key].double() - value).norm().item() for p in plains)
        scale = changes[key] if changes[key] > ZERO * whole else whole
        limit = max(allowed, FLOOR * scale)
        error = (fused[key].double() - value).norm().item()
        assert error <= limit, f"{key}: error {error:.2e}, allowed {limit:.2e}"
