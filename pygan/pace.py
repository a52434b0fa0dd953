"""How many steps one replay of a graph holds, found out on steps of the training itself.

A replay costs the host the same whatever it holds, so that small networks, whose steps take the
device less time than that, gain by several; large ones do not. Each number of ``SIZES`` is timed in
turn, ``SAMPLES`` times on ``SAMPLE`` steps, and one step it stays unless another number is faster
beyond noise. Numbers are those of single steps, so that nothing is lost by the measurement.
"""

from __future__ import annotations

import math

from pygan.ops.tuning import LEAST_GAIN

SIZES = (1, 2, 4, 8)
SAMPLE = SIZES[-1]  # steps
SAMPLES = 3


class Pace:
    """The choice for one kind of step; ``known`` is that of an earlier measurement."""

    def __init__(self, known: str | None = None) -> None:
        self.choice = None if known is None else int(known)
        self._times: dict[int, list[float]] = {size: [] for size in SIZES}

    @property
    def wanted(self) -> int | None:
        """The size that the next sample is to be of; None once there is a choice."""
        if self.choice is not None:
            return None
        return next(size for size, times in self._times.items() if len(times) < SAMPLES)

    def may_hold(self, size: int) -> bool:
        """Whether no graph of so many steps has failed."""
        return math.inf not in self._times[size] and (self.choice is None or size <= self.choice)

    def add(self, size: int, time: float) -> None:
        """A sample of ``size`` steps a replay took so long."""
        self._times[size].append(time)
        self._decide()

    def fails(self, size: int) -> None:
        """No graph holds so many steps, nor more."""
        if self.choice is not None:
            self.choice = 1
            return
        for each in SIZES:
            if each >= size:
                self._times[each] = [math.inf] * SAMPLES
        self._decide()

    def _decide(self) -> None:
        if any(len(times) < SAMPLES for times in self._times.values()):
            return
        # The least: the first replay of a graph also uploads it.
        least = {size: min(times) for size, times in self._times.items()}
        best = min(least, key=least.__getitem__)
        self.choice = best if least[best] * LEAST_GAIN <= least[1] else 1
