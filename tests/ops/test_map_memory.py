from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import gc
import io
import pickle
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pygan.ops import map_memory, native
from pygan.ops.map_memory import SMALLEST, Arena, Course, Region

ROOT = Path(__file__).resolve().parents[2]
LARGE = (4, 32, 48, 48)  # 1.2 MB of float32
MIB = 1 << 20

pytestmark = pytest.mark.skipif(map_memory._arena() is None, reason="no address space to reserve")


def lies_in(arena: Arena | None, x: Tensor) -> bool:
    assert arena is not None
    return arena._base <= x.data_ptr() < arena._base + arena.size


@pytest.fixture
def small_arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    arena = Arena(64 * MIB, period=8)
    monkeypatch.setattr(map_memory, "_arena", lambda: arena)
    return arena


def all_free(arena: Arena) -> bool:
    gc.collect()
    arena.allocate(64)
    arena.allocate(64)  # which takes back what the one before has returned
    for _ in range(2):
        gc.collect()
        arena.allocate(1)
    while arena._returned:
        arena._release(*arena._returned.popleft())
    return arena._free == [(0, arena.size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_as_torch_makes_it(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = map_memory.empty(LARGE, dtype, memory_format)
    expected = torch.empty(LARGE, dtype=dtype, memory_format=memory_format)
    assert lies_in(map_memory._arena(), x)
    assert x.data_ptr() % 64 == 0
    assert (x.shape, x.dtype, x.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert x.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert not x._is_view() and x.is_leaf and not x.requires_grad
    assert x.isnan().all()  # tests/ops/conftest.py asks for that
    like = map_memory.empty_like(x)
    assert lies_in(map_memory._arena(), like)
    assert like.stride() == x.stride() and like.dtype is dtype and like.isnan().all()


def test_small_and_integer_tensors_are_torchs_own() -> None:
    for x in (
        map_memory.empty((SMALLEST // 4 - 1,), torch.float32),
        map_memory.empty((0, 3), torch.float32),
        map_memory.empty_like(torch.zeros(3)),
        map_memory.empty((SMALLEST,), torch.int32),
    ):
        assert not lies_in(map_memory._arena(), x)


def test_it_travels_like_any_tensor() -> None:
    x = map_memory.empty(LARGE, torch.float32, torch.channels_last).normal_()
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(x)),
        copy.deepcopy(x),
        torch.load(file),
        torch.from_numpy(x.numpy()),
        torch.from_dlpack(x),
        x.clone(),
    ]
    for other in copies:
        assert torch.equal(other, x) and other.stride() == x.stride()
    address = x.data_ptr()
    numpy, capsule = x.numpy(), torch.from_dlpack(x)
    values = x.clone()
    del x, other, copies
    gc.collect()
    taken = [map_memory.empty(LARGE, torch.float32).zero_() for _ in range(3)]
    assert all(t.data_ptr() != address for t in taken)
    assert torch.equal(capsule, values) and torch.equal(torch.from_numpy(numpy), values)


def test_it_can_be_shared_with_other_processes() -> None:
    x = map_memory.empty(LARGE, torch.float32).normal_()
    values = x.clone()
    x.share_memory_()
    assert x.is_shared() and torch.equal(x, values)
    assert not lies_in(map_memory._arena(), x)


def test_autograd_sees_a_tensor_of_its_own() -> None:
    x = map_memory.empty(LARGE, torch.float32).normal_().requires_grad_()
    y = x.exp()
    (y * y).sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())

    z = map_memory.empty(LARGE, torch.float32).fill_(2)
    w = torch.ones(LARGE, requires_grad=True)
    out = (w * z).sum()
    z[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_it_cannot_grow_but_takes_results_of_its_size() -> None:
    x = map_memory.empty(LARGE, torch.float32)
    a, b = torch.randn(2, *LARGE).unbind()
    assert torch.equal(torch.add(a, b, out=x), a + b)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.resize_(2 * x.numel())
    assert x.resize_(7).shape == (7,)


def test_blocks_never_overlap_and_all_come_back() -> None:
    arena, draw = Arena(8 * MIB), random.Random(0)
    alive: list[object] = []
    for _ in range(3000):
        if alive and draw.random() < 0.5:
            alive.pop(draw.randrange(len(alive)))
        else:
            block = arena.allocate(draw.randrange(1, MIB))
            if block is not None:
                alive.append(block)
        del_free = sorted([*arena._free, *arena._returned, *(b.place for b in alive)])  # type: ignore[attr-defined]
        ends = [0, *(end for _, end in del_free)]
        assert ends == [*(start for start, _ in del_free), arena.size]
        block = None
    alive.clear()
    assert all_free(arena)


def test_a_loop_gets_the_same_addresses_again(small_arena: Arena) -> None:
    def step() -> list[int]:
        a = map_memory.empty(LARGE, torch.float32)
        b = map_memory.empty(LARGE, torch.bfloat16)
        c = map_memory.empty_like(a)
        return [t.data_ptr() for t in (a, b, c)]

    assert len({tuple(step()) for _ in range(30)}) == 1


def test_where_it_is_full_memory_is_plain(small_arena: Arena) -> None:
    tensors = [map_memory.empty((8 * MIB // 4,), torch.float32) for _ in range(9)]
    assert [lies_in(small_arena, t) for t in tensors] == [True] * 8 + [False]
    assert all(t.isnan().all() for t in tensors)


def test_pages_go_back_after_a_period_without_use(small_arena: Arena) -> None:
    size = (16 * MIB // 4,)
    map_memory.empty(size, torch.float32).fill_(1)

    def content() -> Tensor:
        return torch.frombuffer(small_arena._mapping, dtype=torch.float32, count=size[0])

    for _ in range(8):
        map_memory.empty((MIB // 4,), torch.float32).fill_(1)
    assert content()[MIB:].eq(1).all()  # the period that holds the large one
    for _ in range(8):
        map_memory.empty((MIB // 4,), torch.float32).fill_(1)
    assert content()[MIB:].eq(0).all()
    assert content()[: MIB // 4].eq(1).all()


def test_a_loop_keeps_its_pages(small_arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    size = (16 * MIB // 4,)
    map_memory.empty(size, torch.float32).fill_(1)
    for _ in range(40):
        assert map_memory.empty(size, torch.float32).eq(1).all()
        assert map_memory.empty((MIB // 4,), torch.float32).eq(1).all()


def test_what_is_alive_is_never_given_back(small_arena: Arena) -> None:
    below = map_memory.empty((16 * MIB // 4,), torch.float32)
    alive = map_memory.empty((MIB // 4,), torch.float32).fill_(3)
    del below
    for _ in range(100):
        map_memory.empty((MIB // 4,), torch.float32)
    assert alive.eq(3).all()


def _flags_of(address: int) -> list[str]:
    """What the system was told of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", first):
            start, end = (int(each, 16) for each in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages"
)
def test_maps_and_scratch_lie_in_huge_pages(small_arena: Arena) -> None:
    map_memory.empty(LARGE, torch.float32)
    assert "hg" in _flags_of(small_arena._base)
    assert "hg" in _flags_of(native.scratch(MIB))


def test_a_system_that_knows_no_huge_pages_is_no_error() -> None:
    class Memory:
        def madvise(self, *arguments: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    native.ask_for_huge_pages(Memory(), 0, MIB)  # type: ignore[arg-type]


def test_a_finalizer_inside_the_allocator_neither_waits_nor_breaks_it() -> None:
    arena = Arena(8 * MIB)
    block = arena.allocate(MIB)
    with arena._lock:  # as when the collector runs in there, or a parent forked then
        del block
        assert arena.allocate(MIB) is None
    assert arena.allocate(MIB) is not None
    assert all_free(arena)


def test_threads_reserve_one_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Arena] = []

    def reserved() -> Arena:
        time.sleep(0.05)
        made.append(Arena(SMALLEST))
        return made[-1]

    monkeypatch.setattr(map_memory, "_made", [])
    monkeypatch.setattr(map_memory, "_reserved", reserved)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: map_memory._arena(), range(4)))
    assert len(made) == 1 and set(found) <= {None, made[0]} and map_memory._arena() is made[0]


def test_threads_and_the_collector(small_arena: Arena) -> None:
    torch.use_deterministic_algorithms(False)
    failures = []

    def work(seed: int) -> None:
        draw, kept = random.Random(seed), []
        for i in range(120):
            x = map_memory.empty((draw.randrange(SMALLEST, 4 * SMALLEST) // 4,), torch.float32)
            x.fill_(seed * 1000 + i)
            cycle: list[object] = [x]
            cycle.append(cycle)  # which the collector alone frees
            kept.append((x, seed * 1000 + i))
            if len(kept) > 4:
                y, value = kept.pop(draw.randrange(len(kept)))
                if not bool(y.eq(value).all()):
                    failures.append((seed, i))
            if i % 50 == 0:
                gc.collect()

    with switching_every(1e-5):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert all_free(small_arena)


@contextlib.contextmanager
def switching_every(seconds: float):  # type: ignore[no-untyped-def]
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_script(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr and "Error" not in done.stderr, done.stderr
    assert done.stdout == "done\n"


def test_a_child_frees_and_allocates_without_harm_to_its_parent() -> None:
    run_script(
        """
import os, torch
torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
from pygan.ops import map_memory
size = (1 << 18,)
a, b = (map_memory.empty(size, torch.float32).fill_(i) for i in (1, 2))
for locked in (False, True):
    if locked:
        map_memory._arena()._lock.acquire()
    child = os.fork()
    if child == 0:
        mine = b.add_(5)
        del a
        others = [map_memory.empty(size, torch.float32).fill_(9) for _ in range(5)]
        os._exit(0 if bool(mine.eq(7).all()) and all(bool(o.eq(9).all()) for o in others) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert a.eq(1).all() and b.eq(2).all()
print("done")
"""
    )


def test_the_interpreter_ends_with_maps_alive() -> None:
    run_script(
        """
import builtins, threading, torch
from pygan.ops import map_memory
size = (1 << 18,)
kept = map_memory.empty(size, torch.float32).fill_(1)
cycle = [map_memory.empty(size, torch.float32)]
cycle.append(cycle)
builtins.kept = map_memory.empty(size, torch.float32)
torch.kept = map_memory.empty(size, torch.float32)
torch.Tensor.kept = map_memory.empty(size, torch.float32)
leaf = torch.ones(size, requires_grad=True)
graph = (leaf * map_memory.empty(size, torch.float32).fill_(2)).exp()
local = threading.local()
local.kept = map_memory.empty(size, torch.float32)
array = map_memory.empty(size, torch.float32).numpy()
threading.Thread(target=lambda x: __import__("time").sleep(60), args=(kept,), daemon=True).start()
print("done")
"""
    )


def _work(sizes: list[int]) -> tuple[list[int], int]:
    """Blocks of a step that fragments memory: where they began, and the end of the highest."""
    arena = map_memory._arena()
    assert arena is not None
    blocks = {}
    starts = []
    arena._high = 0
    for i, size in enumerate(sizes):
        blocks[i] = arena.allocate(size * MIB)
        starts.append(blocks[i].place[0])
        if i >= 2:
            del blocks[i - 2]
    return starts, arena._high


def test_a_course_avoids_the_holes_of_its_first_time(small_arena: Arena) -> None:
    sizes = [4, 3, 1, 5, 2, 6, 2, 7]
    course = Course()
    ends = []
    for _ in range(3):
        with map_memory.following(course):
            ends.append(_work(sizes)[1])
        assert all_free(small_arena)
    most = max(sum(sizes[i : i + 3]) for i in range(len(sizes)))
    assert ends[0] > most * MIB and ends[1:] == [most * MIB] * 2
    starts, end = _work(sizes)  # without it, as in the first time
    assert end == ends[0]
    # Where a place is taken, or other blocks are asked for, it is as without a course.
    taken = small_arena.allocate(MIB)
    with map_memory.following(course):
        assert _work(sizes)[0] != starts
    with map_memory.following(course):
        assert _work([9, 1])[0] == [taken.place[1], taken.place[1] + 9 * MIB]
    del taken
    assert all_free(small_arena)


def test_a_course_that_failed_is_written_anew(small_arena: Arena) -> None:
    course = Course()
    with pytest.raises(RuntimeError), map_memory.following(course):
        _work([1, 2, 3])
        raise RuntimeError
    for _ in range(2):
        with map_memory.following(course):
            _, end = _work([4, 3, 1, 5, 2, 6, 2, 7])
    assert end == 15 * MIB and all_free(small_arena)


def test_parts_of_a_region_outlive_it(small_arena: Arena) -> None:
    region = Region(10 * MIB)
    spans = [(MIB, MIB), (4 * MIB, 100), (9 * MIB, MIB)]
    blocks = region.part(spans)
    del region
    between = [small_arena.allocate(size) for size in (MIB, 2 * MIB)]
    assert [b.place for b in between] == [(0, MIB), (2 * MIB, 4 * MIB)]
    starts = [b.place[0] for b in blocks]
    assert starts == [offset for offset, _ in spans] and blocks[1].place[1] % 64 == 0
    del blocks[1], between
    assert small_arena.allocate(6 * MIB).place == (2 * MIB, 8 * MIB)
    del blocks
    assert all_free(small_arena)


def test_a_region_without_an_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_memory, "_arena", lambda: None)
    region = Region(1000)
    assert region.address % 64 == 0
    array = (ctypes.c_char * 1000).from_address(region.address)
    array[:] = bytes(i % 251 for i in range(1000))
    first, second = region.part([(0, 64), (128, 200)])
    assert bytes(first) == array[:64] and bytes(second) == array[128:328]
    array[:] = bytes(1000)
    assert bytes(second)[:3] == bytes((128, 129, 130))


def test_pages_that_nobody_uses_go_back(small_arena: Arena) -> None:
    kept, gone, above = (
        torch.frombuffer(small_arena.allocate(8 * MIB), dtype=torch.uint8, count=8 * MIB)
        for _ in range(3)
    )
    for x in (kept, gone, above):
        x.fill_(1)
    before = _resident()
    del gone, x
    map_memory.give_back()
    assert before - _resident() > 7 * MIB
    assert kept.all() and above.all()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
