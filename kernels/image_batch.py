"""Gather, flip, scale and cast of uint8 images on a GPU.

Per value: 1 byte read, 4 or 2 written, 2 FLOPs; bound by memory, and by launches for small images.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def image_batch_kernel(
    p_out,
    p_images,
    p_index,
    p_flip,
    count,
    width,
    channels,
    size,
    blocks,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of an image's ``blocks`` of its values [height, width, channels]; NaN for an index that
    is none of the ``count`` images'."""
    i_image = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m = i < size
    i_source = i
    if FLIP:
        if tl.load(p_flip + i_image) != 0:
            i_channel = i % channels
            i_pixel = i // channels
            i_x = i_pixel % width
            i_source = (i_pixel - i_x + (width - 1 - i_x)) * channels + i_channel
    index = tl.load(p_index + i_image).to(tl.int64) + tl.zeros((BLOCK,), tl.int64)
    m_known = (index >= 0) & (index < count)
    byte = tl.load(p_images + index * size + i_source, mask=m & m_known, other=0)
    value = tl.where(m_known, (byte.to(tl.float32) - 127.5) / 127.5, float("nan"))
    o_out = i_image.to(tl.int64) * size + i
    tl.store(p_out + o_out, value.to(p_out.dtype.element_ty), mask=m)


def image_batch(
    out: torch.Tensor, images: torch.Tensor, index: torch.Tensor, flip: torch.Tensor | None
) -> None:
    """Fills ``out [B, H, W, C]`` from ``images [N, H, W, C]`` (uint8, contiguous), ``index [B]``
    (int64) and ``flip [B]`` (bool, or None)."""
    batch, height, width, channels = out.shape
    if batch == 0:
        return
    size = height * width * channels
    blocks = triton.cdiv(size, BLOCK)
    image_batch_kernel[(blocks * batch,)](
        out,
        images,
        index,
        index if flip is None else flip.view(torch.uint8),
        images.shape[0],
        width,
        channels,
        size,
        blocks,
        FLIP=flip is not None,
        BLOCK=BLOCK,
    )
