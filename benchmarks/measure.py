"""Time all sides of a case in turn, and describe what came out."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import machine
from benchmarks.ratio import speed_ratio, spread
from benchmarks.work import Work

Call = Callable[[], object]


def nothing_missing(device: torch.device) -> None:
    """``missing`` of a side that runs everywhere."""


def wait(call: Call, device: torch.device) -> None:
    """Until the work of ``call`` is done. One that queues where torch cannot see it has a ``wait``
    of its own."""
    getattr(call, "wait", lambda: None)()
    machine.synchronize(device)


def no_facts() -> dict[str, Any]:
    """``facts`` of a case that has none."""
    return {}


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case.

    ``build(device)`` sets up everything and returns the call to be timed. ``full_only`` sides are
    left out by --quick. ``missing(device)`` is None, or the reason why the side cannot run here.
    """

    name: str
    precision: str
    build: Callable[[torch.device], Call]
    work: Work
    baseline: bool = False
    full_only: bool = False
    missing: Callable[[torch.device], str | None] = nothing_missing

    @property
    def id(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def left_out(self, device: torch.device) -> str | None:
        """None, or why this side is not measured here."""
        return machine.emulated(self.precision, device) or self.missing(device)


@dataclass(frozen=True)
class Case:
    """Work that several sides do. ``check(device, sides)`` raises CheckFailed if one is wrong.

    ``images`` is how many images one call handles; ``about`` names the conditions of the case.
    ``at_most`` limits fields of the `Plan`, where many cases or long calls would take too long.
    ``facts()`` is what the records of its sides hold besides.
    """

    name: str
    about: str
    images: int
    sides: tuple[Side, ...]
    check: Callable[[torch.device, Sequence[Side]], None]
    at_most: Mapping[str, float] = field(default_factory=dict)
    facts: Callable[[], dict[str, Any]] = no_facts

    def side(self, side_id: str) -> Side:
        return next(side for side in self.sides if side.id == side_id)


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds, and the least seconds of one sample and of the warm-up."""

    rounds: int
    sample_seconds: float
    warmup_calls: int
    warmup_seconds: float
    peak_repeats: int

    def limited(self, at_most: Mapping[str, float]) -> Plan:
        """This plan with no field above ``at_most``."""
        return replace(
            self, **{name: min(getattr(self, name), most) for name, most in at_most.items()}
        )


FULL = Plan(rounds=15, sample_seconds=0.25, warmup_calls=3, warmup_seconds=0.5, peak_repeats=7)
# 6 is the least number of rounds whose range is a 95% interval of the median.
QUICK = Plan(rounds=6, sample_seconds=0.01, warmup_calls=1, warmup_seconds=0.02, peak_repeats=2)


PEAKS_AGE = 60.0  # seconds


@dataclass
class Samples:
    """What was recorded of one side: seconds per sample, and how many calls a sample held."""

    iterations: int
    durations: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    energy: dict[str, Any] | None = None

    @property
    def seconds(self) -> list[float]:
        """Seconds per call."""
        return [duration / self.iterations for duration in self.durations]


def _timed(call: Call, iterations: int, device: torch.device) -> float:
    machine.synchronize(device)
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    wait(call, device)
    return time.perf_counter() - start


def warm_up(call: Call, plan: Plan, device: torch.device) -> float:
    """Warm up, and return the seconds of the fastest call."""
    started, best, calls = time.perf_counter(), math.inf, 0
    while calls < plan.warmup_calls or time.perf_counter() - started < plan.warmup_seconds:
        best = min(best, _timed(call, 1, device))
        calls += 1
    return best


def interleave(
    calls: Sequence[Call], iterations: Sequence[int], rounds: int, device: torch.device
) -> list[list[float]]:
    """Seconds of ``iterations[i]`` calls of ``calls[i]``, A B C C B A, as ``[side][round]``.

    The garbage collector runs between the samples, never inside one. Whoever comes first in a round
    meets the caches that it leaves, one or two per cent of a small network's time.
    """
    durations: list[list[float]] = [[] for _ in calls]
    sides = list(zip(calls, iterations, durations, strict=True))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, times, row in sides:
                gc.collect(0)
                row.append(_timed(call, times, device))
            gc.collect()
            sides.reverse()
    finally:
        if collecting:
            gc.enable()
    return durations


def measure(
    case: Case, sides: Sequence[Side], plan: Plan, device: torch.device
) -> dict[str, Samples]:
    """Check ``sides``, then time them in turn. Samples by side id."""
    case.check(device, sides)
    plan = plan.limited(case.at_most)
    calls, samples = [], []
    for side in sides:
        with machine.PeakMemory(device) as memory:
            call = side.build(device)
            once = warm_up(call, plan, device)
        calls.append(call)
        iterations = max(1, math.ceil(plan.sample_seconds / once))
        samples.append(Samples(iterations, peak_memory=memory.bytes))
    rows = interleave(calls, [sample.iterations for sample in samples], plan.rounds, device)
    for call, sample, row in zip(calls, samples, rows, strict=True):
        sample.durations = row
        sample.energy = machine.energy_per_call(call, device)
    return {side.id: sample for side, sample in zip(sides, samples, strict=True)}


def describe(
    case: Case, side: Side, samples: dict[str, Samples], peaks: dict[str, float]
) -> dict[str, Any]:
    """The record of one side: rates, shares of the peaks, memory, ratios to each baseline."""
    own = samples[side.id]
    seconds = own.seconds
    median, q1, q3 = spread(seconds)
    gflops, gbs = side.work.flops / median / 1e9, side.work.bytes / median / 1e9
    record = {
        "case": case.name,
        "about": case.about,
        "side": side.name,
        "precision": side.precision,
        "baseline": side.baseline,
        "images": case.images,
        "rounds": len(seconds),
        "iterations": own.iterations,
        "milliseconds": 1e3 * median,
        "images_per_second": case.images / median,
        "images_per_second_q1": case.images / q3,
        "images_per_second_q3": case.images / q1,
        "flops_per_image": side.work.flops / case.images,
        "bytes_per_image": side.work.bytes / case.images,
        "gflop_per_s": gflops,
        "gb_per_s": gbs,
        "share_of_peak_flops": gflops / peaks[f"gflops_{side.precision}"],
        "share_of_peak_bandwidth": gbs / peaks["gb_per_s"],
        "peak_memory_bytes": own.peak_memory,
        "ratios": {
            other.name: speed_ratio(seconds, samples[other.id].seconds)._asdict()
            for other in case.sides
            if other.baseline and other.id in samples
        },
        **case.facts(),
    }
    if own.energy:
        joules = own.energy["joules"] / case.images
        told = {name: value for name, value in own.energy.items() if name != "joules"}
        record["energy"] = {"joules_per_image": joules, "images_per_joule": 1 / joules, **told}
    return record


class Session:
    """Measures each case once, when its first test asks, with the sides that were selected."""

    def __init__(
        self, selected: Iterable[tuple[str, str]], plan: Plan, device: torch.device
    ) -> None:
        self.plan = plan
        self.device = device
        self._selected = set(selected)
        self._results: dict[str, dict[str, Samples] | BaseException] = {}
        self._memory: dict[str, list[float]] = {}  # GB/s before and after a case
        self._peaks: dict[str, float] = {}
        self._peaks_taken = -math.inf
        self.conditions = machine.conditions(device)

    def sides(self, case: Case) -> list[Side]:
        """Sides of ``case`` that are selected and run here."""
        chosen = (side for side in case.sides if (case.name, side.id) in self._selected)
        return [side for side in chosen if side.left_out(self.device) is None]

    def peaks(self) -> dict[str, float]:
        """Best found so far. Taken again now and then: a shared machine has slow moments."""
        if time.perf_counter() - self._peaks_taken > PEAKS_AGE:
            taken = machine.measure_peaks(self.device, self.plan.peak_repeats)
            self._peaks = {name: max(taken[name], self._peaks.get(name, 0.0)) for name in taken}
            self._peaks_taken = time.perf_counter()
        return self._peaks

    def samples(self, case: Case) -> dict[str, Samples]:
        """Samples of all sides of ``case``; what went wrong is raised again for each of them."""
        if case.name not in self._results:
            try:
                self.peaks()
                before = machine.copy_rate(self.device)
                self._results[case.name] = measure(case, self.sides(case), self.plan, self.device)
                self._memory[case.name] = [before, machine.copy_rate(self.device)]
            except Exception as error:
                self._results[case.name] = error
        result = self._results[case.name]
        if isinstance(result, BaseException):
            raise result
        return result

    def record(self, case: Case, side: Side) -> dict[str, Any]:
        """Everything about one side, for ``extra_info``.

        The rate of copies before and after the case tells two states of a virtual machine apart,
        whose host may move it: between cores that share a cache and others, say."""
        return {
            **describe(case, side, self.samples(case), self._peaks),
            "copy_gb_per_s": self._memory[case.name],
            "peaks": self._peaks,
            "conditions": self.conditions,
        }
