"""From an encoded image to 8-bit grey or RGB pixels of the size that is trained on.

Rules: EXIF orientation is applied; transparent pixels are composited on white; palettes are looked
up; CMYK, YCbCr, HSV and LAB go through Pillow's conversion; 16-bit and 32-bit integers are scaled
from 0..65535; floating point is read as 0..1, or as 0..255 if any value is above 1; of an animation
the first frame is taken. ICC profiles are ignored.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

import numpy as np
from PIL import Image

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_PIXEL_BYTES = 4  # Pillow's, of a colour
_LARGE = 1 << 27  # bytes; of such images memory might not hold one for each core
_one_large = threading.RLock()


def alone(size: int) -> AbstractContextManager[object]:
    """Inside, no other thread handles a large image if ``size`` bytes are one."""
    return _one_large if size > _LARGE else nullcontext()


def read(stream: BinaryIO, size: int) -> Image.Image:
    """Decode one image, upright and in mode "L" or "RGB", ready for `fit`.

    A JPEG is decoded at a half, a quarter or an eighth where that leaves at least twice `size`.
    Raises whatever Pillow raises for bytes that it cannot read, and ValueError for PostScript.
    """
    with Image.open(stream) as image:
        if image.format == "EPS":
            # Pillow would start Ghostscript on the file: data must not run a program.
            raise ValueError("PostScript is a program, not an image, and is not run")
        image.draft(None, (2 * size, 2 * size))
        with alone(_PIXEL_BYTES * image.width * image.height):
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            pixels = _to_eight_bits(image)
            return pixels if upright is None else pixels.transpose(upright)


def fit(image: Image.Image, size: int, channels: int | None = None) -> np.ndarray:
    """Scale the shorter side to `size` pixels and cut out the centre.

    Args:
        image: mode "L" or "RGB", any width and height.
        size: side of the result in pixels.
        channels: 1 or 3 converts; None keeps the mode.

    Returns:
        uint8 [size, size, C], C = 1 for "L" and 3 for "RGB".
    """
    width, height = image.size
    if (width, height) != (size, size):
        # Cropping in source coordinates gives the pixels of "resize, then crop" without the long
        # side ever being scaled, which for a strip of 100000 x 1 would not fit in memory.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize(
            (size, size),
            Image.Resampling.LANCZOS,
            box=(left, top, left + side, top + side),
            reducing_gap=3.0,
        )
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image).reshape(size, size, -1)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # A broken EXIF block says nothing about the pixels, which have been read by now.
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):
        return _scaled(np.asarray(image), 65535)
    if mode == "F":
        values = np.asarray(image)
        return _scaled(values, 255 if values.max() > 1 else 1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if mode in ("L", "1"):
        return image.convert("L")
    return image.convert("RGB")


def _scaled(values: np.ndarray, white: int) -> Image.Image:
    """Grey values 0..white as an 8-bit image; ValueError if a value lies outside."""
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"grey values outside 0..{white}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
