"""Images that are decoded while training goes on: a data set may be larger than memory and disk.

    stream = pygan.data.stream("shards/train-{000..127}.tar", image_size=64)
    order = StreamOrder(len(stream), batch_size=128, seed=0, window=stream.window)
    with closing(Windows(stream, order)) as windows:
        batch = windows.batch(step)  # uint8 [128, 64, 64, 3]

An epoch is cut into windows (`pygan.data.order.StreamOrder`). Threads decode the next one while one
is trained on, and no more than these two are in memory. In place of an image that cannot be read
comes the next readable one of its window, so a batch depends on the data and its step alone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pygan.data.build import Job, Unreadable, cores, decode_one
from pygan.data.image_list import ImageList
from pygan.data.image_set import ImageSet, in_memory
from pygan.data.order import StreamOrder, shuffled
from pygan.errors import UserError, printable

WINDOW_IMAGES, WINDOW_BYTES = 8192, 256 << 20  # at most, in a window and in a sample
PROBES = 256  # images, to find out whether a stream is grey
_CHUNK = 32  # images per task
log = logging.getLogger("pygan.data")


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Images of one square size that are decoded when they are asked for.

    Attributes:
        job: what to decode, and how.
        channels: 1 (grey) or 3 (RGB).
        fingerprint: hex digest of names, sizes and times of last write of the files, of the
            fingerprint and the number of rows of a Hugging Face dataset: not of the pixels, which
            nobody has seen.
        skipped: nothing; unreadable images are found as training goes on.
    """

    job: Job
    channels: int
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The source as it was given."""
        return self.job.name

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.job.size

    @property
    def window(self) -> int:
        """Images that are decoded at a time, at most: 8,192, or what fits into 256 MiB."""
        return max(1, min(WINDOW_IMAGES, WINDOW_BYTES // (self.image_size**2 * self.channels)))

    def __len__(self) -> int:
        return len(self.job.images.names)

    def gather(self, chosen: np.ndarray) -> np.ndarray:
        """The readable ones of the images at indices int64 [M], decoded now.

        Returns:
            uint8 [at most M, H, W, C].

        Raises:
            UserError: none of them can be read.
        """
        return self._decoded(chosen)[0]

    def sample(self) -> ImageSet:
        """At most `window` images, the first of an order that depends on their number alone: what
        a stream is measured by, always the same."""
        chosen = np.sort(shuffled(len(self), 0)[: self.window])
        images, kept = self._decoded(chosen)
        return in_memory(images, self.job.images.labels(kept.tolist()), self.name)

    def _decoded(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and indices of those that can be read."""
        with closing(_Decoder(self.job, self.channels)) as decoder:
            window = _Window(decoder, chosen)
            unreadable = window.finished()
        if len(unreadable) == len(chosen):
            raise none_readable(self, chosen, unreadable)
        readable = np.setdiff1d(np.arange(len(chosen)), list(unreadable))
        if len(readable) == len(chosen):
            return window.images, chosen
        return window.images[readable], chosen[readable]


def open_stream(job: Job, fingerprint: str) -> ImageStream:
    """A stream of what `job` lists; files whose suffix is not that of an image are left out.

    Raises:
        UserError: there are no images, or none of those that are tried can be read.
    """
    job = replace(job, images=_images_only(job.images))
    count = len(job.images.names)
    if not count:
        raise UserError(f"{job.name!r} holds no images; give a source with images in it")
    channels = job.channels
    if channels is None:
        probe = ImageStream(job, 3, fingerprint).gather(shuffled(count, 0)[:PROBES])
        channels = 1 if (probe == probe[..., :1]).all() else 3
    return ImageStream(job, channels, fingerprint)


def _images_only(listed: ImageList) -> ImageList:
    known = {"", *Image.registered_extensions()}
    names = listed.names
    kept = [i for i, name in enumerate(names) if os.path.splitext(name)[1].lower() in known]
    if len(kept) == len(names):
        return listed
    return ImageList(
        [names[i] for i in kept],
        lambda i, size: listed.read(kept[i], size),
        lambda chosen: listed.labels([kept[i] for i in chosen]),
        listed.default_size,
    )


class Windows:
    """Batches of a stream; `close` it, or its threads finish a window before they end.

    Args:
        stream: the images.
        order: which of them make a step.
        part: of every batch; only the images in it are decoded. None: all of it.

    Attributes:
        replaced: images in the batches so far that others have taken the place of.
    """

    def __init__(self, stream: ImageStream, order: StreamOrder, part: slice | None = None) -> None:
        self._stream, self._order = stream, order
        self._part = part or slice(0, order.batch_size)
        self._decoder: _Decoder | None = None
        self._number = -1
        self._window: _Window | None = None
        self._next: _Window | None = None
        self._replaced = np.empty(0, np.int64)
        self._named: set[int] = set()
        self.replaced = 0

    def batch(self, step: int) -> np.ndarray:
        """uint8 [B, H, W, C] of a step, which counts from 0: a view of the window.

        Raises:
            UserError: no image of its window can be read.
        """
        number, position = self._order.place(step)
        if self._window is None or number != self._number:
            self._window = self._taken(number)
            self._number = number
            self._next = self._started(number + 1)
        share = self._part.stop - self._part.start
        rows = slice(position * share, (position + 1) * share)
        self.replaced += int(np.count_nonzero(self._replaced[rows]))
        return self._window.images[rows]

    def close(self) -> None:
        """Ends the threads; what they have not yet begun is dropped."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = self._window = self._next = None

    def _taken(self, number: int) -> _Window:
        ahead = self._next if self._window is not None and number == self._number + 1 else None
        # Two at most: let go of the one that is over, or of both.
        self._window = self._next = None
        if ahead is None:
            self.close()
            ahead = self._started(number)
        unreadable = ahead.finished()
        self._replaced = np.zeros(len(ahead.images), bool)
        if unreadable:
            self._replace(ahead, number, unreadable)
        return ahead

    def _started(self, number: int) -> _Window:
        if self._decoder is None:
            self._decoder = _Decoder(self._stream.job, self._stream.channels)
        indices = self._order.window(number).reshape(-1, self._order.batch_size)
        return _Window(self._decoder, indices[:, self._part].reshape(-1))

    def _replace(self, window: _Window, number: int, unreadable: dict[int, str]) -> None:
        """Fills the places of unreadable images, each from the first readable one that follows it
        in the whole window, which comes round."""
        assert self._decoder is not None
        whole = self._order.window(number)
        batch, start = self._order.batch_size, self._part.start
        share = self._part.stop - start
        # By their places in the whole window.
        mine = np.arange(len(whole)).reshape(-1, batch)[:, self._part].reshape(-1)
        place_of = {int(at): place for place, at in enumerate(mine)}
        for place in sorted(unreadable):
            at = place // share * batch + start + place % share
            for candidate in (np.arange(at + 1, at + len(whole)) % len(whole)).tolist():
                here = place_of.get(candidate)
                if here is not None and here not in unreadable:
                    window.images[place] = window.images[here]
                    break
                found = None if here is not None else self._decoder.one(int(whole[candidate]))
                if isinstance(found, np.ndarray):
                    window.images[place] = found
                    break
            else:
                raise none_readable(self._stream, window.indices, unreadable)
            self._replaced[place] = True
            self._report(int(window.indices[place]), unreadable[place])

    def _report(self, i: int, reason: str) -> None:
        if i not in self._named:
            self._named.add(i)
            name = printable(self._stream.job.images.names[i])
            log.warning("%s is replaced by another image: %s", name, reason)


def none_readable(
    stream: ImageStream, indices: np.ndarray, unreadable: dict[int, str]
) -> UserError:
    first = min(unreadable)
    name = printable(stream.job.images.names[int(indices[first])])
    return UserError(
        f"none of {len(indices):,} images of {stream.name!r} that were to be read together can be "
        f"read (one of them, {name}: {unreadable[first]}); give images that Pillow reads, and see "
        "that they stay where they are"
    )


class _Decoder:
    """Threads, and what they decode."""

    def __init__(self, job: Job, channels: int) -> None:
        Image.init()  # the list of formats is filled here, not by several threads at once
        self._job = replace(job, channels=channels)
        self.shape = (job.size, job.size, channels)
        self.closed = threading.Event()
        self._pool = ThreadPoolExecutor(job.workers or cores(), thread_name_prefix="pygan-stream")

    def one(self, i: int) -> np.ndarray | Unreadable:
        """The pixels of an image."""
        found = decode_one(self._job, i)
        return Unreadable("is no image", False) if found is None else found

    def submit(self, work: Callable[[Sequence[int]], None], places: Sequence[int]) -> Future[None]:
        return self._pool.submit(work, places)

    def close(self) -> None:
        self.closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Window:
    """Images that are being decoded.

    Attributes:
        indices: int64 [K], which.
        images: uint8 [K, H, W, C], whole once `finished` has returned.
    """

    def __init__(self, decoder: _Decoder, indices: np.ndarray) -> None:
        self.indices = indices
        self.images = np.empty((len(indices), *decoder.shape), np.uint8)
        self._unreadable: dict[int, str] = {}
        # As they lie in the files.
        places = np.argsort(indices, kind="stable").tolist()

        def decode(chunk: Sequence[int]) -> None:
            for place in chunk:
                if decoder.closed.is_set():
                    return
                found = decoder.one(int(indices[place]))
                if isinstance(found, np.ndarray):
                    self.images[place] = found
                else:
                    self._unreadable[place] = found.reason

        self._tasks = [
            decoder.submit(decode, places[first : first + _CHUNK])
            for first in range(0, len(places), _CHUNK)
        ]

    def finished(self) -> dict[int, str]:
        """Waits for the threads; the places of images that cannot be read, and why.

        Raises:
            Whatever a thread has met that is no fault of an image.
        """
        for task in self._tasks:
            task.result()
        return self._unreadable
