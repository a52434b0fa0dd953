"""Does a way to train compute the update that float64 computes?

Compared are single updates from the states of one float64 training: before each the networks and
the optimizers take over the state of the float64 ones. Left to itself a training amplifies any
rounding until nothing can be said. The Adam of the check has a large eps, which makes its step
proportional to the gradient: the usual one takes a step of full length where the gradient is
nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.correct import (
    CONVOLUTION_FACTOR,
    FLOOR,
    CheckFailed,
    relative_error,
    require_right,
    without_search,
)
from benchmarks.steps import Adam, Losses, Networks, networks

CHECK_ADAM = Adam(lr=1e-4, eps=1.0)
# "Within 1e-5" is the promise that training with and without fusion gives the same numbers.
SAME_NUMBERS = {"fp32": 1e-5, "bf16": FLOOR["bf16"]}
FLIPS = 16


class Stepper(NamedTuple):
    """A way to train, built: the networks and ``step(real, z=None)``.

    A way that keeps its state outside torch and copies it in and out of every step times
    ``timed(real)`` instead, whose calls are steps without the copies.
    """

    nets: Networks
    step: Callable[..., Sequence[Tensor]]
    timed: Callable[[Tensor], Callable[[], object]] | None = None


Models = tuple[nn.Module, nn.Module]
Build = Callable[[Models, torch.device, Adam], Stepper]
Data = Sequence[tuple[Tensor, Tensor]]
# Tensors by what they are, such as "buffers of D".
State = dict[str, list[Tensor]]


def _state(nets: Networks) -> State:
    """Weights, buffers, and Adam's moments once there are any.

    The first moments stand for the gradients: Adam's steps may hide the size of one, they do not.
    """
    state: State = {}
    for name, module, optimizer in (
        ("G", nets.generator, nets.opt_g),
        ("D", nets.discriminator, nets.opt_d),
    ):
        weights: list[Tensor] = list(module.parameters())
        state[f"weights of {name}"] = weights
        state[f"buffers of {name}"] = [b for b in module.buffers() if b.is_floating_point()]
        if optimizer.state:
            moments = [optimizer.state[weight] for weight in weights]
            state[f"gradients of {name}"] = [moment["exp_avg"] for moment in moments]
            state[f"squares of {name}"] = [moment["exp_avg_sq"] for moment in moments]
    return state


def _copied(state: State) -> State:
    return {name: [t.detach().clone() for t in tensors] for name, tensors in state.items()}


def _changed(after: State, before: State, name: str) -> list[Tensor]:
    return [new - old for new, old in zip(after[name], before[name], strict=True)]


def updates(
    stepper: Stepper, data: Data, states: Sequence[State] = ()
) -> Iterator[tuple[State, State]]:
    """One step for each ``(real, z)`` of ``data``: the state before it, and what it left: losses,
    buffers, gradients, and by how much the weights changed.

    With ``states`` the networks and optimizers take over that state before each step, in place.
    """
    for i, (real, z) in enumerate(data):
        if states:
            _take_over(_state(stepper.nets), states[i])
        before = _copied(_state(stepper.nets))
        losses = list(stepper.step(real, z))
        if len(losses) != len(Losses._fields):
            raise CheckFailed(f"a step returns {len(losses)} results, not {Losses._fields}")
        after = _copied(_state(stepper.nets))
        found = {"losses": [torch.stack([loss.double() for loss in losses])]}
        for name in ("buffers of G", "buffers of D", "gradients of G", "gradients of D"):
            found[name] = after[name]
        for name in ("weights of G", "weights of D"):
            found[name] = _changed(after, before, name)
        yield before, found


def _take_over(ours: State, theirs: State) -> None:
    with torch.no_grad():
        for name, tensors in theirs.items():
            for mine, exact in zip(ours[name], tensors, strict=True):
                mine.copy_(exact)


def _errors(found: Sequence[State], truth: Sequence[State]) -> dict[str, float]:
    """Relative error of each kind of tensor, over all steps together."""
    return {
        name: relative_error(
            [tensor for update in found for tensor in update[name]],
            [tensor for update in truth for tensor in update[name]],
        )
        for name in truth[0]
    }


def floors(precision: str, activations: int) -> dict[str, float]:
    """Errors that rounding alone can cause, for ``activations`` of the smallest layer of a batch.

    A value that rounding moves across the kink of a ReLU changes its share of the gradient by
    about its whole size: n activations of equal weight make that 1/sqrt(n) of the gradient's norm,
    and k such flips sqrt(k) times as much. In float32 there are none or a few in a batch, so plain
    torch's error, with its own few, sets no limit. Losses and buffers are continuous there.
    """
    flips = math.sqrt(FLIPS / activations)
    found = {"losses": SAME_NUMBERS[precision]}
    for network in ("G", "D"):
        found[f"buffers of {network}"] = SAME_NUMBERS[precision]
        found[f"gradients of {network}"] = found[f"weights of {network}"] = flips
    return found


def require_same_updates(
    models: Models,
    sides: Mapping[str, tuple[str, Build]],
    plain: Mapping[str, Build],
    data: Data,
    plainly: Callable[[Networks], Callable[..., Sequence[Tensor]]],
    activations: int,
) -> None:
    """Check ``sides`` (precision and builder by name) against float64, and raise CheckFailed.

    ``plainly`` makes plain torch's step of networks, for those in float64. ``plain[precision]``
    builds plain torch in that precision; a side may be off by twice as much (2.2 times in bf16), or
    by `floors`.
    """
    device = data[0][0].device
    exact = networks(models, device, dtype=torch.float64, adam=CHECK_ADAM)
    exact_data = [(real.double(), z.double()) for real, z in data]
    with without_search():
        history = list(updates(Stepper(exact, plainly(exact)), exact_data))
    states, truth = [state for state, _ in history], [update for _, update in history]

    def errors(build: Build) -> dict[str, float]:
        stepper = build(models, device, CHECK_ADAM)
        return _errors([update for _, update in updates(stepper, data, states)], truth)

    reference = {precision: errors(plain[precision]) for precision, _ in sides.values()}
    for name, (precision, build) in sides.items():
        require_right(
            name,
            precision,
            errors(build),
            reference[precision],
            CONVOLUTION_FACTOR[precision],
            floors(precision, activations),
        )
