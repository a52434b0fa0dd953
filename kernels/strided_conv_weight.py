"""The gradient of a strided convolution's weight on a GPU, and weights as the kernels read them.

``weight_grad`` is a GEMM of A rows, 16*B columns and N*H*W terms. The terms are split over the
programs that the device runs at once; each writes its float32 sum, and a second kernel adds these
in their order, so the result is the same every time. Per element of dw: 2*N*H*W FLOPs, and 8 bytes
for every split; the maps are read once a tile.

``pack`` brings a float32 weight to [A, 4, 4, B] in the maps' dtype: 4 bytes an element read, 2 or
4 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pygan.kernels.strided_conv import SIZES, normalized
from pygan.kernels.strided_conv_configs import Config

LEAST_STEPS = 8  # of a split; fewer do not pay for its sum's way to memory and back


@triton.jit(do_not_specialize=[*SIZES, "splits", "chunk"])
def weight_grad_kernel(
    p_sums,
    p_small,
    p_big,
    p_coefficients,
    slope,
    images,
    height,
    width,
    big_height,
    big_width,
    small_channels,
    big_channels,
    splits,
    chunk,
    NORMALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one split of one group's ``images``: ``chunk`` positions, [A, 16, B] written.
    NORMALIZED is 0 for no map, 1 for small, 2 for big."""
    column_tiles = tl.cdiv(16 * big_channels, BLOCK_N)
    row_tiles = tl.cdiv(small_channels, BLOCK_M)
    i = tl.program_id(0)
    i_columns = i % column_tiles
    i_rows = i // column_tiles % row_tiles
    i_split = i // column_tiles // row_tiles
    i_group = i_split // splits
    a = i_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    c = i_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = c < 16 * big_channels
    if FLAT:
        b = c % big_channels
        tap_y = (c // big_channels // 4)[None, :]
        tap_x = (c // big_channels % 4)[None, :]
        o_c = (tap_y * big_width + tap_x) * big_channels + b[None, :]
    else:
        tap = i_columns * BLOCK_N // big_channels
        # Triton before 3.9 does not see that a remainder of two multiples is one.
        first_b = tl.multiple_of(i_columns * BLOCK_N % big_channels, BLOCK_N)
        b = first_b + tl.arange(0, BLOCK_N)
        tap_y = tap // 4
        tap_x = tap % 4
        o_c = ((tap_y * big_width + tap_x) * big_channels + b)[None, :]
    positions = images * height * width
    start = (i_split % splits) * chunk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, tl.minimum(start + chunk, positions), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = k % width
        y = k // width % height
        i_image = (k // width // height + i_group * images).to(tl.int64)
        m_k = k < positions
        m_small = m_k[:, None] & (a < small_channels)[None, :]
        o_small = ((i_image * height + y) * width + x) * small_channels
        small = tl.load(p_small + o_small[:, None] + a[None, :], mask=m_small, other=0.0)
        if NORMALIZED == 1:
            small = normalized(small, m_small, p_coefficients, i_group, a, small_channels, slope)
        i_y = 2 * y[:, None] - 1 + tap_y
        i_x = 2 * x[:, None] - 1 + tap_x
        m_big = m_k[:, None] & (i_y >= 0) & (i_y < big_height) & (i_x >= 0) & (i_x < big_width)
        m_big = m_big & m_c[None, :]
        o_big = ((i_image * big_height + 2 * y - 1) * big_width + 2 * x - 1) * big_channels
        big = tl.load(p_big + o_big[:, None] + o_c, mask=m_big, other=0.0)
        if NORMALIZED == 2:
            big = normalized(big, m_big, p_coefficients, i_group, b, big_channels, slope)
        acc = tl.dot(tl.trans(small), big, acc, input_precision=PRECISION)
    o_row = (i_split.to(tl.int64) * small_channels + a) * 16 * big_channels
    m = (a < small_channels)[:, None] & m_c[None, :]
    tl.store(p_sums + o_row[:, None] + c[None, :], acc, mask=m)


@triton.jit(do_not_specialize=["splits", "split_step"])
def weight_kernel(
    p_out,
    p_in,
    splits,
    split_step,
    out_tap_step,
    out_step,
    in_tap_step,
    in_step,
    big_channels,
    BLOCK: tl.constexpr,
):
    """Sum of ``splits`` weights for one small channel, [16, BLOCK], from one layout to another."""
    blocks = tl.cdiv(big_channels, BLOCK)
    i = tl.program_id(0)
    tap = tl.arange(0, 16)[:, None]
    b = (i % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = (tap < 16) & (b < big_channels)
    o = (i // blocks).to(tl.int64) * 16 * big_channels
    total = tl.zeros((16, BLOCK), tl.float32)
    p = p_in + o + tap * in_tap_step + b * in_step
    for _ in range(splits):
        total += tl.load(p, mask=m, other=0.0).to(tl.float32)
        p += split_step
    p = p_out + o + tap * out_tap_step + b * out_step
    tl.store(p, total.to(p_out.dtype.element_ty), mask=m)


def _steps(weight: torch.Tensor) -> tuple[int, int]:
    """Of a tap and of a big channel in ``weight [A, B, 4, 4]``."""
    return (1, 16) if weight.is_contiguous() else (weight.shape[1], 1)


def _add(
    out: torch.Tensor, weights: torch.Tensor, splits: int, tap_step: int, step: int
) -> torch.Tensor:
    a, b = out.shape[:2]
    block = min(128, triton.next_power_of_2(b))
    weight_kernel[(a * triton.cdiv(b, block),)](
        out, weights, splits, a * 16 * b, *_steps(out), tap_step, step, b, BLOCK=block
    )
    return out


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight [A, B, 4, 4]``, contiguous or channels_last, as channels_last in ``dtype``; itself
    where it is that."""
    last = torch.channels_last
    if weight.dtype is dtype and weight.is_contiguous(memory_format=last):
        return weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=last)
    return _add(out, weight, 1, *_steps(weight))


def split(
    small: torch.Tensor, big: torch.Tensor, groups: int, config: Config, programs: int
) -> tuple[int, int]:
    """Into how many runs of how many positions each group is cut so that about ``programs`` run."""
    batch, a, height, width = small.shape
    tiles = triton.cdiv(a, config.block_m) * triton.cdiv(16 * big.shape[1], config.block_n)
    steps = triton.cdiv(batch // groups * height * width, config.block_k)
    wanted = triton.cdiv(programs, tiles * groups)
    wanted = max(1, min(wanted, steps // LEAST_STEPS))
    chunk = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, chunk), chunk * config.block_k


def weight_grad(
    dweight: torch.Tensor,
    small: torch.Tensor,
    big: torch.Tensor,
    config: Config,
    precision: str,
    programs: int,
    normalized_map: str = "none",
    coefficients: torch.Tensor | None = None,
    slope: float = 0.0,
) -> None:
    """Fills ``dweight [A, B, 4, 4]`` (float32, contiguous or channels_last) from ``small`` and
    ``big`` in channels_last. ``coefficients`` are those of ``normalized_map``, "small" or "big"."""
    (batch, a, height, width), (_, b, big_height, big_width) = small.shape, big.shape
    groups = 1 if coefficients is None else coefficients.shape[0]
    splits, chunk = split(small, big, groups, config, programs)
    direct = splits * groups == 1 and dweight.is_contiguous(memory_format=torch.channels_last)
    sums = dweight
    if not direct:
        size = (splits * groups, a, 16, b)
        sums = torch.empty(size, dtype=torch.float32, device=small.device)
    tiles = triton.cdiv(a, config.block_m) * triton.cdiv(16 * b, config.block_n)
    weight_grad_kernel[(tiles * splits * groups,)](
        sums,
        small,
        big,
        small if coefficients is None else coefficients,
        slope,
        batch // groups,
        height,
        width,
        big_height,
        big_width,
        a,
        b,
        splits,
        chunk,
        NORMALIZED={"none": 0, "small": 1, "big": 2}[normalized_map],
        PRECISION=precision,
        FLAT=config.flat,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if not direct:
        _add(dweight, sums, splits * groups, b, 1)
