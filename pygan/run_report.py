"""A run on one page: ``python -m pygan.run_report RUN`` writes ``RUN/report.html``.

One file that holds all it shows: losses and probabilities with the monitor's findings on the same
time line, throughput, samples over time beside real images, the figures of `pygan.evaluate`, and
the configuration. It asks no network for anything. `pygan.train` writes it when a run ends or
stops.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pygan import cli, evaluate
from pygan.config import Config, flag_text
from pygan.errors import UserError
from pygan.metrics.quality import Quality
from pygan.run_folder import (
    LOG,
    QUALITY,
    REPORT,
    check_writable,
    damaged_config,
    has_numbers,
    read_config,
    replace_file,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROG = "python -m pygan.run_report"
PICTURES = 12  # of samples, at most
POINTS = 2000  # of a line, at most
COLOURS = {"error": "#D55E00", "warning": "#E69F00", "note": "#999999"}
CURVES = {
    "loss": {"loss_d": "Loss_D", "loss_g": "Loss_G"},
    "mean probability": {"d_real": "D(x)", "d_fake": "D(G(z))", "d_fake_after": "D(G(z)) after"},
    "images/s": {"images_per_s": "images/s"},
}
STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.lead { color: #555; margin-top: .2rem }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0 }
.figures div { min-width: 7rem } .figures b { display: block; font-size: 1.5rem }
.figures span { color: #555; font-size: .85rem }
svg { width: 100%; height: auto }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
             font-size: .8rem; padding: .25rem .45rem }
.error { color: #b23c00; font-weight: 600 } .warning { color: #8a5a00; font-weight: 600 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0 } figure img { width: 100%; image-rendering: pixelated }
figcaption { font-size: .85rem; color: #555 }
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a line that a kill tore is left out."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _finding(row: Mapping[str, Any]) -> bool:
    severity = row.get("severity")
    known = isinstance(severity, str) and severity in COLOURS
    return known and has_numbers(row, "step") and "text" in row


def _measured(row: Mapping[str, Any]) -> bool:
    """Whether it is a row of `pygan.evaluate`, and whole."""
    shares = row.get("shares")
    texts = all(isinstance(row.get(name), str) for name in ("about", "features", "bn"))
    single = [name for name in Quality._fields if name != "shares"]
    return (
        texts
        and isinstance(shares, list)
        and has_numbers(dict(enumerate(shares)), *range(len(shares)))
        and has_numbers(row, "epoch", "samples", "seed", "distance_of_halves", *single)
    )


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> None:
    thin = rows[:: max(1, -(-len(rows) // POINTS))]
    for name, label in lines.items():
        steps, values = ([row[key] for row in thin] for key in ("step", name))
        axes.plot(steps, values, label=label, linewidth=1)


def chart(rows: Sequence[Mapping[str, Any]], findings: Sequence[Mapping[str, Any]]) -> str:
    """Losses, probabilities and throughput over the steps as SVG, findings as vertical lines."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(len(CURVES), 1, sharex=True, height_ratios=(3, 2, 1.4))
    for axes, (name, lines) in zip(panels, CURVES.items(), strict=True):
        _curve(axes, rows, lines)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(loc="upper right", fontsize=8)
        for finding in findings:
            colour = COLOURS[finding["severity"]]
            axes.axvline(finding["step"], color=colour, linewidth=1, linestyle=":")
    panels[1].set_ylim(0, 1)
    panels[2].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    drawn = io.StringIO()
    # Text stays text, and two reports of one run are equal byte by byte.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pygan"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Cells are HTML already; the last ``numbers`` columns are numbers."""
    first = len(heading) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f'<{tag} class="n">{cell}</{tag}>' if i >= first else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(heading, 'th')}</thead>\n<tbody>{body}</tbody></table>"


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _samples(run: Path) -> str:
    every = sorted(run.glob("fake_samples_epoch_*.png"))
    # Evenly spread, the first and the last among them.
    count = min(PICTURES, len(every))
    places = {round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)}
    shown = [
        _picture(every[place], f"epoch {int(every[place].stem.rpartition('_')[2])}")
        for place in sorted(places)
    ]
    if not shown:
        return "<p>There are none yet.</p>"
    real = run / "real_samples.png"
    shown += [_picture(real, "real images")] if real.exists() else []
    return f'<div class="samples">{"".join(shown)}</div>'


def _quality(rows: Sequence[Mapping[str, Any]], run: Path) -> str:
    # Of equal measurements the latest stands.
    settings = ("features", "samples", "bn", "seed")
    latest = {(*(row.get(name) for name in settings), row.get("epoch")): row for row in rows}
    tables = []
    for key in dict.fromkeys(key[:-1] for key in latest):
        found = sorted(
            (row for each, row in latest.items() if each[:-1] == key), key=lambda row: row["epoch"]
        )
        tables.append(
            f"<p>{found[-1]['samples']:,} samples, in the features of {_text(found[-1]['about'])}; "
            f"the Fréchet distance of one half of the real images to the other is "
            f"{found[-1]['distance_of_halves']:.2f}.</p>"
        )
        cells = ([str(row["epoch"]), *map(_text, evaluate.cells(dict(row)))] for row in found)
        tables.append(_table(["epoch", *evaluate.HEADING], cells, len(evaluate.HEADING)))
    command = f"<code>{evaluate.PROG} {_text(run)} --every-epoch</code>"
    return "\n".join(tables) or f"<p>Not measured yet: {command}.</p>"


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    if not findings:
        return "<p>The monitor found nothing.</p>"
    rows = (
        [str(row["step"]), f'<span class="{row["severity"]}">{row["severity"]}</span>',
         _text(row["text"])]
        for row in findings
    )  # fmt: skip
    return _table(["step", "", "what was found"], rows)


def _configuration(stored: Mapping[str, Any]) -> str:
    # As config.json would hold them.
    default = json.loads(json.dumps(asdict(Config())))
    config = stored["config"]
    rows = []
    for name, value in config.items():
        text = _text(flag_text(name, value))
        changed = value != default.get(name)
        rows.append([f"<b>{text}</b>" if changed else text, _text(default.get(name))])
    about = [[_text(f"{part} {name}"), _text(value)] for part in ("data", "pygan")
             for name, value in stored[part].items()]  # fmt: skip
    return (
        "<p>What is not the default is bold.</p>"
        + _table(["setting", "default"], rows)
        + "<h2>Data and machine</h2>"
        + _table(["", ""], about)
    )


def page(run: Path) -> str:
    """The report of the run in a folder.

    Raises:
        UserError: there is no run in it, or a file of it cannot be read.
    """
    stored = read_config(run)
    if not has_numbers(stored["config"], "batch_size") or not has_numbers(stored["data"], "images"):
        raise damaged_config(run)
    try:
        logged = _json_lines(run / LOG)
        measured = list(filter(_measured, _json_lines(run / QUALITY)))
        findings = list(filter(_finding, logged))
        drawn = [name for lines in CURVES.values() for name in lines]
        rows = [row for row in logged if has_numbers(row, "step", "epoch", "seconds", *drawn)]
        last = rows[-1] if rows else {"step": 0, "epoch": 0, "seconds": 0.0}
        batch = stored["config"]["batch_size"]
        rate = last["step"] * batch / last["seconds"] if last["seconds"] else 0.0
        figures = {
            "steps": f"{last['step']:,}",
            "epoch": str(last["epoch"]),
            "training": f"{last['seconds'] / 60:.1f} min",
            "images/s": f"{rate:,.0f}",
            "findings": str(sum(row["severity"] != "note" for row in findings)),
        }
        if measured:
            figures["Fréchet distance"] = f"{measured[-1]['distance']:.2f}"
        boxes = "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in figures.items())
        name = run.resolve().name
        parts = {
            "Training": chart(rows, findings) if rows else "<p>Nothing is logged yet.</p>",
            "Findings": _findings(findings),
            "Samples": _samples(run),
            "Quality": _quality(measured, run),
            "Configuration": _configuration(stored),
        }
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); check its permissions"
        ) from None
    sections = "\n".join(
        f"<section><h2>{what}</h2>{body}</section>" for what, body in parts.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)} – pygan</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{_text(name)}</h1><p class="lead">{stored["data"]["images"]:,} images of '
        f'{_text(stored["config"].get("data"))}</p><div class="figures">{boxes}</div>\n'
        f"{sections}\n</body></html>\n"
    )


def _write(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="A run on one page.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of pygan.train")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=f"default RUN/{REPORT}")
    options: argparse.Namespace = parser.parse_args(arguments)
    out = options.run / REPORT if options.out is None else options.out
    content = page(options.run)
    check_writable(out, "--out")
    replace_file(out, content.encode())
    print(out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _write(arguments))


if __name__ == "__main__":
    sys.exit(main())
