"""What a tile of the strided convolution does with its sums: bias, statistics, store.

Per value of the tile one conversion and one write; a bias adds one FLOP, statistics about four.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_statistics(p_partials, acc, m, i_row, c, m_c, channels):
    """Count, mean and squared deviations of the columns of acc where m, which is [rows, 1] or
    [rows, columns], to row i_row of [rows, 3, channels]."""
    count = tl.sum(tl.where(m, 1.0, 0.0), 0)
    mean = tl.sum(tl.where(m, acc, 0.0), 0) / tl.maximum(count, 1.0)
    deviation = tl.where(m, acc - mean[None, :], 0.0)
    p = p_partials + i_row * 3 * channels + c
    tl.store(p, count + tl.zeros_like(mean), mask=m_c)
    tl.store(p + channels, mean, mask=m_c)
    tl.store(p + 2 * channels, tl.sum(deviation * deviation, 0), mask=m_c)


@triton.jit
def finish(
    p_y,
    p_partials,
    p_bias,
    acc,
    o_row,
    o_column,
    m,
    i_row,
    c,
    m_c,
    channels,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE_FIRST: tl.constexpr,
):
    """Sums acc [rows, columns] with their bias go to p_y + o_row + o_column in y's dtype, where m,
    which is [rows, 1] or [rows, columns], and m_c, of the columns; the statistics of what is
    stored to row i_row of the partials. Columns are of the channels c. Whether the store comes
    before the statistics changes only how many registers are in use at once."""
    if BIAS:
        acc += tl.load(p_bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if STATISTICS:
        # As stored: whoever normalizes y by them finds a mean of 0, however far it was from 0.
        acc = acc.to(p_y.dtype.element_ty).to(tl.float32)
    if STATISTICS and not STORE_FIRST:
        _store_statistics(p_partials, acc, m, i_row, c, m_c, channels)
    p = p_y + o_row[:, None] + o_column[None, :]
    tl.store(p, acc.to(p_y.dtype.element_ty), mask=m & m_c[None, :])
    if STATISTICS and STORE_FIRST:
        _store_statistics(p_partials, acc, m, i_row, c, m_c, channels)
