"""Whether a training step can be one CUDA graph, found out before one is made.

A graph repeats what was done on the device. What Python did meanwhile is not done again: numbers it
counted, hooks it called, tensors it put in the place of others, random numbers of the CPU. Where a
step needs any of these it stays eager, and the reason says what and where.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pygan.layers import globally_hooked, is_own_hook

_NOT_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), warnings.__file__)
_SCALARS = (bool, int, float, complex, str)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Named = Sequence[tuple[str, Any]]


def why_not_capturable(networks: Named, optimizers: Named, *, scaled: bool = False) -> str | None:
    """Why a step with these networks and optimizers, each with its name, cannot be a graph, as far
    as it can be told without a step; None where nothing is known against it.

    Args:
        scaled: whether gradients are scaled for float16.
    """
    if (reason := _why_not_hooks(networks, optimizers)) is not None:
        return reason
    for name, optimizer in optimizers:
        if (reason := _why_not_optimizer(name, optimizer, scaled)) is not None:
            return reason
    return None


def why_not_repeatable(networks: Named, optimizers: Named, *, any_code: bool = False) -> str | None:
    """Why a step on a CPU cannot be a program, as :func:`why_not_capturable` tells of a graph.

    Args:
        any_code: whether networks may have code that is neither torch's nor pygan's: it is not run
            any more, which only their owner knows to be right.
    """
    if (reason := _why_not_hooks(networks, optimizers)) is not None:
        return reason
    held = {id(p) for _, o in optimizers for group in o.param_groups for p in group["params"]}
    for name, network in networks:
        for path, parameter in network.named_parameters(prefix=name):
            if parameter.requires_grad and id(parameter) not in held:
                return f"no optimizer has {path}, whose gradient every step adds to"
        for path, module in network.named_modules(prefix=name):
            if not any_code and (code := _code_of(module)) is not None:
                return f"{path} runs {code}, which a program would not; graph='on' allows that"
    return None


def _code_of(module: nn.Module) -> str | None:
    """Code of a module that is neither torch's nor pygan's."""
    if "forward" in vars(module):
        return "a forward of its own"
    kind = type(module)
    ours = kind.__module__.split(".")[0] in ("torch", __package__)
    return None if ours else f"{kind.__module__}.{kind.__qualname__}"


def _why_not_hooks(networks: Named, optimizers: Named) -> str | None:
    if globally_hooked():
        return "there are global module hooks, which a graph would not call"
    for name, network in networks:
        if (reason := _why_not_network(name, network)) is not None:
            return reason
    for name, optimizer in optimizers:
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            title = f"{name} ({type(optimizer).__name__})"
            return f"{title} has a hook, which a graph would not call"
    return None


def _why_not_network(name: str, network: nn.Module) -> str | None:
    for path, module in network.named_modules(prefix=name):
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return f"{path} is a {type(module).__name__}"
        if any(_is_users(hook) for hooks in _HOOKS for hook in getattr(module, hooks).values()):
            return f"{path} ({type(module).__name__}) has a hook, which a graph would not call"
    devices = set()
    for path, parameter in network.named_parameters(prefix=name):
        devices.add(str(parameter.device))
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"{path} has a hook, which a graph would not call"
    if len(devices) > 1:
        return f"{name} is on {' and '.join(sorted(devices))}"
    return None


def _is_users(hook: Any) -> bool:
    # Those of torch.nn.utils compute a weight on the device, as a layer would.
    return not is_own_hook(hook) and not type(hook).__module__.startswith("torch.nn.utils")


def _why_not_optimizer(name: str, optimizer: torch.optim.Optimizer, scaled: bool) -> str | None:
    title = f"{name} ({type(optimizer).__name__})"
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        return f"{title} counts its steps for eager use; make it with capturable=True, fused=True"
    if scaled and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"{title} is not fused, so float16 asks the device about infinities; give fused=True"
    return None


def users_line(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """The innermost of the frames, outermost first, that is neither torch's nor pygan's."""
    found = None
    for frame in frames:
        if not frame.filename.startswith((*_NOT_USERS, "<")):
            found = f"{frame.filename}:{frame.lineno} ({(frame.line or frame.name).strip()})"
    return found


def line_of(error: BaseException | None) -> str | None:
    """The user's line that an error comes from."""
    while error is not None:
        line = users_line(traceback.extract_tb(error.__traceback__))
        if line is not None:
            return line
        error = error.__cause__ or error.__context__
    return None


class PythonState:
    """What Python holds of networks and optimizers, to be compared before and after a step.

    Args:
        random_of_torch: whether random numbers that torch draws on the CPU count.
    """

    def __init__(self, networks: Named, optimizers: Named, *, random_of_torch: bool = True) -> None:
        self._values = dict(_of_networks(networks)) | dict(_of_optimizers(optimizers))
        self._random = _random_states(random_of_torch)

    def change(self, later: PythonState) -> str | None:
        """What a graph would not repeat of what happened until ``later``, or None."""
        for name in self._values.keys() | later._values.keys():
            before, after = self._values.get(name), later._values.get(name)
            if before is after or (not isinstance(before, Tensor) and _same(before, after)):
                continue
            if before is None or after is None or isinstance(after, Tensor):
                return f"{name} becomes another tensor in every step; change it in place"
            return f"{name} went from {before!r} to {after!r} in a step, which a graph would not do"
        if self._random != later._random:
            return "a step draws random numbers of the CPU, which a graph would repeat"
        return None


def _random_states(of_torch: bool) -> tuple[bytes, Any, str]:
    of_numpy = np.random.get_state(legacy=False)
    state = torch.get_rng_state().numpy().tobytes() if of_torch else b""
    return state, random.getstate(), repr(of_numpy)


def _same(before: Any, after: Any) -> bool:
    return type(before) is type(after) and bool(before == after)


def _of_networks(networks: Named) -> Iterator[tuple[str, Any]]:
    for letter, network in networks:
        for path, module in network.named_modules(prefix=letter):
            for name, value in vars(module).items():
                if type(value) in _SCALARS:
                    yield f"{path}.{name}", value
            for name, tensor in (*module._buffers.items(), *module._parameters.items()):
                yield f"{path}.{name}", tensor


def _of_optimizers(optimizers: Named) -> Iterator[tuple[str, Any]]:
    for title, optimizer in optimizers:
        for i, group in enumerate(optimizer.param_groups):
            for name, value in group.items():
                if type(value) in _SCALARS or isinstance(value, Tensor):
                    yield f"{title}.param_groups[{i}][{name!r}]", value
            for j, parameter in enumerate(group["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    if type(value) in _SCALARS or isinstance(value, Tensor):
                        yield f"{title}'s {name} of parameter {j}", value
