"""What the monitor costs, measured: two runs that differ in it alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import monitor_cost
from pygan.config import Config
from pygan.monitor import Monitor

TINY = Config(image_size=16, batch_size=8, nz=8, ngf=8, ndf=8, fused=True, log_every=5, amp="off")


def test_only_one_run_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = Monitor.check

    def noted(self: Monitor, step: int, means: list[float]) -> object:
        assert len(means) == 4 and all(0 <= share <= 1 for share in means[2:])
        checked.append(step)
        return check(self, step, means)

    monkeypatch.setattr(Monitor, "check", noted)
    found = monitor_cost.compare(TINY, 3, 10, torch.device("cpu"))
    # A turn to warm up, then three.
    assert checked == list(range(5, 41, 5))
    assert [len(seconds) for seconds in found["seconds"].values()] == [3, 3]
    assert found["extra"]["low"] <= found["extra"]["median"] <= found["extra"]["high"]


def test_a_turn_holds_one_look_at_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = Monitor._look

    def noted(self: Monitor) -> torch.Tensor:
        looks.append(len(looks))
        return look(self)

    monkeypatch.setattr(Monitor, "_look", noted)
    monkeypatch.setattr("pygan.training.Batches.update", lambda *_: None)
    call = monitor_cost.turn(TINY, monitor_cost.PERIOD, torch.device("cpu"))
    for turns in range(1, 4):
        call()
        assert len(looks) == turns


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(config: Config, rounds: int, steps: int, device: torch.device) -> object:
        assert config == Config(fused=True, device=device.type) and (rounds, steps) == (9, 100)
        extra = {"median": 0.004, "low": 0.001, "high": 0.012}
        return {"steps": steps, "seconds": {"with": [1.0] * 9, "without": [1.0] * 9},
                "extra": extra, "coverage": 0.96}  # fmt: skip

    monkeypatch.setattr(monitor_cost, "compare", compare)
    assert monitor_cost.main(["--rounds=9", f"--json={tmp_path / 'a.json'}"]) == 0
    said = "adds 0.40% (0.10% to 1.20%) to the time of the default run's steps: 9 rounds of 100"
    assert said in capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["extra"]["high"] == 0.012
    assert said in monitor_cost.page(result)[0]
    assert monitor_cost.main(["--rounds=0"]) == 2
