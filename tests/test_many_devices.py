"""The model of data-parallel training, against sums by hand and two real processes."""

from __future__ import annotations

import pytest

from benchmarks.many_devices import (
    Link,
    Traffic,
    line_through,
    main,
    reduce_seconds,
    ring_seconds,
    step_seconds,
    traffic,
)

LINK = Link(4, 2.0, 1.0, 1.0, 10.0, "by hand")


def test_rings() -> None:
    assert ring_seconds(1e9, 1, 1.0, 5.0) == 0
    assert ring_seconds(4e9, 4, 2.0, 1.0) == pytest.approx(3 + 6e-6)
    # 4 GB within a node of 4, then a quarter of them between 2 nodes.
    assert reduce_seconds(4e9, 8, LINK) == pytest.approx(3 + 6e-6 + 1 + 2e-5)


def test_step() -> None:
    found = Traffic((3_000_000_000, 1_000_000_000), (64,))
    reduced = 4.000032 + 0.000020  # two reductions: latencies count twice
    local = step_seconds(6.0, 8, found, LINK, 0.5, synchronised=False)
    assert local == pytest.approx(6.0 + reduced - 3.0)
    assert step_seconds(9.0, 8, found, LINK, 0.5, synchronised=False) == 9.0
    extra = step_seconds(6.0, 8, found, LINK, 0.5, synchronised=True) - local
    assert extra == pytest.approx(2 * reduce_seconds(512, 8, LINK))


def test_traffic_by_hand() -> None:
    # Two levels: G goes 100 -> 16 -> 8 -> 1, and D mirrors it without the first norm.
    found = traffic(16, 1, 8)
    g = 16 * (100 * 16 + 16 * 8 + 8 * 1) + 2 * (16 + 8)
    d = 16 * (1 * 8 + 8 * 16 + 16 * 1) + 2 * 16
    assert found == Traffic((4 * g, 4 * d), (16, 8, 16, 16, 16))


def test_line() -> None:
    assert line_through([1e9, 3e9], [1.0002, 3.0002]) == pytest.approx((1.0, 100.0))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--step-ms", "2"]) == 0
    assert "| 1024 |" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0
    assert "measured" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--step-ms", "1", "--fixed-ms", "2"], ["--link", "rope"]])
def test_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
