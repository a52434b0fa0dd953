"""Images that come as arrays: .npy, .npz and the idx format of the MNIST family."""

from __future__ import annotations

import gzip
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from pygan.data import memory
from pygan.data.image_list import DEFAULT_SIZE, SIZES, ImageList, Numbered
from pygan.errors import UserError

_LAYOUTS = "uint8 of shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3"
_NPZ_NAMES = {"images": "labels", "x_train": "y_train", "train_images": "train_labels"}
_DEFLATE_RATIO = 1032  # the most that deflate can shrink anything
log = logging.getLogger("pygan.data")


def image_list(images: np.ndarray, labels: np.ndarray | None, name: str) -> ImageList:
    """An array as a list of images.

    Args:
        images: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], C in {1, 3}.
        labels: int64 [N] or None.
        name: for messages.

    Raises:
        UserError: another dtype or shape, or a shape that can be read in two ways.
    """
    pixels = _channels_last(images, name)
    height, width, channels = pixels.shape[1:]

    def read(i: int, size: int) -> Image.Image:
        one = np.ascontiguousarray(pixels[i])
        return Image.fromarray(one[..., 0] if channels == 1 else one)

    return ImageList(
        Numbered(len(pixels)),
        read,
        lambda kept: None if labels is None else labels[np.asarray(kept, np.int64)],
        height if height == width and height in SIZES else DEFAULT_SIZE,
    )


def open_npy(path: Path) -> ImageList:
    """A .npy array, mapped and never unpickled."""
    with _whole(path, ".npy array"):
        images = np.lib.format.open_memmap(path, mode="r")
    return image_list(images, None, path.name)


def open_npz(path: Path) -> ImageList:
    """The images of an .npz, never unpickled.

    They are the array called images, x_train or train_images (with labels, y_train or
    train_labels), or else the only array of three or four dimensions (with labels).
    """
    with _whole(path, ".npz archive"), np.load(path, allow_pickle=False) as archive:
        check_room(sum(info.file_size for info in archive.zip.infolist()))
        name = next((name for name in _NPZ_NAMES if name in archive.files), None)
        if name is None:
            stacks = [name for name in archive.files if np.ndim(archive[name]) in (3, 4)]
            if len(stacks) != 1:
                raise UserError(
                    f"{path.name} holds {len(stacks)} arrays of three or four dimensions among "
                    f"{archive.files}; call the one with the images 'images'"
                )
            name = stacks[0]
        images = _member(archive, name)
        beside = _NPZ_NAMES.get(name, "labels")
        labels = _member(archive, beside) if beside in archive.files else None
    return image_list(images, _checked_labels(labels, images, path.name), path.name)


def _member(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    found = archive[name]
    if not isinstance(found, np.ndarray):  # numpy gives the bytes of what is no .npy file
        raise ValueError(f"its {name!r} is not an array")
    return found


def open_idx(path: Path) -> ImageList:
    """An idx file of images, and the labels from the file beside it where the names match."""
    images = _read_idx(path)
    if images.ndim == 1:
        raise UserError(f"{path.name} holds labels, not images; give the file with the images")
    labels = None
    for beside in label_files(path):
        labels = _checked_labels(_read_idx(beside), images, beside.name)
    return image_list(images, labels, path.name)


def label_files(path: Path) -> list[Path]:
    """The label file that goes with an idx image file by its name, if it is there."""
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    return [beside] if beside != path and "idx" in path.name and beside.is_file() else []


def _read_idx(path: Path) -> np.ndarray:
    with _whole(path, "idx file"):
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
                raise ValueError("it does not start like one")
            if magic[2] != 8:
                raise ValueError(f"its type is {magic[2]:#04x}, not 0x08 for uint8")
            lengths = file.read(4 * magic[3])
            if len(lengths) < 4 * magic[3]:
                raise ValueError("it is truncated in its header")
            shape = tuple(int(n) for n in np.frombuffer(lengths, ">u4"))
            size = math.prod(shape)
            room = path.stat().st_size * (_DEFLATE_RATIO if packed else 1)
            if packed:
                check_room(min(size, room))
            data = file.read(size) if size <= room else b""
            if len(data) < size:
                raise ValueError(f"it is truncated: its header promises {size:,} bytes of data")
            if file.read(1):
                raise ValueError(f"more follows the {size:,} bytes that its header promises")
    return np.frombuffer(data, np.uint8).reshape(shape)


def check_room(size: int) -> None:
    """Raises ValueError where a file unpacks to more bytes than memory holds."""
    free = memory.available()
    if free is not None and size > free:
        raise ValueError(f"it unpacks to {size:,} bytes, and {free:,} are free")


def _channels_last(images: np.ndarray, name: str) -> np.ndarray:
    """uint8 [N, H, W, C], a view."""
    shape = images.shape
    given = f"{name} holds {images.dtype} of shape {list(shape)}"
    if images.dtype != np.uint8:
        raise UserError(f"{given}; accepted is {_LAYOUTS}: convert values in 0..255 with astype")
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(f"{given}; accepted is {_LAYOUTS}, none of them 0")
    last, first = shape[-1] in (1, 3), shape[1] in (1, 3)
    if (len(shape) == 3 and last) or (len(shape) == 4 and last and first):
        raise UserError(
            f"{given}, which can be read in two ways; make it [N, H, W, C], H and W > 3"
        )
    if len(shape) == 3:
        return images[..., None]
    if not last and not first:
        raise UserError(f"{given}; accepted is {_LAYOUTS}")
    return images if last else images.transpose(0, 2, 3, 1)


def _checked_labels(labels: np.ndarray | None, images: np.ndarray, name: str) -> np.ndarray | None:
    if labels is None:
        return None
    count = images.shape[0] if images.ndim else 0
    if labels.dtype.kind not in "iu" or labels.size != count:
        log.warning("%s: the labels are not %d integers and are not used", name, count)
        return None
    return labels.reshape(-1).astype(np.int64)


@contextmanager
def _whole(path: Path, kind: str) -> Iterator[None]:
    """Turns any failure to read `path` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Broken bytes make the parsers of numpy, zipfile and zlib raise nearly anything.
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{str(path)!r} cannot be read as an {kind} ({reason}); "
            f"give a whole one that holds {_LAYOUTS}"
        ) from error
