"""The 4x4 convolution of stride 2 and padding 1 and its transpose on a GPU, as implicit GEMMs.

``up`` is four 2x2 convolutions of stride 1, one for each parity of big's rows and columns: GEMMs
of N*H*W rows, B columns and 4*A terms. Either a program computes one of them, or all four side by
side as 4*B columns of the nine shifted maps, which reads small 9 times, not 16, and multiplies
20/9 as often as needed: for few big channels. ``down`` is one GEMM of N*H*W rows, A columns and
16*B terms.

Per position of small: 32*A*B FLOPs, A + 4*B values read or written: at 64 channels and more in
bfloat16 above 400 FLOPs a byte, bound by the tensor cores; below about 16 big channels by memory.

Maps are channels_last, weights [A, 4, 4, B] in the maps' dtype (``strided_conv_weight.pack``),
sums float32. A map that is normalized counts as max(z, slope * z), z = (x - mean) * scale + shift,
with coefficients [groups, 3, channels] for as many equal runs of the batch. Statistics are of the
float32 sums with their bias, before they are rounded: per channel and tile count, mean and sum of
squared deviations, the mean first, then the deviations from it.

These kernels load through pointers and run on any GPU; ``strided_conv_descriptors`` has others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pygan.kernels import strided_conv_descriptors
from pygan.kernels.strided_conv_configs import Config
from pygan.kernels.strided_conv_epilogue import finish


@triton.jit
def normalized(x, m, p_coefficients, i_group, c, channels, slope):
    """max(z, slope * z) of x [rows, channels c], 0 where not m, in x's dtype."""
    p = p_coefficients + i_group * 3 * channels + c
    mean = tl.load(p, mask=c < channels, other=0.0)[None, :]
    scale = tl.load(p + channels, mask=c < channels, other=0.0)[None, :]
    shift = tl.load(p + 2 * channels, mask=c < channels, other=0.0)[None, :]
    z = (x.to(tl.float32) - mean) * scale + shift
    z = tl.where(z < 0.0, z * slope, z)
    return tl.where(m, z, 0.0).to(x.dtype)


# Where a size is a multiple of 16 or 1 tells these kernels nothing: one binary for all.
SIZES = ["images", "height", "width", "big_height", "big_width"]


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def up_kernel(
    p_big,
    p_partials,
    p_small,
    p_weight,
    p_bias,
    p_coefficients,
    slope,
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
    NORMALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one phase, or of all four. ``images`` and ``tiles`` are those of a group."""
    column_tiles = tl.cdiv(PHASES * big_channels, BLOCK_N)
    i = tl.program_id(0)
    i_columns = i % column_tiles
    i = i // column_tiles
    i_phase = i % (4 // PHASES)
    i_tile = i // (4 // PHASES)
    i_group = i_tile // tiles
    # An odd big map has a last row or column of even phase only.
    columns = (big_width + 1) // 2
    rows = (big_height + 1) // 2
    m = (i_tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = m % columns
    y = m // columns % rows
    i_image = m // columns // rows
    m_image = i_image < images
    i_image = (i_image + i_group * images).to(tl.int64)
    c = i_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = c < PHASES * big_channels
    if PHASES == 1:
        b = c
        odd_y = i_phase // 2
        odd_x = i_phase % 2
        m_big = (m_image & (2 * y + odd_y < big_height) & (2 * x + odd_x < big_width))[:, None]
        i_row = i_tile * 4 + i_phase
    else:
        b = c % big_channels
        odd_y = c // big_channels // 2
        odd_x = c // big_channels % 2
        m_big = m_image[:, None] & (2 * y[:, None] + odd_y[None, :] < big_height)
        m_big = m_big & (2 * x[:, None] + odd_x[None, :] < big_width)
        i_row = i_tile * 4 + c // big_channels
    o_small = ((i_image * height + y) * width + x) * small_channels
    blocks = tl.cdiv(small_channels, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range((4 if PHASES == 1 else 9) * blocks):
        shift = step // blocks
        a = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        if PHASES == 1:
            shift_y = shift // 2 - 1 + odd_y
            shift_x = shift % 2 - 1 + odd_x
        else:
            shift_y = shift // 3 - 1
            shift_x = shift % 3 - 1
        m_row = m_image & (y + shift_y >= 0) & (y + shift_y < height)
        m_row = m_row & (x + shift_x >= 0) & (x + shift_x < width)
        m_small = m_row[:, None] & (a < small_channels)[None, :]
        o_a = (shift_y * width + shift_x) * small_channels + a
        small = tl.load(p_small + o_small[:, None] + o_a[None, :], mask=m_small, other=0.0)
        if NORMALIZED:
            small = normalized(small, m_small, p_coefficients, i_group, a, small_channels, slope)
        tap_y = 1 + odd_y - 2 * shift_y
        tap_x = 1 + odd_x - 2 * shift_x
        m_weight = m_c
        if PHASES == 4:
            m_weight = m_c & (tap_y >= 0) & (tap_y < 4) & (tap_x >= 0) & (tap_x < 4)
        o_weight = (a * 16 * big_channels)[:, None] + ((tap_y * 4 + tap_x) * big_channels + b)[
            None, :
        ]
        m_weight = (a < small_channels)[:, None] & m_weight[None, :]
        weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)
        acc = tl.dot(small, weight, acc, input_precision=PRECISION)
    o_big = ((i_image * big_height + 2 * y) * big_width + 2 * x) * big_channels
    o_c = (odd_y * big_width + odd_x) * big_channels + b
    finish(
        p_big,
        p_partials,
        p_bias,
        acc,
        o_big,
        o_c,
        m_big,
        i_row,
        b,
        m_c,
        big_channels,
        BIAS,
        STATISTICS,
        STORE_FIRST=False,
    )


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def down_kernel(
    p_small,
    p_partials,
    p_big,
    p_weight,
    p_bias,
    p_coefficients,
    slope,
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
    NORMALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile. ``images`` and ``tiles`` are those of a group."""
    column_tiles = tl.cdiv(small_channels, BLOCK_N)
    i = tl.program_id(0)
    i_tile = i // column_tiles
    i_group = i_tile // tiles
    m = (i_tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = m % width
    y = m // width % height
    i_image = m // width // height
    m_image = i_image < images
    i_image = (i_image + i_group * images).to(tl.int64)
    a = (i % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_a = a < small_channels
    o_big = ((i_image * big_height + 2 * y - 1) * big_width + 2 * x - 1) * big_channels
    blocks = tl.cdiv(big_channels, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(16 * big_channels, BLOCK_K) if FLAT else 16 * blocks):
        if FLAT:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            b = k % big_channels
            tap_y = k // big_channels // 4
            tap_x = k // big_channels % 4
            m_k = k < 16 * big_channels
            i_y = 2 * y[:, None] - 1 + tap_y[None, :]
            i_x = 2 * x[:, None] - 1 + tap_x[None, :]
        else:
            b = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            tap_y = step // blocks // 4
            tap_x = step // blocks % 4
            k = (tap_y * 4 + tap_x) * big_channels + b
            m_k = b < big_channels
            i_y = 2 * y[:, None] - 1 + tap_y
            i_x = 2 * x[:, None] - 1 + tap_x
        m_big = m_image[:, None] & (i_y >= 0) & (i_y < big_height) & (i_x >= 0) & (i_x < big_width)
        m_big = m_big & m_k[None, :]
        o_k = (tap_y * big_width + tap_x) * big_channels + b
        big = tl.load(p_big + o_big[:, None] + o_k[None, :], mask=m_big, other=0.0)
        if NORMALIZED:
            big = normalized(big, m_big, p_coefficients, i_group, b, big_channels, slope)
        o_weight = k[:, None] + (a * 16 * big_channels)[None, :]
        m_weight = m_k[:, None] & m_a[None, :]
        weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)
        acc = tl.dot(big, weight, acc, input_precision=PRECISION)
    o_small = ((i_image * height + y) * width + x) * small_channels
    finish(
        p_small,
        p_partials,
        p_bias,
        acc,
        o_small,
        a,
        m_image[:, None],
        i_tile,
        a,
        m_a,
        small_channels,
        BIAS,
        STATISTICS,
        STORE_FIRST=False,
    )


def _tiles(
    conv_pass: str, small: torch.Tensor, big: torch.Tensor, groups: int, config: Config
) -> int:
    """Tiles of rows of the GEMM in a group of the batch."""
    extent = strided_conv_descriptors.extent(conv_pass, small, big, groups)
    if config.descriptors:
        return strided_conv_descriptors.tiles(extent, config.block_m)
    return triton.cdiv(math.prod(extent), config.block_m)


def partials(
    conv_pass: str, small: torch.Tensor, big: torch.Tensor, groups: int, config: Config
) -> torch.Tensor:
    """An array [groups, rows, 3, channels] for the statistics of the pass: count, mean and squared
    deviations of so many parts of each group. A part may be empty, its mean then 0."""
    rows = _tiles(conv_pass, small, big, groups, config)
    rows, y = (4 * rows, big) if conv_pass == "up" else (rows, small)
    return torch.empty((groups, rows, 3, y.shape[1]), dtype=torch.float32, device=y.device)


def run(
    conv_pass: str,
    small: torch.Tensor,
    big: torch.Tensor,
    weight: torch.Tensor,
    config: Config,
    precision: str,
    bias: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    slope: float = 0.0,
    groups: int = 1,
) -> None:
    """up, which fills ``big [N, B, 2H or 2H + 1, 2W or 2W + 1]`` from ``small [N, A, H, W]``, or
    down the other way: both channels_last, ``weight [A, 4, 4, B]``, ``bias`` float32, and
    ``statistics`` as :func:`partials` makes them. ``groups`` divides N. A configuration with
    descriptors takes no ``coefficients``."""
    if config.descriptors:
        if coefficients is not None:
            raise ValueError("a map that descriptors copy is not normalized: give no coefficients")
        extra = (bias, statistics, groups)
        strided_conv_descriptors.run(conv_pass, small, big, weight, config, precision, *extra)
        return
    (batch, a, height, width), (_, b, big_height, big_width) = small.shape, big.shape
    tiles = _tiles(conv_pass, small, big, groups, config)
    going_up = conv_pass == "up"
    if going_up:
        programs = triton.cdiv(config.phases * b, config.block_n) * (4 // config.phases)
        form = {"PHASES": config.phases}
    else:
        programs = triton.cdiv(a, config.block_n)
        form = {"FLAT": config.flat}
    y, x = (big, small) if going_up else (small, big)
    (up_kernel if going_up else down_kernel)[(programs * tiles * groups,)](
        y,
        weight if statistics is None else statistics,
        x,
        weight,
        weight if bias is None else bias,
        weight if coefficients is None else coefficients,
        slope,
        batch // groups,
        height,
        width,
        big_height,
        big_width,
        a,
        b,
        tiles,
        BIAS=bias is not None,
        STATISTICS=statistics is not None,
        NORMALIZED=coefficients is not None,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        **form,
    )
