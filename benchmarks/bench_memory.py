"""Peak memory of training dcgan64, each side in a process of its own (`training_memory`)."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks import training_memory
from benchmarks.bench_train_step import CASES as STEP_CASES
from benchmarks.correct import CheckFailed
from benchmarks.measure import Session, Side
from benchmarks.recorded import recorded_time, replay
from benchmarks.training_memory import SETUP, Usage

NAME = "memory-dcgan64"
# From the second step on Adam's moments are there, and from the third a step is a program.
STEPS, QUICK_STEPS = 5, 3
RUNS, QUICK_RUNS = 2, 1
BASELINES = ("eager fp32", "eager bf16")
SIDES = {
    side.id: side
    for side in STEP_CASES["dcgan64"].sides
    if side.name in (*BASELINES, "eager fp32 by hand", "eager bf16 by hand")
    or side.name in ("pygan fp32", "pygan bf16")
}
QUICK_SIDES = ("eager-fp32", "pygan-fp32")


@functools.cache
def _usages(side: str, runs: int, steps: int) -> list[Usage]:
    return [training_memory.measure_apart(side, steps) for _ in range(runs)]


def against(ours: Sequence[int], baseline: Sequence[int]) -> dict[str, float]:
    """Our share of the baseline's bytes: of the medians, and the least and the most of any runs."""
    return {
        "median": statistics.median(ours) / statistics.median(baseline),
        "low": min(ours) / max(baseline),
        "high": max(ours) / min(baseline),
    }


def describe(side: Side, ours: Sequence[int], baseline: str, theirs: Sequence[int]) -> Any:
    """The record of one side. Its ratios are bytes over the bytes of the baseline."""
    return {
        "kind": "memory",
        "case": NAME,
        "about": f"training dcgan64, batch {SETUP.batch}, each side in a process of its own",
        "side": side.name,
        "precision": side.precision,
        "baseline": side.name == baseline,
        "images": SETUP.batch,
        "runs": len(ours),
        "peak_memory_bytes": statistics.median(ours),
        "peak_memory_bytes_low": min(ours),
        "peak_memory_bytes_high": max(ours),
        "ratios": {baseline: against(ours, theirs)},
    }


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize("side_id", SIDES)
def test_memory(
    side_id: str,
    session: Session,
    benchmark: Any,
    keep: Callable[[dict[str, Any]], None],
    request: pytest.FixtureRequest,
) -> None:
    side, quick = SIDES[side_id], bool(request.config.getoption("--quick"))
    if session.device.type != "cpu":
        pytest.skip("the resident set of a process is a CPU's measure")
    if quick and side_id not in QUICK_SIDES:
        pytest.skip(f"--quick measures {' and '.join(QUICK_SIDES)}")
    if (reason := side.left_out(session.device)) is not None:
        pytest.skip(reason)
    benchmark.group = NAME
    chosen = [SIDES[name] for name in (QUICK_SIDES if quick else SIDES)]
    chosen = [each for each in chosen if each.left_out(session.device) is None]
    try:
        # The same code on smaller networks: what --quick measures is not quoted.
        STEP_CASES["dcgan32" if quick else "dcgan64"].check(session.device, chosen)
    except CheckFailed as failure:
        pytest.fail(str(failure), pytrace=False)
    if benchmark.disabled:
        return
    baseline = f"eager {side.precision}"
    counts = (QUICK_RUNS, QUICK_STEPS) if quick else (RUNS, STEPS)
    ours, theirs = _usages(side.name, *counts), _usages(baseline, *counts)
    found = [[usage.bytes for usage in usages if usage.bytes] for usages in (ours, theirs)]
    if not all(found):
        pytest.skip("this system does not tell the peak of the resident set")
    replay(benchmark, [seconds for usage in ours for seconds in usage.seconds], 1)
    keep(describe(side, found[0], baseline, found[1]) | {"conditions": session.conditions})
