"""How the benchmark of scaling plans, counts and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import machine, scaling
from benchmarks.bench_train_step import WAYS, Setup
from benchmarks.scaling import Point, main, per_batch_share, per_image, points, rounds_within, row

EAGER = next(way for way in WAYS if way.name == "eager fp32 by hand")


def test_points() -> None:
    assert [p.setup.batch for p in points("batch", 2)] == [2**k for k in range(11)]
    assert [p.setup.image for p in points("size", 2)] == [(3, s, s) for s in (16, 32, 64, 128, 256)]
    assert {p.setup.batch for p in points("size", 2)} == {16}
    assert [p.threads for p in points("threads", 3)] == [1, 2, 3]


def test_rounds_that_fit() -> None:
    assert [rounds_within(seconds, 2.0) for seconds in (9.0, 10.0, 17.0, 100.0)] == [0, 5, 8, 15]


def test_row_by_hand() -> None:
    expected = {"x": 4, "images_per_second": 4.0, "q1": 2.0, "q3": 8.0, "milliseconds": 1000.0}
    assert row(4, 4, [0.25, 0.5, 1.0, 2.0, 4.0]) == expected


def test_what_linear_keeps() -> None:
    assert per_image("batch", {"x": 8, "images_per_second": 4.0}) == 0.25
    assert per_image("size", {"x": 4, "images_per_second": 0.25}) == 0.25
    assert per_image("threads", {"x": 3, "images_per_second": 6.0}) == 0.5


def test_share_of_the_batch_halves_against_the_images() -> None:
    # With fixed bytes f and i an image, the share at b is f / (f + b i): odds fall as 1 / b.
    shares = [per_batch_share(EAGER, Setup((3, 64, 64), batch=b)) for b in (1, 8)]
    odds = [share / (1 - share) for share in shares]
    assert odds[0] == pytest.approx(8 * odds[1])
    assert 0 < shares[1] < shares[0] < 1


def test_a_tiny_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [Point("batch", b, Setup((3, 16, 16), batch=b, width=8), 1) for b in (8, 64)]
    monkeypatch.setattr(scaling, "points", lambda axis, threads: made)
    monkeypatch.setattr(scaling, "rounds_within", lambda *_: 5)  # however busy the machine
    monkeypatch.setattr(machine, "emulated", lambda *_: None)  # on any CPU
    out, threads = tmp_path / "scaling.json", torch.get_num_threads()
    assert main(["--out", str(out), "--axis", "batch"]) == 0
    result = json.loads(out.read_text())
    keys = {"kind", "conditions", "datetime", "command", "left_out", "series"}
    assert set(result) == keys and result["kind"] == "scaling" and result["left_out"] == []
    assert [series["side"] for series in result["series"]] == list(scaling.SIDES)
    for series in result["series"]:
        assert [point["x"] for point in series["points"]] == [8, 64]
        assert all(p["q1"] <= p["images_per_second"] <= p["q3"] for p in series["points"])
    assert "cost to linear" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_no_room_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "require_right_steps", lambda *_: None)
    made = [Point("batch", b, Setup((3, 16, 16), batch=b, width=8), 1) for b in (2, 2**20)]
    series, left_out = scaling.measure_axis("batch", [EAGER], made, 20.0)
    assert [point["x"] for point in series[0]["points"]] == [2]
    (missing,) = left_out
    assert missing["x"] == 2**20 and "5 rounds of all sides need about" in missing["reason"]


@pytest.mark.parametrize(
    "words", [[], ["--out", "a.json", "--axis", "depth"], ["--out", "a.json", "--minutes", "0"]]
)
def test_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"{scaling.PROG}: error: ")


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "none" / "a.json")]) == 2
    assert "is no folder" in capsys.readouterr().err
