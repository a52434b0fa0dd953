"""The strided convolution's up and down for compute capability 9.0 and later: maps and weight are
copied to shared memory by tensor descriptors (TMA), whole tiles at a time, and multiplied there.

The GEMMs, their FLOPs and their bytes are those of ``strided_conv``: of ``up`` one phase a program.
A tile is a box of images, rows and columns of small, ``block_m`` positions in all. Copies fill
what is outside of an array with zeros, which is the padding: ``up`` reads boxes of small
[N, H, W, A] shifted by -1, 0 or 1; ``down`` reads big as [N, H, 2, W, 2*B], where each tap is a
box of one row parity and one column parity, shifted so too. The weight is [A, 16*B], tap-major.

Products are computed transposed, weight^T times map^T: Hopper's wgmma takes its second operand
from shared memory whatever its shape was, but Triton keeps a reshaped first one in registers.
Descriptors are made on the host and passed by value, so a CUDA graph holds its own.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pygan.kernels.strided_conv_configs import Config
from pygan.kernels.strided_conv_epilogue import finish

_ALIGNMENT = 16  # bytes, of an array that a descriptor is made for
_WIDEST = 64  # columns of a box: wider ones copy no faster, and down with statistics spills


@triton.jit
def _corner(
    i_tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr
):
    """First image, row and column of the box."""
    across = tl.cdiv(columns, BLOCK_X)
    along = tl.cdiv(rows, BLOCK_Y)
    i_image = i_tile // across // along * (BLOCK_M // (BLOCK_Y * BLOCK_X))
    return i_image, i_tile // across % along * BLOCK_Y, i_tile % across * BLOCK_X


@triton.jit
def _positions(i_image, y, x, BLOCK_M: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Images, rows and columns of the box whose first ones are these, each [BLOCK_M]."""
    m = tl.arange(0, BLOCK_M)
    return i_image + m // (BLOCK_Y * BLOCK_X), y + m // BLOCK_X % BLOCK_Y, x + m % BLOCK_X


# Where a size is a multiple of 16 or 1 tells these kernels nothing: one binary for all.
SIZES = ["images", "height", "width", "big_height", "big_width", "tiles"]


@triton.jit(do_not_specialize=SIZES)
def up_kernel(
    p_big,
    p_partials,
    d_small,
    d_weight,
    p_bias,
    images,
    height,
    width,
    big_height,
    big_width,
    small_channels,
    big_channels,
    tiles,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One tile of one phase. ``images`` and ``tiles`` are those of a group."""
    column_tiles = tl.cdiv(big_channels, BLOCK_N)
    i = tl.program_id(0)
    i_b = i % column_tiles * BLOCK_N
    i = i // column_tiles
    odd_y = i % 4 // 2
    odd_x = i % 2
    i_tile = i // 4
    i_group = i_tile // tiles
    # An odd big map has a last row or column of even phase only.
    rows = (big_height + 1) // 2
    columns = (big_width + 1) // 2
    i_image, i_y, i_x = _corner(i_tile % tiles, rows, columns, BLOCK_M, BLOCK_Y, BLOCK_X)
    blocks = tl.cdiv(small_channels, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(4 * blocks):
        i_a = step % blocks * BLOCK_K
        shift_y = step // blocks // 2 - 1 + odd_y
        shift_x = step // blocks % 2 - 1 + odd_x
        tap = (1 + odd_y - 2 * shift_y) * 4 + 1 + odd_x - 2 * shift_x
        small = d_small.load([i_group * images + i_image, i_y + shift_y, i_x + shift_x, i_a])
        # Columns past the last channel are the next tap's; they are not stored.
        weight = d_weight.load([i_a, tap * big_channels + i_b])
        small = tl.reshape(small, (BLOCK_M, BLOCK_K))
        acc = tl.dot(weight.T, small.T, acc, input_precision=PRECISION)
    image, y, x = _positions(i_image, i_y, i_x, BLOCK_M, BLOCK_Y, BLOCK_X)
    m = (image < images) & (2 * y + odd_y < big_height) & (2 * x + odd_x < big_width)
    image = (i_group * images + image).to(tl.int64)
    o_row = ((image * big_height + 2 * y + odd_y) * big_width + 2 * x + odd_x) * big_channels
    b = i_b + tl.arange(0, BLOCK_N)
    finish(
        p_big,
        p_partials,
        p_bias,
        acc.T,
        o_row,
        b,
        m[:, None],
        i,
        b,
        b < big_channels,
        big_channels,
        BIAS,
        STATISTICS,
        STORE_FIRST=True,
    )


@triton.jit(do_not_specialize=SIZES)
def down_kernel(
    p_small,
    p_partials,
    d_big,
    d_weight,
    p_bias,
    images,
    height,
    width,
    big_height,
    big_width,
    small_channels,
    big_channels,
    tiles,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One tile. ``images`` and ``tiles`` are those of a group; BLOCK_K divides big_channels."""
    column_tiles = tl.cdiv(small_channels, BLOCK_N)
    i = tl.program_id(0)
    i_a = i % column_tiles * BLOCK_N
    i_tile = i // column_tiles
    i_group = i_tile // tiles
    i_image, i_y, i_x = _corner(i_tile % tiles, height, width, BLOCK_M, BLOCK_Y, BLOCK_X)
    blocks = big_channels // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(16 * blocks):
        i_b = step % blocks * BLOCK_K
        tap = step // blocks
        # Rows 2*y - 1 + tap_y of big are of parity (tap_y + 1) % 2, as are columns.
        after_y = tap // 4 + 1
        after_x = tap % 4 + 1
        big = d_big.load(
            [
                i_group * images + i_image,
                i_y + after_y // 2 - 1,
                after_y % 2,
                i_x + after_x // 2 - 1,
                after_x % 2 * big_channels + i_b,
            ]
        )
        weight = d_weight.load([i_a, tap * big_channels + i_b])
        big = tl.reshape(big, (BLOCK_M, BLOCK_K))
        acc = tl.dot(weight, big.T, acc, input_precision=PRECISION)
    image, y, x = _positions(i_image, i_y, i_x, BLOCK_M, BLOCK_Y, BLOCK_X)
    m = (image < images) & (y < height) & (x < width)
    image = (i_group * images + image).to(tl.int64)
    o_row = ((image * height + y) * width + x) * small_channels
    a = i_a + tl.arange(0, BLOCK_N)
    finish(
        p_small,
        p_partials,
        p_bias,
        acc.T,
        o_row,
        a,
        m[:, None],
        i_tile,
        a,
        a < small_channels,
        small_channels,
        BIAS,
        STATISTICS,
        STORE_FIRST=True,
    )


def extent(
    conv_pass: str, small: torch.Tensor, big: torch.Tensor, groups: int
) -> tuple[int, int, int]:
    """Images, rows and columns of small in a group; an odd big map has a half position more."""
    height, width = small.shape[2:]
    if conv_pass == "up":
        height, width = ((size + 1) // 2 for size in big.shape[2:])
    return small.shape[0] // groups, height, width


@functools.cache
def box(covered: tuple[int, int, int], positions: int) -> tuple[int, int, int]:
    """Powers of two whose product is ``positions``, a power of two: the images, rows and columns
    of the box that covers an extent in the fewest steps; the widest of those, for whole lines."""
    sizes = [1 << i for i in range(positions.bit_length())]
    areas = itertools.product(sizes, (x for x in sizes if x <= _WIDEST))
    found = [(positions // (y * x), y, x) for y, x in areas if y * x <= positions]
    return min(found, key=lambda block: (_steps(covered, block), -block[2], -block[1]))


def _steps(covered: tuple[int, int, int], block: tuple[int, int, int]) -> int:
    return math.prod(triton.cdiv(*pair) for pair in zip(covered, block, strict=True))


def tiles(covered: tuple[int, int, int], positions: int) -> int:
    """Boxes of so many positions that cover an extent."""
    return _steps(covered, box(covered, positions))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _descriptor(x: torch.Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    """Of the values of ``x`` as they lie in memory, seen as an array of this shape."""
    strides = [*itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1)]
    return TensorDescriptor(_aligned(x), shape, strides[::-1], block)


def run(
    conv_pass: str,
    small: torch.Tensor,
    big: torch.Tensor,
    weight: torch.Tensor,
    config: Config,
    precision: str,
    bias: torch.Tensor | None,
    statistics: torch.Tensor | None,
    groups: int,
) -> None:
    """As ``strided_conv.run`` without coefficients, of a ``config`` with descriptors that fits the
    channels; for down big's sizes are even."""
    (batch, a, height, width), (_, b, big_height, big_width) = small.shape, big.shape
    covered = extent(conv_pass, small, big, groups)
    images, rows, columns = box(covered, config.block_m)
    if conv_pass == "up":
        y, channels, phases, kernel = big, b, 4, up_kernel
        x = _descriptor(small, [batch, height, width, a], [images, rows, columns, config.block_k])
        taps = [config.block_k, config.block_n]
    else:
        y, channels, phases, kernel = small, a, 1, down_kernel
        x = _descriptor(
            big,
            [batch, height, 2, width, 2 * b],
            [images, rows, 1, columns, config.block_k],
        )
        taps = [config.block_n, config.block_k]
    in_group = tiles(covered, config.block_m)
    programs = triton.cdiv(channels, config.block_n) * phases * in_group * groups
    kernel[(programs,)](
        y,
        y if statistics is None else statistics,
        x,
        _descriptor(weight, [a, 16 * b], taps),
        y if bias is None else bias,
        batch // groups,
        height,
        width,
        big_height,
        big_width,
        a,
        b,
        in_group,
        BIAS=bias is not None,
        STATISTICS=statistics is not None,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_Y=rows,
        BLOCK_X=columns,
        num_warps=config.warps,
        num_stages=config.stages,
    )
