"""Memory of the maps that operations put out on a CPU, from one region that is used again.

A step allocates and frees some hundred maps of 1 to 20 MB. The C library's heap fragments under
them, and what is not in use stays resident: about a third of a training process. Here they lie in
one mapping of the process, reserved but not committed, and each takes the lowest place that holds
it. A loop so touches the same pages in every step, asks nothing of the system, and its resident
peak is close to what is alive.

What a tensor here cannot do is grow: ``resize_`` and ``out=`` beyond its size raise torch's error,
as for an array from NumPy.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygan.ops import native
from pygan.ops.recorded import recorded

SMALLEST = 1 << 18  # bytes; below it the heap does well
_ALIGNMENT = 64
# Allocations after which unused pages go back: more than a step of large networks makes, so that
# a loop never gives back what its next step takes.
_PERIOD = 4096
_RESERVE_AT_LEAST = 1 << 28


class Arena:
    """Blocks of one mapping; each is free again when the last reference to it is gone."""

    def __init__(self, size: int, period: int = _PERIOD) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.size = size
        self._mapping = mmap.mmap(-1, size, flags=flags)
        native.ask_for_huge_pages(self._mapping, 0, size)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._period = period
        self._count = 0
        self._high = 0  # end of the highest block of this period
        self._touched = 0  # no page above it is resident
        self._free = [(0, size)]  # (start, end), sorted, no two of them adjacent
        # A finalizer runs at any moment, inside `allocate` too, so it takes no lock.
        self._returned: collections.deque[tuple[int, int]] = collections.deque()
        self._lock = threading.Lock()
        returned = self._returned

        # torch.frombuffer wants an object with the buffer protocol, which C types alone have
        # before Python 3.12. It reads as many bytes as it is told, so one length serves all.
        class Block(ctypes.Array):
            _type_ = ctypes.c_char
            _length_ = size
            arena = self
            place = (0, 0)

            def __del__(self) -> None:
                returned.append(self.place)

        self._block: Any = Block

    def allocate(self, size: int) -> Any:
        """An object with the buffer protocol whose first ``size`` bytes are the caller's while it
        lives; None where there is no room or another thread is in here."""
        # Waiting could be for ever: in a child whose parent forked while another thread was here,
        # or in a finalizer that the collector runs while this thread is here.
        if not self._lock.acquire(blocking=False):
            return None
        try:
            while self._returned:
                self._release(*self._returned.popleft())
            size = -(-size // _ALIGNMENT) * _ALIGNMENT
            found = next((i for i, (a, b) in enumerate(self._free) if b - a >= size), None)
            if found is None:
                return None
            start, end = self._free[found]
            self._free[found : found + 1] = [(start + size, end)] if end - start > size else []
            block = self._block.from_address(self._base + start)
            block.place = (start, start + size)
            self._high = max(self._high, start + size)
            self._count += 1
            if self._count >= self._period:
                self._trim()
            return block
        finally:
            self._lock.release()

    def _release(self, start: int, end: int) -> None:
        free = self._free
        low = high = bisect.bisect_left(free, (start, end))
        if low and free[low - 1][1] == start:
            low -= 1
            start = free[low][0]
        if high < len(free) and free[high][0] == end:
            end = free[high][1]
            high += 1
        free[low:high] = [(start, end)]

    def _trim(self) -> None:
        """Gives back the pages that no block of the period now ending has used."""
        touched = max(self._touched, self._high)
        unused = -(-self._high // mmap.PAGESIZE) * mmap.PAGESIZE
        if unused < touched:
            self._mapping.madvise(mmap.MADV_DONTNEED, unused, touched - unused)
        self._touched = self._high
        start, end = self._free[-1] if self._free else (self.size, self.size)
        self._high = start if end == self.size else self.size
        self._count = 0


def _most() -> int:
    """Bytes of address space to reserve, 0 for none."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return 0
    import resource

    try:
        with open("/proc/sys/vm/overcommit_memory") as file:
            if file.read().strip() == "2":  # what is reserved counts as used
                return 0
        most = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    except (OSError, ValueError):
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return most if limit == resource.RLIM_INFINITY else min(most, limit // 4)


_making = threading.Lock()
_made: list[Arena | None] = []


def _arena() -> Arena | None:
    """The one of this process; None where there is none, or while another thread makes it."""
    # Not waiting, as in `allocate`; and without a lock each of many threads would reserve its own.
    if not _made and _making.acquire(blocking=False):
        try:
            if not _made:
                _made.append(_reserved())
        finally:
            _making.release()
    return _made[0] if _made else None


def _reserved() -> Arena | None:
    size = _most() // mmap.PAGESIZE * mmap.PAGESIZE
    while size >= _RESERVE_AT_LEAST:
        try:
            return Arena(size)
        except (OSError, ValueError):
            size = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    return None


def _place(elements: int, dtype: torch.dtype) -> Tensor | None:
    """``[elements]``, or None where plain memory is to be taken."""
    size = elements * dtype.itemsize
    if size < SMALLEST or not dtype.is_floating_point or (arena := _arena()) is None:
        return None
    block = arena.allocate(size)
    if block is None:
        return None
    tensor = torch.frombuffer(block, dtype=dtype, count=elements)
    if (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    ):
        tensor.fill_(torch.nan)
    return tensor


@recorded
def empty(
    size: Sequence[int],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """``torch.empty`` on the CPU."""
    elements = 1
    for length in size:
        elements *= length
    tensor = _place(elements, dtype)
    if tensor is None:
        return torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format)
    # Not a view: autograd treats what operations put out as tensors of their own.
    return tensor.resize_(size, memory_format=memory_format)


@recorded
def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like`` of a CPU tensor that is contiguous in one of torch's formats."""
    tensor = _place(x.numel(), x.dtype)
    return torch.empty_like(x) if tensor is None else tensor.as_strided_(x.shape, x.stride())
