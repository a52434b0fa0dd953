"""The data of a run: images of one size in one array."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one square size, ready to be gathered by index.

    Attributes:
        images: uint8 [N, H, W, C], read-only, H = W a power of two, C in {1, 3}; a `np.memmap` of
            the cache, or plain memory for the embedded set and where the cache cannot be written.
        labels: int64 [N], or None where the source has none.
        name: the source as it was given.
        fingerprint: SHA-256, in hex, of the shape, the pixels and the labels. Equal fingerprints
            mean equal training data, whatever the source was.
        skipped: (file, reason) of every file that could not be read.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return int(self.images.shape[1])

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.images.shape[3])

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def gather(self, chosen: np.ndarray) -> np.ndarray:
        """The images at indices int64 [M], uint8 [M, H, W, C]."""
        return self.images[chosen]

    def sample(self) -> ImageSet:
        """What the set is measured by: all of it."""
        return self


def fingerprint(images: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256, in hex, of uint8 `images` [N, H, W, C] (C-contiguous) and int64 `labels` [N]."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(images.reshape(-1).data)
    if labels is not None:
        digest.update(b"labels")
        digest.update(labels.astype("<i8").data)
    return digest.hexdigest()


def in_memory(
    images: np.ndarray,
    labels: np.ndarray | None,
    name: str,
    skipped: tuple[tuple[str, str], ...] = (),
) -> ImageSet:
    """An ImageSet of arrays that live in memory, which become read-only."""
    images.setflags(write=False)
    return ImageSet(images, labels, name, fingerprint(images, labels), skipped)
