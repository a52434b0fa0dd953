"""The benchmarks' own arithmetic: ratios, work counted, replayed samples, tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, measure, report, same_update, sample_quality, summary, work
from benchmarks.bench_gan_loss import CASES as LOSS_CASES
from benchmarks.bench_train_step import CASES as STEP_CASES
from benchmarks.bench_train_step import PLAIN
from benchmarks.correct import CheckFailed, relative_error, require_right
from benchmarks.ratio import median_interval, speed_ratio, spread
from benchmarks.recorded import recorded_time, replay
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
    found = work.train_step_work(generator, discriminator, 10, (3, 4, 4), batch=2, itemsize=4)
    image, z, logit = 48, 10, 1
    g_passes = 2 * (z + image)  # forward, weight gradient
    d_passes = 2 * 2 * (image + logit) + 2 * (image + logit)
    weights = 2 * 480 + 2 * 48 + 2 * 48
    adam = 7 * (480 + 48)
    assert found.bytes == 4 * (2 * (g_passes + d_passes) + weights + adam)
    assert found.flops == 2 * 2 * (2 * 480 + 2 * 2 * 48 + 2 * 48)


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


def test_sides_take_turns() -> None:
    order: list[str] = []
    rows = measure.interleave(
        [lambda: order.append("a"), lambda: order.append("b")], [1, 2], rounds=3, device=CPU
    )
    assert "".join(order) == "abb" * 3
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
    import platform

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
    monkeypatch.setattr(machine, "synchronize", lambda device: None)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    # The clock reads 0 at the start, 1 and 2 before the calls... and 3 at the end.
    calls: list[int] = []
    energy = machine.energy_per_call(lambda: calls.append(1), torch.device("cuda"))
    assert energy == {"joules": 6.0 / len(calls), "watts": 2.0, "sm_mhz": 1980.0}


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
    same_update.require_same_updates(
        _models(), {"side": (precision, build)}, PLAIN, _data(), nz=8, activations=8 * 16 * 16
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_training_passes_the_check(precision: str) -> None:
    _require(PLAIN[precision], precision)


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
    assert lines[0] == "**dcgan64** (whole D+G step, batch 64, n = 15 rounds)"
    assert lines[2] == (
        "| side | ms | images/s (quartiles) | GFLOP/s | GB/s | peak MiB | × eager |"
    )
    assert lines[3] == "|---|---:|---:|---:|---:|---:|---:|"
    assert lines[4] == "| eager | 914 | 70.0 (69.0–71.0) | 159 (50%) | 1.40 (7%) | – | 1 |"
    assert lines[5] == (
        "| **pygan fp32** | **762** | **84.0 (83.0–85.0)** | **191 (50%)** | **1.68 (7%)** | "
        "**512** | **1.20 (1.10–1.30)** |"
    )
    text = "\n".join(lines)
    for condition in ("Some CPU (R) 9000, 2 cores, 2 threads", "torch 2.13.0+cpu", "2025-01-02",
                      "commit 0123456789ab", "`pytest benchmarks --benchmark-only`"):  # fmt: skip
        assert condition in text


def test_plain_text_lines_up(result: dict[str, Any]) -> None:
    rows = [entry["extra_info"] for entry in result["benchmarks"]]
    lines = summary.plain_text(rows)
    heading = next(i for i, line in enumerate(lines) if line.startswith("  side"))
    assert len({len(line) for line in lines[heading : heading + 3]}) == 1
    assert "1.20 (1.10–1.30)" in lines[heading + 2]


def test_update_replaces_only_between_the_markers(result_file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# top\n\n<!-- results -->\nold\n<!-- /results -->\n\nend\n")
    for _ in range(2):
        assert report.main([str(result_file), "--update", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# top\n\n<!-- results -->\n**dcgan64**")
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

    modules = (LOSS_CASES, STEP_CASES, bench_norm_act.CASES, bench_image_batch.CASES)
    return [side.id for cases in modules for case in cases.values() for side in case.sides]


# Sample quality


def test_variety_is_the_mean_distance() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert sample_quality.spread(rows) == pytest.approx((5 + 0 + 5) / 3)


def test_classifier_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from pygan.data import ImageSet

    # Two classes, dark and bright: one epoch finds them.
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400)
    images = generator.integers(0, 100, (400, 32, 32, 1)) + 150 * labels[:, None, None, None]
    real = ImageSet(images.astype(np.uint8), labels, "made up", "abc")
    recipe = sample_quality.Recipe(widths=(4, 8), features=8, epochs=2, batch=20)
    model, accuracy = sample_quality.classifier(real, recipe, tmp_path)
    assert accuracy == 1.0
    monkeypatch.setattr(sample_quality, "_train", lambda *_: pytest.fail("trained again"))
    again, kept = sample_quality.classifier(real, recipe, tmp_path)
    assert kept == accuracy
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)

    features, _ = sample_quality.describe_images(model, real.images)
    same = sample_quality.quality(model, real.images, features)
    dark = sample_quality.quality(model, real.images[labels == 0], features)
    assert same.distance == pytest.approx(0.0, abs=1e-6)
    assert same.variety == pytest.approx(1.0)
    assert same.shares == pytest.approx([1 - labels.mean(), labels.mean()])
    assert dark.shares == [1.0, 0.0]
    assert dark.distance > 1.0 and dark.variety < same.variety


def test_classifier_needs_labels(tmp_path: Path) -> None:
    import numpy as np

    from pygan.data import ImageSet

    real = ImageSet(np.zeros((4, 32, 32, 1), np.uint8), None, "photos", "abc")
    with pytest.raises(UserError, match="photos have no labels"):
        sample_quality.classifier(real, sample_quality.Recipe(), tmp_path)


def test_epochs_of_a_run(tmp_path: Path) -> None:
    for name in ("netG_epoch_10.pth", "netG_epoch_2.pth", "netG_epoch_2.safetensors", "netG.pth"):
        (tmp_path / name).touch()
    found = sample_quality.saved_epochs(tmp_path)
    assert {epoch: path.name for epoch, path in found.items()} == {
        2: "netG_epoch_2.safetensors",
        10: "netG_epoch_10.pth",
    }
    assert list(found) == [2, 10]
    with pytest.raises(UserError, match="holds no netG"):
        sample_quality.saved_epochs(tmp_path / "missing")
