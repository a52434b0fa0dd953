"""Runs of the training command that are small enough for tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

from pygan.checkpoint import read_weights
from pygan.train import main

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--data=fake", "--image-size=16", "--batch-size=8", "--nz=8", "--ngf=8", "--ndf=8",
    "--threads=1", "--device=cpu", "--amp=off", "--log-every=4",
)  # fmt: skip


def train(*flags: str) -> int:
    """The exit status of a tiny run in this process."""
    return main([*TINY, *flags])


def resume(run: Path, *flags: str) -> int:
    return main(["--resume", str(run), *flags])


def start(*arguments: str, **keywords: Any) -> subprocess.Popen[str]:
    """A Python process with one thread that imports this checkout, its output on a pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords,
    )  # fmt: skip


def _killed_in(place: str, count: int) -> None:
    """Makes the `count`-th call of `os.<place>` in this process its end, by SIGKILL."""
    original = getattr(os, place)

    def wrapped(*arguments: Any) -> Any:
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, place, wrapped)


def _session(output: Connection, flags: list[str], trap: tuple[str, int] | None) -> None:
    os.dup2(output.fileno(), 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    if trap is not None:
        _killed_in(*trap)
    sys.exit(main(flags))


@contextmanager
def session(
    flags: list[str], trap: tuple[str, int] | None = None
) -> Iterator[tuple[BaseProcess, TextIO]]:
    """The command in a process of its own, and its output.

    The process is forked from one that has torch loaded already, which makes dozens of them
    affordable. `trap`, the name of a function in `os` and a number, kills it in that call of it.
    """
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure"]
    context.set_forkserver_preload(["training", *slow])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_session, args=(writer, flags, trap))
    process.start()
    writer.close()
    with os.fdopen(os.dup(reader.fileno())) as output:
        reader.close()
        try:
            yield process, output
        finally:
            process.kill()
            process.join()


def weights(run: Path) -> dict[str, bytes]:
    """Every parameter and buffer of the newest networks of a run, as bytes."""
    found = {}
    for letter in "GD":
        newest = max(run.glob(f"net{letter}_epoch_*.pth"), key=lambda p: int(p.stem.split("_")[-1]))
        for name, tensor in read_weights(newest)[0].items():
            found[f"{letter}.{name}"] = tensor.numpy().tobytes()
    return found


def numbers(run: Path) -> list[dict[str, float]]:
    """log.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in rows]
