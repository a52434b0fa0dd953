"""Images that have been listed but not decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZES = (16, 32, 64, 128, 256)  # the image sizes, in pixels, that there are models for
DEFAULT_SIZE = 64


@dataclass(frozen=True)
class ImageList:
    """What a source holds, whatever its kind.

    Attributes:
        names: one name per image, for messages.
        read: (index, wanted size) -> image in mode "L" or "RGB", or None for a file that is no
            image and does not claim to be one; raises anything for an image that is broken.
        labels: (indices of the images that could be read) -> int64 labels of these, or None.
        default_size: image size where none was asked for.
    """

    names: Sequence[str]
    read: Callable[[int, int], Image.Image | None]
    labels: Callable[[Sequence[int]], np.ndarray | None]
    default_size: int = DEFAULT_SIZE


class Numbered(Sequence[str]):
    """Names for images that have none."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return f"image {range(self._count)[i]}"
