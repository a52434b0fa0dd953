"""Pictures of benchmark results, for a page 800 pixels wide.

`draw` writes those whose records are there: ``steps.png``, images/s of every side of the whole
steps, and ``peers.png``, those of the one case in which compilers take part; ``roofline.png``,
convolutions and pointwise operations against the measured peaks; ``memory.png``; ``scaling.png``;
``timeline.png``, the parts of a step as they follow each other.
The colours are Okabe and Ito's, which the colour-blind tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.summary import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEERS, DARK, PALE = "#D55E00", "#0072B2", "#333333", "#999999"
EVERY_PEER = "dcgan64-compilers"
WIDTH = 8.0  # inches, of 200 dots: sharp where 800 pixels show them
Records = Sequence[Record]


def is_ours(record: Record) -> bool:
    return str(record["side"]).startswith("pygan")


def _figure(height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    every = list(grid.flat)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=DARK)
    return figure, every


def _cases(records: Records) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["case"], []).append(record)
    return found


def _bars(
    axes: Axes, records: Records, value: Callable[[Record], tuple[float, float, float]]
) -> None:
    """A bar for each record with its value at its end; ``value`` gives it with its interval."""
    places = np.arange(len(records))[::-1]
    middle, low, high = (np.array(each) for each in zip(*map(value, records), strict=True))
    colours = [OURS if is_ours(record) else PEERS for record in records]
    axes.barh(
        places, middle, color=colours, height=0.72,
        xerr=np.maximum([middle - low, high - middle], 0), error_kw={"lw": 1, "ecolor": DARK},
    )  # fmt: skip
    axes.set_yticks(places, [str(record["side"]) for record in records])
    for place, end, text in zip(places, high, middle, strict=True):
        axes.annotate(
            f" {text:,.3g}" if text < 1000 else f" {text:,.0f}", (end, place), va="center",
            fontsize=8, color=DARK,
        )  # fmt: skip
    axes.set_xlim(0, 1.16 * high.max())
    axes.tick_params(axis="y", length=0)


def steps(records: Records) -> Figure:
    """Images/s of each side of whole training steps, medians with quartiles."""
    cases = _cases(records)
    columns = 1 if len(cases) == 1 else 2
    rows = -(-len(cases) // columns)
    most = max(map(len, cases.values()))
    figure, panels = _figure(rows * (0.9 + 0.23 * most), columns, rows)
    for axes, (name, sides) in zip(panels, cases.items(), strict=False):
        _bars(
            axes,
            sides,
            lambda r: (
                r["images_per_second"],
                r["images_per_second_q1"],
                r["images_per_second_q3"],
            ),
        )
        axes.set_title(f"{name}, batch {sides[0]['images']}", fontsize=9, loc="left", color=DARK)
    for axes in panels[len(cases) :]:
        axes.remove()
    figure.supxlabel("images/s of a whole D+G step (median, quartiles)", fontsize=9, color=DARK)
    return figure


def memory(records: Records) -> Figure:
    """Peak memory of training by side."""
    figure, (axes,) = _figure(0.9 + 0.25 * len(records))
    mib = 2.0**20
    _bars(
        axes,
        records,
        lambda r: (
            r["peak_memory_bytes"] / mib,
            r["peak_memory_bytes_low"] / mib,
            r["peak_memory_bytes_high"] / mib,
        ),
    )
    axes.set_xlabel(f"MiB at the peak, {records[0]['about']}", fontsize=9, color=DARK)
    return figure


def roofline(records: Records) -> Figure:
    """FLOP/s over FLOPs a byte, pygan's and the fastest other side of each case, under the peaks
    of this run. FLOPs are those of the plain algorithm, so Winograd may pass the roof."""
    precisions = [p for p in ("fp32", "bf16") if any(r["precision"] == p for r in records)]
    figure, panels = _figure(4.2, len(precisions))
    for axes, precision in zip(panels, precisions, strict=True):
        chosen = [r for r in records if r["precision"] == precision]
        peaks = {
            name: max(r["peaks"][name] for r in chosen)
            for name in (f"gflops_{precision}", "gb_per_s")
        }
        roof, slope = peaks[f"gflops_{precision}"], peaks["gb_per_s"]
        x = np.geomspace(0.2, 1000, 200)
        axes.loglog(x, np.minimum(roof, slope * x), color=DARK, lw=1.5)
        # Left of where the convolutions lie.
        axes.annotate(
            f"{roof:,.0f} GFLOP/s", (roof / slope, 1.08 * roof), ha="center", va="bottom",
            fontsize=8, color=DARK,
        )  # fmt: skip
        axes.annotate(
            f"{slope:,.0f} GB/s", (0.9, slope), ha="right", va="bottom", fontsize=8, color=DARK
        )
        for ours, colour, label in ((False, PEERS, "fastest torch"), (True, OURS, "pygan")):
            best = [
                max(sides, key=lambda r: r["images_per_second"])
                for case in _cases(chosen).values()
                if (sides := [r for r in case if is_ours(r) == ours])
            ]
            axes.scatter(
                [r["flops_per_image"] / r["bytes_per_image"] for r in best],
                [r["gflop_per_s"] for r in best],
                s=16, c=colour, alpha=0.75, lw=0, label=label,
            )  # fmt: skip
        axes.set_title(precision, fontsize=9, loc="left", color=DARK)
        axes.set_xlabel("FLOPs a byte", fontsize=9, color=DARK)
    panels[0].set_ylabel("GFLOP/s of the plain algorithm", fontsize=9, color=DARK)
    panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


_UNITS = {"batch": "batch", "size": "height and width, pixels", "threads": "threads"}


def scaling(series: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds an image along each axis, with linear growth dashed."""
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys(each["axis"] for each in series))
    figure, panels = _figure(3.6, len(names))
    for axes, name in zip(panels, names, strict=True):
        lines = [each for each in series if each["axis"] == name and each["points"]]
        for line in lines:
            x = np.array([point["x"] for point in line["points"]], float)
            y = np.array([1e3 / point["images_per_second"] for point in line["points"]])
            ours, half = line["side"].startswith("pygan"), line["precision"] == "bf16"
            axes.loglog(
                x, y, color=OURS if ours else PEERS, lw=1.6, ls="-" if half else (0, (1, 1)),
                marker="o" if half else "s", ms=3.5, label=line["side"],
            )  # fmt: skip
            if line is lines[-1]:
                power = {"size": 2.0, "threads": -1.0}.get(name, 0.0)
                axes.loglog(x, y[-1] * (x / x[-1]) ** power, color=PALE, lw=1, ls="--")
        ticks = sorted({point["x"] for line in lines for point in line["points"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60 if len(ticks) > 6 else 0)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(_UNITS[name], fontsize=9, color=DARK)
        axes.set_title(lines[0]["fixed"], fontsize=7, loc="left", color=DARK)
    panels[0].set_ylabel("ms an image (dashed: linear)", fontsize=9, color=DARK)
    panels[0].legend(fontsize=7, frameon=False)
    return figure


# Of the parts of a step: those that are not here are drawn as the last.
PARTS = {
    "strided_conv up": "#0072B2",
    "strided_conv down": "#56B4E9",
    "strided_conv weight_grad": "#D55E00",
    "norm_act": "#009E73",
    "torch convolution": "#CC79A7",
    "Adam": "#E69F00",
    "others": "#999999",
}


def timeline(precisions: Sequence[Mapping[str, Any]]) -> Figure:
    """What ran when in one step: phases above, operations below, a panel for each precision."""
    figure, panels = _figure(0.7 + 1.25 * len(precisions), rows=len(precisions))
    for axes, each in zip(panels, precisions, strict=True):
        for name, start, end in each["timeline"]["phases"]:
            axes.broken_barh([(start, end - start)], (1.1, 0.5), color="#EEEEEE", ec="white", lw=1)
            middle = (start + end) / 2
            axes.text(middle, 1.35, name, ha="center", va="center", fontsize=8, color=DARK)
        for part, colour in PARTS.items():
            spans = [
                (start, end - start)
                for name, start, end in each["timeline"]["groups"]
                if name == part or (part == "others" and name not in PARTS)
            ]
            axes.broken_barh(spans, (0.1, 0.9), color=colour, lw=0, label=part)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, max(end for _, _, end in each["timeline"]["phases"]))
        precision = "fp32" if each["amp"] == "off" else each["amp"]
        axes.set_title(f"{precision}, batch {each['batch']}", fontsize=9, loc="left", color=DARK)
    panels[-1].set_xlabel("ms since the step began", fontsize=9, color=DARK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw(
    folder: Path,
    *,
    whole_steps: Records = (),
    used: Records = (),
    operations: Records = (),
    grown: Sequence[Mapping[str, Any]] = (),
    profiled: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Write what the records give into ``folder``, and return where: ``used`` are records of
    memory, ``operations`` of single operations, ``grown`` the series of `benchmarks.scaling`,
    ``profiled`` the precisions of `benchmarks.profile_step`."""
    made: dict[str, Figure] = {}
    if whole_steps:
        made["steps"] = steps(whole_steps)
    if peers := [record for record in whole_steps if record["case"] == EVERY_PEER]:
        made["peers"] = steps(peers)
    if operations:
        made["roofline"] = roofline(operations)
    if used:
        made["memory"] = memory(used)
    if grown:
        made["scaling"] = scaling(grown)
    if profiled:
        made["timeline"] = timeline(profiled)
    paths = []
    for name, figure in made.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=200, facecolor="white", metadata={"Software": None})
        paths.append(path)
    return paths
