"""Tricks, measured: every way is a run, taken once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tricks
from pygan.config import parse


def test_every_way_is_a_command_line() -> None:
    for flags in tricks.WAYS.values():
        assert parse(["--fused", *flags]).given["fused"]


def test_runs_are_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[list[str]] = []

    def train(run: Path, flags: list[str]) -> dict[str, Any]:
        trained.append(flags)
        run.mkdir(parents=True, exist_ok=True)
        seed = int(flags[3])
        return {"images_per_second": 100.0, "distance": 9.0 + seed, "precision": 0.5, "recall": 0.2}

    monkeypatch.setattr(tricks, "_train", train)
    monkeypatch.setattr(tricks, "WAYS", {"as it comes": [], "R1": ["--r1", "1"]})
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "a.json"), "--seeds", "2"]
    assert tricks.main(words) == 0
    assert len(trained) == 4 and trained[1] == ["--epochs", "5", "--seed", "0", "--r1", "1"]
    table = capsys.readouterr().out
    assert "| R1 | `--r1 1` | 2 | 9.5 (9.0–10.0) | 50% (50%–50%) | 20% (20%–20%) | 100" in table
    assert tricks.main(words) == 0
    assert len(trained) == 4
    assert len(json.loads((tmp_path / "a.json").read_text())["runs"]) == 4
    # Another length is another run.
    assert tricks.main([*words, "--epochs", "7"]) == 0
    assert len(trained) == 8
