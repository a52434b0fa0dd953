"""Tables of records (see `benchmarks.measure.describe`), as plain text and as Markdown."""

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


def _ratio(record: Record, baseline: str) -> str:
    if record["side"] == baseline:
        return "1"
    ratio = record["ratios"][baseline]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of one case."""
    baselines = [record["side"] for record in records if record["baseline"]]
    heading = ["side", "ms", "images/s (quartiles)", "GFLOP/s", "GB/s", "peak MiB"]
    heading += [f"x {name}" for name in baselines]
    rows = [
        [
            record["side"],
            _significant(record["milliseconds"]),
            _rate(record),
            _of_peak(record["gflop_per_s"], record["share_of_peak_flops"]),
            _of_peak(record["gb_per_s"], record["share_of_peak_bandwidth"]),
            _memory(record),
            *(_ratio(record, name) for name in baselines),
        ]
        for record in records
    ]
    return heading, rows


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def machine_line(record: Record) -> str:
    """Device, versions and measured peaks, in one line."""
    where, peaks = record["conditions"], record["peaks"]
    return (
        f"{where['device']}, {_counted(where['cores'], 'core')}, "
        f"{_counted(where['threads'], 'thread')}, pygan kernels {where['isa']}; "
        f"torch {where['torch']}, pygan {where['pygan']}, Python {where['python']}, "
        f"{where['system']}; measured peaks {_significant(peaks['gflops_fp32'])} GFLOP/s fp32, "
        f"{_significant(peaks['gflops_bf16'])} bf16, {_significant(peaks['gb_per_s'])} GB/s"
    )


def _coverage(records: Sequence[Record]) -> str:
    reached = [ratio["coverage"] for record in records for ratio in record["ratios"].values()]
    return f"{min(reached):.1%}" if reached else "–"


def plain_text(records: Sequence[Record]) -> list[str]:
    """Lines of a table per case for a terminal."""
    lines = [machine_line(records[-1])]
    for name, rows_of_case in by_case(records).items():
        heading, rows = table(rows_of_case)
        columns = list(zip(heading, *rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines += ["", f"{name}: {rows_of_case[0]['about']}; n = {rows_of_case[0]['rounds']}"]
        for row in (heading, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  " + "  ".join(cells))
    lines.append("")
    lines.append(
        f"Ratio: speed against that baseline, median over rounds (interval of the median, "
        f"{_coverage(records)})."
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
        heading, rows = table(rows_of_case)
        heading = [column.replace("x ", "× ", 1) for column in heading]
        bold = [
            [f"**{cell}**" for cell in row] if row[0].startswith("pygan") else row for row in rows
        ]
        about = f"{rows_of_case[0]['about']}, n = {rows_of_case[0]['rounds']} rounds"
        lines += [f"**{name}** ({about})", "", *markdown_table(heading, bold), ""]
    return lines
