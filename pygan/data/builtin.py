"""The two sources that need no file: the embedded Fashion-MNIST test split, and noise."""

from __future__ import annotations

import gzip
from functools import cache
from importlib import resources

import numpy as np

FASHION_MNIST = "fashion-mnist"
FAKE = "fake"
FAKE_IMAGES = 1024


@cache
def fashion_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 images and labels of the Fashion-MNIST test split, padded with black to 32 x 32.

    Returns:
        uint8 [10000, 32, 32] and int64 [10000], both read-only.
        Source: Xiao, Rasul and Vollgraf, arXiv:1708.07747; MIT licence, kept beside the files.
    """
    images = np.frombuffer(_embedded("t10k-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_embedded("t10k-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    padded = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    classes = labels.astype(np.int64)
    padded.setflags(write=False)
    classes.setflags(write=False)
    return padded, classes


def fake(image_size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform noise, the same bytes on every machine: for trying things out, not for training.

    Returns:
        uint8 [1024, image_size, image_size, channels], and int64 [1024] running through 0..9.
    """
    shape = (FAKE_IMAGES, image_size, image_size, channels)
    words = np.random.PCG64(0).random_raw(int(np.prod(shape)) // 8)
    return words.astype("<u8").view(np.uint8).reshape(shape), np.arange(
        FAKE_IMAGES, dtype=np.int64
    ) % 10


def _embedded(file: str) -> bytes:
    folder = resources.files("pygan.data").joinpath("fashion_mnist")
    return gzip.decompress(folder.joinpath(file).read_bytes())
