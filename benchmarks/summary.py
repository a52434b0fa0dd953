"""Tables of records (see `benchmarks.measure.describe`), as plain text and as Markdown.

A side is set against the first baseline of its case, and against the fastest one of its own
precision: the peer to beat. The records hold the ratios to all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]


def by_case(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each case, in the order in which they came."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    return cases


def _significant(value: float) -> str:
    """Three significant digits, never in exponent form."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _memory(record: Record) -> str:
    peak = record["peak_memory_bytes"]
    return "–" if peak is None else f"{peak / 2**20:,.0f}"


def _rate(record: Record) -> str:
    median, q1, q3 = (_significant(record[f"images_per_second{end}"]) for end in ("", "_q1", "_q3"))
    return f"{median} ({q1}–{q3})"


def _of_peak(value: float, share: float) -> str:
    return f"{_significant(value)} ({share:.0%})"


def _ratio(record: Record, baseline: str | None) -> str:
    if baseline is None or (record["side"] != baseline and baseline not in record["ratios"]):
        return "–"
    if record["side"] == baseline:
        return "1"
    ratio = record["ratios"][baseline]
    low, high = f"{ratio['low']:.2f}", f"{ratio['high']:.2f}"
    # An interval that holds 1 tells no difference.
    told = "≈ 1" if ratio["low"] <= 1 <= ratio["high"] else f"{ratio['median']:.2f}"
    return f"{told} ({low}–{high})"


def is_memory(record: Record) -> bool:
    """Whether the record counts bytes, not time."""
    return record.get("kind") == "memory"


def best_baseline(records: Iterable[Record], precision: str) -> str | None:
    """Name of the fastest baseline of a precision among the records of a case."""
    peers = [r for r in records if r["baseline"] and r["precision"] == precision]
    return min(peers, key=lambda r: r["milliseconds"])["side"] if peers else None


def _against(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns that compare the sides of a case with its baselines: their heading, and their cells
    for each record."""
    baselines = [record["side"] for record in records if record["baseline"]]
    heading = [f"× {name}" for name in baselines[:1]]
    if len(baselines) > 1:
        heading.append("× best peer, same precision")
    rows = []
    for record in records:
        peers = [*baselines[:1], best_baseline(records, record["precision"])][: len(heading)]
        rows.append([_ratio(record, peer) for peer in peers])
    return heading, rows


def table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of one case, with everything."""
    if is_memory(records[0]):
        return _memory_table(records)
    compared, against = _against(records)
    heading = ["side", "ms", "images/s (quartiles)", "GFLOP/s", "GB/s", "peak MiB", *compared]
    rows = [
        [
            record["side"],
            _significant(record["milliseconds"]),
            _rate(record),
            _of_peak(record["gflop_per_s"], record["share_of_peak_flops"]),
            _of_peak(record["gb_per_s"], record["share_of_peak_bandwidth"]),
            _memory(record),
            *cells,
        ]
        for record, cells in zip(records, against, strict=True)
    ]
    return heading, rows


def narrow_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of one case, with what a page has room for."""
    if is_memory(records[0]):
        return _memory_table(records)
    compared, against = _against(records)
    heading = ["side", "images/s (quartiles)", *compared, "GFLOP/s"]
    rows = [
        [
            record["side"],
            _rate(record),
            *cells,
            _of_peak(record["gflop_per_s"], record["share_of_peak_flops"]),
        ]
        for record, cells in zip(records, against, strict=True)
    ]
    return heading, rows


def _memory_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    heading = ["side", "peak MiB (least–most)", "share of eager, same precision"]
    rows = []
    for record in records:
        ends = ("", "_low", "_high")
        median, low, high = (f"{record[f'peak_memory_bytes{end}'] / 2**20:,.0f}" for end in ends)
        (baseline,) = record["ratios"]
        rows.append([record["side"], f"{median} ({low}–{high})", _ratio(record, baseline)])
    return heading, rows


def headline(records: Sequence[Record]) -> list[str]:
    """pygan's rows of each case, against its first baseline and the fastest of the same precision,
    as Markdown. Without the sides that show a part of pygan."""
    heading: list[str] = []
    rows = []
    for name, of_case in by_case(records).items():
        compared, against = _against(of_case)
        heading = heading or ["networks", "batch", "n", "side", "images/s (quartiles)", *compared]
        for record, cells in zip(of_case, against, strict=True):
            if record["side"] == f"pygan {record['precision']}":
                images, rounds = str(record["images"]), str(record["rounds"])
                rows.append([name, images, rounds, record["side"], _rate(record), *cells])
    return [*markdown_table(heading, rows), ""] if rows else []


def drop_in(records: Sequence[Record]) -> list[str]:
    """What ``pygan.fuse`` alone brings to each network, as Markdown."""
    rows = []
    for name, of_case in by_case(records).items():
        for fused in (record for record in of_case if not record["baseline"]):
            plain = best_baseline(of_case, fused["precision"])
            before = next((record for record in of_case if record["side"] == plain), None)
            rows.append(
                [
                    name.removeprefix("dropin-"),
                    str(fused["images"]),
                    fused["precision"],
                    _significant(before["milliseconds"]) if before else "–",
                    _significant(fused["milliseconds"]),
                    _ratio(fused, plain),
                ]
            )
    heading = ["networks", "batch", "type", "as written, ms", "fused, ms", "×"]
    return markdown_table(heading, rows) if rows else []


LAYER_CASES, THREAD_CASES = "strided_conv-", "strided_conv_threads-"
METHODS = ("direct", "f22", "f42")


def layers(records: Sequence[Record]) -> list[str]:
    """The convolutions by layer and pass, as Markdown: milliseconds of torch in its better layout
    and of each of pygan's methods; then what `automatic` takes."""
    rows = []
    for name, of_case in by_case(records).items():
        if not name.startswith(LAYER_CASES):
            continue
        first = of_case[0]
        by_side = {record["side"]: record for record in of_case}
        torch_side = best_baseline(of_case, first["precision"])
        chosen = f"pygan {first['automatic']}" if first["automatic"] != "none" else torch_side
        taken = by_side.get(chosen) if chosen else None
        sides = [torch_side, *(f"pygan {method}" for method in METHODS)]
        found = [by_side.get(side) if side else None for side in sides]
        rows.append(
            [
                first["layer"],
                first["pass"],
                first["precision"],
                *(_significant(r["milliseconds"]) if r else "–" for r in found),
                first["automatic"],
                _ratio(taken, torch_side) if taken else "–",
                _significant(taken["gflop_per_s"]) if taken else "–",
                f"{taken['share_of_peak_flops']:.0%}" if taken else "–",
            ]
        )
    heading = ["layer", "pass", "type", "torch ms", *(f"{method} ms" for method in METHODS)]
    heading += ["automatic", "× torch", "GFLOP/s", "of peak"]
    return markdown_table(heading, rows) if rows else []


def threads(records: Sequence[Record]) -> list[str]:
    """What a second thread brings to a convolution, as Markdown."""
    rows = []
    for name, of_case in by_case(records).items():
        if name.startswith(THREAD_CASES) and len(of_case) == 2:
            one, two = of_case
            method = one["side"].split()[1].rstrip(",")
            milliseconds = [_significant(record["milliseconds"]) for record in (one, two)]
            speed_up = _ratio(two, one["side"])
            rows.append(
                [one["layer"], one["pass"], one["precision"], method, *milliseconds, speed_up]
            )
    heading = ["layer", "pass", "type", "method", "1 thread ms", "2 threads ms", "× 1 thread"]
    return markdown_table(heading, rows) if rows else []


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def machine_line(record: Record) -> str:
    """Device, versions and measured peaks, in one line."""
    where = record["conditions"]
    line = (
        f"{where['device']}, {_counted(where['cores'], 'core')}, "
        f"{_counted(where['threads'], 'thread')}, pygan kernels {where['isa']}; "
        f"torch {where['torch']}, pygan {where['pygan']}, Python {where['python']}, "
        f"{where['system']}"
    )
    if "peaks" in record:
        peaks = record["peaks"]
        line += (
            f"; measured peaks {_significant(peaks['gflops_fp32'])} GFLOP/s fp32, "
            f"{_significant(peaks['gflops_bf16'])} bf16, {_significant(peaks['gb_per_s'])} GB/s"
        )
    return line


def _coverage(records: Sequence[Record]) -> str:
    reached = [
        ratio["coverage"]
        for record in records
        if not is_memory(record)
        for ratio in record["ratios"].values()
    ]
    return f"{min(reached):.1%}" if reached else "–"


def _how_often(record: Record) -> str:
    """How many samples stand behind a median."""
    return f"runs = {record['runs']}" if is_memory(record) else f"n = {record['rounds']}"


def plain_text(records: Sequence[Record]) -> list[str]:
    """Lines of a table per case for a terminal."""
    lines = [machine_line(records[-1])]
    for name, rows_of_case in by_case(records).items():
        heading, rows = table(rows_of_case)
        columns = list(zip(heading, *rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines += ["", f"{name}: {rows_of_case[0]['about']}; {_how_often(rows_of_case[0])}"]
        for row in (heading, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  " + "  ".join(cells))
    if not all(map(is_memory, records)):
        lines.append("")
        lines.append(
            "×: speed against that baseline, or the fastest of the same type, median over rounds "
            f"(interval of the median, {_coverage(records)})."
        )
    return lines


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(heading) + " |"]
    lines.append("|---" + "|---:" * (len(heading) - 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return lines


def markdown(records: Sequence[Record]) -> list[str]:
    """Lines of a Markdown table per case, pygan's rows in bold."""
    lines: list[str] = []
    for name, rows_of_case in by_case(records).items():
        heading, rows = narrow_table(rows_of_case)
        bold = [
            [f"**{cell}**" for cell in row] if row[0].startswith("pygan") else row for row in rows
        ]
        first = rows_of_case[0]
        about = f"{first['about']}, {_how_often(first)}"
        lines += [f"**{name}** ({about})", "", *markdown_table(heading, bold), ""]
    return lines
