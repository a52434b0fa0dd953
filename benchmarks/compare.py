"""Did a change make anything slower? Two results, or this tree against an earlier revision of it.

``python -m benchmarks.compare OLD.json NEW.json`` compares results of
``pytest benchmarks --benchmark-json``. Seconds of two runs say little about a change where the
machine drifts, so a side is measured by its speed relative to a side of its own run that is not
pygan; the interval of old and new together holds both of theirs. "memory" is the rate of copies
beside the case, new over old: on a shared machine it tells whether that was the same one.

``python -m benchmarks.compare --against REV`` builds that revision in a worktree of its own and
times the steps of both trees in turn, in two processes of which one waits: ratios of the same
moments. Exit status 1 if anything is slower by more than ``--tolerance``, its whole interval.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from benchmarks.ratio import Ratio, speed_ratio
from benchmarks.report import load
from benchmarks.summary import markdown_table
from pygan import cli
from pygan.errors import UserError

PROG = "python -m benchmarks.compare"
ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.03
STATE = 1.2  # times as fast a memory is another state of the machine
ROUNDS = 15
WORKER = Path(__file__).with_name("compare_worker.py")


class Change(NamedTuple):
    """Speed of the new one over the old one, with an interval of at least 95%, and that of the
    machine's memory beside it where both results tell."""

    case: str
    side: str
    speed: float
    low: float
    high: float
    memory: float | None = None

    def verdict(self, tolerance: float) -> str:
        """ "slower" and "faster" where the whole interval is beyond the tolerance."""
        if self.high < 1 - tolerance:
            return "slower"
        return "faster" if self.low > 1 + tolerance else "not told apart"

    @property
    def moved(self) -> bool:
        """Whether the machine was in another state."""
        return self.memory is not None and not 1 / STATE < self.memory < STATE


def _sides(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    every = (entry["extra_info"] for entry in result["benchmarks"])
    return {
        (record["case"], record["side"]): record
        for record in every
        if not record["baseline"] and record["ratios"]
    }


def _memory(old: dict[str, Any], new: dict[str, Any]) -> float | None:
    if "copy_gb_per_s" not in old or "copy_gb_per_s" not in new:
        return None
    return statistics.mean(new["copy_gb_per_s"]) / statistics.mean(old["copy_gb_per_s"])


def changes(
    old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[Change], list[tuple[str, str]], list[tuple[str, str]]]:
    """Of every side that both results have beside a common baseline, then the sides that only the
    old one has, and those that only the new one has."""
    before, after = _sides(old), _sides(new)
    found = []
    for key in before.keys() & after.keys():
        ours, theirs = after[key]["ratios"], before[key]["ratios"]
        common = [name for name in theirs if name in ours]
        if not common:
            continue
        # The steadiest of them: its interval decides how small a change can be seen.
        name = min(common, key=lambda n: theirs[n]["high"] / theirs[n]["low"])
        a, b = theirs[name], ours[name]
        speed = b["median"] / a["median"], b["low"] / a["high"], b["high"] / a["low"]
        found.append(Change(*key, *speed, _memory(before[key], after[key])))
    return sorted(found), sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())


def table(found: Sequence[Change], tolerance: float) -> list[str]:
    """Markdown, the slowest change first."""
    rows = [
        [
            f"{change.case}, {change.side}",
            f"{change.speed:.3f}",
            f"{change.low:.3f}–{change.high:.3f}",
            "–" if change.memory is None else f"{change.memory:.2f}",
            change.verdict(tolerance),
        ]
        for change in sorted(found, key=lambda change: change.speed)
    ]
    return markdown_table(["case, side", "new / old", "interval", "memory", "verdict"], rows)


def _status(found: Sequence[Change], tolerance: float) -> int:
    slower = [change for change in found if change.verdict(tolerance) == "slower"]
    if slower:
        print(f"\n{len(slower)} of {len(found)} are slower by more than {tolerance:.0%}")
        if moved := sum(change.moved for change in slower):
            print(
                f"beside {moved} of them memory was over {STATE - 1:.0%} slower or faster than "
                "before: the machine was in another state"
            )
    return 1 if slower else 0


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no such revision").splitlines()[-1]
        raise UserError(f"git {arguments[0]} failed: {said}; give a revision of this repository")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of ``revision`` with its extension built, or without one where that fails.

    Raises:
        UserError: there is no such revision.
    """
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="pygan-against-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            built = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                cwd=tree,
                capture_output=True,
                text=True,
                # The steps run on the CPU: what nvcc makes would only be waited for.
                env=os.environ | {"CUDACXX": "no-nvcc"},
            )
            if built.returncode or not list((tree / "pygan").glob("_C.*")):
                print(f"{revision} runs without its extension, which was not built")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


class Worker:
    """A process that imports pygan from ``tree`` and times steps when it is told to."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Threads of the one that waits leave the cores to the other.
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"},
        )

    def ask(self, **question: Any) -> Any:
        """The worker's answer.

        Raises:
            Failure: it ended instead.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise cli.Failure("a worker ended before its answer; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def interleaved(
    trees: Sequence[Path], cases: Sequence[tuple[str, str]], rounds: int
) -> list[Change]:
    """Steps of the second tree against those of the first, A B A B."""
    found = []
    workers = [Worker(tree) for tree in trees]
    try:
        for case, amp in cases:
            for worker in workers:
                worker.ask(build=case, amp=amp)
            durations: list[list[float]] = [[], []]
            for _ in range(rounds):
                for worker, row in zip(workers, durations, strict=True):
                    row.append(worker.ask(time=True))
            ratio: Ratio = speed_ratio(durations[1], durations[0])
            found.append(Change(case, f"pygan {amp}", ratio.median, ratio.low, ratio.high))
    finally:
        for worker in workers:
            worker.close()
    return found


CASES = ("dcgan32", "dcgan64")


def _compare(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Is anything slower than it was?")
    parser.add_argument("results", nargs="*", type=Path, metavar="OLD.json NEW.json")
    parser.add_argument("--against", metavar="REV", help="time this tree against that revision")
    parser.add_argument("-k", metavar="TEXT", default="", help="only cases with this in their name")
    parser.add_argument(
        "--rounds", type=cli.whole_number(6), default=ROUNDS, help=f"default {ROUNDS}; at least 6"
    )
    parser.add_argument(
        "--tolerance", type=cli.real_number(0), default=TOLERANCE, help=f"default {TOLERANCE}"
    )
    options = parser.parse_args(arguments)
    if bool(options.against) == bool(options.results):
        raise UserError("give two results, OLD.json NEW.json, or --against REV")
    if options.against:
        known = [(case, amp) for case in CASES for amp in machine.amps(torch.device("cpu"))]
        cases = [case for case in known if options.k in f"{case[0]} {case[1]}"]
        if not cases:
            names = ", ".join(f"{case} {amp}" for case, amp in known)
            raise UserError(f"no case has {options.k!r} in its name; they are {names}")
        with worktree(options.against) as tree:
            found = interleaved([tree, ROOT], cases, options.rounds)
    else:
        if len(options.results) != 2:
            raise UserError(f"{len(options.results)} results were given; give OLD.json NEW.json")
        found, gone, come = changes(*map(load, options.results))
        found = [change for change in found if options.k in f"{change.case} {change.side}"]
        for what, keys in (("only in the old result", gone), ("only in the new result", come)):
            if keys:
                print(f"{what}: {'; '.join(', '.join(key) for key in keys)}\n")
        if not found:
            raise UserError("the results have no side in common; give results of the same cases")
    print("\n".join(table(found, options.tolerance)))
    return _status(found, options.tolerance)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
