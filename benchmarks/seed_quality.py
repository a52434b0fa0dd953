"""Does fusion change what is learned? ``python -m benchmarks.seed_quality``.

Trains the default run in bfloat16 for several seeds with ``--fused`` and without, each in a process
of its own, and prints the Fréchet distance of 10,000 samples to the real images
(`pygan.evaluate`) for every run, with mean and spread of both ways. They agree where the
ranges of their distances overlap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from pygan import cli, evaluate

PROG = "python -m benchmarks.seed_quality"
WAYS = {"fused": ["--fused"], "unfused": []}


def train(run: Path, seed: int, flags: Sequence[str]) -> None:
    """The default run.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "pygan.train", "--amp", "bf16", "--seed", str(seed)]
    command += ["--outf", str(run), "--overwrite", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def distance(run: Path, seed: int, flags: Sequence[str]) -> float:
    """Of the samples of the last epoch. Kept beside the run, which is not trained again then."""
    kept = run / "quality.json"
    if not kept.exists():
        train(run, seed, flags)
        options = evaluate.command_line().parse_args([str(run), "--no-keep"])
        command.write(kept, evaluate.measure(options))
    return float(json.loads(kept.read_text())["epochs"][-1]["distance"])


def summary(distances: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Mean, spread (standard deviation) and range of each way, and whether the ranges overlap."""
    ways = {
        way: {
            "distances": list(by_seed.values()),
            "mean": statistics.mean(by_seed.values()),
            "spread": statistics.stdev(by_seed.values()) if len(by_seed) > 1 else 0.0,
            "low": min(by_seed.values()),
            "high": max(by_seed.values()),
        }
        for way, by_seed in distances.items()
    }
    fused, unfused = (ways[way] for way in WAYS)
    overlap = fused["low"] <= unfused["high"] and unfused["low"] <= fused["high"]
    return {"seeds": list(distances["fused"]), "ways": ways, "overlap": overlap}


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table."""
    yield (
        "way      " + "".join(f"  seed {seed:<4}" for seed in result["seeds"]) + "   mean   spread"
    )
    for way, row in result["ways"].items():
        cells = "".join(f"  {value:>9.2f}" for value in row["distances"])
        yield f"{way:<9}{cells}  {row['mean']:>5.2f}   {row['spread']:>6.2f}"
    yield f"the ranges overlap: {'yes' if result['overlap'] else 'no'}"


def _parser() -> cli.Parser:
    parser = cli.Parser(prog=PROG, description="Sample quality with and without fusion.")
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs go")
    add("--seeds", type=cli.whole_number(0, cli.SEED_MAX), nargs="+", default=[0, 1, 2])
    add("--json", type=Path, metavar="OUT", help="write the figures there as well")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains what is not there yet, and compares."""
    found: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for seed in options.seeds:
        for way, flags in WAYS.items():
            found[way][seed] = distance(options.runs / f"{way}-{seed}", seed, flags)
            print(f"{way}, seed {seed}: {found[way][seed]:.2f}", file=sys.stderr, flush=True)
    return summary(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return command.run(_parser(), measure, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
