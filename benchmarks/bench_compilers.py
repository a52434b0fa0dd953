"""DCGAN's step by compilers: torch.compile in three modes, and JAX, beside eager torch and pygan.

They take minutes to compile, and JAX's convolutions are slow on a CPU, so they are a case of their
own, with few rounds, and not part of --quick.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.bench_train_step import DECIDING, WAYS, Setup, Way, require_right_steps, side_of
from benchmarks.gpu_peers import BY_HAND, Compiled
from benchmarks.measure import Case, Side
from benchmarks.parameters import pairs
from benchmarks.recorded import recorded_time
from benchmarks.same_update import Build, Models, Stepper
from benchmarks.steps import Adam

SETUP = Setup((3, 64, 64))
NAME = "dcgan64-compilers"
# Of the batch that is timed: another one would be compiled anew.
CHECK_STEPS = 2
MODES = ("default", "reduce-overhead", "max-autotune")


def _jax(form: str) -> Build:
    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        # JAX is an import of seconds, and may not be there.
        from benchmarks import jax_step

        return jax_step.builder(form, "float32")(models, device, adam)

    return build


COMPILED = (
    Way(
        "torch.compile fp32",
        "fp32",
        Compiled(replace(BY_HAND, bf16=False), mode="default"),
        baseline=True,
    ),
    *(
        Way(f"torch.compile bf16, {mode}", "bf16", Compiled(BY_HAND, mode=mode), baseline=True)
        for mode in MODES
    ),
)
JAX = tuple(
    Way(f"JAX jit fp32, {form}", "fp32", _jax(form), baseline=True)
    for form in ("dilated", "phases")
)
CHOSEN = (*(way for way in WAYS if way.name in DECIDING), *COMPILED, *JAX)


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot run here, or None."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    if device.type != "cpu" or found:
        return None
    return "torch.compile needs a C++ compiler; install g++ or clang++"


def missing_jax(device: torch.device) -> str | None:
    """Why JAX cannot run here, or None."""
    if importlib.util.find_spec("jax") is None:
        return "JAX is not installed; pip install jax"
    return None


def check(device: torch.device, sides: Sequence[Side]) -> None:
    """Every side makes the updates that float64 makes, on the same data."""
    names = {side.name for side in sides}
    ways = [way for way in CHOSEN if way.name in names]
    require_right_steps(SETUP, device, ways, SETUP.batch, CHECK_STEPS)


def _side(way: Way) -> Side:
    side = side_of(way, SETUP, full_only=True)
    missing: Callable[[torch.device], str | None] = side.missing
    if way in COMPILED:
        missing = missing_compiler
    elif way in JAX:
        missing = missing_jax
    return replace(side, missing=missing)


CASES = {
    NAME: Case(
        name=NAME,
        about=f"whole D+G step by compilers, images 3x64x64, batch {SETUP.batch}, nz 100",
        images=SETUP.batch,
        sides=tuple(map(_side, CHOSEN)),
        check=check,
        at_most={"rounds": 7, "warmup_calls": 1},
    )
}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("case", "side"), pairs(CASES))
def test_compilers(case: str, side: str, bench: Any) -> None:
    bench(CASES[case], side)
