"""Decoding all images, in parallel, into one stream of pixels."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image
from tqdm import tqdm

from pygan.data import decode
from pygan.data.image_list import ImageList
from pygan.errors import UserError, printable

_CHUNK = 32  # images per task: large enough to hide a task's cost, small enough to share out evenly
log = logging.getLogger("pygan.data")


@dataclass(frozen=True)
class Unreadable:
    """Why an image was skipped; `passing` if trying again may help (I/O, memory)."""

    reason: str
    passing: bool


_Result: TypeAlias = "np.ndarray | Unreadable | None"


class PixelWriter:
    """Appends images [S, S, C] to a stream that ends up as uint8 [N, S, S, C].

    With `channels=None` the stream stays grey until the first image that is not: then all that was
    written is widened in place. An image counts as grey when its three channels are equal.
    """

    def __init__(self, stream: IO[bytes], size: int, channels: int | None) -> None:
        self.stream = stream
        self.size = size
        self.channels = channels or 1
        self._may_widen = channels is None
        self.count = 0

    def append(self, image: np.ndarray) -> None:
        """Write uint8 [S, S, 1 or 3]; OSError if the stream cannot take it."""
        if self._may_widen and self.channels == 1 and image.shape[2] == 3:
            if (image == image[..., :1]).all():
                image = image[..., :1]
            else:
                self._widen()
        if image.shape[2] < self.channels:
            image = np.repeat(image, self.channels, axis=2)
        self.stream.write(image.tobytes())
        self.count += 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, S, S, C] of what has been written."""
        return (self.count, self.size, self.size, self.channels)

    def _widen(self) -> None:
        plane = self.size * self.size
        # From the last to the first: no image then overwrites one that is still to be read.
        for i in reversed(range(self.count)):
            self.stream.seek(i * plane)
            grey = np.frombuffer(self.stream.read(plane), np.uint8)
            self.stream.seek(i * plane * 3)
            self.stream.write(np.repeat(grey, 3).tobytes())
        self.stream.seek(self.count * plane * 3)
        self.channels = 3


@dataclass(frozen=True)
class Decoded:
    """What `decode_all` has written, and what it has not and why.

    Attributes:
        shape: [N, S, S, C] of the uint8 pixels in the stream.
        labels: int64 [N] or None.
        skipped: (file, reason) of every unreadable image.
        passing: a reason may be gone at the next start, so the result is not to be remembered.
    """

    shape: tuple[int, int, int, int]
    labels: np.ndarray | None
    skipped: tuple[tuple[str, str], ...]
    passing: bool


@dataclass(frozen=True)
class Job:
    """What to decode, and how.

    Attributes:
        name: the source as it was given, for messages.
        images: what it holds.
        size: side of the results in pixels.
        channels: 1, 3, or None to find out.
        workers: threads, None for one per usable core.
        progress: show a bar, if standard error is a terminal.
    """

    name: str
    images: ImageList
    size: int
    channels: int | None
    workers: int | None
    progress: bool


def decode_all(job: Job, stream: IO[bytes]) -> Decoded:
    """Decode every image with threads and write the readable ones to `stream`, in order.

    Threads: Pillow decodes and scales without Python's lock, and measured as fast as processes on
    photographs, without a second copy of torch in every worker.

    Raises:
        UserError: there is no image, or none that can be read.
        OSError: the stream cannot take them.
    """
    writer = PixelWriter(stream, job.size, job.channels)
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    passing = False
    with _bar(job) as bar, closing(_in_order(job)) as chunks:
        for first, results in chunks:
            for i, result in enumerate(results, first):
                if isinstance(result, np.ndarray):
                    writer.append(result)
                    kept.append(i)
                elif result is not None:
                    skipped.append((printable(job.images.names[i]), result.reason))
                    passing |= result.passing
            bar.update(len(results))
    _report(job, len(kept), skipped)
    return Decoded(writer.shape, job.images.labels(kept), tuple(skipped), passing)


def _report(job: Job, kept: int, skipped: list[tuple[str, str]]) -> None:
    if not kept and not skipped:
        raise UserError(
            f"{job.name!r} holds no images among its {len(job.images.names):,} files; "
            "give a folder or a zip with images in it"
        )
    if not kept:
        file, reason = skipped[0]
        raise UserError(
            f"none of the {len(skipped):,} images in {job.name!r} can be read "
            f"(the first, {file}: {reason}); give images that Pillow reads"
        )
    if skipped:
        log.warning("%s: skipped %d unreadable images", job.name, len(skipped))
    for file, reason in skipped:
        log.warning("skipped %s: %s", file, reason)


def _bar(job: Job) -> tqdm[Any]:
    hidden = None if job.progress else True  # None: hidden where there is no terminal
    return tqdm(total=len(job.images.names), desc="decoding", unit="img", disable=hidden)


def _in_order(job: Job) -> Generator[tuple[int, list[_Result]], None, None]:
    """(index of the first, results) of each chunk, decoded a few chunks ahead of the caller."""
    Image.init()  # the list of formats is filled here, not by several threads at once
    count = len(job.images.names)
    workers = job.workers or cores()
    ahead: deque[tuple[int, Future[list[_Result]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pygan-decode")
    try:
        for first in range(0, count, _CHUNK):
            chunk = range(first, min(first + _CHUNK, count))
            ahead.append((first, pool.submit(lambda c: [decode_one(job, i) for i in c], chunk)))
            if len(ahead) > 2 * workers:
                index, future = ahead.popleft()
                yield index, future.result()
        while ahead:
            index, future = ahead.popleft()
            yield index, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def decode_one(job: Job, i: int) -> _Result:
    """Pixels uint8 [S, S, C], None for what is no image, or why there are none."""
    try:
        image = job.images.read(i, job.size)
        return None if image is None else decode.fit(image, job.size, job.channels)
    except Exception as error:
        # Broken bytes make Pillow's readers raise nearly anything; one image is not worth the run.
        reason = str(error).split("\n")[0].split(" <_io")[0] or type(error).__name__
        io_failed = isinstance(error, OSError) and error.errno is not None
        return Unreadable(reason, io_failed or isinstance(error, MemoryError))


def cores() -> int:
    """Cores that this process may use, at most 32: beyond, threads wait for Python's lock."""
    usable = getattr(os, "sched_getaffinity", None)
    return min(32, len(usable(0)) if usable else os.cpu_count() or 1)
