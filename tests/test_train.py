"""The training command: what it writes, what it prints, and that it trains what it says."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import struct
import sys
import termios
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import numbers, resume, start, train, weights

import pygan
from pygan import checkpoint, cli, data
from pygan.config import Config, parse
from pygan.losses import NAMES
from pygan.models import dcgan
from pygan.training import Batches, Networks, Progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs (four steps each) on images of its own."""
    folder = tmp_path_factory.mktemp("finished")
    pixels = np.random.default_rng(0).integers(0, 256, (35, 16, 16), np.uint8)
    np.save(folder / "images.npy", pixels)
    flags = (f"--data={folder / 'images.npy'}", "--epochs=2", f"--outf={folder / 'run'}")
    assert train(*flags) == 0
    return folder / "run"


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    nets = {
        f"net{net}_epoch_{epoch}.{suffix}"
        for net in "GD"
        for epoch in (0, 1)
        for suffix in ("pth", "safetensors")
    }
    pictures = {"fake_samples_epoch_000.png", "fake_samples_epoch_001.png", "losses.png"}
    others = {"config.json", "log.jsonl", "resume.safetensors", "real_samples.png", ".lock"}
    others |= {"report.html", "resume.previous.safetensors"}
    assert names - events == nets | pictures | others


def test_the_pictures_are_grids_of_the_images(finished: Path) -> None:
    fake = Image.open(finished / "fake_samples_epoch_001.png")
    assert fake.mode == "L"
    assert fake.size == (8 * 18 + 2, 8 * 18 + 2)
    pixels = np.load(finished.parent / "images.npy")
    real = np.asarray(Image.open(finished / "real_samples.png"))
    first = real[2:18, 2:18]
    assert any(np.array_equal(first, image) for image in pixels)


def test_log_and_tensorboard_hold_the_same_numbers(finished: Path) -> None:
    rows = numbers(finished)
    assert [row["step"] for row in rows] == [4, 8]
    assert [row["epoch"] for row in rows] == [0, 1]
    events = EventAccumulator(str(finished)).Reload()
    for name in ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_after"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(row["step"], pytest.approx(row[name])) for row in rows]
    assert [event.step for event in events.Images("fake_samples")] == [4, 8]


def test_the_configuration_says_what_ran(finished: Path) -> None:
    content = json.loads((finished / "config.json").read_text())
    assert content["config"]["batch_size"] == 8
    assert content["config"]["image_size"] == 16
    assert content["config"]["amp"] == "off"
    assert content["data"]["images"] == 35
    assert content["data"]["fingerprint"] == data.load(finished.parent / "images.npy").fingerprint


def test_exported_weights_fit_the_plain_example(finished: Path) -> None:
    G, D = dcgan(16, 1, 8, 8, 8)
    for network, letter in ((G, "G"), (D, "D")):
        state = torch.load(finished / f"net{letter}_epoch_1.pth", weights_only=True)
        assert next(iter(state)) == "main.0.weight"
        assert all(tensor.is_contiguous() for tensor in state.values())
        network.load_state_dict(state)
        other, about = checkpoint.read_weights(finished / f"net{letter}_epoch_1.safetensors")
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert about["step"] == 8


def test_output_that_is_no_terminal_gets_the_classic_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--steps=8", f"--outf={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"\d+\.\d{4}"
    line = rf"Loss_D: {number} Loss_G: {number} D\(x\): {number} D\(G\(z\)\): {number} / {number}"
    assert re.fullmatch(rf"\[0/1\]\[3/128\] {line}", lines[-3])
    assert re.fullmatch(rf"\[0/1\]\[7/128\] {line}", lines[-2])
    assert re.fullmatch(rf"samples are in {tmp_path} .*; \d+\.\d images/s", lines[-1])


@pytest.mark.parametrize("columns", [180, 0])
def test_a_terminal_gets_a_bar(
    tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    pieces = []

    def read() -> None:
        # The system says EIO where a closed pipe would just end.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 4096):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        status = train("--steps=40", f"--outf={tmp_path}")
    reader.join()
    os.close(ours)
    assert status == 0
    shown = b"".join(pieces).decode()
    bars = re.findall(r"\r *(\d+)%\|[^|]*\| (\S+)/320 \[(\S+)<(\S+), *(\S+) images/s", shown)
    assert bars[-1][0] == "100"
    if columns:
        assert re.search(r"Loss_D: \S+ Loss_G: \S+ D\(x\): \S+ D\(G\(z\)\): \S+ / \S+\]", shown)
    assert "[0/1]" not in shown


@pytest.mark.parametrize("fused", [False, True])
def test_the_seed_decides_the_run(tmp_path: Path, fused: bool) -> None:
    way = ["--fused"] if fused else []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train("--steps=5", f"--seed={seed}", f"--outf={tmp_path / name}", *way) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "c").keys()
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_looking_at_a_run_does_not_change_it(tmp_path: Path) -> None:
    assert train("--steps=6", "--flip", f"--outf={tmp_path / 'a'}") == 0
    often = ("--sample-every=1", "--save-every=1", "--log-every=1")
    assert train("--steps=6", "--flip", f"--outf={tmp_path / 'b'}", *often) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def _parity(dtype: torch.dtype, size: int, **changes: object) -> float:
    """Largest relative L2 difference of a parameter or buffer after 20 plain and fused steps."""
    images = data.load("fashion-mnist", image_size=size)
    sides = []
    for fused in (False, True):
        config = Config(amp="off", fused=fused, **changes)  # type: ignore[arg-type]
        networks = Networks(config, size, 1, torch.device("cpu"))
        networks.G.to(dtype)
        networks.D.to(dtype)
        batches = Batches(config, images, torch.device("cpu"))
        for step in range(20):
            networks.step(batches.real(step).to(dtype), batches.latent().to(dtype))
        sides.append({**networks.G.state_dict(prefix="G."), **networks.D.state_dict(prefix="D.")})
    plain, fused_state = sides
    assert plain.keys() == fused_state.keys()
    return max(
        float((tensor.double() - fused_state[name].double()).norm() / tensor.double().norm())
        for name, tensor in plain.items()
    )


@pytest.mark.parametrize("loss", NAMES)
def test_fused_and_plain_training_are_the_same_mathematics(loss: str) -> None:
    sizes = {"batch_size": 16, "nz": 32, "ngf": 16, "ndf": 16}
    assert _parity(torch.float64, 32, loss=loss, **sizes) <= 1e-12


# In float32 the networks are small: the wider they are, the sooner some activation lies within a
# rounding error of ReLU's kink, and from there Adam, which divides by the size of a gradient,
# leads plain torch away from plain torch with another number of threads just as far.
@pytest.mark.parametrize("loss", ["bce", "minimax"])
@pytest.mark.parametrize("seed", range(3))
def test_fused_and_plain_training_give_the_same_numbers(loss: str, seed: int) -> None:
    sizes = {"batch_size": 8, "nz": 8, "ngf": 8, "ndf": 8}
    assert _parity(torch.float32, 16, loss=loss, seed=seed, **sizes) <= 1e-5


def test_start_weights_are_taken_over(finished: Path) -> None:
    file = finished / "netG_epoch_1.pth"
    networks = Networks(
        Config(nz=8, ngf=8, ndf=8, amp="off", netG=str(file)), 16, 1, torch.device("cpu")
    )
    taken = networks.G.state_dict()
    for name, tensor in torch.load(file, weights_only=True).items():
        assert torch.equal(taken[name], tensor)


def test_flip_mirrors_some_images_and_no_other_step_draws_the_same() -> None:
    images = data.load("fashion-mnist")
    flipped, plain = (
        Batches(Config(batch_size=32, flip=flip), images, torch.device("cpu"))
        for flip in (True, False)
    )
    patterns = []
    for step in range(2):
        a, b = flipped.real(step), plain.real(step)
        mirrored = torch.tensor([torch.equal(x, y.flip(-1)) for x, y in zip(a, b, strict=True)])
        same = torch.tensor([torch.equal(x, y) for x, y in zip(a, b, strict=True)])
        assert bool((mirrored | same).all())
        assert 0 < int(mirrored.sum()) < 32
        patterns.append(mirrored.tolist())
    assert patterns[0] != patterns[1]
    assert torch.equal(flipped.real(1), flipped.real(1))


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--batchSize 7", "batch_size", 7),
        ("--batch_size 7", "batch_size", 7),
        ("--niter 3", "epochs", 3),
        ("--n_epochs 3", "epochs", 3),
        ("--b1 0.9", "beta1", 0.9),
        ("--latent_dim 9", "nz", 9),
        ("--imageSize 32", "image_size", 32),
        ("--img_size 32", "image_size", 32),
        ("--manualSeed 5", "seed", 5),
        ("--dataset fake", "data", "fake"),
        ("--dataset fashion-mnist", "data", "fashion-mnist"),
        ("--dataset folder --dataroot /d", "data", "/d"),
        ("--dataroot /d", "data", "/d"),
        ("--dry-run --epochs 9", "steps", 1),
        ("--workers 0", "workers", 0),
    ],
)
def test_spellings_people_type(flags: str, field: str, value: object) -> None:
    assert parse(flags.split()).given == {field: value}


def test_outdir_is_outf() -> None:
    assert parse(["--outdir", "x"]).outf == "x"


def test_a_dry_run_does_everything_once(tmp_path: Path) -> None:
    assert train("--dry-run", f"--outf={tmp_path}") == 0
    assert [row["step"] for row in numbers(tmp_path)] == [1]
    assert (tmp_path / "netG_epoch_0.pth").exists()
    assert (tmp_path / "fake_samples_epoch_000.png").exists()


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--steps=40", "--lr=1e30", "--save-every=1", "--log-every=40")
    assert train(f"--outf={tmp_path}", *flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 or error.splitlines()[-1].startswith("python -m pygan.train")
    assert str(tmp_path / "resume.safetensors") in error
    state = checkpoint.read_state(tmp_path / "resume.safetensors")
    assert checkpoint.nonfinite(state) is None
    assert f"of step {state['position']};" in error


def _interrupting(monkeypatch: pytest.MonkeyPatch, number: int, at: int, times: int = 1) -> None:
    """Sends a signal to this process in the middle of step `at`."""
    steps = []

    def advance(self: Progress, count: int) -> None:
        steps.extend([None] * count)
        if len(steps) == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "advance", advance)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    assert train("--steps=9", f"--outf={tmp_path / 'whole'}") == 0
    run = tmp_path / "stopped"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        _interrupting(patch, number, at=5)
        assert train("--steps=9", f"--outf={run}") == status
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"saved at step 5 of 9; continue with python -m pygan.train --resume {run}" in (
        capsys.readouterr().out
    )
    assert checkpoint.read_state(run / "resume.safetensors")["position"] == 5
    assert resume(run) == 0
    assert weights(run) == weights(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupting(monkeypatch, signal.SIGINT, at=5, times=2)
    assert train("--steps=9", f"--outf={tmp_path}") == 130
    assert "interrupted" in capsys.readouterr().err
    assert checkpoint.read_state(tmp_path / "resume.safetensors")["position"] == 0


def test_sigterm_reaches_a_real_process(tmp_path: Path) -> None:
    process = start(
        "-m", "pygan.train", "--data=fake", "--image-size=16", "--ngf=8", "--ndf=8",
        "--batch-size=8", "--log-every=1", "--epochs=1000", f"--outf={tmp_path}",
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[0/1000][2/"):
            break
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    position = checkpoint.read_state(tmp_path / "resume.safetensors")["position"]
    assert f"saved at step {position} of 128000" in out


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(train("--steps=2", f"--outf={tmp_path}"))
    )
    thread.start()
    thread.join()
    assert statuses == [0]


def test_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert train("--steps=1", f"--outf={tmp_path}") == 0
    assert torch.get_num_threads() == before


def test_out_of_memory_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    assert cli.run("prog", body) == 1
    assert capsys.readouterr().err.startswith("prog: error: out of memory (CUDA out of memory.)")


@pytest.mark.gpu
def test_nothing_in_the_loop_waits_for_the_gpu() -> None:
    config = Config(batch_size=16, nz=32, ngf=16, ndf=16, fused=True, device="cuda")
    device = torch.device("cuda")
    networks = Networks(config, 32, 1, device)
    batches = Batches(config, data.load("fashion-mnist"), device)
    networks.step.totals = torch.zeros(5, device=device)
    assert batches.resident
    try:
        for step in range(30):
            if step == 20:
                torch.cuda.set_sync_debug_mode("error")
            batches.update(networks, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(networks.step.totals.isfinite().all())


@pytest.mark.parametrize("flip", [False, True])
def test_images_that_stay_on_the_device_are_the_same_batches(flip: bool) -> None:
    config = Config(batch_size=16, nz=8, ngf=8, ndf=8, fused=True, flip=flip)
    images = data.load("fake", image_size=16)
    states = []
    for resident in (False, True):
        networks = Networks(config, 16, images.channels, torch.device("cpu"))
        networks.step.totals = torch.zeros(5)
        batches = Batches(config, images, torch.device("cpu"))
        batches.resident = resident
        # The second is in another epoch.
        for step in (0, batches.order.steps_per_epoch + 1):
            batches.update(networks, step)
        states.append([*networks.G.state_dict().values(), networks.step.totals])
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_the_version_is_kept(finished: Path) -> None:
    content = json.loads((finished / "config.json").read_text())
    assert content["pygan"]["version"] == pygan.__version__
