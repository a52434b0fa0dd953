"""How does the cost of a step grow? ``python -m benchmarks.scaling --out FILE.json``.

Times the whole D+G step of DCGAN by pygan and in eager PyTorch tuned by hand, in both precisions,
along batch size, image size and threads. All sides of one x take turns within its rounds. What the
minutes have no room for is left out, from the largest x on, and the record says why.

Linear means: seconds in proportion to the images of a batch, to the pixels of an image, and
inversely to the threads. Where a cost departs from that by more than a tenth, the table says what
the counted work (`benchmarks.work`) makes of it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks import command, machine
from benchmarks.bench_train_step import WAYS, Setup, Way, require_right_steps, side_of
from benchmarks.correct import CheckFailed
from benchmarks.measure import Call, interleave
from benchmarks.summary import markdown_table
from benchmarks.work import Work
from pygan import cli
from pygan.errors import UserError

PROG = "python -m benchmarks.scaling"
SIDES = ("eager fp32 by hand", "eager bf16 by hand", "pygan fp32", "pygan bf16")
AXES = ("batch", "size", "threads")
REFERENCE = {"batch": 64, "size": 64, "threads": 1}
FIXED = {
    "batch": "3x64x64, ngf = ndf = 64",
    "size": "batch 16, 3 channels, ngf = ndf = 64",
    "threads": "batch 64, 3x64x64, ngf = ndf = 64",
}
LEAST_ROUNDS, MOST_ROUNDS = 5, 15
WARM_UP_CALLS = 2
CHECK_BATCH, CHECK_STEPS = 8, 6
DEPARTURE = 0.1
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


class Point(NamedTuple):
    """One x of an axis."""

    axis: str
    x: int
    setup: Setup
    threads: int


def points(axis: str, threads: int) -> list[Point]:
    """The x of an axis, ascending, on a machine of so many ``threads``."""
    if axis == "batch":
        return [Point(axis, 2**k, Setup((3, 64, 64), batch=2**k), threads) for k in range(11)]
    if axis == "size":
        return [Point(axis, 2**k, Setup((3, 2**k, 2**k), batch=16), threads) for k in range(4, 9)]
    return [Point(axis, x, Setup((3, 64, 64)), x) for x in range(1, threads + 1)]


def work_of(way: Way, setup: Setup) -> Work:
    """Counted work of one step."""
    work = side_of(way, setup).work
    assert work is not None
    return work


def rounds_within(seconds: float, once: float) -> int:
    """Rounds of ``once`` seconds each that fit into ``seconds``; 0 below the least that count."""
    fitting = min(MOST_ROUNDS, int(seconds / once))
    return fitting if fitting >= LEAST_ROUNDS else 0


def row(x: int, images: int, seconds: Sequence[float]) -> dict[str, float]:
    """A point of the record: median and quartiles of the rounds."""
    low, middle, high = statistics.quantiles([images / s for s in seconds], method="inclusive")
    return {
        "x": x,
        "images_per_second": middle,
        "q1": low,
        "q3": high,
        "milliseconds": 1e3 * statistics.median(seconds),
    }


def _no_room(needed: float, left: float) -> str:
    return (
        f"{LEAST_ROUNDS} rounds of all sides need about {needed:.0f} s, and {max(left, 0):.0f} s "
        "were left"
    )


def measure_axis(
    axis: str, ways: Sequence[Way], found: Sequence[Point], seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Series and what was left out, within about ``seconds``, or because a side does not compute
    the update."""
    device, end = torch.device("cpu"), time.perf_counter() + seconds
    series: list[dict[str, Any]] = [
        {
            "axis": axis,
            "side": way.name,
            "precision": way.precision,
            "fixed": FIXED[axis],
            "points": [],
        }
        for way in ways
    ]
    left_out: list[dict[str, Any]] = []
    checked: set[tuple[int, int, int]] = set()
    calls: list[Call] = []
    round_seconds = flops = 0.0
    for position, point in enumerate(found):
        now = work_of(ways[0], point.setup).flops
        # Before the first timing nothing is known.
        expected = round_seconds * now / flops if flops else 0.0
        needed = (LEAST_ROUNDS + WARM_UP_CALLS) * expected
        reason = _no_room(needed, end - time.perf_counter())
        rounds = 0
        if needed <= end - time.perf_counter():
            torch.set_num_threads(point.threads)
            if point.setup.image not in checked:
                try:
                    require_right_steps(point.setup, device, ways, CHECK_BATCH, CHECK_STEPS)
                except CheckFailed as error:
                    left_out.append({"axis": axis, "x": point.x, "reason": str(error)})
                    continue
                checked.add(point.setup.image)
            calls = [side_of(way, point.setup).build(device) for way in ways]
            for _ in range(WARM_UP_CALLS):
                start = time.perf_counter()
                for call in calls:
                    call()
                round_seconds = time.perf_counter() - start
            flops = now
            left = end - time.perf_counter()
            # Half of what is left: the larger x behind it want the rest.
            share = left if position == len(found) - 1 else left / 2
            rounds = rounds_within(share, round_seconds) or (
                LEAST_ROUNDS if LEAST_ROUNDS * round_seconds <= left else 0
            )
            reason = _no_room(LEAST_ROUNDS * round_seconds, left)
        if not rounds:
            left_out.append({"axis": axis, "x": point.x, "reason": reason})
            continue
        times = interleave(calls, [1] * len(calls), rounds, device)
        for one, durations in zip(series, times, strict=True):
            one["points"].append(row(point.x, point.setup.batch, durations))
        print(f"{axis} {point.x}: {rounds} rounds", file=sys.stderr, flush=True)
    return series, left_out


def per_image(axis: str, point: dict[str, float]) -> float:
    """Cost in units that a linear step keeps: seconds an image, a pixel, or of all threads."""
    seconds = 1 / point["images_per_second"]
    if axis == "size":
        return seconds / point["x"] ** 2
    return seconds * point["x"] if axis == "threads" else seconds


def per_batch_share(way: Way, setup: Setup) -> float:
    """Share of a step's bytes that does not grow with the batch: weights, gradients, Adam."""
    once, twice = (work_of(way, setup._replace(batch=k * setup.batch)).bytes for k in (1, 2))
    return (2 * once - twice) / once


def cache_bytes() -> int | None:
    """The last-level cache; None where the system does not tell."""
    try:
        text = CACHE_SIZE.read_text().strip()
    except OSError:
        return None
    return int(text[:-1]) * 1024 if text.endswith("K") else None


def _largest_map(way: Way, setup: Setup) -> str:
    itemsize = 2 if way.precision == "bf16" else 4
    held = setup.batch * setup.width * (setup.image[1] // 2) ** 2 * itemsize
    cache = cache_bytes()
    against = "" if cache is None else f" against a cache of {cache / 2**20:.0f} MiB"
    return f"largest map {held / 2**20:.1f} MiB{against}"


def reason(way: Way, axis: str, point: Point, reference: Point, relative: float) -> str:
    """What the counted work, or Amdahl's law, says of a cost ``relative`` to linear."""
    here, there = work_of(way, point.setup), work_of(way, reference.setup)
    images = point.setup.batch, reference.setup.batch
    said = []
    if axis == "batch":
        ratio = (here.bytes / images[0]) / (there.bytes / images[1])
        said.append(
            f"per-batch bytes (weights, Adam) {per_batch_share(way, point.setup):.0%} of the step, "
            f"bytes an image {ratio:.2f}x"
        )
    elif axis == "size":
        pixels = (point.x / reference.x) ** 2
        said.append(
            f"FLOPs a pixel {here.flops / there.flops / pixels:.2f}x, per-batch bytes "
            f"{per_batch_share(way, point.setup):.0%} of the step"
        )
    else:
        alone = (relative - 1) / (point.x / reference.x - 1)
        said.append(f"as if {alone:.0%} of the step ran on {reference.x} thread alone")
    return "; ".join([*said, _largest_map(way, point.setup)])


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table."""
    ways = {way.name: way for way in WAYS}
    threads = result["conditions"]["threads"]
    rows = []
    for series in result["series"]:
        axis, way = series["axis"], ways[series["side"]]
        if not series["points"]:
            continue
        # The reference may have been left out; the nearest x takes its place.
        first = min(series["points"], key=lambda p: abs(p["x"] - REFERENCE[axis]))
        all_points = {point.x: point for point in points(axis, threads)}
        for point in series["points"]:
            relative = per_image(axis, point) / per_image(axis, first)
            why = ""
            if abs(relative - 1) > DEPARTURE:
                x = all_points[int(point["x"])]
                why = reason(way, axis, x, all_points[int(first["x"])], relative)
            rate = f"{point['images_per_second']:.1f}"
            quartiles = f"{point['q1']:.1f} to {point['q3']:.1f}"
            rows.append([axis, str(point["x"]), way.name, rate, quartiles, f"{relative:.2f}", why])
    head = ["axis", "x", "side", "images/s", "quartiles", "cost to linear", "because"]
    yield from markdown_table(head, rows)
    for left in result["left_out"]:
        yield f"left out: {left['axis']} {left['x']}: {left['reason']}"


def command_line() -> cli.Parser:
    """The options of :func:`measure`."""
    parser = cli.Parser(prog=PROG, description="How the cost of a training step grows.")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="where the figures go")
    add("--axis", choices=AXES, action="append", help="may be repeated; default: all")
    minutes = cli.real_number(0, open_low=True)
    add("--minutes", type=minutes, default=9.0, help="of all axes together; default 9")
    return parser


def measure(options: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """The record of the axes asked for."""
    axes = list(dict.fromkeys(options.axis or AXES))
    measured = machine.precisions(torch.device("cpu"))
    ways = [way for way in WAYS if way.name in SIDES and way.precision in measured]
    threads = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    before = torch.get_num_threads()
    end = time.perf_counter() + 60 * options.minutes
    series, left_out = [], []
    try:
        for position, axis in enumerate(axes):
            # What an axis does not use falls to those behind it.
            seconds = (end - time.perf_counter()) / (len(axes) - position)
            made, missing = measure_axis(axis, ways, points(axis, threads), seconds)
            series += made
            left_out += missing
        torch.set_num_threads(threads)
        conditions = machine.conditions(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    return {
        "kind": "scaling",
        "conditions": conditions,
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([*PROG.split(), *words]),
        "left_out": left_out,
        "series": series,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""

    def body() -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        options = command_line().parse_args(words)
        if not options.out.parent.is_dir():
            raise UserError(f"{options.out.parent} is no folder; give --out a file in one")
        result = measure(options, words)
        command.write(options.out, result)
        for line in report(result):
            print(line)
        return 0

    return cli.run(PROG, body)


if __name__ == "__main__":
    sys.exit(main())
