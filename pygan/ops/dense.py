"""Layouts that the kernels of normalisation address."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> tuple[Tensor, int]:
    """x in a layout the kernels address (itself wherever that is possible), and which: 0 is
    channels_last, 1 is contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return x, 0
    return x.contiguous(), 0 if x.dim() == 2 else 1
