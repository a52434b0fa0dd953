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
    return lacking(extension.architectures(), torch.cuda.get_device_capability())


def lacking(architectures: str, capability: tuple[int, int]) -> str | None:
    """Reason that no kernel of the extension runs on a GPU of this compute capability, or None.

    Machine code runs on its own major version from its minor one on; the portable code of the last
    architecture on everything from that on.
    """
    targets = [divmod(int(target), 10) for target in architectures.split()]
    if capability >= targets[-1] or any(
        capability[0] == major and capability[1] >= minor for major, minor in targets
    ):
        return None
    names = ", ".join(f"sm_{target}" for target in architectures.split())
    return "the GPU is sm_{}{}; the extension holds kernels of {}".format(*capability, names)


def run(function: Callable[..., None], x: Tensor, *arguments: Any) -> None:
    """``function(*arguments, stream)`` on the device of x and its current stream."""
    if not x.is_cuda:
        function(*arguments, 0)
        return
    with gpu.on(x.device):
        function(*arguments, torch.cuda.current_stream(x.device).cuda_stream)
