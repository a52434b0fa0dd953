"""Programs of operations: what they repeat, where their memory lies, and what is refused."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pygan
from pygan.ops import map_memory, recorded
from pygan.ops.map_memory import SMALLEST
from pygan.ops.placement import ALIGNMENT, Piece, places
from pygan.ops.strided_conv import conv2d
from pygan.program import Program, Recorder

LARGE = (SMALLEST // 4,)


def record(
    code: Callable[..., Sequence[Tensor]], *inputs: Tensor
) -> tuple[Sequence[Tensor], Program]:
    recorder = Recorder(inputs)
    with recorder:
        results = code(*inputs)
    program = recorder.program(results)
    assert recorder.reason is None
    return results, program


def refused(code: Callable[..., Any], *inputs: Tensor) -> str:
    recorder = Recorder(inputs)
    with recorder:
        results = code(*inputs)
    if isinstance(results, Tensor):
        recorder.program([results])
    assert recorder.reason is not None
    return recorder.reason


def _views(x: Tensor) -> list[Tensor]:
    left, right = x.t().split(2, dim=1)[:2]
    return [left * 2, right.flatten() + 1, x[1], x.unsqueeze(0)]


def _in_place(x: Tensor) -> list[Tensor]:
    y = torch.zeros_like(x)
    y[1:].add_(x[1:]).mul_(3)
    return [y, y.relu_() + x]


def _numbers(x: Tensor) -> list[Tensor]:
    """What is made of numbers and changed in place is made anew."""
    return [x * torch.tensor([0.5]).mul_(2), torch.arange(4).float() + x[0]]


def _lists(x: Tensor) -> list[Tensor]:
    ys = [x * i for i in range(3)]
    torch._foreach_add_(ys, 1.0)
    return [torch.cat(ys), torch.stack(ys, 1), *torch.unbind(x)]


def _twice(x: Tensor) -> list[Tensor]:
    y = x + 1
    return [y, y, y.view(-1), x]


def _indexed(x: Tensor) -> list[Tensor]:
    return [x[torch.tensor([2, 0])], x.index_select(1, torch.tensor([1]))]


def _learned(x: Tensor) -> list[Tensor]:
    weight = torch.ones(3, 4, requires_grad=True)
    F.linear(x, weight).square().sum().backward()
    assert weight.grad is not None
    return [weight.grad, weight.detach()]


CODES = (_views, _in_place, _numbers, _lists, _twice, _indexed, _learned)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_a_program_does_what_the_code_does(code: Callable[[Tensor], list[Tensor]]) -> None:
    results, program = record(code, torch.rand(4, 4))
    for _ in range(3):
        x = torch.randn(4, 4)
        expected, found = code(x.clone()), program.run([x.clone()])
        assert len(found) == len(results)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


def test_random_numbers_are_drawn_anew_from_the_same_generators() -> None:
    generator = torch.Generator()

    def code(x: Tensor) -> list[Tensor]:
        kept = F.dropout(x, 0.5)
        torch.rand(3)  # nobody reads it, and it moves the generator all the same
        return [kept + torch.randn(x.shape, generator=generator)]

    _, program = record(code, torch.rand(50))
    x = torch.rand(50)
    for run in (code, lambda x: program.run([x])):
        torch.manual_seed(1)
        generator.manual_seed(2)
        found = [run(x)[0] for _ in range(2)]
        assert not torch.equal(*found)
        if run is code:
            expected = [*found, torch.rand(1)]
    assert all(map(torch.equal, expected, [*found, torch.rand(1)]))


def test_what_is_held_changes_in_place() -> None:
    held, count = torch.ones(3), torch.zeros((), dtype=torch.int64)

    def code(x: Tensor) -> list[Tensor]:
        count.add_(1)
        held.mul_(2).add_(x)
        count.add_(1)
        return [held + count]

    record(code, torch.zeros(3))
    _, program = record(code, torch.zeros(3))
    assert torch.equal(held, torch.full((3,), 4.0)) and count == 4
    (found,) = program.run([torch.ones(3)])
    assert torch.equal(held, torch.full((3,), 9.0)) and count == 6
    assert torch.equal(found, torch.full((3,), 15.0))


def test_a_count_that_is_read_is_counted_where_it_was() -> None:
    count = torch.zeros(())

    def code(x: Tensor) -> list[Tensor]:
        before = x + count
        count.add_(1)
        return [before]

    _, program = record(code, torch.zeros(()))
    assert [float(program.run([torch.zeros(())])[0]) for _ in range(3)] == [1, 2, 3]


def test_versions_of_what_changes_go_up() -> None:
    norm = nn.BatchNorm2d(8)
    x = torch.rand(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    fused = nn.Sequential(norm, nn.ReLU())
    pygan.fuse(fused)
    fused(x)
    with torch.no_grad():
        _, program = record(lambda x: [fused(x)], x)
    assert norm.running_mean is not None
    before = norm.running_mean._version
    program.run([x])
    assert norm.running_mean._version > before


class TestMemory:
    """Of maps, in the region."""

    @staticmethod
    def chain(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        for weight in weights:
            x = conv2d(x, weight, None, 2, 1)
        return [x]

    @pytest.mark.native
    def test_maps_lie_over_one_another_and_results_are_nobody_elses(self) -> None:
        weights = [torch.randn(64, 64, 4, 4) * 0.05 for _ in range(3)]
        x = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            _, program = record(lambda x: self.chain(x, weights), x)
            # The second map lies behind the first, the result over the first.
            assert program._size == (8 * 64 * 32 * 32 + 8 * 64 * 16 * 16) * 4
            kept = []
            for seed in range(6):
                x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
                x = x.contiguous(memory_format=torch.channels_last)
                (found,) = program.run([x])
                assert torch.equal(found, self.chain(x, weights)[0])
                assert not found._is_view()
                kept.append((found, found.clone()))
                if seed == 3:
                    kept = kept[::2]
                    gc.collect()
            assert all(torch.equal(*each) for each in kept)
        assert 1 <= len(program._bound) <= 4

    @pytest.mark.native
    def test_without_a_place_for_maps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = [torch.randn(64, 64, 4, 4) * 0.05 for _ in range(2)]
        x = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            expected, program = record(lambda x: self.chain(x, weights), x)
            monkeypatch.setattr(map_memory, "_arena", lambda: None)
            results = [program.run([x])[0] for _ in range(3)]
        assert all(torch.equal(found, expected[0]) for found in results)

    def test_the_region_is_free_between_runs(self) -> None:
        arena = map_memory._arena()
        if arena is None:
            pytest.skip("no address space to reserve")

        def code(x: Tensor) -> list[Tensor]:
            y = map_memory.empty(LARGE, torch.float32).copy_(x)
            z = map_memory.empty(LARGE, torch.float32).copy_(y * 2)
            return [z.add_(1), (y + z).sum()]

        x = torch.rand(LARGE)
        _, program = record(code, x)
        starts = set()
        for _ in range(3):
            z, total = program.run([x])
            assert torch.equal(z, x * 2 + 1)
            starts.add(z.data_ptr())
            del z, total
        assert len(starts) == 1  # the same pages in every run
        taken = map_memory.empty((2 * SMALLEST,), torch.float32)
        taken.fill_(7)
        z, _ = program.run([x])
        assert torch.equal(z, x * 2 + 1) and bool((taken == 7).all())


def test_what_nobody_reads_is_not_done() -> None:
    def code(x: Tensor) -> list[Tensor]:
        (x + 1).exp()
        x.view(-1).detach()
        return [x * 2]

    _, program = record(code, torch.rand(3))
    assert len(program) == 1


def test_little_that_is_filled_comes_first() -> None:
    held = torch.rand(3)
    count = torch.zeros((), dtype=torch.int64)

    def code(x: Tensor) -> list[Tensor]:
        y = x.exp()
        count.add_(1)
        return [torch.zeros_like(held).add_(y)]

    _, program = record(code, torch.rand(3))
    functions = [operation.function.name() for operation in program._operations]
    assert functions == ["aten::add_.Tensor", "aten::zeros_like", "aten::exp", "aten::add_.Tensor"]


class Own(Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (lambda x: x * float(x.sum()), "reads a value back"),
        (lambda x: x[x > 0], "reads a value back"),
        (lambda x: x.nonzero(), "reads a value back"),
        (lambda x: x.tolist(), r"tolist\(\) reads a tensor"),
        (lambda x: x.numpy().sum(), r"numpy\(\) reads a tensor"),
        (lambda x: x.data_ptr(), r"data_ptr\(\) reads a tensor"),
        (lambda x: (x * 1).resize_(2), "moves a tensor"),
        (lambda x: x * x.as_subclass(Own), "which is no plain tensor"),
        (lambda x: torch.ones(3).detach().clone().set_(x), "moves a tensor"),
    ],
)
def test_what_cannot_be_repeated_is_refused(code: Callable[[Tensor], Any], reason: str) -> None:
    assert re.search(reason, refused(code, torch.rand(4)))


def test_the_recorder_leaves_nothing_behind() -> None:
    def code(x: Tensor) -> list[Tensor]:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        record(code, torch.rand(3))
    assert recorded.now.recorder is None
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(0, 12), st.integers(0, 6)),
        max_size=14,
    )
)
def test_pieces_used_at_the_same_time_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    pieces = [Piece(size, first, first + length) for size, first, length in drawn]
    offsets, end = places(pieces)
    spans = [(o, o + p.size) for o, p in zip(offsets, pieces, strict=True)]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert end == max((high for _, high in spans), default=0)
    for i, one in enumerate(pieces):
        for j in range(i):
            other = pieces[j]
            if one.first <= other.last and other.first <= one.last:
                assert spans[i][1] <= spans[j][0] or spans[j][1] <= spans[i][0]
