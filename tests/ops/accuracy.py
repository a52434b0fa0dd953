"""The accuracy rule: at most so many times plain torch's error in the same type, or under a floor.

Twice, but 2.2 times for bfloat16 convolutions and 3 times for weight gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative L2 error below which rounding of the result alone explains it.
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}
CONVOLUTION_FLOOR = FLOOR | {torch.float32: 3e-6}

FACTOR = 2.0
CONVOLUTION_FACTOR = {torch.float32: FACTOR, torch.bfloat16: 2.2, torch.float16: FACTOR}
WEIGHT_GRAD_FACTOR = 3.0


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
    _assert_within(name, ours, plain, oracle, FACTOR, FLOOR[dtype])


def assert_accurate_convolution(
    name: str,
    ours: Tensor,
    plain: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    *,
    weight_grad: bool = False,
) -> None:
    """As :func:`assert_accurate`, for a convolution of activations in ``dtype``."""
    factor = WEIGHT_GRAD_FACTOR if weight_grad else CONVOLUTION_FACTOR[dtype]
    _assert_within(name, ours, plain, oracle, factor, CONVOLUTION_FLOOR[dtype])


def assert_cancels(name: str, ours: Tensor, summed: Tensor, dtype: torch.dtype) -> None:
    """``ours`` is zero in exact arithmetic; rounding has the scale of what was ``summed``."""
    error = ours.double().norm().item() / summed.double().norm().item()
    limit = CONVOLUTION_FLOOR[dtype]
    assert error <= limit, f"{name}: {error:.2e} of what cancels, allowed {limit:.2e}"


def _assert_within(
    name: str, ours: Tensor, plain: Tensor, oracle: Tensor, factor: float, floor: float
) -> None:
    assert ours.shape == oracle.shape, f"{name}: shape {ours.shape}, not {oracle.shape}"
    error, allowed = relative_error(ours, oracle), factor * relative_error(plain, oracle)
    limit = max(allowed, floor)
    assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"
