"""From uint8 images to a training batch: gather by index, flip, scale to [-1, 1], cast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.correct import DTYPE, relative_error, require_right
from benchmarks.measure import Call, Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.work import image_batch_work
from pygan.functional import image_batch

BATCH = 64
SHAPES = ((10_000, 32, 32, 1), (4_000, 64, 64, 3))  # the first one for --quick


class Batch(NamedTuple):
    """Images ``[N, H, W, C]`` uint8, indices of the chosen ``[B]``, and which of these to flip."""

    images: Tensor
    chosen: Tensor
    flip: Tensor


Way = Callable[[Batch, torch.dtype], Callable[[], Tensor]]


def torch_way(batch: Batch, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Index, flip with where, convert, scale."""
    flip = batch.flip[:, None, None, None]

    def call() -> Tensor:
        picked = batch.images[batch.chosen]
        picked = torch.where(flip, picked.flip(2), picked)
        return (picked.float() / 127.5 - 1).to(dtype).permute(0, 3, 1, 2)

    return call


def torch_by_hand(batch: Batch, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Flip only what is to be flipped, and scale in place."""
    flipped = batch.flip.nonzero().flatten()

    def call() -> Tensor:
        picked = batch.images.index_select(0, batch.chosen)
        picked[flipped] = picked[flipped].flip(2)
        scaled = picked.to(torch.float32).mul_(1 / 127.5).sub_(1)
        return scaled.to(dtype).permute(0, 3, 1, 2)

    return call


def pygan_way(batch: Batch, dtype: torch.dtype) -> Callable[[], Tensor]:
    """pygan.functional.image_batch."""
    return lambda: image_batch(batch.images, batch.chosen, flip=batch.flip, dtype=dtype)


WAYS: dict[str, Way] = {
    "torch": torch_way,
    "torch by hand": torch_by_hand,
    "pygan": pygan_way,
}


@functools.lru_cache(maxsize=1)
def _batch(shape: tuple[int, int, int, int], size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    index = torch.randperm(shape[0], generator=generator)[:size]
    flip = torch.rand(size, generator=generator) < 0.5
    return Batch(*(each.to(device) for each in (images, index, flip)))


def check(
    shape: tuple[int, int, int, int],
    size: int,
    precision: str,
    device: torch.device,
    sides: Sequence[Side],
) -> None:
    """Every pixel against float64."""
    batch = _batch(shape, size, device)
    exact = batch.images[batch.chosen].double() / 127.5 - 1
    exact[batch.flip] = exact[batch.flip].flip(2)
    exact = exact.permute(0, 3, 1, 2)
    plain = {"batch": relative_error([torch_way(batch, DTYPE[precision])()], [exact])}
    for side in sides:
        made = WAYS[side.name](batch, DTYPE[precision])()
        require_right(side.name, precision, {"batch": relative_error([made], [exact])}, plain)


def _side(name: str, shape: tuple[int, int, int, int], size: int, precision: str) -> Side:
    dtype = DTYPE[precision]

    def build(device: torch.device) -> Call:
        return WAYS[name](_batch(shape, size, device), dtype)

    elements = size * torch.Size(shape[1:]).numel()
    return Side(
        name=name,
        precision=precision,
        build=build,
        work=image_batch_work(elements, dtype.itemsize),
        baseline=name != "pygan",
        full_only=shape != SHAPES[0],
    )


def case_of(shape: tuple[int, int, int, int], precision: str, size: int = BATCH) -> Case:
    """All ways to batches of ``size`` out of images of ``shape``."""
    n, height, width, channels = shape
    return Case(
        name=f"image_batch-{channels}x{height}x{width}-{precision}",
        about=f"{size} of {n:,} uint8 images, half of them flipped, to {precision}",
        images=size,
        sides=tuple(_side(name, shape, size, precision) for name in WAYS),
        check=functools.partial(check, shape, size, precision),
    )


CASES = {
    case.name: case for shape in SHAPES for case in (case_of(shape, "fp32"), case_of(shape, "bf16"))
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_image_batch(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
