"""A second start decodes nothing, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pygan import data
from pygan.data import build
from pygan.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i:02}.bmp")
    return folder


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Index of every image that is decoded from now on."""
    seen: list[int] = []
    decode = build.decode_one

    def counted(job: build.Job, i: int) -> Any:
        seen.append(i)
        return decode(job, i)

    monkeypatch.setattr(build, "decode_one", counted)
    return seen


def reds(images: data.ImageSet) -> list[int]:
    return [int(v) for v in images.images[:, 0, 0, 0]]


def test_the_second_start_decodes_nothing(photos: Path, decodes: list[int]) -> None:
    first = data.load(photos, image_size=16)
    assert len(decodes) == 12
    second = data.load(photos, image_size=16)
    assert len(decodes) == 12
    assert isinstance(second.images, np.memmap) and not second.images.flags.writeable
    np.testing.assert_array_equal(second.images, first.images)
    assert second.fingerprint == first.fingerprint
    data.load(photos, image_size=32)
    data.load(photos, image_size=16, channels=1)
    assert len(decodes) == 36


def test_a_changed_folder_is_decoded_again(photos: Path, decodes: list[int]) -> None:
    first = data.load(photos, image_size=16)
    (photos / "00.bmp").unlink()
    assert reds(data.load(photos, image_size=16)) == list(range(1, 12))
    Image.new("RGB", (20, 20), (99, 0, 0)).save(photos / "zz.bmp")
    assert reds(data.load(photos, image_size=16)) == [*range(1, 12), 99]
    (photos / "zz.bmp").rename(photos / "00.bmp")
    renamed = data.load(photos, image_size=16)
    assert reds(renamed) == [99, *range(1, 12)]
    assert len(decodes) == 12 + 11 + 12 + 12
    assert renamed.fingerprint != first.fingerprint


def test_a_file_rewritten_with_its_size_and_time_put_back_is_seen(photos: Path) -> None:
    before = (photos / "03.bmp").stat()
    data.load(photos, image_size=16)
    time.sleep(0.05)  # more than one tick of the file system's clock
    Image.new("RGB", (20, 20), (77, 0, 0)).save(photos / "03.bmp")
    os.utime(photos / "03.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (photos / "03.bmp").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert reds(data.load(photos, image_size=16))[3] == 77


def test_equal_content_has_one_fingerprint_and_one_file(
    photos: Path, tmp_path: Path, own_cache: Path
) -> None:
    first = data.load(photos, image_size=16)
    np.save(tmp_path / "same.npy", np.asarray(first.images))
    assert data.load(tmp_path / "same.npy").fingerprint == first.fingerprint
    assert len(list(own_cache.glob("*.images"))) == 1


def test_a_second_start_with_ten_thousand_files_takes_under_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(10_000):
        (folder / f"{i:05}.jpg").touch()
    pixels = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(build, "decode_one", lambda job, i: pixels)  # what is timed decodes nothing
    data.load(folder, channels=3)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        images = data.load(folder, channels=3)
        seconds.append(time.perf_counter() - start)
    assert len(images) == 10_000
    assert min(seconds) < 1


@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone", "index", "shape", "labels"])
def test_a_damaged_entry_is_made_again(
    photos: Path, own_cache: Path, decodes: list[int], damage: str
) -> None:
    first = data.load(photos, image_size=16)
    expected = np.array(first.images)
    (pixels,) = own_cache.glob("*.images")
    (index,) = own_cache.glob("*.json")
    if damage == "cut":
        os.truncate(pixels, pixels.stat().st_size - 1)
    elif damage == "zeroed":
        pixels.write_bytes(bytes(pixels.stat().st_size))
    elif damage == "gone":
        pixels.unlink()
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-20])
    elif damage == "shape":
        index.write_text(index.read_text().replace('"shape": [', f'"shape": [0.5, {10**400}, '))
    else:
        index.write_text(index.read_text().replace('"labels": null', '"labels": [1, 2]'))
    again = data.load(photos, image_size=16)
    assert len(decodes) == 24
    np.testing.assert_array_equal(again.images, expected)
    assert again.labels is None and again.fingerprint == first.fingerprint
    data.load(photos, image_size=16)
    assert len(decodes) == 24


def test_damage_in_the_middle_of_a_large_entry_is_seen(tmp_path: Path, own_cache: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (700, 256, 256), np.uint8)
    np.save(tmp_path / "large.npy", stack)
    data.load(tmp_path / "large.npy")
    (pixels,) = own_cache.glob("*.images")
    assert pixels.stat().st_size > 33 << 20  # larger than what is checked at every start
    with pixels.open("r+b") as file:
        file.seek(20 << 20)
        file.write(bytes(1 << 20))
    np.testing.assert_array_equal(data.load(tmp_path / "large.npy").images[..., 0], stack)


def test_reasons_that_may_pass_are_not_remembered(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = build.decode.read

    def failing(stream: Any, size: int) -> Any:
        if stream.name.endswith("05.bmp"):
            raise OSError(errno.EIO, "Input/output error")
        return decode(stream, size)

    with monkeypatch.context() as patch:
        patch.setattr(build.decode, "read", failing)
        assert len(data.load(photos, image_size=16)) == 11
    assert len(data.load(photos, image_size=16)) == 12


def test_another_pillow_tries_unreadable_images_again(
    photos: Path, decodes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "05.bmp").write_bytes(b"a format of the future")
    data.load(photos, image_size=16)
    data.load(photos, image_size=16)
    assert len(decodes) == 12
    monkeypatch.setattr("PIL.__version__", "99")
    data.load(photos, image_size=16)
    assert len(decodes) == 24


def test_a_cache_that_cannot_be_written_is_replaced_by_memory(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = data.load(photos, image_size=16)
    (tmp_path / "file").write_text("in the way of a folder")
    images = data.load(photos, image_size=16, cache_dir=tmp_path / "file")
    assert "kept in memory" in caplog.text and "Not a directory" in caplog.text
    assert not isinstance(images.images, np.memmap) and not images.images.flags.writeable
    np.testing.assert_array_equal(images.images, expected.images)
    assert images.fingerprint == expected.fingerprint


def test_a_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes that really fail: no file may grow beyond half of the result."""
    resource = pytest.importorskip("resource")
    stack = np.random.default_rng(0).integers(0, 256, (50, 256, 256), np.uint8)
    np.save(tmp_path / "a.npy", stack)
    expected = data.load(tmp_path / "a.npy").fingerprint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (stack.size // 2, limits[1]))
    try:
        images = data.load(tmp_path / "a.npy", cache_dir=tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert images.fingerprint == expected
    assert [p for p in (tmp_path / "full/data").iterdir() if p.suffix != ".lock"] == []
    assert "kept in memory" in caplog.text and "File too large" in caplog.text


def test_neither_disk_nor_memory_is_one_sentence(
    photos: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, decodes: list[int]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 12 * 16 * 16 - 1))
    monkeypatch.setattr("pygan.data.memory.available", lambda: 12 * 16 * 16 * 3 - 1)
    with pytest.raises(UserError, match=r"12 images of 16 x 16 fit neither .* smaller image size"):
        data.load(photos, image_size=16)
    assert decodes == [] and not list(own_cache.glob("partial-*"))
    monkeypatch.setattr("pygan.data.memory.available", lambda: 12 * 16 * 16 * 3)
    assert len(data.load(photos, image_size=16)) == 12


def test_what_a_killed_process_left_is_removed(photos: Path, own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    old, new = own_cache / "partial-old", own_cache / "partial-new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 4000,) * 2)
    data.load(photos, image_size=16)
    assert not old.exists() and new.exists()


def test_an_interrupted_build_leaves_nothing(
    photos: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build.PixelWriter, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load(photos, image_size=16)
    assert [p for p in own_cache.iterdir() if p.suffix != ".lock"] == []
    assert len(data.load(photos, image_size=16)) == 12


def test_two_processes_share_one_build(photos: Path, own_cache: Path) -> None:
    code = f"""
        import time
        from pygan import data
        from pygan.data import build
        decode = build.decode_one
        def slow(job, i):
            time.sleep(0.05)
            print("decoded", flush=True)
            return decode(job, i)
        build.decode_one = slow
        print(data.load({str(photos)!r}, image_size=16, workers=1).fingerprint)
        """
    children = [start_child(code) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(output.count("decoded") for output in outputs) == [0, 12]
    assert outputs[0][-1] == outputs[1][-1] == data.load(photos, image_size=16).fingerprint


def test_without_locks_two_builds_are_only_wasteful(
    photos: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, decodes: list[int]
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    append = build.PixelWriter.append
    inner: list[data.ImageSet] = []

    def another_finishes_first(writer: build.PixelWriter, image: np.ndarray) -> None:
        monkeypatch.setattr(build.PixelWriter, "append", append)
        inner.append(data.load(photos, image_size=16))
        append(writer, image)

    monkeypatch.setattr(build.PixelWriter, "append", another_finishes_first)
    outer = data.load(photos, image_size=16)
    assert len(decodes) == 24
    np.testing.assert_array_equal(outer.images, inner[0].images)
    assert sorted(p.suffix for p in own_cache.iterdir()) == [".images", ".json"]


def test_where_the_cache_is(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for variable, folder in {
        "PYGAN_CACHE": tmp_path / "own-cache",
        "XDG_CACHE_HOME": tmp_path / "xdg/pygan",
        "HOME": tmp_path / "home/.cache/pygan",
    }.items():
        assert not folder.exists()
        data.load(photos, image_size=16)
        assert folder.is_dir()
        monkeypatch.delenv(variable)


def start_child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
