"""The whole D+G step on a GPU: one family of peers (`benchmarks.gpu_peers`) and pygan.

``python -m benchmarks.gpu_steps --out FILE.jsonl --name NAME --case dcgan64-128 --family eager``
checks that each side makes the updates of float64, then times them in turn. A side that is wrong,
fails or comes too late is left out with the reason, and the others go on. pygan is in every family,
so that each peer is set against it within one process.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import gpu_peers, gpu_records, machine
from benchmarks.bench_train_step import NZ, Setup, Way, require_right_steps, side_of
from benchmarks.correct import without_search
from benchmarks.gpu_records import Part
from benchmarks.measure import Call, Case, Plan, Samples, Side, describe, interleave, warm_up

PROG = "python -m benchmarks.gpu_steps"
_IMAGES = {"dcgan64": (3, 64, 64), "dcgan32": (1, 32, 32)}
CASES = {
    f"{network}-{batch}": Setup(image, batch=batch)
    for network, image in _IMAGES.items()
    for batch in (128, 1024, 64)
}
TINY = Setup((1, 16, 16), batch=4, width=8)
ROUNDS, STEPS = 5, 200
USABLE = 0.8
# pygan captures its graph in the fourth step; the last ones are replays.
CHECK_STEPS = 5
CHECK_BATCH = 16
ENERGY_SECONDS, IN_A_ROW = 1.0, 20


def _checked(part: Part, setup: Setup, way: Way, family: str) -> str | None:
    """Why a side is left out, or None."""
    if part.left() <= 0:
        return "the time was up"
    try:
        # What takes long to compile is checked at the size at which it is timed.
        batch = CHECK_BATCH if family == "eager" or way.name == gpu_peers.ANCHOR else setup.batch
        steps = 2 if part.tiny else CHECK_STEPS
        # What is timed at another size is searched for there.
        with without_search() if batch != setup.batch else contextlib.nullcontext():
            require_right_steps(setup, part.device, [way], min(batch, setup.batch), steps)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _fitting(once: Sequence[float], rounds: int, seconds: float) -> list[int]:
    """Steps a round of each side, given the seconds of its fastest, so that all rounds fit."""
    share = USABLE * max(seconds, 0.0) / (len(once) * rounds)
    return [max(1, min(STEPS, int(share / each))) for each in once]


def measure(part: Part, case: Case, sides: Sequence[Side]) -> None:
    """Records of the sides, which have been checked."""
    plan = Plan(ROUNDS, 0.0, warmup_calls=10, warmup_seconds=0.3, peak_repeats=1)
    if part.tiny:
        plan = replace(plan, rounds=2, warmup_calls=1, warmup_seconds=0.0)
    calls: list[Call] = []
    once: list[float] = []
    memory: list[int | None] = []
    live: list[Side] = []
    for side in sides:
        try:
            with machine.PeakMemory(part.device) as peak:
                call = side.build(part.device)
                seconds = warm_up(call, plan, part.device)
        except Exception as error:
            part.missing("step", error, case=case.name, side=side.name)
            continue
        live.append(side)
        calls.append(call)
        once.append(seconds)
        # torch's allocator knows nothing of what others hold.
        memory.append(None if hasattr(call, "wait") else peak.bytes)
    if not live:
        return
    energy = 0.0 if part.tiny or part.device.type != "cuda" else ENERGY_SECONDS
    times = _fitting(once, plan.rounds, part.left() - 1.5 * energy * len(live))
    if part.tiny:
        times = [1] * len(live)
    durations = interleave(calls, times, plan.rounds, part.device)
    samples = {
        side.id: Samples(count, durations=row, peak_memory=held)
        for side, count, row, held in zip(live, times, durations, memory, strict=True)
    }
    case = replace(case, sides=tuple(live))
    for side in live:
        part.add("step", describe(case, side, samples, part.peaks))
    for side, call in zip(live, calls, strict=True) if energy else ():
        used = machine.energy_per_call(_in_a_row(call), part.device, energy)
        if used is not None:
            each = used["joules"] / (IN_A_ROW * case.images)
            told = {name: value for name, value in used.items() if name != "joules"}
            record = {"joules_per_image": each, "images_per_joule": 1 / each, **told}
            part.add("energy", {"case": case.name, "side": side.name, **record})


def _in_a_row(call: Call) -> Call:
    """Steps between which nobody waits, or the device would idle."""

    def run() -> None:
        for _ in range(IN_A_ROW):
            call()
        getattr(call, "wait", lambda: None)()

    return run


def _no_check(device: torch.device, sides: Sequence[Side]) -> None:
    """Stands for the checks, which each side has had for itself."""


def _measure(part: Part, options: Any) -> None:
    setup = TINY if part.tiny else CASES[options.case]
    shape = "x".join(map(str, setup.image))
    sides = []
    for way in gpu_peers.ways(options.family, part.tiny):
        reason = _checked(part, setup, way, options.family)
        if reason is None:
            sides.append(side_of(way, setup))
        else:
            part.missing("step", reason, case=options.case, side=way.name)
    about = f"whole D+G step, images {shape}, batch {setup.batch}, nz {NZ}"
    family = {"family": options.family}
    case = Case(options.case, about, setup.batch, tuple(sides), _no_check, facts=lambda: {**family})
    measure(part, case, sides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the part and returns its exit status (see `pygan.cli`)."""
    parser = gpu_records.parser(PROG, "The training step against one family of peers.")
    parser.add_argument("--case", choices=CASES, default="dcgan64-128")
    parser.add_argument("--family", choices=gpu_peers.families(), default="eager")
    return gpu_records.run(parser, arguments, _measure)


if __name__ == "__main__":
    sys.exit(main())
