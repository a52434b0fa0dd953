"""Every configuration of the strided convolution compiles for three GPUs, without spills."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from test_triton_compile import SHARED_LIMIT, blocks_of, launches, resources  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

SIZES = ("images", "height", "width", "big_height", "big_width", "small_channels", "big_channels")
PASSES = ("up", "down", "weight_grad")
KINDS = (("half", "bf16", "tf32"), ("tf32", "fp32", "tf32"), ("ieee", "fp32", "ieee"))
CHANNELS = 256
WHOLE = ("small_channels", "big_channels")  # multiples of 16, but big_channels of flat kernels


class Variant(NamedTuple):
    conv_pass: str
    config: Any
    capability: int
    dtype: str = "bf16"
    precision: str = "tf32"
    normalized: str = "none"  # "small" or "big", the map that is normalized as it is read
    one_channel: bool = False
    bias: bool = True
    statistics: bool = False

    @property
    def copies_ahead(self) -> bool:
        """Whether both operands go to shared memory while others are multiplied."""
        if self.config.flat or self.one_channel or self.normalized != "none":
            return False
        return self.capability >= 90 and self.precision == "tf32"

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.config[:3]))
        form = f"{self.config.phases}{'flat' if self.config.flat else ''}"
        extra = f"-{self.normalized}" * (self.normalized != "none") + "-one" * self.one_channel
        extra += "-bias" * self.bias + "-statistics" * self.statistics
        kind = f"{self.dtype}-{self.precision}" if self.dtype == "fp32" else self.dtype
        return f"{self.conv_pass}-{tile}-{form}-{kind}-sm{self.capability}{extra}"


def variants() -> list[Variant]:
    """Every configuration as it is launched, in bfloat16 and in both ways to multiply float32. What
    costs few registers, a bias and statistics beside a normalized map, is there in every second."""
    from pygan.kernels.strided_conv_configs import CONFIGS, FUSED

    found = []
    reads = {"up": ("small",), "down": ("big",), "weight_grad": ("small", "big")}
    given = itertools.product(PASSES, KINDS, enumerate(SHARED_LIMIT))
    for conv_pass, (kind, dtype, precision), (i_gpu, at) in given:
        fused, maps = FUSED[kind][conv_pass], reads[conv_pass] if kind != "ieee" else ()
        launched = [(config, "none", False) for config in CONFIGS[kind][conv_pass]]
        launched += [(config, "none", True) for config in fused if conv_pass != "weight_grad"]
        launched += [(config, each, False) for config in fused for each in maps]
        for i, (config, normalized, statistics) in enumerate(launched):
            variant = Variant(conv_pass, config, at, dtype, precision, normalized)
            if conv_pass != "weight_grad":
                more = (i + i_gpu) % 2 == 0
                statistics |= more and normalized != "none"
                variant = variant._replace(bias=more, statistics=statistics)
            found.append(variant)
        if kind == "half" and at == 90:
            configs = CONFIGS[kind][conv_pass]
            found.append(Variant(conv_pass, configs[0], at, "fp16"))
            found.append(Variant(conv_pass, configs[-1], at, one_channel=True))
    return found


def compiled(variant: Variant) -> tuple[int, bytes]:
    """Bytes of shared memory, and the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pygan.kernels import strided_conv, strided_conv_weight

    config, maps = variant.config, f"*{variant.dtype}"
    arrays = {"p_coefficients": "*fp32", "slope": "fp32"} | dict.fromkeys(SIZES, "i32")
    constants: dict[str, Any] = {"PRECISION": variant.precision}
    if variant.conv_pass == "weight_grad":
        kernel = strided_conv_weight.weight_grad_kernel
        types = {"p_sums": "*fp32", "p_small": maps, "p_big": maps} | arrays
        types |= {"splits": "i32", "chunk": "i32"}
        order = ("none", "small", "big")
        constants |= {"NORMALIZED": order.index(variant.normalized), "FLAT": config.flat}
    else:
        up = variant.conv_pass == "up"
        kernel = strided_conv.up_kernel if up else strided_conv.down_kernel
        y, x = ("p_big", "p_small") if up else ("p_small", "p_big")
        types = {y: maps, "p_partials": "*fp32", x: maps, "p_weight": maps, "p_bias": "*fp32"}
        types |= arrays | {"tiles": "i32"}
        # More does not always spill more: the assembler sets itself another limit for less.
        constants |= {"BIAS": variant.bias, "STATISTICS": variant.statistics}
        constants |= {"NORMALIZED": variant.normalized != "none"}
        constants |= {"PHASES": config.phases} if up else {"FLAT": config.flat}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    if variant.one_channel:
        constants["big_channels"] = 1
    whole = [
        name
        for name in types
        if name.startswith("p_") or (name in WHOLE and not (config.flat and name == "big_channels"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(types)
            if name in whole and name not in constants
        },
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    target = GPUTarget("cuda", variant.capability, 32)
    result = triton.compile(source, target=target, options=options)
    return result.metadata.shared, result.asm["cubin"]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def machine_code(pool: ProcessPoolExecutor) -> dict[Variant, Future[tuple[int, bytes]]]:
    return {variant: pool.submit(compiled, variant) for variant in variants()}


@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_compiles(
    variant: Variant, machine_code: dict[Variant, Future[tuple[int, bytes]]], tmp_path: Path
) -> None:
    shared, code = machine_code[variant].result()
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code)
    registers, stack = resources(cubin)
    print(f"{variant.name}: {registers} registers, {stack} bytes of stack, {shared} shared")
    assert shared <= SHARED_LIMIT[variant.capability]
    if variant.copies_ahead:
        config, size = variant.config, 4 if variant.dtype == "fp32" else 2
        tile = (config.block_m + config.block_n) * config.block_k * size
        assert shared >= config.stages * tile, "a map or the weight is not copied ahead"
    assert stack == 0, f"{stack} bytes of registers spilled"
    assert blocks_of(registers, variant.config.warps) >= 1


class Copied(NamedTuple):
    """A configuration whose tiles are copied by tensor descriptors."""

    conv_pass: str
    config: Any
    capability: int
    dtype: torch.dtype
    size: int  # rows and columns of small, which shape the boxes
    bias: bool
    statistics: bool

    @property
    def name(self) -> str:
        tile = "x".join(map(str, self.config[:3]))
        kind = f"{self.dtype}".removeprefix("torch.")
        kind += "-bias" * self.bias + "-statistics" * self.statistics
        return f"{self.conv_pass}-{tile}-of-{self.size}-{kind}-sm{self.capability}"


def copied() -> list[Copied]:
    from pygan.kernels.strided_conv_configs import with_descriptors

    found = []
    capabilities = [at for at in SHARED_LIMIT if at >= 90]
    forms = [(4, True, True), (16, False, True), (8, True, False), (64, False, False)]
    for dtype, conv_pass in itertools.product((torch.bfloat16, torch.float32), PASSES[:2]):
        for i, (size, bias, statistics) in enumerate(forms):
            given = (conv_pass, CHANNELS, CHANNELS, dtype, "tf32", statistics)
            for j, config in enumerate(with_descriptors(*given)):
                # Each with and without statistics on every GPU, and with a bias on one of them.
                at = capabilities[(i + j) % len(capabilities)]
                found.append(Copied(conv_pass, config, at, dtype, size, bias, statistics))
    return found


def copying(variant: Copied) -> tuple[int, bytes, str, str]:
    """Bytes of shared memory, the machine code, its PTX and Triton's own code for a GPU."""
    from pygan.kernels import strided_conv

    conv_pass, config, size = variant.conv_pass, variant.config, variant.size
    small, big = (
        torch.empty((40, CHANNELS, each, each), dtype=variant.dtype, device="meta")
        for each in (size, 2 * size)
    )
    weight = torch.empty((CHANNELS, 4, 4, CHANNELS), dtype=variant.dtype, device="meta")
    bias, partials = None, None
    if variant.bias:
        bias = torch.empty(CHANNELS, device="meta")
    if variant.statistics:
        partials = strided_conv.partials(conv_pass, small, big, 1, config)
    extra = (bias, partials)
    (launch,) = launches(
        lambda: strided_conv.run(conv_pass, small, big, weight, config, "tf32", *extra)
    )
    result = launch.compiled(variant.capability)
    return result.metadata.shared, *(result.asm[stage] for stage in ("cubin", "ptx", "ttgir"))


@pytest.fixture(scope="module")
def copying_code(pool: ProcessPoolExecutor) -> dict[Copied, Future[tuple[int, bytes, str, str]]]:
    return {variant: pool.submit(copying, variant) for variant in copied()}


@pytest.mark.parametrize("variant", copied(), ids=lambda variant: variant.name)
def test_descriptors_compile_to_bulk_copies(
    variant: Copied,
    copying_code: dict[Copied, Future[tuple[int, bytes, str, str]]],
    tmp_path: Path,
) -> None:
    shared, code, ptx, ttgir = copying_code[variant].result()
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code)
    registers, stack = resources(cubin)
    print(f"{variant.name}: {registers} registers, {stack} bytes of stack, {shared} shared")
    config = variant.config
    tile = (config.block_m + config.block_n) * config.block_k * variant.dtype.itemsize
    assert config.stages * tile <= shared <= SHARED_LIMIT[variant.capability]
    assert stack == 0, f"{stack} bytes of registers spilled"
    assert blocks_of(registers, config.warps) >= 1
    for rank in (2, 4 if variant.conv_pass == "up" else 5):
        assert f"cp.async.bulk.tensor.{rank}d.shared" in ptx
    if not variant.bias:
        assert "ld.global" not in ptx, "something is loaded value by value"
    products = re.findall(r"ttng\.(?:warp_group_dot|tc_gen5_mma) %.*", ttgir)
    assert products
    assert ("wgmma.mma_async" if variant.capability == 90 else "tcgen05.mma") in ptx
    if (variant.conv_pass, variant.dtype) != ("up", torch.float32):
        assert "ttg.local_load" not in ttgir, "an operand goes through registers"
        for product in products:
            assert product.count("!ttg.memdesc<") >= 2, product


def test_sum_and_pack_compile(tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pygan.kernels.strided_conv_weight import weight_kernel

    steps = ("out_tap_step", "out_step", "in_tap_step", "in_step")
    types = {"p_out": "*bf16", "p_in": "*fp32"}
    types |= dict.fromkeys(("splits", "split_step", *steps, "big_channels"), "i32")
    source = ASTSource(
        fn=weight_kernel, signature=types | {"BLOCK": "constexpr"}, constexprs={"BLOCK": 128}
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    assert resources(cubin)[1] == 0
