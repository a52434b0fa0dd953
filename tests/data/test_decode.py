"""Every kind of image becomes upright 8-bit grey or RGB of the right size."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pygan.data import decode

ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def decoded(image: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    return np.asarray(decode.read(encode(image, kind, **options), 16))


def quarters(width: int = 64, height: int = 32) -> Image.Image:
    """Four quarters of four colours, so that no flip or rotation goes unseen."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    image.paste((255, 255, 255), (width // 2, height // 2, width, height))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = np.asarray(quarters()).astype(int)
    stored = quarters()
    # Undo what a viewer does, then store it with the tag that asks the viewer to do it.
    viewed = {o: _viewed(stored, o) for o in range(1, 9)}
    inverse = next(o for o in viewed if _viewed(viewed[o], orientation) == stored)
    lossy: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95, "subsampling": 0},
    }
    read = decoded(viewed[inverse], kind, exif=exif, **lossy.get(kind, {}))
    assert read.shape == upright.shape
    assert np.abs(read - upright).max() <= 2  # the quarters are whole blocks of a JPEG


def _viewed(image: Image.Image, orientation: int) -> Image.Image:
    tagged = image.copy()
    tagged.getexif()[ORIENTATION] = orientation
    viewed = ImageOps.exif_transpose(tagged)
    return Image.fromarray(np.asarray(viewed))


def test_a_broken_exif_block_costs_nothing() -> None:
    entry = struct.pack("<HHI4s", ORIENTATION, 2, 4, b"top\0")  # text where a number belongs
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    assert decode.read(encode(quarters(), "JPEG", exif=exif), 16).size == (64, 32)


@pytest.mark.parametrize("colours", [2, 256])
def test_palettes_are_looked_up(colours: int) -> None:
    image = quarters().quantize(4) if colours > 2 else quarters().convert("1")
    expected = np.asarray(image.convert("RGB" if colours > 2 else "L"))
    np.testing.assert_array_equal(decoded(image), expected)


def test_transparent_pixels_become_white() -> None:
    colour = Image.new("RGBA", (16, 16), (10, 20, 30, 255))
    colour.paste((200, 0, 0, 0), (0, 0, 8, 16))
    read = decoded(colour)
    assert (read[:, :8] == 255).all() and (read[:, 8:] == (10, 20, 30)).all()
    grey = Image.new("LA", (16, 16), (100, 128))
    assert np.abs(decoded(grey).astype(int) - round(255 - 155 * 128 / 255)).max() <= 1
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([9, 9, 9, 0, 255, 0])
    assert (decoded(palette, transparency=0) == 255).all()
    assert (decoded(palette) == 9).all()


def test_sixteen_bit_grey_keeps_its_white() -> None:
    values = np.array([[0, 257, 65535, 32768]] * 4, np.uint16)
    assert decoded(Image.fromarray(values)).tolist() == [[0, 1, 255, 128]] * 4
    integers = Image.fromarray(values.astype(np.int32))
    assert decoded(integers, "TIFF").tolist() == [[0, 1, 255, 128]] * 4


def test_floating_point_is_read_as_unit_or_byte_range() -> None:
    unit = np.array([[0, 0.5, 1, 0.25]] * 4, np.float32)
    assert decoded(Image.fromarray(unit), "TIFF").tolist() == [[0, 128, 255, 64]] * 4
    assert decoded(Image.fromarray(unit * 200), "TIFF").tolist() == [[0, 100, 200, 50]] * 4
    for bad in (np.nan, -1.0, 1e6):
        with pytest.raises(ValueError, match="grey values outside"):
            decoded(Image.fromarray(np.full((4, 4), bad, np.float32)), "TIFF")


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    # Each holds mid grey in its own way; a mode taken for RGB would show another colour.
    values = {"CMYK": (0, 0, 0, 127), "YCbCr": (128, 128, 128), "LAB": (137, 128, 128)}
    image = Image.new(mode, (16, 16), values[mode])
    read = decoded(image, "JPEG" if mode == "YCbCr" else "TIFF")
    assert read.shape == (16, 16, 3)
    assert np.abs(read.astype(int) - 128).max() <= 3


def test_grey_stays_grey() -> None:
    assert decode.read(encode(Image.new("L", (8, 8), 7), "PNG"), 16).mode == "L"


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    read = decoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read == (255, 0, 0)).all()


def test_postscript_is_never_run() -> None:
    with pytest.raises(ValueError, match="PostScript"):
        decode.read(encode(quarters(), "EPS"), 16)


def test_a_jpeg_is_decoded_small_but_never_below_twice_the_size() -> None:
    large = decode.read(encode(Image.new("RGB", (1600, 1200)), "JPEG"), 64)
    assert large.size == (200, 150)
    small = decode.read(encode(Image.new("RGB", (160, 120)), "JPEG"), 64)
    assert small.size == (160, 120)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (61, 61), (8, 20)])
def test_fit_scales_the_shorter_side_and_cuts_out_the_centre(size: tuple[int, int]) -> None:
    # On a ramp, scaling and cropping are exact: a pixel is the ramp at the pixel's centre.
    width, height = size
    ramp = np.add.outer(np.arange(height), np.arange(width)) + 0.5 * (100 - height - width) + 50
    fitted = decode.fit(Image.fromarray(ramp.astype(np.uint8)), 16)[..., 0]
    scale = min(size) / 16
    positions = scale * (np.arange(16) + 0.5) - 0.5
    y = positions + (height - min(size)) / 2
    x = positions + (width - min(size)) / 2
    expected = np.add.outer(y, x) + 0.5 * (100 - height - width) + 50
    inner = slice(3, -3)  # the filter meets the edge of the image outside
    assert np.abs(fitted - expected)[inner, inner].max() < 1.5


def test_fit_leaves_the_right_size_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(decode.fit(image, 16), noise)
    assert decode.fit(image, 16, channels=1).shape == (16, 16, 1)
    assert decode.fit(image.convert("L"), 16, channels=3).shape == (16, 16, 3)


def test_fit_averages_instead_of_skipping_pixels() -> None:
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    fitted = decode.fit(Image.fromarray(checkers.astype(np.uint8)), 16)
    assert np.abs(fitted.astype(int) - 127).max() <= 2


def test_an_extreme_strip_takes_no_memory() -> None:
    strip = Image.new("L", (4_000_000, 1), 9)  # scaled whole it would be 64 x 256 million
    assert (decode.fit(strip, 64) == 9).all()
