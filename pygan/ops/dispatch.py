"""Which implementation of an operation runs.

``impl="auto"`` (or the environment variable ``PYGAN_IMPL``) takes the fastest that supports the
arguments and logs once why a faster one did not; a name that cannot run raises with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pygan.errors import UserError
from pygan.ops import cuda_native, gpu, native

logger = logging.getLogger("pygan")

NAMES = ("cuda", "triton", "cpu", "torch")

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_OLDEST_OF_TRITON = (8, 0)  # compute capability

Support = Callable[[], "str | None"]


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def choose(operation: str, impl: str, candidates: Sequence[tuple[str, Support]]) -> str:
    """The implementation to run.

    Args:
        operation: name for messages.
        impl: "auto" or one of ``NAMES``.
        candidates: implementations of this operation, fastest first; each answers None, or the
            reason it cannot take these arguments.

    Raises:
        UserError: a named implementation does not exist or cannot run.
    """
    if impl == "auto":
        impl = wished()
    if impl == "auto":
        for name, supports in candidates:
            reason = supports()
            if reason is None:
                return name
            _log_once(f"{operation}: not {name}, because {reason}")
        raise RuntimeError(f"{operation} has no implementation that always runs")
    offered = dict(candidates)
    if impl not in offered:
        raise UserError(
            f"{operation} has no implementation {impl!r}; it has {', '.join(offered)} and auto"
        )
    reason = offered[impl]()
    if reason is not None:
        raise UserError(f"{operation} cannot run as {impl!r}: {reason}")
    return impl


def _variable(name: str) -> Callable[[], str | bytes | None]:
    """Reads an environment variable, encoded or not. ``os.environ.get`` raises and catches for one
    that is not set, which behind a convolution takes microseconds; its dict does not."""
    environ: Any = os.environ
    try:
        return functools.partial(environ._data.get, environ.encodekey(name))
    except AttributeError:  # another Python
        return functools.partial(environ.get, name)


encoded_wish = _variable("PYGAN_IMPL")


def wished() -> str:
    """What ``PYGAN_IMPL`` names, else "auto"."""
    value = encoded_wish()
    return "auto" if value is None else os.fsdecode(value)


def always() -> None:
    """Support of the reference: it takes everything."""


@functools.cache
def triton_reason() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    reasons = [_too_old(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST_OF_TRITON:
        return None
    name, oldest = ("sm_{}{}".format(*each) for each in (capability, _OLDEST_OF_TRITON))
    return f"the GPU is {name}; Triton compiles for {oldest} and later"


def gpu_reason() -> str | None:
    """Why no kernels of pygan run on a GPU of this machine, or None."""
    if cuda_native.reason() is None:
        return None
    return triton_reason()


def supports_triton(*tensors: torch.Tensor) -> str | None:
    """Reason that Triton kernels cannot take these tensors, or None."""
    reason = triton_reason()
    if reason is None and os.environ.get("TRITON_INTERPRET") != "1":
        for tensor in tensors:
            if tensor.device.type != "cuda":
                return f"a tensor is on {tensor.device}, not on a GPU"
            if tensor.device != tensors[0].device:
                return f"a tensor is on {tensor.device}, another one on {tensors[0].device}"
            reason = _too_old(tensor.device)
    return reason


def supports_cuda(*tensors: torch.Tensor) -> str | None:
    """Reason that the CUDA kernels cannot take tensors of this device and type, or None."""
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device}, not on a GPU"
        if (reason := gpu.unfit(tensor.dtype)) is not None:
            return reason
        if type(tensor) not in _PLAIN:
            return f"a tensor is a {type(tensor).__name__}, not a plain one"
    return cuda_native.reason()


def supports_cpu(*tensors: torch.Tensor) -> str | None:
    """Reason that the native kernels cannot take tensors of this device and type, or None."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor.dtype not in native.DTYPES:
            return f"the dtype is {tensor.dtype}, not float32 or bfloat16"
        if type(tensor) not in _PLAIN:
            return f"a tensor is a {type(tensor).__name__}, not a plain one"
    return native.reason()
