"""norm_act, image_batch and gan_loss on a GPU: torch and pygan, in time and GB/s.

``python -m benchmarks.gpu_operations --out FILE.jsonl --name operations`` takes the cases of
`benchmarks.bench_norm_act`, `bench_image_batch` and `bench_gan_loss` at the batches of a GPU. Each
side is checked against float64, then replayed as a CUDA graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import bench_gan_loss, bench_image_batch, bench_norm_act, gpu_records
from benchmarks.bench_norm_act import Layer
from benchmarks.gpu_layers import rounds
from benchmarks.gpu_records import Part
from benchmarks.gpu_replay import Replay
from benchmarks.measure import Case
from benchmarks.ratio import speed_ratio, spread

PROG = "python -m benchmarks.gpu_operations"
BATCHES = (128, 1024)
PATCHES = (128, 1, 30, 30)
IMAGES = (20_000, 64, 64, 3)
REPEATS = 20


def cases(tiny: bool) -> Iterator[Case]:
    """In bfloat16, as on a GPU a training is."""
    if tiny:
        yield bench_norm_act.case_of(Layer("G", 3, 2, "relu", 1, batch=4), "bf16")
        yield bench_gan_loss.case_of("d_loss", (4,), "bf16")
        yield bench_image_batch.case_of((5, 4, 4, 3), "bf16", size=2)
        return
    for batch in BATCHES:
        for layer in bench_norm_act.LAYERS:
            yield bench_norm_act.case_of(layer._replace(batch=batch), "bf16")
        yield bench_image_batch.case_of(IMAGES, "bf16", size=batch)
        for loss in bench_gan_loss.WAYS:
            yield bench_gan_loss.case_of(loss, (batch,), "bf16")
    yield bench_gan_loss.case_of("d_loss", PATCHES, "bf16")


def time_case(part: Part, case: Case) -> None:
    """Records of all sides of a case."""
    replays: dict[str, Replay] = {}
    what = {"case": case.name, "about": case.about}
    repeats = 1 if part.tiny else REPEATS
    for side in case.sides:
        try:
            case.check(part.device, [side])
            build = functools.partial(side.build, part.device)
            replays[side.name] = Replay([build], part.device, repeats)
        except Exception as error:
            part.missing("operation", error, **what, side=side.name)
    seconds = dict(zip(replays, rounds(list(replays.values()), part), strict=True))
    for side in case.sides:
        if side.name not in replays:
            continue
        median, q1, q3 = spread(seconds[side.name])
        gb_per_s = side.work.bytes / median / 1e9
        record = {
            **what,
            "side": side.name,
            "how": replays[side.name].how,
            "baseline": side.baseline,
            "microseconds": 1e6 * median,
            "microseconds_q1": 1e6 * q1,
            "microseconds_q3": 1e6 * q3,
            "rounds": len(seconds[side.name]),
            "bytes": side.work.bytes,
            "gb_per_s": gb_per_s,
            "share_of_peak_bandwidth": gb_per_s / part.peaks["gb_per_s"],
        }
        if not side.baseline and "torch" in replays:
            ratio = speed_ratio(seconds[side.name], seconds["torch"])
            record["ratio"] = ratio._asdict()
        part.add("operation", record)


def _measure(part: Part, options: Any) -> None:
    for case in cases(part.tiny):
        if part.left() <= 0:
            part.missing("operation", "the time was up", case=case.name, side="all")
            continue
        time_case(part, case)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the part and returns its exit status (see `pygan.cli`)."""
    parser = gpu_records.parser(PROG, "norm_act, image_batch and gan_loss, torch and pygan.")
    return gpu_records.run(parser, arguments, _measure)


if __name__ == "__main__":
    sys.exit(main())
