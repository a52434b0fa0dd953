"""Kernels keep within their arrays, masked loads and stores too, which no sanitizer sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pygan.ops import native

KERNELS = Path(__file__).with_name("guarded_kernels.py")


@pytest.mark.native
@pytest.mark.parametrize("side", ["first", "last"])
@pytest.mark.parametrize("operation", ["norm_act", "gan_loss", "image_batch", "strided_conv"])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_arrays_at_the_edge_of_memory(isa: str, operation: str, side: str) -> None:
    module = native.load()
    assert module is not None and module.__file__ is not None
    if isa not in module.isas():
        pytest.skip(f"this CPU has no {isa}")
    done = subprocess.run(
        [sys.executable, str(KERNELS), module.__file__, operation, side],
        env=os.environ | {"PYGAN_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} {done.returncode}: {done.stderr[-2000:]}"
    assert lines[-1].split()[0] == isa
    assert int(lines[-1].split()[1]) == len(lines) - 1 > 0
