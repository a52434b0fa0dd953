"""Runs on images that are decoded as they go: the same steps however often they stop."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import numbers, resume, train, weights

from pygan import data, evaluate
from pygan.config import Config
from pygan.data import StreamOrder, streaming
from pygan.distributed import World
from pygan.training import Batches

COUNT, WINDOW = 100, 24
BROKEN = (3, 4, 5, 40, 77)


def folder(path: Path, broken: tuple[int, ...] = BROKEN) -> Path:
    """Images of noise, of which the broken ones cannot be read."""
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16), "u1")
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(path / f"{i:02}.png")
    for i in broken:
        (path / f"{i:02}.png").write_bytes(b"broken")
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of three batches, of blocks of 8."""
    monkeypatch.setattr(streaming, "WINDOW_IMAGES", WINDOW)
    monkeypatch.setattr("pygan.data.order.BLOCK", 8)


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("pygan-stream")]


@pytest.mark.parametrize("flags", [(), ("--fused", "--flip")])
def test_a_run_that_was_stopped_anywhere_ends_as_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    flags = (f"--data={folder(tmp_path / 'a')}", "--stream", "--save-every=4", *flags)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(f"--outf={whole}", "--steps=30", *flags) == 0
    # In the middle of a window and of the first epoch, of 12 steps; then in the second.
    assert train(f"--outf={parts}", "--steps=4", *flags) == 0
    assert resume(parts, "--steps=17") == 0
    original = Batches.update

    def dying(self: Batches, networks: object, step: int, count: int) -> None:
        if step == 23:
            raise KeyboardInterrupt
        original(self, networks, step, count)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "update", dying)
        assert resume(parts, "--steps=30") == 130
    assert threads() == []
    assert resume(parts) == 0
    assert weights(parts) == weights(whole)
    # A run of 4 or 17 steps logs its last one too.
    after = [row for row in numbers(whole) if row["step"] > 20]
    assert [row for row in numbers(parts) if row["step"] > 20] == after
    assert (parts / "real_samples.png").read_bytes() == (whole / "real_samples.png").read_bytes()
    assert threads() == []


def test_the_run_says_how_many_images_were_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    flags = (f"--data={folder(tmp_path / 'a')}", "--stream", "--log-every=1")
    assert train(f"--outf={run}", "--steps=24", *flags) == 0
    order = StreamOrder(COUNT, 8, 0, WINDOW)
    unreadable = np.cumsum([np.isin(order.index(step), BROKEN).sum() for step in range(24)])
    assert [row["replaced"] for row in numbers(run)] == unreadable.tolist()
    assert f"{unreadable[-1]} times an image could not be read" in capsys.readouterr().out
    named = [record.message.split()[0] for record in caplog.records if "replaced" in record.message]
    assert len(named) == len(set(named)) <= len(BROKEN)
    stored = json.loads((run / "config.json").read_text())
    assert stored["config"]["stream"] is True and stored["data"]["images"] == COUNT


def test_many_processes_decode_the_batches_of_one(tmp_path: Path) -> None:
    stream = data.stream(folder(tmp_path / "a"), image_size=16)
    config = Config(batch_size=8, stream=True, flip=True, fused=True, seed=5)
    device = torch.device("cpu")
    alone, *parts = (
        Batches(config, stream, device, world) for world in (World(), World(0, 2), World(1, 2))
    )
    try:
        for step in (0, 1, 2, 3, 11, 12, 13, 30):
            whole = alone.real(step)
            assert torch.equal(torch.cat([part.real(step) for part in parts]), whole)
            replaced = sum(part.newly_replaced() for part in parts)
            assert alone.newly_replaced() == replaced
    finally:
        for each in (alone, *parts):
            each.close()


def test_a_window_that_nobody_can_read_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tuple(StreamOrder(COUNT, 8, 0, WINDOW).window(2).tolist())
    run = tmp_path / "run"
    flags = (f"--data={folder(tmp_path / 'a', broken)}", "--stream", "--save-every=5")
    assert train(f"--outf={run}", "--steps=24", *flags) == 1
    error = capsys.readouterr().err
    assert "none of 24 images of" in error and "the last checkpoint is kept" in error
    assert "Traceback" not in error
    assert threads() == []
    assert resume(run) == 1
    assert "none of 24 images" in capsys.readouterr().err


def test_other_data_or_another_way_to_read_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, loaded = folder(tmp_path / "a"), tmp_path / "run", tmp_path / "loaded"
    assert train(f"--outf={run}", "--steps=2", f"--data={source}", "--stream") == 0
    assert train(f"--outf={loaded}", "--steps=2", f"--data={source}") == 0
    assert resume(loaded, "--stream", "--steps=3") == 2
    assert "--stream (the run has no --stream) contradicts" in capsys.readouterr().err
    (source / "07.png").write_bytes((source / "08.png").read_bytes())
    assert resume(run, "--steps=3") == 2
    assert "has changed since" in (error := capsys.readouterr().err) and "fingerprint" in error
    (source / "07.png").unlink()
    assert resume(run, "--steps=3") == 2
    assert "images 100 then, 99 now" in capsys.readouterr().err


def test_a_stream_is_measured_by_a_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where torch-fidelity is installed it would be asked for its weights.
    monkeypatch.setattr("pygan.metrics.describe.has_inception", lambda: False)
    monkeypatch.setattr(evaluate, "SAMPLES", 1000)
    monkeypatch.setattr(streaming, "WINDOW_IMAGES", 64)
    run = tmp_path / "run"
    flags = (f"--data={folder(tmp_path / 'a')}", "--stream", "--evaluate-every=1")
    assert train(f"--outf={run}", "--steps=4", *flags) == 0
    assert evaluate.main([str(run), "--number=1000", "--features=pixels"]) == 0
    found = [json.loads(line) for line in (run / "quality.jsonl").read_text().splitlines()]
    assert found[0]["distance"] == found[1]["distance"]
    sample = len(data.stream(tmp_path / "a", image_size=16).sample())
    assert 59 <= sample <= 64
    assert f"against {sample} real images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("missing", "there is no data at"),
        ("s/{0..3}.tar", "0.tar' of "),
        ("s/*.tar", "no file matches"),
        ("broken.tar", "broken.tar' is not a whole tar"),
        ("broken", "none of 2 images of"),
        ("text", "holds no images"),
    ],
)
def test_bad_sources_of_a_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, pattern: str
) -> None:
    (tmp_path / "broken.tar").write_bytes(b"broken" * 200)
    for name in ("broken/1.png", "broken/2.png", "text/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"broken")
    logging.disable()
    try:
        run = tmp_path / "run"
        assert train(f"--data={tmp_path / source}", "--stream", f"--outf={run}") == 2
    finally:
        logging.disable(logging.NOTSET)
    error = capsys.readouterr().err
    assert pattern in error and error.count("\n") == 1
    assert not run.exists()


def test_nothing_is_written_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGAN_CACHE", str(tmp_path / "cache"))
    source = folder(tmp_path / "a")
    assert train(f"--outf={tmp_path / 'run'}", "--steps=2", f"--data={source}", "--stream") == 0
    assert not (tmp_path / "cache").exists()
    # What is not there is no part of the run's folder either.
    moved = shutil.move(source, tmp_path / "b")
    assert resume(tmp_path / "run", "--steps=3") == 2
    shutil.move(moved, source)
    assert resume(tmp_path / "run", "--steps=3") == 0
