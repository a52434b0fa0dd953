"""Pictures of benchmark results: what is drawn, from which records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import pictures, report
from pygan.errors import UserError

KEPT = Path(report.__file__).parent / "results"
RESULT = KEPT / "amd-epyc-family-25-model-17-2-cores-avx512" / "torch-2.13.0.json"
COST = KEPT / "amd-epyc-2-cores-avx512" / "cost.json"
SCALED = {
    "kind": "scaling",
    "series": [
        {
            "axis": axis,
            "side": side,
            "precision": "fp32",
            "fixed": "so and so",
            "points": [
                {"x": x, "images_per_second": 10.0 * x, "q1": 1.0, "q3": 2.0, "milliseconds": 3.0}
                for x in (1, 2, 4)
            ],
        }
        for axis in ("batch", "threads")
        for side in ("pygan fp32", "eager fp32 by hand")
    ],
}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return report.load(RESULT)


def test_a_bar_for_every_side(result: dict[str, Any]) -> None:
    records = report._of(result, *report.HEADLINE)
    figure = pictures.steps(records)
    drawn = [bar for axes in figure.axes for bar in axes.patches]
    assert sorted(bar.get_width() for bar in drawn) == sorted(
        record["images_per_second"] for record in records
    )
    ours = [bar for bar in drawn if bar.get_facecolor()[0] > 0.8]
    assert len(ours) == sum(record["side"].startswith("pygan") for record in records)


def test_a_point_for_the_fastest_of_both_at_every_operation(result: dict[str, Any]) -> None:
    records = report._of(result, *report.DRAWN)
    figure = pictures.roofline(records)
    points = [len(each.get_offsets()) for axes in figure.axes for each in axes.collections]
    sides = {(record["case"], pictures.is_ours(record)) for record in records}
    assert len(points) == 4
    assert sum(points) == len(sides)


def test_lines_and_what_linear_would_be() -> None:
    figure = pictures.scaling(SCALED["series"])  # type: ignore[arg-type]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    linear = figure.axes[1].lines[-1].get_ydata()
    assert linear[0] == pytest.approx(4 * linear[2])


PROFILED = {
    "kind": "profile",
    "command": "a command",
    "steps": 3,
    "precisions": [
        {
            "amp": amp,
            "batch": 64,
            "milliseconds": 8.0,
            "peaks": {"gflops_fp32": 100.0, "gflops_bf16": 300.0, "gb_per_s": 40.0},
            "parts": [{"group": "Adam", "milliseconds": 2.0, "calls": 1, "floor": 0.0}],
            "longest": [],
            "timeline": {
                "phases": [["G forward", 0.0, 3.0], ["D's update", 3.0, 8.0]],
                "groups": [["norm_act", 0.5, 2.0], ["gan_loss", 3.0, 4.0], ["Adam", 5.0, 7.0]],
            },
        }
        for amp in ("off", "bf16")
    ],
}


def test_every_part_of_the_time_line_is_drawn() -> None:
    figure = pictures.timeline(PROFILED["precisions"])  # type: ignore[arg-type]
    for axes in figure.axes:
        widths = [
            path.get_extents().width for each in axes.collections for path in each.get_paths()
        ]
        assert sorted(widths) == [1.0, 1.5, 2.0, 3.0, 5.0]


def test_only_what_has_records_is_drawn(tmp_path: Path) -> None:
    assert pictures.draw(tmp_path) == []
    (path,) = pictures.draw(tmp_path, grown=SCALED["series"])  # type: ignore[arg-type]
    with Image.open(path) as image:
        assert image.width == 1600
        assert image.convert("L").getextrema() != (255, 255)


def test_report_draws_beside_the_result(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled, profiled = tmp_path / "scaling.json", tmp_path / "profile.json"
    conditions = result["benchmarks"][0]["extra_info"]["conditions"] | {"threads": 4}
    scaled.write_text(json.dumps(SCALED | {"conditions": conditions, "left_out": []}))
    profiled.write_text(json.dumps(PROFILED | {"conditions": conditions}))
    arguments = [str(RESULT), str(scaled), str(profiled)]
    assert report.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    drawn = ("steps", "peers", "roofline", "memory", "scaling", "timeline")
    assert {path.stem for path in folder.glob("*.png")} == set(drawn)
    assert "| Adam | 2.00 | 25.0% |" in (folder / "profile.md").read_text()
    assert "| batch | 4 | pygan fp32 |" in (folder / "scaling.md").read_text()
    assert report.main([str(scaled)]) == 2


def test_whole_trainings_come_behind_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"way": "R1", "distance": 20.0, "precision": 0.5, "recall": 0.25}
    tricks = tmp_path / "tricks.json"
    tricks.write_text(json.dumps({
        "kind": "tricks", "command": "abacus", "left_out": [],
        "conditions": json.loads(COST.read_text())["conditions"],
        "runs": [run | {"images_per_second": speed} for speed in (10.0, 30.0)],
    }))  # fmt: skip
    arguments = [str(RESULT), str(COST), str(tricks), "--out", str(tmp_path / "out")]
    assert report.main(arguments) == 0
    assert "| pygan --fused | 3 |" in capsys.readouterr().out.partition("Networks as scripts")[0]
    (page,) = tmp_path.glob("out/*/tricks.md")
    assert "| 2 | 20.0 (20.0–20.0) | 50% (50%–50%) | 25% (25%–25%) | 20 (10–30) |" in (
        page.read_text()
    )


def test_a_later_result_has_the_last_word(result: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(result))
    changed["benchmarks"] = [
        entry for entry in changed["benchmarks"] if entry["extra_info"]["case"] == "dcgan64"
    ]
    for entry in changed["benchmarks"]:
        entry["extra_info"]["images_per_second"] = 1.0
    changed["datetime"] = "2031-01-01T00:00:00+00:00"
    changed.pop("measured", None)
    both = report.joined([result, changed])
    assert len(both["benchmarks"]) == len(result["benchmarks"])
    for entry in both["benchmarks"]:
        record = entry["extra_info"]
        assert (record.get("images_per_second") == 1.0) == (record["case"] == "dcgan64")
    assert both["measured"][-1].startswith("2031-01-01")
    assert report.joined([both, changed])["measured"] == both["measured"]


def test_other_devices_are_refused(result: dict[str, Any]) -> None:
    other = json.loads(json.dumps(result))
    for entry in other["benchmarks"]:
        entry["extra_info"]["conditions"]["device"] = "Another"
    with pytest.raises(UserError, match="2 devices"):
        report.joined([result, other])
