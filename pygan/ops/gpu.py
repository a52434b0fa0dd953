"""What all kernels for a GPU ask of tensors, and where they are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OLDEST_OF_TENSOR_COPIES = (9, 0)  # compute capability


def holds(x: torch.Tensor) -> bool:
    """Whether x is on a GPU, where a launch may take longer than what it computes."""
    return x.is_cuda


def both(
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Running statistics, None where there are none."""
    if running_mean is None or running_var is None:
        return None
    return running_mean, running_var


def follow_mean(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    momentum: float,
) -> None:
    """Running statistics ``[C]`` follow the mean of those of all groups, ``[groups, C]``."""
    with torch.no_grad():
        running_mean.lerp_(mean.mean(0), momentum)
        running_var.lerp_(variance.mean(0), momentum)


def unfit(dtype: torch.dtype) -> str | None:
    """Reason that no kernel takes values of this type, or None."""
    return None if dtype in DTYPES else f"the dtype is {dtype}, not float32, bfloat16 or float16"


def copies_tensors(device: torch.device) -> bool:
    """Whether tensor descriptors are copied by hardware (TMA): compute capability 9.0 and later."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST_OF_TENSOR_COPIES


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, kernels are launched on ``device``: they go to the current one, whatever that of
    their arrays is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
