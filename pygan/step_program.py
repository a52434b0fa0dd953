"""A training step on a CPU as a program of its operations: when it is recorded, when it is run.

    a kind of step for the first  as usual, twice: in the first optimizers make their state and it
      time                          is seen which memory is taken; the second is recorded
    from then on                  the program is run, on the inputs that are given
    other shapes, strides, modes, programs of their own, the KEPT used last
      turns
    other hyperparameters, or     every program is dropped, and made anew
      tensors in the place of
      those recorded
    what cannot be repeated       eager for good, and nothing is half done

The numbers are those of eager steps, bit for bit. What a program leaves out is Python and autograd
between the kernels, and with it every line of the networks' own code, so a step is recorded without
being asked only where those are torch's and pygan's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pygan.capturable import PythonState, why_not_repeatable
from pygan.layers import globally_hooked
from pygan.ops import dispatch, map_memory
from pygan.pending import saving_is_watched
from pygan.program import Program, Recorder
from pygan.repeated_step import Inputs, RepeatedStep

if TYPE_CHECKING:
    from pygan.step import StepResult


WARM_UP = 2  # steps as usual, the recorded one among them


class _Recorded(NamedTuple):
    program: Program
    result: type[StepResult]
    held: dict[str, Any]
    learning: list[Tensor]  # parameters that get a gradient, in the order of the results
    kept: list[Any]  # what the program's addresses and names belong to


class _Entry:
    """One kind of step."""

    def __init__(self) -> None:
        self.steps = 0
        self.course = map_memory.Course()
        self.recorded: _Recorded | None = None

    @property
    def held(self) -> dict[str, Any] | None:
        return None if self.recorded is None else self.recorded.held

    def close(self) -> None:
        self.recorded = None


class ProgrammedStep(RepeatedStep[_Entry]):
    """The steps of an :class:`pygan.AdversarialStep` on a CPU, by programs.

    Args:
        step: whose ``run_eagerly`` is recorded.
        required: record networks with code of their own too, and raise where a step cannot be.
    """

    what, level = "program", logging.INFO

    def _entry(self) -> _Entry:
        return _Entry()

    def _rests(self, inputs: Inputs) -> bool:
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._len_torch_function_stack() > 0
            or torch.is_anomaly_enabled()
            or torch.is_autocast_enabled(self._step.device.type)
            or not torch.is_grad_enabled()
            or saving_is_watched()
            or any(t is not None and t.requires_grad for t in inputs)
        )

    def _why_not(self) -> str | None:
        return why_not_repeatable(self._networks, self._optimizers, any_code=self._required)

    def _look(self) -> None:
        super()._look()
        # What a layer is set to by a number: a slope, a momentum, a share.
        self._numbers = [
            (vars(m), name)
            for m in self._modules
            for name, x in vars(m).items()
            if type(x) is float
        ]

    def _key(self, inputs: Inputs) -> Any:
        strides = [None if t is None else t.stride() for t in inputs]
        modes = torch.get_num_threads(), dispatch.encoded_wish(), globally_hooked()
        numbers = [values.get(name) for values, name in self._numbers]
        # Somebody who looks at a layer on a CPU does so in any step.
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._modules]
        hooks += [len(m._backward_hooks) + len(m._backward_pre_hooks) for m in self._modules]
        hooks += [len(p._backward_hooks or ()) for p in self._parameters]
        return (*super()._key(inputs), *strides, *modes, *numbers, *hooks)

    def _advance(self, entry: _Entry, inputs: Inputs) -> StepResult:
        if entry.recorded is not None:
            return self._run(entry.recorded, inputs)
        if entry.steps == 0 and not self._may_begin():
            return self._step.run_eagerly(inputs)
        # Gradients of the step before would lie where others are to lie.
        self._drop_gradients()
        with map_memory.following(entry.course):
            if entry.steps < WARM_UP - 1:
                result = self._step.run_eagerly(inputs)
            else:
                result = self._record(entry, inputs)
        # Not before: a step that raised has shown nothing.
        entry.steps += 1
        return result

    def _record(self, entry: _Entry, inputs: Inputs) -> StepResult:
        step = self._step
        self._look()
        before = PythonState(self._networks, self._optimizers, random_of_torch=False)
        # So that weights that autocast keeps in another type are the program's own.
        torch.clear_autocast_cache()
        recorder = Recorder([t for t in inputs if t is not None])
        with recorder:
            result = step.run_eagerly(inputs)
        reason = recorder.reason or before.change(
            PythonState(self._networks, self._optimizers, random_of_torch=False)
        )
        learning: list[Tensor] = [p for p in self._parameters if p.grad is not None]
        if reason is None:
            gradients = [p.grad for p in learning if p.grad is not None]
            program = recorder.program([*result, *gradients])
            reason = recorder.reason
        if reason is not None:
            self._give_up(reason, made=True)
            return result
        kept = [self._tensors, *self._own()]
        kept += [dict(state) for _, o in self._optimizers for state in o.state.values()]
        entry.recorded = _Recorded(program, type(result), self._held(), learning, kept)
        self._made += 1
        return result

    def _run(self, recorded: _Recorded, inputs: Inputs) -> StepResult:
        # Their memory serves the step, as where an optimizer's zero_grad gives it back.
        self._drop_gradients()
        found = recorded.program.run([t for t in inputs if t is not None])
        count = len(recorded.result._fields)
        for parameter, grad in zip(recorded.learning, found[count:], strict=True):
            parameter.grad = grad
        self._repeats += 1
        return recorded.result(*found[:count])

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
