"""The accuracy rule: at most twice plain torch's error in the same type, or under a floor."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative L2 error below which rounding of the result alone explains it.
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """Relative L2 error; infinite where the value is not finite but the oracle is."""
    value, oracle = value.double(), oracle.double()
    if not torch.isfinite(value).all():
        return float("inf")
    scale = oracle.norm().item()
    return (value - oracle).norm().item() / scale if scale else value.norm().item()


def assert_accurate(
    name: str, ours: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype
) -> None:
    """``ours`` against the float64 ``oracle``, with torch's own error in ``dtype`` as measure."""
    assert ours.shape == oracle.shape, f"{name}: shape {ours.shape}, not {oracle.shape}"
    error, allowed = relative_error(ours, oracle), 2 * relative_error(plain, oracle)
    limit = max(allowed, FLOOR[dtype])
    assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"
