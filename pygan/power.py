"""Power, energy, clocks and temperature of an NVIDIA GPU, as its driver tells them (NVML).

``read(device)`` is one look, `PowerMeter` the energy of a ``with`` block, `PowerLog` that of each
interval of a training. Where there is no NVIDIA GPU, no ``nvidia-ml-py`` or no permission, they
give None or nothing, and never raise: numbers about the machine do not stop the work on it.

Source: NVIDIA, NVML API Reference, chapters Device Queries and NvmlClocksEventReasons.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

# Bits of the clocks' event reasons.
THROTTLE = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature, by software",
    0x40: "temperature, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


class Reading(NamedTuple):
    """One look at a GPU; None for what it does not tell.

    ``watts`` drawn now, ``joules`` since the driver was loaded, clocks in MHz, ``utilization``
    from 0 to 1 over the driver's last sample, and in words what holds the clocks down.
    """

    watts: float | None
    joules: float | None
    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    utilization: float | None
    throttle: tuple[str, ...] | None


class _Gpu(NamedTuple):
    nvml: ModuleType
    handle: Any

    def ask(self, question: str, *arguments: Any) -> Any:
        """The driver's answer, or None where it or its Python module has none."""
        function = getattr(self.nvml, question, None)
        if function is None:
            return None
        try:
            return function(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None


@functools.cache
def _gpu(index: int) -> _Gpu | None:
    """The GPU that torch counts as ``index``, which need not be the driver's number."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        return _Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except (nvml.NVMLError, AttributeError, RuntimeError):
        return None


def _of(device: torch.device) -> _Gpu | None:
    if device.type != "cuda":
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def _scaled(value: Any, scale: float = 1.0) -> float | None:
    return None if value is None else float(value) * scale


def throttle_words(reasons: int) -> tuple[str, ...]:
    """The reasons of a bit mask in words; unknown bits as hexadecimal numbers."""
    bits = [1 << i for i in range(reasons.bit_length()) if reasons >> i & 1]
    return tuple(THROTTLE.get(bit, hex(bit)) for bit in bits)


def _joules(gpu: _Gpu) -> float | None:
    return _scaled(gpu.ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3)


def read(device: torch.device) -> Reading | None:
    """What the driver says of ``device`` now, or None where nobody says anything."""
    gpu = _of(device)
    if gpu is None:
        return None
    clock = functools.partial(gpu.ask, "nvmlDeviceGetClockInfo")
    reasons = gpu.ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # its name before CUDA 12.2
        reasons = gpu.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    rates = gpu.ask("nvmlDeviceGetUtilizationRates")
    return Reading(
        watts=_scaled(gpu.ask("nvmlDeviceGetPowerUsage"), 1e-3),
        joules=_joules(gpu),
        sm_mhz=_scaled(clock(getattr(gpu.nvml, "NVML_CLOCK_SM", 1))),
        memory_mhz=_scaled(clock(getattr(gpu.nvml, "NVML_CLOCK_MEM", 2))),
        celsius=_scaled(
            gpu.ask("nvmlDeviceGetTemperature", getattr(gpu.nvml, "NVML_TEMPERATURE_GPU", 0))
        ),
        utilization=None if rates is None else _scaled(rates.gpu, 1e-2),
        throttle=None if reasons is None else throttle_words(int(reasons)),
    )


def about(device: torch.device) -> dict[str, Any] | None:
    """`read` as a dictionary without what is unknown, for records; None where nothing is."""
    found = read(device)
    known = {} if found is None else found._asdict()
    return {name: value for name, value in known.items() if value is not None} or None


class PowerMeter:
    """Energy of what runs on ``device`` inside a ``with`` block.

    ``joules`` and ``watts`` (the mean) are None where the GPU does not count its energy;
    ``seconds`` always holds the length of the block, and ``reading`` the GPU as it was at the end.
    The block begins and ends with a wait for the device. The driver's counter moves in steps, so
    blocks should take seconds. All that the GPU does is counted, other programs included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.joules: float | None = None
        self.seconds = 0.0
        self.reading: Reading | None = None
        self._before: float | None = None
        self.started = 0.0

    def __enter__(self) -> PowerMeter:
        synchronize(self.device)
        gpu = _of(self.device)
        self._before = None if gpu is None else _joules(gpu)
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.started
        self.reading = read(self.device)
        after = None if self.reading is None else self.reading.joules
        if after is not None and self._before is not None:
            self.joules = after - self._before

    @property
    def watts(self) -> float | None:
        return None if self.joules is None else self.joules / self.seconds

    def images_per_joule(self, images: int) -> float | None:
        """For so many images handled in the block."""
        return images / self.joules if self.joules else None


def synchronize(device: torch.device) -> None:
    """Wait for ``device``; a CPU has nothing queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PowerLog:
    """What a training logs: ``log.since_last(images)`` once an interval.

    It does not wait for the device: an interval begins and ends where its caller reads results.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._clock = device, clock
        found = read(device)
        self._joules = None if found is None else found.joules
        self._time = clock()

    def since_last(self, images: int) -> dict[str, Any]:
        """Fields of a log line for an interval of so many images; none on a CPU.

        ``watts`` and ``images_per_joule`` are means of the interval where the GPU counts energy;
        else ``watts`` is what it drew at the end.
        """
        found = read(self._device)
        now = self._clock()
        if found is None:
            return {}
        before, seconds = self._joules, now - self._time
        self._joules, self._time = found.joules, now
        fields: dict[str, Any] = {"watts": found.watts}
        if found.joules is not None and before is not None and found.joules > before and seconds:
            used = found.joules - before
            fields = {"watts": used / seconds, "images_per_joule": images / used}
        fields["sm_mhz"], fields["celsius"] = found.sm_mhz, found.celsius
        known = {name: round(value, 2) for name, value in fields.items() if value is not None}
        # An idle GPU is held down by nothing; between two logs it may be for a moment.
        held = [reason for reason in found.throttle or () if reason != "idle"]
        return {**known, "throttle": ", ".join(held)} if held else known
