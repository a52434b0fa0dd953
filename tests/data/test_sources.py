"""Folders and zips: what is taken for an image, in which order, with which label."""

from __future__ import annotations

import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pygan import data
from pygan.data import decode
from pygan.errors import UserError, printable


def picture(path: Path, value: int, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), value if mode == "L" else (value, 0, 0)).save(path)


def packed(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (20, 20), value).save(stream, "PNG")
    return stream.getvalue()


def values(images: data.ImageSet) -> list[int]:
    return [int(v) for v in images.images[:, 0, 0, 0]]


def test_a_folder_is_searched_in_order_of_names(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    names = ["b.png", "a/z.ppm", "a/deep/er/x.bmp", "c.JPG", "d.tif", "e.gif"]
    for i, name in enumerate(names):
        picture(root / name, i * 20)
    picture(root / "name without suffix.png", 200)
    (root / "name without suffix.png").rename(root / "unnamed")
    picture(root / ".hidden.png", 250)
    picture(root / ".thumbnails/t.png", 251)
    (root / "notes.txt").write_text("not an image, and not reported as one")
    images = data.load(root, image_size=16)
    assert images.images.shape == (7, 16, 16, 1) and isinstance(images.images, np.memmap)
    assert values(images) == [40, 20, 0, 60, 80, 100, 200]
    assert images.labels is None and images.skipped == ()
    assert images.name == str(root)


def test_first_level_folders_are_labels_if_they_hold_everything(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name, value in {"dog/1.png": 1, "cat/x/1.png": 2, "cat/y/2.png": 3, "emu/1.png": 4}.items():
        picture(root / name, value)
    labels = data.load(root, image_size=16).labels
    assert labels is not None and labels.dtype == np.int64
    assert labels.tolist() == [0, 0, 1, 2]
    again = data.load(root, image_size=16).labels
    assert again is not None and again.dtype == np.int64 and again.tolist() == [0, 0, 1, 2]
    (root / "dog/0.png").write_bytes(b"broken")
    labels = data.load(root, image_size=16).labels
    assert labels is not None and labels.tolist() == [0, 0, 1, 2]
    (root / "fox").mkdir()
    assert data.load(root, image_size=16).labels is None
    (root / "fox").rmdir()
    picture(root / "stray.png", 5)
    assert data.load(root, image_size=16).labels is None


def test_channels_follow_the_images(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for i in range(40):
        picture(root / f"{i:02}.png", i)
    Image.new("RGB", (20, 20), (7, 7, 7)).save(root / "39.png")
    assert data.load(root, image_size=16).channels == 1
    forced = data.load(root, image_size=16, channels=3)
    assert forced.images.shape == (40, 16, 16, 3)
    assert (forced.images == forced.images[..., :1]).all()
    # The last of all makes everything before it RGB, with the values it had.
    picture(root / "99.png", 200, "RGB")
    mixed = data.load(root, image_size=16)
    np.testing.assert_array_equal(mixed.images[:40], forced.images)
    assert (mixed.images[40] == (200, 0, 0)).all()
    assert data.load(root, image_size=16, channels=1).images.shape == (41, 16, 16, 1)


def test_sixty_four_pixels_where_nothing_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "photos/a.png", 0)
    assert data.load(tmp_path / "photos").image_size == 64


def test_links_are_followed_within_the_folder_but_not_in_circles(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    picture(root / "b.png", 2)
    picture(root / "deep/d.png", 3)
    picture(root / ".store/e.png", 4)
    os.symlink("deep", root / "again")
    os.symlink("../.store/e.png", root / "deep/e.png")
    os.symlink(root, root / "circle")
    os.symlink("../..", root / "deep/up")
    os.symlink("itself.png", root / "itself.png")
    os.symlink("b.png/below.png", root / "below.png")
    os.symlink(tmp_path / "missing.png", root / "c.png")
    os.symlink(root, tmp_path / "given")
    for given in (root, tmp_path / "given"):
        images = data.load(given, image_size=16)
        assert values(images) == [3, 4, 2, 3, 4]
        assert [name for name, _ in images.skipped] == ["again/up", "deep/up"]
    os.unlink(root / "deep/up")
    images = data.load(root, image_size=16)
    assert values(images) == [3, 4, 2, 3, 4] and images.skipped == ()


def test_links_out_of_the_folder_are_unreadable_unless_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "photos"
    picture(tmp_path / "elsewhere/a.png", 1)
    # One whose path begins alike is another folder.
    picture(tmp_path / "photos2/f.png", 5)
    picture(root / "cat/b.png", 2)
    os.symlink(tmp_path / "elsewhere", root / "dog")
    os.symlink("../../photos2/f.png", root / "cat/f.png")
    os.symlink("f.png", root / "cat/g.png")
    # Out and in again is in.
    os.symlink(root / "cat/b.png", tmp_path / "elsewhere/back.png")
    os.symlink(tmp_path / "elsewhere/back.png", root / "cat/back.png")
    for _ in range(2):
        images = data.load(root, image_size=16)
        assert values(images) == [2, 2]
        assert images.labels is not None and images.labels.tolist() == [0, 0]
        assert [name for name, _ in images.skipped] == ["cat/f.png", "cat/g.png", "dog"]
        assert all("--follow-links" in reason for _, reason in images.skipped)
        # Neither is found in the cache of the other.
        followed = data.load(root, image_size=16, follow_links=True)
        assert values(followed) == [2, 2, 5, 5, 1, 2] and followed.skipped == ()
    assert "skipped 3 unreadable images" in caplog.text
    assert "skipped dog: is a link that leads out of the folder; copy what it" in caplog.text
    # What is linked to may come to lie in the folder.
    os.unlink(root / "dog")
    (tmp_path / "elsewhere").rename(root / "emu")
    os.symlink("emu", root / "dog")
    assert values(data.load(root, image_size=16)) == [2, 1, 2, 1, 2]


def test_a_folder_of_nothing_but_links_out_of_it(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/a.png", 1)
    (tmp_path / "photos/class").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere/a.png", tmp_path / "photos/class/a.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos/z")
    with pytest.raises(UserError, match=r"2 links that lead out of it \(the first: class/a.png\)"):
        data.load(tmp_path / "photos")
    assert values(data.load(tmp_path / "photos", follow_links=True)) == [1, 1]


def test_unreadable_images_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "photos"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    for i in range(70):
        picture(root / f"{i:02}.png", i)
    Image.fromarray(noise).save(root / "10.png")
    whole = (root / "10.png").read_bytes()
    (root / "10.png").write_bytes(whole[: len(whole) // 2])
    (root / "40.png").write_bytes(b"")
    (root / "69.png").write_text("<html>404</html>")
    images = data.load(root, image_size=16, workers=2)
    assert values(images) == [i for i in range(70) if i not in (10, 40, 69)]
    assert [name for name, _ in images.skipped] == ["10.png", "40.png", "69.png"]
    assert "truncated" in images.skipped[0][1]
    assert all(reason == "cannot identify image file" for _, reason in images.skipped[1:])
    assert "skipped 3 unreadable images" in caplog.text
    assert all(f"skipped {name}: " in caplog.text for name, _ in images.skipped)
    caplog.clear()
    assert data.load(root, image_size=16).skipped == images.skipped
    assert "3 unreadable images are left out" in caplog.text


def test_a_decompression_bomb_is_an_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "photos/a.png", 1)
    Image.new("1", (400, 400)).save(tmp_path / "photos/bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 400 // 2 - 1)
    images = data.load(tmp_path / "photos")
    assert len(images) == 1
    assert [name for name, _ in images.skipped] == ["bomb.png"]
    assert "decompression bomb" in images.skipped[0][1]


def test_a_name_that_is_not_text_can_be_reported(tmp_path: Path) -> None:
    picture(tmp_path / "photos/a.png", 1)
    Path(os.fsdecode(os.fsencode(tmp_path / "photos") + b"/b\xff.png")).write_bytes(b"broken")
    for _ in range(2):
        skipped = data.load(tmp_path / "photos").skipped
        assert [name.encode() for name, _ in skipped] == [b"b\\udcff.png"]


def test_a_zip_is_read_like_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("top/", "")
        archive.writestr("top/dog/2.png", packed(30))
        archive.writestr("top/cat/1.png", packed(20))
        archive.writestr("top/dog/1.png", b"broken")
        archive.writestr("top/readme.txt", "not an image")
        archive.writestr("__MACOSX/top/cat/1.png", b"resource fork")
        archive.writestr("top/.cache/1.png", packed(40))
    images = data.load(tmp_path / "photos.zip", image_size=16)
    assert values(images) == [20, 30]
    assert images.labels is not None and images.labels.tolist() == [0, 1]
    assert images.skipped == (("top/dog/1.png", "cannot identify image file"),)


def test_a_zip_is_never_extracted(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ["../evil.png", "/abs.png", "a/../../b.png", "C:\\d.png"]
    with zipfile.ZipFile(inside / "tricks.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(zipfile.ZipInfo(name), packed(i))
    before = sorted(p for p in tmp_path.rglob("*"))
    images = data.load(inside / "tricks.zip", cache_dir=tmp_path / "c", image_size=16)
    assert sorted(values(images)) == [0, 1, 2, 3]
    after = sorted(p for p in tmp_path.rglob("*") if (tmp_path / "c") not in (p, *p.parents))
    assert after == before


def test_broken_members_of_a_zip_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.png", packed(5))
        archive.writestr("flipped.png", packed(6))
        archive.writestr("large.png", packed(7) + bytes(5000))
    content = bytearray(path.read_bytes())
    content[content.index(packed(6)) + 30] ^= 255
    path.write_bytes(content)
    monkeypatch.setattr("pygan.data.sources._LARGEST_MEMBER", 5000)
    images = data.load(path, image_size=16)
    assert values(images) == [5]
    reasons = dict(images.skipped)
    assert "Bad CRC-32" in reasons["flipped.png"] and "declares" in reasons["large.png"]


def test_a_member_that_lost_its_name_is_one_among_others(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", packed(0))
        archive.writestr("1.png", packed(1))
    path.write_bytes(path.read_bytes().replace(b"1.png", b"\0.png"))
    images = data.load(path, cache_dir=tmp_path / "c", image_size=16)
    assert len(images) == 2


@pytest.mark.parametrize("packed_in_zip", [False, True])
def test_of_large_images_one_is_decoded_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed_in_zip: bool
) -> None:
    source, inside, most = tmp_path / "photos", 0, 0
    for i in range(80):
        picture(source / f"{i:02}.png", i)
    if packed_in_zip:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in sorted(source.iterdir()):
                archive.write(path, path.name)
        source = tmp_path / "photos.zip"
    convert = decode._to_eight_bits

    def noted(image: Image.Image) -> Image.Image:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        try:
            return convert(image)
        finally:
            inside -= 1

    monkeypatch.setattr(decode, "_to_eight_bits", noted)
    assert values(data.load(source, image_size=16, workers=4)) == list(range(80))
    assert most > 1
    most = 0
    monkeypatch.setattr(decode, "_LARGE", 20 * 20 * 4 - 1)
    assert values(data.load(source, image_size=32, workers=4)) == list(range(80))
    assert most == 1


def test_progress_can_be_silenced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "photos/a.png", 1)
    data.load(tmp_path / "photos", progress=False)
    assert capfd.readouterr().err == ""


def test_a_name_with_a_line_break_stays_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\n/1.png", b"no image")
    with pytest.raises(UserError, match="none of the 1 images") as raised:
        data.load(str(path), image_size=16)
    assert "\n" not in str(raised.value)
    assert printable("a b\u3000é\n\u2028\udc80.png") == "a b\u3000é\\n\\u2028\\udc80.png"
