"""torch's fused Adam on a CPU, without a copy of every channels_last gradient.

Its kernel goes over a parameter, its gradient and its moments by address, as they lie in memory,
but first copies each gradient that is not contiguous and leaves the copy unused: the memory of the
largest gradient once more. Where all of them lie in channels_last it is given views whose order is
that of memory: the same addresses, and the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FUSED = (torch._fused_adam_, torch._fused_adamw_)
# Arguments that are lists of a tensor for each parameter: itself, its gradient, its moments.
_LISTS = 5


def _lie_in_channels_last(tensors: Sequence[Tensor]) -> bool:
    return all(
        each.is_cpu and each.dim() == 4 and each.is_contiguous(memory_format=torch.channels_last)
        for each in tensors
    )


def _in_order(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """``lists`` with views of what lies in channels_last. Some of them may be empty."""
    ordered = [list(each) for each in lists]
    used = [each for each in ordered if each]
    for i, tensors in enumerate(zip(*used, strict=True)):
        if _lie_in_channels_last(tensors):
            for each in used:
                each[i] = each[i].permute(0, 2, 3, 1)
    return ordered


class MemoryOrder(TorchFunctionMode):
    """While it is entered, fused Adam and AdamW are given views of channels_last tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _FUSED:
            args = (*_in_order(args[:_LISTS]), *args[_LISTS:])
        return func(*args, **(kwargs or {}))
