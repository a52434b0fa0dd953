"""WebDataset shards: tar files whose members are found by their headers and read where they lie.

Members that follow each other and share a key, the name up to the first dot of its last part, are
one sample: `0001.jpg` is its image, `0001.cls` its label, an integer. Nothing is extracted, so a
name is only a name. Format: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import glob
import itertools
import logging
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pygan.data import decode
from pygan.data.image_list import ImageList
from pygan.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")  # of a shard, or of one that is still packed
_IMAGES = ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif",
           "tiff", "webp")  # fmt: skip
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LARGEST_HEADER = 1 << 20  # bytes; one that declares more is taken for a bomb
_LARGEST_LABEL = 32  # bytes
_MOST_SHARDS = 1_000_000
_BLOCK = 512  # bytes of a tar that belong together
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<suffix>[^/]+)")
_CHOICE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
log = logging.getLogger("pygan.data")


class _Place(NamedTuple):
    """Bytes of a shard."""

    shard: int
    offset: int
    size: int


def is_pattern(name: str) -> bool:
    """Whether a path that does not exist may stand for many."""
    return _CHOICE.search(name) is not None or glob.has_magic(name)


def expanded(pattern: str) -> list[Path]:
    """The shards that a pattern of `{000..012}`, `{a,b}`, `*`, `?` and `[...]` stands for.

    Raises:
        UserError: none is there, or one of those that braces name.
    """
    shards: list[Path] = []
    for name in itertools.islice(_alternatives(pattern), _MOST_SHARDS + 1):
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        for shard in found:
            if not Path(shard).is_file():
                raise UserError(
                    f"the shard {shard!r} of {pattern!r} is not there; restore it, or give a "
                    "pattern without it"
                )
            shards.append(Path(shard))
        if len(shards) > _MOST_SHARDS:
            raise UserError(
                f"{pattern!r} names more than {_MOST_SHARDS:,} shards; give a smaller range"
            )
    if not shards:
        raise UserError(f"no file matches {pattern!r}; give a pattern of .tar shards")
    return shards


def _alternatives(pattern: str) -> Iterator[str]:
    choice = _CHOICE.search(pattern)
    if choice is None:
        yield pattern
        return
    first, last, listed = choice.groups()
    words: Iterator[str]
    if listed is not None:
        words = iter(listed.split(","))
    else:
        width = len(first) if first.startswith("0") else 0
        words = (str(number).zfill(width) for number in range(int(first), int(last) + 1))
    for word in words:
        yield from _alternatives(pattern[: choice.start()] + word + pattern[choice.end() :])


def open_shards(shards: Sequence[Path], largest: int) -> ImageList:
    """The images of WebDataset shards, in the order of the shards and of their members.

    Args:
        shards: tar files.
        largest: bytes of an image; one that declares more is unreadable.

    Raises:
        UserError: one of them is no whole tar, is compressed, or holds links, devices or sparse
            files; or there is no image in any of them.
    """
    names: list[str] = []
    images, labels = array("q"), array("q")
    for number, path in enumerate(shards):
        for name, image, label in _samples(number, path):
            names.append(name)
            images.extend(image)
            labels.extend(label or _Place(-1, 0, 0))
    if not names:
        raise UserError(
            f"{str(shards[0])!r}{' and all other shards' * (len(shards) > 1)} hold no images; "
            "give shards with members like 0001.jpg and 0001.cls"
        )
    places = np.frombuffer(images, np.int64).reshape(-1, 3)

    def read(i: int, size: int) -> Image.Image:
        place = _Place(*places[i].tolist())
        if place.size > largest:
            raise ValueError(f"declares {place.size:,} bytes")
        return decode.read(BytesIO(_content(shards, place)), size)

    return ImageList(names, read, _labels(shards, np.frombuffer(labels, np.int64).reshape(-1, 3)))


def _labels(
    shards: Sequence[Path], places: np.ndarray
) -> Callable[[Sequence[int]], np.ndarray | None]:
    """Labels, if every image has one."""

    def labels(kept: Sequence[int]) -> np.ndarray | None:
        chosen = [_Place(*row) for row in places[np.asarray(kept, np.int64)].tolist()]
        missing = sum(place.shard < 0 for place in chosen)
        if missing == len(chosen):
            return None
        try:
            if missing or max(place.size for place in chosen) > _LARGEST_LABEL:
                raise ValueError
            found = [int(_content(shards, place)) for place in chosen]
            return np.array(found, np.int64)
        except (ValueError, OverflowError):
            log.warning("the .cls members are not one integer per image and are not used")
            return None

    return labels


def _content(shards: Sequence[Path], place: _Place) -> bytes:
    # Opened anew: thousands of shards are more than a process may hold open.
    with shards[place.shard].open("rb", buffering=0) as file:
        file.seek(place.offset)
        content = file.read(place.size)
    if len(content) < place.size:
        raise ValueError("its shard has become shorter")
    return content


def _samples(number: int, path: Path) -> Iterator[tuple[str, _Place, _Place | None]]:
    """(name and place of the image, place of the label) of every sample that has an image."""
    for _, members in itertools.groupby(_members(path), lambda named: named[0]):
        images: list[tuple[str, str, _Place]] = []
        label = None
        for _, suffix, member in members:
            place = _Place(number, member.offset_data, member.size)
            kind = suffix.lower().rpartition(".")[2]
            if kind in _IMAGES:
                images.append((suffix, member.name, place))
            elif kind == "cls":
                label = label or place
        if images:
            # Of 0001.depth.png and 0001.jpg the latter.
            _, name, place = min(images, key=lambda image: image[0].count("."))
            yield name, place, label


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix, header) of every file with a key in a tar."""
    try:
        with path.open("rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                raise UserError(f"the shard {str(path)!r} is compressed; unpack it to a plain .tar")
            length = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
                for member in _headers(archive):
                    if not member.isreg() or member.issparse():
                        raise UserError(
                            f"{member.name!r} in the shard {str(path)!r} is a link, a device or a "
                            "sparse file; pack only plain files"
                        )
                    if not 0 <= member.size <= length - member.offset_data:
                        raise ValueError(f"{member.name!r} reaches beyond its end")
                    name = _NAME.fullmatch(member.name)
                    if name is not None:
                        yield name["key"], name["suffix"], member
                file.seek(archive.offset)
                if file.read(_BLOCK) != bytes(_BLOCK):
                    # tarfile takes a broken header for the end.
                    raise ValueError(f"it breaks off at byte {archive.offset:,}")
    except UserError:
        raise
    except Exception as error:
        # Broken bytes make tarfile raise nearly anything.
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"the shard {str(path)!r} is not a whole tar ({reason}); copy or pack it again"
        ) from error


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        # It would keep them all.
        archive.members.clear()  # type: ignore[attr-defined]
        if not member.isdir():
            yield member


class _Headers:
    """A file of which only headers are read, for tarfile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise ValueError(f"a header declares {size:,} bytes")
        return self._file.read(size)
