"""Medians, quartiles, and ratios of interleaved samples with their interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median and quartiles, in the unit of the samples."""

    median: float
    q1: float
    q3: float


class Ratio(NamedTuple):
    """How many times as fast as a baseline: median over rounds, and an interval of that median.

    ``coverage`` is the probability with which the interval holds the true median.
    """

    median: float
    low: float
    high: float
    coverage: float


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles (linear interpolation, as numpy's default)."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, q1, q3)


def median_interval(samples: Sequence[float], coverage: float = 0.95) -> tuple[float, float, float]:
    """Interval of the median from order statistics: ``(low, high, coverage reached)``.

    Free of any assumption about the distribution: the k-th smallest and k-th largest of n samples
    enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k) (Conover, Practical
    Nonparametric Statistics, section 3.2). k is the largest that still reaches ``coverage``; fewer
    than 6 samples cannot reach 95%, and then the whole range is returned with what it does reach.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if not n:
        raise ValueError("the median of no samples has no interval; give at least one sample")
    k, reached, tail = 1, 1 - 2 * 0.5**n, 0.5**n
    for candidate in range(2, n // 2 + 1):
        tail += math.comb(n, candidate - 1) * 0.5**n
        if 1 - 2 * tail < coverage:
            break
        k, reached = candidate, 1 - 2 * tail
    return ordered[k - 1], ordered[n - k], reached


def speed_ratio(durations: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Speed relative to ``baseline``, whose i-th duration was taken in the same round as ours.

    Both in seconds per call.
    """
    if len(durations) != len(baseline):
        raise ValueError(
            f"{len(durations)} rounds against {len(baseline)} of the baseline; "
            "a ratio is taken within a round, so give as many of both"
        )
    ratios = [theirs / ours for ours, theirs in zip(durations, baseline, strict=True)]
    low, high, coverage = median_interval(ratios)
    return Ratio(statistics.median(ratios), low, high, coverage)
