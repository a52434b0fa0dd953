"""What does a training cost? ``python -m benchmarks.cost --runs DIR --out FILE.json``.

Trains the default run with ``--fused`` and by the same trainer in plain torch (float32, and
``--amp bf16``), for several seeds in turn, each in a process of its own. Of every run: seconds,
joules and peak resident memory per 1,000 images, and with ``--to-distance D`` the training seconds
up to the first checkpoint whose Fréchet distance (`pygan.evaluate`) is at most D.
Measuring the distances is not part of any time. Joules are those of the whole process, start
included: of the GPU by NVML, of the CPU by RAPL, all that the machine does counted; memory is the
host's. Finished runs in DIR are taken as they are; words behind ``--`` go to the trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import command, machine, summary
from benchmarks.summary import markdown_table
from pygan import cli, evaluate
from pygan.metrics.quality import SORTED
from pygan.power import PowerMeter
from pygan.run_folder import LOG, read_config

PROG = "python -m benchmarks.cost"
WAYS = {
    "pygan --fused": ["--fused"],
    "plain torch fp32": ["--amp", "off"],
    "plain torch bf16": ["--amp", "bf16"],
}
KEPT = "cost.json"
POWERCAP = Path("/sys/class/powercap")
UNREADABLE = "not readable"
POLL_SECONDS = 0.5
FIGURES = ("seconds_per_1000", "joules_per_1000", "peak_bytes", "seconds_to_distance")


class CpuEnergy:
    """Joules of all CPU packages since it was made, by RAPL; `joules` None where not readable.

    The counters wrap, within minutes at full load: `read` must be called more often than that.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:0 a part of it.
        self._zones = [p for p in sorted(folder.glob("*-rapl:*")) if p.name.count(":") == 1]
        self.joules: float | None = 0.0
        self._before = self._counters()

    def _counters(self) -> list[tuple[int, int]] | None:
        try:
            found = [
                tuple(
                    int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")
                )
                for zone in self._zones
            ]
        except (OSError, ValueError):
            found = []
        if not found:
            self.joules = None
            return None
        return found  # type: ignore[return-value]

    def read(self) -> None:
        """Adds what was used since the last call."""
        now = self._counters()
        if now is None or self._before is None or self.joules is None:
            return
        for (after, most), (before, _) in zip(now, self._before, strict=True):
            self.joules += 1e-6 * (after - before + (most if after < before else 0))
        self._before = now


def _run(command: Sequence[str]) -> dict[str, Any]:
    """Seconds, peak resident bytes and joules of a command.

    Raises:
        cli.Failure: it failed.
    """
    cpu = CpuEnergy()
    start = time.perf_counter()
    with PowerMeter(cli.device("auto")) as gpu:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            # Not Popen.wait: only wait4 tells the memory of this child alone.
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                cpu.read()
                if pid:
                    break
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.terminate()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise cli.Failure(f"{' '.join(command)} failed with status {process.returncode}")
    return {
        "process_seconds": time.perf_counter() - start,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "cpu_joules": UNREADABLE if cpu.joules is None else cpu.joules,
        "gpu_joules": UNREADABLE if gpu.joules is None else gpu.joules,
    }


def training_seconds(rows: Sequence[dict[str, float]], step: int) -> float:
    """Training seconds up to ``step``, straight between two lines of the log."""
    steps, seconds = zip((0, 0.0), *((row["step"], row["seconds"]) for row in rows), strict=True)
    return float(np.interp(step, steps, seconds))


def _train(run: Path, flags: list[str], samples: int) -> dict[str, Any]:
    """A run's costs, and its distances after every epoch saved."""
    command = [sys.executable, "-m", "pygan.train", "--outf", str(run), "--overwrite", *flags]
    used = _run(command)
    logged = map(json.loads, (run / LOG).read_text().splitlines())
    rows = [row for row in logged if "finding" not in row]
    stored = read_config(run)
    batch = stored["config"]["batch_size"]
    per_epoch = stored["data"]["images"] // batch
    options = evaluate.command_line().parse_args(
        [str(run), "--every-epoch", "-n", str(samples), "--no-keep"]
    )
    epochs = [
        {
            "epoch": row["epoch"],
            "distance": row["distance"],
            "seconds": training_seconds(rows, per_epoch * (row["epoch"] + 1)),
        }
        for row in evaluate.measure(options)["epochs"]
    ]
    last = rows[-1]
    return {**used, "images": batch * last["step"], "seconds": last["seconds"], "epochs": epochs}


def cost_of_run(run: Path, flags: list[str], samples: int) -> dict[str, Any]:
    """From the folder where it was measured with the same flags before, else by training."""
    kept, asked = run / KEPT, {"flags": flags, "samples": samples}
    if kept.exists():
        found = json.loads(kept.read_text())
        if {name: found.get(name) for name in asked} == asked:
            return dict(found)
    found = {**asked, **_train(run, flags, samples)}
    command.write(kept, found)
    return found


def figures(run: dict[str, Any], distance: float | None) -> dict[str, float | None]:
    """The figures of a run that are compared; None where unknown or not reached."""
    joules = [run[name] for name in ("cpu_joules", "gpu_joules") if run[name] != UNREADABLE]
    thousands = run["images"] / 1000
    reached = (e["seconds"] for e in run["epochs"] if distance and e["distance"] <= distance)
    return {
        "seconds_per_1000": run["seconds"] / thousands,
        "joules_per_1000": sum(joules) / thousands if joules else None,
        "peak_bytes": run["peak_bytes"],
        "seconds_to_distance": next(reached, None),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs that the minutes have room for, seed by seed."""
    end = time.perf_counter() + 60 * options.minutes
    device = torch.device(cli.device("auto"))
    runs, left_out = [], []
    for seed in range(options.seeds):
        for way, flags in WAYS.items():
            reason = machine.emulated("bf16", device) if "bf16" in flags else None
            if reason is None and time.perf_counter() >= end:
                reason = "the minutes were over"
            if reason is not None:
                left_out.append({"way": way, "seed": seed, "reason": reason})
                continue
            folder = options.runs / f"{way.replace(' ', '-').replace('--', '')}-{seed}"
            run = cost_of_run(
                folder, [*flags, "--seed", str(seed), *options.trainer], options.samples
            )
            runs.append({"way": way, "seed": seed, **run, **figures(run, options.to_distance)})
            print(f"{way}, seed {seed}: {run['seconds']:.1f} s", file=sys.stderr, flush=True)
    return {
        "kind": "cost",
        "command": " ".join([PROG, *_words(options)]),
        "conditions": machine.conditions(device),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "distance": options.to_distance,
        "left_out": left_out,
        "runs": runs,
    }


def _words(options: argparse.Namespace) -> list[str]:
    words = ["--seeds", str(options.seeds), "--samples", str(options.samples)]
    if options.to_distance is not None:
        words += ["--to-distance", f"{options.to_distance:g}"]
    return [*words, *(["--", *options.trainer] if options.trainer else [])]


def _cell(values: Sequence[float | None], scale: float) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return "unknown"
    text = f"{statistics.median(known):.3g} ({min(known):.3g} to {max(known):.3g})"
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)} runs"


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table: median and range over the seeds."""
    scales = (1.0, 1.0, 2.0**-20, 1.0)
    rows = []
    for way in WAYS:
        runs = [run for run in result["runs"] if run["way"] == way]
        cells = [
            _cell([run[name] for run in runs], scale)
            for name, scale in zip(FIGURES, scales, strict=True)
        ]
        rows.append([way, str(len(runs)), *cells])
    head = ["way", "runs", "s per 1,000 images", "J per 1,000 images", "peak MiB"]
    reached = "s to distance" + (f" {result['distance']:g}" if result["distance"] else "")
    yield from markdown_table([*head, reached], rows)
    for left in result["left_out"]:
        yield f"left out: {left['way']}, seed {left['seed']}: {left['reason']}"


def page(result: dict[str, Any]) -> list[str]:
    """Markdown of the table and of what it is of."""
    return [
        "What a whole training on the embedded images costs, start and checkpoints included in the "
        "memory and the joules; medians and ranges over the seeds, all ways in turn. The distance "
        "is the Fréchet distance of samples, and measuring it is not timed:",
        "",
        *report(result),
        "",
        f"{summary.machine_line(result)}: `{result['command']}`.",
        "",
    ]


def command_line() -> cli.Parser:
    """The options of :func:`measure`."""
    parser = cli.Parser(prog=PROG, description="Seconds, joules and memory of a training.")
    add = parser.add_argument
    positive = cli.real_number(0, open_low=True)
    add("--runs", type=Path, required=True, metavar="DIR", help="where the runs go")
    add("--out", type=Path, required=True, metavar="FILE.json", help="where the figures go")
    add("--seeds", type=cli.whole_number(1), default=3, help="runs of each way; default 3")
    add("--to-distance", type=positive, metavar="D", help="distance to be reached")
    add("--samples", type=cli.whole_number(SORTED), default=10_000)
    add("--minutes", type=positive, default=1e6, help="no run begins after them")
    add("trainer", nargs="*", metavar="-- FLAGS", help="for pygan.train")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""

    def body() -> int:
        options = command_line().parse_args(arguments)
        options.runs.mkdir(parents=True, exist_ok=True)
        result = measure(options)
        command.write(options.out, result)
        for line in report(result):
            print(line)
        return 0

    return cli.run(PROG, body)


if __name__ == "__main__":
    sys.exit(main())
