"""Binary cross-entropy of probabilities, with the gradient that a saturated sigmoid loses.

    loss = -w (t log p + (1 - t) log(1 - p)),  p = sigmoid(x),  dx = w (p - t)

torch takes dp = w (p - t) / max(s, 1e-12) and then dx = dp * s, with s = p (1 - p) as it is
rounded: right down to s = 1e-12, and zero where p is 0 or 1, which is where a discriminator errs
most. Whoever computes this loss of a sigmoid's output gets here, behind the sigmoid,

    dx = dp * s + w (p - t) (1 - s / 1e-12)  where s < 1e-12,

the gradient of ``binary_cross_entropy_with_logits``. Values, the gradient of p and that of x where
nothing is lost are torch's to the bit, and so is everything that others compute from p.

Saved: p, t, w. The part added is a constant in p when it is differentiated once more. Source:
Goodfellow et al. 2014, arXiv:1406.2661, section 3, for what a generator learns without it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

_LEAST = 9.999999960041972e-13  # of s, in torch's backward: 1e-12 as a float

# Operations that keep every element and their order.
_RESHAPING = (
    *("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward"),
    *("UnsqueezeBackward", "CloneBackward", "ToCopyBackward"),
)

by_torch = F.binary_cross_entropy


def _sigmoid_of(p: Tensor) -> Node | None:
    """The node of the sigmoid that p comes from, through nothing but other shapes and types."""
    node = p.grad_fn
    while node is not None and node.name().rstrip("0123456789") in _RESHAPING:
        node = node.next_functions[0][0]
    return node if node is not None and node.name() == "SigmoidBackward0" else None


class _Lost:
    """What one backward owes the sigmoid's input."""

    def __init__(self) -> None:
        self._task, self._grad = -1, torch.empty(0)

    def owe(self, grad: Tensor) -> None:
        self._task, self._grad = torch._C._current_graph_task_id(), grad

    def add(self, grad_inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None] | None:
        """A hook of the sigmoid's node."""
        (dx,) = grad_inputs
        # A backward that ended at p has left its part.
        if dx is None or self._task != torch._C._current_graph_task_id():
            return None
        self._task = -1
        return (dx + self._grad.reshape(dx.shape).to(dx.dtype),)


class _Owing(torch.autograd.Function):
    """The loss as it is, whose backward tells what the sigmoid's will lose."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        p: Tensor,
        target: Tensor,
        weight: Tensor | None,
        count: int,
        lost: _Lost,
    ) -> Tensor:
        ctx.save_for_backward(p, target, weight)
        ctx.count, ctx.lost = count, lost
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, target, weight = ctx.saved_tensors
        with torch.no_grad():
            s = (1 - p) * p
            part = torch.where(s < _LEAST, (p - target) * (1 - s / _LEAST), 0)
            if weight is not None:
                part = part * weight
        ctx.lost.owe(part * (grads[0] / ctx.count))
        return grads[0], *(None,) * 5


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See :func:`pygan.functional.binary_cross_entropy`."""
    loss = by_torch(input, target, weight, size_average, reduce, reduction)
    if size_average is not None or reduce is not None or torch.compiler.is_compiling():
        return loss
    return with_lost_gradient(loss, input, target, weight, reduction)


def with_lost_gradient(
    loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """torch's ``loss`` of these arguments, with the gradient that a sigmoid before it loses."""
    if type(input) is not Tensor or not loss.requires_grad:
        return loss
    sigmoid = _sigmoid_of(input)
    if sigmoid is None:
        return loss
    lost = _Lost()
    sigmoid.register_hook(lost.add)
    count = input.numel() if reduction == "mean" else 1
    result: Tensor = _Owing.apply(loss, input.detach(), target, weight, count, lost)
    return result
