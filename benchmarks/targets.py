"""What pygan is to reach on a CPU, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.summary import Record, best_baseline, by_case, markdown_table

BEST = "the fastest peer of the same type"
NO_ROW = "–"


class Target(NamedTuple):
    """``side`` is to be ``must`` and better ``aim`` times as fast as ``peer``: a side, or `BEST`.
    Of ``memory`` it is to take that share at most."""

    case: str
    side: str
    peer: str
    must: float
    aim: float
    memory: bool = False


# Of a step of DCGAN: precision, peer, must and aim.
_STEP = (
    ("fp32", "eager fp32", 2.2, 2.8),
    ("fp32", "eager fp32 by hand", 1.9, 2.3),
    ("bf16", "eager fp32", 3.4, 4.5),
    ("bf16", "eager bf16 by hand", 1.75, 2.2),
)
TARGETS = (
    *(
        Target(case, f"pygan {precision}", peer, share * must, share * aim)
        for case, share in (("dcgan64", 1.0), ("dcgan64-batch512", 0.9), ("dcgan64-width48", 0.9))
        for precision, peer, must, aim in _STEP
    ),
    Target("dcgan32", "pygan fp32", "eager fp32 by hand", 1.7, 2.2),
    Target("dcgan32", "pygan bf16", "eager bf16 by hand", 1.7, 2.2),
    Target("dropin-upsample32", "pygan fp32", "eager fp32", 2.0, 3.0),
    Target("dropin-resnet32", "pygan fp32", "eager fp32", 2.0, 3.0),
    Target("sampling-dcgan64", "pygan fp32", BEST, 1.3, 1.6),
    Target("sampling-dcgan64", "pygan bf16", BEST, 1.3, 1.6),
    Target("memory-dcgan64", "pygan fp32", "eager fp32", 0.75, 0.5, memory=True),
    Target("memory-dcgan64", "pygan bf16", "eager bf16", 0.75, 0.5, memory=True),
)


def ratio_text(ratio: Record | None) -> str:
    """A ratio and the interval of its median."""
    if ratio is None:
        return NO_ROW
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def verdict(reached: float, must: float, aim: float) -> str:
    """In words; more is better."""
    return "aim reached" if reached >= aim else "met" if reached >= must else "missed"


def _rows(records: Sequence[Record]) -> Iterator[list[str]]:
    cases = by_case(records)
    for target in TARGETS:
        of_case = cases.get(target.case, [])
        record = next((r for r in of_case if r["side"] == target.side), None)
        if record is None:
            continue
        peer = target.peer if target.peer != BEST else best_baseline(of_case, record["precision"])
        ratio = record["ratios"].get(peer)
        if ratio is None:
            continue
        sign, unit = (-1, " of the memory") if target.memory else (1, "x")
        limits = [f"{limit:g}{unit}" for limit in (target.must, target.aim)]
        told = verdict(sign * ratio["median"], sign * target.must, sign * target.aim)
        yield [target.case, target.side, str(peer), *limits, ratio_text(ratio), told]


def table(records: Sequence[Record]) -> list[str]:
    """The targets whose records are there, as Markdown; empty without any."""
    rows = list(_rows(records))
    heading = ["case", "side", "against", "must", "aim", "measured", ""]
    return markdown_table(heading, rows) if rows else []
