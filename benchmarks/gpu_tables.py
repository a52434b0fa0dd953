"""The pages of `benchmarks.gpu_suite`: layers, steps, and the targets reached and missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_peers import ANCHOR
from benchmarks.gpu_targets import against, model_rows, steps_by_case, target_rows
from benchmarks.summary import markdown_table
from benchmarks.targets import NO_ROW, ratio_text

Record = dict[str, Any]
LAUNCHED = "launched one by one"


def best_peaks(starts: Iterable[Record]) -> dict[str, float]:
    """The best of each that any part measured."""
    peaks: dict[str, float] = {}
    for start in starts:
        for name, value in start["peaks"].items():
            peaks[name] = max(value, peaks.get(name, 0.0))
    return peaks


def tests(path: Path) -> dict[str, Any] | None:
    """Counts of a JUnit file and the names of what failed; None without one."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    cases = list(root.iter("testcase"))
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for case in cases:
        for kind, tags in kinds.items():
            if any(case.find(tag) is not None for tag in tags):
                found[kind].append(f"{case.get('classname')}::{case.get('name')}")
    passed = len(cases) - sum(map(len, found.values()))
    return {"passed": passed, "skipped": len(found["skipped"]), "failed": found["failed"]}


def joined(results: Sequence[Record]) -> Record:
    """Several runs as one; of a part that ran in several, what the last of them found.

    Conditions, versions and date are the last run's, and the commands of all are kept.
    """
    last = {part["part"]: i for i, result in enumerate(results) for part in result["parts"]
            if part["state"] != "left out"}  # fmt: skip
    records, parts = [], []
    for i, result in enumerate(results):
        records += [each for each in result["records"] if last.get(each["part"], i) == i]
        parts += [each for each in result["parts"] if last.get(each["part"], i) == i]
    return {
        **results[-1],
        "conditions": next((r["conditions"] for r in results[::-1] if r["conditions"]), None),
        "peaks": best_peaks([{"peaks": result["peaks"]} for result in results]),
        "command": "` and `".join(result["command"] for result in results),
        "tests": next((r["tests"] for r in results[::-1] if r["tests"]), None),
        "parts": parts,
        "records": records,
    }


def _of(result: Record, kind: str) -> list[Record]:
    return [record for record in result["records"] if record["kind"] == kind]


def _conditions(result: Record) -> list[str]:
    where, peaks = result["conditions"], result["peaks"]
    if where is None:
        return ["Nothing was measured."]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    lines = [
        f"{where['device']}, {where['logical_cores']} cores; {versions}, pygan {where['pygan']}, "
        f"Python {where['python']}. {result['datetime'][:10]}.",
        f"Measured peaks: {peaks['gflops_bf16'] / 1e3:,.0f} TFLOP/s in bfloat16 and "
        f"{peaks['gflops_fp32'] / 1e3:,.1f} in float32 (a large GEMM), "
        f"{peaks['gb_per_s'] / 1e3:.2f} TB/s (a large copy).",
        "",
        f"`{result['command']}`",
    ]
    if result["dry_run"]:
        lines.insert(0, "**A dry run: none of these numbers means anything.**\n")
    return lines


def layers_page(result: Record) -> list[str]:
    """Convolutions by layer, then the other operations."""
    lines = [
        "# Convolutions of DCGAN and the other operations, on a GPU",
        "",
        *_conditions(result),
        "",
        "bfloat16, channels_last; microseconds of one call in a CUDA graph of many, on data that "
        f"no cache holds, median of the rounds (quartiles). † {LAUNCHED}, Python's time included. "
        "TFLOP/s and GB/s are those of the minimal work, with the share of the measured peak. × is "
        "the speed against cuDNN or torch, with the interval of its median.",
        "",
    ]
    rows, reasons = [], []
    for record in _of(result, "layer"):
        facts = [record[name] for name in ("network", "layer", "pass")] if "pass" in record else []
        cells = [*facts, str(record["batch"]), record["side"]]
        if "missing" in record:
            reasons.append(f"- {' '.join(cells)}: {record['missing']}")
            continue
        flops, share = record["tflop_per_s"], record["share_of_peak_flops"]
        cells += [_time(record), f"{flops:.1f} ({share:.0%})", _bandwidth(record)]
        rows.append([*cells, ratio_text(record.get("ratio"))])
    heading = ["network", "layer", "pass", "batch", "side", "µs", "TFLOP/s", "GB/s", "× cuDNN"]
    lines += [*markdown_table(heading, rows), ""] if rows else []
    rows = []
    for record in _of(result, "operation"):
        cells = [record["case"], record["side"]]
        if "missing" in record:
            reasons.append(f"- {' '.join(cells)}: {record['missing']}")
            continue
        rows.append([*cells, _time(record), _bandwidth(record), ratio_text(record.get("ratio"))])
    heading = ["case", "side", "µs", "GB/s", "× torch"]
    lines += [*markdown_table(heading, rows), ""] if rows else []
    if reasons:
        lines += ["Without a number:", "", *dict.fromkeys(reasons)]
    return lines


def _time(record: Record) -> str:
    middle, q1, q3 = (record[f"microseconds{end}"] for end in ("", "_q1", "_q3"))
    mark = "†" if record["how"] == LAUNCHED else ""
    return f"{middle:.1f}{mark} ({q1:.1f}–{q3:.1f})"


def _bandwidth(record: Record) -> str:
    return f"{record['gb_per_s']:,.0f} ({record['share_of_peak_bandwidth']:.0%})"


def steps_page(result: Record) -> list[str]:
    """A table for each case."""
    lines = [
        "# The whole D+G step, on a GPU",
        "",
        *_conditions(result),
        "",
        "Each side was checked against float64, then timed in turn with the others of its process; "
        f"pygan is in every one. × is how many times as fast `{ANCHOR}` is, within each round, "
        "with the interval of the median. cudnn.benchmark is on for all, float32 convolutions use "
        "TF32, as torch does by itself. Shares are of the measured peak.",
        "",
    ]
    energy = {(r["part"], r["case"], r["side"]): r for r in _of(result, "energy")}
    for case, records in steps_by_case(result).items():
        lines += [f"## {case}", ""]
        rows, reasons = [], []
        for record in records:
            if "missing" in record:
                reasons.append(f"- {record['side']}: {record['missing']}")
                continue
            used = energy.get((record["part"], case, record["side"]))
            rows.append([*_step_cells(record, used), ratio_text(against(records, record))])
        heading = ["side", "ms", "n", "images/s (quartiles)", "TFLOP/s", "MiB", "images/J", "W"]
        lines += [*markdown_table([*heading, "SM MHz", f"× {ANCHOR}"], rows), ""] if rows else []
        lines += ["Without a number:", "", *dict.fromkeys(reasons), ""] if reasons else []
    return lines


def _step_cells(record: Record, used: Record | None) -> list[str]:
    memory = record["peak_memory_bytes"]
    rates = [record[f"images_per_second{end}"] for end in ("", "_q1", "_q3")]
    tflops, share = record["gflop_per_s"] / 1e3, record["share_of_peak_flops"]
    told = [NO_ROW] * 3
    if used is not None:
        told = [f"{used['images_per_joule']:,.0f}", f"{used['watts']:.0f}"]
        told.append(f"{used['sm_mhz']:.0f}" if "sm_mhz" in used else NO_ROW)
    return [
        record["side"],
        f"{record['milliseconds']:.3f}",
        f"{record['rounds']} x {record['iterations']}",
        f"{rates[0]:,.0f} ({rates[1]:,.0f}–{rates[2]:,.0f})",
        f"{tflops:.1f} ({share:.0%})",
        NO_ROW if memory is None else f"{memory / 2**20:,.0f}",
        *told,
    ]


def summary_page(result: Record) -> list[str]:
    """Targets, parts and tests."""
    heading = ["case", "against the fastest of", "must", "aim", f"{ANCHOR}", "verdict"]
    lines = ["# pygan on a GPU", "", *_conditions(result), ""]
    lines += [*markdown_table(heading, target_rows(result)), ""]
    if not result["dry_run"]:
        heading = ["case", "floor, ms", "launches", f"{ANCHOR}, ms", "floor / measured"]
        lines += ["The model of the step at the measured peaks, kernel by kernel:", ""]
        lines += [*markdown_table(heading, model_rows(result)), ""]
    lines += [*markdown_table(["part", "state", "s", "reason"], map(_part, result["parts"])), ""]
    counts = result["tests"]
    if counts is not None:
        failed = counts["failed"]
        lines.append(
            f"Tests marked `gpu`: {counts['passed']} passed, {counts['skipped']} skipped, "
            f"{len(failed)} failed."
        )
        lines += [f"- {name}" for name in failed]
    return lines


def _part(part: Record) -> list[str]:
    return [part["part"], part["state"], f"{part['seconds']:.0f}", part["reason"]]


def pages(result: Record) -> dict[str, str]:
    """Every page as Markdown, by name."""
    made = {"layers": layers_page, "steps": steps_page, "summary": summary_page}
    return {name: "\n".join(page(result)) for name, page in made.items()}
