"""The benchmarks' own arithmetic: ratios, work counted, replayed samples, tables."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import pygan
from benchmarks import (
    bench_compilers,
    bench_dropin,
    bench_folded_conv,
    bench_memory,
    bench_other_steps,
    bench_penalty,
    bench_sampling,
    bench_strided_conv,
    bench_train_step,
    dropin_networks,
    machine,
    measure,
    profile_step,
    report,
    same_update,
    summary,
    targets,
    training_memory,
    work,
)
from benchmarks.bench_gan_loss import CASES as LOSS_CASES
from benchmarks.bench_train_step import CASES as STEP_CASES
from benchmarks.bench_train_step import PLAIN
from benchmarks.correct import CheckFailed, relative_error, require_right
from benchmarks.ratio import median_interval, speed_ratio, spread
from benchmarks.recorded import recorded_time, replay
from benchmarks.steps import EagerStep, Networks, Writing
from pygan import power
from pygan.errors import UserError
from pygan.models import dcgan

pytest_plugins = ["pytester"]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


# Ratios


def test_ratio_is_taken_within_a_round() -> None:
    # Each round the machine is half as fast as before; side by side we are always 2x.
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    ratio = speed_ratio([seconds / 2 for seconds in baseline], baseline)
    assert ratio[:3] == (2.0, 2.0, 2.0)


def test_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="3 rounds against 2"):
        speed_ratio([1.0, 1.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("n", "rank", "coverage"),
    # 1 - 2 P(Binomial(n, 1/2) < rank), the tabulated ranks of the 95% interval of a median.
    [(5, 1, 0.9375), (6, 1, 0.96875), (7, 1, 0.984375), (9, 2, 0.9609375), (15, 4, 0.96484375)],
)
def test_interval_of_the_median(n: int, rank: int, coverage: float) -> None:
    shuffled = [float(i) for i in range(n, 0, -1)]
    assert median_interval(shuffled) == (rank, n + 1 - rank, coverage)


def test_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(4000, 9).exponential_(generator=generator)
    truth = torch.log(torch.tensor(2.0)).item()
    intervals = [median_interval(row.tolist()) for row in samples]
    covered = sum(low <= truth <= high for low, high, _ in intervals) / len(intervals)
    # Three standard deviations of a share of 4000.
    expected = intervals[0][2]
    assert abs(covered - expected) < 3 * (expected * (1 - expected) / 4000) ** 0.5


def test_spread() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


# Work


def _meta(size: int, channels: int) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        return dcgan(image_size=size, channels=channels)


@pytest.mark.parametrize(
    ("size", "channels", "minimal", "naive"),
    [(64, 3, 2.275e9, 2.482e9), (32, 1, 0.376e9, 0.41e9)],
)
def test_flops_of_an_update(size: int, channels: int, minimal: float, naive: float) -> None:
    generator, discriminator = _meta(size, channels)
    g = work.count_forward(generator, (100, 1, 1))
    d = work.count_forward(discriminator, (channels, size, size))
    assert work.update_flops(g, d) == pytest.approx(minimal, rel=2e-3)
    assert work.update_flops(g, d, naive=True) == pytest.approx(naive, rel=2e-3)


def test_layers_are_counted_by_hand() -> None:
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 2, 4, 2, 1),
        )
    count = work.count_forward(network, (3, 16, 16))
    # The convolution sweeps its 8x8 output, the transposed one its 8x8 input.
    assert count.first_macs == 3 * 8 * 16 * 64
    assert count.macs == count.first_macs + 8 * 2 * 16 * 64
    assert count.first_moved == 3 * 256 + 8 * 64
    assert count.moved == count.first_moved + 8 * 64 + 2 * 256
    assert count.normed == 8 * 64
    assert count.weights == 3 * 8 * 16 + 8 * 2 * 16


def test_bytes_of_an_update() -> None:
    # A G of one layer and a D of one, both without norm: every pass is listed here.
    with torch.device("meta"):
        generator = nn.Sequential(nn.ConvTranspose2d(10, 3, 4, 1, 0, bias=False))
        discriminator = nn.Sequential(nn.Conv2d(3, 1, 4, 1, 0, bias=False))
    found = work.train_step_work(
        generator, discriminator, (10, 1, 1), (3, 4, 4), batch=2, itemsize=4
    )
    image, z, logit = 48, 10, 1
    g_passes = 2 * (z + image)  # forward, weight gradient
    d_passes = 2 * 2 * (image + logit) + 2 * (image + logit)
    weights = 2 * 480 + 2 * 48 + 2 * 48
    adam = 7 * (480 + 48)
    assert found.bytes == 4 * (2 * (g_passes + d_passes) + weights + adam)
    assert found.flops == 2 * 2 * (2 * 480 + 2 * 2 * 48 + 2 * 48)


def test_work_of_a_convolution() -> None:
    # The three passes sweep the same weights; torch's own count of the layer agrees.
    found = work.strided_conv_work(2, 8, 6, 5, itemsize=2)
    with torch.device("meta"):
        layer = nn.Sequential(nn.ConvTranspose2d(6, 5, 4, 2, 1, bias=False))
    count = work.count_forward(layer, (6, 8, 8))
    assert found.flops == 2 * 2 * count.macs
    assert found.bytes == 2 * (2 * count.moved + count.weights)
    assert work.forward_work(layer, (6, 8, 8), 2, 2) == found
    folded = work.folded_conv_work(2, 8, 6, 5, passes=3, itemsize=2)
    assert folded.flops == 3 * found.flops
    assert folded.bytes == 3 * 2 * (2 * count.moved + 9 * 6 * 5)


# Replay


class Recorder:
    """What pytest-benchmark does with a timer in pedantic mode."""

    def __init__(self, readings: int = 2) -> None:
        self.seconds: list[float] = []
        self.calls = 0
        self.readings = readings

    def pedantic(self, target: Any, *, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            start = recorded_time()
            for _ in range(iterations):
                target()
                self.calls += 1
            if self.readings == 2:
                self.seconds.append((recorded_time() - start) / iterations)


def test_replay_gives_the_recorded_durations() -> None:
    recorder = Recorder()
    replay(recorder, [0.3, 0.1, 0.7], iterations=4)
    assert recorder.seconds == [0.3 / 4, 0.1 / 4, 0.7 / 4]
    assert recorder.calls == 12


def test_replay_notices_unread_samples() -> None:
    with pytest.raises(RuntimeError, match="3 of 6 clock readings unread"):
        replay(Recorder(readings=1), [0.3, 0.1, 0.7], iterations=1)


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pytest that is run by a test starts as if there were no other."""
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unconfigured")
def test_replay_through_pytest_benchmark(pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_benchmark")
    pytester.makepyfile(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import pytest
        from benchmarks.recorded import recorded_time, replay

        @pytest.mark.benchmark(timer=recorded_time)
        def test_one(benchmark):
            replay(benchmark, [0.5, 0.25, 2.0], 1)

        @pytest.mark.benchmark(timer=recorded_time)
        def test_many(benchmark):
            replay(benchmark, [0.5, 0.25, 2.0], 5)
        """
    )
    arguments = ["--benchmark-only", "--benchmark-json=out.json", "-p", "no:cacheprovider"]
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=2)
    one, many = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert one["stats"]["data"] == [0.5, 0.25, 2.0]
    assert many["stats"]["data"] == [0.1, 0.05, 0.4]
    assert many["stats"]["iterations"] == 5


# Measuring


def _case(calls: list[str], check: Any = lambda device, sides: None) -> measure.Case:
    def side(name: str, baseline: bool) -> measure.Side:
        return measure.Side(
            name=name,
            precision="fp32",
            build=lambda device: lambda: calls.append(name),
            work=work.Work(2e6, 1e6),
            baseline=baseline,
        )

    sides = (side("plain", True), side("ours", False))
    return measure.Case("made-up", "nothing", images=10, sides=sides, check=check)


def test_sides_take_turns_and_turns_to_be_first() -> None:
    order: list[str] = []
    rows = measure.interleave(
        [lambda: order.append("a"), lambda: order.append("b")], [1, 2], rounds=3, device=CPU
    )
    assert "".join(order) == "abbbbaabb"
    assert [len(row) for row in rows] == [3, 3]
    assert all(seconds > 0 for row in rows for seconds in row)


def test_a_red_check_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def wrong(device: torch.device, sides: Any) -> None:
        raise CheckFailed("ours is wrong")

    case = _case(calls, wrong)
    selected = [(case.name, side.id) for side in case.sides]
    session = measure.Session(selected, measure.QUICK, CPU)
    monkeypatch.setattr(machine, "measure_peaks", lambda device, repeats: PEAKS)
    for _ in case.sides:
        with pytest.raises(CheckFailed, match="ours is wrong"):
            session.samples(case)
    assert not calls


def test_a_missing_side_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    case = _case(calls)
    gone = replace(case.side("ours"), missing=lambda device: f"nothing for {device}")
    case = replace(case, sides=(case.side("plain"), gone), facts=lambda: {"layer": "64→3"})
    monkeypatch.setattr(machine, "measure_peaks", lambda device, repeats: PEAKS)
    session = measure.Session([(case.name, side.id) for side in case.sides], measure.QUICK, CPU)
    assert [side.name for side in session.sides(case)] == ["plain"]
    rates = iter([30.0, 60.0])
    monkeypatch.setattr(machine, "copy_rate", lambda device: next(rates))
    record = session.record(case, case.side("plain"))
    assert record["layer"] == "64→3"
    assert record["copy_gb_per_s"] == [30.0, 60.0]
    assert set(calls) == {"plain"}


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_that_torch_only_emulates_is_left_out(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    namespace = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: supported)
    monkeypatch.setattr(torch.ops, "mkldnn", namespace)
    assert machine.precisions(CPU) == (["fp32", "bf16"] if supported else ["fp32"])
    assert machine.amps(CPU) == (["off", "bf16"] if supported else ["off"])
    assert machine.precisions(torch.device("cuda")) == ["fp32", "bf16"]
    case = _case([])
    plain, ours = case.sides
    case = replace(case, sides=(plain, replace(ours, precision="bf16")))
    session = measure.Session([(case.name, side.id) for side in case.sides], measure.QUICK, CPU)
    assert [side.name for side in session.sides(case)] == ["plain", "ours"][: 1 + supported]
    monkeypatch.setattr(machine, "GEMM_SIZE", 64)
    monkeypatch.setattr(machine, "EMULATED_GEMM_SIZE", 32)
    sizes = []

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        sizes.append((out.dtype, len(out)))

    monkeypatch.setattr(torch, "mm", product)
    machine.measure_peaks(CPU, 1)
    assert set(sizes) == {(torch.float32, 64), (torch.bfloat16, 64 if supported else 32)}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\ncpu family\t: 7\nmodel\t\t: 8\nmodel name\t: AMD EPYC\n",
            "AMD EPYC (family 26, model 2)",
        ),
        ("cpu family\t: 25\nmodel\t: 17\nmodel name\t: AMD EPYC 9354\n", "AMD EPYC 9354"),
        ("model name\t: A core\n", "A core"),
    ],
)
def test_a_cpus_name_tells_generations_apart(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr("pygan.report._CPUINFO", tmp_path / "cpuinfo")
    assert machine._cpu_name() == name
    monkeypatch.setattr("pygan.report._CPUINFO", tmp_path / "none")
    assert machine._cpu_name() == (platform.processor() or platform.machine())


@pytest.mark.parametrize("faster", ["product", "convolution"])
def test_a_cpus_peak_is_that_of_the_faster_library(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "emulated", lambda precision, device: None)
    monkeypatch.setattr(machine, "_product", lambda n, dtype, device: ("product", 3 * 10**9))
    monkeypatch.setattr(machine, "_convolution", lambda n, dtype: ("convolution", 10**9))
    monkeypatch.setattr(machine, "COPY_BYTES", 64)
    seconds = {faster: 0.1}
    monkeypatch.setattr(machine, "_fastest", lambda work, device, repeats: seconds.get(work, 1.0))
    peaks = machine.measure_peaks(CPU, 1)
    assert peaks["gflops_fp32"] == pytest.approx(30.0 if faster == "product" else 10.0)


def test_the_convolution_of_a_peak_counts_what_it_computes() -> None:
    work, flops = machine._convolution(64, torch.float32)
    made = work()
    assert isinstance(made, torch.Tensor)
    x, weight = work.args
    assert flops == 2 * made.numel() * weight[0].numel()
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_case_limits_the_plan() -> None:
    assert measure.FULL.limited({"rounds": 7, "warmup_calls": 9}) == replace(measure.FULL, rounds=7)
    case = replace(_case([]), at_most={"rounds": 2})
    samples = measure.measure(case, case.sides, measure.QUICK, CPU)
    assert [len(sample.durations) for sample in samples.values()] == [2, 2]


def test_the_best_peak_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([{**PEAKS, "gb_per_s": 12.0}, {**PEAKS, "gflops_bf16": 300.0}])
    monkeypatch.setattr(machine, "measure_peaks", lambda device, repeats: next(taken))
    monkeypatch.setattr(measure, "PEAKS_AGE", -1.0)
    session = measure.Session([], measure.QUICK, CPU)
    session.peaks()
    assert session.peaks() == {"gflops_fp32": 100.0, "gflops_bf16": 300.0, "gb_per_s": 12.0}


PEAKS = {"gflops_fp32": 100.0, "gflops_bf16": 200.0, "gb_per_s": 10.0}


def test_record_of_a_side() -> None:
    case = _case([])
    samples = {
        "plain": measure.Samples(1, [0.2] * 7, 3 * 2**20),
        "ours": measure.Samples(2, [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4], None),
    }
    record = measure.describe(case, case.side("ours"), samples, PEAKS)
    assert record["images_per_second"] == pytest.approx(100.0)
    assert record["gflop_per_s"] == pytest.approx(0.02)
    assert record["share_of_peak_flops"] == pytest.approx(2e-4)
    assert record["gb_per_s"] == pytest.approx(0.01)
    assert record["share_of_peak_bandwidth"] == pytest.approx(1e-3)
    assert record["flops_per_image"] == 2e5
    ratio = record["ratios"]["plain"]
    assert (ratio["median"], ratio["low"], ratio["high"]) == pytest.approx((2.0, 1.0, 4.0))
    assert set(record["ratios"]) == {"plain"}


def test_peak_memory_sees_what_is_allocated() -> None:
    with machine.PeakMemory(CPU) as memory:
        torch.ones(64 * 2**20 // 4)
    if memory.bytes is None:
        pytest.skip("this system does not reset the peak of the resident set")
    # The kernel counts resident pages per thread and adds them up late.
    assert 60 * 2**20 <= memory.bytes < 96 * 2**20


def test_conditions_name_neither_host_nor_user() -> None:
    import getpass

    where = machine.conditions(CPU)
    text = json.dumps(where)
    assert len(platform.node()) < 3 or platform.node() not in text
    assert getpass.getuser() not in text.split()
    assert where["threads"] == torch.get_num_threads()
    assert where["torch"] == torch.__version__


def test_energy_only_on_a_gpu() -> None:
    assert machine.energy_per_call(lambda: pytest.fail("was run"), CPU) is None


def test_energy_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(100))
    counter = iter([5_000, 11_000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980,
        NVML_CLOCK_SM=1,
        NVMLError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0")
    )
    for module in (machine, power):
        monkeypatch.setattr(module, "synchronize", lambda device: None)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    power._gpu.cache_clear()
    # The clock reads 0 at the start, 1 and 2 before the calls... and 3 at the end.
    calls: list[int] = []
    energy = machine.energy_per_call(lambda: calls.append(1), torch.device("cuda", 0))
    power._gpu.cache_clear()
    clocks = {"sm_mhz": 1980.0, "memory_mhz": 1980.0}
    assert energy == {"joules": 6.0 / len(calls), "watts": 2.0, **clocks}


# Checks


def test_relative_error_over_all_tensors() -> None:
    truth = [torch.tensor([3.0]), torch.tensor([4.0])]
    found = [torch.tensor([3.0]), torch.tensor([4.5])]
    assert relative_error(found, truth) == pytest.approx(0.1)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0.0


@pytest.mark.parametrize("error", [2.1e-3, float("nan"), float("inf")])
def test_twice_the_error_of_torch_and_no_more(error: float) -> None:
    require_right("ours", "fp32", {"y": 1.9e-3}, {"y": 1e-3})
    require_right("ours", "fp32", {"y": 2.9e-6}, {"y": 0.0})
    with pytest.raises(CheckFailed, match="ours: error of y"):
        require_right("ours", "fp32", {"y": error}, {"y": 1e-3})


def _models() -> same_update.Models:
    torch.manual_seed(0)
    return dcgan(image_size=16, channels=1, nz=8, ngf=8, ndf=8)


def _data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(8, 1, 16, 16, generator=generator) * 2 - 1,
            torch.randn(8, 8, 1, 1, generator=generator),
        )
        for _ in range(3)
    ]


def _require(build: same_update.Build, precision: str = "fp32") -> None:
    def plainly(nets: Networks) -> Any:
        return EagerStep(nets, 8, Writing()).step

    same_update.require_same_updates(
        _models(), {"side": (precision, build)}, PLAIN, _data(), plainly, activations=8 * 16 * 16
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_training_passes_the_check(precision: str) -> None:
    _require(PLAIN[precision], precision)


def test_what_is_right_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[list[str]] = []

    def note(setup: Any, device: torch.device, sides: Any) -> None:
        checked.append([side.name for side in sides])
        if "pygan bf16" in checked[-1]:
            raise CheckFailed("pygan bf16 is wrong")

    monkeypatch.setattr(bench_train_step, "_right", set())
    monkeypatch.setattr(bench_train_step, "require_right_steps", note)
    plain, large = STEP_CASES["dcgan64"], STEP_CASES["dcgan64-batch512"]
    plain.check(CPU, [plain.side("eager-fp32"), plain.side("pygan-fp32")])
    for _ in range(2):
        with pytest.raises(CheckFailed):
            large.check(CPU, [large.side("pygan-fp32"), large.side("pygan-bf16")])
    other = STEP_CASES["dcgan64-width48"]
    other.check(CPU, [other.side("pygan-fp32")])
    assert checked == [["eager fp32", "pygan fp32"], ["pygan bf16"], ["pygan bf16"], ["pygan fp32"]]


class _Wrong:
    """Builds the plain step, with one mistake."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def __call__(self, models: Any, device: torch.device, adam: Any) -> same_update.Stepper:
        built = PLAIN["fp32"](models, device, adam)
        return same_update.Stepper(built.nets, getattr(self, self.mistake)(built))

    def no_last_buffer(self, built: same_update.Stepper) -> Any:
        def step(real: torch.Tensor, z: torch.Tensor) -> Any:
            last = [m for m in built.nets.discriminator.modules() if hasattr(m, "running_var")][-1]
            kept = last.running_var.clone()
            losses = built.step(real, z)
            last.running_var.copy_(kept)
            return losses

        return step

    def gradient_scaled(self, built: same_update.Stepper) -> Any:
        for weight in built.nets.generator.parameters():
            weight.register_hook(lambda gradient: gradient * 1.25)
        return built.step

    def old_weights(self, built: same_update.Stepper) -> Any:
        # As with packed weights that are not refreshed when the optimizer changes them.
        weight = next(iter(built.nets.discriminator.parameters()))
        stale = weight.detach().clone()

        def step(real: torch.Tensor, z: torch.Tensor) -> Any:
            now = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(stale)
            losses = built.step(real, z)
            with torch.no_grad():
                weight.add_(now - stale)
            return losses

        return step

    def half_the_loss(self, built: same_update.Stepper) -> Any:
        def step(real: torch.Tensor, z: torch.Tensor) -> Any:
            losses = built.step(real, z)
            return losses._replace(loss_d=losses.loss_d / 2)

        return step


@pytest.mark.parametrize(
    ("mistake", "what"),
    [
        ("no_last_buffer", "buffers of D"),
        ("gradient_scaled", "gradients of G"),
        ("old_weights", "losses"),
        ("half_the_loss", "losses"),
    ],
)
def test_a_wrong_update_is_found(mistake: str, what: str) -> None:
    with pytest.raises(CheckFailed, match=f"error of {what}"):
        _require(_Wrong(mistake))


# Tables


def _record(side: str, speed: float, *, baseline: bool, ratio: float | None) -> dict[str, Any]:
    ratios = {"eager": {"median": 1.0, "low": 1.0, "high": 1.0, "coverage": 0.96}}
    if ratio is not None:
        ratios["eager"] = {
            "median": ratio,
            "low": ratio - 0.1,
            "high": ratio + 0.1,
            "coverage": 0.96484375,
        }
    return {
        "case": "dcgan64",
        "about": "whole D+G step, batch 64",
        "side": side,
        "precision": "fp32",
        "baseline": baseline,
        "images": 64,
        "rounds": 15,
        "iterations": 1,
        "milliseconds": 64e3 / speed,
        "images_per_second": speed,
        "images_per_second_q1": speed - 1,
        "images_per_second_q3": speed + 1,
        "flops_per_image": 2.275e9,
        "bytes_per_image": 2e7,
        "gflop_per_s": 2.275 * speed,
        "gb_per_s": 0.02 * speed,
        "share_of_peak_flops": 0.5,
        "share_of_peak_bandwidth": 0.07,
        "peak_memory_bytes": None if baseline else 512 * 2**20,
        "ratios": ratios,
        "peaks": PEAKS,
        "conditions": {
            "device": "Some CPU (R) 9000",
            "device_type": "cpu",
            "cores": 2,
            "logical_cores": 4,
            "threads": 2,
            "isa": "avx512",
            "torch_isa": "AVX512",
            "torch": "2.13.0+cpu",
            "pygan": "0.1.0",
            "python": "3.11.7",
            "system": "Linux x86_64",
        },
    }


@pytest.fixture
def result() -> dict[str, Any]:
    records = [
        _record("eager", 70.0, baseline=True, ratio=None),
        _record("pygan fp32", 84.0, baseline=False, ratio=1.2),
    ]
    return {
        "benchmarks": [
            {"fullname": f"benchmarks/bench_train_step.py::t[{i}]", "extra_info": record}
            for i, record in enumerate(records)
        ],
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2025-01-02T03:04:05+00:00",
        "command": "pytest benchmarks --benchmark-only",
        "quick": False,
    }


@pytest.fixture
def result_file(result: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    yield path


def test_markdown_of_a_result(result: dict[str, Any]) -> None:
    lines = report.tables(result).splitlines()
    assert lines[:3] == [
        "| networks | batch | n | side | images/s (quartiles) | × eager |",
        "|---|---:|---:|---:|---:|---:|",
        "| dcgan64 | 64 | 15 | pygan fp32 | 84.0 (83.0–85.0) | 1.20 (1.10–1.30) |",
    ]
    start = lines.index("**dcgan64** (whole D+G step, batch 64, n = 15)")
    assert lines[start + 2 : start + 6] == [
        "| side | images/s (quartiles) | × eager | GFLOP/s |",
        "|---|---:|---:|---:|",
        "| eager | 70.0 (69.0–71.0) | 1 | 159 (50%) |",
        "| **pygan fp32** | **84.0 (83.0–85.0)** | **1.20 (1.10–1.30)** | **191 (50%)** |",
    ]
    text = "\n".join(lines)
    for condition in ("Some CPU (R) 9000, 2 cores, 2 threads", "torch 2.13.0+cpu", "2025-01-02",
                      "commit 0123456789ab", "`pytest benchmarks --benchmark-only`"):  # fmt: skip
        assert condition in text


def test_plain_text_lines_up(result: dict[str, Any]) -> None:
    rows = [entry["extra_info"] for entry in result["benchmarks"]]
    lines = summary.plain_text(rows)
    heading = next(i for i, line in enumerate(lines) if line.startswith("  side"))
    assert len({len(line) for line in lines[heading : heading + 3]}) == 1
    for cell in ("762", "1.68 (7%)", "512", "1.20 (1.10–1.30)"):
        assert cell in lines[heading + 2]


def _ratio(median: float) -> dict[str, float]:
    return {"median": median, "low": median, "high": median, "coverage": 0.96}


def _timed(side: str, precision: str, milliseconds: float, **other: Any) -> dict[str, Any]:
    """A record of a case with two baselines of float32 and one of bfloat16."""
    record = _record(side, 64e3 / milliseconds, baseline=not side.startswith("pygan"), ratio=None)
    ratios = {"slow fp32": _ratio(1.1), "fast fp32": _ratio(1.2), "slow bf16": _ratio(1.3)}
    return record | {"precision": precision, "ratios": ratios} | other


def test_a_side_is_set_against_the_first_and_the_fastest_of_its_precision() -> None:
    sides = [("slow fp32", "fp32", 30), ("fast fp32", "fp32", 20),
             ("slow bf16", "bf16", 25), ("pygan fp32", "fp32", 10),
             ("pygan bf16", "bf16", 5), ("pygan fp16", "fp16", 5)]  # fmt: skip
    heading, rows = summary.narrow_table([_timed(*side) for side in sides])
    assert heading[2:4] == ["× slow fp32", "× best peer, same precision"]
    found = {row[0]: [cell.partition(" ")[0] for cell in row[2:4]] for row in rows}
    assert found == {
        "slow fp32": ["1", "1.20"],
        "fast fp32": ["1.10", "1"],
        "slow bf16": ["1.10", "1"],
        "pygan fp32": ["1.10", "1.20"],
        "pygan bf16": ["1.10", "1.30"],
        "pygan fp16": ["1.10", "–"],
    }


def _layer_records() -> list[dict[str, Any]]:
    about = {
        "case": "strided_conv-64-3-32x32-up-fp32",
        "layer": "64→3 32x32→64x64",
        "pass": "up",
        "automatic": "f42",
    }
    sides = [("torch contiguous", 9), ("torch channels_last", 8), ("pygan f22", 5),
             ("pygan f42", 4)]  # fmt: skip
    ratios = {"torch contiguous": _ratio(2.5), "torch channels_last": _ratio(2.0)}
    methods = [_timed(side, "fp32", ms, **about, ratios=ratios) for side, ms in sides]
    none = about | {"case": "strided_conv-64-3-32x32-down-fp32", "pass": "down",
                    "automatic": "none"}  # fmt: skip
    scaling = about | {"case": "strided_conv_threads-f42-64-3-32x32-up-fp32"}
    one, two = "pygan f42, 1 thread", "pygan f42, 2 threads"
    return [
        *methods,
        _timed("torch contiguous", "fp32", 7, **none),
        _timed(one, "fp32", 8, **scaling, baseline=True, ratios={one: _ratio(1.0)}),
        _timed(two, "fp32", 4, **scaling, ratios={one: _ratio(1.9)}),
    ]


def test_layers_of_a_result(result: dict[str, Any], tmp_path: Path) -> None:
    result["benchmarks"] += [
        {"fullname": "benchmarks/bench_strided_conv.py::t", "extra_info": record}
        for record in _layer_records()
    ]
    path = report.keep(result, tmp_path)
    text = path.with_name("torch-2.13.0-layers.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| 64→3")]
    gflops = f"{2.275 * 64e3 / 4:,.0f}"
    alone = f"{2.275 * 64e3 / 7:,.0f}"
    assert lines == [
        "| 64→3 32x32→64x64 | up | fp32 | 8.00 | – | 5.00 | 4.00 | f42 | 2.00 (2.00–2.00) | "
        f"{gflops} | 50% |",
        f"| 64→3 32x32→64x64 | down | fp32 | 7.00 | – | – | – | none | 1 | {alone} | 50% |",
        "| 64→3 32x32→64x64 | up | fp32 | f42 | 8.00 | 4.00 | 1.90 (1.90–1.90) |",
    ]
    assert "strided_conv" not in report.tables(result)


def test_memory_in_a_result(result: dict[str, Any], tmp_path: Path) -> None:
    side = bench_memory.SIDES["pygan-fp32"]
    mib = 2**20
    record = bench_memory.describe(
        side, [300 * mib, 200 * mib, 250 * mib], "eager fp32", [400 * mib, 500 * mib, 600 * mib]
    )
    assert record["ratios"] == {"eager fp32": {"median": 0.5, "low": 1 / 3, "high": 0.75}}
    conditions = result["benchmarks"][0]["extra_info"]["conditions"]
    entry = {
        "fullname": "benchmarks/bench_memory.py::t",
        "extra_info": record | {"conditions": conditions},
    }
    result["benchmarks"].insert(0, entry)
    row = "| **pygan fp32** | **250 (200–300)** | **0.50 (0.33–0.75)** |"
    assert row in report.tables(result).splitlines()
    assert report.keep(result, tmp_path).exists()
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert report.main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*/torch-2.13.0.md")
    assert row in page.read_text().splitlines()
    assert any("250 (200–300)" in line for line in summary.plain_text([entry["extra_info"]]))


def test_update_replaces_only_between_the_markers(result_file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# top\n\n<!-- results -->\nold\n<!-- /results -->\n\nend\n")
    for _ in range(2):
        assert report.main([str(result_file), "--update", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# top\n\n<!-- results -->\n| networks |")
    assert text.endswith("\n<!-- /results -->\n\nend\n")
    assert "old" not in text and text.count("**dcgan64**") == 1


@pytest.mark.parametrize("content", ["no markers", "<!-- /results --> <!-- results -->"])
def test_update_refuses_a_document_without_markers(
    result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(content)
    assert report.main([str(result_file), "--update", str(readme)]) == 2
    assert readme.read_text() == content
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"benchmarks": []}',
                                     '{"benchmarks": [{"extra_info": {}}]}'])  # fmt: skip
def test_report_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--benchmark-json" in error


def test_results_are_kept_by_device(result: dict[str, Any], tmp_path: Path) -> None:
    path = report.keep(result, tmp_path)
    assert path == tmp_path / "some-cpu-r-9000-2-cores-avx512" / "torch-2.13.0.json"
    assert report.load(path) == result


@pytest.mark.parametrize("change", ["quick", "rounds"])
def test_results_that_may_not_be_quoted_are_not_kept(
    result: dict[str, Any], tmp_path: Path, change: str
) -> None:
    if change == "quick":
        result["quick"] = True
    else:
        result["benchmarks"][1]["extra_info"]["rounds"] = 6
    with pytest.raises(UserError, match="may not be quoted"):
        report.keep(result, tmp_path)
    assert not list(tmp_path.iterdir())


# The whole way through pytest


@pytest.mark.slow
@pytest.mark.usefixtures("unconfigured")
def test_a_case_through_pytest(tmp_path: Path, pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    arguments = ["--quick", "--rounds=2", "--benchmark-only", f"--benchmark-json={out}"]
    run = pytester.runpytest_subprocess(
        str(ROOT / "benchmarks"), f"--rootdir={ROOT}", "-k", "gan_g_loss-scalar-fp32",
        "-p", "no:cacheprovider", *arguments,
    )  # fmt: skip
    run.assert_outcomes(passed=2, deselected=len(_ids()) - 2)
    run.stdout.fnmatch_lines(["*pygan: ratios within each round*", "*gan_g_loss-scalar-fp32*"])
    kept = json.loads(out.read_text())
    assert kept["machine_info"]["node"] == ""
    assert set(kept["commit_info"]) <= {"id", "dirty"}
    assert kept["command"].endswith("--benchmark-json=out.json")
    assert str(tmp_path) not in kept["command"] and str(ROOT) not in kept["command"]
    for entry in kept["benchmarks"]:
        assert len(entry["stats"]["data"]) == 2
        record = entry["extra_info"]
        median = sum(entry["stats"]["data"]) / 2
        assert record["images_per_second"] == pytest.approx(64 / median)
        assert record["conditions"]["threads"] >= 1


def _ids() -> list[str]:
    """Every side of every benchmark."""
    from benchmarks import bench_image_batch, bench_norm_act

    modules = (
        LOSS_CASES,
        STEP_CASES,
        bench_norm_act.CASES,
        bench_image_batch.CASES,
        bench_strided_conv.CASES,
        bench_folded_conv.CASES,
        bench_sampling.CASES,
        bench_dropin.CASES,
        bench_penalty.CASES,
        bench_other_steps.CASES,
        bench_compilers.CASES,
    )
    sides = [side.id for cases in modules for case in cases.values() for side in case.sides]
    return [*sides, *bench_memory.SIDES]


# Convolutions

LAYER = bench_strided_conv.Layer(8, 4, 4)


@pytest.fixture
def conv_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[bench_strided_conv.Work]:
    monkeypatch.setattr(bench_strided_conv, "BATCH", 2)
    yield bench_strided_conv.Work(LAYER, "up", "fp32")
    bench_strided_conv._problem.cache_clear()


def _conv_sides(ways: Any) -> list[measure.Side]:
    return [
        measure.Side(name, "fp32", lambda device: lambda: None, work.Work(1, 1)) for name in ways
    ]


@pytest.mark.parametrize("conv_pass", bench_strided_conv.PASSES)
@pytest.mark.parametrize("wrong", [False, True])
def test_convolutions_are_checked(
    conv_work: bench_strided_conv.Work, conv_pass: str, wrong: bool
) -> None:
    conv_work = conv_work._replace(conv_pass=conv_pass)
    right = bench_strided_conv.TORCH["torch channels_last"]

    def build(*arguments: Any) -> Any:
        call = right.build(*arguments)
        return lambda: call() * (1 + 1e-5 * wrong)

    ways = {"ours": bench_strided_conv.Way(build)}
    if not wrong:
        bench_strided_conv.check(conv_work, ways, CPU, _conv_sides(ways))
        return
    with pytest.raises(CheckFailed, match=f"ours: error of {conv_pass}"):
        bench_strided_conv.check(conv_work, ways, CPU, _conv_sides(ways))


@pytest.mark.parametrize("conv_pass", ["up", "down"])
@pytest.mark.parametrize("wrong", [False, True])
def test_folded_convolutions_are_checked(
    conv_pass: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = bench_folded_conv.Layer(conv_pass, 4, 6, 8, 16)
    task = bench_folded_conv.Task(layer, "fp32", backward=True)
    right = bench_folded_conv.OURS[conv_pass]
    monkeypatch.setitem(
        bench_folded_conv.OURS, conv_pass, lambda *leaves: right(*leaves) * (1 + 1e-4 * wrong)
    )
    sides = _conv_sides(bench_folded_conv.SIDES)
    if not wrong:
        bench_folded_conv.check(task, CPU, sides)
        return
    with pytest.raises(CheckFailed, match="pygan contiguous: error of y"):
        bench_folded_conv.check(task, CPU, sides)


@pytest.mark.native
@pytest.mark.parametrize("conv_pass", bench_strided_conv.PASSES)
def test_native_convolutions_pass_the_check(
    conv_work: bench_strided_conv.Work, conv_pass: str
) -> None:
    conv_work = conv_work._replace(conv_pass=conv_pass)
    every = {f"pygan {name}": bench_strided_conv._pygan_way(name) for name in summary.METHODS}
    ways = {
        name: way
        for name, way in every.items()
        if bench_strided_conv.missing(conv_work, way, CPU) is None
    }
    if not ways:
        pytest.skip("no method takes this layer")
    bench_strided_conv.check(conv_work, ways, CPU, _conv_sides(ways))


def test_a_method_that_is_not_there_says_so(
    conv_work: bench_strided_conv.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, way = bench_strided_conv.missing, bench_strided_conv._pygan_way("f22")
    assert missing(conv_work, bench_strided_conv.TORCH["torch contiguous"], CPU) is None
    assert missing(conv_work, way, torch.device("cuda")) is not None
    monkeypatch.setattr(bench_strided_conv, "resolved", lambda *_: "none")
    monkeypatch.setattr(bench_strided_conv.native, "load", lambda: object())
    assert missing(conv_work, way, CPU) == "f22 does not take up of 8→4 4x4→8x8"
    monkeypatch.setattr(bench_strided_conv.native, "load", lambda: None)
    monkeypatch.setattr(bench_strided_conv.native, "reason", lambda: "not built")
    assert missing(conv_work, way, CPU) == "not built"


def test_only_the_coarse_method_may_be_red(
    conv_work: bench_strided_conv.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red(*arguments: Any) -> None:
        raise CheckFailed("f42: error of up is too large")

    bench_strided_conv._too_coarse.cache_clear()
    monkeypatch.setattr(bench_strided_conv, "check", red)
    monkeypatch.setattr(bench_strided_conv, "resolved", lambda *arguments: arguments[-1])
    monkeypatch.setattr(bench_strided_conv.native, "load", lambda: object())
    f22, f42 = (bench_strided_conv._pygan_way(name) for name in ("f22", "f42"))
    in_bf16 = conv_work._replace(precision="bf16")
    found = [
        bench_strided_conv.missing(work, way, CPU)
        for work, way in ((conv_work, f22), (conv_work, f42), (in_bf16, f22), (in_bf16, f42))
    ]
    bench_strided_conv._too_coarse.cache_clear()
    assert found == [None, None, None, "f42: error of up is too large"]


# Sampling


def test_runtimes_that_are_not_installed_say_so() -> None:
    way = bench_sampling.WAYS["OpenVINO fp32"]._replace(needs=("no_such_package",))
    assert bench_sampling.missing(way, CPU) == "no_such_package is not installed"
    assert bench_sampling.missing(way, torch.device("cuda")) is not None


def test_sampling_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    # A generator of two layers stands for dcgan64's.
    generator = dcgan(image_size=16, channels=1, nz=bench_sampling.NZ, ngf=8)[0].eval()
    monkeypatch.setattr(bench_sampling, "_generator", lambda: generator)
    names = ("eager fp32 channels_last", "eager bf16 channels_last", "pygan fp32", "pygan bf16")
    case = bench_sampling.CASES["sampling-dcgan64"]
    sides = [side for side in case.sides if side.name in names]
    case.check(CPU, sides)

    def other(network: nn.Module, z: torch.Tensor) -> Any:
        return lambda: network(z * 1.01).detach()

    wrong = {"pygan fp32": bench_sampling.WAYS["pygan fp32"]._replace(build=other)}
    monkeypatch.setattr(bench_sampling, "WAYS", bench_sampling.WAYS | wrong)
    with pytest.raises(CheckFailed, match="pygan fp32: error of images"):
        case.check(CPU, sides)


# Drop-in


@pytest.fixture
def small_pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[measure.Case]:
    def make() -> tuple[nn.Module, nn.Module]:
        return dcgan(image_size=16, channels=1, nz=5, ngf=8, ndf=8)

    networks = dropin_networks.Networks(make, (5, 1, 1), (1, 16, 16), 4)
    monkeypatch.setitem(dropin_networks.NETWORKS, "upsample32", networks)
    bench_dropin._pair.cache_clear()
    yield bench_dropin.CASES["dropin-upsample32"]
    bench_dropin._pair.cache_clear()


def test_fused_networks_are_checked(
    small_pair: measure.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalty = bench_penalty.CASES["dropin-upsample32-r1"]
    small_pair.check(CPU, small_pair.sides)
    penalty.check(CPU, penalty.sides)

    def wrong(network: nn.Module) -> None:
        with torch.no_grad():
            next(network.parameters()).mul_(1.1)

    monkeypatch.setattr(pygan, "fuse", wrong)
    with pytest.raises(CheckFailed, match="pygan fp32: error of G's output"):
        small_pair.check(CPU, small_pair.sides)
    with pytest.raises(CheckFailed, match="pygan fp32: error of gradients"):
        penalty.check(CPU, penalty.sides)


@pytest.mark.parametrize("name", dropin_networks.NETWORKS)
def test_networks_of_the_drop_in(name: str) -> None:
    networks = dropin_networks.NETWORKS[name]
    with torch.device("meta"):
        generator, discriminator = networks.make()
        made = generator(torch.empty(2, *networks.latent))
        if name == "pix2pix256":  # which sees input and output
            made = torch.cat([torch.empty(2, *networks.latent), made], 1)
        assert made.shape[1:] == networks.image
        assert len(discriminator(made)) == 2


def test_table_of_the_drop_in() -> None:
    records = [
        _record("eager", 20, baseline=True, ratio=None),
        _record("pygan fp32", 50, baseline=False, ratio=2.5),
    ]
    records = [record | {"case": "dropin-resnet32"} for record in records]
    *_, row = summary.drop_in(records)
    assert row == "| resnet32 | 64 | fp32 | 3,200 | 1,280 | 2.50 (2.40–2.60) |"


# Memory


def test_memory_of_a_training_holds_its_weights() -> None:
    way = next(way for way in training_memory.WAYS if way.name == "eager fp32 by hand")
    setup = training_memory.Setup((1, 32, 32), batch=128, width=32)
    usage = training_memory.measure(way, setup, steps=2)
    assert len(usage.seconds) == 2
    if usage.bytes is None:
        pytest.skip("this system does not reset the peak of the resident set")
    with torch.device("meta"):
        networks = setup.models()
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    # What a step cannot do without: weights, gradients and two moments.
    assert usage.bytes > 16 * parameters


def test_a_side_that_fails_apart_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid choice: 'nobody'"):
        training_memory.measure_apart("nobody", 1)


# Profile


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("pygan::strided_conv_up", "strided_conv up"),
        ("pygan::strided_conv_weight_grad", "strided_conv weight_grad"),
        ("pygan::norm_act_backward", "norm_act"),
        ("aten::_fused_adam_", "Adam"),
        ("aten::mkldnn_convolution", "torch convolution"),
        ("aten::convolution_backward", "torch convolution"),
        ("ConvTranspose2DBackward", "other"),
        ("aten::leaky_relu_", "activation"),
    ],
)
def test_operations_are_grouped(operation: str, group: str) -> None:
    assert profile_step.group_of(operation) == group


def test_parts_of_a_profile_add_up() -> None:
    events = [("aten::_fused_adam_", 4e3, 4), ("pygan::norm_act_forward 8, batch 2", 6e3, 8),
              ("aten::add", 1e3, 2)]  # fmt: skip
    floors = {events[1][0]: 0.5}
    found = profile_step.parts(events, 2, 0.016, floors)
    assert found == [
        profile_step.Part("norm_act", 3.0, 4.0, floor=2.0),
        profile_step.Part("Adam", 2.0, 2.0),
        profile_step.Part("other", 3.0, 1.0),
    ]
    assert profile_step.table(found, 8.0)[2] == "| norm_act | 3.00 | 37.5% | 4 | 2.00 (67%) |"
    (kernel,) = profile_step.longest(events, 2, floors)
    assert kernel == ("norm_act_forward 8, batch 2", 3.0, 4.0, 2.0)


def test_of_nested_operations_the_outermost_is_drawn() -> None:
    event = profile_step.Event
    events = [
        event("phase::step", 1000.0, 9000.0),
        event("phase::D's update", 3000.0, 8000.0),
        event("aten::clone", 1000.0, 2000.0),
        event("aten::copy_", 1100.0, 1900.0),
        event("aten::add", 2000.0, 2500.0),
        event("Optimizer.step#Adam", 5000.0, 7000.0),
        event("aten::copy_", 9500.0, 9600.0),
    ]
    assert profile_step.timeline(events) == {
        "phases": [["G forward", 0.0, 2.0], ["D's update", 2.0, 7.0]],
        "groups": [["copy, cast, change of layout", 0.0, 1.0], ["Adam", 4.0, 6.0]],
    }


@pytest.mark.native
def test_native_kernels_show_in_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = profile_step.Setup((1, 16, 16), batch=8, width=8)
    peaks = {"gflops_fp32": 100.0, "gflops_bf16": 300.0, "gb_per_s": 30.0}
    monkeypatch.setattr(profile_step, "Setup", lambda image: small)
    monkeypatch.setattr(profile_step.machine, "measure_peaks", lambda device: peaks)
    out = tmp_path / "profile.json"
    assert profile_step.main(["--amp", "bf16", "--steps", "2", "--out", str(out)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("| norm_act |") for row in rows)
    assert any(row.startswith("| Adam |") for row in rows)
    (record,) = json.loads(out.read_text())["precisions"]
    names = [kernel["group"] for kernel in record["longest"]]
    # Twice the images where real and fake are one batch.
    assert any("1x16x16 to 8x8x8, batch 16" in name for name in names)
    assert all(kernel["floor"] > 0 for kernel in record["longest"])
    assert [name for name, *_ in record["timeline"]["phases"]] == [
        "G forward",
        "D's update",
        "G's update",
    ]
    missing = tmp_path / "missing" / "no" / "profile.json"
    missing.parent.parent.touch()
    assert profile_step.main(["--steps", "1", "--out", str(missing)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.native
@pytest.mark.parametrize(("method", "spared"), [("direct", 1), ("f22", 16 / 9), ("f42", 2.56)])
def test_floors_count_what_the_method_multiplies(method: str, spared: float) -> None:
    shape = SimpleNamespace(
        batch=2, height=4, width=5, big_height=8, big_width=10, small_channels=6, big_channels=3
    )
    name, work = profile_step.described("strided_conv_down", shape, 4, method=method)
    assert name == f"strided_conv_down {method} 3x8x10 to 6x4x5, batch 2"
    assert work.flops == pytest.approx(2 * 16 * 2 * 20 * 18 / spared)
    assert work.bytes == 4 * (2 * 20 * 6 + 2 * 80 * 3 + 16 * 18)


# Targets


def _against_peer(case: str, side: str, median: float, peer: str, *, baseline: bool = False) -> Any:
    ratio = {"median": median, "low": median - 0.1, "high": median + 0.1, "coverage": 0.96}
    return {
        "case": case, "side": side, "precision": "fp32", "baseline": baseline,
        "milliseconds": 1 / median, "ratios": {peer: ratio},
    }  # fmt: skip


def test_targets_are_met_or_missed() -> None:
    records = [
        _against_peer("dcgan64", "pygan fp32", 2.3, "eager fp32"),
        _against_peer("memory-dcgan64", "pygan fp32", 0.8, "eager fp32"),
        _against_peer("sampling-dcgan64", "slow", 1.0, "slow", baseline=True),
        _against_peer("sampling-dcgan64", "fast", 1.5, "fast", baseline=True),
        _against_peer("sampling-dcgan64", "pygan fp32", 1.6, "fast"),
        _against_peer("dropin-resnet32", "pygan fp32", 2.5, "another"),
    ]
    rows = targets.table(records)[2:]
    assert rows == [
        "| dcgan64 | pygan fp32 | eager fp32 | 2.2x | 2.8x | 2.30 (2.20–2.40) | met |",
        "| sampling-dcgan64 | pygan fp32 | fast | 1.3x | 1.6x | 1.60 (1.50–1.70) | aim reached |",
        "| memory-dcgan64 | pygan fp32 | eager fp32 | 0.75 of the memory | 0.5 of the memory "
        "| 0.80 (0.70–0.90) | missed |",
    ]
    assert targets.table([]) == []
