"""What can be given as data: files, folders and datasets, found and opened, not decoded."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pygan.data import arrays, decode, hub, shards
from pygan.data.image_list import ImageList
from pygan.errors import UserError

ACCEPTED = (
    "accepted are a folder of images, a .zip of images, WebDataset shards (.tar, a folder or a "
    "pattern of them), a Hugging Face dataset (its folder, or hf:NAME[:SPLIT]), a uint8 .npy or "
    ".npz array, an idx file (also .gz), fashion-mnist and fake"
)
_LARGEST_MEMBER = 1 << 30  # bytes; an image in a zip or tar that declares more is taken for a bomb
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_LEADS_OUT = (
    "is a link that leads out of the folder; copy what it leads to into the folder, or ask for it "
    "with --follow-links (follow_links=True)"
)


@dataclass(frozen=True)
class Source:
    """A source that has been found.

    Attributes:
        name: as it was given.
        stamp: hex digest that is cheap to compute and changes when a file is added, removed,
            renamed or written: paths, sizes, and times of last write and of last status change; and
            which links are left out.
            The latter also moves when a file is rewritten in place and its size and time of last
            write are put back. Not seen: a second write within one tick of the file system's clock.
        listing: hex digest of the names, sizes and times of last write alone: that of a copy which
            keeps them is the same, wherever it lies.
        open: reads as much as is needed to list the images; raises UserError for broken files.
    """

    name: str
    stamp: str
    listing: str
    open: Callable[[], ImageList]


def find(given: str | os.PathLike[str], *, follow_links: bool = False) -> Source:
    """What `given` names; UserError if nothing is there or its kind is not known.

    Links that lead out of a folder are followed or else among its unreadable images.
    """
    name = os.fspath(given)
    if name.startswith(hub.PREFIX):
        return _dataset(name, *hub.split_name(name))
    path = Path(name).expanduser()
    try:
        if not name or not path.exists():
            if shards.is_pattern(name):
                return _shards(name, shards.expanded(str(path)))
            raise UserError(f"there is no data at {name!r}; {ACCEPTED}")
        if path.is_dir():
            if hub.is_saved(path):
                return _dataset(name, str(path), None)
            return _folder(name, path, follow_links)
        if not path.is_file():
            raise UserError(f"{name!r} is neither a folder nor a file; {ACCEPTED}")
        reader = _reader(name, path)
        return _files(name, [path, *arrays.label_files(path)], lambda: reader(path))
    except OSError as error:
        culprit = error.filename or name
        raise UserError(
            f"{str(culprit)!r} cannot be read ({error.strerror}); make it readable or leave it out"
        ) from error


def _files(name: str, paths: Sequence[Path], read: Callable[[], ImageList]) -> Source:
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    found = [_Entry(str(path.absolute().relative_to(root)), path.stat()) for path in paths]
    return Source(name, _stamp(root, found), _listing(found), read)


def _shards(name: str, paths: Sequence[Path]) -> Source:
    return _files(name, paths, lambda: shards.open_shards(paths, _LARGEST_MEMBER))


def _dataset(name: str, where: str, split: str | None) -> Source:
    dataset = hub.open_dataset(where, split)
    root, row = Path(where), hub.stamp(dataset)
    # The library's stamp of a folder that it has saved is a line in it, and says nothing of files.
    found = sorted(_walk(root, follow_links=True)) if root.is_dir() else []
    stamp, listing = (f"{files} {row}" for files in (_stamp(root, found), _listing(found)))
    return Source(name, stamp, listing, lambda: hub.image_list(dataset, name))


def _reader(name: str, path: Path) -> Callable[[Path], ImageList]:
    suffixes = path.name.lower().split(".")[1:] or [""]
    with path.open("rb") as file:
        start = file.read(262)
    if path.name.lower().endswith(shards.SUFFIXES) or start[257:] == b"ustar":
        return lambda path: shards.open_shards([path], _LARGEST_MEMBER)
    if suffixes[-1] == "npz":
        return arrays.open_npz
    if suffixes[-1] == "npy" or start[:4] == b"\x93NUM":
        return arrays.open_npy
    if suffixes[-1] == "zip" or start[:2] == b"PK":
        return open_zip
    if "idx" in path.name.lower() or suffixes[-1] == "gz" or start[:3] == b"\0\0\x08":
        return arrays.open_idx
    raise UserError(f"{name!r} is a file of a kind that is not known; {ACCEPTED}")


class _Entry(NamedTuple):
    """What a folder holds: its path relative to the folder, and the status of a file, that of the
    link itself where it ``leads_out``; None for a folder."""

    name: str
    status: os.stat_result | None
    leads_out: bool = False


def _folder(name: str, root: Path, follow_links: bool) -> Source:
    found = sorted(_walk(root, follow_links))
    files = [entry.name for entry in found if entry.status is not None]
    left_out = {entry.name for entry in found if entry.leads_out}
    classes = sorted(e.name for e in found if e.status is None and "/" not in e.name)
    if not files:
        raise UserError(f"the folder {name!r} holds no files; give a folder with images in it")
    if len(left_out) == len(files):
        raise UserError(
            f"the folder {name!r} holds no files but {len(files):,} links that lead out of it (the "
            f"first: {files[0]}); copy what they lead to into the folder, or ask for it with "
            "--follow-links (follow_links=True)"
        )
    if all(file.lower().endswith(shards.SUFFIXES) for file in files):
        if left_out:
            # A shard is many images: none is left out by the way.
            raise UserError(f"the shard {min(left_out)!r} of {name!r} {_LEADS_OUT}")
        return _shards(name, [root / file for file in files])

    def read(i: int, size: int) -> Image.Image | None:
        if files[i] in left_out:
            raise ValueError(_LEADS_OUT)
        with (root / files[i]).open("rb") as stream:
            return _read(stream, files[i], size)

    labels = _labels_by_folder(files, classes)
    stamp, listing = _stamp(root, found), _listing(found)
    return Source(name, stamp, listing, lambda: ImageList(files, read, labels))


def _walk(root: Path, follow_links: bool) -> Iterator[_Entry]:
    """Every file and folder below, none hidden."""
    top = os.path.realpath(root)
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        prefix, above = pending.pop()
        status = (root / prefix).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue  # a link that leads back to a folder it lies in
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                relative = f"{prefix}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    if _leads_nowhere(entry):
                        continue
                    if not follow_links and not _lies_in(top, entry):
                        yield _Entry(relative, entry.stat(follow_symlinks=False), leads_out=True)
                        continue
                if entry.is_dir():
                    pending.append((f"{relative}/", above | {identity}))
                    yield _Entry(relative, None)
                elif entry.is_file():
                    yield _Entry(relative, entry.stat())


def _leads_nowhere(link: os.DirEntry[str]) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno in _NOWHERE
    return False


def _lies_in(top: str, link: os.DirEntry[str]) -> bool:
    """Whether what a link leads to lies in the folder `top`, whose path is resolved."""
    return Path(os.path.realpath(link.path)).is_relative_to(top)


def open_zip(path: Path) -> ImageList:
    """The images in a zip, which are read in memory: nothing is extracted, names are only names."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        # Broken bytes make zipfile raise BadZipFile, OSError, ValueError and more.
        raise UserError(
            f"{str(path)!r} is not a whole zip file ({error}); copy or pack it again"
        ) from error
    members = sorted(
        (
            info
            for info in archive.infolist()
            # is_dir() would look at the last letter, which a damaged name may lack.
            if not info.filename.endswith("/") and not _is_hidden(info.filename)
        ),
        key=lambda info: info.filename,
    )
    if not members:
        raise UserError(f"the zip {str(path)!r} holds no files; pack images into it")
    names = [info.filename for info in members]

    def read(i: int, size: int) -> Image.Image | None:
        if members[i].file_size > _LARGEST_MEMBER:
            raise ValueError(f"declares {members[i].file_size:,} bytes")
        with decode.alone(members[i].file_size):
            return _read(BytesIO(archive.read(members[i])), names[i], size)

    inner = _without_common_folder(names)
    classes = sorted({name.split("/")[0] for name in inner if "/" in name})
    return ImageList(names, read, _labels_by_folder(inner, classes))


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(p == "__MACOSX" or (p.startswith(".") and p != "..") for p in parts)


def _without_common_folder(names: Sequence[str]) -> list[str]:
    """Packing a folder puts its own name before all others; the classes are one level below."""
    first = names[0].split("/")[0] + "/"
    return [n[len(first) :] for n in names] if all(n.startswith(first) for n in names) else [*names]


def _read(stream: BinaryIO, name: str, size: int) -> Image.Image | None:
    try:
        return decode.read(stream, size)
    except UnidentifiedImageError:
        # A text file beside the images is no loss; a file that claims to be an image is one.
        if PurePosixPath(name).suffix.lower() not in Image.registered_extensions():
            return None
        raise


def _labels_by_folder(
    names: Sequence[str], classes: Sequence[str]
) -> Callable[[Sequence[int]], np.ndarray | None]:
    """Labels by first folder, if every image lies in one of `classes` and every class has one."""

    def labels(kept: Sequence[int]) -> np.ndarray | None:
        holders = [names[i].split("/")[0] if "/" in names[i] else None for i in kept]
        if not classes or set(holders) != set(classes):
            return None
        number = {holder: label for label, holder in enumerate(classes)}
        return np.array([number[holder] for holder in holders if holder is not None], np.int64)

    return labels


def _stamp(root: Path, files: Sequence[_Entry]) -> str:
    digest = hashlib.sha256(os.fsencode(root.resolve()))
    for name, status, leads_out in files:
        digest.update(b"\0" + os.fsencode(name))
        if status is not None:
            times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            digest.update(repr(times).encode())
        if leads_out:
            digest.update(b"leads out")
    return digest.hexdigest()


def _listing(files: Sequence[_Entry]) -> str:
    digest = hashlib.sha256()
    for name, status, _ in files:
        if status is not None:
            digest.update(b"\0" + os.fsencode(name))
            digest.update(repr((status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
