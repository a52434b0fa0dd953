"""Batches are a permutation per epoch and depend on the step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygan.data import BatchOrder, StreamOrder
from pygan.data.order import BLOCK
from pygan.errors import UserError


@given(st.integers(1, 200), st.data(), st.integers(-5, 2**70))
def test_an_epoch_holds_every_index_at_most_once(n: int, data: st.DataObject, seed: int) -> None:
    batch_size = data.draw(st.integers(1, n))
    order = BatchOrder(n, batch_size, seed)
    assert order.steps_per_epoch == n // batch_size
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.index(first + i) for i in range(order.steps_per_epoch)]
        seen = np.concatenate(steps)
        assert all(step.shape == (batch_size,) and step.dtype == np.int64 for step in steps)
        assert len(np.unique(seen)) == len(seen) == n // batch_size * batch_size
        assert seen.min() >= 0 and seen.max() < n


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    forward = BatchOrder(100, 7, seed=3)
    steps = [forward.index(step) for step in range(60)]
    backward = BatchOrder(100, 7, seed=3)
    for step in reversed(range(60)):
        np.testing.assert_array_equal(backward.index(step), steps[step])


def test_a_batch_is_the_callers_to_change() -> None:
    order = BatchOrder(10, 5, seed=0)
    expected = order.index(0).copy()
    order.index(0)[:] = 0
    np.testing.assert_array_equal(order.index(0), expected)


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder(1000, 1000, seed=0)
    assert (order.index(0) != order.index(1)).any()
    assert (order.index(0) != BatchOrder(1000, 1000, seed=1).index(0)).any()


def test_the_permutation_never_changes_between_versions() -> None:
    # A run resumed under another numpy or another pygan must go on with the same batches.
    assert BatchOrder(12, 6, seed=7).index(3).tolist() == [8, 4, 5, 9, 0, 6]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="128 images is larger than the data set of 10"):
        BatchOrder(10, 128, seed=0)
    with pytest.raises(UserError, match="batch of 0 images is empty"):
        BatchOrder(10, 0, seed=0)
    with pytest.raises(IndexError, match="-1 is negative"):
        BatchOrder(10, 5, seed=0).index(-1)


@given(st.integers(1, 700), st.data(), st.integers(1, 400), st.integers(-5, 2**70))
def test_an_epoch_of_a_stream_holds_every_index_at_most_once(
    n: int, data: st.DataObject, window: int, seed: int
) -> None:
    batch_size = data.draw(st.integers(1, n))
    order = StreamOrder(n, batch_size, seed, window)
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.index(first + i) for i in range(order.steps_per_epoch)]
        seen = np.concatenate(steps)
        assert all(step.shape == (batch_size,) and step.dtype == np.int64 for step in steps)
        assert len(np.unique(seen)) == len(seen) == n // batch_size * batch_size
        assert seen.min() >= 0 and seen.max() < n


def test_a_window_is_made_of_blocks_and_of_whole_batches() -> None:
    order = StreamOrder(10 * BLOCK + 7, 16, seed=1, window=4 * BLOCK + 15)
    assert order.steps_per_epoch == 40
    places = [order.place(step) for step in range(82)]
    # 16 steps to a window, and a shorter one at the end of an epoch.
    assert places[:18:16] == [(0, 0), (1, 0)] and places[15] == (0, 15)
    assert places[39:42] == [(2, 7), (3, 0), (3, 1)] and places[80] == (6, 0)
    assert [len(order.window(i)) for i in range(4)] == [256, 256, 128, 256]
    for number, row in places[:40]:
        at = order.window(number)[16 * row : 16 * row + 16]
        np.testing.assert_array_equal(at, order.index(16 * number + row))
    # The short block may lie in it and move the others' edges.
    blocks = [np.unique(order.window(number) // BLOCK) for number in range(3)]
    assert all(len(each) <= 6 for each in blocks)
    assert (np.diff(order.window(0)) != 1).sum() > 200
    assert set(blocks[0]) != set(np.unique(order.window(3) // BLOCK))


def test_a_step_of_a_stream_is_the_same_whenever_it_is_asked_for() -> None:
    forward = StreamOrder(1000, 7, seed=3, window=100)
    steps = [forward.index(step) for step in range(300)]
    backward = StreamOrder(1000, 7, seed=3, window=100)
    for step in reversed(range(300)):
        np.testing.assert_array_equal(backward.index(step), steps[step])
    assert (steps[0] != StreamOrder(1000, 7, seed=4, window=100).index(0)).any()
    forward.index(0)[:] = 0
    np.testing.assert_array_equal(forward.index(0), steps[0])


def test_the_order_of_a_stream_never_changes_between_versions() -> None:
    assert StreamOrder(200, 6, seed=7, window=50).index(40).tolist() == [67, 76, 98, 86, 93, 85]


def test_bad_sizes_of_a_stream_are_refused() -> None:
    with pytest.raises(UserError, match="128 images is larger than the data set of 10"):
        StreamOrder(10, 128, seed=0, window=5)
    with pytest.raises(IndexError, match="-1 is negative"):
        StreamOrder(10, 5, seed=0, window=5).index(-1)
