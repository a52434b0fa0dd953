"""The compiled CPU kernels, or the reason they are not there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pygan.errors import UserError
from pygan.ops.recorded import recorded

BUILD_LOG = Path(__file__).resolve().parent.parent / "_build_log.txt"

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from pygan import _C
    except ImportError as error:
        if BUILD_LOG.exists():
            return None, f"the native extension was not built, see {BUILD_LOG}"
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
            return None, (
                f"native kernels are for Linux on x86-64, this is {platform.system()} "
                f"on {platform.machine()}"
            )
        return None, f"the native extension is not installed ({error})"
    forced = os.environ.get("PYGAN_ISA")
    if forced and forced not in _C.isas():
        raise UserError(
            f"PYGAN_ISA is {forced!r}; this machine and build run "
            f"{', '.join(_C.isas()) or 'none'}, so name one of these or unset it"
        )
    if _C.isa() == "none":
        return None, "this CPU has none of the compiled instruction sets (AVX2 with FMA at least)"
    return _C, None


def load() -> ModuleType | None:
    """The extension module, or None; ``reason()`` then says why.

    Raises:
        UserError: ``PYGAN_ISA`` names an instruction set that does not run here.
    """
    return _load()[0]


def reason() -> str | None:
    """Why there are no native kernels, or None where they are loaded."""
    return _load()[1]


class At(NamedTuple):
    """An array within a tensor's."""

    tensor: torch.Tensor
    offset: int  # bytes


class Scratch(NamedTuple):
    """Memory that a kernel may write until it returns, see :func:`scratch`."""

    size: int  # bytes


@recorded
def run(kernel: Callable[..., None], *args: Any) -> None:
    """A kernel of the extension, with tensors, :class:`At`, :class:`Scratch` and None in the place
    of addresses."""
    kernel(*addresses(args))


def addresses(args: Sequence[Any]) -> list[Any]:
    """What the extension takes for arguments."""
    return [_address_of(type(x), _address_if_tensor)(x) for x in args]


def _address_if_tensor(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


_ADDRESSES: dict[type, Callable[[Any], Any]] = {
    **{kind: kind for kind in (int, float, bool)},
    torch.Tensor: torch.Tensor.data_ptr,
    torch.nn.Parameter: torch.Tensor.data_ptr,
    type(None): lambda none: 0,
    At: lambda at: at.tensor.data_ptr() + at.offset,
    Scratch: lambda wanted: scratch(wanted.size),
}
_address_of = _ADDRESSES.get


def address(tensor: torch.Tensor | None) -> int:
    """Data pointer, 0 for None: what the extension takes for an array."""
    return 0 if tensor is None else tensor.data_ptr()


def ask_for_huge_pages(memory: mmap.mmap, offset: int, size: int) -> None:
    """Large arrays in pages of 4 KiB miss the TLB. A system without huge ones goes on without."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE, offset, size)


class _Scratch(threading.local):
    memory: mmap.mmap | None = None
    size = 0
    start = 0


_scratch = _Scratch()
_PAGE = 1 << 21  # a huge one


def scratch(size: int) -> int:
    """Address of ``size`` bytes that this thread's kernels may write until it asks again.

    One mapping a thread, which only grows, so that a loop neither allocates nor faults pages in.
    """
    if size > _scratch.size or not _scratch.start:
        size = max(-(-size // _PAGE), 1) * _PAGE
        memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        offset = -base % _PAGE
        ask_for_huge_pages(memory, offset, size)
        _scratch.memory, _scratch.size, _scratch.start = memory, size, base + offset
    return _scratch.start
