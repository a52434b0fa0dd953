"""The compiled CUDA kernels, or the reason they are not there.

The extension has its own CUDA runtime and works in the device context and on the streams of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pygan.ops import gpu

BUILD_LOG = Path(__file__).resolve().parent.parent / "_cuda_build_log.txt"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from pygan import _cuda
    except ImportError as error:
        if BUILD_LOG.exists():
            return None, f"the CUDA extension was not built, see {BUILD_LOG}"
        return None, f"the CUDA extension is not installed ({error})"
    return _cuda, None


def load() -> ModuleType | None:
    """The extension module, or None; ``reason()`` then says why. It loads without a GPU too."""
    return _load()[0]


def module() -> ModuleType:
    """The extension, for whoever knows that ``reason()`` is None."""
    found = load()
    assert found is not None
    return found


@functools.cache
def reason() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None."""
    extension, missing = _load()
    if extension is None:
        return missing
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if unusable := extension.unusable():
        return unusable
    oldest = min(map(int, extension.architectures().split()))
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < oldest:
        return f"the GPU is sm_{major}{minor}; the extension holds kernels from sm_{oldest} on"
    return None


def run(function: Callable[..., None], x: Tensor, *arguments: Any) -> None:
    """``function(*arguments, stream)`` on the device of x and its current stream."""
    if not x.is_cuda:
        function(*arguments, 0)
        return
    with gpu.on(x.device):
        function(*arguments, torch.cuda.current_stream(x.device).cuda_stream)
