"""Networks of other people's GAN code, forward and backward, before and after ``pygan.fuse``.

A call runs the generator and then the discriminator, each forward and backward with the gradient
of its input. Nothing else differs between the sides: float32 contiguous inputs and parameters, as
scripts have them, and for bfloat16 an autocast around the forward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pygan
from benchmarks.correct import FLOOR, WEIGHT_GRADIENT_FACTOR, relative_error, require_right
from benchmarks.dropin_networks import NETWORKS, Networks
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import forward_backward_work

AT_MOST = {"rounds": 9, "sample_seconds": 0.1, "warmup_seconds": 0.1}
# Of 16 convolutions in the deepest generator, each may be off by the floor of one; independent
# errors add up by their squares.
DEPTH = 16**0.5
# Relative, of a gradient after a few jumps.
KINKS = 1e-2
SIDES = {"eager": False, "pygan": True}


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return NETWORKS[name].make()


def _inputs(networks: Networks) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(networks.batch, *shape, generator=generator)
        for shape in (networks.latent, networks.image)
    ]


def discriminator(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A pair's second network, and the images it takes."""
    return copy.deepcopy(_pair(name)[1]).to(dtype), _inputs(NETWORKS[name])[1].to(dtype)


def way(name: str, fused: bool, bf16: bool, dtype: torch.dtype = torch.float32) -> Any:
    """One side: for each network its output, and the gradients of its input and parameters."""
    pair = [copy.deepcopy(network).to(dtype) for network in _pair(name)]
    inputs = [x.to(dtype).requires_grad_() for x in _inputs(NETWORKS[name])]
    if fused:
        for network in pair:
            pygan.fuse(network)

    def call() -> list[list[Tensor]]:
        results = []
        for network, x in zip(pair, inputs, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = network(x)
            leaves = [x, *network.parameters()]
            gradients = torch.autograd.grad(y.float().square().mean(), leaves)
            results.append([y.detach(), *gradients])
        return results

    return call


def without_dropout(call: Callable[[], Any]) -> Any:
    """float64 draws other masks: none are drawn."""
    drop = nn.functional.dropout, nn.functional.dropout2d
    nn.functional.dropout = nn.functional.dropout2d = lambda x, *args, **kwargs: x * 1
    try:
        return call()
    finally:
        nn.functional.dropout, nn.functional.dropout2d = drop


def check(name: str, device: torch.device, sides: Sequence[Side]) -> None:
    """Output, input gradient, and all gradients of parameters together, against float64.

    The tests hold the gradients to the accuracy rule, on inputs that keep clear of kinks; here a
    ReLU input that rounds to the other side of zero than plain torch's changes some.
    """
    truth = without_dropout(way(name, False, False, torch.float64))

    def errors(fused: bool, precision: str) -> dict[str, float]:
        found = {}
        made = without_dropout(way(name, fused, precision == "bf16"))
        for which, ours, exact in zip("GD", made, truth, strict=True):
            found[f"{which}'s output"] = relative_error(ours[:1], exact[:1])
            found[f"the gradient of {which}'s input"] = relative_error(ours[1:2], exact[1:2])
            found[f"{which}'s gradients"] = relative_error(ours[2:], exact[2:])
        return found

    plain = {precision: errors(False, precision) for precision in {s.precision for s in sides}}
    for side in sides:
        if not side.baseline:
            found = errors(True, side.precision)
            output = DEPTH * FLOOR[side.precision]
            floors = {what: output if "output" in what else KINKS for what in found}
            require_right(
                side.name,
                side.precision,
                found,
                plain[side.precision],
                WEIGHT_GRADIENT_FACTOR,
                floors,
            )


def missing(fused: bool, device: torch.device) -> str | None:
    """Why a side does not run here, or None."""
    return "pygan's drop-in is measured on a CPU" if device.type != "cpu" else None


def _side(name: str, kind: str, precision: str) -> Side:
    networks, fused = NETWORKS[name], SIDES[kind]

    def build(device: torch.device) -> Call:
        return way(name, fused, precision == "bf16")

    with torch.device("meta"):
        pair = networks.make()
    return Side(
        name=f"{kind} {precision}",
        precision=precision,
        build=build,
        work=forward_backward_work(
            list(zip(pair, (networks.latent, networks.image), strict=True)),
            networks.batch,
            2 if precision == "bf16" else 4,
        ),
        baseline=not fused,
        full_only=name != "upsample32",
        missing=functools.partial(missing, fused),
    )


CASES = {
    f"dropin-{name}": Case(
        name=f"dropin-{name}",
        about=f"{name}'s generator and discriminator, forward and backward, batch {n.batch}",
        images=n.batch,
        sides=tuple(_side(name, kind, each) for each in ("fp32", "bf16") for kind in SIDES),
        check=functools.partial(check, name),
        at_most=AT_MOST,
    )
    for name, n in NETWORKS.items()
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_dropin(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
