"""A training step as one CUDA graph: when it is captured, when it is replayed, when it is not.

    a shape for the first time    WARM_UP steps as usual, on a side stream; the last one is watched
    then                          captured, which executes nothing, and replayed
    from then on                  inputs copied into the graph's own, replayed, results copied out
    other shapes, modes           graphs of their own, the KEPT used last
    other hyperparameters, or     every graph is dropped, and captured anew after WARM_UP steps
      tensors put in the place
      of those captured
    what a graph cannot repeat    eager for good, with one reason; nothing is half done

Every call is one training step in every state, and the numbers are those of eager steps.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pygan.capturable import PythonState, why_not_capturable
from pygan.cuda_graph import CaptureError
from pygan.errors import UserError

if TYPE_CHECKING:
    from pygan.step import AdversarialStep, StepResult

logger = logging.getLogger("pygan")

WARM_UP = 3
KEPT = 4
# A graph that is captured anew all the time costs more than it saves.
_TRIED = 8
_REPLAYS_EACH = 8


class Inputs(NamedTuple):
    """What a step is given: real images, or a set of them and which; z unless it is drawn."""

    real: Tensor | None = None
    images: Tensor | None = None
    which: Tensor | None = None
    flip: Tensor | None = None
    z: Tensor | None = None


class Recording(Protocol):
    """A captured step."""

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

    def close(self) -> None:
        if self.captured is not None:
            self.captured.recording.close()
            self.captured = None


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
        return self._replay(entry.captured, inputs)

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
            recording = self._graphs.capture(
                lambda: torch.stack(tuple(step.run_eagerly(own))), generators
            )
            reason = before.replaced()
        except (CaptureError, torch.OutOfMemoryError) as error:
            sizes = ", ".join(str(list(t.shape)) for t in inputs if t is not None)
            reason = f"{error} (inputs of {sizes})"
        torch.clear_autocast_cache()
        if reason is not None or recording is None:
            if recording is not None:
                recording.close()
            before.restore()
            self._give_up(reason or "nothing was recorded")
            return False
        assert entry.result is not None
        self._captures += 1
        entry.captured = _Captured(
            recording,
            own,
            self._held(),
            [self._tensors, before.states, step.totals, step.generator, step.ema, step._noise],
            [(p, p.grad) for p in self._parameters if p.grad is not None],
            entry.result,
        )
        return True

    def _replay(self, captured: _Captured, inputs: Inputs) -> StepResult:
        with torch.no_grad():
            for own, given in zip(captured.inputs, inputs, strict=True):
                if own is not None and given is not None and own is not given:
                    own.copy_(given)
        found = captured.recording.replay().clone().unbind()
        self._replays += 1
        for parameter, grad in captured.grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        like = captured.result
        return type(like)(*(v.to(t.dtype) for v, t in zip(found, like, strict=True)))


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
