"""Every Triton kernel compiles to machine code, without spills, with no GPU present."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

# Shared memory that one block may use, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def variants() -> list[Any]:
    from pygan.kernels import gan_loss, image_batch

    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        for targets in (False, True):
            types = {
                "p_grad": f"*{dtype}",
                "p_partial": "*fp32",
                "p_logits": f"*{dtype}",
                "p_first_targets": "*fp32",
                "p_second_targets": "*fp32",
                "first_target": "fp32",
                "second_target": "fp32",
                "first_scale": "fp32",
                "second_scale": "fp32",
                "first_size": "i32",
                "second_size": "i32",
            }
            constants = {
                "FIRST_TARGETS": targets,
                "SECOND_TARGETS": targets,
                "BLOCK": gan_loss.BLOCK,
            }
            name = f"gan_loss-{dtype}-{'targets' if targets else 'target'}"
            found.append(pytest.param(gan_loss.gan_loss_kernel, types, constants, id=name))
        for flip in (False, True):
            types = {
                "p_out": f"*{dtype}",
                "p_images": "*u8",
                "p_index": "*i64",
                "p_flip": "*u8",
                "width": "i32",
                "channels": "i32",
                "size": "i32",
            }
            constants = {"FLIP": flip, "BLOCK": image_batch.BLOCK}
            name = f"image_batch-{dtype}-{'flip' if flip else 'plain'}"
            found.append(pytest.param(image_batch.image_batch_kernel, types, constants, id=name))
    for terms in (1, 2):
        types = {"p_out": "*fp32", "p_partial": "*fp32", "blocks": "i32"}
        constants = {"TERMS": terms, "BLOCK": 64}
        found.append(
            pytest.param(gan_loss.gan_loss_sum_kernel, types, constants, id=f"gan_loss_sum-{terms}")
        )
    return found


def resources(cubin: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
@pytest.mark.parametrize(("kernel", "types", "constants"), variants())
def test_compiles(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, tmp_path: Path
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, stack = resources(cubin)
    assert stack == 0, f"{stack} bytes of registers spilled"
    assert registers <= 255
