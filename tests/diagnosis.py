"""What the monitor says of training broken on purpose: ``python tests/diagnosis.py --out FILE.md``.

Small networks learn Fashion-MNIST at 16 pixels, once for each of ``--seeds``, with one thing wrong
in each way of breaking them, and with nothing wrong. The monitor is asked every 20 steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import publish

from pygan import Finding, Monitor, data
from pygan.config import Config
from pygan.data.builtin import fashion_mnist
from pygan.monitor import FAULTS
from pygan.training import Batches, Networks

CHECK_EVERY = 20
HEALTHY_SEEDS = 10
FOOTWEAR = (5, 7, 9)  # sandals, sneakers, ankle boots


def _clamp_logits(networks: Networks) -> None:
    networks.D.register_forward_hook(lambda module, inputs, logits: logits.clamp(min=3))


def _footwear() -> np.ndarray:
    return np.flatnonzero(np.isin(fashion_mnist()[1], FOOTWEAR))


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        how: what is wrong with it.
        code: what the monitor has to find; None, nothing at all.
        steps: of a run.
        settings: of its `Config`.
        change: made to the networks before the first step.
        images: indices of those trained on; None, all of them.
        only: the monitor knows no others.
    """

    how: str
    code: str | None
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Networks], None] = lambda networks: None
    images: Callable[[], np.ndarray] | None = None
    only: bool = False

    def run(self, seed: int) -> list[Finding]:
        """What was found, up to the first NaN or infinity."""
        settings = {"batch_size": 32, "nz": 32, "ngf": 16, "ndf": 16, "amp": "off", "fused": True}
        config = Config(seed=seed, **(settings | self.settings))
        known = data.load("fashion-mnist", image_size=16)
        shown = known
        if self.images is not None:
            shown = replace(known, images=known.images[self.images()])
        device = torch.device("cpu")
        networks = Networks(config, 16, 1, device)
        batches = Batches(config, shown, device)
        self.change(networks)
        references = shown.images if self.only else known.images[::20]
        real = torch.tensor(references).permute(0, 3, 1, 2)
        monitor = Monitor(networks.G, networks.D, real=real, nz=config.nz, loss=config.loss)
        found: list[Finding] = []
        for step in range(1, self.steps + 1):
            monitor.update(*networks.step(batches.real(step), batches.latent())[:4])
            if step % CHECK_EVERY == 0:
                found += monitor.check(step)
            if found and found[-1].code == "nonfinite":
                break
        return found


CASES: tuple[Case, ...] = (
    Case("nothing", None, 700),
    Case(
        "G's learning rate is 0", "d_overpowers", 440,
        {"batch_size": 16, "ngf": 8, "ndf": 8, "lr_g": 0.0},
    ),
    Case(
        "D's learning rate is 0", "d_fooled", 440,
        {"batch_size": 16, "ngf": 8, "ndf": 8, "lr_d": 0.0},
    ),
    Case("D's logits are clamped to 3 and more", "frozen", 440, {}, _clamp_logits),
    Case(
        "Wasserstein loss without clipping or penalty, D at 10 times the learning rate",
        "exploding", 600, {"loss": "wasserstein", "d_norm": "none", "lr_d": 2e-3},
    ),
    Case(
        "minimax loss, D without norm at 1,000 times the learning rate, G at a hundredth",
        "vanishing", 600, {"loss": "minimax", "d_norm": "none", "lr_g": 2e-6, "lr_d": 0.2},
    ),
    Case("D at 20 times the learning rate", "stalled", 600, {"lr_d": 4e-3}),
    Case(
        "G at 10 times the learning rate, D at a tenth", "mode_collapse", 700,
        {"lr_g": 2e-3, "lr_d": 2e-5},
    ),
    Case(
        "three of ten classes are all that D is shown", "partial_collapse", 800, {},
        images=_footwear,
    ),
    Case(
        "16 images are the whole data", "copies", 2400,
        {"batch_size": 16, "ngf": 32, "ndf": 32},
        images=lambda: np.arange(16), only=True,
    ),
    Case("D's learning rate is 1e32", "nonfinite", 100, {"lr_d": 1e32}),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A case, how many of its runs were told as what they are, when, and how often other faults
    were found."""

    case: Case
    runs: int
    right: int
    steps: Sequence[int]
    others: Counter[str]

    def cells(self) -> list[str]:
        """Of the table."""
        steps = self.steps
        when = f"{statistics.median(steps):.0f} ({min(steps)} to {max(steps)})" if steps else ""
        others = ", ".join(f"{count} {FAULTS[c].title}" for c, count in self.others.items())
        expected = FAULTS[self.case.code].title if self.case.code else "nothing"
        return [self.case.how, expected, f"{self.right} of {self.runs}", when, others]


def diagnose(case: Case, seeds: Sequence[int]) -> Row:
    """Trains once for every seed."""
    right, steps, others = 0, [], Counter[str]()
    for seed in seeds:
        first = {}
        for finding in case.run(seed):
            if not finding.over:
                first.setdefault(finding.code, finding.step)
        right += case.code in first if case.code else not first
        if case.code in first:
            steps.append(first.pop(case.code))
        others.update(first.keys())
    return Row(case, len(seeds), right, steps, others)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; 1 where a fault was missed or a healthy run got a finding."""
    parser = argparse.ArgumentParser(description="Training broken on purpose, and what is found.")
    parser.add_argument("--seeds", type=int, default=HEALTHY_SEEDS)
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options: Any = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        rows.append(diagnose(case, range(options.seeds)))
        print(*rows[-1].cells(), sep=" | ", file=sys.stderr, flush=True)
    table = [
        "| what is wrong | to be found | found | at step | found as well |",
        "|---|---|---:|---:|---|",
        *("| " + " | ".join(row.cells()) + " |" for row in rows),
    ]
    publish(
        "What the monitor says of training broken on purpose",
        "DCGAN for 16x16 pixels, width 8 to 32, on Fashion-MNIST. A fault is said once it has been "
        "seen for 100 steps, and but for frozen losses and NaN not before step 300.",
        table,
        f"python tests/diagnosis.py --seeds {options.seeds}",
        options.out,
    )
    return int(any(row.right < row.runs for row in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
