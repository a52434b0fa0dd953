"""Tables from a result, and results into the repository.

``python -m benchmarks.report RESULT.json`` prints the Markdown tables of the whole training step;
``--all`` adds the single operations. ``--update README.md`` puts them between ``<!-- results -->``
and ``<!-- /results -->``. ``--out benchmarks/results`` keeps the result there, in a folder named
after the device.

RESULT.json is what ``pytest benchmarks --benchmark-only --benchmark-json RESULT.json`` wrote.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import summary
from pygan import cli
from pygan.errors import UserError
from pygan.run import replace_file

PROG = "python -m benchmarks.report"
START, END = "<!-- results -->", "<!-- /results -->"
HEADLINE = "bench_train_step.py"
LEAST_ROUNDS = 7


def load(path: Path) -> dict[str, Any]:
    """A result written by ``pytest benchmarks --benchmark-json``.

    Raises:
        UserError: the file is missing, is not JSON, or holds no record of these benchmarks.
    """
    advice = "give a file written by `pytest benchmarks --benchmark-only --benchmark-json FILE`"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {advice}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; {advice}") from None
    entries = result.get("benchmarks") if isinstance(result, dict) else None
    if not entries or not all("ratios" in entry.get("extra_info", {}) for entry in entries):
        raise UserError(f"{path} holds no records of these benchmarks; {advice}")
    return result


def records(result: dict[str, Any], *, headline_only: bool) -> list[summary.Record]:
    """Records of ``result``, all of them or those of the whole step."""
    chosen = [
        entry["extra_info"]
        for entry in result["benchmarks"]
        if HEADLINE in entry["fullname"] or not headline_only
    ]
    if not chosen:
        raise UserError(
            "the result has no record of the training step; run bench_train_step.py as well, "
            "or pass --all"
        )
    return chosen


def tables(result: dict[str, Any], *, headline_only: bool = True) -> str:
    """Markdown: a table per case, then the conditions under which it holds."""
    chosen = records(result, headline_only=headline_only)
    commit = result.get("commit_info", {})
    version = f"commit {commit['id'][:12]}" if commit.get("id") else "no commit recorded"
    if commit.get("dirty"):
        version += " with changes"
    lines = summary.markdown(chosen)
    lines += [
        f"Measured on {summary.machine_line(chosen[0])}. {result['datetime'][:10]}, {version}.",
        "",
        "All sides of a table were timed in turn in one process, after each had been checked "
        "against float64. × is the speed against that side, the median of the ratios within a "
        "round with its 95% interval. FLOPs and bytes are those of the minimal algorithm, in "
        "brackets the share of the measured peak; peak MiB is what the side adds to the process.",
        "",
        f"`{result['command']}`",
    ]
    return "\n".join(lines)


def update(document: Path, text: str) -> None:
    """Replace what stands between the markers in ``document``, in one rename."""
    try:
        old = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read {document} ({error.strerror}); give the file to update"
        ) from None
    if old.count(START) != 1 or old.count(END) != 1 or old.index(START) > old.index(END):
        raise UserError(
            f"{document} does not hold one pair of markers; put {START} and {END} on lines of "
            "their own where the tables belong"
        )
    before, after = old[: old.index(START)], old[old.index(END) :]
    replace_file(document, f"{before}{START}\n{text}\n{after}".encode())


def device_folder(record: summary.Record) -> str:
    """Name of the folder for results of this device, such as ``amd-epyc-2-cores-avx512``."""
    where = record["conditions"]
    words = [where["device"]]
    if where["device_type"] == "cpu":
        words.append(f"{where['cores']} cores {where['torch_isa']}")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def keep(result: dict[str, Any], folder: Path) -> Path:
    """Write ``result`` under ``folder/<device>/`` and return where.

    Raises:
        UserError: too few rounds to be quoted.
    """
    every = records(result, headline_only=False)
    rounds = min(record["rounds"] for record in every)
    if result.get("quick") or rounds < LEAST_ROUNDS:
        raise UserError(
            f"the result has {rounds} rounds and may not be quoted; measure without --quick, "
            f"with at least {LEAST_ROUNDS} rounds"
        )
    version = every[0]["conditions"]["torch"].partition("+")[0]
    path = folder / device_folder(every[0]) / f"torch-{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


def _report(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Markdown tables from a benchmark result.")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--all", action="store_true", help="the single operations as well")
    parser.add_argument("--update", type=Path, metavar="README.md", help="rewrite its tables")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the result in DIR/<device>/")
    options = parser.parse_args(arguments)
    result = load(options.result)
    text = tables(result, headline_only=not options.all)
    if options.out:
        print(f"kept as {keep(result, options.out)}", file=sys.stderr)
    if options.update:
        update(options.update, text)
    else:
        print(text)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _report(arguments))


if __name__ == "__main__":
    sys.exit(main())
