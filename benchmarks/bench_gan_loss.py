"""GAN losses with gradient and mean probability: one logit an image, and PatchGAN's 30x30."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.correct import DTYPE, relative_error, require_right
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import gan_loss_work
from pygan.functional import gan_d_loss, gan_g_loss

BATCH = 64


class Result(NamedTuple):
    """Loss, mean probabilities, and the gradients of the logits."""

    loss: Tensor
    probabilities: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


Way = Callable[[Sequence[Tensor]], Callable[[], Result]]


def _bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def torch_d_loss(logits: Sequence[Tensor]) -> Callable[[], Result]:
    """Two binary cross entropies, their sum's gradients, two means of a sigmoid."""
    real, fake = logits

    def call() -> Result:
        loss = _bce(real, 1.0) + _bce(fake, 0.0)
        gradients = torch.autograd.grad(loss, (real, fake))
        means = tuple(torch.sigmoid(each.detach()).mean() for each in (real, fake))
        return Result(loss.detach(), means, gradients)

    return call


def torch_g_loss(logits: Sequence[Tensor]) -> Callable[[], Result]:
    """One binary cross entropy, its gradient, one mean of a sigmoid."""
    _, fake = logits

    def call() -> Result:
        loss = _bce(fake, 1.0)
        gradients = torch.autograd.grad(loss, (fake,))
        return Result(loss.detach(), (torch.sigmoid(fake.detach()).mean(),), gradients)

    return call


def pygan_d_loss(logits: Sequence[Tensor]) -> Callable[[], Result]:
    """pygan.functional.gan_d_loss."""
    real, fake = logits

    def call() -> Result:
        result = gan_d_loss(real, fake)
        gradients = torch.autograd.grad(result.loss, (real, fake))
        assert result.d_real is not None
        return Result(result.loss.detach(), (result.d_real, result.d_fake), gradients)

    return call


def pygan_g_loss(logits: Sequence[Tensor]) -> Callable[[], Result]:
    """pygan.functional.gan_g_loss."""
    _, fake = logits

    def call() -> Result:
        result = gan_g_loss(fake)
        gradients = torch.autograd.grad(result.loss, (fake,))
        return Result(result.loss.detach(), (result.d_fake,), gradients)

    return call


WAYS: dict[str, dict[str, Way]] = {
    "d_loss": {"torch": torch_d_loss, "pygan": pygan_d_loss},
    "g_loss": {"torch": torch_g_loss, "pygan": pygan_g_loss},
}


def _logits(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    real, fake = (
        (torch.randn(shape, generator=generator) * 3).to(device=device, dtype=dtype)
        for _ in range(2)
    )
    return real.requires_grad_(), fake.requires_grad_()


def _errors(result: Result, truth: Result) -> dict[str, float]:
    return {
        "loss": relative_error([result.loss], [truth.loss]),
        "probabilities": relative_error(result.probabilities, truth.probabilities),
        "gradients": relative_error(result.gradients, truth.gradients),
    }


def check(
    loss: str,
    shape: tuple[int, ...],
    precision: str,
    device: torch.device,
    sides: Sequence[Side],
) -> None:
    """Loss, probabilities and gradients against float64."""
    logits = _logits(shape, DTYPE[precision], device)
    exact = tuple(each.detach().double().requires_grad_() for each in logits)
    truth = WAYS[loss]["torch"](exact)()
    plain = _errors(WAYS[loss]["torch"](logits)(), truth)
    for side in sides:
        errors = _errors(WAYS[loss][side.name](logits)(), truth)
        require_right(side.name, precision, errors, plain)


def _side(name: str, loss: str, shape: tuple[int, ...], precision: str) -> Side:
    dtype = DTYPE[precision]

    def build(device: torch.device) -> Call:
        return WAYS[loss][name](_logits(shape, dtype, device))

    logits = torch.Size(shape).numel() * (2 if loss == "d_loss" else 1)
    return Side(
        name=name,
        precision=precision,
        build=build,
        work=gan_loss_work(logits, dtype.itemsize),
        baseline=name == "torch",
    )


def case_of(loss: str, shape: tuple[int, ...], precision: str) -> Case:
    """All ways on logits of a shape."""
    what = f"patch{shape[-2]}x{shape[-1]}" if len(shape) == 4 else "scalar"
    return Case(
        name=f"gan_{loss}-{what}-{precision}",
        about=f"BCE with logits {'x'.join(map(str, shape))}, {precision}, loss + gradient + means",
        images=shape[0],
        sides=tuple(_side(name, loss, shape, precision) for name in WAYS[loss]),
        check=functools.partial(check, loss, shape, precision),
    )


CASES = {
    case.name: case
    for loss in WAYS
    for shape in ((BATCH,), (BATCH, 1, 30, 30))
    for case in (case_of(loss, shape, "fp32"), case_of(loss, shape, "bf16"))
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_gan_loss(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
