"""Streams: the documented order, two windows at most, and others in place of unreadable images."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import tarfile
import threading
import time
import weakref
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pygan import data
from pygan.data import StreamOrder, Windows, build
from pygan.data import streaming as streams
from pygan.errors import UserError

COUNT, BATCH = 60, 4


def picture(value: int) -> bytes:
    """A whole image of one grey."""
    stream = io.BytesIO()
    Image.new("L", (20, 20), value).save(stream, "PNG")
    return stream.getvalue()


def folder(path: Path, broken: set[int] | None = None) -> Path:
    """Images 0..59, of as much grey; the broken ones cannot be read."""
    path.mkdir()
    for i in range(COUNT):
        whole = picture(i)
        (path / f"{i:02}.png").write_bytes(whole[:40] if i in (broken or ()) else whole)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 12 images, made of blocks of 3."""
    monkeypatch.setattr(streams, "WINDOW_IMAGES", 12)
    monkeypatch.setattr("pygan.data.order.BLOCK", 3)
    monkeypatch.setattr(streams, "_CHUNK", 2)


def windows_of(stream: data.ImageStream, part: slice | None = None) -> Windows:
    return Windows(stream, StreamOrder(len(stream), BATCH, 0, stream.window), part)


def values(batch: np.ndarray) -> list[int]:
    assert batch.dtype == np.uint8 and batch.shape[1:] == (16, 16, 1)
    return [int(v) for v in batch[:, 5, 5, 0]]


def shown(stream: data.ImageStream, steps: range, part: slice | None = None) -> list[list[int]]:
    with closing(windows_of(stream, part)) as windows:
        return [values(windows.batch(step)) for step in steps]


def _zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for i in range(COUNT):
            archive.writestr(f"{i:02}.png", picture(i))
    return path / "a.zip"


def _tar(path: Path) -> Path:
    for shard in range(3):
        with tarfile.open(path / f"{shard}.tar", "w") as archive:
            for i in range(shard * 20, shard * 20 + 20):
                header = tarfile.TarInfo(f"{i:02}.png")
                header.size = len(picture(i))
                archive.addfile(header, io.BytesIO(picture(i)))
    return path / "{0..2}.tar"


def _npy(path: Path) -> Path:
    np.save(path / "a.npy", np.repeat(np.arange(COUNT, dtype=np.uint8), 256).reshape(-1, 16, 16))
    return path / "a.npy"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("source", [lambda path: folder(path / "a"), _zip, _tar, _npy])
def test_batches_come_in_the_order_of_the_stream(
    tmp_path: Path, own_cache: Path, source: Callable[[Path], Path]
) -> None:
    stream = data.stream(source(tmp_path), image_size=16)
    assert (len(stream), stream.image_size, stream.channels, stream.window) == (COUNT, 16, 1, 12)
    order = StreamOrder(COUNT, BATCH, 0, 12)
    expected = [order.index(step).tolist() for step in range(40)]
    assert shown(stream, range(40)) == expected
    # From the middle of a window, and back to where no window is ready.
    assert shown(stream, range(16, 40)) == expected[16:]
    with closing(windows_of(stream)) as windows:
        for step in (0, 1, 30, 2, 17, 14, 15):
            assert values(windows.batch(step)) == expected[step]
    assert not own_cache.exists()


@pytest.mark.usefixtures("small")
def test_two_windows_are_in_memory_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = data.stream(folder(tmp_path / "a"), image_size=16)
    alive: weakref.WeakSet[streams._Window] = weakref.WeakSet()
    started, most = 0, 0
    original = streams._Window.__init__

    def counted(self: streams._Window, *arguments: object) -> None:
        nonlocal started, most
        gc.collect()
        alive.add(self)
        started, most = started + 1, max(most, len(alive))
        original(self, *arguments)  # type: ignore[arg-type]
        assert self.images.nbytes <= 12 * 16 * 16

    monkeypatch.setattr(streams._Window, "__init__", counted)
    shown(stream, range(30))
    # One ahead of the ten that were shown.
    assert (started, most) == (11, 2)
    with closing(windows_of(stream)) as windows:
        for step in (0, 20, 3, 40):
            windows.batch(step)
    assert most == 2


def test_the_next_window_is_decoded_while_one_is_in_use(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = data.stream(folder(tmp_path / "a"), image_size=16)
    decoded: list[int] = []
    original = build.decode_one

    def noted(job: build.Job, i: int) -> object:
        decoded.append(i)
        return original(job, i)

    monkeypatch.setattr(streams, "decode_one", noted)
    order = StreamOrder(COUNT, BATCH, 0, 12)
    with closing(windows_of(stream)) as windows:
        windows.batch(0)
        until = time.monotonic() + 10
        while len(decoded) < 24 and time.monotonic() < until:
            time.sleep(0.01)
        ahead = np.concatenate([order.window(0), order.window(1)]).tolist()
        assert sorted(decoded) == sorted(ahead)


@pytest.mark.usefixtures("small")
def test_another_image_takes_the_place_of_an_unreadable_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {0, 1, 2, 17, 33, 59}
    stream = data.stream(folder(tmp_path / "a", broken), image_size=16)
    order = StreamOrder(COUNT, BATCH, 0, 12)
    expected: list[list[int]] = []
    for number in range(10):
        window = order.window(number).tolist()
        filled = [
            next(i for i in window[at:] + window[:at] if i not in broken)
            for at in range(len(window))
        ]
        expected += [filled[first : first + BATCH] for first in range(0, 12, BATCH)]
    with closing(windows_of(stream)) as windows:
        shown_now = [values(windows.batch(step)) for step in range(30)]
        assert shown_now == expected
        assert windows.replaced == 2 * len(broken)
    lines = [record.message for record in caplog.records]
    assert sorted(lines) == [
        f"{i:02}.png is replaced by another image: cannot identify image file"
        for i in sorted(broken)
    ]
    # Two that share each batch show the same, though neither decodes what the other shows.
    halves = [shown(stream, range(30), part) for part in (slice(0, 2), slice(2, 4))]
    assert [one + other for one, other in zip(*halves, strict=True)] == expected


@pytest.mark.usefixtures("small")
def test_a_part_of_each_batch_is_all_that_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = data.stream(folder(tmp_path / "a"), image_size=16)
    whole = shown(stream, range(15))
    decoded: set[int] = set()
    original = build.decode_one

    def noted(job: build.Job, i: int) -> object:
        decoded.add(i)
        return original(job, i)

    monkeypatch.setattr(streams, "decode_one", noted)
    assert shown(stream, range(15), slice(1, 2)) == [batch[1:2] for batch in whole]
    # And of the window of the next epoch, which was begun.
    first = {batch[1] for batch in whole}
    assert first <= decoded and len(decoded) <= len(first) + 3


@pytest.mark.usefixtures("small")
def test_a_window_without_any_readable_image(tmp_path: Path) -> None:
    window = set(StreamOrder(COUNT, BATCH, 0, 12).window(1).tolist())
    stream = data.stream(folder(tmp_path / "a", window), image_size=16)
    for part in (None, slice(0, 1)):
        with closing(windows_of(stream, part)) as windows:
            windows.batch(2)
            with pytest.raises(UserError, match=r"none of \d+ images of .*\d\d.png: cannot ident"):
                windows.batch(3)
            # What follows is not lost.
            assert set(values(windows.batch(6))).isdisjoint(window)


@pytest.mark.usefixtures("small")
def test_what_a_thread_meets_surfaces_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = data.stream(folder(tmp_path / "a"), image_size=16)
    culprit = int(StreamOrder(COUNT, BATCH, 0, 12).window(1)[5])
    original = build.decode_one

    def failing(job: build.Job, i: int) -> object:
        if i == culprit:
            raise KeyError("a fault of the program")
        return original(job, i)

    monkeypatch.setattr(streams, "decode_one", failing)
    with closing(windows_of(stream)) as windows:
        windows.batch(2)
        with pytest.raises(KeyError, match="a fault of the program"):
            windows.batch(3)


def _threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("pygan-stream")]


def test_closing_ends_the_threads(tmp_path: Path) -> None:
    stream = data.stream(folder(tmp_path / "a"), image_size=16)
    assert _threads() == []
    windows = windows_of(stream)
    windows.batch(0)
    assert _threads() != []
    windows.close()
    windows.close()
    assert _threads() == []
    windows.batch(1)
    windows.close()
    assert _threads() == []


def test_a_program_that_forgets_to_close_ends(tmp_path: Path) -> None:
    script = (
        "from pygan import data; s = data.stream('fake', image_size=16);"
        "w = data.Windows(s, data.StreamOrder(len(s), 8, 0, 64)); w.batch(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_what_is_listed(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    (path / "notes.txt").write_text("text")
    (path / "no suffix").write_bytes(picture(9))
    for value in ("cat", "dog"):
        (path / value).mkdir()
        (path / value / "1.JPG").write_bytes(picture(8))
    stream = data.stream(path, image_size=16)
    assert len(stream) == COUNT + 3
    assert len(stream.gather(np.arange(len(stream)))) == COUNT + 3
    for value in ("b", "c"):
        (tmp_path / value).mkdir()
    (tmp_path / "b/a.txt").write_text("text")
    (tmp_path / "c/a.png").write_text("text")
    with pytest.raises(UserError, match="holds no images; give a source with images"):
        data.stream(tmp_path / "b")
    with pytest.raises(UserError, match=r"none of 1 images of .*a.png: cannot identify"):
        data.stream(tmp_path / "c")


def test_channels_are_those_of_images_out_of_the_whole_set(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    assert data.stream(path, image_size=16).channels == 1
    assert data.stream(path, image_size=16, channels=3).gather(np.arange(2)).shape[3] == 3
    Image.new("RGB", (20, 20), (200, 0, 0)).save(path / "30.png")
    stream = data.stream(path, image_size=16)
    assert stream.channels == 3
    assert stream.gather(np.array([30]))[0, 0, 0].tolist() == [200, 0, 0]


def test_a_sample_is_what_load_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    for i in range(40):
        (path / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (path / "ab"[i % 2] / f"{i:02}.png").write_bytes(picture(i) if i else b"broken")
    stream, loaded = data.stream(path, image_size=16), data.load(path, image_size=16)
    sample = stream.sample()
    assert sample.fingerprint == loaded.fingerprint
    assert loaded.sample() is loaded
    np.testing.assert_array_equal(loaded.gather(np.array([3, 1])), loaded.images[[3, 1]])
    monkeypatch.setattr(streams, "WINDOW_IMAGES", 8)
    few = stream.sample()
    assert 7 <= len(few) <= 8 and few.labels is not None and len(few.labels) == len(few)
    assert few.fingerprint == data.stream(path, image_size=16).sample().fingerprint


def test_windows_are_bounded_in_bytes() -> None:
    images = data.stream("fake", image_size=256)
    assert images.window == 1365 and images.window * 256 * 256 * 3 <= 256 << 20
    assert data.stream("fashion-mnist").window == 8192


def test_the_fingerprint_is_of_names_sizes_and_times(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    before = data.stream(path, image_size=16).fingerprint
    path.rename(tmp_path / "elsewhere")
    path = tmp_path / "elsewhere"
    assert data.stream(path, image_size=16).fingerprint == before
    (path / "07.png").write_bytes(picture(8))
    after = data.stream(path, image_size=16).fingerprint
    assert after != before
    (path / "08.png").unlink()
    assert data.stream(path, image_size=16).fingerprint not in (before, after)
