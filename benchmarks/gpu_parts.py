"""The parts of `benchmarks.gpu_suite`: what each runs, in what order, and for how long at most."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_peers
from benchmarks.gpu_steps import CASES

ROOT = Path(__file__).parents[1]
NVCC = "/usr/local/cuda/bin/nvcc"
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
WORKERS = "4"


class Part(NamedTuple):
    """A process: its command, the seconds it may take, and those without which it is not begun.

    ``measures`` parts take ``--out --name --device --until`` and write records. ``missing`` is
    why it cannot run, or None. ``harmless`` exit statuses are no failures.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float
    measures: bool = False
    missing: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    harmless: tuple[int, ...] = (0,)


def program(name: str, usual: str) -> str | None:
    """Where a program of CUDA is, on the path or in its usual place."""
    return shutil.which(name) or (usual if os.access(usual, os.X_OK) else None)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _build() -> Part:
    nvcc = program("nvcc", NVCC)
    return Part(
        "build",
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        limit=120,
        least=30,
        missing=None if nvcc else "nvcc was not found",
        environment=(("PYGAN_EXT", "auto"), *((("CUDACXX", nvcc),) if nvcc else ())),
    )


def _tests(folder: Path, dry_run: bool) -> Part:
    where = "tests/test_power.py" if dry_run else "tests"
    command = _module("pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider")
    command += (f"--junitxml={folder / 'tests.xml'}", where)
    if importlib.util.find_spec("xdist") and not dry_run:
        # Triton compiles for each test, which takes the host, not the device.
        command += ("-n", WORKERS)
    # 5: no test has the mark.
    return Part("tests", command, limit=150, least=20, harmless=(0, 5))


def _sanitize(dry_run: bool) -> Part:
    found = program("compute-sanitizer", SANITIZER)
    short_pass = _module("benchmarks.gpu_short_pass", "--device", "cpu" if dry_run else "cuda")
    checker = (
        (found, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
        if found
        else ()
    )
    return Part(
        "sanitize",
        (*checker, *short_pass),
        limit=75,
        least=30,
        missing=None if found or dry_run else "compute-sanitizer was not found",
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def _measuring(name: str, limit: float, least: float, module: str, *arguments: str) -> Part:
    return Part(name, _module(module, *arguments), limit, least, measures=True)


# Seconds at most and at least of a family of peers.
_LIMITS = {
    "eager": (80, 25),
    "jax": (80, 30),
    "compile-default": (80, 40),
    "compile-reduce-overhead": (80, 40),
    "compile-max-autotune": (150, 70),
}
# What the targets need first.
_FIRST = (
    ("dcgan64-128", "eager"),
    ("dcgan64-1024", "eager"),
    ("dcgan32-128", "eager"),
    ("dcgan64-128", "compile-reduce-overhead"),
    ("dcgan64-128", "jax"),
)


def _steps(dry_run: bool) -> list[Part]:
    families = gpu_peers.families()
    later = [(case, family) for family in families for case in CASES]
    pairs = list(dict.fromkeys((*_FIRST, *later)))
    parts = []
    for case, family in pairs[:1] if dry_run else pairs:
        limit, least = _LIMITS[family]
        arguments = ("--case", case, "--family", family)
        part = _measuring(
            f"steps-{case}-{family}", limit, least, "benchmarks.gpu_steps", *arguments
        )
        if family == "jax":
            # Or it takes most of the memory at once.
            part = part._replace(environment=(("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),))
        parts.append(part)
    return parts


def parts(folder: Path, *, dry_run: bool = False) -> list[Part]:
    """All of them, the most valuable first."""
    build = _build()
    if dry_run:
        build = build._replace(missing="nothing is built in a dry run")
    steps = _steps(dry_run)
    first, later = steps[: len(_FIRST)], steps[len(_FIRST) :]
    return [
        build,
        _tests(folder, dry_run),
        _measuring("layers", 90, 20, "benchmarks.gpu_layers"),
        first[0],
        _measuring("operations", 40, 15, "benchmarks.gpu_operations"),
        *first[1:],
        _sanitize(dry_run),
        *later,
    ]


def selected(every: Sequence[Part], only: str | None) -> list[Part]:
    """Those whose name, or its beginning up to a dash, is in the list ``only``."""
    if only is None:
        return list(every)
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    return [
        part
        for part in every
        if any(part.name == word or part.name.startswith(f"{word}-") for word in wanted)
    ]
