"""A training step as one CUDA graph: when it is captured, when it is replayed, when it is not.

    a shape for the first time    WARM_UP steps as usual, on a side stream; the last one is watched
    then                          captured, which executes nothing, and replayed
    from then on                  inputs copied into the graph's own, replayed, results copied out
    other shapes, modes, turns    graphs of their own, the KEPT used last
    other hyperparameters, or     every graph is dropped, and captured anew after WARM_UP steps
      tensors put in the place
      of those captured
    what a graph cannot repeat    eager for good, with one reason; nothing is half done
    several steps given together  as many in one graph, beside that of one step, as were measured to
                                  be fastest (:mod:`pygan.pace`)

Every call is as many training steps as it was given in every state, and the numbers are those of
eager steps.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pygan.capturable import PythonState, why_not_capturable
from pygan.cuda_graph import CaptureError
from pygan.pace import SAMPLE, SIZES, Pace
from pygan.repeated_step import Inputs, RepeatedStep

if TYPE_CHECKING:
    from pygan.step import AdversarialStep, StepResult

logger = logging.getLogger("pygan")

WARM_UP = 3  # steps as usual
_NAMES = tuple(map(str, SIZES))


class Recording(Protocol):
    """A captured step, or several."""

    def replay(self) -> Tensor: ...

    def close(self) -> None: ...


class Graphs(Protocol):
    """Where steps are captured: :class:`pygan.cuda_graph.CudaGraphs`."""

    def is_capturing(self) -> bool: ...

    def join(self) -> None: ...

    def warm_up(self, run: Callable[[], Any], *, watch: bool) -> tuple[Any, str | None]: ...

    def capture(
        self, run: Callable[[], Tensor], generators: Sequence[torch.Generator]
    ) -> Recording: ...

    def clock(self, run: Callable[[], Any]) -> float: ...

    def known(self, key: str, candidates: Sequence[str]) -> str | None: ...

    def keep(self, key: str, choice: str) -> None: ...


class _Captured(NamedTuple):
    recording: Recording
    inputs: Inputs  # its own, but for the set of images
    held: dict[str, Any]
    kept: list[Any]  # what its memory belongs to
    grads: list[tuple[Tensor, Tensor | None]]  # of every parameter, as a step leaves it
    result: StepResult  # one of a warm-up


class _Entry:
    """One kind of step."""

    def __init__(self) -> None:
        self.steps = 0
        self.result: StepResult | None = None
        self.captured: _Captured | None = None
        self.pace: Pace | None = None
        self.size = 1  # steps of several
        self.several: _Captured | None = None

    @property
    def held(self) -> dict[str, Any] | None:
        return None if self.captured is None else self.captured.held

    def close(self) -> None:
        self.close_several()
        if self.captured is not None:
            self.captured.recording.close()
            self.captured = None

    def close_several(self) -> None:
        if self.several is not None:
            self.several.recording.close()
            self.several = None


class GraphedStep(RepeatedStep[_Entry]):
    """The steps of an :class:`pygan.AdversarialStep`, by graphs.

    Args:
        step: whose ``run_eagerly`` is captured.
        graphs: of the device.
        required: raise where a step cannot be captured, instead of staying eager.
    """

    what, level = "CUDA graph", logging.WARNING

    def __init__(self, step: AdversarialStep, graphs: Graphs, *, required: bool = False) -> None:
        super().__init__(step, required=required)
        self._graphs = graphs

    def _entry(self) -> _Entry:
        return _Entry()

    def _rests(self, inputs: Inputs) -> bool:
        return self._graphs.is_capturing()

    def _why_not(self) -> str | None:
        scaled = self._step._scaler_d.is_enabled()
        return why_not_capturable(self._networks, self._optimizers, scaled=scaled)

    def _advance(self, entry: _Entry, inputs: Inputs) -> StepResult:
        self._graphs.join()
        if entry.captured is None:
            if entry.steps < WARM_UP:
                return self._warm_up(entry, inputs)
            if not self._capture(entry, inputs):
                return self._step.run_eagerly(inputs)
        assert entry.captured is not None
        (result,) = self._replay(entry.captured, inputs)
        return result

    @property
    def at_once(self) -> int:
        """Steps that it gains to give together."""
        if self.reason is not None or not self._entries:
            return 1
        newest = next(reversed(self._entries.values()))
        one = newest.pace is not None and newest.pace.choice == 1
        return 1 if newest.captured is None or one else SAMPLE

    def several(self, inputs: Inputs) -> list[StepResult]:
        """As many steps as ``which`` has rows.

        Raises:
            UserError: as one step does.
        """
        assert inputs.which is not None
        if len(inputs.which) == 1:
            return [self(inputs.at(0))]
        found: list[StepResult] = []
        while (left := len(inputs.which) - len(found)) > 0:
            rest = inputs.run(len(found), left)
            key = self._key(rest.at(0))
            entry = self._ready(key)
            pace = None if entry is None else self._pace(entry, key)
            if entry is None or pace is None:
                found.append(self(rest.at(0)))
            elif pace.wanted is not None and left >= SAMPLE:
                found += self._sample(entry, pace, key, rest.run(0, SAMPLE))
            elif pace.choice is not None and left >= pace.choice > 1:
                found += self._replayed(entry, pace, pace.choice, rest.run(0, pace.choice))
            else:
                found += [self(rest.at(i)) for i in range(left)]
        return found

    def _ready(self, key: Any) -> _Entry | None:
        """What serves steps of this kind by a graph already."""
        if self.reason is not None or self._graphs.is_capturing():
            return None
        entry = self._entries.get(key)
        if entry is None or entry.captured is None or self._is_stale(entry):
            return None
        self._entries.move_to_end(key)
        return entry

    def _pace(self, entry: _Entry, key: Any) -> Pace:
        if entry.pace is None:
            entry.pace = Pace(self._graphs.known(self._name(key), _NAMES))
        return entry.pace

    def _name(self, key: Any) -> str:
        """The kind of step, for what is kept of a measurement."""
        step = self._step
        about = (
            [tuple(p.shape) for p in self._parameters],
            [type(each).__name__ for each in (*self._modules, step.opt_g, step.opt_d)],
            *(step.loss, step.amp, step.merge, step.tricks, step.ema is not None),
            key[: len(Inputs._fields)],
        )
        return f"steps a replay {hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"

    def _sample(self, entry: _Entry, pace: Pace, key: Any, inputs: Inputs) -> list[StepResult]:
        """``SAMPLE`` steps, timed."""
        found: list[StepResult] = []
        size = pace.wanted
        assert size is not None

        def run() -> None:
            for first in range(0, SAMPLE, size):
                found.extend(self._replayed(entry, pace, size, inputs.run(first, size)))

        time = self._graphs.clock(run)
        if pace.wanted == size:
            pace.add(size, time)
            if pace.choice is not None:
                self._graphs.keep(self._name(key), str(pace.choice))
        if pace.choice not in (None, entry.size):
            entry.close_several()
        return found

    def _replayed(self, entry: _Entry, pace: Pace, size: int, inputs: Inputs) -> list[StepResult]:
        """``size`` steps by one replay where a graph holds as many, else one by one."""
        if size > 1 and pace.may_hold(size):
            if entry.several is None or entry.size != size:
                self._capture_several(entry, pace, size, inputs)
            if entry.several is not None:
                self._graphs.join()
                return self._replay(entry.several, inputs, size)
        return [self(inputs.at(i)) for i in range(size)]

    def _warm_up(self, entry: _Entry, inputs: Inputs) -> StepResult:
        self._look()
        if entry.steps == 0 and not self._may_begin():
            return self._step.run_eagerly(inputs)
        watch = entry.steps == WARM_UP - 1
        before = PythonState(self._networks, self._optimizers) if watch else None
        result, reason = self._graphs.warm_up(lambda: self._step.run_eagerly(inputs), watch=watch)
        # Not before: a step that raised has shown nothing.
        entry.steps += 1
        entry.result = result
        if before is not None:
            reason = reason or before.change(PythonState(self._networks, self._optimizers))
            if reason is not None:
                self._give_up(reason, made=True)
        return result

    def _capture(self, entry: _Entry, inputs: Inputs) -> bool:
        assert entry.result is not None
        found = self._recorded(inputs, self._step_on, entry.result)
        if isinstance(found, str):
            self._give_up(found)
            return False
        self._made += 1
        entry.captured = found
        return True

    def _capture_several(self, entry: _Entry, pace: Pace, size: int, inputs: Inputs) -> None:
        """A graph of ``size`` steps in the place of that of another number."""
        entry.close_several()
        assert entry.result is not None

        def steps(own: Inputs) -> Tensor:
            return torch.stack([self._step_on(own.at(i)) for i in range(size)])

        found = self._recorded(inputs, steps, entry.result)
        if isinstance(found, str):
            logger.info("no graph holds %d steps, because %s", size, found)
            pace.fails(size)
        else:
            entry.several, entry.size = found, size

    def _step_on(self, own: Inputs) -> Tensor:
        return torch.stack(tuple(self._step.run_eagerly(own)))

    def _recorded(
        self, inputs: Inputs, run: Callable[[Inputs], Tensor], like: StepResult
    ) -> _Captured | str:
        """What ``run`` does with inputs of its own, or why it cannot be captured."""
        step, before = self._step, _Before(self)
        # So that gradients, and weights that autocast keeps in another type, are the graph's own.
        step.opt_g.zero_grad(set_to_none=True)
        step.opt_d.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()
        generators = [] if step.generator is None else [step.generator]
        reason, recording = None, None
        try:
            # The set of images may fill half the memory: it is read where it is.
            own = Inputs(
                *(t if t is None or t is inputs.images else t.detach().clone() for t in inputs)
            )
            recording = self._graphs.capture(lambda: run(own), generators)
            reason = before.replaced()
        except (CaptureError, torch.OutOfMemoryError) as error:
            sizes = ", ".join(str(list(t.shape)) for t in inputs if t is not None)
            reason = f"{error} (inputs of {sizes})"
        torch.clear_autocast_cache()
        if reason is not None or recording is None:
            if recording is not None:
                recording.close()
            before.restore()
            return reason or "nothing was recorded"
        return _Captured(
            recording,
            own,
            self._held(),
            [self._tensors, before.states, *self._own()],
            [(p, p.grad) for p in self._parameters],
            like,
        )

    def _replay(self, captured: _Captured, inputs: Inputs, count: int = 1) -> list[StepResult]:
        with torch.no_grad():
            for own, given in zip(captured.inputs, inputs, strict=True):
                if own is not None and given is not None and own is not given:
                    own.copy_(given)
        found = captured.recording.replay().clone().view(count, -1)
        self._repeats += count
        for parameter, grad in captured.grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        like = captured.result
        kind = type(like)
        return [
            kind(*(v.to(t.dtype) for v, t in zip(values.unbind(), like, strict=True)))
            for values in found
        ]


class _Before:
    """What Python held before a capture, which changes it as a step would."""

    def __init__(self, graphed: GraphedStep) -> None:
        step = graphed._step
        self._optimizers = (step.opt_g, step.opt_d)
        self._scalers = [s for s in (step._scaler_g, step._scaler_d) if s.is_enabled()]
        self._grads = [(p, p.grad) for p in graphed._parameters]
        self._random = torch.get_rng_state()
        self.states = [
            {p: dict(state) for p, state in optimizer.state.items()}
            for optimizer in self._optimizers
        ]

    def replaced(self) -> str | None:
        """Why what an optimizer made in the capture cannot be repeated, or None."""
        for optimizer, before in zip(self._optimizers, self.states, strict=True):
            for parameter, state in optimizer.state.items():
                old = before.get(parameter, {})
                if any(value is not old.get(name) for name, value in state.items()):
                    return (
                        f"{type(optimizer).__name__} makes new state in a step, which a graph "
                        "would make in every step"
                    )
        return None

    def restore(self) -> None:
        for optimizer, before in zip(self._optimizers, self.states, strict=True):
            for parameter in list(optimizer.state):
                if parameter in before:
                    optimizer.state[parameter].clear()
                    optimizer.state[parameter].update(before[parameter])
                else:
                    del optimizer.state[parameter]
            for name in ("grad_scale", "found_inf") if self._scalers else ():
                vars(optimizer).pop(name, None)
        for scaler in self._scalers:
            scaler._per_optimizer_states.clear()
        for parameter, grad in self._grads:
            parameter.grad = grad
        torch.set_rng_state(self._random)
