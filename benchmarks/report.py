"""Tables and pictures from results, and results into the repository.

``python -m benchmarks.report RESULT.json...`` prints, as Markdown, what whole training steps gain,
what whole trainings cost, what ``pygan.fuse`` alone brings to networks, sampling, memory, and every
side of the step; ``--all`` adds the single operations.
``--update README.md`` puts them between ``<!-- results -->`` and ``<!-- /results -->``.
``--out benchmarks/results`` keeps the result there, in a folder named after the device, and beside
it the tables, that of the convolutions by layer, and the pictures of `benchmarks.pictures`.

RESULT.json is what ``pytest benchmarks --benchmark-only --benchmark-json RESULT.json`` wrote, or
the JSON of ``python -m benchmarks.scaling``, ``profile_step``, ``tricks``, ``every_network``,
``cost`` and ``monitor_cost``. Of several results the later one has the word about a
case that both hold.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import (
    cost,
    every_network,
    monitor_cost,
    profile_step,
    scaling,
    summary,
    targets,
    tricks,
)
from benchmarks.pictures import draw
from pygan import cli
from pygan.errors import UserError
from pygan.run_folder import replace_file

PROG = "python -m benchmarks.report"
START, END = "<!-- results -->", "<!-- /results -->"
HEADLINE = ("bench_train_step.py", "bench_other_steps.py", "bench_compilers.py")
LAYERS = "bench_strided_conv.py"
DRAWN = (LAYERS, "bench_folded_conv.py", "bench_norm_act.py", "bench_image_batch.py")
DROP_IN = ("bench_dropin.py", "bench_penalty.py")
BESIDE = ("bench_sampling.py", "bench_memory.py")
LEAST_ROUNDS = 7


ADVICE = "give a file written by `pytest benchmarks --benchmark-only --benchmark-json FILE`"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {ADVICE}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; {ADVICE}") from None


def load(path: Path) -> dict[str, Any]:
    """A result written by ``pytest benchmarks --benchmark-json``.

    Raises:
        UserError: the file is missing, is not JSON, or holds no record of these benchmarks.
    """
    return _checked(path, _read(path))


def _checked(path: Path, result: Any) -> dict[str, Any]:
    entries = result.get("benchmarks") if isinstance(result, dict) else None
    if not entries or not all("ratios" in entry.get("extra_info", {}) for entry in entries):
        raise UserError(f"{path} holds no records of these benchmarks; {ADVICE}")
    return result


def _device(conditions: dict[str, Any]) -> tuple[Any, ...]:
    return conditions["device"], conditions["threads"], conditions["torch"]


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several: all cases, each as the last one has it that holds it.

    Raises:
        UserError: they were measured on different machines or versions of torch.
    """
    first = results[0]
    found = {
        _device(entry["extra_info"]["conditions"]) for r in results for entry in r["benchmarks"]
    }
    if len(found) > 1:
        raise UserError(
            f"the results are of {len(found)} devices, numbers of threads or versions of torch; "
            "make a report of each"
        )
    latest: dict[str, Sequence[Any]] = {}
    for result in results:
        cases: dict[str, list[Any]] = {}
        for entry in result["benchmarks"]:
            cases.setdefault(entry["extra_info"]["case"], []).append(entry)
        latest |= cases
    return first | {
        "benchmarks": [entry for entries in latest.values() for entry in entries],
        "command": " && ".join(dict.fromkeys(r["command"] for r in results)),
        "quick": any(r.get("quick") for r in results),
        "measured": list(dict.fromkeys(each for r in results for each in _measured(r))),
    }


def _measured(result: dict[str, Any]) -> list[str]:
    """When and at which commit; of several results, what was measured first comes first."""
    if "measured" in result:
        return list(result["measured"])
    commit = result.get("commit_info", {})
    version = f"commit {commit['id'][:12]}" if commit.get("id") else "no commit recorded"
    if commit.get("dirty"):
        version += " with changes"
    return [f"{result['datetime'][:10]}, {version}"]


def _of(result: dict[str, Any], *modules: str) -> list[summary.Record]:
    """Records from the given benchmark files, in their order."""
    return [
        entry["extra_info"]
        for module in modules
        for entry in result["benchmarks"]
        if module in entry["fullname"]
    ]


def _conditions(result: dict[str, Any], record: summary.Record) -> str:
    return f"Measured on {summary.machine_line(record)}. {'; '.join(_measured(result))}."


def tables(result: dict[str, Any], *, headline_only: bool = True, costs: Sequence[str] = ()) -> str:
    """Markdown: what the step gains, the conditions under which it holds, the costs of whole
    trainings, then a table per case.

    Raises:
        UserError: no record of the training step, and only the headline is wanted.
    """
    step, beside = _of(result, *HEADLINE), _of(result, *BESIDE)
    dropped_in = _of(result, *DROP_IN)
    if headline_only and not step:
        raise UserError(
            "the result has no record of the training step; run bench_train_step.py as well, "
            "or pass --all"
        )
    every = [entry["extra_info"] for entry in result["benchmarks"]]
    shown = [*step, *beside, *dropped_in]
    operations = [record for record in every if record not in shown]
    # A record of memory alone knows no peaks.
    where = next((record for record in (*step, *every) if "peaks" in record), every[0])
    lines = summary.headline(step)
    lines += [_conditions(result, where), "", *costs]
    if dropped_in:
        lines += [
            "Networks as scripts for plain torch write them, on contiguous maps, before and after "
            "`pygan.fuse` and nothing else: generator and discriminator forward and backward, or "
            "(r1) the discriminator with a gradient penalty, backward through its backward:",
            "",
            *summary.drop_in(dropped_in),
            "",
        ]
    lines += summary.markdown(beside)
    if wanted := targets.table(every):
        lines += [
            "<details><summary>What was aimed at</summary>",
            "",
            *wanted,
            "",
            "</details>",
            "",
        ]
    if step:
        lines += ["<details><summary>Every side of the step</summary>", ""]
        lines += [*summary.markdown(step), "</details>", ""]
    if not headline_only:
        lines += summary.markdown(operations)
    lines += [
        "All sides of a table were timed in turn in one process, after each had been checked "
        "against float64. × is the speed against that side, or against the fastest that is not "
        "pygan and computes in the same type: the median of the ratios within a round with its "
        "95% interval. FLOPs are those of the minimal algorithm, in brackets the share of the "
        "measured peak. Peak memory is what training adds to a process that has libraries and "
        "data loaded.",
        "",
        f"`{result['command']}`",
    ]
    return "\n".join(lines)


def layers(result: dict[str, Any]) -> str:
    """Markdown of the convolutions by layer, pass and method; empty without records of them."""
    records = _of(result, LAYERS)
    if not records:
        return ""
    first = records[0]
    lines = [
        "# 4x4 convolutions of stride 2, by layer",
        "",
        f"Batch {first['images']}. Milliseconds are medians of {first['rounds']} rounds in which "
        "all sides were timed in turn, torch in the faster of its two layouts. × torch, GFLOP/s "
        "(those of the plain convolution, whatever a method saves) and the share of the measured "
        "peak are those of the method taken by itself; where that is none, torch runs.",
        "",
        *summary.layers(records),
        "",
    ]
    if scaling := summary.threads(records):
        lines += [*scaling, ""]
    lines += [_conditions(result, first), "", f"`{result['command']}`", ""]
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
    """Write ``result`` under ``folder/<device>/``, with its `layers` beside it; return where.

    Raises:
        UserError: too few rounds to be quoted.
    """
    every = [entry["extra_info"] for entry in result["benchmarks"]]
    rounds = min((record["rounds"] for record in every if "rounds" in record), default=LEAST_ROUNDS)
    if result.get("quick") or rounds < LEAST_ROUNDS:
        raise UserError(
            f"the result has {rounds} rounds and may not be quoted; measure without --quick, "
            f"with at least {LEAST_ROUNDS} rounds"
        )
    version = every[0]["conditions"]["torch"].partition("+")[0]
    path = folder / device_folder(every[0]) / f"torch-{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    if text := layers(result):
        replace_file(path.with_name(f"torch-{version}-layers.md"), text.encode())
    return path


class Others(NamedTuple):
    """Results that are not of pytest-benchmark, by their kind."""

    scaling: list[dict[str, Any]]
    profile: list[dict[str, Any]]
    cost: list[dict[str, Any]]
    tricks: list[dict[str, Any]]
    networks: list[dict[str, Any]]
    monitor: list[dict[str, Any]]

    def pages(self) -> dict[str, list[str]]:
        """Markdown by the name of its file."""
        found = {
            "scaling.md": [line for each in self.scaling for line in scaling.report(each)],
            "profile.md": [line for each in self.profile for line in profile_step.page(each)],
            "tricks.md": [line for each in self.tricks for line in tricks.page(each)],
            "networks.md": [line for each in self.networks for line in every_network.page(each)],
        }
        return {name: lines for name, lines in found.items() if lines}


def pictures(result: dict[str, Any], others: Others, folder: Path) -> list[Path]:
    """Draw what there is into ``folder``; see :func:`benchmarks.pictures.draw`."""
    return draw(
        folder,
        whole_steps=_of(result, *HEADLINE),
        used=_of(result, "bench_memory.py"),
        operations=_of(result, *DRAWN),
        grown=[series for each in others.scaling for series in each["series"]],
        profiled=[precision for each in others.profile for precision in each["precisions"]],
    )


def _report(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Tables and pictures from benchmark results.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--all", action="store_true", help="the single operations as well")
    parser.add_argument("--update", type=Path, metavar="README.md", help="rewrite its tables")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the result in DIR/<device>/")
    options = parser.parse_args(arguments)
    read = [(path, _read(path)) for path in options.results]
    kinds = [r.get("kind") if isinstance(r, dict) else None for _, r in read]
    others = Others(
        *(
            [r for (_, r), its in zip(read, kinds, strict=True) if its == kind]
            for kind in Others._fields
        )
    )
    known = [kind in Others._fields for kind in kinds]
    timed = [
        _checked(path, r) for (path, r), is_other in zip(read, known, strict=True) if not is_other
    ]
    if not timed:
        raise UserError(f"none of the results holds the tables' records; {ADVICE} as well")
    result = joined(timed)
    costs = [line for each in others.cost for line in cost.page(each)]
    costs += [line for each in others.monitor for line in monitor_cost.page(each)]
    text = tables(result, headline_only=not options.all, costs=costs)
    if options.out:
        kept = keep(result, options.out)
        page = kept.with_suffix(".md")
        replace_file(page, f"# GAN training on this machine\n\n{text}\n".encode())
        written = [page, *pictures(result, others, kept.parent)]
        for name, lines in others.pages().items():
            written.append(kept.with_name(name))
            replace_file(written[-1], ("\n".join(lines).rstrip() + "\n").encode())
        print("kept as", ", ".join(map(str, (kept, *written))), file=sys.stderr)
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
