"""Throughput of data-parallel training on many GPUs, from the time of a step on one.

``python -m benchmarks.many_devices --step-ms 2.0 --batch 128 --link nvlink4-ndr``. Each GPU makes
the step on its own images; the gradients of G and D are all-reduced by rings, first within a node,
then between nodes on the share that each GPU of a node holds. A ring of n takes 2 (n - 1) / n bytes
over its bandwidth and 2 (n - 1) latencies (Patarasu and Yuan 2009). Backward hides ``--overlap`` of
the step's time of it. Synchronised batch norm reduces two sums a channel forward and backward in
every pass, which nothing hides.

``--check`` compares a predicted step with one measured on two gloo processes of one thread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, multiprocessing, nn

from benchmarks.bench_train_step import NZ
from benchmarks.steps import EagerStep, Writing, networks
from benchmarks.summary import markdown_table
from pygan import cli
from pygan.models import dcgan

PROG = "python -m benchmarks.many_devices"
# Passes of batch norm in an update: G once; D on real, on fake, and on fake for G.
PASSES = (1, 3)
CHECK_SIZES = (2**10, 2**23)  # float32 elements
CHECK_ROUNDS, CHECK_BATCH, CHECK_IMAGE = 7, 16, 32


class Link(NamedTuple):
    """GB/s of a GPU in one direction and microseconds, within a node and between nodes."""

    local: int
    inner_gb_per_s: float
    inner_us: float
    outer_gb_per_s: float
    outer_us: float
    source: str


ASSUMED = "latencies are assumptions"
LINKS = {
    "nvlink4-ndr": Link(8, 450, 3, 50, 6, f"NVIDIA DGX H100 datasheet, per GPU; {ASSUMED}"),
    "nvlink3-hdr": Link(8, 300, 3, 25, 6, f"NVIDIA DGX A100 datasheet, per GPU; {ASSUMED}"),
}


class Traffic(NamedTuple):
    """What is reduced in a step: gradient bytes of G and D, channels of each batch norm pass."""

    gradients: tuple[int, int]
    channels: tuple[int, ...]


def traffic(image_size: int, channels: int = 3, width: int = 64) -> Traffic:
    """Counted on the meta device; gradients are float32."""
    with torch.device("meta"):
        models = dcgan(image_size, channels, NZ, width, width)
    g, d = (sum(4 * p.numel() for p in model.parameters()) for model in models)
    normed = [
        layer.num_features
        for model, passes in zip(models, PASSES, strict=True)
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm2d)
        for _ in range(passes)
    ]
    return Traffic((g, d), tuple(normed))


def ring_seconds(size: float, n: int, gb_per_s: float, us: float) -> float:
    """All-reduce of ``size`` bytes by a ring of ``n``."""
    return 2 * (n - 1) / n * size / (1e9 * gb_per_s) + 2e-6 * (n - 1) * us


def reduce_seconds(size: float, gpus: int, link: Link) -> float:
    """All-reduce within nodes and between them; the GPUs of a node share the outer ring's work."""
    local = min(gpus, link.local)
    inner = ring_seconds(size, local, link.inner_gb_per_s, link.inner_us)
    return inner + ring_seconds(size / local, gpus // local, link.outer_gb_per_s, link.outer_us)


def step_seconds(
    alone: float, gpus: int, found: Traffic, link: Link, overlap: float, *, synchronised: bool
) -> float:
    """A data-parallel step, whose time on one GPU is ``alone`` seconds."""
    reduced = sum(reduce_seconds(size, gpus, link) for size in found.gradients)
    seconds = alone + max(0.0, reduced - overlap * alone)
    if synchronised:
        # Two float32 sums a channel, forward and again backward.
        seconds += 2 * sum(reduce_seconds(8 * c, gpus, link) for c in found.channels)
    return seconds


def rows(
    alone: float, fixed: float, batch: int, found: Traffic, link: Link, overlap: float
) -> Iterator[list[str]]:
    """Weak and strong scaling; ``fixed`` seconds of the step do not shrink with its batch."""
    for gpus in (2**k for k in range(11)):
        cells = [str(gpus)]
        shared = fixed + (alone - fixed) / gpus
        for images, seconds in ((gpus * batch, alone), (batch, shared)):
            for synchronised in (False, True):
                if images < gpus:
                    cells.append("less than an image")
                    continue
                whole = step_seconds(seconds, gpus, found, link, overlap, synchronised=synchronised)
                efficiency = images / whole / (gpus * batch / alone)
                cells.append(f"{images / whole:,.0f} ({efficiency:.0%})")
        yield cells


def _median(call: Any) -> float:
    call()
    seconds = []
    for _ in range(CHECK_ROUNDS):
        distributed.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    writing = Writing(channels_last=True, by_hand=True)
    nets = networks(dcgan(CHECK_IMAGE), torch.device("cpu"), channels_last=True, fused_adam=True)
    loop = EagerStep(nets, NZ, writing)
    real = torch.rand(CHECK_BATCH, 3, CHECK_IMAGE, CHECK_IMAGE) * 2 - 1
    told = [_median(lambda: loop.step(real))]
    for size in CHECK_SIZES:
        data = torch.ones(size)
        told.append(_median(lambda data=data: distributed.all_reduce(data)))

    def average(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        bucket = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(bucket)
        bucket /= 2
        for grad, part in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    for optimizer in (nets.opt_g, nets.opt_d):
        optimizer.register_step_pre_hook(average)
    told.append(_median(lambda: loop.step(real)))
    if rank == 0:
        torch.save(told, f"{folder}/told.pt")
    distributed.destroy_process_group()


def line_through(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """GB/s and microseconds of a ring of 2 that takes ``seconds`` for ``sizes`` bytes."""
    slope = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    return 1e-9 / slope, 1e6 * (seconds[0] - slope * sizes[0]) / 2


def check() -> list[str]:
    """Predicted and measured step of two processes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, (folder,), nprocs=2)
        alone, small, large, measured = torch.load(Path(folder) / "told.pt")
    gb_per_s, us = line_through([4 * size for size in CHECK_SIZES], [small, large])
    link = Link(2, gb_per_s, us, gb_per_s, us, "measured")
    predicted = step_seconds(alone, 2, traffic(CHECK_IMAGE), link, 0.0, synchronised=False)
    return [
        f"gloo, 2 processes: {gb_per_s:.2f} GB/s, {us:.0f} µs; step alone {1e3 * alone:.1f} ms",
        f"data-parallel step: predicted {1e3 * predicted:.1f} ms, measured {1e3 * measured:.1f} ms "
        f"({measured / predicted:.2f}x)",
    ]


def _model(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Data-parallel throughput on 1 to 1,024 GPUs.")
    add = parser.add_argument
    positive, share = cli.real_number(0, open_low=True), cli.real_number(0, 1, open_high=False)
    add("--check", action="store_true", help="two gloo processes, predicted and measured")
    add("--step-ms", type=positive, help="measured time of a step on one GPU")
    add("--fixed-ms", type=cli.real_number(0), default=0.0, help="of it at any batch; default 0")
    add("--batch", type=cli.whole_number(1), default=128, help="images of that step; default 128")
    add("--image-size", type=cli.image_size, default=64, help="default 64")
    add("--link", choices=LINKS, default="nvlink4-ndr", help="default nvlink4-ndr")
    add("--overlap", type=share, default=0.5, help="share of the step that hides; default 0.5")
    options = parser.parse_args(arguments)
    if options.check:
        print("\n".join(check()))
        return 0
    if options.step_ms is None or options.fixed_ms > options.step_ms:
        parser.error("give --step-ms, the measured time of a step, of at least --fixed-ms")
    found, link = traffic(options.image_size), LINKS[options.link]
    g, d = (size / 1e6 for size in found.gradients)
    print(f"Gradients: {g:.1f} MB of G, {d:.1f} MB of D. Links: {link.source}.")
    print(f"Assumed: {options.overlap:.0%} of the step hides communication.\n")
    ways = ("weak, local norm", "weak, synchronised", "strong, local norm", "strong, synchronised")
    times = 1e-3 * options.step_ms, 1e-3 * options.fixed_ms
    body = list(rows(*times, options.batch, found, link, options.overlap))
    print("\n".join(markdown_table(["GPUs", *ways], body)))
    print("\nImages a second (share of as many single GPUs).")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _model(arguments))


if __name__ == "__main__":
    sys.exit(main())
