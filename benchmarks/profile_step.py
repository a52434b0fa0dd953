"""Where the time of one training step goes: by operation, by layer, and along the step.

``python -m benchmarks.profile_step --out FILE.json`` runs pygan's step on dcgan64 under torch's
profiler in float32 and bfloat16 and prints Markdown; ``python -m benchmarks.report`` draws FILE's
time line. The step is no program, which would not tell its phases: the kernels are the same. What
an operation of torch or a native kernel takes itself is counted, not what it calls; Python between
them is "other". The floor of a native kernel is the longer of its multiplications at the measured
peak and its bytes at the measured bandwidth (`benchmarks.work`): those of its own method, of which
Winograd's transforms are no part.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import command, machine, summary
from benchmarks.bench_train_step import NZ, Setup, pygan_step
from benchmarks.machine import PRECISION
from benchmarks.steps import DCGAN_ADAM
from benchmarks.work import NORM_BACKWARD_PASSES, Work, strided_conv_work
from pygan import cli
from pygan.ops import native
from pygan.ops.strided_conv import METHODS, PASSES
from pygan.run_folder import check_writable

PROG = "python -m benchmarks.profile_step"
WARM_UP = 3
LONGEST = 12
NATIVE, PHASE = "pygan::", "phase::"
QUESTIONS = ("_scratch", "_method", "isa", "isas")
OTHER = "other"
ITEMSIZE = {"off": 4, "bf16": 2}
# Multiplications of the plain algorithm over those of the method: F(m, 2) takes m + 1 for 2m.
SPARED = {"direct": 1.0, "f22": (4 / 3) ** 2, "f42": (8 / 5) ** 2}

# The first group whose part occurs in an operation's name takes it.
GROUPS = (
    ("strided_conv up", ("pygan::strided_conv_up",)),
    ("strided_conv down", ("pygan::strided_conv_down",)),
    ("strided_conv weight_grad", ("pygan::strided_conv_weight_grad",)),
    ("norm_act", ("pygan::norm_act",)),
    ("gan_loss", ("pygan::gan_loss",)),
    ("torch convolution", ("convolution", "mkldnn", "conv_depthwise", "slow_conv")),
    ("torch batch norm", ("batch_norm",)),
    ("Adam", ("adam",)),
    ("copy, cast, change of layout", ("aten::copy_", "aten::cat", "aten::clone")),
    ("activation", ("relu", "tanh", "sigmoid")),
    ("random numbers", ("aten::normal_", "aten::randn")),
)


class Part(NamedTuple):
    """A group of operations, or one of them: milliseconds, calls and floor (0 where unknown) of a
    step."""

    group: str
    milliseconds: float
    calls: float
    floor: float = 0.0


class Event(NamedTuple):
    """What ran, and when, in microseconds."""

    name: str
    start: float
    end: float


def described(
    name: str, shape: Any, itemsize: int, *, method: str = "direct", writes_map: bool = True
) -> tuple[str, Work]:
    """A native kernel's name with its layer, and its work."""
    if name.startswith("norm_act"):
        size = shape.batch * shape.channels * shape.spatial * itemsize
        # A forward that writes no map only reads it for the statistics.
        passes = NORM_BACKWARD_PASSES if name != "norm_act_forward" else 1 + 2 * writes_map
        return f"{name} {shape.channels}, batch {shape.batch}", Work(0.0, float(passes * size))
    small = f"{shape.small_channels}x{shape.height}x{shape.width}"
    big = f"{shape.big_channels}x{shape.big_height}x{shape.big_width}"
    ends = (big, small) if name == "strided_conv_down" else (small, big)
    arrow = "with" if name == "strided_conv_weight_grad" else "to"
    layer = f"{name} {method} {ends[0]} {arrow} {ends[1]}, batch {shape.batch}"
    channels = shape.small_channels, shape.big_channels
    positions = shape.height * shape.width
    # Square maps alone are counted by their side; the work goes by their positions.
    flops, moved = strided_conv_work(shape.batch * positions, 1, *channels, itemsize)
    return layer, Work(flops / SPARED[method], moved)


class Recorded:
    """The native extension, whose functions show in a profile under their layer's name.

    Attributes:
        work: of each name.
    """

    def __init__(self, extension: ModuleType, itemsize: int) -> None:
        self._extension = extension
        self._itemsize = itemsize
        self.work: dict[str, Work] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._extension, name)
        if isinstance(found, type) or name.endswith(QUESTIONS):
            return found
        return partial(self._run, name, found)

    def _run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        label, about = name, {}
        conv_pass = PASSES.get(name.removeprefix("strided_conv_"))
        if conv_pass is not None:
            method = self._extension.strided_conv_method(arguments[0], conv_pass)
            about = {"method": next(word for word, code in METHODS.items() if code == method)}
        elif name == "norm_act_forward":
            about = {"writes_map": bool(arguments[9])}
        if conv_pass is not None or name.startswith("norm_act"):
            label, work = described(name, arguments[0], self._itemsize, **about)
            self.work[NATIVE + label] = work
        with record_function(NATIVE + label):
            return function(*arguments)


def group_of(operation: str) -> str:
    """The group of `GROUPS` that an operation belongs to."""
    name = operation.lower()
    for group, parts in GROUPS:
        if any(part in name for part in parts):
            return group
    return OTHER


def parts(
    events: Iterable[tuple[str, float, float]],
    steps: int,
    seconds: float,
    floors: dict[str, float] | None = None,
) -> list[Part]:
    """``(name, own microseconds, calls)`` of all ``steps``, by group, longest first.

    What is left of the ``seconds`` that they took together is "other". ``floors`` are milliseconds
    of a call by name.
    """
    times, calls, least = {OTHER: 0.0}, {OTHER: 0.0}, {OTHER: 0.0}
    for name, microseconds, count in events:
        group = group_of(name)
        times[group] = times.get(group, 0.0) + microseconds / 1e3 / steps
        calls[group] = calls.get(group, 0.0) + count / steps
        floor = (floors or {}).get(name, 0.0)
        least[group] = least.get(group, 0.0) + floor * count / steps
    times[OTHER] = max(0.0, 1e3 * seconds / steps - sum(times.values()) + times[OTHER])
    found = [Part(group, times[group], calls[group], least[group]) for group in times]
    return sorted(found, key=lambda part: (part.group == OTHER, -part.milliseconds))


def longest(
    events: Iterable[tuple[str, float, float]], steps: int, floors: dict[str, float]
) -> list[Part]:
    """The `LONGEST` native kernels by layer."""
    found = [
        Part(
            name.removeprefix(NATIVE), us / 1e3 / steps, count / steps, floors[name] * count / steps
        )
        for name, us, count in events
        if name in floors
    ]
    return sorted(found, key=lambda part: -part.milliseconds)[:LONGEST]


def outermost(events: Iterable[Event]) -> Iterator[Event]:
    """Those in a group that lie in no other such one, by their group."""
    end = -1.0
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        group = group_of(event.name)
        if event.start >= end and group != OTHER:
            end = event.end
            yield event._replace(name=group)


def timeline(events: Sequence[Event]) -> dict[str, list[list[Any]]]:
    """Phases and groups of the step of median length: ``[name, start, end]`` in milliseconds."""
    whole = sorted(
        (event for event in events if event.name == PHASE + "step"), key=lambda e: e.end - e.start
    )
    step = whole[len(whole) // 2]
    inside = [e for e in events if step.start <= e.start and e.end <= step.end and e != step]

    def row(event: Event) -> list[Any]:
        ends = (1e-3 * (at - step.start) for at in (event.start, event.end))
        return [event.name.removeprefix(PHASE), *(round(at, 3) for at in ends)]

    named = [e for e in inside if e.name.startswith(PHASE)]
    # What comes before D's update is the generator's forward pass.
    first = min((event.start for event in named), default=step.end)
    phases = [Event(PHASE + "G forward", step.start, first), *named]
    return {
        "phases": [row(event) for event in phases],
        "groups": [row(event) for event in outermost(inside)],
    }


def _name_phases(step: Any) -> None:
    """Lets the two updates of a step show in a profile."""
    for method, name in (("_update_d", "D's update"), ("_update_g", "G's update")):
        update = getattr(step, method)

        def run(*arguments: Any, _update: Any = update, _name: str = name) -> Any:
            with record_function(PHASE + _name):
                return _update(*arguments)

        setattr(step, method, run)


def measure(setup: Setup, amp: str, steps: int) -> dict[str, Any]:
    """``steps`` steps of pygan after a warm-up: the record of one precision."""
    torch.manual_seed(0)
    stepper = pygan_step(amp, graph="off")(setup.models(), torch.device("cpu"), DCGAN_ADAM)
    _name_phases(stepper.step)
    real = setup.real(setup.batch, torch.Generator().manual_seed(2))
    extension = native.load()
    recorded = None if extension is None else Recorded(extension, ITEMSIZE[amp])
    peaks = machine.measure_peaks(torch.device("cpu"))
    with mock.patch.object(native, "load", lambda: recorded):
        for _ in range(WARM_UP):
            stepper.step(real, torch.randn(setup.batch, NZ, 1, 1))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            for _ in range(steps):
                z = torch.randn(setup.batch, NZ, 1, 1)
                with record_function(PHASE + "step"):
                    stepper.step(real, z)
            seconds = time.perf_counter() - start
    work = {} if recorded is None else recorded.work
    flops, moved = 1e6 * peaks[f"gflops_{PRECISION[amp]}"], 1e6 * peaks["gb_per_s"]
    floors = {name: max(each.flops / flops, each.bytes / moved) for name, each in work.items()}
    own = [(event.key, event.self_cpu_time_total, event.count) for event in profiler.key_averages()]
    own = [event for event in own if not event[0].startswith(PHASE)]
    events = [
        Event(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
    ]
    return {
        "amp": amp,
        "batch": setup.batch,
        "milliseconds": 1e3 * seconds / steps,
        "peaks": peaks,
        "parts": [part._asdict() for part in parts(own, steps, seconds, floors)],
        "longest": [part._asdict() for part in longest(own, steps, floors)],
        "timeline": timeline(events),
    }


def _cells(part: Part, total: float) -> list[str]:
    floor = f"{part.floor:.2f} ({part.floor / part.milliseconds:.0%})" if part.floor else "–"
    share = f"{part.milliseconds / total:.1%}"
    return [part.group, f"{part.milliseconds:.2f}", share, f"{part.calls:.0f}", floor]


def table(found: Sequence[Part], total: float, what: str = "operations") -> list[str]:
    """Markdown of parts of a step of ``total`` milliseconds."""
    rows = [_cells(part, total) for part in found]
    heading = [what, "ms a step", "share", "calls a step", "floor, ms (share of the time)"]
    return summary.markdown_table(heading, rows)


def page(result: dict[str, Any]) -> list[str]:
    """Markdown of a whole record."""
    lines = [
        "# Where the time of pygan's step goes: dcgan64",
        "",
        f"{summary.machine_line(result)}; means of {result['steps']} steps under torch's profiler, "
        "which itself takes some of the time.",
        "",
    ]
    for each in result["precisions"]:
        parts, kernels = ([Part(**part) for part in each[key]] for key in ("parts", "longest"))
        total, precision = each["milliseconds"], PRECISION[each["amp"]]
        peak = each["peaks"][f"gflops_{precision}"]
        lines += [f"## {precision}, batch {each['batch']}: {total:.1f} ms a step", ""]
        lines += [f"Floors at {peak:,.0f} GFLOP/s and {each['peaks']['gb_per_s']:.1f} GB/s.", ""]
        lines += [*table(parts, total), ""]
        if kernels:
            lines += [*table(kernels, total, "kernels by layer, the longest"), ""]
    return [*lines, f"`{result['command']}`", ""]


def _profile(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Time of pygan's training step by operation.")
    amps = machine.amps(torch.device("cpu"))
    parser.add_argument("--amp", choices=list(PRECISION), nargs="+", default=amps)
    parser.add_argument("--steps", type=cli.whole_number(1), default=10, help="default 10")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the record goes")
    options = parser.parse_args(arguments)
    if options.out is not None:
        check_writable(options.out, "--out")
    setup = Setup((3, 64, 64))
    result = {
        "kind": "profile",
        "command": f"{PROG} --amp {' '.join(options.amp)} --steps {options.steps}",
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "conditions": machine.conditions(torch.device("cpu")),
        "steps": options.steps,
        "precisions": [measure(setup, amp, options.steps) for amp in options.amp],
    }
    print("\n".join(page(result)))
    if options.out is not None:
        command.write(options.out, result)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _profile(arguments))


if __name__ == "__main__":
    sys.exit(main())
