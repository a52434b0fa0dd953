"""Is any published network slower behind ``pygan.fuse``? ``python -m benchmarks.every_network``.

Every generator and discriminator of `benchmarks.published`, with the channels that such networks
have, runs forward and backward as it is and fused, in turn: all networks in float32 and under a
bfloat16 autocast, contiguous as scripts have them. Outputs are checked against float64 first. Of
each network: how many times as fast, the median over the rounds and its 95% interval.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pygan
from benchmarks import command, machine, summary
from benchmarks.bench_dropin import DEPTH, without_dropout
from benchmarks.correct import CONVOLUTION_FACTOR, FLOOR, relative_error, require_right
from benchmarks.measure import QUICK, Call, Plan, interleave, warm_up
from benchmarks.published import (
    conditional,
    dcgan,
    residual,
    sound,
    stackgan,
    translation,
    volumes,
    wgan,
)
from benchmarks.ratio import speed_ratio
from pygan import cli
from pygan.errors import UserError

PROG = "python -m benchmarks.every_network"
PLAN = Plan(rounds=11, sample_seconds=0.05, warmup_calls=6, warmup_seconds=0.3, peak_repeats=0)
QUICK_PLAN = replace(QUICK, warmup_calls=6)  # what reads a layer's output is learnt in the first
LEAST = 0.97  # times as fast: what noise and looking may cost
PATIENCE = 20.0  # seconds


class Network(NamedTuple):
    """A module, and the shapes that it takes; "label" stands for a class of each sample."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    batch: int


def _pair(
    name: str,
    generator: tuple[Callable[[], nn.Module], tuple[Any, ...]],
    discriminator: tuple[Callable[[], nn.Module], tuple[Any, ...]],
    batch: int = 64,
) -> dict[str, Network]:
    parts = (("G", generator), ("D", discriminator))
    return {f"{name} {part}": Network(*made, batch) for part, made in parts}


_RGB = (3, 32, 32)
NETWORKS = (
    _pair(
        "DCGAN",
        (lambda: dcgan.SequentialGenerator(nz=100, ngf=64), ((100, 1, 1),)),
        (lambda: dcgan.SequentialDiscriminator(ndf=64), (_RGB,)),
    )
    | _pair(
        "DCGAN, attributes",
        (lambda: dcgan.AttributeGenerator(100, 64), ((100,),)),
        (lambda: dcgan.AttributeDiscriminator(64), ((1, 32, 32),)),
    )
    | _pair(
        "DCGAN, upsampling",
        (lambda: dcgan.UpsampleGenerator(100, 32, 3, 64), ((100,),)),
        (lambda: dcgan.DropoutDiscriminator(32, 3, 64), (_RGB,)),
    )
    | _pair(
        "WGAN, MLP",
        (lambda: wgan.MLPGenerator(100, (1, 28, 28), 256), ((100,),)),
        (lambda: wgan.MLPCritic((1, 28, 28), 256), ((1, 28, 28),)),
    )
    | _pair(
        "WGAN-GP",
        (lambda: wgan.ConvGenerator(64), ((12,),)),
        (lambda: wgan.ConvCritic(64), ((3, 16, 16),)),
    )
    | _pair(
        "conditional, MLP",
        (lambda: conditional.ConditionalGenerator(100, 256), ((100,), "label")),
        (lambda: conditional.ConditionalDiscriminator(512), ((1, 8, 8), "label")),
    )
    | _pair(
        "conditional, maps",
        (lambda: conditional.ConvConditionalGenerator(64, 100), ((100, 1, 1), "label")),
        (lambda: conditional.ConvConditionalDiscriminator(64), ((1, 16, 16), "label")),
    )
    | _pair(
        "auxiliary classifier",
        (lambda: conditional.ClassifierGenerator(100, 64), ((100,), "label")),
        (lambda: conditional.ClassifierDiscriminator(64), ((1, 16, 16), "label")),
    )
    | _pair(
        "SNGAN",
        (lambda: residual.SNGenerator(128, 128, 128), ((128,),)),
        (lambda: residual.SNDiscriminator(64), (_RGB,)),
        32,
    )
    | _pair(
        "BigGAN",
        (lambda: residual.BigGenerator(12, 64), ((12,), "label")),
        (lambda: residual.ProjectionDiscriminator(64), (_RGB, "label")),
        32,
    )
    | _pair(
        "R3GAN",
        (lambda: residual.R3Generator(64, 64), ((64,),)),
        (lambda: residual.R3Discriminator(64), ((3, 16, 16),)),
    )
    | _pair(
        "pix2pix",
        (lambda: translation.UnetGenerator(64), ((3, 128, 128),)),
        (lambda: translation.PatchDiscriminator(64), ((3, 128, 128), (3, 128, 128))),
        1,
    )
    | _pair(
        "CycleGAN",
        (lambda: translation.ResnetGenerator(32), ((3, 64, 64),)),
        (
            lambda: translation.PatchDiscriminator(64, nn.InstanceNorm2d, 3),
            ((3, 64, 64),),
        ),
        1,
    )
    | _pair(
        "SRGAN",
        (lambda: translation.SRGenerator(64), ((3, 24, 24),)),
        (lambda: translation.SRDiscriminator(64), ((3, 48, 48),)),
        8,
    )
    | _pair(
        "StackGAN",
        (
            lambda: stackgan.Generator(ngf=64),
            ((8,), (stackgan.TEXT,), (stackgan.CONDITION,)),
        ),
        (lambda: stackgan.Discriminator(64), ((3, 16, 16), (stackgan.TEXT,))),
        32,
    )
    | _pair(
        "3-D GAN",
        (lambda: volumes.ShapeGenerator(200, 32), ((200,),)),
        (lambda: volumes.ShapeDiscriminator(32), ((1, 16, 16, 16),)),
        16,
    )
    | _pair(
        "video GAN",
        (lambda: volumes.VideoGenerator(100, 32), ((100,),)),
        (lambda: volumes.VideoDiscriminator(32), ((3, 8, 16, 16),)),
        16,
    )
    | _pair(
        "WaveGAN",
        (lambda: sound.WaveGenerator(100, 64), ((100,),)),
        (lambda: sound.WaveDiscriminator(64), ((1, 256),)),
    )
    | _pair(
        "HiFi-GAN",
        (lambda: sound.HiFiGenerator(80, 64), ((80, 32),)),
        (lambda: sound.PeriodDiscriminator(3, 32), ((1, 4096),)),
        8,
    )
)


def way(name: str, fused: bool, bf16: bool, dtype: torch.dtype = torch.float32) -> Call:
    """A call goes forward and backward, with the gradients of inputs and parameters, and returns
    the outputs."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    module = network.make().to(dtype)
    generator = torch.Generator().manual_seed(7)
    inputs: list[Tensor] = []
    for shape in network.inputs:
        if shape == "label":
            classes = conditional.CLASSES
            inputs.append(torch.randint(classes, (network.batch,), generator=generator))
        else:
            x = torch.randn(network.batch, *shape, generator=generator)
            inputs.append(x.to(dtype).requires_grad_())
    if fused:
        pygan.fuse(module)
    leaves = [x for x in inputs if x.requires_grad] + list(module.parameters())

    def call() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = module(*inputs)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [y.detach() for y in outputs]

    return call


def check(name: str, precision: str) -> None:
    """Outputs against float64.

    Raises:
        CheckFailed: the fused network is wrong.
    """

    def outputs(fused: bool, bf16: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        call = way(name, fused, bf16, dtype)
        for _ in range(QUICK_PLAN.warmup_calls):
            torch.manual_seed(1)
            found = without_dropout(call)
        return found

    truth, bf16 = outputs(False, False, torch.float64), precision == "bf16"
    errors = [{"the output": relative_error(outputs(on, bf16), truth)} for on in (True, False)]
    floors = {"the output": DEPTH * FLOOR[precision]}
    require_right(f"{name}, fused", precision, *errors, CONVOLUTION_FACTOR[precision], floors)


def compare(name: str, precision: str, plan: Plan, patience: float = 0.0) -> dict[str, Any]:
    """Seconds of a call on both sides, and the ratio. Rounds are added for ``patience`` seconds
    while the ratio's interval holds `LEAST`."""
    check(name, precision)
    device = torch.device("cpu")
    calls = [way(name, on, precision == "bf16") for on in (True, False)]
    once = [warm_up(call, plan, device) for call in calls]
    each = [max(1, math.ceil(plan.sample_seconds / seconds)) for seconds in once]
    fused: list[float] = []
    plain: list[float] = []
    end = time.perf_counter() + patience
    while True:
        more = interleave(calls, each, plan.rounds, device)
        for row, times, n in zip((fused, plain), more, each, strict=True):
            row += [t / n for t in times]
        ratio = speed_ratio(fused, plain)
        if not ratio.low < LEAST <= ratio.high or time.perf_counter() > end:
            break
    return {
        "network": name,
        "precision": precision,
        "seconds": {"fused": fused, "plain": plain},
        "ratio": ratio._asdict(),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of all networks whose name holds a word that is asked for."""
    plan, patience = (QUICK_PLAN, 0.0) if options.quick else (PLAN, PATIENCE)
    words = options.only or [""]
    chosen = [name for name in NETWORKS if any(word in name for word in words)]
    if not chosen:
        raise UserError(f"no network is called {' or '.join(words)}; there are {list(NETWORKS)}")
    found = []
    precisions = machine.precisions(torch.device("cpu"))
    for name in chosen:
        for precision in precisions:
            found.append(compare(name, precision, plan, patience))
            ratio = found[-1]["ratio"]["median"]
            print(f"{name}, {precision}: {ratio:.2f}", file=sys.stderr, flush=True)
    return {
        "kind": "networks",
        "command": f"{PROG}{' --quick' if options.quick else ''}",
        "conditions": machine.conditions(torch.device("cpu")),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": options.quick,
        "networks": found,
    }


def _cell(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
    # A slower one is one whose whole interval is.
    return f"**{text}**" if ratio["high"] < LEAST else text


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table, and how many networks are slower."""
    rows = []
    precisions = list(dict.fromkeys(row["precision"] for row in result["networks"]))
    for name in dict.fromkeys(row["network"] for row in result["networks"]):
        by = {r["precision"]: r for r in result["networks"] if r["network"] == name}
        plain = [f"{1e3 * min(by[p]['seconds']['plain']):.1f}" for p in precisions]
        rows.append([name, *(_cell(by[p]) for p in precisions), *plain])
    heading = ["network", *precisions, *(f"plain {p}, ms" for p in precisions)]
    yield from summary.markdown_table(heading, rows)
    ratios = [(f"{r['network']} {r['precision']}", r["ratio"]) for r in result["networks"]]
    slower = [name for name, ratio in ratios if ratio["high"] < LEAST]
    unsure = [name for name, ratio in ratios if ratio["low"] < LEAST <= ratio["high"]]
    yield ""
    yield (
        f"{len(slower)} of {len(ratios)} are slower than {LEAST} times plain torch's speed"
        f"{_listed(slower)}; of {len(unsure)} it is not told{_listed(unsure)}."
    )


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def page(result: dict[str, Any]) -> list[str]:
    """Markdown of the table and of what it is of."""
    return [
        "# Published networks behind `pygan.fuse`",
        "",
        "Forward and backward of each network alone, in float32 and, where torch does not only "
        "emulate it, under a bfloat16 autocast, contiguous: how many times as fast as the same "
        "network in plain torch, the median over interleaved rounds and its 95% interval. Where "
        "that holds the limit, rounds are added for "
        f"{PATIENCE:.0f} seconds.",
        "",
        *report(result),
        "",
        f"{summary.machine_line(result)}: `{result['command']}`.",
        "",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    parser = cli.Parser(prog=PROG, description="Every published network, fused and plain.")
    add = parser.add_argument
    add("--only", nargs="*", metavar="WORD", help="networks whose name holds one")
    add("--quick", action="store_true", help="few rounds: does the benchmark work?")
    add("--json", type=Path, metavar="OUT", help="write the figures there as well")
    return command.run(parser, measure, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
