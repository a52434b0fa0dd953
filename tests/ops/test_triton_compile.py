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
                "count": "i32",
                "width": "i32",
                "channels": "i32",
                "size": "i32",
                "blocks": "i32",
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
    return found + norm_act_variants()


def norm_act_variants() -> list[Any]:
    """Every kernel in both layouts, in bfloat16 and with all that it may be given."""
    from pygan.kernels import norm_act, norm_act_grad

    scalars = ("momentum", "unbiased", "eps", "slope")
    maps = ("p_x", "p_y", "p_dy", "p_dx")
    found = []
    for module in (norm_act, norm_act_grad):
        names = [name for name in vars(module) if name.startswith("norm_act_")]
        for name in (name for name in names if name.endswith("_kernel")):
            kernel = getattr(module, name)
            merges = "BLOCK_B" in kernel.arg_names
            for channels_last in (True, False) if "CHANNELS_LAST" in kernel.arg_names else (True,):
                tile = (norm_act.MERGED, norm_act.MERGED_CHANNELS)
                if not merges:
                    columns = norm_act.WIDEST if channels_last else 1
                    tile = (norm_act.TILE // columns, columns)
                constants = {
                    "ACTIVATION": 3,
                    "TRAINING": True,
                    "CHANNELS_LAST": channels_last,
                    "BLOCK_B" if merges else "BLOCK_R": tile[0],
                    "BLOCK_C": tile[1],
                }
                taken = {k: v for k, v in constants.items() if k in kernel.arg_names}
                types = {
                    argument: "*bf16"
                    if argument in maps
                    else "*fp32"
                    if argument.startswith("p_")
                    else "fp32"
                    if argument in scalars
                    else "i32"
                    for argument in kernel.arg_names
                    if argument not in taken
                }
                layout = "last" if channels_last else "first"
                found.append(pytest.param(kernel, types, taken, id=f"{name}-{layout}"))
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

    from pygan.kernels import norm_act

    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    # Kernels of tiles are launched so; the others with what Triton takes by itself.
    options = {"num_warps": norm_act.WARPS} if "BLOCK_R" in constants else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, stack = resources(cubin)
    assert stack == 0, f"{stack} bytes of registers spilled"
    assert registers <= 255
