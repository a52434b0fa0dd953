"""What does each trick bring? ``python -m benchmarks.tricks --runs DIR --out FILE.json``.

Trains the embedded images with ``--fused`` as it comes, and with one trick at a time, for several
seeds, each run in a process of its own. Of every run: images/s, and the Fréchet distance, precision
and recall of 10,000 samples of its last epoch (`pygan.evaluate`). Finished runs in DIR are taken as
they are. A trick that helps one set of images may harm another: this is what they did to these.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, machine, summary
from benchmarks.summary import markdown_table
from pygan import cli, evaluate
from pygan.run_folder import LOG

PROG = "python -m benchmarks.tricks"
KEPT = "trick.json"
WAYS = {
    "as it comes": [],
    "label smoothing": ["--real-target", "0.9"],
    "flipped labels": ["--flip-labels", "0.05"],
    "instance noise": ["--noise", "0.1"],
    "two time scales": ["--lr-g", "1e-4", "--lr-d", "4e-4"],
    "two updates of D": ["--n-critic", "2"],
    "clipped gradients": ["--clip-grad", "5"],
    "spectral norm": ["--d-norm", "spectral"],
    "spectral norm, hinge": ["--d-norm", "spectral", "--loss", "hinge"],
    "R1": ["--r1", "1", "--d-norm", "none"],
    "WGAN-GP": ["--loss", "wasserstein", "--d-norm", "none", "--gradient-penalty", "10"],
    "hinge": ["--loss", "hinge"],
    "lsgan": ["--loss", "lsgan"],
    "lsgan, clipped gradients": ["--loss", "lsgan", "--clip-grad", "5"],
    "relativistic": ["--loss", "relativistic"],
    "relativistic pairing, R1": [
        "--loss", "relativistic_pairing", "--d-norm", "none", "--r1", "1",
    ],
    "augmentation": ["--augment", "color,translation,cutout"],
    "average of G": ["--ema", "0.999"],
}  # fmt: skip


def _train(run: Path, flags: Sequence[str]) -> dict[str, Any]:
    """A run's figures.

    Raises:
        cli.Failure: it failed.
    """
    words = [sys.executable, "-m", "pygan.train", "--fused", "--outf", str(run), "--overwrite"]
    done = subprocess.run([*words, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise cli.Failure(f"{' '.join(flags)} failed: {done.stderr.strip()}")
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    speeds = [row["images_per_s"] for row in rows if "loss_d" in row]
    options = evaluate.command_line().parse_args([str(run)])
    (quality,) = evaluate.measure(options)["epochs"]
    return {
        "images_per_second": statistics.median(speeds),
        "findings": sum(row.get("severity") in ("warning", "error") for row in rows),
        **quality,
    }


def measure_run(run: Path, flags: list[str]) -> dict[str, Any]:
    """From the folder where it was measured with the same flags before, else by training."""
    kept = run / KEPT
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["flags"] == flags:
            return dict(found)
    found = {"flags": flags, **_train(run, flags)}
    command.write(kept, found)
    return found


def measure(runs: Path, seeds: int, epochs: int, minutes: float) -> dict[str, Any]:
    """All runs that the minutes have room for, seed by seed."""
    end = time.perf_counter() + 60 * minutes
    found, left_out = [], []
    for seed in range(seeds):
        for way, flags in WAYS.items():
            if time.perf_counter() >= end:
                left_out.append({"way": way, "seed": seed})
                continue
            name = way.replace(" ", "-").replace(",", "")
            asked = ["--epochs", str(epochs), "--seed", str(seed), *flags]
            run = measure_run(runs / f"{name}-{seed}", asked)
            found.append({"way": way, "seed": seed, **run})
            print(f"{way}, seed {seed}: {run['distance']:.2f}", file=sys.stderr, flush=True)
    return {
        "kind": "tricks",
        "command": f"{PROG} --seeds {seeds} --epochs {epochs}",
        "conditions": machine.conditions(torch.device(cli.device("auto"))),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "runs": found,
        "left_out": left_out,
    }


def _cell(runs: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = [run[name] for run in runs]
    text = format(statistics.median(values), form)
    if len(values) > 1:
        text += f" ({min(values):{form}}–{max(values):{form}})"
    return text


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table: medians and ranges over the seeds."""
    rows = []
    for way, flags in WAYS.items():
        runs = [run for run in result["runs"] if run["way"] == way]
        if runs:
            figures = (("distance", ".1f"), ("precision", ".0%"), ("recall", ".0%"),
                       ("images_per_second", ".0f"))  # fmt: skip
            cells = [_cell(runs, name, form) for name, form in figures]
            rows.append([way, f"`{' '.join(flags)}`" if flags else "", str(len(runs)), *cells])
    heading = ["trick", "flags", "seeds", "Fréchet", "precision", "recall", "images/s"]
    yield from markdown_table(heading, rows)
    if result["left_out"]:
        yield ""  # Markdown takes the next line for a row else
    for left in result["left_out"]:
        yield f"left out: {left['way']}, seed {left['seed']}: the minutes were over"


def page(result: dict[str, Any]) -> list[str]:
    """Markdown of the table and of what it is of."""
    return [
        "# What each trick did to the default run",
        "",
        "The embedded images, `--fused`, one trick at a time; medians and ranges over the seeds. "
        "Distance, precision and recall are of 10,000 samples of the last epoch. A trick that "
        "helps one set of images may harm another, and five epochs tell nothing of fifty.",
        "",
        *report(result),
        "",
        f"{summary.machine_line(result)}: `{result['command']}`.",
        "",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    parser = cli.Parser(prog=PROG, description="What each trick brings.")
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="DIR", help="where the runs go")
    add("--out", type=Path, required=True, metavar="FILE.json", help="where the figures go")
    add("--seeds", type=cli.whole_number(1), default=1, help="runs of each; default 1")
    add("--epochs", type=cli.whole_number(1), default=5, help="of a run; default 5")
    minutes = cli.real_number(0, open_low=True)
    add("--minutes", type=minutes, default=1e6, help="no run begins after them")

    def body() -> int:
        options = parser.parse_args(arguments)
        options.runs.mkdir(parents=True, exist_ok=True)
        result = measure(options.runs, options.seeds, options.epochs, options.minutes)
        command.write(options.out, result)
        for line in report(result):
            print(line)
        return 0

    return cli.run(PROG, body)


if __name__ == "__main__":
    sys.exit(main())
