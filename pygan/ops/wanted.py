"""Which gradients a backward pass asks of an ``autograd.Function``."""

from __future__ import annotations

from typing import Any

import torch


def wanted_gradients(ctx: Any) -> tuple[bool, ...]:
    """For each argument of the forward, whether this backward pass uses its gradient.

    ``ctx.needs_input_grad`` tells what requires one. It is true of a weight even where
    ``torch.autograd.grad(y.sum(), x)``, as in a gradient penalty, drops the weight's gradient.
    Only within a backward pass.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if len(nodes) != sum(needs):
        return needs
    answers = iter([_executes(node) for node in nodes])
    return tuple(need and next(answers) for need in needs)


def _executes(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):
        # A leaf that autograd.grad was asked for, a pass of another engine, or another torch.
        return True
