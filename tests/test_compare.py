"""What `benchmarks.compare` says of two results, and of two trees."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import ROOT, Change, Worker, changes, interleaved, main
from pygan.cli import Failure


def record(
    case: str, side: str, ratio: tuple[float, float, float] | None, **more: Any
) -> dict[str, Any]:
    median, low, high = ratio or (1.0, 1.0, 1.0)
    interval = {"median": median, "low": low, "high": high, "coverage": 0.96}
    return {
        "extra_info": {
            "case": case,
            "side": side,
            "baseline": ratio is None,
            "ratios": {"eager fp32": interval},
            **more,
        }
    }


def result(**ratios: tuple[float, float, float]) -> dict[str, Any]:
    rows = [record("step", "eager fp32", None)]
    rows += [record("step", side, ratio) for side, ratio in ratios.items()]
    return {"benchmarks": rows}


def test_relative_to_a_side_of_the_same_run() -> None:
    old = result(kept=(2.0, 1.9, 2.1), gone=(1.0, 1.0, 1.0))
    new = result(kept=(1.5, 1.45, 1.55), come=(1.0, 1.0, 1.0))
    found, gone, come = changes(old, new)
    assert found == [Change("step", "kept", 0.75, 1.45 / 2.1, 1.55 / 1.9)]
    assert (gone, come) == ([("step", "gone")], [("step", "come")])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.90, 0.96, "slower"),
        (0.90, 0.98, "not told apart"),
        (0.98, 1.01, "not told apart"),
        (1.01, 1.20, "not told apart"),
        (1.04, 1.20, "faster"),
    ],
)
def test_verdicts_need_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Change("step", "side", (low + high) / 2, low, high).verdict(0.03) == verdict


def test_another_state_of_the_machine_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, speed, rates in (("old", 2.0, [30.0, 34.0]), ("new", 1.5, [62.0, 66.0])):
        side = record("step", "a", (speed, speed, speed), copy_gb_per_s=rates)
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps({"benchmarks": [record("step", "eager fp32", None), side]}))
    assert main([str(path) for path in paths]) == 1
    said = capsys.readouterr().out
    assert "| step, a | 0.750 | 0.750–0.750 | 2.00 | slower |" in said
    assert "beside 1 of them memory was over 20% slower or faster" in said
    assert main([str(paths[0])] * 2) == 0
    assert "| 1.00 | not told apart |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "moved"), [(None, False), (1.0, False), (1.19, False), (1.21, True), (0.8, True)]
)
def test_what_another_state_is(memory: float | None, moved: bool) -> None:
    assert Change("step", "side", 1.0, 1.0, 1.0, memory).moved == moved


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    written = {
        "old": result(a=(2.0, 1.98, 2.02), b=(1.0, 0.99, 1.01)),
        "same": result(a=(2.0, 1.97, 2.03), b=(1.0, 0.98, 1.02)),
        "slower": result(a=(1.7, 1.68, 1.72), b=(1.0, 0.99, 1.01)),
        "other": result(c=(1.0, 1.0, 1.0)),
    }
    for name, content in written.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "broken").write_text("{")
    return {name: str(tmp_path / name) for name in (*written, "broken", "missing")}


@pytest.mark.parametrize(("new", "status"), [("same", 0), ("slower", 1)])
def test_exit_status(
    files: dict[str, str], new: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([files["old"], files[new]]) == status
    out = capsys.readouterr().out
    assert ("1 of 2 are slower by more than 3%" in out) == bool(status)
    assert main([files["old"], files[new], "--tolerance", "0.2"]) == 0
    assert main([files["old"], files[new], "-k", "step b"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give two results"),
        (["old"], "1 results were given"),
        (["old", "same", "--against", "HEAD"], "give two results"),
        (["old", "broken"], "is not JSON"),
        (["old", "missing"], "cannot read"),
        (["old", "other"], "no side in common"),
        (["--against", "no-such-revision"], "give a revision"),
        (["--against", "HEAD", "-k", "cyclegan"], "no case has"),
        (["old", "same", "--rounds", "2"], "--rounds"),
    ],
)
def test_mistakes_are_one_sentence(
    files: dict[str, str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([files.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_worktree_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    monkeypatch.setenv("PYGAN_EXT", "off")
    with pytest.raises(KeyboardInterrupt), compare.worktree("HEAD") as tree:
        assert (tree / "pygan" / "__init__.py").exists()
        raise KeyboardInterrupt
    assert not tree.exists()
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(tree) not in listed.stdout


def test_a_slower_tree_is_seen(tmp_path: Path) -> None:
    """A pygan whose step waits, beside this one, by the real workers."""
    slow = tmp_path / "pygan"
    slow.mkdir()
    (slow / "__init__.py").write_text(
        "import time\n"
        "def fuse(network): pass\n"
        "class AdversarialStep:\n"
        "    def __init__(self, *arguments, **keywords): pass\n"
        "    def __call__(self, real): time.sleep(SECONDS)\n"
    )
    (slow / "models.py").write_text(
        "from torch import nn\ndef dcgan(**keywords): return nn.Linear(2, 2), nn.Linear(2, 2)\n"
    )
    quick = tmp_path / "quick" / "pygan"
    quick.mkdir(parents=True)
    for path in slow.glob("*.py"):
        (quick / path.name).write_text(path.read_text().replace("SECONDS", "0.1"))
    (slow / "__init__.py").write_text((slow / "__init__.py").read_text().replace("SECONDS", "0.2"))
    (change,) = interleaved([quick.parent, tmp_path], [("dcgan16", "off")], rounds=6)
    assert change.verdict(0.03) == "slower"
    assert change.speed == pytest.approx(0.5, abs=0.1)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "pygan"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise SystemExit(3)\n")
    worker = Worker(tmp_path)
    try:
        with pytest.raises(Failure, match="a worker ended"):
            worker.ask(build="dcgan16", amp="off")
    finally:
        worker.close()
