"""What does the monitor cost a run? ``python -m benchmarks.monitor_cost``.

Two runs of ``pygan.train --fused`` on the embedded images, with the monitor and without, take turns
in one process. A turn is as many steps as lie between two of the monitor's looks at samples, with
the reads that log lines and checks make between them; nothing is written. The extra time is the
median over the rounds, with its 95% interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, machine, summary
from benchmarks.measure import QUICK, Call, interleave
from benchmarks.ratio import speed_ratio
from pygan import cli
from pygan.config import Config
from pygan.distributed import Follower
from pygan.train import load_images
from pygan.training import NUMBERS, Networks, Training

PROG = "python -m benchmarks.monitor_cost"
PERIOD = 100  # steps between two looks of a `Monitor` at samples
WITH, WITHOUT = "with", "without"


def turn(config: Config, steps: int, device: torch.device) -> Call:
    """A call makes ``steps`` more steps of a run."""
    images = load_images(config)
    networks = Networks(config, images.image_size, images.channels, device)
    run = Training(config, images, networks, Follower(Path()), device)

    def call() -> None:
        for _ in range(steps):
            run.batches.update(networks, run.step)
            run.step += 1
            if run.step % config.log_every == 0:
                means = (run.sums / config.log_every).tolist()
                run.sums.zero_()
                if run.monitor is not None:
                    run.monitor.check(run.step, means[: NUMBERS.index("d_fake_after")])

    return call


def compare(config: Config, rounds: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every turn, and what share of the time the monitor adds."""
    calls = [turn(replace(config, monitor=on), steps, device) for on in (True, False)]
    for call in calls:
        call()
    watched, plain = interleave(calls, (1, 1), rounds, device)
    # With the monitor a turn is the baseline: the ratio is then its share of the time without.
    ratio = speed_ratio(plain, watched)
    return {
        "steps": steps,
        "seconds": {WITH: watched, WITHOUT: plain},
        "extra": {name: getattr(ratio, name) - 1 for name in ("median", "low", "high")},
        "coverage": ratio.coverage,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the default run."""
    device = torch.device(cli.device("auto"))
    rounds, steps = (QUICK.rounds, 20) if options.quick else (options.rounds, PERIOD)
    return {
        "kind": "monitor",
        "command": f"{PROG}{' --quick' if options.quick else f' --rounds {rounds}'}",
        "conditions": machine.conditions(device),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": options.quick,
        **compare(Config(fused=True, device=device.type), rounds, steps, device),
    }


def report(result: dict[str, Any]) -> Iterator[str]:
    """One line."""
    yield _sentence(result)
    if result["quick"]:
        yield "--quick: too few steps to quote."


def _sentence(result: dict[str, Any]) -> str:
    extra, rounds = result["extra"], len(result["seconds"][WITH])
    return (
        f"The monitor adds {extra['median']:.2%} ({extra['low']:.2%} to {extra['high']:.2%}) to "
        f"the time of the default run's steps: {rounds} rounds of {result['steps']} steps."
    )


def page(result: dict[str, Any]) -> list[str]:
    """Markdown of the figure and of what it is of."""
    return [f"{_sentence(result)} {summary.machine_line(result)}: `{result['command']}`.", ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    parser = cli.Parser(prog=PROG, description="What the monitor costs a run.")
    add = parser.add_argument
    add("--rounds", type=cli.whole_number(1), default=15, metavar="N", help="of turns; default 15")
    add("--quick", action="store_true", help="few steps: does the benchmark work?")
    add("--json", type=Path, metavar="OUT", help="write the figures there as well")
    return command.run(parser, measure, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
