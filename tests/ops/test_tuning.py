from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pygan.ops.tuning import Tuner


class Clock:
    """Times calls by what they return, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Any]) -> float:
        self.count += 1
        return float(run())


def ways(**times: float) -> dict[str, Callable[[], float]]:
    return {name: (lambda time=time: time) for name, time in times.items()}


def fails() -> float:
    raise RuntimeError("out of shared memory")


def test_the_baseline_stays_within_noise(tmp_path: Path) -> None:
    tuner = Tuner("device", Clock(), tmp_path)
    assert tuner.choose("little", ways(torch=1.0, ours=0.98), "torch") == "torch"
    assert tuner.choose("much", ways(torch=1.0, ours=0.96, other=0.9), "torch") == "other"
    assert tuner.choose("alone", ways(torch=1.0), "torch") == "torch"
    assert tuner.choose("none", ways(slow=2.0, fast=1.9)) == "fast"


def test_what_fails_is_left_out(tmp_path: Path) -> None:
    tuner = Tuner("device", Clock(), tmp_path)
    candidates = ways(torch=1.0, ours=0.5)
    assert tuner.choose("ours", candidates | {"ours": fails}, "torch") == "torch"
    assert tuner.choose("torch", candidates | {"torch": fails}, "torch") == "ours"
    with pytest.raises(RuntimeError, match="none of ours runs"):
        tuner.choose("all", {"ours": fails})


def test_what_fails_later_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = iter([0.5, fails])

    def once() -> float:
        result = next(calls)
        return result() if callable(result) else result

    tuner = Tuner("device", Clock(), tmp_path)
    caplog.set_level(logging.INFO, logger="pygan")
    assert tuner.choose("key", ways(torch=1.0, slow=0.9) | {"ours": once}, "torch") == "torch"
    assert "ours does not run here (out of shared memory)" in caplog.text
    assert next(calls, None) is None


def test_a_first_slow_measurement_does_not_decide(tmp_path: Path) -> None:
    times = iter([5.0, 0.9, 0.9, 0.9])
    # The device was still waking up while the baseline was measured.
    tuner = Tuner("device", lambda run: next(times), tmp_path)
    assert tuner.choose("key", ways(torch=0.0, ours=0.0), "torch") == "torch"


def test_choices_are_kept(tmp_path: Path) -> None:
    clock = Clock()
    candidates = ways(torch=1.0, ours=0.5)
    assert Tuner("device", clock, tmp_path).choose("key", candidates, "torch") == "ours"
    count = clock.count
    again = Tuner("device", clock, tmp_path)
    assert again.known("key", candidates) == "ours"
    assert again.choose("key", candidates, "torch") == "ours"
    assert clock.count == count
    assert again.known("other key", candidates) is None
    # A configuration that is no candidate any more is measured anew.
    assert again.choose("key", ways(torch=1.0, newer=0.7), "torch") == "newer"
    assert Tuner("other device", clock, tmp_path).known("key", candidates) is None


def test_what_was_measured_elsewhere_is_kept(tmp_path: Path) -> None:
    tuner = Tuner("device", Clock(), tmp_path)
    assert tuner.choose("mine", ways(torch=1.0, ours=0.5), "torch") == "ours"
    tuner.keep("theirs", "4")
    for each in (tuner, Tuner("device", Clock(), tmp_path)):
        assert each.known("theirs", dict.fromkeys("1248")) == "4"
        assert each.known("theirs", dict.fromkeys("12")) is None
        assert each.known("mine", {"ours": None}) == "ours"


def test_two_processes_keep_both_choices(tmp_path: Path) -> None:
    one, two = (Tuner("device", Clock(), tmp_path) for _ in range(2))
    candidates = ways(torch=1.0, ours=0.5)
    one.choose("one", candidates, "torch")
    two.choose("two", candidates, "torch")
    third = Tuner("device", Clock(), tmp_path)
    assert third.known("one", candidates) == third.known("two", candidates) == "ours"
    assert [path.name for path in third.path.parent.iterdir()] == [third.path.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace('"ours"', '"torch"'),
        lambda text: json.dumps([1]),
        lambda text: json.dumps({"check": "", "choices": 3}),
        lambda text: "",
    ],
)
def test_a_damaged_file_is_ignored(
    damage: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = ways(torch=1.0, ours=0.5)
    tuner = Tuner("device", Clock(), tmp_path)
    tuner.choose("key", candidates, "torch")
    tuner.path.write_text(damage(tuner.path.read_text()))
    with caplog.at_level(logging.WARNING, "pygan"):
        again = Tuner("device", Clock(), tmp_path)
    assert "damaged" in caplog.text
    assert again.known("key", candidates) is None
    assert again.choose("key", candidates, "torch") == "ours"
    assert Tuner("device", Clock(), tmp_path).known("key", candidates) == "ours"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tuning").write_text("in the way")
    tuner = Tuner("device", Clock(), tmp_path)
    candidates = ways(torch=1.0, ours=0.5)
    assert tuner.choose("key", candidates, "torch") == "ours"
    assert tuner.choose("other key", candidates, "torch") == "ours"
    assert tuner.known("key", candidates) == tuner.known("other key", candidates) == "ours"
