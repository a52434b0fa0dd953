"""What a convolution on a GPU needs to normalise a map as it reads it, and the statistics of a map
from those of its parts.

z = (x - mean) * scale + shift with coefficients [groups, 3, C]: mean, weight * invstd, bias. Parts
[groups, rows, 3, C] have count, mean and sum of squared deviations each, of as many values as the
kernel that made the map has in a tile; a part may be empty, its mean then 0.

Per part and channel 12 bytes are read, twice by ``merge``, from cache the second time: for tiles of
128 values in bfloat16 a twentieth of the map. Many parts are first merged into fewer, by as many
programs as there are; then one program merges those of its channels, group by group, because the
running statistics follow in that order. Sums are taken in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pygan.kernels.norm_act import REGISTERS

BLOCK_C = 16  # channels of a program
BLOCK_R = 32  # parts that are read at a time
MERGED = 128  # parts of a group that one program merges alone


@triton.jit
def _first_mean(p_group, i_channel, channels):
    """Of the first part of a group, [C]: the others are taken less it, so that means far from zero
    merge without loss."""
    return tl.load(p_group + channels + i_channel, mask=i_channel < channels, other=0.0)


@triton.jit
def _merged(p_parts, origin, first, last, i_channel, channels, BLOCK_R: tl.constexpr):
    """Count [C], mean less the origin [C] and squared deviations [C] of the parts from first to
    last."""
    m_channel = (i_channel < channels)[None, :]
    count = tl.zeros(i_channel.shape, tl.float32)
    total = tl.zeros(i_channel.shape, tl.float32)
    for start in range(first, last, BLOCK_R):
        i_row = start + tl.arange(0, BLOCK_R)
        m = (i_row < last)[:, None] & m_channel
        p = p_parts + (i_row.to(tl.int64) * 3 * channels)[:, None] + i_channel[None, :]
        n = tl.load(p, mask=m, other=0.0)
        mean = tl.load(p + channels, mask=m, other=0.0)
        count += tl.sum(n, 0)
        total += tl.sum(n * (mean - origin[None, :]), 0)
    moved = total / tl.maximum(count, 1.0)
    deviations = tl.zeros(i_channel.shape, tl.float32)
    for start in range(first, last, BLOCK_R):
        i_row = start + tl.arange(0, BLOCK_R)
        m = (i_row < last)[:, None] & m_channel
        p = p_parts + (i_row.to(tl.int64) * 3 * channels)[:, None] + i_channel[None, :]
        n = tl.load(p, mask=m, other=0.0)
        d = (tl.load(p + channels, mask=m, other=0.0) - origin[None, :]) - moved[None, :]
        deviations += tl.sum(tl.load(p + 2 * channels, mask=m, other=0.0) + n * d * d, 0)
    return count, moved, deviations


@triton.jit
def _store_coefficients(
    p_coefficients, p_weight, p_bias, i_group, i_channel, channels, mean, invstd
):
    m_channel = i_channel < channels
    if p_weight is not None:
        invstd *= tl.load(p_weight + i_channel, mask=m_channel, other=0.0)
    shift = tl.zeros_like(mean)
    if p_bias is not None:
        shift += tl.load(p_bias + i_channel, mask=m_channel, other=0.0)
    p = p_coefficients + tl.cast(i_group, tl.int64) * 3 * channels + i_channel
    tl.store(p, mean, mask=m_channel)
    tl.store(p + channels, invstd, mask=m_channel)
    tl.store(p + 2 * channels, shift, mask=m_channel)


@triton.jit(do_not_specialize=["rows", "run"])
def norm_act_fewer_parts_kernel(
    p_fewer, p_parts, rows, run, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Parts [groups, rows, 3, C] -> [groups, rows / run, 3, C], means less that of the first part
    of the group."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_part = i_program // channel_blocks
    fewer = tl.cdiv(rows, run)
    first = i_part % fewer * run
    p_group = p_parts + (i_part // fewer).to(tl.int64) * rows * 3 * channels
    last = tl.minimum(first + run, rows)
    origin = _first_mean(p_group, i_channel, channels)
    count, mean, deviations = _merged(p_group, origin, first, last, i_channel, channels, BLOCK_R)
    p = p_fewer + i_part.to(tl.int64) * 3 * channels + i_channel
    tl.store(p, count, mask=i_channel < channels)
    tl.store(p + channels, mean, mask=i_channel < channels)
    tl.store(p + 2 * channels, deviations, mask=i_channel < channels)


@triton.jit(do_not_specialize=["rows", "fewer", "groups", "run"])
def norm_act_parts_kernel(
    p_statistics,
    p_coefficients,
    p_running_mean,
    p_running_var,
    p_parts,
    p_fewer,
    p_weight,
    p_bias,
    rows,
    fewer,
    channels,
    groups,
    run,
    momentum,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics [2, groups, C] and coefficients from parts [groups, rows, 3, C], or from the fewer
    ones made of them, ``run`` groups one after another; the running statistics follow."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = i_program // channel_blocks * run
    m_channel = i_channel < channels
    momentum = tl.cast(momentum, tl.float32)
    running_mean = tl.zeros((BLOCK_C,), tl.float32)
    running_var = tl.zeros((BLOCK_C,), tl.float32)
    if p_running_mean is not None:
        running_mean += tl.load(p_running_mean + i_channel, mask=m_channel, other=0.0)
        running_var += tl.load(p_running_var + i_channel, mask=m_channel, other=0.0)
    start = i_program * 0
    for i_group in range(i_first, i_first + run):
        p_group = p_parts + tl.cast(i_group, tl.int64) * rows * 3 * channels
        origin = _first_mean(p_group, i_channel, channels)
        if p_fewer is not None:
            p_group = p_fewer + tl.cast(i_group, tl.int64) * fewer * 3 * channels
            nothing = tl.zeros(i_channel.shape, tl.float32)
            count, mean, deviations = _merged(
                p_group, nothing, start, start + fewer, i_channel, channels, BLOCK_R
            )
        else:
            count, mean, deviations = _merged(
                p_group, origin, start, start + rows, i_channel, channels, BLOCK_R
            )
        mean += origin
        var = deviations / tl.maximum(count, 1.0)
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
        p_mean = p_statistics + tl.cast(i_group, tl.int64) * channels + i_channel
        tl.store(p_mean, mean, mask=m_channel)
        tl.store(p_mean + tl.cast(groups, tl.int64) * channels, invstd, mask=m_channel)
        _store_coefficients(
            p_coefficients, p_weight, p_bias, i_group, i_channel, channels, mean, invstd
        )
        running_mean += momentum * (mean - running_mean)
        unbiased = deviations / tl.maximum(count - 1.0, 1.0)
        running_var += momentum * (unbiased - running_var)
    if p_running_mean is not None:
        tl.store(p_running_mean + i_channel, running_mean, mask=m_channel)
        tl.store(p_running_var + i_channel, running_var, mask=m_channel)


@triton.jit(do_not_specialize=["groups"])
def norm_act_coefficients_kernel(
    p_coefficients,
    p_statistics,
    p_running_mean,
    p_running_var,
    p_weight,
    p_bias,
    channels,
    groups,
    eps,
    BLOCK_C: tl.constexpr,
):
    """Coefficients of one group from statistics [2, groups, C]; with running ones, statistics are
    those and are written."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    i_program = tl.program_id(0)
    i_channel = i_program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_group = i_program // channel_blocks
    m_channel = i_channel < channels
    p_mean = p_statistics + i_group.to(tl.int64) * channels + i_channel
    p_invstd = p_mean + tl.cast(groups, tl.int64) * channels
    if p_running_mean is not None:
        mean = tl.load(p_running_mean + i_channel, mask=m_channel, other=0.0)
        var = tl.load(p_running_var + i_channel, mask=m_channel, other=0.0)
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
        tl.store(p_mean, mean, mask=m_channel)
        tl.store(p_invstd, invstd, mask=m_channel)
    else:
        mean = tl.load(p_mean, mask=m_channel, other=0.0)
        invstd = tl.load(p_invstd, mask=m_channel, other=0.0)
    _store_coefficients(
        p_coefficients, p_weight, p_bias, i_group, i_channel, channels, mean, invstd
    )


def merge(
    statistics: torch.Tensor,
    coefficients: torch.Tensor,
    running: tuple[torch.Tensor, torch.Tensor] | None,
    parts: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> None:
    """Fills ``statistics [2, groups, C]`` and ``coefficients [groups, 3, C]`` from ``parts``;
    ``running`` follow."""
    groups, rows, _, channels = parts.shape
    channel_blocks = triton.cdiv(channels, BLOCK_C)
    fewer, count = None, 0
    if rows > MERGED:
        each = triton.cdiv(rows, MERGED)
        count = triton.cdiv(rows, each)
        fewer = parts.new_empty((groups, count, 3, channels))
        norm_act_fewer_parts_kernel[(channel_blocks * groups * count,)](
            fewer, parts, rows, each, channels, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C
        )
    mean, var = (None, None) if running is None else running
    # Running statistics follow group by group, so one program takes all groups of its channels.
    run = 1 if running is None else groups
    norm_act_parts_kernel[(channel_blocks * (groups // run),)](
        *(statistics, coefficients, mean, var, parts, fewer, weight, bias),
        *(rows, count, channels, groups, run, float(momentum), float(eps)),
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        maxnreg=REGISTERS,
    )


def from_statistics(
    coefficients: torch.Tensor,
    statistics: torch.Tensor,
    running: tuple[torch.Tensor, torch.Tensor] | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    """Fills ``coefficients [groups, 3, C]`` by ``statistics [2, groups, C]``, or by ``running``,
    which are then filled into those of one group."""
    groups, _, channels = coefficients.shape
    mean, var = (None, None) if running is None else running
    norm_act_coefficients_kernel[(triton.cdiv(channels, BLOCK_C) * groups,)](
        *(coefficients, statistics, mean, var, weight, bias, channels, groups, float(eps)),
        BLOCK_C=BLOCK_C,
    )
