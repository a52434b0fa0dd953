"""An operation's output with its gradients of first and second order, to compare two of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def differentiated(
    call: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    *,
    autocast: bool,
    second: bool,
) -> dict[str, Tensor]:
    """Of ``call`` of ``values``: y, the gradients of x, weight and bias at ``values["dy"]``, and
    with ``second`` those of a gradient penalty made of ``ddx`` and ``ddweight``."""
    leaves = {
        k: values[k].detach().requires_grad_() for k in ("x", "weight", "bias") if k in values
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call(values | leaves)
    dy = values["dy"].requires_grad_(second)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=second)
    result = {"y": y.detach()}
    result |= {f"d{k}": v.detach() for k, v in zip(leaves, grads, strict=True)}
    if second:
        # A gradient penalty: a function of dx and dweight, by everything they depend on.
        objective = (grads[0] * values["ddx"]).sum() + (grads[1] * values["ddweight"]).sum()
        inputs = [leaves["x"], leaves["weight"], dy]
        twice = torch.autograd.grad(objective, inputs)
        result |= {f"d2{k}": v for k, v in zip(("x", "weight", "dy"), twice, strict=True)}
    return result
