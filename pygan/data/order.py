"""Which images form which batch, as a function of the step alone."""

from __future__ import annotations

import numpy as np

from pygan.errors import UserError

BLOCK = 64  # images that a stream reads one after the other


class BatchOrder:
    """Batches of a fresh permutation of the data set per epoch; an incomplete last one is dropped.

    Nothing advances: `index(step)` depends on `(n, batch_size, seed, step)` only, so a resumed run
    needs no more than its step number. The permutation sorts raw PCG64 output, whose stream numpy
    keeps across versions (NEP 19), as it does not keep `Generator.permutation`.

    Args:
        n: images in the data set.
        batch_size: images in a batch, 1 to n.
        seed: any integer, taken modulo 2**64.

    Raises:
        UserError: the batch size is not in 1..n.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        _check(n, batch_size)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed % 2**64
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.n // self.batch_size

    def index(self, step: int) -> np.ndarray:
        """Indices of the images of a step, int64 [batch_size]; `step` counts from 0.

        Raises:
            IndexError: `step` is negative.
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size].copy()

    def _permutation(self, epoch: int) -> np.ndarray:
        latest, order = self._latest
        if latest != epoch:
            order = shuffled(self.n, self.seed, epoch)
            self._latest = (epoch, order)
        return order


class StreamOrder:
    """Batches that read files piece by piece: a permutation of blocks, shuffled within windows.

    Every epoch takes the blocks of `BLOCK` consecutive images in a fresh order, cuts what they come
    to into windows of whole batches, and permutes each window. An incomplete last batch is dropped.
    Nothing advances: `index(step)` depends on `(n, batch_size, seed, window, step)` only. Where one
    window holds everything this is a permutation of the whole set.

    Args:
        n, batch_size, seed: as of `BatchOrder`.
        window: images in a window, rounded down to whole batches, of which there is at least one.

    Raises:
        UserError: the batch size is not in 1..n.
    """

    def __init__(self, n: int, batch_size: int, seed: int, window: int) -> None:
        _check(n, batch_size)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed % 2**64
        self._steps = max(1, window // batch_size)
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.n // self.batch_size

    def place(self, step: int) -> tuple[int, int]:
        """The number of the window of a step, counted through all epochs, and which of its batches
        it is; both count from 0.

        Raises:
            IndexError: `step` is negative.
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        window, row = divmod(position, self._steps)
        return epoch * -(-self.steps_per_epoch // self._steps) + window, row

    def index(self, step: int) -> np.ndarray:
        """Indices of the images of a step, int64 [batch_size]; `step` counts from 0.

        Raises:
            IndexError: `step` is negative.
        """
        number, row = self.place(step)
        start = row * self.batch_size
        return self.window(number)[start : start + self.batch_size].copy()

    def window(self, number: int) -> np.ndarray:
        """Indices of the images of a window, int64 [whole batches], in the order of the steps."""
        latest, indices = self._latest
        if latest != number:
            indices = self._window(*divmod(number, -(-self.steps_per_epoch // self._steps)))
            self._latest = (number, indices)
        return indices

    def _window(self, epoch: int, window: int) -> np.ndarray:
        first = shuffled(-(-self.n // BLOCK), self.seed, epoch) * BLOCK
        # Only the last block of the set, which comes anywhere, may be shorter.
        length = np.minimum(BLOCK, self.n - first)
        end = np.cumsum(length)
        steps = range(self.steps_per_epoch)[window * self._steps :][: self._steps]
        at = np.arange(steps.start * self.batch_size, steps.stop * self.batch_size)
        block = np.searchsorted(end, at, side="right")
        indices = first[block] + at - (end - length)[block]
        return indices[shuffled(len(indices), self.seed, epoch, 1 + window)]


def shuffled(n: int, *seed: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], the same in every version of numpy."""
    source = np.random.PCG64(np.random.SeedSequence(seed))
    return np.argsort(source.random_raw(n), kind="stable").astype(np.int64, copy=False)


def _check(n: int, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(
            f"a batch of {batch_size} images is empty; choose a batch size of at least 1"
        )
    if batch_size > n:
        raise UserError(
            f"a batch of {batch_size} images is larger than the data set of {n}; "
            f"choose a batch size from 1 to {n}"
        )
