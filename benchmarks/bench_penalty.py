"""A gradient penalty on other people's discriminators, before and after ``pygan.fuse``.

A call is D's half of an update with R1 on real images: the gradient of the logits' sum with respect
to the images is built with ``create_graph=True``, and the gradients of the parameters are those of
mean softplus(-D(x)) + 5 mean |dD/dx|^2. Source: Mescheder et al. 2018, arXiv:1801.04406.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pygan
from benchmarks.bench_dropin import AT_MOST, KINKS, SIDES, discriminator, missing, without_dropout
from benchmarks.correct import WEIGHT_GRADIENT_FACTOR, relative_error, require_right
from benchmarks.dropin_networks import NETWORKS
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import forward_backward_work

HALF_GAMMA = 5.0


def way(name: str, fused: bool, dtype: torch.dtype = torch.float32) -> Any:
    """One side: the gradients of D's parameters."""
    network, images = discriminator(name, dtype)
    if fused:
        pygan.fuse(network)
    parameters = list(network.parameters())

    def call() -> list[Tensor]:
        x = images.detach().requires_grad_()
        logits = network(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        penalty = slope.square().flatten(1).sum(1).mean()
        loss = F.softplus(-logits).mean() + HALF_GAMMA * penalty
        return list(torch.autograd.grad(loss, parameters))

    return call


def check(name: str, device: torch.device, sides: Sequence[Side]) -> None:
    """All gradients together, against float64."""
    truth = without_dropout(way(name, False, torch.float64))
    errors = {
        fused: {"gradients": relative_error(without_dropout(way(name, fused)), truth)}
        for fused in (False, True)
    }
    floors = {"gradients": KINKS}
    require_right("pygan fp32", "fp32", errors[True], errors[False], WEIGHT_GRADIENT_FACTOR, floors)


def _side(name: str, kind: str) -> Side:
    networks, fused = NETWORKS[name], SIDES[kind]

    def build(device: torch.device) -> Call:
        return way(name, fused)

    with torch.device("meta"):
        _, network = networks.make()
    # Forward, the images' gradient, and a backward through each of the two.
    first = forward_backward_work([(network, networks.image)], networks.batch, 4)
    return Side(
        name=f"{kind} fp32",
        precision="fp32",
        build=build,
        work=first._replace(flops=2 * first.flops, bytes=2 * first.bytes),
        baseline=not fused,
        full_only=name != "upsample32",
        missing=functools.partial(missing, fused),
    )


CASES = {
    f"dropin-{name}-r1": Case(
        name=f"dropin-{name}-r1",
        about=f"{name}'s discriminator with a gradient penalty, batch {n.batch}",
        images=n.batch,
        sides=tuple(_side(name, kind) for kind in SIDES),
        check=functools.partial(check, name),
        at_most=AT_MOST,
    )
    for name, n in NETWORKS.items()
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_penalty(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
