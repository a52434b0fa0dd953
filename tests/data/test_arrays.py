"""npy, npz and idx files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pygan import data
from pygan.errors import UserError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("stored", [np.ascontiguousarray, np.asfortranarray])
def test_every_layout_gives_the_same_images(
    tmp_path: Path, stored: Callable[[np.ndarray], np.ndarray]
) -> None:
    rgb = noise(5, 32, 32, 3)
    np.save(tmp_path / "last.npy", stored(rgb))
    np.save(tmp_path / "first.npy", stored(rgb.transpose(0, 3, 1, 2)))
    for name in ("last.npy", "first.npy"):
        images = data.load(tmp_path / name)
        np.testing.assert_array_equal(images.images, rgb)
        assert images.labels is None
    np.save(tmp_path / "flat.npy", stored(rgb[..., 0]))
    np.save(tmp_path / "one.npy", stored(rgb[..., :1]))
    np.save(tmp_path / "one_first.npy", stored(rgb[:, None, ..., 0]))
    for name in ("flat.npy", "one.npy", "one_first.npy"):
        np.testing.assert_array_equal(data.load(tmp_path / name).images, rgb[..., :1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 16, 16), 16),
        ((2, 256, 256), 256),
        ((2, 28, 28), 64),
        ((2, 32, 64), 64),
        ((2, 8, 8), 64),
    ],
)
def test_the_size_of_an_array_is_kept_where_it_can_be(
    tmp_path: Path, shape: tuple[int, ...], expected: int
) -> None:
    np.save(tmp_path / "a.npy", noise(*shape))
    assert data.load(tmp_path / "a.npy").images.shape == (2, expected, expected, 1)
    assert data.load(tmp_path / "a.npy", image_size=32).image_size == 32


def test_an_oblong_array_is_scaled_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((1, 32, 96), np.uint8)
    wide[:, :, 32:64] = 200
    np.save(tmp_path / "wide.npy", wide)
    assert (data.load(tmp_path / "wide.npy", image_size=32).images[:, :, 3:-3] == 200).all()


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels")],
)
def test_the_usual_names_in_an_npz(tmp_path: Path, images: str, labels: str) -> None:
    stacks: dict[str, Any] = {
        images: noise(4, 32, 32),
        labels: np.arange(4)[:, None],
        "x_test": noise(2, 32, 32),
    }
    np.savez_compressed(tmp_path / "a.npz", **stacks)
    read = data.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(read.images[..., 0], stacks[images])
    assert read.labels is not None and read.labels.tolist() == [0, 1, 2, 3]


def test_the_only_stack_of_an_npz(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", anything=noise(4, 32, 32), labels=np.arange(3))
    read = data.load(tmp_path / "a.npz")
    assert len(read) == 4 and read.labels is None
    assert "labels are not 4 integers" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
def test_idx_with_the_labels_beside_it(tmp_path: Path, packed: bool) -> None:
    images, labels = noise(6, 28, 28), np.arange(6, dtype=np.uint8)
    write = gzip.compress if packed else bytes
    suffix = ".gz" if packed else ""
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(write(idx(images)))
    alone = data.load(path, image_size=32)
    assert alone.images.shape == (6, 32, 32, 1) and alone.labels is None
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(write(idx(labels)))
    labelled = data.load(path, image_size=32)
    assert labelled.labels is not None and labelled.labels.tolist() == list(range(6))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(write(idx(labels[::-1])))
    reversed_labels = data.load(path, image_size=32)
    assert len({alone.fingerprint, labelled.fingerprint, reversed_labels.fingerprint}) == 3


def test_kinds_are_known_by_content_where_the_name_says_nothing(tmp_path: Path) -> None:
    images = noise(3, 32, 32)
    (tmp_path / "mystery").write_bytes(idx(images))
    np.testing.assert_array_equal(data.load(tmp_path / "mystery").images[..., 0], images)
    np.save(tmp_path / "a.npy", images)
    (tmp_path / "a.npy").rename(tmp_path / "b")
    np.testing.assert_array_equal(data.load(tmp_path / "b").images[..., 0], images)


@pytest.mark.parametrize("name", ["bomb.npz", "bomb-idx3-ubyte.gz"])
def test_what_unpacks_to_more_than_there_is_memory_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = np.zeros((64, 256, 256), np.uint8), tmp_path / name
    if name.endswith(".npz"):
        np.savez_compressed(path, images=images)
    else:
        path.write_bytes(gzip.compress(idx(images)))
    assert path.stat().st_size < images.nbytes / 100
    monkeypatch.setattr("pygan.data.memory.available", lambda: images.nbytes // 2)
    with pytest.raises(UserError, match=r"it unpacks to 4,194,\d+ bytes, and 2,097,152 are free"):
        data.load(path)
