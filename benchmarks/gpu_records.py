"""What the parts of `benchmarks.gpu_suite` share: their arguments, and records written at once.

A part is a process of its own and adds a line of JSON to one file for each thing that it finds, so
that what it had when it crashed, hung or was stopped is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from pygan import cli, power

Record = dict[str, Any]


class Part(NamedTuple):
    """A part at work: its name, where its records go, and until when it has time.

    ``tiny`` parts run the whole course on sizes of no interest.
    """

    name: str
    path: Path
    device: torch.device
    deadline: float
    tiny: bool
    peaks: dict[str, float]

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def add(self, kind: str, record: Record) -> None:
        line = json.dumps({"kind": kind, "part": self.name, **record})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def missing(self, kind: str, reason: object, **what: Any) -> None:
        """Something has no number, and why."""
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        self.add(kind, {**what, "missing": lines[0][:400]})
        print(f"{self.name}: {what}: {reason}", file=sys.stderr, flush=True)


def read(path: Path) -> Iterator[Record]:
    """Every whole line. The last one may have been cut off."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def parser(prog: str, description: str) -> cli.Parser:
    """With the arguments that `run` reads."""
    made = cli.Parser(prog=prog, description=description)
    made.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="records")
    made.add_argument("--name", required=True, help="of the part, in its records")
    made.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    # A moment, not a length: to import torch takes part of the time as well.
    until = cli.real_number(0)
    made.add_argument("--until", type=until, help="seconds since the epoch; default: 60 from now")
    made.add_argument("--tiny", action="store_true", help="sizes of no interest")
    return made


def run(
    made: cli.Parser, arguments: Sequence[str] | None, body: Callable[[Part, Any], None]
) -> int:
    """Take the peaks of the device and do the part; returns the exit status (see `pygan.cli`)."""

    def part() -> int:
        options = made.parse_args(arguments)
        deadline = options.until or time.time() + 60.0
        device = torch.device(options.device)
        # As the well-known example does it, for every side.
        torch.backends.cudnn.benchmark = True
        if options.tiny:
            torch.set_num_threads(1)
            peaks = {"gflops_fp32": 1.0, "gflops_bf16": 1.0, "gb_per_s": 1.0}
        else:
            peaks = machine.measure_peaks(device)
        at_work = Part(options.name, options.out, device, deadline, options.tiny, peaks)
        at_work.add(
            "start",
            {"conditions": machine.conditions(device), "peaks": peaks, "gpu": power.about(device)},
        )
        body(at_work, options)
        at_work.add("end", {"gpu": power.about(device), "seconds_left": at_work.left()})
        return 0

    return cli.run(made.prog, part)
