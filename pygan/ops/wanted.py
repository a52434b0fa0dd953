"""Which gradients a backward pass asks of an ``autograd.Function``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

_NONE: Mapping[int, int] = MappingProxyType({})


def wanted_gradients(ctx: Any, beside: Mapping[int, int] = _NONE) -> tuple[bool, ...]:
    """For each argument of the forward, whether this backward pass uses its gradient.

    ``ctx.needs_input_grad`` tells what requires one. It is true of a weight even where
    ``torch.autograd.grad(y.sum(), x)``, as in a gradient penalty, drops the weight's gradient.
    Only within a backward pass.

    Args:
        ctx: of the ``autograd.Function``.
        beside: arguments whose gradient costs next to nothing beside that of an earlier one: it is
            taken for wanted where that one is. To ask can cost more than a small gradient.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if len(nodes) != sum(needs):
        return needs
    answers, asked = list(needs), iter(nodes)
    for i, need in enumerate(needs):
        if need:
            node, main = next(asked), beside.get(i)
            answers[i] = (main is not None and answers[main]) or _executes(node)
    return tuple(answers)


def _executes(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):
        # A leaf that autograd.grad was asked for, a pass of another engine, or another torch.
        return True
