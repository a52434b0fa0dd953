"""Memory of the maps that operations put out on a CPU, from one region that is used again.

A step allocates and frees some hundred maps of 1 to 20 MB. The C library's heap fragments under
them, and what is not in use stays resident: about a third of a training process. Here they lie in
one mapping of the process, reserved but not committed, and each takes the lowest place that holds
it. A loop so touches the same pages in every step, and asks nothing of the system. Where the order
of allocations is known, from an earlier step, holes are avoided too (:class:`Course`), and the
resident peak is what is alive.

What a tensor here cannot do is grow: ``resize_`` and ``out=`` beyond its size raise torch's error,
as for an array from NumPy.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pygan.ops import native
from pygan.ops.placement import Piece, aligned, places
from pygan.ops.recorded import recorded

SMALLEST = 1 << 18  # bytes; below it the heap does well
# Allocations after which unused pages go back: more than a step of large networks makes, so that
# a loop never gives back what its next step takes.
_PERIOD = 4096
_RESERVE_AT_LEAST = 1 << 28


class Course:
    """The blocks that a piece of code takes, in their order: seen once, and then each in its place
    among the others."""

    def __init__(self) -> None:
        self._places: list[int] | None = None
        self.begin()

    def begin(self) -> None:
        """The code starts."""
        self._next = 0
        if self._places is None:
            self._sizes: list[int] = []
            self._spans: list[tuple[int, int]] = []
            self._open: dict[int, int] = {}  # start of a block to its index

    def end(self) -> None:
        """The code has run to its end."""
        if self._places is None:
            pieces = [Piece(n, *span) for n, span in zip(self._sizes, self._spans, strict=True)]
            self._places, _ = places(pieces)

    def place(self, size: int) -> int | None:
        """Where the next block lies; None where that is not known."""
        if self._places is None or self._next >= len(self._sizes):
            return None
        known = self._sizes[self._next] == size
        self._next = self._next + 1 if known else len(self._sizes)
        return self._places[self._next - 1] if known else None

    def took(self, start: int, size: int) -> None:
        """A block is taken."""
        if self._places is None:
            self._open[start] = len(self._sizes)
            self._sizes.append(size)
            self._spans.append((len(self._spans), sys.maxsize))

    def gave(self, start: int) -> None:
        """A block is free again."""
        if self._places is None and (i := self._open.pop(start, None)) is not None:
            self._spans[i] = (self._spans[i][0], len(self._spans) - 1)


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
        self._course: Course | None = None
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
            self._take_back()
            size = aligned(size)
            start = self._lowest(size)
            if start is None:
                return None
            block = self._owner(start, start + size)
            if self._course is not None:
                self._course.took(start, size)
            self._high = max(self._high, start + size)
            self._count += 1
            if self._count >= self._period:
                self._trim()
            return block
        finally:
            self._lock.release()

    def _owner(self, start: int, end: int) -> Any:
        block = self._block.from_address(self._base + start)
        block.place = (start, end)
        return block

    def _lowest(self, size: int) -> int | None:
        """Takes the place that the course tells, or the lowest that holds so much."""
        wanted = None if self._course is None else self._course.place(size)
        if wanted is not None:
            i = bisect.bisect_right(self._free, (wanted, self.size)) - 1
            if i >= 0 and wanted + size <= self._free[i][1]:
                return self._take(i, wanted, size)
        found = next((i for i, (a, b) in enumerate(self._free) if b - a >= size), None)
        return None if found is None else self._take(found, self._free[found][0], size)

    def _take(self, i: int, start: int, size: int) -> int:
        low, high = self._free[i]
        left = ((low, start), (start + size, high))
        self._free[i : i + 1] = [(a, b) for a, b in left if a < b]
        return start

    @contextlib.contextmanager
    def following(self, course: Course) -> Iterator[None]:
        """Inside, blocks are taken as the course tells, which is written in its first time."""
        course.begin()
        self._course = course
        try:
            yield
            course.end()
        finally:
            self._course = None

    def parts(self, block: Any, spans: Sequence[tuple[int, int]]) -> list[Any]:
        """Blocks of their own for the spans (offset, size), ascending, of one that nobody uses any
        more; the rest of it is free."""
        start, end = block.place
        block.place = (end, end)
        found, at = [], start
        for offset, size in spans:
            first, last = start + offset, start + offset + aligned(size)
            self._returned.append((at, first))
            found.append(self._owner(first, last))
            at = last
        self._returned.append((at, end))
        return found

    def give_back(self) -> None:
        """Gives back the pages of which nothing is in use."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._take_back()
            for start, end in self._free:
                self._discard(start, min(end, max(self._touched, self._high)))
        finally:
            self._lock.release()

    def _discard(self, start: int, end: int) -> None:
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _take_back(self) -> None:
        while self._returned:
            self._release(*self._returned.popleft())

    def _release(self, start: int, end: int) -> None:
        if start == end:
            return
        if self._course is not None:
            self._course.gave(start)
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
        self._discard(self._high, max(self._touched, self._high))
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


class Region:
    """Bytes in one piece, where maps are, for as long as this lives.

    Attributes:
        address: of the first.
    """

    def __init__(self, size: int) -> None:
        size = max(size, 1)
        self._arena = _arena()
        self._block: Any = None if self._arena is None else self._arena.allocate(size)
        if self._block is not None:
            self.address = ctypes.addressof(self._block)
        else:
            self._block, self._arena = torch.empty(size, dtype=torch.uint8), None
            self.address = self._block.data_ptr()

    def part(self, spans: Sequence[tuple[int, int]]) -> list[Any]:
        """Objects with the buffer protocol that own the spans (offset, size), ascending, from now
        on; the rest is given up."""
        if self._arena is not None:
            return self._arena.parts(self._block, spans)
        return [self._block[o : o + n].clone().numpy() for o, n in spans]


def following(course: Course) -> contextlib.AbstractContextManager[None]:
    """Inside, maps are placed as ``course`` tells, which is written in its first time."""
    arena = _arena()
    return contextlib.nullcontext() if arena is None else arena.following(course)


def give_back() -> None:
    """Gives the system the pages of which no map is in use."""
    if (arena := _arena()) is not None:
        arena.give_back()
