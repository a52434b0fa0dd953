"""What a training process needs besides interpreter, libraries and data.

``python -m benchmarks.training_memory --side "pygan fp32" --steps 3`` trains dcgan64 at batch 64
for some steps and prints, as JSON, by how many bytes the resident set grew from before the networks
were built to its peak, and the seconds of each step. A process of its own for each side: what an
allocator keeps of another side would be taken for free.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import machine
from benchmarks.bench_train_step import NZ, WAYS, Setup, Way
from benchmarks.steps import DCGAN_ADAM

SETUP = Setup((3, 64, 64))
SMALL = Setup((1, 16, 16), batch=8, width=8)
BATCHES = 4
ROOT = Path(__file__).parents[1]


class Usage(NamedTuple):
    """Peak bytes over the start, None where the system does not tell; seconds of each step."""

    bytes: int | None
    seconds: list[float]


def _train(way: Way, setup: Setup, pool: torch.Tensor, steps: int) -> list[float]:
    stepper = way.build(setup.models(), torch.device("cpu"), DCGAN_ADAM)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        stepper.step(pool[step % len(pool)], torch.randn(setup.batch, NZ, 1, 1))
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(way: Way, setup: Setup, steps: int) -> Usage:
    """In this process, which should have done nothing else."""
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    data = torch.stack([setup.real(setup.batch, generator) for _ in range(BATCHES)])
    # Libraries set themselves up at the first call of each kind.
    _train(way, SMALL, torch.stack([SMALL.real(SMALL.batch, generator)]), 2)
    with machine.PeakMemory(torch.device("cpu")) as memory:
        seconds = _train(way, setup, data, steps)
    return Usage(memory.bytes, seconds)


def measure_apart(side: str, steps: int) -> Usage:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_memory"]
    command += ["--side", side, "--steps", str(steps)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return Usage(**json.loads(run.stdout))


def main() -> int:
    """Measures one side in this process and prints its `Usage`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory")
    ways = {way.name: way for way in WAYS}
    parser.add_argument("--side", choices=ways, required=True)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    usage = measure(ways[options.side], SETUP, options.steps)
    print(json.dumps(usage._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
