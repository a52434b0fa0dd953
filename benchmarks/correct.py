"""Is a side right? Each is compared with float64 before it is timed.

The rule is that of the kernels' tests: the relative L2 error against float64 may be at most twice
that of plain torch in the same type (2.2 times where bfloat16 convolutions are part of it, 3 times
for the gradient of a convolution's weight), or under a floor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

FACTOR = 2.0
CONVOLUTION_FACTOR = {"fp32": 2.0, "bf16": 2.2}
WEIGHT_GRADIENT_FACTOR = 3.0
# They matter where plain torch happens to be nearly exact: some roundings in float32, one in bf16.
FLOOR = {"fp32": 3e-6, "bf16": 2.0**-8}

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CheckFailed(AssertionError):
    """A side computed something else; its case has no numbers."""


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Inside, cuDNN takes the convolution it thinks fastest: to find out in float64 would take
    longer than the check."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def relative_error(got: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Relative L2 distance of all tensors together, in float64. NaN if anything is NaN."""
    difference = size = 0.0
    for ours, theirs in zip(got, truth, strict=True):
        exact = theirs.detach().double().cpu()
        difference += (ours.detach().double().cpu() - exact).square().sum().item()
        size += exact.square().sum().item()
    return (difference / size) ** 0.5 if size else difference**0.5


def require_right(
    side: str,
    precision: str,
    errors: Mapping[str, float],
    torch_errors: Mapping[str, float],
    factor: float = FACTOR,
    floors: Mapping[str, float] | None = None,
) -> None:
    """Raise CheckFailed unless each named error obeys the rule against plain torch's.

    ``precision`` is "fp32" or "bf16"; ``floors`` are by name, in place of `FLOOR`. NaN never obeys.
    """
    for what, error in errors.items():
        floor = floors[what] if floors else FLOOR[precision]
        limit = max(factor * torch_errors[what], floor)
        if not error <= limit:
            raise CheckFailed(
                f"{side}: error of {what} is {error:.2e} (relative L2 against float64), that of "
                f"plain torch in {precision} {torch_errors[what]:.2e}, the limit {limit:.2e}"
            )
