"""A training step as one CUDA graph: when it is captured, when it is replayed, when it is not.

    a shape for the first time    WARM_UP steps as usual, on a side stream; the last one is watched
    then                          captured, which executes nothing, and replayed
    from then on                  inputs copied into the graph's own, replayed, results copied out
    other shapes, modes           graphs of their own, the KEPT used last
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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pygan.capturable import PythonState, why_not_capturable
from pygan.cuda_graph import CaptureError
from pygan.errors import UserError
from pygan.pace import SAMPLE, SIZES, Pace

if TYPE_CHECKING:
    from pygan.step import AdversarialStep, StepResult

logger = logging.getLogger("pygan")

WARM_UP = 3
KEPT = 4
# A graph that is captured anew all the time costs more than it saves.
_TRIED = 8
_REPLAYS_EACH = 8
_NAMES = tuple(map(str, SIZES))


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
    grads: list[tuple[Tensor, Tensor]]
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

    def close(self) -> None:
        self.close_several()
        if self.captured is not None:
            self.captured.recording.close()
            self.captured = None

    def close_several(self) -> None:
        if self.several is not None:
            self.several.recording.close()
            self.several = None


class GraphedStep:
    """The steps of an :class:`pygan.AdversarialStep`, by graphs.

    Args:
        step: whose ``run_eagerly`` is captured.
        graphs: of the device.
        required: raise where a step cannot be captured, instead of staying eager.
    """

    def __init__(self, step: AdversarialStep, graphs: Graphs, *, required: bool = False) -> None:
        self._step, self._graphs, self._required = step, graphs, required
        self._networks = (("G", step.G), ("D", step.D))
        self._optimizers = (("opt_g", step.opt_g), ("opt_d", step.opt_d))
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._captures = self._replays = 0
        self._change = "the shape of the inputs"
        self.reason: str | None = None
        self._look()

    def _look(self) -> None:
        """Takes notice of the networks' modules, parameters and buffers."""
        self._modules = [m for _, network in self._networks for m in network.modules()]
        self._parameters = [p for _, network in self._networks for p in network.parameters()]
        self._tensors = [*self._parameters, *(b for m in self._modules for b in m.buffers(False))]

    def forget(self) -> None:
        """Drops every graph."""
        for entry in self._entries.values():
            entry.close()
        self._entries.clear()

    def __call__(self, inputs: Inputs) -> StepResult:
        """One step.

        Raises:
            UserError: it cannot be captured, and has to be.
        """
        if self.reason is not None or self._graphs.is_capturing():
            return self._step.run_eagerly(inputs)
        self._graphs.join()
        key = self._key(inputs)
        entry = self._entries.pop(key, None)
        if entry is None or self._is_stale(entry):
            entry = _Entry()
        self._entries[key] = entry
        while len(self._entries) > KEPT:
            self._entries.popitem(last=False)[1].close()
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

    def _key(self, inputs: Inputs) -> Any:
        given = [None if t is None else (t.shape, t.dtype, t.device) for t in inputs]
        images = inputs.images
        modes = [m.training for m in self._modules] + [p.requires_grad for p in self._parameters]
        where = None if images is None else images.data_ptr()
        return (*given, where, *modes, torch.is_autocast_enabled(self._step.device.type))

    def _held(self) -> dict[str, Any]:
        """What a graph holds as it was at the capture, by the names of what it is."""
        step = self._step
        groups = [group for _, o in self._optimizers for group in o.param_groups]
        scalers = (step._scaler_g, step._scaler_d)
        return {
            "settings of the step": (
                *(step.loss, step.loss_weight, step.real_target, step.amp, step.merge),
                *(id(step.generator), id(step.totals), id(step.ema), id(step._noise)),
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

    def _is_stale(self, entry: _Entry) -> bool:
        if entry.captured is None:
            return False
        held = self._held()
        if entry.captured.held == held:
            return False
        self._change = next(n for n, value in held.items() if value != entry.captured.held[n])
        entry.close()
        # The others hold the same.
        self.forget()
        return True

    def _warm_up(self, entry: _Entry, inputs: Inputs) -> StepResult:
        self._look()
        if entry.steps == 0 and not self._may_capture():
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
                self._give_up(reason)
        return result

    def _may_capture(self) -> bool:
        reason = why_not_capturable(
            self._networks, self._optimizers, scaled=self._step._scaler_d.is_enabled()
        )
        if self._captures >= _TRIED and self._replays < _REPLAYS_EACH * self._captures:
            reason = (
                f"{self._captures} graphs served {self._replays} steps, the last until "
                f"{self._change} changed; change tensors in place, a learning rate too"
            )
        if reason is not None:
            self._give_up(reason)
        return reason is None

    def _give_up(self, reason: str) -> None:
        self.forget()
        self.reason = reason
        if self._required:
            raise UserError(
                f"graph is 'on' and the step cannot be captured, because {reason}; 'auto' leaves "
                "it eager then"
            )
        logger.warning("the step runs without a CUDA graph, because %s", reason)

    def _capture(self, entry: _Entry, inputs: Inputs) -> bool:
        assert entry.result is not None
        found = self._recorded(inputs, self._step_on, entry.result)
        if isinstance(found, str):
            self._give_up(found)
            return False
        self._captures += 1
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
            [self._tensors, before.states, step.totals, step.generator, step.ema, step._noise],
            [(p, p.grad) for p in self._parameters if p.grad is not None],
            like,
        )

    def _replay(self, captured: _Captured, inputs: Inputs, count: int = 1) -> list[StepResult]:
        with torch.no_grad():
            for own, given in zip(captured.inputs, inputs, strict=True):
                if own is not None and given is not None and own is not given:
                    own.copy_(given)
        found = captured.recording.replay().clone().view(count, -1)
        self._replays += count
        for parameter, grad in captured.grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        like = captured.result
        kind = type(like)
        return [
            kind(*(v.to(t.dtype) for v, t in zip(values.unbind(), like, strict=True)))
            for values in found
        ]


def _value(value: Any) -> Any:
    """A hyperparameter as a graph holds it."""
    if not isinstance(value, Tensor):
        return value
    # One on the CPU is read while capturing, one on the device by every replay.
    return value.item() if value.is_cpu else id(value)


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
