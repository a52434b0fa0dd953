"""What NVML says, in words and numbers, from a driver that is a fake."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import train

from pygan import power

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class NVMLError(Exception):
    pass


class Driver:
    """A GPU that draws 200 W at 1980 MHz; ``missing`` questions have no answer."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = NVMLError

    def __init__(self) -> None:
        self.millijoules = 5_000
        self.reasons = 0x4 | 0x20
        self.missing: set[str] = set()
        self.initialized = 0
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetPowerUsage": lambda: 200_000,
            "nvmlDeviceGetTotalEnergyConsumption": lambda: self.millijoules,
            "nvmlDeviceGetClockInfo": lambda kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetTemperature": lambda sensor: 61,
            "nvmlDeviceGetUtilizationRates": lambda: SimpleNamespace(gpu=87, memory=40),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda: self.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: 0x1,
        }
        if name not in answers:
            raise AttributeError(name)

        def answer(handle: str, *arguments: int) -> Any:
            assert handle == "GPU-12-34"
            self.asked.append(name)
            if name in self.missing:
                raise NVMLError(name)
            return answers[name](*arguments)

        return answer

    def nvmlInit(self) -> None:
        self.initialized += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(power, "synchronize", lambda device: None)
    power._gpu.cache_clear()
    yield fake
    power._gpu.cache_clear()


def test_reading(driver: Driver) -> None:
    words = ("power cap", "temperature, by software")
    assert power.read(GPU) == (200.0, 5.0, 1980.0, 3201.0, 61.0, 0.87, words)
    assert power.read(torch.device("cuda")) == power.read(GPU)
    assert driver.initialized == 1


def test_what_the_driver_does_not_tell_is_none(driver: Driver) -> None:
    driver.missing = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetUtilizationRates"}
    found = power.read(GPU)
    assert found is not None
    assert (found.joules, found.utilization, found.watts) == (None, None, 200.0)
    assert set(power.about(GPU) or {}) == {
        "watts", "sm_mhz", "memory_mhz", "celsius", "throttle",
    }  # fmt: skip
    with power.PowerMeter(GPU) as meter:
        pass
    assert (meter.joules, meter.watts, meter.images_per_joule(64)) == (None, None, None)


def test_the_question_of_older_drivers(driver: Driver) -> None:
    driver.missing = {"nvmlDeviceGetCurrentClocksEventReasons"}
    found = power.read(GPU)
    assert found is not None and found.throttle == ("idle",)


def test_unknown_reasons_stay_numbers() -> None:
    assert power.throttle_words(0x8 | 0x400) == ("hardware slowdown", "0x400")
    assert power.throttle_words(0) == ()


def test_meter(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(power.time, "perf_counter", lambda: next(clock))
    with power.PowerMeter(GPU) as meter:
        driver.millijoules += 500_000
    assert (meter.joules, meter.seconds, meter.watts) == (500.0, 2.0, 250.0)
    assert meter.images_per_joule(1000) == 2.0
    assert meter.reading is not None and meter.reading.celsius == 61.0


def test_log_of_intervals(driver: Driver) -> None:
    clock = iter([0.0, 4.0, 5.0])
    log = power.PowerLog(GPU, lambda: next(clock))
    driver.millijoules += 1_000_000
    assert log.since_last(3000) == {
        "watts": 250.0, "images_per_joule": 3.0, "sm_mhz": 1980.0, "celsius": 61.0,
        "throttle": "power cap, temperature, by software",
    }  # fmt: skip
    # The counter has not moved: what is drawn now, and no energy.
    driver.reasons = 0x1
    assert log.since_last(10) == {"watts": 200.0, "sm_mhz": 1980.0, "celsius": 61.0}


def test_nothing_on_a_cpu(driver: Driver) -> None:
    assert power.read(CPU) is None and power.about(CPU) is None
    assert power.PowerLog(CPU).since_last(10) == {}
    with power.PowerMeter(CPU) as meter:
        pass
    assert meter.joules is None and meter.seconds >= 0 and not driver.asked


@pytest.mark.parametrize("fault", ["not installed", "no driver", "unknown GPU"])
def test_without_nvml(driver: Driver, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def fail(*arguments: object) -> None:
        raise NVMLError(fault)

    if fault == "not installed":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        name = "nvmlInit" if fault == "no driver" else "nvmlDeviceGetHandleByUUID"
        monkeypatch.setattr(driver, name, fail)
    assert power.read(GPU) is None
    assert power.PowerLog(GPU).since_last(10) == {}


def test_a_training_logs_each_of_its_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Log:
        def __init__(self, device: torch.device) -> None:
            pass

        def since_last(self, images: int) -> dict[str, Any]:
            asked.append(images)
            return {"watts": 100.0 + len(asked), "images_per_joule": 3.0, "throttle": "power cap"}

    monkeypatch.setattr(power, "PowerLog", Log)
    assert train("--steps=10", f"--outf={tmp_path / 'run'}") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "step" in row]
    # Eight images a step, a line every four steps and one at the end.
    assert asked == [32, 32, 16]
    assert [row["watts"] for row in rows] == [101.0, 102.0, 103.0]
    assert all(row["throttle"] == "power cap" for row in rows)
