"""A user's mistake is one sentence that says what was given and what to do."""

from __future__ import annotations

import gzip
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pygan import data
from pygan.errors import UserError


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def refused(source: Path | str, pattern: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        data.load(source, **options)
    sentence = str(caught.value)
    assert re.search(pattern, sentence), sentence
    assert "\n" not in sentence and not sentence.endswith(".")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "there is no data at .*missing.*accepted are a folder")
    refused("", "there is no data at ''")
    refused("cifar10", "there is no data at 'cifar10'.*fashion-mnist")
    refused("a\0b", "there is no data")
    refused("x" * 5000, "cannot be read .File name too long")


def test_empty_and_imageless_folders(tmp_path: Path) -> None:
    refused(tmp_path, "holds no files; give a folder with images")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.csv").write_text("1,2")
    refused(tmp_path, "holds no images among its 2 files")


def test_no_image_can_be_read(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"broken")
    (tmp_path / "in/b.png").write_bytes(b"broken")
    refused(tmp_path / "in", r"none of the 2 images in .*a\.png: cannot identify image file")
    assert [p for p in own_cache.iterdir() if p.suffix != ".lock"] == []


def test_files_of_another_kind(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "single.png")
    refused(tmp_path / "single.png", "of a kind that is not known; accepted are a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "neither a folder nor a file")


@pytest.mark.parametrize("content", [b"", b"not a zip at all", b"PK\x03\x04 and no more"])
def test_corrupt_zips(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    refused(tmp_path / "a.zip", "not a whole zip file .*; copy or pack it again")


def test_cut_and_empty_zips(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text" * 100)
    refused(tmp_path / "a.zip", "holds no images among its 1 files")
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[:-30])
    refused(tmp_path / "a.zip", "not a whole zip file")
    zipfile.ZipFile(tmp_path / "b.zip", "w").close()
    refused(tmp_path / "b.zip", "holds no files")


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (np.zeros((4, 32, 32), np.float32), r"float32 of shape \[4, 32, 32\]; accepted is uint8"),
        (np.zeros((4, 32, 32), np.int64), "int64"),
        (np.zeros((4, 32, 32), bool), "bool"),
        (np.zeros((32, 32), np.uint8), r"shape \[32, 32\]; accepted is"),
        (np.zeros((2, 2, 3, 32, 32), np.uint8), "accepted is"),
        (np.zeros((4, 32, 32, 4), np.uint8), "C 1 or 3"),
        (np.zeros((0, 32, 32), np.uint8), "none of them 0"),
        (np.zeros((4, 0, 32), np.uint8), "none of them 0"),
        (np.zeros((64, 64, 3), np.uint8), "can be read in two ways"),
        (np.zeros((4, 3, 32, 3), np.uint8), "can be read in two ways"),
        (np.zeros((4, 1, 1, 1), np.uint8), "can be read in two ways"),
        (np.array(7, np.uint8), "accepted is"),
    ],
)
def test_wrong_arrays(tmp_path: Path, array: np.ndarray, pattern: str) -> None:
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy", pattern)
    np.savez(tmp_path / "b.npz", images=array)
    refused(tmp_path / "b.npz", pattern)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_objects_are_never_unpickled(tmp_path: Path, suffix: str) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], object)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, trap, allow_pickle=True)
    else:
        np.savez(path, images=trap)
    refused(path, "cannot be read as an .np")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_in_disguise_is_not_loaded(tmp_path: Path) -> None:
    import pickle

    content = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be read as an .np")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("name", "whole"), [("images", "labels"), ("labels", "images")])
def test_a_member_of_an_npz_that_is_no_array(tmp_path: Path, name: str, whole: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **{whole: np.zeros((2, 8, 8), np.uint8)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", b"no array")
    refused(path, rf"cannot be read as an .npz archive \(its '{name}' is not an array")


@pytest.mark.parametrize("keep", [0, 5, 60, 4000])
def test_cut_arrays(tmp_path: Path, keep: int) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (4, 32, 32), np.uint8)
    np.save(tmp_path / "a.npy", stack)
    np.savez_compressed(tmp_path / "a.npz", images=stack)
    for name in ("a.npy", "a.npz"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:keep])
        refused(path, "cannot be read as an .np. ")


def test_an_npz_that_leaves_the_choice(tmp_path: Path) -> None:
    stack = np.zeros((4, 32, 32), np.uint8)
    np.savez(tmp_path / "a.npz", a=stack, b=stack)
    refused(tmp_path / "a.npz", r"2 arrays .*\['a', 'b'\]; call the one with the images 'images'")
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    refused(tmp_path / "a.npz", "0 arrays of three or four dimensions")


def header(kind: int, *shape: int) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "does not start like one"),
        (header(8, 4, 28, 28)[:-2], "truncated"),
        (header(8, 4, 28, 28) + bytes(4 * 28 * 28 - 1), "truncated: its header promises 3,136"),
        (header(8, 4, 28, 28) + bytes(4 * 28 * 28 + 1), "more follows"),
        (header(8, 2**32 - 1, 2**32 - 1, 2**32 - 1), "truncated"),
        (header(13, 4, 28, 28) + bytes(4 * 28 * 28 * 4), "type is 0x0d, not 0x08 for uint8"),
        (header(8, 4) + bytes(4), "holds labels, not images"),
        (header(8, 0, 28, 28), "none of them 0"),
        (header(8, 28, 28) + bytes(28 * 28), "accepted is uint8"),
    ],
)
def test_broken_idx(
    tmp_path: Path, content: bytes, pattern: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(pack(content))
    refused(tmp_path / "train-images-idx3-ubyte", pattern)


def test_cut_and_flipped_gzip(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    whole = gzip.compress(header(8, 4, 28, 28) + stack.tobytes())
    path = tmp_path / "a-idx3-ubyte.gz"
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "cannot be read as an idx file .*end-of-stream")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    refused(path, "cannot be read as an idx file")


@pytest.mark.parametrize("size", [0, -64, 8, 48, 63, 512, 1 << 40])
@pytest.mark.parametrize("source", ["fashion-mnist", "fake"])
def test_image_sizes_that_no_model_has(source: str, size: int) -> None:
    refused(source, f"image size of {size} is not accepted; choose 16, 32", image_size=size)


def test_other_arguments_out_of_range() -> None:
    refused("fake", "2 channels are not accepted; choose 1 for grey or 3", channels=2)
    refused("fake", "0 workers .* choose at least 1", workers=0)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(os, "scandir", denied)
    refused(tmp_path, "cannot be read .Permission denied.; make it readable")


def test_no_warning_reaches_the_user_of_a_good_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "in/a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.load(tmp_path / "in")) == 1
