"""The tests of this folder again, on lower instruction sets and in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pygan.ops import native

HERE = Path(__file__).resolve().parent


OPERATIONS = tuple(
    HERE / f"test_{name}.py"
    for name in (
        "strided_conv",
        "strided_conv_triton",
        "norm_conv",
        "norm_conv_gpu",
        "folded_conv",
        "norm_act",
        "norm_act_triton",
        "gan_loss",
        "image_batch",
    )
)


def run_again(
    marker: str, chosen: str = "", tests: Sequence[Path] = OPERATIONS, **environment: str
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            marker,
            "-k",
            chosen,
            "-p",
            "no:cacheprovider",
            *map(str, tests),
        ],
        env=os.environ | {"PYTEST_ADDOPTS": ""} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_lower_instruction_sets(isa: str) -> None:
    module = native.load()
    assert module is not None
    if isa not in module.isas():
        assert isa != "avx2", "the native kernels are loaded, so AVX2 runs"
        pytest.skip(f"this CPU has no {isa}")
    if isa == module.isa():
        pytest.skip(f"{isa} is what the tests run on unasked")
    # Without native bfloat16 products, AVX-512 differs in bfloat16 alone from what runs unasked.
    run_again("native", "bf16 or bfloat16" if isa == "avx512" else "", PYGAN_ISA=isa)


@pytest.mark.triton
@pytest.mark.slow
def test_triton_interpreter() -> None:
    pytest.importorskip("triton")
    run_again("triton", TRITON_INTERPRET="1")


@pytest.mark.triton
@pytest.mark.slow
def test_networks_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    networks = HERE.parent / "native_cuda" / "test_fused_networks.py"
    # Every way to fuse runs on the shim; here one of each norm shows that Triton's kernels serve.
    run_again(
        "triton", "not untracked and (not instance or tanh)", [networks], TRITON_INTERPRET="1"
    )


@pytest.mark.native
def test_unknown_instruction_set_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import pygan.ops.native as n; n.load()"],
        env=os.environ | {"PYGAN_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "PYGAN_ISA is 'avx1024'" in done.stderr
