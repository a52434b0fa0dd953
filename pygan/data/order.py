"""Which images form which batch, as a function of the step alone."""

from __future__ import annotations

import numpy as np

from pygan.errors import UserError


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
        if batch_size < 1:
            raise UserError(
                f"a batch of {batch_size} images is empty; choose a batch size of at least 1"
            )
        if batch_size > n:
            raise UserError(
                f"a batch of {batch_size} images is larger than the data set of {n}; "
                f"choose a batch size from 1 to {n}"
            )
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
            source = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
            order = np.argsort(source.random_raw(self.n), kind="stable").astype(
                np.int64, copy=False
            )
            self._latest = (epoch, order)
        return order
