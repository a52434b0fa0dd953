"""How good are the samples of a run? ``python -m pygan.evaluate RUN``.

Samples of the last epoch saved, or of ``--epoch N``, or of every one with ``--every-epoch``, are
set against the run's real images: Fréchet and kernel distance, precision, recall, density,
coverage, copies (`pygan.metrics`), variety and, with a classifier, the classes found. The first row
of the table sets one half of the real images against the other, which is as good as it gets: the
numbers depend on the space of features and on how many samples there are, so only those of one
table compare. Of a streamed run's images a fixed sample stands for all, 8,192 or what fits into
256 MiB. They are added to ``quality.jsonl`` in the run's folder, which the report reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import pygan
from pygan import cli, data
from pygan.checkpoint import load_generator
from pygan.errors import UserError
from pygan.metrics.describe import SPACES, space_of
from pygan.metrics.quality import SORTED, Quality, Reference
from pygan.run_folder import QUALITY, check_writable, damaged_config, read_config, replace_file
from pygan.sample import generate, latents

PROG = "python -m pygan.evaluate"
BATCH = 500
SAMPLES = 10_000
HEADING = (
    "Fréchet", "kernel", "precision", "recall", "density", "coverage", "copies", "variety",
    "classes", "largest", "smallest",
)  # fmt: skip


def draw(
    generator: nn.Module, nz: int, count: int, *, bn: str = "eval", seed: int = 0
) -> np.ndarray:
    """``count`` samples, uint8 ``[count, H, W, C]``; the generator is left as it was."""
    device = next(generator.parameters()).device
    # Whole batches: with statistics of the batch, a short one would be drawn from another model.
    z = latents(BATCH * math.ceil(count / BATCH), nz, seed).to(device)
    return np.concatenate([generate(generator, part, bn=bn) for part in z.split(BATCH)])[:count]


def saved_epochs(run: Path) -> dict[int, Path]:
    """Weights of G by epoch; .safetensors before .pth.

    Raises:
        UserError: none is saved.
    """
    found: dict[int, Path] = {}
    for suffix in ("pth", "safetensors"):
        for path in run.glob(f"netG_epoch_*.{suffix}"):
            number = path.stem.removeprefix("netG_epoch_")
            if number.isdigit():
                found[int(number)] = path
    if not found:
        raise UserError(
            f"{run} holds no netG_epoch_N.safetensors or .pth; give the folder of a run that has "
            "finished an epoch"
        )
    return dict(sorted(found.items()))


def _chosen(epochs: dict[int, Path], options: argparse.Namespace) -> list[int]:
    if options.every_epoch:
        return list(epochs)
    if options.epoch is None:
        return [max(epochs)]
    if options.epoch not in epochs:
        raise UserError(
            f"epoch {options.epoch} of {options.run} is not saved; there are "
            f"{', '.join(map(str, epochs))}"
        )
    return [options.epoch]


def row_of(
    reference: Reference, samples: np.ndarray, *, bn: str = "eval", seed: int = 0
) -> dict[str, Any]:
    """What ``quality.jsonl`` says of samples, but for the epoch that they are of."""
    return {
        "features": reference.space.name,
        "about": reference.space.about,
        "samples": len(samples),
        "bn": bn,
        "seed": seed,
        "distance_of_halves": reference.halves.distance,
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **reference.quality(samples)._asdict(),
    }


def sentence(row: dict[str, Any]) -> str:
    """The row in a line of a log."""
    named = zip(HEADING, cells(row), strict=True)
    return ", ".join(f"{name} {cell}" for name, cell in named if cell != "–")


def add_rows(run: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends figures to ``quality.jsonl``.

    Raises:
        OSError: it cannot be written.
    """
    with open(run / QUALITY, "ab") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quality of the chosen epochs of a run, as the JSON that is written.

    Raises:
        UserError: no run there, or none of the asked epochs or features.
    """
    # First what may be wrong with the run, then with its data.
    config = read_config(options.run)["config"]
    source, follow_links = config.get("data"), config.get("follow_links", False)
    if not isinstance(source, str) or not isinstance(follow_links, bool):
        raise damaged_config(options.run)
    epochs = saved_epochs(options.run)
    chosen = _chosen(epochs, options)
    _, arguments = load_generator(epochs[chosen[0]])
    read = data.stream if config.get("stream") else data.load
    real = read(
        source,
        image_size=arguments["image_size"],
        channels=arguments["channels"],
        follow_links=follow_links,
    ).sample()
    space = space_of(real, options.features)
    reference = Reference(real, space, options.seed)
    rows = []
    for epoch in chosen:
        generator, arguments = load_generator(epochs[epoch])
        pygan.fuse(generator.to(cli.device("auto")))
        way = {"bn": options.bn, "seed": options.seed}
        samples = draw(generator, arguments["nz"], options.number, **way)
        rows.append({**row_of(reference, samples, **way), "epoch": epoch})
    if options.keep:
        try:
            add_rows(options.run, rows)
        except OSError as error:
            raise UserError(
                f"{options.run / QUALITY} cannot be written ({error.strerror}); give --no-keep, "
                "and --json FILE for the figures"
            ) from None
    return {
        "data": source,
        "fingerprint": real.fingerprint,
        "real_images": reference.count,
        "samples": options.number,
        "bn": options.bn,
        "seed": options.seed,
        "about": space.about,
        "halves": reference.halves._asdict(),
        "epochs": [
            {"epoch": row["epoch"], **{name: row[name] for name in Quality._fields}} for row in rows
        ],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row under `HEADING`."""
    q = Quality(**{name: row[name] for name in Quality._fields})
    shares = ["–"] * 3
    if q.shares:
        found = sum(share > 0 for share in q.shares)
        shares = [f"{found} of {len(q.shares)}", f"{max(q.shares):.1%}", f"{min(q.shares):.1%}"]
    return [
        f"{q.distance:.2f}", f"{q.kernel:.4f}", f"{q.precision:.1%}", f"{q.recall:.1%}",
        f"{q.density:.2f}", f"{q.coverage:.1%}", f"{q.copies:.1%}", f"{q.variety:.2f}", *shares,
    ]  # fmt: skip


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table."""
    yield (
        f"{result['samples']:,} samples against {result['real_images']:,} real images of "
        f"{result['data']}, in the features of {result['about']}; batch norm: {result['bn']}"
    )
    yield ""
    rows = [["epoch", *HEADING], ["real", *cells(result["halves"])]]
    rows += [[str(row["epoch"]), *cells(row)] for row in result["epochs"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def command_line() -> cli.Parser:
    """The options that :func:`measure` takes."""
    parser = cli.Parser(prog=PROG, description="Quality of the samples of a run.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run of pygan.train")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--epoch", type=cli.whole_number(0), help="default: the last one saved")
    which.add_argument("--every-epoch", action="store_true", help="all that are saved")
    add("-n", "--number", type=cli.whole_number(SORTED), default=SAMPLES, metavar="N",
        help=f"samples; default {SAMPLES:,}")  # fmt: skip
    add("--features", choices=SPACES, default="auto",
        help="space of the comparison; auto: classifier where the data has labels, else inception "
        "where torch-fidelity is installed, else pixels")  # fmt: skip
    add("--bn", choices=("eval", "batch"), default="eval", help="as in pygan.sample")
    add("--seed", type=cli.whole_number(0, cli.SEED_MAX), default=0, help="of the latents")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add("--keep", action=argparse.BooleanOptionalAction, default=True,
        help=f"add them to {QUALITY} of the run (default)")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""

    def body() -> int:
        options = command_line().parse_args(arguments)
        if options.json is not None:
            check_writable(options.json, "--json")
        result = measure(options)
        for line in report(result):
            print(line)
        if options.json is not None:
            replace_file(options.json, (json.dumps(result, indent=1) + "\n").encode())
        return 0

    return cli.run(PROG, body)


if __name__ == "__main__":
    sys.exit(main())
