"""Runs the kernels on arrays that begin or end where memory does, and so faults where they do not
keep within them: python guarded_kernels.py EXTENSION OPERATION first|last

Without torch, threads are the standard library's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
ITEM = {0: 4, 1: 2}  # bytes of a float32 and of a bfloat16
SCRATCH_ALIGNMENT = 64


class Memory:
    """Arrays of finite values with an inaccessible page before the first or behind the last."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.mapped: list[mmap.mmap] = []
        self.random = np.random.default_rng(0)
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect
        self.protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def bytes(self, size: int, alignment: int = 1) -> int:
        """Address of `size` bytes, all ones: NaN in every type."""
        pages = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, pages + 2 * PAGE)
        self.mapped.append(memory)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + PAGE
        for guard in (begin - PAGE, begin + pages):  # 0: no access
            if self.protect(guard, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        address = begin if self.side == "first" else begin + (pages - size) // alignment * alignment
        ctypes.memset(address, 0xFF, size)
        return address

    def values(self, count: int, dtype: int = 0) -> int:
        values = self.random.standard_normal(count, dtype=np.float32)
        data = values if dtype == 0 else (values.view(np.uint32) >> 16).astype(np.uint16)
        return self.array(data)

    def array(self, data: np.ndarray) -> int:
        address = self.bytes(data.nbytes)
        ctypes.memmove(address, data.ctypes.data, data.nbytes)
        return address

    def empty(self, count: int, dtype: int = 0) -> int:
        return self.bytes(count * ITEM[dtype])


def norm_act(c: Any, side: str) -> Iterator[str]:
    shapes = [(1, 1, 7, 1), (2, 3, 5, 2), (4, 17, 9, 2), (2, 33, 70, 1), (6, 70, 130, 3)]
    for dtype, layout, activation, training, threads in itertools.product(
        (0, 1), (0, 1), (0, 2, 4), (True, False), (1, 3)
    ):
        for batch, channels, spatial, groups in shapes:
            memory = Memory(side)
            size = batch * channels * spatial
            shape = c.NormActShape(
                dtype, layout, batch, channels, spatial, groups, activation, 0.2, threads
            )
            x, dy = memory.values(size, dtype), memory.values(size, dtype)
            weight, bias = memory.values(channels), memory.values(channels)
            running = memory.values(channels), memory.array(np.ones(channels, np.float32))
            statistics = memory.values(groups * channels), memory.values(groups * channels)
            yield (
                f"{dtype=} {layout=} {activation=} {training=} {threads=} "
                f"{batch=} {channels=} {spatial=}"
            )
            coefficients = memory.empty(3 * groups * channels)
            for y in (memory.empty(size, dtype), 0):
                c.norm_act_forward(
                    *(shape, x, weight, bias, training, 1e-5, 0.1, *running),
                    *(y, *statistics, coefficients),
                    memory.bytes(8 * c.norm_act_scratch(shape)),
                )
            c.norm_act_backward(
                *(shape, x, dy, weight, bias, *statistics, training, memory.empty(size, dtype)),
                *(memory.empty(channels), memory.empty(channels)),
                memory.bytes(8 * c.norm_act_scratch(shape)),
            )
            if layout == 1 or activation == 4:
                continue
            gradients = memory.values(channels), memory.values(channels)
            for dx, ddy in ((memory.empty(size, dtype), memory.empty(size, dtype)), (0, 0)):
                c.norm_act_second(
                    *(shape, x, dy, memory.values(size, dtype), weight, bias, *gradients),
                    *(*statistics, training, dx, ddy, memory.empty(channels)),
                    memory.bytes(8 * c.norm_act_second_scratch(shape)),
                )


def gan_loss(c: Any, side: str) -> Iterator[str]:
    for dtype, size, targets in itertools.product((0, 1), (*range(1, 35), 1000), (True, False)):
        memory = Memory(side)
        yield f"{dtype=} {size=} {targets=}"
        groups = tuple(
            (
                memory.values(count, dtype),
                memory.values(count) if targets else 0,
                *(0.9, 1.0, count, memory.empty(count, dtype), memory.empty(1)),
            )
            for count in (size, size + 3)
        )
        c.gan_loss(dtype, groups, memory.empty(1))


def image_batch(c: Any, side: str) -> Iterator[str]:
    for dtype, flipped, threads in itertools.product((0, 1), (True, False), (1, 2)):
        for width, channels in ((1, 1), (5, 3), (16, 1), (31, 1), (70, 3), (1500, 3)):
            memory = Memory(side)
            row = width * channels
            yield f"{dtype=} {flipped=} {threads=} {width=} {channels=}"
            images = memory.array(memory.random.integers(0, 256, (3, 4, row), dtype=np.uint8))
            index = memory.array(np.array([2, 0, 2, 1], np.int64))
            flip = memory.array(np.array([1, 0, 1, 1], np.uint8)) if flipped else 0
            out = memory.empty(4 * 4 * row, dtype)
            c.image_batch(images, 3, 4, width, channels, index, flip, 4, dtype, out, threads)


def strided_conv(c: Any, side: str) -> Iterator[str]:
    """Every method and pass, with all maps as they are and with each normalized."""
    sizes = [(1, 1, 1, 0, 0), (2, 3, 5, 1, 0), (1, 4, 4, 0, 0), (3, 8, 7, 0, 1), (2, 5, 9, 1, 1)]
    channels = [(1, 1), (7, 3), (20, 1), (64, 3), (16, 16), (19, 37), (40, 24)]
    for dtype, layout, method, threads, normalized in itertools.product(
        (0, 1), (0, 1), (2, 3, 4), (1, 2), (0, 1, 2)
    ):
        for (batch, height, width, *odd), (a, b) in itertools.product(sizes, channels):
            big_height, big_width = 2 * height + odd[0], 2 * width + odd[1]
            shape = c.StridedConvShape(
                *(dtype, layout, batch, height, width, big_height, big_width, a, b),
                *(method, normalized, threads),
            )
            counts = batch * height * width * a, batch * big_height * big_width * b
            for conv_pass in (0, 1, 2):
                if c.strided_conv_method(shape, conv_pass) != method:
                    continue
                memory = Memory(side)
                scratch = memory.bytes(c.strided_conv_scratch(shape, conv_pass), SCRATCH_ALIGNMENT)
                yield (
                    f"{dtype=} {layout=} {method=} {threads=} {batch=} {height=} {width=} "
                    f"{odd=} {a=} {b=} {conv_pass=} {normalized=}"
                )
                small, big = (memory.values(count, dtype) for count in counts)
                fused = method == 2 and layout == 0 and not normalized
                gate = memory.values(counts[0], dtype) if fused else 0
                coefficients = memory.values(3 * batch * (a, b)[normalized - 1])
                norm = (coefficients, batch) if normalized else (0, 0)
                if conv_pass == 0:
                    weight, bias = memory.values(16 * a * b), memory.values(b)
                    big = memory.empty(counts[1], dtype)
                    c.strided_conv_up(shape, small, gate, *norm, 0.2, weight, bias, big, scratch)
                elif conv_pass == 1:
                    weight, bias = memory.values(16 * a * b), memory.values(a)
                    small = memory.empty(counts[0], dtype)
                    activation = 2 if fused else 0
                    c.strided_conv_down(
                        *(shape, big, *norm, weight, bias, activation, 0.2, small, scratch)
                    )
                else:
                    dweight = memory.empty(16 * a * b)
                    c.strided_conv_weight_grad(
                        *(shape, small, gate, *norm, 0.2, big, dweight, scratch)
                    )


OPERATIONS = {f.__name__: f for f in (norm_act, gan_loss, image_batch, strided_conv)}


def main(path: str, operation: str, side: str) -> None:
    spec = importlib.util.spec_from_file_location("pygan._C", path)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    count = 0
    for case in OPERATIONS[operation](extension, side):
        # Printed at once: the last line is the case that faulted.
        print(case, flush=True)
        count += 1
    print(extension.isa(), count, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
