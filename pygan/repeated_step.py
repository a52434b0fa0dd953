"""A training step that is repeated as it was once done: for which calls that is right.

What every kind of repeating shares: each shape, mode and turn has an entry of its own, of which
the KEPT used last stay, times the turns; where hyperparameters change, or tensors take the place of
others, all of them are dropped and made anew after some steps as usual; what cannot be repeated
stays eager for good, with one reason. How a step is repeated is in :mod:`pygan.step_graph` and
:mod:`pygan.step_program`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pygan.errors import UserError

if TYPE_CHECKING:
    from pygan.step import AdversarialStep, StepResult

logger = logging.getLogger("pygan")

KEPT = 4
# What is made anew all the time costs more than it saves.
_TRIED = 8
_REPEATS_EACH = 8


class Inputs(NamedTuple):
    """What a step is given: real images, or a set of them and which; z unless it is drawn."""

    real: Tensor | None = None
    images: Tensor | None = None
    which: Tensor | None = None
    flip: Tensor | None = None
    z: Tensor | None = None

    def at(self, place: int) -> Inputs:
        """One step of several, whose images are chosen by rows ``[K, N]``."""
        assert self.which is not None
        flip = None if self.flip is None else self.flip[place]
        return self._replace(which=self.which[place], flip=flip)

    def run(self, first: int, count: int) -> Inputs:
        """``count`` steps of several from ``first`` on."""
        assert self.which is not None
        rows = slice(first, first + count)
        flip = None if self.flip is None else self.flip[rows]
        return self._replace(which=self.which[rows], flip=flip)


class Entry(Protocol):
    """One kind of step."""

    steps: int  # as usual

    @property
    def held(self) -> dict[str, Any] | None:
        """What it holds as it was when it was made, None before."""

    def close(self) -> None: ...


AnEntry = TypeVar("AnEntry", bound=Entry)


class RepeatedStep(ABC, Generic[AnEntry]):
    """The steps of an :class:`pygan.AdversarialStep`, repeated.

    Args:
        step: whose ``run_eagerly`` is repeated.
        required: raise where a step cannot be, instead of staying eager.
    """

    what: str  # it is made into, for messages
    level: int  # at which it is logged that a step cannot be repeated

    def __init__(self, step: AdversarialStep, *, required: bool) -> None:
        self._step, self._required = step, required
        self._networks = (("G", step.G), ("D", step.D))
        self._optimizers = (("opt_g", step.opt_g), ("opt_d", step.opt_d))
        self._entries: OrderedDict[Any, AnEntry] = OrderedDict()
        self._made = self._repeats = 0
        self._change = "the shape of the inputs"
        self.reason: str | None = None
        self._look()

    def _look(self) -> None:
        """Takes notice of the networks' modules, parameters and buffers."""
        self._modules = [m for _, network in self._networks for m in network.modules()]
        self._parameters = [p for _, network in self._networks for p in network.parameters()]
        self._tensors = [*self._parameters, *(b for m in self._modules for b in m.buffers(False))]

    def forget(self) -> None:
        """Drops all that was made."""
        for entry in self._entries.values():
            entry.close()
        self._entries.clear()

    def __call__(self, inputs: Inputs) -> StepResult:
        """One step.

        Raises:
            UserError: it cannot be repeated, and has to be.
        """
        if self.reason is not None or self._rests(inputs):
            return self._step.run_eagerly(inputs)
        key = self._key(inputs)
        entry = self._entries.pop(key, None)
        if entry is None or self._is_stale(entry):
            entry = self._entry()
        self._entries[key] = entry
        while len(self._entries) > KEPT * self._step.tricks.turns:
            self._entries.popitem(last=False)[1].close()
        return self._advance(entry, inputs)

    @property
    def at_once(self) -> int:
        """Steps that it gains to give together."""
        return 1

    def several(self, inputs: Inputs) -> list[StepResult]:
        """As many steps as ``which`` has rows.

        Raises:
            UserError: as one step does.
        """
        assert inputs.which is not None
        return [self(inputs.at(i)) for i in range(len(inputs.which))]

    @abstractmethod
    def _entry(self) -> AnEntry:
        """One for a kind of step that is new."""

    @abstractmethod
    def _rests(self, inputs: Inputs) -> bool:
        """Whether this call is to be eager, without a word."""

    @abstractmethod
    def _advance(self, entry: AnEntry, inputs: Inputs) -> StepResult:
        """A step as usual, or repeated."""

    @abstractmethod
    def _why_not(self) -> str | None:
        """Why these networks and optimizers cannot be repeated, as far as it can be told without a
        step."""

    def _key(self, inputs: Inputs) -> Any:
        given = [None if t is None else (t.shape, t.dtype, t.device) for t in inputs]
        images = inputs.images
        modes = [m.training for m in self._modules] + [p.requires_grad for p in self._parameters]
        where = None if images is None else images.data_ptr()
        turn = self._step.tricks.turn(self._step.updates)
        return (*given, where, *turn, *modes, torch.is_autocast_enabled(self._step.device.type))

    def _own(self) -> list[Any]:
        """What the step itself keeps from one call to the next."""
        step = self._step
        return [step.generator, step.totals, step.ema, step._noise, *step._of_g]

    def _held(self) -> dict[str, Any]:
        """What is repeated with as it was then, by the names of what it is."""
        step = self._step
        groups = [group for _, o in self._optimizers for group in o.param_groups]
        scalers = (step._scaler_g, step._scaler_d)
        return {
            "settings of the step": (
                *(step.loss, step.loss_weight, step.real_target, step.amp, step.merge),
                *map(id, self._own()),
            ),
            "hyperparameters of an optimizer": [
                _value(value)
                for group in groups
                for name, value in group.items()
                if name != "params"
            ],
            "parameters of an optimizer": [id(p) for group in groups for p in group["params"]],
            "the state of an optimizer": [
                id(value)
                for _, optimizer in self._optimizers
                for state in optimizer.state.values()
                for value in state.values()
            ],
            "a gradient scaler": [
                (s._growth_factor, s._backoff_factor, s._growth_interval, id(s._scale))
                for s in scalers
                if s.is_enabled()
            ],
            "a parameter or buffer": [t.data_ptr() for t in self._tensors],
        }

    def _is_stale(self, entry: AnEntry) -> bool:
        before = entry.held
        if before is None:
            return False
        held = self._held()
        if before == held:
            return False
        self._change = next(n for n, value in held.items() if value != before[n])
        entry.close()
        # The others hold the same.
        self.forget()
        return True

    def _may_begin(self) -> bool:
        reason = self._why_not()
        if self._made >= _TRIED and self._repeats < _REPEATS_EACH * self._made:
            reason = (
                f"{self._made} {self.what}s served {self._repeats} steps, the last until "
                f"{self._change} changed; change tensors in place, a learning rate too"
            )
        if reason is not None:
            self._give_up(reason)
        return reason is None

    def _give_up(self, reason: str, *, made: bool = False) -> None:
        """Nothing is repeated any more; ``made`` says whether the step that showed it was made."""
        self.forget()
        self.reason = reason
        if self._required:
            self._step.updates += made
            raise UserError(
                f"graph is 'on' and the step cannot be captured, because {reason}; 'auto' leaves "
                "it eager then"
            )
        logger.log(self.level, "the step runs without a %s, because %s", self.what, reason)


def _value(value: Any) -> Any:
    """A hyperparameter as what is repeated holds it."""
    if not isinstance(value, Tensor):
        return value
    # One on the CPU is read as it is then, one on the device by every repetition.
    return value.item() if value.is_cpu else id(value)
