"""Where the time of one training step goes, by operation.

``python -m benchmarks.profile_step --amp off --out FILE.md`` runs pygan's step on dcgan64 under
torch's profiler and writes a Markdown table of milliseconds a step. What an operation of torch or a
native kernel takes itself is counted, not what it calls; Python between them is "other".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import machine, summary
from benchmarks.bench_train_step import NZ, Setup, pygan_step
from benchmarks.steps import DCGAN_ADAM
from pygan import cli
from pygan.errors import UserError
from pygan.ops import native
from pygan.run_folder import replace_file

PROG = "python -m benchmarks.profile_step"
WARM_UP = 3
NATIVE = "pygan::"
QUESTIONS = ("_scratch", "_method", "isa", "isas")
OTHER = "other"

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
    """A group of operations: milliseconds and calls a step."""

    group: str
    milliseconds: float
    calls: float


class Recorded:
    """The native extension, whose functions show in a profile."""

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._extension, name)
        if isinstance(found, type) or name.endswith(QUESTIONS):
            return found

        def run(*arguments: Any, **named: Any) -> Any:
            with record_function(NATIVE + name):
                return found(*arguments, **named)

        return run


def group_of(operation: str) -> str:
    """The group of `GROUPS` that an operation belongs to."""
    name = operation.lower()
    for group, parts in GROUPS:
        if any(part in name for part in parts):
            return group
    return OTHER


def parts(events: Iterable[tuple[str, float, float]], steps: int, seconds: float) -> list[Part]:
    """``(name, own microseconds, calls)`` of all ``steps``, by group, longest first.

    What is left of the ``seconds`` that they took together is "other".
    """
    times, calls = {OTHER: 0.0}, {OTHER: 0.0}
    for name, microseconds, count in events:
        group = group_of(name)
        times[group] = times.get(group, 0.0) + microseconds / 1e3 / steps
        calls[group] = calls.get(group, 0.0) + count / steps
    times[OTHER] = max(0.0, 1e3 * seconds / steps - sum(times.values()) + times[OTHER])
    found = [Part(group, times[group], calls[group]) for group in times]
    return sorted(found, key=lambda part: (part.group == OTHER, -part.milliseconds))


def measure(setup: Setup, amp: str, steps: int) -> list[Part]:
    """``steps`` steps of pygan after a warm-up."""
    torch.manual_seed(0)
    stepper = pygan_step(amp)(setup.models(), torch.device("cpu"), DCGAN_ADAM)
    real = setup.real(setup.batch, torch.Generator().manual_seed(2))
    extension = native.load()
    recorded = None if extension is None else Recorded(extension)
    with mock.patch.object(native, "load", lambda: recorded):
        for _ in range(WARM_UP):
            stepper.step(real, torch.randn(setup.batch, NZ, 1, 1))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            for _ in range(steps):
                stepper.step(real, torch.randn(setup.batch, NZ, 1, 1))
            seconds = time.perf_counter() - start
    events = (
        (event.key, event.self_cpu_time_total, event.count) for event in profiler.key_averages()
    )
    return parts(events, steps, seconds)


def table(found: Sequence[Part]) -> list[str]:
    """Markdown of the parts and their sum."""
    total = sum(part.milliseconds for part in found)
    rows = [
        [part.group, f"{part.milliseconds:.2f}", f"{part.milliseconds / total:.1%}",
         f"{part.calls:.0f}"]
        for part in found
    ]  # fmt: skip
    rows.append(["**all**", f"**{total:.2f}**", "**100%**", ""])
    return summary.markdown_table(["operations", "ms a step", "share", "calls a step"], rows)


def _profile(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Time of pygan's training step by operation.")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="default off")
    parser.add_argument("--steps", type=cli.whole_number(1), default=10, help="default 10")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default: print it")
    options = parser.parse_args(arguments)
    setup = Setup((3, 64, 64))
    found = measure(setup, options.amp, options.steps)
    conditions = machine.conditions(torch.device("cpu"))
    lines = [
        f"# pygan's step on dcgan64, batch {setup.batch}, amp {options.amp}",
        "",
        f"{summary.machine_line({'conditions': conditions})}; means of {options.steps} steps under "
        "torch's profiler, which itself takes some of the time.",
        "",
        *table(found),
        "",
        f"`{PROG} --amp {options.amp} --steps {options.steps}`",
        "",
    ]
    text = "\n".join(lines)
    if options.out is None:
        print(text, end="")
        return 0
    try:
        replace_file(options.out, text.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {options.out} ({error.strerror}); give another --out"
        ) from None
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _profile(arguments))


if __name__ == "__main__":
    sys.exit(main())
