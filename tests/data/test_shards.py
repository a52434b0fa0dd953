"""WebDataset shards: which members are samples, and what is refused."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pygan import data
from pygan.data import shards
from pygan.errors import UserError


def packed(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (20, 20), value).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size, header.type = len(content), kind
            archive.addfile(header, io.BytesIO(content))
    return path


def values(images: data.ImageSet) -> list[int]:
    return [int(v) for v in images.images[:, 0, 0, 0]]


def refused(source: Path | str, pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        data.load(source, image_size=16)
    sentence = str(caught.value)
    assert re.search(pattern, sentence), sentence
    assert "\n" not in sentence and not sentence.endswith(".")


def test_samples_are_grouped_by_key(tmp_path: Path) -> None:
    content = {
        "a/1.cls": b"3", "a/1.PNG": packed(10), "a/1.json": b"{}",
        "a/2.mask.png": packed(99), "a/2.png": packed(20), "a/2.cls": b" 1\n",
        "3.cls": b"5", "3.txt": b"a sample without an image",
        "a/._4.png": packed(98), ".5.png": packed(97), "README": b"no key",
        "6.png": packed(30), "6.cls": b"0",
    }  # fmt: skip
    images = data.load(shard(tmp_path / "a.tar", content), image_size=16)
    assert values(images) == [10, 20, 30]
    assert images.labels is not None and images.labels.tolist() == [3, 1, 0]


def test_a_folder_and_patterns_of_shards(tmp_path: Path) -> None:
    for i in range(12):
        shard(tmp_path / f"s/train-{i:03}.tar", {f"{i}.png": packed(i)})
    (tmp_path / "s/.listing").write_text("hidden")
    whole = list(range(12))
    assert values(data.load(tmp_path / "s", image_size=16)) == whole
    assert values(data.load(tmp_path / "s/*.tar", image_size=16)) == whole
    assert values(data.load(tmp_path / "s/train-{000..011}.tar", image_size=16)) == whole
    assert values(data.load(tmp_path / "s/train-{009..011}.tar", image_size=16)) == whole[9:]
    assert values(data.load(tmp_path / "s/train-00{7,1}.tar", image_size=16)) == [7, 1]
    refused(tmp_path / "s/train-{000..012}.tar", "train-012.tar' of .* is not there; restore it")
    refused(tmp_path / "s/*.zip", "no file matches .*; give a pattern of .tar shards")
    refused(tmp_path / "s/{0..9}{0..99999999}", "is not there")
    # Where a file has that name, it is no pattern.
    assert values(data.load(shard(tmp_path / "{1..9}.tar", {"1.png": packed(5)}))) == [5]


def test_more_shards_than_there_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        shard(tmp_path / f"{i}.tar", {"1.png": packed(i)})
    monkeypatch.setattr(shards, "_MOST_SHARDS", 3)
    refused(tmp_path / "{0..3}.tar", "more than 3 shards")


def test_labels_are_all_integers_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def labels(*classes: bytes | None) -> list[int] | None:
        content = {}
        for i, value in enumerate(classes):
            content |= {f"{i}.png": packed(i)} | ({} if value is None else {f"{i}.cls": value})
        found = data.load(shard(tmp_path / "a.tar", content), image_size=16).labels
        return None if found is None else found.tolist()

    assert labels(b"4", b"-1") == [4, -1]
    assert labels(None, None) is None and not caplog.text
    for wrong in (None, b"cat", b"", b"9" * 30, b"9" * 40, b"\xff"):
        caplog.clear()
        assert labels(b"4", wrong) is None
        assert "the .cls members are not one integer per image" in caplog.text


def test_a_shard_is_never_extracted(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    names = ["../evil.png", "/abs.png", "a/../../b.png", "C:\\d.png"]
    path = shard(inside / "a.tar", {name: packed(i) for i, name in enumerate(names)})
    before = sorted(tmp_path.rglob("*"))
    assert values(data.load(path, cache_dir=tmp_path / "c", image_size=16)) == [0, 1, 2, 3]
    after = sorted(p for p in tmp_path.rglob("*") if (tmp_path / "c") not in (p, *p.parents))
    assert after == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"p", b"S"])
def test_links_devices_and_sparse_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        header = tarfile.TarInfo("1.png")
        header.type, header.linkname = kind, "/etc/passwd"
        archive.addfile(header)
    refused(path, "'1.png' in the shard .*a.tar' is a link, a device or a sparse file")


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: b"", "empty"),
        (lambda whole: b"text" * 500, "invalid header|bad checksum"),
        (lambda whole: whole[:700], "'1.png' reaches beyond its end|unexpected end of data"),
        (lambda whole: whole[:1024], "breaks off at byte 1,024"),
        (lambda whole: whole[:1024] + b"?" * 512 + whole[1536:], "breaks off at byte 1,024"),
        (lambda whole: _header("1.png", 1 << 50) + whole[512:], "'1.png' reaches beyond"),
        (lambda whole: _header("1.png", -512) + whole[512:], "."),
        (lambda whole: _header("x", 1 << 40, b"x") + whole, "a header declares 1,099,5"),
        (lambda whole: _header("x", 1 << 40, b"L") + whole, "a header declares 1,099,5"),
        (lambda whole: _header("x", 0, b"x") * 3000 + whole, "."),
    ],
)
def test_broken_shards_are_named(
    tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    whole = shard(tmp_path / "a.tar", {"1.png": packed(1), "2.png": packed(2)}).read_bytes()
    (tmp_path / "s").mkdir()
    (tmp_path / "s/b.tar").write_bytes(whole)
    (tmp_path / "s/c.tar").write_bytes(change(whole))
    refused(
        tmp_path / "s", rf"the shard '.*/c.tar' is not a whole tar \(.*({reason}).*\); copy or pack"
    )


def test_compressed_and_imageless_shards(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", {"1.txt": b"text"})
    refused(whole, "a.tar' hold no images; give shards with members like 0001.jpg")
    for name in ("z/a.tar.gz", "y/a.tgz", "x/a.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(gzip.compress(whole.read_bytes()))
        for source in (tmp_path / name, (tmp_path / name).parent):
            refused(source, "is compressed; unpack it to a plain .tar")


def test_unreadable_members_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"1.png": packed(1), "2.png": b"broken", "3.png": packed(3) + bytes(5000)}
    monkeypatch.setattr("pygan.data.sources._LARGEST_MEMBER", 5000)
    images = data.load(shard(tmp_path / "a.tar", content), image_size=16)
    assert values(images) == [1]
    reasons = dict(images.skipped)
    assert reasons["2.png"] == "cannot identify image file" and "declares" in reasons["3.png"]


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "shards" / "0.tar", {"0.png": packed(1)})
    (tmp_path / "shards" / "1.tar").symlink_to(shard(tmp_path / "1.tar", {"1.png": packed(2)}))
    refused(tmp_path / "shards", r"the shard '1.tar' of .* is a link that leads out")
    found = data.load(tmp_path / "shards", image_size=16, follow_links=True)
    assert values(found) == [1, 2]
