"""The sanitizers stop a kernel that is given wrong memory: a clean run of the others counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pygan.ops import native

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(
        "libasan" not in os.environ.get("LD_PRELOAD", ""),
        reason="runs on an extension built with PYGAN_SANITIZE=address,undefined",
    ),
]

# One image of one row; what is one byte or element short, or misaligned, is the case.
IMAGE_BATCH = """
import torch
from pygan import _C
assert _C.__file__ == {extension!r}
images = torch.zeros({images}, dtype=torch.uint8)
index = torch.zeros(2, dtype=torch.int64)
out = torch.empty({out})
_C.image_batch(
    images.data_ptr(), 1, 1, 64, 1, index.data_ptr() + {offset}, 0, 1, 0, out.data_ptr(), 1
)
print("came through")
"""


def run(
    folder: Path, images: int = 64, out: int = 64, offset: int = 0
) -> subprocess.CompletedProcess[str]:
    module = native.load()
    assert module is not None
    code = IMAGE_BATCH.format(extension=module.__file__, images=images, out=out, offset=offset)
    # From a folder of its own, since Python looks in the current one first.
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_right_memory_comes_through(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, "came through\n"), done.stderr


@pytest.mark.parametrize(
    ("memory", "report"),
    [
        ({"out": 63}, "ERROR: AddressSanitizer"),
        ({"images": 63}, "ERROR: AddressSanitizer"),
        ({"offset": 1}, "misaligned address"),
    ],
    ids=["write", "read", "misaligned"],
)
def test_wrong_memory_is_reported(memory: dict[str, int], report: str, tmp_path: Path) -> None:
    done = run(tmp_path, **memory)
    assert done.returncode != 0
    assert "came through" not in done.stdout
    assert report in done.stderr
    assert "image_batch" in done.stderr
