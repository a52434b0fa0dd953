"""Real images as training data: one uint8 array, decoded once, found again at the next start.

`stream` is for what neither memory nor disk hold decoded (`pygan.data.streaming`).

    data = pygan.data.load("photos/", image_size=64)
    order = pygan.data.BatchOrder(len(data), batch_size=128, seed=0)
    batch = data.images[order.index(step)]  # uint8 [128, 64, 64, 3]

Messages go to the logger `pygan.data`.
"""

from __future__ import annotations

import logging
import os
from io import BytesIO
from typing import TypeAlias

import numpy as np

from pygan.data import arrays, builtin, memory, sources
from pygan.data.build import Job, decode_all
from pygan.data.cache import Cache, key_of
from pygan.data.image_list import DEFAULT_SIZE, SIZES
from pygan.data.image_set import ImageSet, in_memory
from pygan.data.order import BatchOrder, StreamOrder
from pygan.data.sources import Source
from pygan.data.streaming import ImageStream, Windows, open_stream
from pygan.errors import UserError

__all__ = [
    "BatchOrder",
    "ImageSet",
    "ImageStream",
    "Images",
    "StreamOrder",
    "Windows",
    "load",
    "stream",
]

Images: TypeAlias = ImageSet | ImageStream
log = logging.getLogger("pygan.data")


def load(
    source: str | os.PathLike[str] = builtin.FASHION_MNIST,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    follow_links: bool = False,
) -> ImageSet:
    """Images of one size from whatever holds them.

    The shorter side is scaled to `image_size`, the centre is cut out. What was decoded is kept in
    the cache and found again as long as no file has changed; where the cache cannot be written it
    is kept in memory, and the log says why. Unreadable images are skipped and named in the log.

    Args:
        source: "fashion-mnist" (embedded: the 10,000 grey images of its test split, padded from 28
            to 32 pixels), "fake" (1,024 images of noise), or a path: a folder (searched
            recursively, hidden files left out), a .zip, WebDataset shards (a .tar, a folder of
            nothing else, or a pattern like "train-{000..012}.tar" or "*.tar"), a folder written by
            `save_to_disk` of a Hugging Face dataset, or "hf:NAME_OR_PATH[:SPLIT]" for what
            `datasets.load_dataset` loads, a .npy or .npz of uint8 [N, H, W],
            [N, H, W, C] or [N, C, H, W], or an idx file, also .gz.
        image_size: side in pixels, a power of two in 16..256. None: 32 for fashion-mnist, the size
            of an array where it is such a power, 64 otherwise.
        channels: 1 (grey) or 3 (RGB). None: 1 if every image is grey, else 3.
        workers: threads that decode. None: one per usable core.
        cache_dir: folder of the cache. None: `$PYGAN_CACHE`, else `$XDG_CACHE_HOME/pygan`, else
            `~/.cache/pygan`. Anything in it may be deleted at any time.
        progress: show a progress bar while decoding, if standard error is a terminal.
        follow_links: follow links in a folder that lead out of it, too. Otherwise they count as
            unreadable; `source` itself may be a link, and those that stay within are followed.

    Returns:
        An `ImageSet`. Labels of a folder or a zip are the indices of its first-level folders, in
        order of their names, if every image lies in one of them and every one holds an image.

    Raises:
        UserError: nothing is there, or no image can be read, or a file is broken, or an argument
            is out of range, or neither the disk nor the memory can take the result.
    """
    _check_arguments(image_size, channels, workers)
    name = os.fspath(source)
    if name == builtin.FAKE:
        return _fake(image_size or DEFAULT_SIZE, channels or 3)
    if name == builtin.FASHION_MNIST:
        images, labels = builtin.fashion_mnist()
        if image_size in (None, images.shape[1]):
            return in_memory(np.repeat(images[..., None], channels or 1, axis=3), labels, name)
        found = _fashion_mnist()
    else:
        found = sources.find(source, follow_links=follow_links)
    cache = Cache(cache_dir)
    key = key_of(found.stamp, image_size, channels)
    known = cache.find(key, name)
    if known is None:
        with cache.exclusive(key):
            known = cache.find(key, name)
            if known is None:
                listed = found.open()
                size = image_size or listed.default_size
                job = Job(name, listed, size, channels, workers, progress)
                return _decoded(job, cache, key)
    if known.skipped:
        log.warning("%s: %d unreadable images are left out", name, len(known.skipped))
    return known


def stream(
    source: str | os.PathLike[str] = builtin.FASHION_MNIST,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    workers: int | None = None,
    follow_links: bool = False,
) -> ImageStream:
    """The same images, decoded as they are asked for; nothing is written to the cache.

    Files whose suffix is not that of an image are left out. What cannot be read is found later, and
    another image takes its place.

    Args:
        source, image_size, workers, follow_links: as of `load`.
        channels: 1 (grey) or 3 (RGB). None: 1 if 256 images out of the whole set are grey, else 3.

    Raises:
        UserError: as of `load`, and if none of those 256 images can be read.
    """
    _check_arguments(image_size, channels, workers)
    name = os.fspath(source)
    if name == builtin.FAKE:
        arrays_of = builtin.fake(image_size or DEFAULT_SIZE, channels or 3)
        found = Source(name, name, name, lambda: arrays.image_list(*arrays_of, name))
    elif name == builtin.FASHION_MNIST:
        found = _fashion_mnist()
    else:
        found = sources.find(source, follow_links=follow_links)
    listed = found.open()
    size = image_size or listed.default_size
    job = Job(name, listed, size, channels, workers, progress=False)
    return open_stream(job, found.listing)


def _fashion_mnist() -> Source:
    name = builtin.FASHION_MNIST
    return Source(name, name, name, lambda: arrays.image_list(*builtin.fashion_mnist(), name))


def _decoded(job: Job, cache: Cache, key: str) -> ImageSet:
    """Decode into the cache, or into memory if the cache cannot be written."""
    at_least = len(job.images.names) * job.size**2 * (job.channels or 1)
    try:
        with cache.partial(at_least) as file:
            done = decode_all(job, file)
            return cache.store(key, file, done, job.name)
    except OSError as error:
        reason = error.strerror or str(error)
    at_most = len(job.images.names) * job.size**2 * (job.channels or 3)
    if (free := memory.available()) is not None and free < at_most:
        raise _too_large(job, cache, reason)
    log.warning("%s is kept in memory: %s cannot take it (%s)", job.name, cache.folder, reason)
    stream = BytesIO()
    try:
        done = decode_all(job, stream)
    except MemoryError as error:
        raise _too_large(job, cache, reason) from error
    pixels = np.frombuffer(stream.getbuffer(), np.uint8).reshape(done.shape)
    return in_memory(pixels, done.labels, job.name, done.skipped)


def _fake(size: int, channels: int) -> ImageSet:
    log.warning("fake: %d images of noise, for trying things out", builtin.FAKE_IMAGES)
    images, labels = builtin.fake(size, channels)
    return in_memory(images, labels, builtin.FAKE)


def _check_arguments(image_size: int | None, channels: int | None, workers: int | None) -> None:
    if image_size is not None and image_size not in SIZES:
        raise UserError(
            f"an image size of {image_size} is not accepted; choose 16, 32, 64, 128 or 256"
        )
    if channels not in (None, 1, 3):
        raise UserError(f"{channels} channels are not accepted; choose 1 for grey or 3 for RGB")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers cannot decode anything; choose at least 1")


def _too_large(job: Job, cache: Cache, reason: str) -> UserError:
    return UserError(
        f"{len(job.images.names):,} images of {job.size} x {job.size} fit neither into "
        f"{str(cache.folder)!r} ({reason}) nor into memory; choose a smaller image size, or set "
        "PYGAN_CACHE to a folder with more room"
    )
