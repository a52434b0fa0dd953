"""What the numbers were measured on: conditions, peaks, memory, energy."""

from __future__ import annotations

import ctypes
import functools
import gc
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import pygan
from benchmarks.correct import DTYPE
from pygan import power
from pygan.power import synchronize
from pygan.report import cpu_facts

PRECISION = {"off": "fp32", "bf16": "bf16"}  # of each value of ``amp``
GEMM_SIZE = 2048
EMULATED_GEMM_SIZE = 256  # where a product of the other size would take minutes
COPY_BYTES = 256 * 2**20
STATE_BYTES = 64 * 2**20  # of a copy that tells in what state a CPU is, in some 20 ms
ENERGY_SECONDS = 2.0
# A GPU is that much faster than a CPU, and a clock reading costs it a wait.
GPU_GEMM, GPU_COPY, GPU_CALLS = 4, 8, 5

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _cpu_name() -> str:
    """Where a name has no number, as that of a virtual machine's CPU, with its family and model."""
    found = cpu_facts()
    name = found.get("model name")
    if name is None:
        return platform.processor() or platform.machine()
    if not re.search(r"\d", name) and {"cpu family", "model"} <= found.keys():
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def instruction_set() -> str:
    """Instruction set pygan's CPU kernels run with, or "none" where they are not built."""
    try:
        from pygan import _C
    except ImportError:
        return "none"
    return str(_C.isa())


def conditions(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a number. Names neither host nor user."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "device_type": device.type,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "logical_cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "pygan": pygan.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def emulated(precision: str, device: torch.device) -> str | None:
    """Why nothing is measured in this precision on this device, or None. "bf16" on a CPU without
    AVX-512 has no vector code in torch: plain torch's steps take minutes, and nobody trains so."""
    if precision != "bf16" or device.type != "cpu":
        return None
    try:
        has_code = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # another torch: try
        has_code = True
    return None if has_code else "torch has no vector code for bfloat16 on this CPU"


def precisions(device: torch.device) -> list[str]:
    """Those that are measured on this device."""
    return [name for name in DTYPE if emulated(name, device) is None]


def amps(device: torch.device) -> list[str]:
    """Those of `PRECISION` that are measured on this device."""
    return [amp for amp, precision in PRECISION.items() if emulated(precision, device) is None]


def _fastest(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    work()
    best, calls = float("inf"), 1 if device.type == "cpu" else GPU_CALLS
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _product(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A square matrix product, and its FLOPs."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return functools.partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * n**3


def _convolution(n: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A 3x3 convolution without padding on the CPU, and its FLOPs: about those of the product."""
    batch, channels, size = n // 32, n // 8, 16
    x = torch.randn(batch, channels, size + 2, size + 2, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return functools.partial(torch.conv2d, x, weight), 18 * batch * size**2 * channels**2


def measure_peaks(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Measured peaks: ``gflops_fp32``, ``gflops_bf16`` (arithmetic), ``gb_per_s`` (large copy).

    The fastest of ``repeats``: a peak is what the machine can do, not what it does on average.
    The arithmetic is a square matrix product; on a CPU the faster of that and a convolution, for
    torch's float32 products come from MKL, which leaves AVX-512 alone on AMD's CPUs, and its
    convolutions from oneDNN. The copy counts the bytes read and the bytes written.
    """
    peaks = {}
    on_cpu = device.type == "cpu"
    for precision, dtype in DTYPE.items():
        if emulated(precision, device) is not None:
            tried = [_product(EMULATED_GEMM_SIZE, dtype, device)]
        elif on_cpu:
            tried = [_product(GEMM_SIZE, dtype, device), _convolution(GEMM_SIZE, dtype)]
        else:
            tried = [_product(GPU_GEMM * GEMM_SIZE, dtype, device)]
        rates = [1e-9 * flops / _fastest(work, device, repeats) for work, flops in tried]
        peaks[f"gflops_{precision}"] = max(rates)
    peaks["gb_per_s"] = copy_rate(device, COPY_BYTES if on_cpu else GPU_COPY * COPY_BYTES, repeats)
    return peaks


def copy_rate(device: torch.device, size: int = STATE_BYTES, repeats: int = 2) -> float:
    """GB/s of the fastest of ``repeats`` copies of ``size`` bytes: those read and those written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2e-9 * size / _fastest(lambda: target.copy_(source), device, repeats)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _trim() -> None:
    """Give freed memory back to the system, so that it is not taken for memory in use."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


class PeakMemory:
    """Peak memory of what runs inside a ``with`` block, in ``.bytes``; None where unknown.

    On a CPU: growth of the resident set from the start of the block to its high-water mark, which
    Linux resets through /proc/self/clear_refs. It holds everything the block adds to the process:
    weights, optimizer state, activations, scratch of any library, allocator overhead. It does not
    hold what libraries had set up before, so run something small of the same kind first.
    On a GPU: torch's allocator, peak allocated above what was allocated at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        _trim()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        try:
            _CLEAR_REFS.write_text("5")
            self._start = _status_bytes("VmRSS")
        except OSError:
            self._start = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._start is None:
            return
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self.bytes = _status_bytes("VmHWM") - self._start


def energy_per_call(
    work: Callable[[], object], device: torch.device, seconds: float = ENERGY_SECONDS
) -> dict[str, Any] | None:
    """Joules a call, mean watts, and clocks and temperature at the end, from NVML; None elsewhere.

    Taken apart from the timed rounds: the energy counter moves too rarely for a single round.
    """
    if device.type != "cuda":
        return None
    calls = 0
    with power.PowerMeter(device) as meter:
        while time.perf_counter() - meter.started < seconds:
            work()
            synchronize(device)
            calls += 1
    if meter.joules is None or meter.reading is None:
        return None
    told = {name: value for name, value in meter.reading._asdict().items() if value is not None}
    return told | {"joules": meter.joules / calls, "watts": meter.watts}
