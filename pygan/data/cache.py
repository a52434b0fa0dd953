"""Decoded images on disk: found again in milliseconds, written whole or not at all.

`<fingerprint>.images` holds raw uint8 pixels and is named by its content; `<key>.json` says which
fingerprint belongs to a source as it was last seen. Both are written under a temporary name,
flushed to the disk and renamed, so any number of processes may write the same entry.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL

from pygan.data.build import Decoded
from pygan.data.image_set import ImageSet, fingerprint

_FORMAT = 1  # raise when decoding gives other pixels or the files mean something else
_SPOT_BYTES, _SPOTS = 1 << 19, 64
_ABANDONED = 3600.0  # seconds without a write after which a partial file has no writer any more
log = logging.getLogger("pygan.data")


class Cache:
    """A folder of decoded image sets.

    Args:
        folder: where; None is `$PYGAN_CACHE`, else `$XDG_CACHE_HOME/pygan`, else `~/.cache/pygan`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        base = Path(folder) if folder is not None else default_folder()
        self.folder = base / "data"

    def find(self, key: str, name: str) -> ImageSet | None:
        """The image set under `key`, or None if there is none or it is damaged.

        The size of the pixel file is checked, and the SHA-256 of 32 MiB spread evenly over it: all
        of a small set. A cut or blanked file is found; one flipped bit in a large one may not be.
        """
        try:
            entry = json.loads((self.folder / f"{key}.json").read_bytes())
            body = entry["body"]
            path = self._pixels(body["fingerprint"])
            if entry["check"] != _check(body, path):
                raise ValueError("its checksum is wrong")
            images = np.memmap(path, np.uint8, "r", shape=tuple(body["shape"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("the cache entry of %s is damaged (%s) and is made again", name, error)
            return None
        skipped = tuple((file, reason) for file, reason in body["skipped"])
        if skipped and body["pillow"] != PIL.__version__:
            return None  # another Pillow may read what this one could not
        labels = None if body["labels"] is None else np.array(body["labels"], np.int64)
        return ImageSet(images, labels, name, body["fingerprint"], skipped)

    @contextmanager
    def partial(self, at_least: int) -> Iterator[IO[bytes]]:
        """A new file for the pixels, gone at the end unless `store` has renamed it.

        Raises:
            OSError: the folder cannot be written or has fewer than `at_least` bytes free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        free = shutil.disk_usage(self.folder).free
        if free < at_least:
            raise OSError(errno.ENOSPC, f"{_size(at_least)} needed, {_size(free)} free")
        handle, path = tempfile.mkstemp(prefix="partial-", dir=self.folder)
        os.close(handle)
        try:
            with open(path, "r+b", buffering=1 << 20) as file:
                yield file
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def store(self, key: str, file: IO[bytes], done: Decoded, name: str) -> ImageSet:
        """Keep the pixels that `decode_all` has written to the partial file `file`.

        Raises:
            OSError: the disk is full or failing; what was there before is still whole.
        """
        file.flush()
        os.fsync(file.fileno())
        pixels = np.memmap(file.name, np.uint8, "r", shape=done.shape)
        content = fingerprint(pixels, done.labels)
        path = self._pixels(content)
        if done.passing:
            os.replace(file.name, path)
        else:
            body = {
                "fingerprint": content,
                "shape": done.shape,
                "labels": None if done.labels is None else done.labels.tolist(),
                "skipped": done.skipped,
                "pillow": PIL.__version__,
            }
            entry = {"check": _check(body, Path(file.name)), "body": body}
            with self.partial(0) as index:
                index.write(json.dumps(entry).encode())
                index.flush()
                os.fsync(index.fileno())
                # Renamed only when both are on the disk: a full one then leaves neither.
                os.replace(file.name, path)
                os.replace(index.name, self.folder / f"{key}.json")
        return ImageSet(pixels, done.labels, name, content, done.skipped)

    @contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """Waits while another process builds `key`, so that the same images are not decoded twice.

        Where files cannot be locked nothing is waited for: two builds are only wasteful.
        """
        lock = self._lock(key)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def _lock(self, key: str) -> IO[bytes] | None:
        with suppress(ImportError, OSError):
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f"{key}.lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process is decoding the same images; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            return lock
        return None

    def _pixels(self, content: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", content):
            raise ValueError("its fingerprint is not one")
        return self.folder / f"{content}.images"

    def _sweep(self) -> None:
        """Removes what killed processes left behind."""
        for path in self.folder.glob("partial-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()


def key_of(stamp: str, image_size: int | None, channels: int | None) -> str:
    """The name of an index entry: the source as it is now, and what was asked of it."""
    return hashlib.sha256(repr((_FORMAT, stamp, image_size, channels)).encode()).hexdigest()


def default_folder() -> Path:
    """`$PYGAN_CACHE`, else `$XDG_CACHE_HOME/pygan`, else `~/.cache/pygan`."""
    if chosen := os.environ.get("PYGAN_CACHE"):
        return Path(chosen).expanduser()
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "pygan"
    try:
        return Path.home() / ".cache" / "pygan"
    except RuntimeError:
        # No home folder: a path that cannot be made, so that memory is used and the log says so.
        return Path(os.devnull) / "pygan"


def _check(body: dict[str, Any], path: Path) -> str:
    """SHA-256 of an entry and of blocks of its pixels; ValueError if their size is wrong."""
    size = math.prod(body["shape"])
    if path.stat().st_size != size:
        raise ValueError("its size is wrong")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    # Blocks end to end where the file is that small, and evenly spread over a larger one.
    reach = max(size, _SPOTS * _SPOT_BYTES) - _SPOT_BYTES
    with path.open("rb", buffering=0) as file:
        for i in range(_SPOTS):
            file.seek(reach * i // (_SPOTS - 1))
            digest.update(file.read(_SPOT_BYTES))
    return digest.hexdigest()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
