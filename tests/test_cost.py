"""What the benchmark of a training's cost makes of logs, counters and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost
from benchmarks.cost import CpuEnergy, figures, main, training_seconds


def _zone(folder: Path, name: str, microjoules: int) -> None:
    zone = folder / name
    zone.mkdir(exist_ok=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")


def test_cpu_energy(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", 9_000_000)
    _zone(tmp_path, "intel-rapl:0:0", 1)
    energy = CpuEnergy(tmp_path)
    _zone(tmp_path, "intel-rapl:0", 9_500_000)
    _zone(tmp_path, "intel-rapl:0:0", 5_000_000)
    energy.read()
    assert energy.joules == pytest.approx(0.5)
    _zone(tmp_path, "intel-rapl:0", 1_000_000)
    energy.read()
    assert energy.joules == pytest.approx(2.0)
    assert CpuEnergy(tmp_path / "none").joules is None


def test_training_seconds() -> None:
    rows = [{"step": 10, "seconds": 2.0}, {"step": 20, "seconds": 6.0}]
    assert [training_seconds(rows, step) for step in (5, 10, 15, 20)] == [1.0, 2.0, 4.0, 6.0]


def test_figures() -> None:
    epochs = [{"distance": d, "seconds": s} for d, s in ((9.0, 1.0), (4.0, 2.0), (2.0, 3.0))]
    run: dict[str, Any] = {"images": 2000, "seconds": 3.0, "peak_bytes": 7, "epochs": epochs}
    run |= {"cpu_joules": 50.0, "gpu_joules": "not readable"}
    found = figures(run, 4.0)
    assert list(found) == list(cost.FIGURES) and list(found.values()) == [1.5, 25.0, 7, 2.0]
    assert figures(run, 1.0)["seconds_to_distance"] is None
    assert figures(run | {"cpu_joules": "not readable"}, None)["joules_per_1000"] is None


def test_a_tiny_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "WAYS", {"pygan --fused": ["--fused"]})
    told = {"epochs": [{"epoch": 0, "distance": 3.0}]}
    monkeypatch.setattr(cost.evaluate, "measure", lambda options: told)
    words = ["--runs", str(tmp_path), "--out", str(tmp_path / "a.json"), "--seeds", "1"]
    words += ["--to-distance", "3", "--", "--steps", "2", "--batch-size", "8"]
    words += ["--ngf", "4", "--ndf", "4"]
    assert main(words) == 0
    first = json.loads((tmp_path / "a.json").read_text())
    (run,) = first["runs"]
    assert run["images"] == 16 and run["peak_bytes"] > 0 and run["seconds"] > 0
    assert "s per 1,000 images" in capsys.readouterr().out
    # The second time nothing is trained: the figures are those kept.
    assert main(words) == 0
    assert json.loads((tmp_path / "a.json").read_text())["runs"] == first["runs"]


def test_no_run_begins_after_the_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--runs", str(tmp_path), "--out", str(tmp_path / "a.json"), "--minutes", "1e-9"]
    assert main(words) == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["left_out"]) == 9


@pytest.mark.parametrize("words", [[], ["--runs", "a", "--out", "b", "--seeds", "0"]])
def test_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"{cost.PROG}: error: ")
