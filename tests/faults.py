"""What becomes of a run when something goes wrong: ``python tests/faults.py --out FILE.md``.

Every fault is caused ``--tries`` times, at moments drawn by chance, to tiny runs of the training
command in processes of their own. A run that could go on has to end in the bytes of one that was
left alone; one that could not has to say so in one sentence and to leave what was there. Whatever
was reported saved has to be there after the fault. Mounts of a small and of a read-only disk need
root; without it those faults are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pages import publish
from PIL import Image
from training import TINY, session, weights

from pygan.checkpoint import read_newest, read_state, read_weights
from pygan.run_folder import CONFIG, LOG, PREVIOUS, RESUME

STEPS = 200
FLAGS = [*TINY, f"--steps={STEPS}", "--save-every=20", "--no-monitor"]
SECONDS = 60  # that a process may take
SAME = "went on, and ended in the same bytes"
REFUSED = "refused in one sentence, and nothing was changed"


class Lost(AssertionError):
    """Something that was reported saved is not there, or a run ended otherwise than alone."""


class Row(NamedTuple):
    """A fault, how often it was caused, and what came of it."""

    fault: str
    tries: int
    outcomes: Counter[str]


class Workshop:
    """A folder for runs, and the one that was left alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.alone = folder / "alone"
        self.finish(self.alone, begin=True)
        self.expected = weights(self.alone)
        self.count = 0

    def path(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def flags(self, run: Path, *, begin: bool) -> list[str]:
        return [*FLAGS, f"--outf={run}", "--overwrite"] if begin else ["--resume", str(run)]

    def finish(self, run: Path, *, begin: bool = False) -> str:
        """The output of the rest of a run.

        Raises:
            Lost: it fails.
        """
        with session(self.flags(run, begin=begin)) as (process, output):
            text = output.read()
            process.join(SECONDS)
            if process.exitcode:
                raise Lost(f"{run} cannot go on: {text}")
            return text

    def check_same(self, run: Path) -> None:
        if weights(run) != self.expected:
            raise Lost(f"{run} ended in other bytes")

    def started(self, steps: int) -> Path:
        """A run that was stopped after so many."""
        run = self.path()
        flags = [flag.replace(f"--steps={STEPS}", f"--steps={steps}") for flag in FLAGS]
        with session([*flags, f"--outf={run}"]) as (process, _):
            process.join(SECONDS)
        return run


def reported(run: Path) -> int:
    """The step that is saved, after a look at everything that says it is.

    Raises:
        Lost: it is not whole.
    """
    try:
        position: int = read_state(run / RESUME)["position"]
        for path in run.glob("net?_epoch_*"):
            read_weights(path)
        lines = (run / LOG).read_text().splitlines()
        for line in lines[:-1]:
            json.loads(line)
    except Exception as error:
        raise Lost(f"{run}: {error}") from error
    return position


def killed(shop: Workshop, tries: int) -> Row:
    """SIGKILL at any moment, to runs that go on after each, until they end."""
    outcomes: Counter[str] = Counter()
    run, saved, left = shop.path(), -1, tries
    while left:
        begin = not (run / CONFIG).exists()
        with session(shop.flags(run, begin=begin)) as (process, _):
            process.join(shop.random.uniform(0.0, 1.5))
            done = process.exitcode == 0
            process.kill()
        if not done:
            left -= 1
            if (run / CONFIG).exists():
                now = reported(run)
                if now < saved:
                    raise Lost(f"{run} fell back from step {saved} to {now}")
                saved = now
            outcomes[SAME] += 1
        if done or not left:
            shop.finish(run, begin=not (run / CONFIG).exists())
            shop.check_same(run)
            run, saved = shop.path(), -1
    return Row("kill -9 at any moment", tries, outcomes)


def killed_while_saving(shop: Workshop, tries: int) -> Row:
    """SIGKILL in a call that makes a file lasting."""
    outcomes: Counter[str] = Counter()
    for _ in range(tries):
        run = shop.path()
        call = shop.random.choice(("replace", "fsync", "link"))
        with session(shop.flags(run, begin=True), (call, shop.random.randint(1, 60))) as (p, _):
            p.join(SECONDS)
        if (run / CONFIG).exists():
            reported(run)
        shop.finish(run, begin=not (run / CONFIG).exists())
        shop.check_same(run)
        outcomes[SAME] += 1
    return Row("kill -9 in the middle of saving", tries, outcomes)


def stopped(shop: Workshop, tries: int) -> Row:
    """SIGTERM, as a scheduler sends it."""
    outcomes: Counter[str] = Counter()
    for _ in range(tries):
        run = shop.path()
        with session(shop.flags(run, begin=True)) as (process, output):
            # Before the first line the process may not listen yet.
            output.readline()
            time.sleep(shop.random.uniform(0.0, 1.0))
            process.terminate()
            text = output.read()
            process.join(SECONDS)
        if process.exitcode == 0:
            outcomes["was done before it came"] += 1
            continue
        if process.exitcode != 128 + signal.SIGTERM or "stopped and saved at step" not in text:
            raise Lost(f"status {process.exitcode}: {text}")
        said = int(text.partition("saved at step ")[2].split()[0])
        if reported(run) != said:
            raise Lost(f"{run} says that it saved step {said}")
        shop.finish(run)
        shop.check_same(run)
        outcomes[f"stopped with status 143, {SAME}"] += 1
    return Row("SIGTERM from a scheduler", tries, outcomes)


def damaged(shop: Workshop, tries: int) -> Row:
    """A flipped bit or a lost end in the newest checkpoint."""
    outcomes: Counter[str] = Counter()
    before = shop.started(100)
    for _ in range(tries):
        run = Path(shutil.copytree(before, shop.path()))
        content = bytearray((run / RESUME).read_bytes())
        place = shop.random.randrange(len(content))
        if shop.random.random() < 0.5:
            content[place] ^= 1 << shop.random.randrange(8)
        else:
            del content[place:]
        (run / RESUME).write_bytes(content)
        if read_newest(run)[0]["position"] != read_state(run / PREVIOUS)["position"]:
            raise Lost(f"{run}: damage was not seen")
        flags = ["--resume", str(run), f"--steps={STEPS}"]
        with session(flags) as (process, output):
            text = output.read()
            process.join(SECONDS)
        if process.exitcode or "goes on from the checkpoint before it" not in text:
            raise Lost(text)
        shop.check_same(run)
        outcomes[f"said so, {SAME} from the checkpoint before"] += 1
    return Row("newest checkpoint damaged", tries, outcomes)


def occupied(shop: Workshop, tries: int) -> Row:
    """A second run in the folder of one that trains."""
    outcomes: Counter[str] = Counter()
    for _ in range(tries):
        run = shop.path()
        with session(shop.flags(run, begin=True)) as (_, output):
            output.readline()
            flags = shop.random.choice((["--resume", str(run)], [*FLAGS, f"--outf={run}"]))
            if _status(flags) != 2:
                raise Lost(f"{run} has two writers")
        shop.finish(run)
        shop.check_same(run)
        outcomes["second refused in one sentence; first unharmed"] += 1
    return Row("two runs in one folder", tries, outcomes)


def _status(flags: Sequence[str]) -> int | None:
    with session(list(flags)) as (process, _):
        process.join(SECONDS)
        return process.exitcode


def _contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def other_data(shop: Workshop, tries: int) -> Row:
    """Data that changed between start and resume."""
    outcomes: Counter[str] = Counter()
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16), "u1")
    for _ in range(tries):
        run, source = shop.path(), shop.folder / "images.npy"
        np.save(source, images)
        flags = [flag for flag in TINY if not flag.startswith("--data")]
        if _status([*flags, f"--data={source}", "--steps=2", f"--outf={run}"]):
            raise Lost(f"{run} did not start")
        changed = images.copy()
        changed[tuple(shop.random.randrange(size) for size in images.shape)] ^= 1
        np.save(source, changed)
        before = _contents(run)
        if _status(["--resume", str(run), "--steps=4"]) != 2 or _contents(run) != before:
            raise Lost(f"{run} went on with other data")
        outcomes[REFUSED] += 1
    return Row("one bit of the data changed before resume", tries, outcomes)


def broken_images(shop: Workshop, tries: int) -> Row:
    """Files of a folder of images that end too soon or hold noise."""
    outcomes: Counter[str] = Counter()
    for number in range(tries):
        folder, run = shop.folder / f"images{number}", shop.path()
        folder.mkdir()
        generator = np.random.default_rng(number)
        for i in range(24):
            pixels = generator.integers(0, 256, (20, 20, 3), "u1")
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
        broken = shop.random.sample(sorted(folder.iterdir()), 5)
        for path in broken:
            content = path.read_bytes()
            path.write_bytes(content[: shop.random.randrange(len(content) // 2)])
        flags = [flag for flag in TINY if not flag.startswith("--data")]
        if _status([*flags, f"--data={folder}", "--steps=2", f"--outf={run}"]):
            raise Lost(f"{run} did not train")
        skipped = {name for name, _ in json.loads((run / CONFIG).read_text())["data"]["skipped"]}
        if {Path(name).name for name in skipped} != {path.name for path in broken}:
            raise Lost(f"{skipped} were skipped of {broken}")
        outcomes["skipped, counted and named; trained on the rest"] += 1
    return Row("5 of 24 images cut off", tries, outcomes)


def jumping_clock(shop: Workshop, tries: int) -> Row:
    """The system's clock set a day back or on between any two questions."""
    outcomes: Counter[str] = Counter()
    for _ in range(tries):
        run, seed = shop.path(), shop.random.randrange(2**31)
        code = (
            "import random, time; from pygan.train import main; import sys\n"
            f"source, real = random.Random({seed}), time.time\n"
            "time.time = lambda: real() + source.uniform(-86400, 86400)\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, *shop.flags(run, begin=True)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Lost(done.stderr)
        rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
        if not all(row["images_per_s"] > 0 for row in rows):
            raise Lost(f"{run} has speeds below zero")
        shop.check_same(run)
        outcomes["ended in the same bytes"] += 1
    return Row("clock jumps", tries, outcomes)


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Path]:
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def full_disk(shop: Workshop, tries: int) -> Row:
    """A disk that is full at some moment, and has room again afterwards."""
    outcomes: Counter[str] = Counter()
    needed = sum(path.stat().st_size for path in shop.alone.iterdir())
    for _ in range(tries):
        size = shop.random.randrange(needed // 8, needed)
        with _disk(shop.folder, size) as place:
            run = place / "run"
            status = _status(shop.flags(run, begin=True))
            if status == 0:
                outcomes["there was room enough"] += 1
                continue
            if status not in (1, 2):
                raise Lost(f"status {status} on a full disk")
            if (run / CONFIG).exists():
                reported(run)
            _remount(place, f"size={2 * needed}")
            shop.finish(run, begin=not (run / CONFIG).exists())
            shop.check_same(run)
        outcomes[f"ended in one sentence; with room, {SAME}"] += 1
    return Row("disk full", tries, outcomes)


def read_only(shop: Workshop, tries: int) -> Row:
    """A disk that becomes read-only while a run trains."""
    outcomes: Counter[str] = Counter()
    for _ in range(tries):
        with _disk(shop.folder, 2**28) as place:
            run = place / "run"
            with session(shop.flags(run, begin=True)) as (process, output):
                output.readline()
                time.sleep(shop.random.uniform(0.0, 0.5))
                # The log is open for writing, so not the disk but the view of the folder.
                _freeze(run)
                process.join(SECONDS)
            status = process.exitcode
            _thaw(run)
            if status == 0:
                outcomes["was done before it came"] += 1
                continue
            if status != 1:
                raise Lost(f"status {status} on a read-only disk")
            reported(run)
            shop.finish(run)
            shop.check_same(run)
        outcomes[f"ended in one sentence; writable again, {SAME}"] += 1
    return Row("output made read-only", tries, outcomes)


def _freeze(run: Path) -> None:
    subprocess.run(["mount", "--bind", str(run), str(run)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)


def _thaw(run: Path) -> None:
    subprocess.run(["umount", str(run)], check=True)


Fault = Callable[[Workshop, int], Row]
FAULTS: tuple[Fault, ...] = (
    killed, killed_while_saving, stopped, damaged, occupied, other_data, broken_images,
    jumping_clock,
)  # fmt: skip
ON_DISKS: tuple[Fault, ...] = (full_disk, read_only)


def may_mount(folder: Path) -> bool:
    try:
        with _disk(folder, 2**20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = ["| fault | tries | outcome |", "|---|---:|---|"]
    for row in rows:
        outcomes = "; ".join(f"{count} {what}" for what, count in row.outcomes.items())
        lines.append(f"| {row.fault} | {row.tries} | {outcomes or 'left out: needs root'} |")
    return lines


def cause(tries: int, kills: int, seed: int) -> list[Row]:
    """Every fault.

    Raises:
        Lost: an outcome that must not be.
    """
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), seed)
        disks = ON_DISKS if may_mount(shop.folder) else ()
        rows = []
        for fault in (*FAULTS, *disks):
            rows.append(fault(shop, kills if fault is killed else tries))
            print(*table(rows)[-1:], file=sys.stderr, flush=True)
        left = [Row(fault.__name__.replace("_", " "), 0, Counter()) for fault in ON_DISKS]
        return rows if disks else [*rows, *left]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; the exit status."""
    parser = argparse.ArgumentParser(description="Faults of a run, and what came of them.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--tries", type=int, default=20, help="of every other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options: Any = parser.parse_args(arguments)
    rows = cause(options.tries, options.kills, options.seed)
    command = f"python tests/faults.py --kills {options.kills} --tries {options.tries}"
    publish(
        "What becomes of a run when something goes wrong",
        f"Tiny runs of {STEPS} steps, saved every 20th, at moments drawn with seed {options.seed}. "
        "Nothing that was reported saved was lost.",
        table(rows),
        f"{command} --seed {options.seed}",
        options.out,
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
