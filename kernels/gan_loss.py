"""BCE-with-logits losses of discriminator and generator on a GPU.

Per logit: 4 or 2 bytes read, as many written, about 20 FLOPs and two transcendental calls. Logits
are few, so launches decide: one launch up to ``BLOCK`` logits a term, two beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _bce(x, t):
    """Value, derivative and probability; none of them cancels or overflows."""
    e = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    # log(1 + e) loses e below 1 ulp of 1; the first term of its series is exact there.
    log1p = tl.where(e < 1e-4, e * (1.0 - 0.5 * e), tl.log(1.0 + e))
    value = tl.maximum(x, 0.0) - x * t + log1p
    probability = tl.where(x > 0.0, 1.0, e) * inverse
    derivative = tl.where(x > 0.0, (1.0 - t) - e * inverse, e * inverse - t)
    return value, derivative, probability


@triton.jit
def gan_loss_kernel(
    p_grad,
    p_partial,
    p_logits,
    p_first_targets,
    p_second_targets,
    first_target,
    second_target,
    first_scale,
    second_scale,
    first_size,
    second_size,
    FIRST_TARGETS: tl.constexpr,
    SECOND_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of logits of one term (axis 1): gradients, and sums [blocks, 2, 2]."""
    i_block = tl.program_id(0)
    i_term = tl.program_id(1)
    i = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.where(i_term == 0, first_size, second_size)
    scale = tl.where(i_term == 0, first_scale, second_scale).to(tl.float32)
    o_logits = i + i_term.to(tl.int64) * first_size
    m = i < size
    x = tl.load(p_logits + o_logits, mask=m, other=0.0).to(tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    if i_term == 0:
        if FIRST_TARGETS:
            t = tl.load(p_first_targets + i, mask=m, other=0.0).to(tl.float32)
        else:
            t += first_target
    else:
        if SECOND_TARGETS:
            t = tl.load(p_second_targets + i, mask=m, other=0.0).to(tl.float32)
        else:
            t += second_target
    value, derivative, probability = _bce(x, t)
    tl.store(p_grad + o_logits, (derivative * scale).to(p_grad.dtype.element_ty), mask=m)
    o_partial = (i_block * 2 + i_term) * 2
    tl.store(p_partial + o_partial, tl.sum(tl.where(m, value, 0.0)) * scale)
    tl.store(p_partial + o_partial + 1, tl.sum(tl.where(m, probability, 0.0)) / size)


@triton.jit
def gan_loss_sum_kernel(p_out, p_partial, blocks, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums [blocks, 2, 2] -> loss, then a probability a term. One program."""
    i = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        o = (start + i) * 4
        m = start + i < blocks
        loss += tl.load(p_partial + o, mask=m, other=0.0)
        first += tl.load(p_partial + o + 1, mask=m, other=0.0)
        if TERMS == 2:
            loss += tl.load(p_partial + o + 2, mask=m, other=0.0)
            second += tl.load(p_partial + o + 3, mask=m, other=0.0)
    tl.store(p_out, tl.sum(loss))
    tl.store(p_out + 1, tl.sum(first))
    if TERMS == 2:
        tl.store(p_out + 2, tl.sum(second))


def gan_loss(
    logits: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, terms: Sequence[Any]
) -> None:
    """Fills ``grad [n]`` and ``out [1 + terms]`` (float32: loss, mean probabilities).

    ``terms`` are one or two of (size, target, weight): a target is a float or float32 ``[size]``.
    """
    first = terms[0]
    second = terms[1] if len(terms) == 2 else (0, 0.0, 0.0)
    blocks = triton.cdiv(max(first[0], second[0]), BLOCK)
    partial = torch.empty(blocks * 4, dtype=torch.float32, device=logits.device)
    per_element = [isinstance(term[1], torch.Tensor) for term in (first, second)]
    gan_loss_kernel[(blocks, len(terms))](
        grad,
        partial,
        logits,
        first[1] if per_element[0] else logits,
        second[1] if per_element[1] else logits,
        0.0 if per_element[0] else float(first[1]),
        0.0 if per_element[1] else float(second[1]),
        first[2] / first[0],
        second[2] / max(second[0], 1),
        first[0],
        second[0],
        FIRST_TARGETS=per_element[0],
        SECOND_TARGETS=per_element[1],
        BLOCK=BLOCK,
    )
    gan_loss_sum_kernel[(1,)](out, partial, blocks, TERMS=len(terms), BLOCK=64)
