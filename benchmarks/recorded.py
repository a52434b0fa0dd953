"""A timer that replays durations measured elsewhere.

pytest-benchmark times one test after another, but sides that are to be compared must be timed in
turn within one loop. So `benchmarks.measure` times them, and each side's test hands its samples to
pytest-benchmark through this timer, which the tests name with
``@pytest.mark.benchmark(timer=recorded_time)``. The tables and the JSON are pytest-benchmark's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

_readings: deque[float] = deque()


def recorded_time() -> float:
    """Next clock reading: each recorded sample is a pair of readings that lie its length apart."""
    return _readings.popleft()


def _already_done() -> None:
    """Stands for the work, whose duration is known."""


def replay(benchmark: Any, durations: Sequence[float], iterations: int) -> None:
    """Give ``benchmark`` (the pytest-benchmark fixture) one sample per recorded duration.

    ``durations`` are in seconds, each of ``iterations`` calls in a row.

    Raises:
        RuntimeError: pytest-benchmark did not read the clock exactly twice a sample, so what it
            holds would not be what was measured.
    """
    _readings.clear()
    for duration in durations:
        _readings.extend((0.0, duration))
    benchmark.pedantic(_already_done, rounds=len(durations), iterations=iterations)
    if _readings:
        raise RuntimeError(
            f"pytest-benchmark left {len(_readings)} of {2 * len(durations)} clock readings unread"
        )
