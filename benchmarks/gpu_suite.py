"""Everything that needs a GPU, with one command and inside the minutes given.

``python -m benchmarks.gpu_suite --out DIR`` builds the CUDA kernels, runs the tests marked ``gpu``,
times the convolutions layer by layer against cuDNN, the other operations and the whole training
step against its peers, and runs compute-sanitizer where it is installed. Each part is a process of
its own with its own limit (`benchmarks.gpu_parts`): one that crashes or hangs is lost alone. DIR
holds, complete after every part:

- ``records.jsonl``, a line for each thing found, and ``results.json``, all with the command;
- ``layers.md``, ``steps.md`` and ``summary.md``, with the targets reached and missed;
- ``tests.xml``, and ``log.txt`` with what the parts printed.

``--only tests,layers,steps-dcgan64-128`` chooses parts by the beginnings of their names, for
another run where one was too short; ``--add OTHER/results.json`` has the tables show that one's
too. Without a GPU it says so and exits with status 2; ``--dry-run`` goes the whole course on a CPU,
with sizes of no interest. The exit status is 1 where a part failed.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_parts, gpu_records, gpu_tables
from benchmarks.gpu_parts import ROOT, Part
from pygan import cli
from pygan.errors import UserError
from pygan.run_folder import replace_file

PROG = "python -m benchmarks.gpu_suite"
RECORDS, LOG = "records.jsonl", "log.txt"
# To stop a part, and to write the tables.
RESERVE, GRACE = 6.0, 4.0


class Outcome(NamedTuple):
    """What became of a part: "done", "failed", "stopped" at its limit, or "left out"."""

    part: str
    state: str
    seconds: float
    reason: str = ""


class Suite:
    """The parts, one after another, and their results in ``folder``."""

    def __init__(
        self,
        folder: Path,
        command: str,
        minutes: float,
        dry_run: bool,
        earlier: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.folder, self.command, self.dry_run = folder, command, dry_run
        self.earlier = earlier
        self.deadline = time.monotonic() + 60 * minutes - RESERVE
        self.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.outcomes: list[Outcome] = []

    def run(self, parts: Sequence[Part]) -> None:
        """All of them, or as many as there is time for."""
        for part in parts:
            started = time.monotonic()
            state, reason = self._one(part)
            outcome = Outcome(part.name, state, round(time.monotonic() - started, 1), reason)
            self.outcomes.append(outcome)
            print(" ".join(map(str, outcome)).strip(), flush=True)
            if state != "left out":
                self.write()
        self.write()

    def _one(self, part: Part) -> tuple[str, str]:
        if part.missing is not None:
            return "left out", part.missing
        left = self.deadline - time.monotonic()
        if left < part.least:
            return "left out", f"{max(left, 0):.0f} s were left, and it takes {part.least:.0f}"
        limit = min(part.limit, left)
        status = self._process(part, limit)
        if status is None:
            return "stopped", f"after its {limit:.0f} s"
        if status not in part.harmless:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            return "failed", f"{how}; {LOG} has what it printed"
        return "done", "nothing to do" if status else ""

    def _process(self, part: Part, limit: float) -> int | None:
        """The exit status of a part, None where it was stopped."""
        command = list(part.command)
        if part.measures:
            # It ends by itself a little earlier, with what it has.
            command += ["--out", str(self.folder / RECORDS), "--name", part.name]
            command += ["--until", f"{time.time() + limit - GRACE:.0f}"]
            command += ["--device", "cpu", "--tiny"] if self.dry_run else ["--device", "cuda"]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **dict(part.environment), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            print(f"\n==> {part.name}: {shlex.join(command)}", file=log, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)

    def write(self) -> None:
        """``results.json`` and the tables, as far as they are known."""
        records = list(gpu_records.read(self.folder / RECORDS))
        starts = [record for record in records if record["kind"] == "start"]
        result: dict[str, Any] = {
            "command": self.command,
            "datetime": self.started,
            "dry_run": self.dry_run,
            "conditions": starts[0]["conditions"] if starts else None,
            "peaks": gpu_tables.best_peaks(starts),
            "versions": _versions(),
            "parts": [outcome._asdict() for outcome in self.outcomes],
            "tests": gpu_tables.tests(self.folder / "tests.xml"),
            "records": records,
        }
        texts = {"results.json": json.dumps(result, indent=1)}
        shown = gpu_tables.joined([*self.earlier, result])
        texts |= {f"{name}.md": text for name, text in gpu_tables.pages(shown).items()}
        for name, text in texts.items():
            replace_file(self.folder / name, f"{text}\n".encode())


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result["records"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        advice = "give a results.json that this command wrote"
        raise UserError(f"{path} holds no results; {advice}") from None
    return result


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    found["cudnn"] = None if cudnn is None else str(cudnn)
    from importlib.metadata import PackageNotFoundError, version

    for package in ("triton", "jax", "nvidia-ml-py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started, which are a session of their own."""
    for number, patience in ((signal.SIGTERM, GRACE / 2), (signal.SIGKILL, GRACE / 2)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """A suite that is told to end leaves no part behind, and its tables complete."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _suite(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Tests and measurements on an NVIDIA GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--only", metavar="PARTS", help="such as tests,layers,steps-dcgan64-128")
    minutes = cli.real_number(0, open_low=True)
    parser.add_argument("--minutes", type=minutes, default=9.0, help="for all of it, default 9")
    parser.add_argument(
        "--add", type=Path, action="append", metavar="results.json", help="of an earlier run"
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, sizes of no interest")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise UserError("torch sees no NVIDIA GPU here; --dry-run goes the course on a CPU")
    folder = options.out.resolve()
    every = gpu_parts.parts(folder, dry_run=options.dry_run)
    chosen = gpu_parts.selected(every, options.only)
    if not chosen:
        names = ", ".join(part.name for part in every)
        raise UserError(f"--only {options.only} names no part; there are {names}")
    if (folder / RECORDS).exists():
        raise UserError(f"{options.out} holds results already; give a new folder")
    earlier_results = [_load(path) for path in options.add or ()]
    folder.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    # A path of this machine is nobody's business.
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    command = shlex.join([*PROG.split(), *shown])
    suite = Suite(folder, command, options.minutes, options.dry_run, earlier_results)
    with _terminable():
        try:
            suite.run(chosen)
        except KeyboardInterrupt:
            suite.write()
            raise
    return 1 if any(each.state in ("failed", "stopped") for each in suite.outcomes) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _suite(arguments))


if __name__ == "__main__":
    sys.exit(main())
