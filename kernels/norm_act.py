"""Batch norm and activation on a GPU, with statistics per group of the batch.

Bytes per value of a map in bfloat16 (float32: twice): training forward 6 (x twice, y once) and
backward 10 (x and dy twice, dx once); evaluation forward 4, backward 6 without gradients of the
parameters. About 10 FLOPs a value, 20 with tanh or sigmoid: bound by memory, and for small maps by
launches. Where one program can hold the values of its channels in cache, it does everything in one
launch and the second reading costs no memory traffic (forward 4, backward 6); elsewhere there are
three launches each way: sums of a block of rows, their merging, the values.

A map is groups of ``rows`` values a channel, ``[groups, rows, channels]`` in channels_last and
``[groups, rows / size, channels, size]`` otherwise. All sums are taken in a fixed order, without
atomics, so that two runs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 2048
WARPS = 8  # 8 values a thread; more spill on some GPU
# A thread may have in the kernels that hold most: the assembler spills for two blocks more.
REGISTERS = 128
# Values a channel that one program alone takes through statistics and application.
WHOLE_ROWS = 2048
WHOLE_ROWS_OF_MANY = 32768  # where there are at least MANY programs
MANY = 128
PROGRAMS = 512  # of the kernels that deal with blocks of rows
LONGEST = 64  # tiles a program; bounds the cancellation in its shifted sums
MERGED = 32  # partial sums of MERGED_CHANNELS channels that are merged at a time
MERGED_CHANNELS = 16
WIDEST = 64  # channels of a tile


class Map(NamedTuple):
    """How a map is cut: ``rows`` values a channel and group, tiles, blocks of rows."""

    rows: int
    channels: int
    size: int
    groups: int
    channels_last: bool
    BLOCK_R: int
    BLOCK_C: int
    blocks: int  # of block_rows rows in a group
    block_rows: int
    whole: bool  # a program takes all rows of its channels

    @property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.channels, self.BLOCK_C)


def cut(rows: int, channels: int, size: int, groups: int, channels_last: bool) -> Map:
    """The tiles for a map of so many rows a group."""
    # Neighbouring threads have to read neighbouring values: of channels, or of one channel.
    BLOCK_C = min(triton.next_power_of_2(channels), WIDEST) if channels_last else 1
    programs = triton.cdiv(channels, BLOCK_C) * groups
    while channels_last and BLOCK_C > 16 and programs < MANY:
        BLOCK_C //= 2
        programs = triton.cdiv(channels, BLOCK_C) * groups
    BLOCK_R = min(TILE // BLOCK_C, max(triton.next_power_of_2(rows), 16))
    whole = rows <= (WHOLE_ROWS_OF_MANY if programs >= MANY else WHOLE_ROWS)
    tiles = triton.cdiv(rows, BLOCK_R)
    each = min(max(triton.cdiv(tiles * programs, PROGRAMS), 1), LONGEST)
    blocks = triton.cdiv(tiles, each)
    return Map(
        *(rows, channels, size, groups, channels_last, BLOCK_R, BLOCK_C),
        *(blocks, each * BLOCK_R, whole),
    )


@triton.jit
def _activate(z, slope, ACTIVATION: tl.constexpr):
    """f(z); NaN comes through."""
    if ACTIVATION == 1:
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == 2:
        z = tl.where(z > 0.0, z, z * slope)
    elif ACTIVATION == 3:
        size = tl.abs(z)
        e = tl.exp(-2.0 * size)
        far = (1.0 - e) / (1.0 + e)
        # 1 - e cancels near 0; the series is exact to rounding there.
        q = z * z
        near = z * (1.0 - q * (1.0 / 3.0 - q * (2.0 / 15.0 - q * (17.0 / 315.0))))
        z = tl.where(size < 0.2, near, tl.where(z < 0.0, -far, far))
    elif ACTIVATION == 4:
        e = tl.exp(-tl.abs(z))
        z = tl.where(z > 0.0, 1.0, e) / (1.0 + e)
    return z


@triton.jit
def _offsets(i_row, i_channel, channels, size, CHANNELS_LAST: tl.constexpr):
    """Where a tile of rows [R] and channels [C] of one group lies: [R, C], int64."""
    if CHANNELS_LAST:
        o_row = i_row.to(tl.int64) * channels
        o_channel = i_channel.to(tl.int64)
    else:
        o_row = (i_row // size).to(tl.int64) * channels * size + i_row % size
        o_channel = i_channel.to(tl.int64) * size
    return o_row[:, None] + o_channel[None, :]


@triton.jit
def _per_channel(p, i_channel, channels, absent):
    """Values [C] of a parameter, or ``absent`` where there is none."""
    if p is not None:
        value = tl.load(p + i_channel, mask=i_channel < channels, other=0.0)
    else:
        value = tl.zeros(i_channel.shape, tl.float32) + absent
    return value


@triton.jit
def _first_value(p_group, i_channel, channels, size, CHANNELS_LAST: tl.constexpr):
    """The first of each channel [C] of a group."""
    o = i_channel.to(tl.int64)
    if not CHANNELS_LAST:
        o *= size
    return tl.load(p_group + o, mask=i_channel < channels, other=0.0).to(tl.float32)


@triton.jit
def _moments(
    p_x,
    first,
    last,
    i_channel,
    channels,
    size,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Mean [C], given as a shift and what to add, and sum of squared deviations [C] of the rows of
    one group from first to last.

    The shift is the mean of the first tile, so n values lose at most a factor of n / BLOCK_R.
    """
    m_channel = (i_channel < channels)[None, :]
    i_row = first + tl.arange(0, BLOCK_R)
    m = (i_row < last)[:, None] & m_channel
    o = _offsets(i_row, i_channel, channels, size, CHANNELS_LAST)
    x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    shift = tl.sum(x, 0) / tl.minimum(last - first, BLOCK_R).to(tl.float32)
    total = tl.where(m, x - shift[None, :], 0.0)
    squares = total * total
    for start in range(first + BLOCK_R, last, BLOCK_R):
        i_row = start + tl.arange(0, BLOCK_R)
        m = (i_row < last)[:, None] & m_channel
        o = _offsets(i_row, i_channel, channels, size, CHANNELS_LAST)
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        d = tl.where(m, x - shift[None, :], 0.0)
        total += d
        squares += d * d
    count = (last - first).to(tl.float32)
    moved = tl.sum(total, 0) / count
    deviations = tl.sum(squares, 0) - moved * moved * count
    return shift, moved, tl.where(deviations < 0.0, 0.0, deviations)


@triton.jit
def _apply(
    p_y,
    p_x,
    first,
    last,
    i_channel,
    mean,
    invstd,
    weight,
    bias,
    channels,
    size,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    for start in range(first, last, BLOCK_R):
        i_row = start + tl.arange(0, BLOCK_R)
        m = (i_row < last)[:, None] & (i_channel < channels)[None, :]
        o = _offsets(i_row, i_channel, channels, size, CHANNELS_LAST)
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * invstd[None, :]
        y = _activate(xhat * weight[None, :] + bias[None, :], slope, ACTIVATION)
        tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def norm_act_whole_kernel(
    p_y,
    p_statistics,
    p_var,
    p_running_mean,
    p_running_var,
    p_x,
    p_weight,
    p_bias,
    rows,
    channels,
    size,
    groups,
    run,
    channel_blocks,
    momentum,
    unbiased,
    eps,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics [2, groups, C], the unbiased var [groups, C] and y of a block of channels,
    ``run`` groups one after another."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = i_program // channel_blocks * run
    m_channel = i_channel < channels
    momentum = tl.cast(momentum, tl.float32)
    slope = tl.cast(slope, tl.float32)
    weight = _per_channel(p_weight, i_channel, channels, 1.0)
    bias = _per_channel(p_bias, i_channel, channels, 0.0)
    running_mean = _per_channel(p_running_mean, i_channel, channels, 0.0)
    running_var = _per_channel(p_running_var, i_channel, channels, 0.0)
    start = i_program * 0
    for i_group in range(i_first, i_first + run):
        o_group = tl.cast(i_group, tl.int64) * channels
        shift, moved, deviations = _moments(
            p_x + o_group * rows,
            start,
            start + rows,
            i_channel,
            channels,
            size,
            CHANNELS_LAST,
            BLOCK_R,
        )
        mean = shift + moved
        var = deviations / (start + rows).to(tl.float32)
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
        p_mean = p_statistics + o_group + i_channel
        tl.store(p_mean, mean, mask=m_channel)
        tl.store(p_mean + tl.cast(groups, tl.int64) * channels, invstd, mask=m_channel)
        var *= tl.cast(unbiased, tl.float32)
        if p_var is not None:
            tl.store(p_var + o_group + i_channel, var, mask=m_channel)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var - running_var)
        if p_y is not None:
            _apply(
                p_y + o_group * rows,
                p_x + o_group * rows,
                start,
                start + rows,
                i_channel,
                mean,
                invstd,
                weight,
                bias,
                channels,
                size,
                slope,
                ACTIVATION,
                CHANNELS_LAST,
                BLOCK_R,
            )
    if p_running_mean is not None:
        tl.store(p_running_mean + i_channel, running_mean, mask=m_channel)
        tl.store(p_running_var + i_channel, running_var, mask=m_channel)


@triton.jit
def norm_act_moments_kernel(
    p_partial,
    p_x,
    rows,
    block_rows,
    blocks,
    channels,
    size,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean less the group's first value, so that means far from zero merge without loss, and
    squared deviations of a block of rows: partial [groups, blocks, 2, C]."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_partial = i_program // channel_blocks
    first = i_partial % blocks * block_rows
    p_group = p_x + (i_partial // blocks).to(tl.int64) * rows * channels
    origin = _first_value(p_group, i_channel, channels, size, CHANNELS_LAST)
    shift, moved, deviations = _moments(
        p_group,
        first,
        tl.minimum(first + block_rows, rows),
        i_channel,
        channels,
        size,
        CHANNELS_LAST,
        BLOCK_R,
    )
    p_mean = p_partial + i_partial.to(tl.int64) * 2 * channels + i_channel
    tl.store(p_mean, (shift - origin) + moved, mask=i_channel < channels)
    tl.store(p_mean + channels, deviations, mask=i_channel < channels)


@triton.jit
def norm_act_merge_kernel(
    p_statistics,
    p_var,
    p_running_mean,
    p_running_var,
    p_partial,
    p_x,
    rows,
    block_rows,
    blocks,
    channels,
    size,
    groups,
    run,
    channel_blocks,
    momentum,
    unbiased,
    eps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial [groups, blocks, 2, C] -> statistics [2, groups, C], the unbiased var [groups, C] and
    the running statistics."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = i_program // channel_blocks * run
    m_channel = i_channel < channels
    momentum = tl.cast(momentum, tl.float32)
    running_mean = _per_channel(p_running_mean, i_channel, channels, 0.0)
    running_var = _per_channel(p_running_var, i_channel, channels, 0.0)
    count = (i_program * 0 + rows).to(tl.float32)
    for i_group in range(i_first, i_first + run):
        p_group = p_partial + tl.cast(i_group, tl.int64) * blocks * 2 * channels + i_channel
        p_map = p_x + tl.cast(i_group, tl.int64) * rows * channels
        origin = _first_value(p_map, i_channel, channels, size, CHANNELS_LAST)
        total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for start in range(0, blocks, BLOCK_B):
            i_block = start + tl.arange(0, BLOCK_B)
            m = (i_block < blocks)[:, None] & m_channel[None, :]
            n = tl.minimum(rows - i_block * block_rows, block_rows).to(tl.float32)
            p_mean = p_group[None, :] + (i_block.to(tl.int64) * 2 * channels)[:, None]
            mean = tl.load(p_mean, mask=m, other=0.0)
            total += tl.where(m, n[:, None] * mean, 0.0)
        merged = tl.sum(total, 0) / count
        squares = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for start in range(0, blocks, BLOCK_B):
            i_block = start + tl.arange(0, BLOCK_B)
            m = (i_block < blocks)[:, None] & m_channel[None, :]
            n = tl.minimum(rows - i_block * block_rows, block_rows).to(tl.float32)
            p_mean = p_group[None, :] + (i_block.to(tl.int64) * 2 * channels)[:, None]
            d = tl.load(p_mean, mask=m, other=0.0) - merged[None, :]
            deviations = tl.load(p_mean + channels, mask=m, other=0.0)
            squares += tl.where(m, deviations + n[:, None] * d * d, 0.0)
        var = tl.sum(squares, 0) / count
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
        o_mean = tl.cast(i_group, tl.int64) * channels + i_channel
        mean = origin + merged
        tl.store(p_statistics + o_mean, mean, mask=m_channel)
        o_invstd = o_mean + tl.cast(groups, tl.int64) * channels
        tl.store(p_statistics + o_invstd, invstd, mask=m_channel)
        var *= tl.cast(unbiased, tl.float32)
        if p_var is not None:
            tl.store(p_var + o_mean, var, mask=m_channel)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var - running_var)
    if p_running_mean is not None:
        tl.store(p_running_mean + i_channel, running_mean, mask=m_channel)
        tl.store(p_running_var + i_channel, running_var, mask=m_channel)


@triton.jit
def norm_act_apply_kernel(
    p_y,
    p_statistics,
    p_running_mean,
    p_running_var,
    p_x,
    p_weight,
    p_bias,
    rows,
    block_rows,
    blocks,
    channels,
    size,
    groups,
    channel_blocks,
    eps,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of a block of rows from statistics [2, groups, C]; with running ones, statistics are those
    and are written."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_block = i_program // channel_blocks
    m_channel = i_channel < channels
    first = i_block % blocks * block_rows
    o_group = (i_block // blocks).to(tl.int64) * channels
    p_mean = p_statistics + o_group + i_channel
    p_invstd = p_mean + tl.cast(groups, tl.int64) * channels
    if p_running_mean is not None:
        mean = tl.load(p_running_mean + i_channel, mask=m_channel, other=0.0)
        var = tl.load(p_running_var + i_channel, mask=m_channel, other=0.0)
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
        if i_block == 0:
            tl.store(p_mean, mean, mask=m_channel)
            tl.store(p_invstd, invstd, mask=m_channel)
    else:
        mean = tl.load(p_mean, mask=m_channel, other=0.0)
        invstd = tl.load(p_invstd, mask=m_channel, other=0.0)
    _apply(
        p_y + o_group * rows,
        p_x + o_group * rows,
        first,
        tl.minimum(first + block_rows, rows),
        i_channel,
        mean,
        invstd,
        _per_channel(p_weight, i_channel, channels, 1.0),
        _per_channel(p_bias, i_channel, channels, 0.0),
        channels,
        size,
        tl.cast(slope, tl.float32),
        ACTIVATION,
        CHANNELS_LAST,
        BLOCK_R,
    )


def statistics_and_values(
    y: torch.Tensor | None,
    statistics: torch.Tensor,
    variance: torch.Tensor | None,
    running: tuple[torch.Tensor, torch.Tensor] | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    map: Map,
    momentum: float,
    eps: float,
    activation: int,
    slope: float,
) -> None:
    """Training: fills ``statistics [2, groups, C]``, and y and the unbiased ``variance``
    ``[groups, C]`` where wanted; ``running`` follow."""
    mean, var = (None, None) if running is None else running
    # Running statistics follow group by group, so one program takes all groups of its channels.
    run = 1 if running is None else map.groups
    unbiased = map.rows / max(map.rows - 1, 1)
    programs = map.channel_blocks * (map.groups // run)
    if map.whole:
        norm_act_whole_kernel[(programs,)](
            *(y, statistics, variance, mean, var, x, weight, bias),
            *(map.rows, map.channels, map.size, map.groups, run, map.channel_blocks),
            *(float(momentum), unbiased, float(eps), float(slope)),
            ACTIVATION=activation,
            CHANNELS_LAST=map.channels_last,
            BLOCK_R=map.BLOCK_R,
            BLOCK_C=map.BLOCK_C,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
        return
    partial = x.new_empty((map.groups, map.blocks, 2, map.channels), dtype=torch.float32)
    norm_act_moments_kernel[(map.channel_blocks * map.groups * map.blocks,)](
        *(partial, x, map.rows, map.block_rows, map.blocks, map.channels, map.size),
        map.channel_blocks,
        CHANNELS_LAST=map.channels_last,
        BLOCK_R=map.BLOCK_R,
        BLOCK_C=map.BLOCK_C,
        num_warps=WARPS,
    )
    channel_blocks = triton.cdiv(map.channels, MERGED_CHANNELS)
    norm_act_merge_kernel[(channel_blocks * (map.groups // run),)](
        *(statistics, variance, mean, var, partial, x, map.rows, map.block_rows, map.blocks),
        *(map.channels, map.size, map.groups, run, channel_blocks),
        *(float(momentum), unbiased, float(eps)),
        CHANNELS_LAST=map.channels_last,
        BLOCK_B=MERGED,
        BLOCK_C=MERGED_CHANNELS,
        maxnreg=REGISTERS,
    )
    if y is not None:
        values(y, statistics, None, x, weight, bias, map, eps, activation, slope)


def values(
    y: torch.Tensor,
    statistics: torch.Tensor,
    running: tuple[torch.Tensor, torch.Tensor] | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    map: Map,
    eps: float,
    activation: int,
    slope: float,
) -> None:
    """Fills y by ``statistics [2, groups, C]``, or by ``running``, which are then filled into
    those of one group."""
    mean, var = (None, None) if running is None else running
    norm_act_apply_kernel[(map.channel_blocks * map.groups * map.blocks,)](
        *(y, statistics, mean, var, x, weight, bias, map.rows, map.block_rows, map.blocks),
        *(map.channels, map.size, map.groups, map.channel_blocks, float(eps), float(slope)),
        ACTIVATION=activation,
        CHANNELS_LAST=map.channels_last,
        BLOCK_R=map.BLOCK_R,
        BLOCK_C=map.BLOCK_C,
        num_warps=WARPS,
    )
