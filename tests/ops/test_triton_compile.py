"""Every Triton kernel compiles to machine code, without spills, with no GPU present."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

# Shared memory that one block may use, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 64 * 1024  # of a multiprocessor, all of which one block may have


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
    return found


class Launch(NamedTuple):
    """A kernel as a launcher starts it."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    multiples: tuple[str, ...]  # of 16: pointers, and sizes that are

    def compiled(self, capability: int) -> Any:
        """The binary, with its stages, for a GPU of this compute capability."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        source = ASTSource(
            fn=self.kernel,
            signature={k: self.types.get(k, "constexpr") for k in names},
            constexprs=self.constants,
            attrs={(names.index(k),): [["tt.divisibility", 16]] for k in self.multiples},
        )
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options)

    @property
    def name(self) -> str:
        constants = {k: v for k, v in self.constants.items() if v is not None}
        absent = [k.removeprefix("p_") for k, v in self.constants.items() if v is None]
        words = [self.kernel.__name__, *(f"{k}={v}" for k, v in constants.items())]
        words += [kind for kind in self.types.values() if kind in ("*bf16", "*fp32")][:1]
        return "-".join([*words, *(["no", *absent] if absent else [])])


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}


def type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
    return TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]


def launches(run: Callable[[], object]) -> list[Launch]:
    """What ``run`` launches, which is not run."""
    found = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {name: more.pop(name) for name in kernel.arg_names if name in more}
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        constants = {k: v for k, v in given.items() if v is None or k in fixed}
        rest = {k: v for k, v in given.items() if k not in constants}
        types = {k: type_of(v) for k, v in rest.items()}
        plain = {p.name for p in kernel.params if p.do_not_specialize}
        sizes = [
            k for k, v in rest.items() if isinstance(v, int) and v % 16 == 0 and k not in plain
        ]
        multiples = [k for k in rest if k in sizes or types[k].startswith("*")]
        found.append(Launch(kernel, types, constants, more, tuple(multiples)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        run()
    return found


def norm_act_launches(
    shape: tuple[int, ...],
    last: bool,
    dtype: torch.dtype,
    activation: int,
    training: bool,
    averaged: bool = False,
) -> list[Launch]:
    """Forward and backward with all that they may be given; ``averaged`` as instance norms are."""
    from pygan.kernels import norm_act, norm_act_grad

    groups = (shape[0] if averaged else 2) if training else 1
    x = torch.empty(shape, dtype=dtype, device="meta")
    channels, size = shape[1], x.shape[2:].numel()
    statistics = x.new_empty((2, groups, channels), dtype=torch.float32)
    weight, bias, mean, var = torch.empty((4, channels), device="meta")
    map = norm_act.cut(shape[0] // groups * size, channels, size, groups, last)

    def run() -> None:
        if training:
            variance, running = (statistics[0], None) if averaged else (None, (mean, var))
            parameters = (weight, bias, map, 0.1, 1e-5, activation, 0.2)
            norm_act.statistics_and_values(x, statistics, variance, running, x, *parameters)
        else:
            parameters = (weight, bias, map, 1e-5, activation, 0.2)
            norm_act.values(x, statistics, (mean, var), x, *parameters)
        given = (weight, bias, x, x, statistics, weight, bias)
        norm_act_grad.gradients(x, *given, map, training, activation, 0.2)

    return launches(run)


def norm_act_variants() -> list[Launch]:
    """Every kernel as it is launched in both layouts, in one launch and in three, the lightest and
    the heaviest activation, and an odd number of channels."""
    found: dict[str, Launch] = {}
    none, tanh = 0, 3
    shapes = [(8, 64, 16, 16), (128, 64, 64, 64), (1024, 512, 4, 4)]
    usual = (torch.bfloat16, tanh, True)
    kinds = [usual, (torch.bfloat16, tanh, False), (torch.bfloat16, none, True)]
    kinds.append((torch.float32, tanh, True))
    cases = [*itertools.product(shapes, kinds), ((8, 33, 9, 7), usual)]
    averaged = (torch.bfloat16, tanh, True, True)
    cases += [((8, 64, 16, 16), averaged), ((8, 64, 256, 256), averaged)]
    for (shape, kind), last in itertools.product(cases, (True, False)):
        for each in norm_act_launches(shape, last, *kind):
            found.setdefault(f"{each.name}-{each.multiples}", each)
    return list(found.values())


def coefficients_variants() -> list[Launch]:
    """The kernels that merge parts, many and few, and make coefficients, with all that they may be
    given and with as little."""
    from pygan.kernels import norm_act_coefficients as kernels

    found: dict[str, Launch] = {}
    for channels, rows, full in itertools.product((64, 33), (8192, 40), (True, False)):
        parts = torch.empty((2, rows, 3, channels), device="meta")
        statistics, coefficients = torch.empty((2, 2, channels), device="meta"), parts[:, 0]
        weight, bias, mean, var = torch.empty((4, channels), device="meta")
        affine, running = ((weight, bias), (mean, var)) if full else ((None, None), None)
        filled, last = (coefficients, statistics, running), (*affine, 1e-5)

        def run(
            filled: Any = filled, last: Any = last, affine: Any = affine, parts: Any = parts
        ) -> None:
            coefficients, statistics, running = filled
            kernels.merge(statistics, coefficients, running, parts, *affine, 0.1, 1e-5)
            kernels.from_statistics(*filled, *last)

        for each in launches(run):
            found.setdefault(f"{each.name}-{each.multiples}", each)
    assert len({each.kernel for each in found.values()}) == 3
    return list(found.values())


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
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={})
    require_fit(compiled, capability, tmp_path)


def require_fit(compiled: Any, capability: int, folder: Path) -> None:
    """No spills, and no more than one block may have."""
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, stack = resources(cubin)
    assert stack == 0, f"{stack} bytes of registers spilled"
    assert blocks_of(registers, compiled.metadata.num_warps) >= 1


def blocks_of(registers: int, warps: int) -> int:
    """How many blocks the registers of a multiprocessor are enough for. A warp gets them by 256."""
    return REGISTERS // (warps * 256 * -(-registers * 32 // 256))


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("launch", coefficients_variants(), ids=lambda launch: launch.name)
def test_coefficients_compile_as_they_are_launched(
    launch: Launch, capability: int, tmp_path: Path
) -> None:
    require_fit(launch.compiled(capability), capability, tmp_path)


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("launch", norm_act_variants(), ids=lambda launch: launch.name)
def test_norm_act_compiles_as_it_is_launched(
    launch: Launch, capability: int, tmp_path: Path
) -> None:
    require_fit(launch.compiled(capability), capability, tmp_path)
