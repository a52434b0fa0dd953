"""Gradients of :mod:`pygan.kernels.norm_act`, whose roofline, tiles and layouts hold here too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pygan.kernels.norm_act import (
    MERGED,
    MERGED_CHANNELS,
    REGISTERS,
    WARPS,
    Map,
    _offsets,
    _per_channel,
)

FEW_GROUPS = 4


@triton.jit
def _through(dy, z, slope, ACTIVATION: tl.constexpr):
    """dy * f'(z)."""
    if ACTIVATION == 1:
        dy = tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == 2:
        dy = tl.where(z > 0.0, dy, dy * slope)
    elif ACTIVATION == 3:
        e = tl.exp(-2.0 * tl.abs(z))
        dy = dy * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    elif ACTIVATION == 4:
        e = tl.exp(-tl.abs(z))
        dy = dy * (e / ((1.0 + e) * (1.0 + e)))
    return dy


@triton.jit
def _sums(
    p_x,
    p_dy,
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
    """Sums [C] of dz and of dz * xhat over the rows of one group from first to last."""
    BLOCK_C: tl.constexpr = i_channel.shape[0]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        i_row = start + tl.arange(0, BLOCK_R)
        m = (i_row < last)[:, None] & (i_channel < channels)[None, :]
        o = _offsets(i_row, i_channel, channels, size, CHANNELS_LAST)
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * invstd[None, :]
        z = xhat * weight[None, :] + bias[None, :]
        dz = tl.where(m, _through(dy, z, slope, ACTIVATION), 0.0)
        total += dz
        moment += tl.where(m, dz * xhat, 0.0)
    return tl.sum(total, 0), tl.sum(moment, 0)


@triton.jit
def _apply_grad(
    p_dx,
    p_x,
    p_dy,
    first,
    last,
    i_channel,
    mean,
    invstd,
    weight,
    bias,
    mean_dz,
    mean_dz_xhat,
    channels,
    size,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    scale = weight * invstd
    for start in range(first, last, BLOCK_R):
        i_row = start + tl.arange(0, BLOCK_R)
        m = (i_row < last)[:, None] & (i_channel < channels)[None, :]
        o = _offsets(i_row, i_channel, channels, size, CHANNELS_LAST)
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * invstd[None, :]
        z = xhat * weight[None, :] + bias[None, :]
        dz = _through(dy, z, slope, ACTIVATION)
        dx = scale[None, :] * (dz - (mean_dz[None, :] + xhat * mean_dz_xhat[None, :]))
        tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def norm_act_whole_grad_kernel(
    p_dx,
    p_dweight,
    p_dbias,
    p_partial,
    p_x,
    p_dy,
    p_statistics,
    p_weight,
    p_bias,
    rows,
    channels,
    size,
    groups,
    run,
    channel_blocks,
    slope,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of a block of channels in ``run`` groups; sums partial [groups, 2, C] where the
    parameters' gradients are those of several programs."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = i_program // channel_blocks * run
    m_channel = i_channel < channels
    slope = tl.cast(slope, tl.float32)
    weight = _per_channel(p_weight, i_channel, channels, 1.0)
    bias = _per_channel(p_bias, i_channel, channels, 0.0)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    start = i_program * 0
    count = (start + rows).to(tl.float32)
    for i_group in range(i_first, i_first + run):
        o_group = tl.cast(i_group, tl.int64) * channels
        p_mean = p_statistics + o_group + i_channel
        p_invstd = p_mean + tl.cast(groups, tl.int64) * channels
        mean = tl.load(p_mean, mask=m_channel, other=0.0)
        invstd = tl.load(p_invstd, mask=m_channel, other=0.0)
        total, moment = _sums(
            p_x + o_group * rows,
            p_dy + o_group * rows,
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
        dbias += total
        dweight += moment
        if p_partial is not None:
            p_total = p_partial + o_group * 2 + i_channel
            tl.store(p_total, total, mask=m_channel)
            tl.store(p_total + channels, moment, mask=m_channel)
        if p_dx is not None:
            if not TRAINING:
                total = tl.zeros((BLOCK_C,), tl.float32)
                moment = tl.zeros((BLOCK_C,), tl.float32)
            _apply_grad(
                p_dx + o_group * rows,
                p_x + o_group * rows,
                p_dy + o_group * rows,
                start,
                start + rows,
                i_channel,
                mean,
                invstd,
                weight,
                bias,
                total / count,
                moment / count,
                channels,
                size,
                slope,
                ACTIVATION,
                CHANNELS_LAST,
                BLOCK_R,
            )
    if p_dweight is not None:
        tl.store(p_dweight + i_channel, dweight, mask=m_channel)
    if p_dbias is not None:
        tl.store(p_dbias + i_channel, dbias, mask=m_channel)


@triton.jit
def norm_act_sums_kernel(
    p_partial,
    p_x,
    p_dy,
    p_statistics,
    p_weight,
    p_bias,
    rows,
    block_rows,
    blocks,
    channels,
    size,
    groups,
    channel_blocks,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and dz * xhat over a block of rows: partial [groups, blocks, 2, C]."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_partial = i_program // channel_blocks
    m_channel = i_channel < channels
    first = i_partial % blocks * block_rows
    o_group = (i_partial // blocks).to(tl.int64) * channels
    p_mean = p_statistics + o_group + i_channel
    p_invstd = p_mean + tl.cast(groups, tl.int64) * channels
    total, moment = _sums(
        p_x + o_group * rows,
        p_dy + o_group * rows,
        first,
        tl.minimum(first + block_rows, rows),
        i_channel,
        tl.load(p_mean, mask=m_channel, other=0.0),
        tl.load(p_invstd, mask=m_channel, other=0.0),
        _per_channel(p_weight, i_channel, channels, 1.0),
        _per_channel(p_bias, i_channel, channels, 0.0),
        channels,
        size,
        tl.cast(slope, tl.float32),
        ACTIVATION,
        CHANNELS_LAST,
        BLOCK_R,
    )
    p_total = p_partial + i_partial.to(tl.int64) * 2 * channels + i_channel
    tl.store(p_total, total, mask=m_channel)
    tl.store(p_total + channels, moment, mask=m_channel)


@triton.jit
def norm_act_sums_merge_kernel(
    p_sums,
    p_dweight,
    p_dbias,
    p_partial,
    blocks,
    channels,
    groups,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial [groups, blocks, 2, C] -> sums [groups, 2, C], and over the groups dbias, dweight."""
    i_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = i_channel < channels
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    for i_group in range(groups):
        o_group = tl.cast(i_group, tl.int64) * 2 * channels
        totals = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        moments = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for start in range(0, blocks, BLOCK_B):
            i_block = start + tl.arange(0, BLOCK_B)
            m = (i_block < blocks)[:, None] & m_channel[None, :]
            o_block = i_block.to(tl.int64) * 2 * channels
            p_total = p_partial + o_group * blocks + o_block[:, None] + i_channel[None, :]
            totals += tl.load(p_total, mask=m, other=0.0)
            moments += tl.load(p_total + channels, mask=m, other=0.0)
        total = tl.sum(totals, 0)
        moment = tl.sum(moments, 0)
        dbias += total
        dweight += moment
        if p_sums is not None:
            tl.store(p_sums + o_group + i_channel, total, mask=m_channel)
            tl.store(p_sums + o_group + channels + i_channel, moment, mask=m_channel)
    if p_dweight is not None:
        tl.store(p_dweight + i_channel, dweight, mask=m_channel)
    if p_dbias is not None:
        tl.store(p_dbias + i_channel, dbias, mask=m_channel)


@triton.jit
def norm_act_grad_kernel(
    p_dx,
    p_sums,
    p_x,
    p_dy,
    p_statistics,
    p_weight,
    p_bias,
    rows,
    block_rows,
    blocks,
    channels,
    size,
    groups,
    channel_blocks,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of a block of rows from sums [groups, 2, C]; without them, that of evaluation."""
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_block = i_program // channel_blocks
    m_channel = i_channel < channels
    first = i_block % blocks * block_rows
    o_group = (i_block // blocks).to(tl.int64) * channels
    p_mean = p_statistics + o_group + i_channel
    p_invstd = p_mean + tl.cast(groups, tl.int64) * channels
    mean_dz = tl.zeros((BLOCK_C,), tl.float32)
    mean_dz_xhat = tl.zeros((BLOCK_C,), tl.float32)
    if p_sums is not None:
        count = (first * 0 + rows).to(tl.float32)
        p_total = p_sums + o_group * 2 + i_channel
        mean_dz = tl.load(p_total, mask=m_channel, other=0.0) / count
        mean_dz_xhat = tl.load(p_total + channels, mask=m_channel, other=0.0) / count
    _apply_grad(
        p_dx + o_group * rows,
        p_x + o_group * rows,
        p_dy + o_group * rows,
        first,
        tl.minimum(first + block_rows, rows),
        i_channel,
        tl.load(p_mean, mask=m_channel, other=0.0),
        tl.load(p_invstd, mask=m_channel, other=0.0),
        _per_channel(p_weight, i_channel, channels, 1.0),
        _per_channel(p_bias, i_channel, channels, 0.0),
        mean_dz,
        mean_dz_xhat,
        channels,
        size,
        tl.cast(slope, tl.float32),
        ACTIVATION,
        CHANNELS_LAST,
        BLOCK_R,
    )


def gradients(
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    x: torch.Tensor,
    dy: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    map: Map,
    training: bool,
    activation: int,
    slope: float,
) -> None:
    """Fills those that are wanted; dx may be dy."""
    tile = {
        "ACTIVATION": activation,
        "CHANNELS_LAST": map.channels_last,
        "BLOCK_R": map.BLOCK_R,
        "BLOCK_C": map.BLOCK_C,
        "num_warps": WARPS,
    }
    where = (map.channels, map.size, map.groups)
    parameters = dweight is not None or dbias is not None
    if map.whole:
        # A few groups are summed by the programs themselves, many are spread over programs.
        run = map.groups if parameters and map.groups <= FEW_GROUPS else 1
        apart = parameters and run < map.groups
        partial = x.new_empty((map.groups, 2, map.channels), dtype=torch.float32) if apart else None
        norm_act_whole_grad_kernel[(map.channel_blocks * (map.groups // run),)](
            *(dx, None if apart else dweight, None if apart else dbias, partial, x, dy),
            *(statistics, weight, bias, map.rows, *where, run, map.channel_blocks, float(slope)),
            TRAINING=training,
            maxnreg=REGISTERS,
            **tile,
        )
        if partial is not None:
            _merge(None, dweight, dbias, partial, map.groups, map._replace(groups=1))
        return
    programs = map.channel_blocks * map.groups * map.blocks
    sums = None
    if parameters or (training and dx is not None):
        shape = (map.groups, map.blocks, 2, map.channels)
        partial = x.new_empty(shape, dtype=torch.float32)
        norm_act_sums_kernel[(programs,)](
            *(partial, x, dy, statistics, weight, bias, map.rows, map.block_rows, map.blocks),
            *(*where, map.channel_blocks, float(slope)),
            **tile,
        )
        if training and dx is not None:
            sums = x.new_empty((map.groups, 2, map.channels), dtype=torch.float32)
        # Where nobody asks for the sums of a group, those of all are merged as one group's.
        merged = map if sums is not None else map._replace(groups=1)
        blocks = map.blocks * (map.groups // merged.groups)
        _merge(sums, dweight, dbias, partial, blocks, merged)
    if dx is not None:
        norm_act_grad_kernel[(programs,)](
            *(dx, sums, x, dy, statistics, weight, bias, map.rows, map.block_rows, map.blocks),
            *(*where, map.channel_blocks, float(slope)),
            **tile,
        )


def _merge(
    sums: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    partial: torch.Tensor,
    blocks: int,
    map: Map,
) -> None:
    norm_act_sums_merge_kernel[(triton.cdiv(map.channels, MERGED_CHANNELS),)](
        *(sums, dweight, dbias, partial, blocks, map.channels, map.groups),
        BLOCK_B=MERGED,
        BLOCK_C=MERGED_CHANNELS,
    )
