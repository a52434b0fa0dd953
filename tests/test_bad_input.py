"""Mistakes on the command line end in one sentence and exit status 2, and lose nothing."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import ROOT, TINY, numbers, resume, start, train, weights

from pygan import checkpoint, cli, run_folder
from pygan.run_folder import RunFolder
from pygan.train import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train("--steps=2", f"--outf={run}") == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run that may be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def sentence(capsys: pytest.CaptureFixture[str], prog: str = "python -m pygan.train") -> str:
    """The one line on standard error (the log of the data may come before it)."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(prog)]
    assert len(lines) == 1
    assert lines[0].startswith(f"{prog}: error: ")
    return lines[0].removeprefix(f"{prog}: error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch-size 0", "--batch-size: 0 is out of range; give a whole number from 1"),
        ("--batchSize -3", "--batch-size: -3 is out of range"),
        ("--batch-size 2.5", "--batch-size: '2.5' is not a number; give a whole number"),
        ("--batch-size many", "'many' is not a number"),
        ("--batch-size 9999999999999", "is out of range"),
        ("--batch-size 10001", "larger than the data set, fashion-mnist with 10000 images"),
        ("--batch-size 2000 --data fake", "larger than the data set, fake with 1024 images"),
        ("--epochs 0", "--epochs: 0 is out of range"),
        ("--epochs -1", "--epochs: -1 is out of range"),
        ("--steps 0", "--steps: 0 is out of range"),
        ("--epochs 2 --steps 9", "give one of them"),
        ("--lr 0", "--lr: 0 is out of range; give a finite number above 0"),
        ("--lr=-1e-4", "--lr: -1e-4 is out of range"),
        ("--lr nan", "--lr: nan is out of range"),
        ("--lr inf", "--lr: inf is out of range"),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--beta1 1", "--beta1: 1 is out of range; give a finite number of at least 0 and below 1"),
        ("--b1 -0.5", "--beta1: -0.5 is out of range"),
        ("--beta1 nan", "--beta1: nan is out of range"),
        ("--loss-weight 0", "--loss-weight: 0 is out of range"),
        ("--nz 0", "--nz: 0 is out of range"),
        ("--ngf 0", "--ngf: 0 is out of range"),
        ("--ndf -64", "--ndf: -64 is out of range"),
        ("--workers -1", "--workers: -1 is out of range"),
        ("--seed -1", "--seed: -1 is out of range"),
        ("--seed x", "--seed: 'x' is not a number"),
        ("--threads 0", "--threads: 0 is out of range"),
        ("--threads 1000000", "--threads: 1000000 is out of range"),
        ("--save-every 0", "--save-every: 0 is out of range"),
        ("--log-every 0", "--log-every: 0 is out of range"),
        ("--sample-every 0", "--sample-every: 0 is out of range"),
        ("--image-size 48", "--image-size: 48 is not a power of two from 16 to 256"),
        ("--imageSize 0", "is not a power of two from 16 to 256"),
        ("--image-size 512", "give 16, 32, 64, 128 or 256"),
        ("--image-size big", "'big' is not a number; give 16, 32, 64, 128 or 256"),
        ("--amp half", "--amp: invalid choice: 'half'"),
        ("--graph on", "--graph on captures the fused step; add --fused"),
        ("--loss wgan", "--loss: invalid choice: 'wgan'"),
        ("--device tpu", "--device: invalid choice: 'tpu'"),
        ("--lr", "--lr: expected one argument"),
        ("--learning-rate 1", "--learning-rate is not a flag"),
        ("--batchsize 8", "--batchsize is not a flag of python -m pygan.train; did you mean"),
        ("photos", "photos is not a flag"),
        ("--dataset cifar10", "--dataset cifar10 is not known"),
        ("--dataset folder", "--dataset folder needs --dataroot"),
        ("--dataset fake --dataroot /x", "leave out one of them"),
        ("--data fake --ngf 100000", "GiB of memory"),
        ("--data fake --nz 2000000000 --ndf 2000000000", "of memory"),
        ("--data fake --batch-size 1024 --image-size 256 --ngf 4096", "GiB of memory"),
        ("--netG /does/not/exist.pth", "/does/not/exist.pth cannot be read"),
        ("--resume /does/not/exist", "/does/not/exist holds no run to continue"),
        ("--resume a --overwrite", "give one of them"),
        ("--resume a --outf b", "leave out --outf b"),
        ("--resume a --dry-run", "leave it out, or leave out --resume"),
        ("--outf /dev/null/run", "cannot be"),
        ("--outf /proc/run", "/proc/run cannot be written"),
    ],
)  # fmt: skip
def test_flags(flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outf = [] if "--outf" in flags or "--resume" in flags else [f"--outf={tmp_path / 'run'}"]
    assert main([*outf, *flags.split()]) == 2
    assert said in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device=cuda", f"--outf={tmp_path / 'run'}"]) == 2
    assert "torch sees no NVIDIA GPU" in sentence(capsys)


def _idx(shape: tuple[int, ...], present: int) -> bytes:
    header = struct.pack(">HBB", 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
    return header + bytes(present)


def _bomb(path: Path) -> None:
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""
    path.mkdir()
    Image.new("1", (8, 8)).save(path / "a.png")
    data = bytearray((path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (path / "a.png").write_bytes(data)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _packed(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def _corrupt_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", bytes(3000))
    path.write_bytes(path.read_bytes()[:-60])


DATA: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.mkdir(),
    "no_images": lambda path: (path.mkdir(), (path / "a.txt").write_text("hello")),
    "unreadable_images": lambda path: (path.mkdir(), (path / "a.png").write_bytes(b"\x89PNG")),
    "corrupt.zip": _corrupt_zip,
    "not_a.zip": lambda path: path.write_bytes(b"hello"),
    "truncated.idx": lambda path: path.write_bytes(_idx((10, 32, 32), 5000)),
    "truncated-idx3-ubyte.gz": lambda path: path.write_bytes(
        gzip.compress(_idx((10, 32, 32), 10240))[:-20]
    ),
    "wrong_type.npy": lambda path: np.save(path, np.zeros((9, 32, 32), np.float32)),
    "wrong_shape.npy": lambda path: np.save(path, np.zeros((9, 32), np.uint8)),
    "pickled.npy": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "truncated.npy": lambda path: (
        np.save(path, np.zeros((9, 32, 32), np.uint8)),
        path.write_bytes(path.read_bytes()[:-100]),
    ),
    "bomb": _bomb,
    "bomb.npy": lambda path: path.write_bytes(_npy_header((10**15, 32, 32))),
    "bomb.npz": lambda path: _packed(path, "images.npy", _npy_header((10**15, 32, 32))),
    "text.txt": lambda path: path.write_text("hello"),
    "links_out": lambda path: (path.mkdir(), (path / "a.png").symlink_to(__file__)),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / name, tmp_path / "run"
    DATA[name](source)
    assert main([f"--data={source}", "--steps=1", f"--outf={out}"]) == 2
    assert name in sentence(capsys)
    assert not out.exists()


def test_an_unreadable_image_is_skipped_and_named(tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "run"
    source.mkdir()
    for number in range(9):
        Image.new("L", (20, 20), number).save(source / f"{number}.png")
    (source / "broken.png").write_bytes((source / "1.png").read_bytes()[:40])
    assert train(f"--data={source}", "--steps=1", f"--outf={out}") == 0
    described = json.loads((out / "config.json").read_text())["data"]
    assert described["images"] == 9
    assert [Path(name).name for name, _ in described["skipped"]] == ["broken.png"]


def test_links_out_of_the_data_are_followed_when_asked_for_and_on_resume(tmp_path: Path) -> None:
    source, elsewhere, out = (tmp_path / name for name in ("photos", "elsewhere", "run"))
    for folder in (source, elsewhere):
        folder.mkdir()
        for number in range(8):
            Image.new("L", (20, 20), number).save(folder / f"{number}.png")
    (source / "linked").symlink_to(elsewhere)
    flags = (f"--data={source}", "--steps=1")
    assert train(*flags, f"--outf={out}", "--follow-links") == 0
    content = json.loads((out / "config.json").read_text())
    assert content["config"]["follow_links"] and content["data"]["images"] == 16
    assert resume(out, "--steps=2") == 0
    assert train(*flags, f"--outf={tmp_path / 'other'}") == 0
    described = json.loads((tmp_path / "other/config.json").read_text())["data"]
    assert described["images"] == 8
    assert [name for name, _ in described["skipped"]] == ["linked"]


def test_a_folder_that_holds_a_run_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert train("--steps=1", f"--outf={run}") == 2
    said = sentence(capsys)
    assert f"--resume {run}" in said
    assert "--overwrite" in said
    assert contents(run) == before


@pytest.mark.parametrize("name", ["netG_epoch_24.pth", "fake_samples_epoch_000.png", "log.jsonl"])
def test_what_another_program_left_is_not_replaced(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("precious")
    assert train("--steps=1", f"--outf={tmp_path}") == 2
    assert "already holds a run" in sentence(capsys)
    assert contents(tmp_path) == {name: b"precious"}


def test_overwrite_removes_what_the_old_run_wrote_and_nothing_else(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "netG_epoch_7.pth").write_bytes(b"old")
    assert train("--steps=1", f"--outf={run}", "--overwrite") == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "netG_epoch_7.pth").exists()
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert checkpoint.read_state(run / "resume.safetensors")["position"] == 1


@pytest.mark.parametrize("flag", ["--data=/does/not/exist", "--netG=/does/not/exist.pth"])
def test_overwrite_removes_nothing_before_the_new_run_is_sure(
    run: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert train("--steps=1", f"--outf={run}", "--overwrite", flag) == 2
    assert "/does/not/exist" in sentence(capsys)
    assert contents(run) == before


def test_two_runs_in_one_folder_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    with open(run / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert resume(run, "--steps=9") == 2
        assert "another process is training" in sentence(capsys)
        assert train("--steps=1", f"--outf={run}", "--overwrite") == 2
        assert "another process is training" in sentence(capsys)
    assert contents(run) == before
    assert resume(run, "--steps=3") == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr 0.001", "--lr 0.001 (the run has --lr 0.0002) contradicts the run"),
        ("--batch-size 16", "--batch-size 16 (the run has --batch-size 8)"),
        ("--seed 1 --ngf 9", "--ngf 9 (the run has --ngf 8)"),
        ("--fused", "--fused (the run has no --fused)"),
        ("--data fashion-mnist", "the run has --data fake"),
        ("--image-size 32", "the run has --image-size 16"),
        ("--follow-links", "--follow-links (the run has no --follow-links)"),
        ("--netG x.pth", "the run has no --netG"),
        ("--steps 1", "is set to 2 steps and cannot be shortened to 1"),
    ],
)
def test_resume_with_flags_that_contradict_the_run(
    finished: Path, flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert resume(finished, *flags.split()) == 2
    assert said in sentence(capsys)
    assert contents(finished) == before


def _other_configuration(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    content["config"]["lr"] = 0.5
    (run / "config.json").write_text(json.dumps(content))


def _flip_one_bit(run: Path) -> None:
    data = bytearray((run / "resume.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "resume.safetensors").write_bytes(data)


def _removed(run: Path) -> None:
    (run / "resume.safetensors").unlink()


def _truncated(run: Path) -> None:
    data = (run / "resume.safetensors").read_bytes()
    (run / "resume.safetensors").write_bytes(data[: len(data) // 2])


def _with(**changed: object) -> Callable[[Path], object]:
    """config.json with other values of the run's settings."""

    def spoil(run: Path) -> None:
        content = json.loads((run / "config.json").read_text())
        content["config"] |= changed
        (run / "config.json").write_text(json.dumps(content))

    return spoil


def _state_with(**changed: object) -> Callable[[Path], object]:
    """A checkpoint that is whole, and holds other values."""

    def spoil(run: Path) -> None:
        state = checkpoint.read_state(run / "resume.safetensors") | changed
        (run / "resume.safetensors").write_bytes(checkpoint.pack_state(state))

    return spoil


def _tree_of(content: object) -> Callable[[Path], object]:
    return lambda run: (run / "resume.safetensors").write_bytes(checkpoint._pack({}, content))


def _configuration_of(content: object) -> Callable[[Path], object]:
    return lambda run: (run / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_truncated, "resume.safetensors is damaged"),
        (_flip_one_bit, "resume.safetensors is damaged (its digest does not match"),
        (lambda run: (run / "resume.safetensors").write_bytes(b""), "is damaged"),
        (lambda run: (run / "resume.safetensors").write_text("hello"), "is damaged"),
        (lambda run: torch.save({"a": 1}, run / "resume.safetensors"), "is damaged"),
        (lambda run: (run / "resume.safetensors").unlink(), "cannot be read"),
        (
            lambda run: shutil.copy(run / "netG_epoch_0.safetensors", run / "resume.safetensors"),
            "is not the state of a pygan run",
        ),
        (_other_configuration, "belongs to a run with another configuration (--lr 0.0002 there"),
        (lambda run: (run / "config.json").unlink(), "holds no run to continue"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (_configuration_of([]), "was not written by pygan.train"),
        (_configuration_of({"pygan": {}, "config": {"lr": 1}, "data": {}}), "another version"),
        (_configuration_of({"pygan": [], "config": {}, "data": {}}), "was not written by"),
        (lambda run: (run / "config.json").write_text("[" * 10**5), "config.json is damaged"),
        (_with(batch_size="8"), "config.json is damaged"),
        (_with(batch_size=0), "--batch-size: 0 is out of range"),
        (_with(nz=True), "config.json is damaged"),
        (_with(augment=["blur"]), "augmentation 'blur' is not known"),
        (_with(lr=float("nan")), "--lr: nan is out of range"),
        (_with(monitor=None), "config.json is damaged"),
        (_state_with(position=-1), "is not of this version of pygan (ValueError"),
        (_state_with(position="2"), "is not of this version of pygan (ValueError"),
        (_state_with(networks={}), "is not of this version of pygan (KeyError"),
        (_state_with(sums=torch.ones(3)), "is not of this version of pygan (RuntimeError"),
        (_tree_of({"kind": checkpoint._TREE, "tree": {"dict": 3}}), "values are in no order"),
        (_tree_of({"kind": checkpoint._TREE, "tree": {"tensor": "0"}}), "values are in no order"),
        (_tree_of({"kind": checkpoint._TREE}), "values are in no order"),
        (_tree_of([]), "is not the state of a pygan run"),
    ],
)
def test_resume_from_files_that_are_not_whole(
    run: Path, spoil: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "resume.previous.safetensors").unlink()
    spoil(run)
    before = contents(run)
    assert resume(run, "--steps=9") == 2
    assert said in sentence(capsys)
    assert contents(run) == before


@pytest.mark.parametrize("spoil", [_truncated, _flip_one_bit, _removed])
def test_the_checkpoint_before_a_damaged_one_is_used(
    run: Path, spoil: Callable[[Path], object], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    before = checkpoint.read_state(run / "resume.previous.safetensors")["position"]
    assert before < checkpoint.read_state(run / "resume.safetensors")["position"]
    spoil(run)
    assert resume(run, "--steps=9") == 0
    said = capsys.readouterr().out
    assert "the run goes on from the checkpoint before it" in said
    assert resume(whole, "--steps=9") == 0
    assert weights(run) == weights(whole)
    assert numbers(run)[-1] == numbers(whole)[-1]


def test_resume_with_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "images.npy", tmp_path / "run"
    np.save(source, np.zeros((20, 16, 16), np.uint8))
    assert train(f"--data={source}", "--steps=2", f"--outf={out}") == 0
    np.save(source, np.ones((21, 16, 16), np.uint8))
    assert resume(out, "--steps=3") == 2
    said = sentence(capsys)
    assert "has changed since the run" in said
    assert "images 20 then, 21 now" in said
    assert "fingerprint" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds something else than named tensors"),
        ({"a": 1}, "holds something else than named tensors"),
        ({"main.0.weight": torch.zeros(8, 32, 4, 4)}, "but this network needs [8, 16, 4, 4]"),
        ({"other": torch.zeros(1)}, "lacks main.0.weight"),
        (Path("x"), "is damaged or holds more than weights"),
    ],
)
def test_start_weights_of_another_network(
    tmp_path: Path, content: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "netG.pth")
    flags = ("--steps=1", f"--outf={tmp_path / 'run'}", f"--netG={tmp_path / 'netG.pth'}")
    assert train(*flags) == 2
    assert said in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    original, calls = os.fsync, []

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(name)
        if "resume" in name and sum("resume" in call for call in calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "fsync", full)
        assert train("--steps=9", "--save-every=3", f"--outf={out}") == 1
    said = sentence(capsys)
    assert "No space left on device" in said
    assert f"--resume {out}" in said
    assert not list(out.glob(".*.tmp"))
    assert checkpoint.read_state(out / "resume.safetensors")["position"] == 3
    assert resume(out) == 0
    assert checkpoint.read_state(out / "resume.safetensors")["position"] == 9


def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path: Path) -> None:
    """The system itself refuses to let files grow: first the pictures, then the resume file."""
    out = tmp_path / "run"
    assert train("--steps=3", f"--outf={out}") == 0
    position = checkpoint.read_state(out / "resume.safetensors")["position"]
    size = (out / "resume.safetensors").stat().st_size
    before = contents(out)
    for limit in (size - 1, size // 8, 100):
        limits = (limit, limit)
        process = start(
            "-m", "pygan.train", "--resume", str(out), "--steps=4",
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits),
        )  # fmt: skip
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        last = errors.splitlines()[-1]
        assert last.startswith("python -m pygan.train: error: ")
        assert "File too large" in last
        assert "Traceback" not in errors
        assert checkpoint.read_state(out / "resume.safetensors")["position"] == position
        assert not list(out.glob(".*.tmp"))
    assert contents(out)["resume.safetensors"] == before["resume.safetensors"]
    assert resume(out, "--steps=4") == 0


def test_a_file_where_the_folder_should_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert train("--steps=1", f"--outf={tmp_path / 'run'}") == 2
    assert "is a file" in sentence(capsys)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    try:
        assert train("--steps=1", f"--outf={tmp_path / 'run'}") == 2
    finally:
        tmp_path.chmod(0o700)
    assert "is not writable" in sentence(capsys)


def test_a_folder_the_system_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    assert train("--steps=1", f"--outf={tmp_path / 'run'}") == 2
    assert "cannot be written (Permission denied)" in sentence(capsys)


@pytest.mark.parametrize(
    "flags", [["--lr", "nan"], ["--data", "/does/not/exist"], ["--resume", "/does/not/exist"]]
)
def test_a_real_process_prints_one_line_and_exits_with_2(flags: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pygan.train", *flags],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("python -m pygan.train: error: ")
    assert list(tmp_path.iterdir()) == []


def test_help_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(flag.split("=")[0] in out for flag in TINY)


def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path: Path) -> None:
    process = start(
        "-m", "pygan.train", *TINY, "--log-every=1", "--epochs=9", f"--outf={tmp_path / 'run'}"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in errors
    assert process.returncode == 1


def test_the_lock_outlives_nothing(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", overwrite=False):
        pass
    with RunFolder.create(tmp_path / "run", overwrite=False):
        pass


@pytest.mark.parametrize("line", ['{"step": "x"}', '{"step": null}', "[" * 10**5, "3", "[1]"])
def test_a_log_with_a_strange_line_goes_on(run: Path, line: str) -> None:
    with open(run / "log.jsonl", "a") as log:
        log.write(line + "\n")
    assert resume(run, "--steps=3") == 0
    assert [row["step"] for row in numbers(run)][-1] == 3


def test_memory_that_torch_cannot_take_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        torch.empty(2**60)
        return 0

    assert cli.run("python -m pygan.train", body) == 1
    assert "out of memory" in sentence(capsys)
    with pytest.raises(RuntimeError, match="shape"):
        cli.run("python -m pygan.train", lambda: len(torch.ones(3).view(2)))
