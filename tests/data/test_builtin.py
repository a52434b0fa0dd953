"""The sources that need no file."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from pygan import data


def test_fashion_mnist_is_the_test_split_padded(own_cache: Path) -> None:
    images = data.load()
    assert images.images.shape == (10000, 32, 32, 1)
    assert images.images.dtype == np.uint8 and not images.images.flags.writeable
    assert (len(images), images.image_size, images.channels) == (10000, 32, 1)
    assert images.labels is not None and images.labels.dtype == np.int64
    # Known of the test split: 1000 images a class, mean 0.2868 of white, an ankle boot (9) first.
    assert np.bincount(images.labels).tolist() == [1000] * 10 and images.labels[0] == 9
    inner = images.images[:, 2:30, 2:30, 0]
    assert abs(inner.mean() / 255 - 0.2868) < 1e-4
    assert images.images.sum(dtype=np.int64) == inner.sum(dtype=np.int64)  # the frame is black
    assert images.skipped == () and not own_cache.exists()


def test_the_embedded_files_carry_their_licence() -> None:
    folder = resources.files("pygan.data").joinpath("fashion_mnist")
    notice = folder.joinpath("LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE" in notice
    assert "permission notice shall be included" in notice


def test_fashion_mnist_in_other_sizes_and_channels() -> None:
    plain = data.load()
    small = data.load(image_size=16)
    assert small.images.shape == (10000, 16, 16, 1)
    np.testing.assert_array_equal(small.labels, plain.labels)
    # Halving keeps the brightness of every image, up to the filter's clipping at black and white.
    difference = small.images.mean((1, 2, 3)) - plain.images.mean((1, 2, 3))
    assert np.abs(difference).max() < 3
    rgb = data.load(channels=3)
    np.testing.assert_array_equal(rgb.images, np.repeat(plain.images, 3, axis=3))
    assert len({plain.fingerprint, small.fingerprint, rgb.fingerprint}) == 3


def test_fake_is_the_same_everywhere_and_says_what_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "pygan.data"):
        fake = data.load("fake")
    assert "noise" in caplog.text
    assert fake.images.shape == (1024, 64, 64, 3)
    assert (
        fake.images[0, 0, 0].tolist()
        == np.random.PCG64(0).random_raw(1).view(np.uint8)[:3].tolist()
    )
    assert 127 < fake.images.mean() < 128 and not fake.images.flags.writeable
    assert fake.labels is not None and set(fake.labels.tolist()) == set(range(10))
    assert data.load("fake").fingerprint == fake.fingerprint
    assert data.load("fake", image_size=16, channels=1).images.shape == (1024, 16, 16, 1)
