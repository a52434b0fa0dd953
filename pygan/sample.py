"""`python -m pygan.sample`: images from a trained generator.

The source is the folder of a run, a `.safetensors` file, or a plain `netG*.pth` of the well-known
DCGAN example. The output is a grid in one picture, a folder of PNG files, or a `.npy` array.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import pygan
from pygan import cli
from pygan.checkpoint import load_generator
from pygan.data import memory
from pygan.errors import UserError
from pygan.run_folder import check_writable, full, replace_file, sync_folder

PROG = "python -m pygan.sample"
COLUMNS = 8
# Latents are drawn in blocks of this many, so that image i depends on neither -n nor the batch.
_BLOCK = 256


def latents(count: int, nz: int, seed: int) -> Tensor:
    """`[count, nz, 1, 1]` float32 standard normal; row i is the same whatever `count` is."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // _BLOCK)
    z = [torch.randn(_BLOCK, nz, 1, 1, generator=generator) for _ in range(blocks)]
    return torch.cat(z)[:count]


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation: the great circle from `start` to `end` (Shoemake 1985; White 2016,
    arXiv:1609.04468).

    Args:
        start, end: `[nz]`.
        share: `[n]` in [0, 1].

    Returns:
        `[n, nz]`, which keeps the length that a generator expects of its latents.
    """
    cosine = torch.dot(start / start.norm(), end / end.norm()).clamp(-1, 1)
    angle = torch.acos(cosine)
    share = share[:, None]
    if torch.sin(angle) < 1e-6:
        return (1 - share) * start + share * end
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / (
        torch.sin(angle)
    )


def interpolations(count: int, nz: int, seed: int, columns: int = COLUMNS) -> Tensor:
    """`[count, nz, 1, 1]`: each row of `columns` runs from one random latent to another."""
    rows = -(-count // columns)
    ends = latents(2 * rows, nz, seed)[:, :, 0, 0]
    share = torch.linspace(0, 1, columns)
    paths = [slerp(ends[2 * row], ends[2 * row + 1], share) for row in range(rows)]
    return torch.cat(paths)[:count, :, None, None]


@contextlib.contextmanager
def _sampling(generator: nn.Module, bn: str) -> Iterator[None]:
    """Eval mode, or training mode whose effect on the buffers is undone afterwards."""
    was_training = generator.training
    kept = [(buffer, buffer.clone()) for buffer in generator.buffers()] if bn == "batch" else []
    generator.train(bn == "batch")
    try:
        with torch.no_grad():
            yield
            for buffer, value in kept:
                buffer.copy_(value)
    finally:
        generator.train(was_training)


def generate(generator: nn.Module, z: Tensor, *, bn: str = "eval") -> np.ndarray:
    """One batch of images; the generator is left as it was found, buffers included.

    Args:
        generator: latents to images in [-1, 1].
        z: `[N, nz, 1, 1]` on the generator's device.
        bn: `eval` normalises with the running statistics, `batch` with those of this batch.

    Returns:
        uint8 `[N, H, W, C]`.
    """
    with _sampling(generator, bn):
        images = generator(z).float()
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images: np.ndarray, columns: int = COLUMNS, gap: int = 2) -> np.ndarray:
    """uint8 `[N, H, W, C]` as one picture uint8 `[height, width, C]`, row by row on black."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    picture = np.zeros(shape, np.uint8)
    for number, image in enumerate(images):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    """uint8 `[H, W, C]`, grey or colour, as the bytes of a picture file."""
    data = io.BytesIO()
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.save(data, format=Image.registered_extensions()[suffix])
    return data.getvalue()


def _encoded(picture: np.ndarray, path: Path) -> bytes:
    """As a file of that name.

    Raises:
        UserError: its format does not take such a picture.
    """
    try:
        return encode(picture, path.suffix.lower())
    except Exception as error:
        # Pillow's writers raise nearly anything for a size or a colour that they do not know.
        height, width = picture.shape[:2]
        raise UserError(
            f"{path.suffix} does not take a picture of {width} x {height} ({error}); give a .png, "
            "a folder or a .npy as --out, or fewer images"
        ) from None


def _write_folder(path: Path, batches: Iterable[np.ndarray]) -> None:
    """000000.png … in a folder that appears only when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        number = 0
        for batch in batches:
            for image in batch:
                replace_file(temporary / f"{number:06d}.png", encode(image))
                number += 1
        # An empty folder of that name is replaced; a full one makes this fail.
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _npy_writer(
    shape: tuple[int, ...], batches: Iterable[np.ndarray]
) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            file.write(batch.tobytes())

    return write


def _check_output(path: Path, *, folder: bool) -> None:
    if folder and path.is_dir() and any(path.iterdir()):
        raise UserError(f"the folder {path} is not empty; empty it, or give another --out")
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder; give another --out")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if not folder and path.suffix.lower() != ".npy" and kind not in Image.SAVE:
        raise UserError(
            f"--out {path} has a suffix no picture format has; give .png, .jpg, .webp or .npy, or "
            "a folder"
        )


def _parser() -> cli.Parser:
    parser = cli.Parser(prog=PROG, description="Draw images from a trained generator.")
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of a run, .safetensors, or netG*.pth")
    add("-n", "--number", type=cli.whole_number(1), default=64, help="images (default 64)")
    add("--out", default="samples.png", help="grid.png, a folder (name/), or images.npy")
    add("--seed", type=cli.whole_number(0, cli.SEED_MAX), default=0, help="default 0")
    add("--interpolate", action="store_true", help="rows of 8 from one latent to another")
    add("--bn", choices=("eval", "batch"), default="eval",
        help="batch norm: running statistics, or those of each batch (default eval)")  # fmt: skip
    add("--batch-size", "--batchSize", type=cli.whole_number(1), default=64,
        help="images at a time (default 64)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    return parser


def _check_memory(count: int, nz: int, pixels: int) -> None:
    """Raises UserError for latents and pixels of images, both held twice, that are sure not to
    fit."""
    free, needed = memory.available(), 2 * count * (4 * nz + pixels)
    if free is not None and needed > free:
        raise UserError(
            f"{count:,} images need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB "
            "are free; lower --number or --batch-size, or draw several times with other seeds"
        )


def _batches(
    generator: nn.Module, z: Tensor, count: int, batch_size: int, bn: str, device: torch.device
) -> Iterator[np.ndarray]:
    for start in range(0, count, batch_size):
        part = z[start : start + batch_size].to(device)
        yield generate(generator, part, bn=bn)[: count - start]


def _sample(argv: list[str] | None) -> int:
    options = _parser().parse_args(argv)
    out = Path(options.out)
    check_writable(out, "--out")
    folder = options.out.endswith("/") or not out.suffix or out.is_dir()
    _check_output(out, folder=folder)
    device = cli.device(options.device)
    generator, arguments = load_generator(Path(options.source))
    size = arguments["image_size"]
    # Statistics of a batch need a whole one: the surplus is drawn and left out.
    drawn = options.number
    if options.bn == "batch":
        drawn = -(-drawn // options.batch_size) * options.batch_size
    kept = folder or out.suffix.lower() == ".npy"  # one batch at a time
    _check_memory(drawn, arguments["nz"], 0 if kept else size * size * arguments["channels"])
    draw = interpolations if options.interpolate else latents
    z = draw(drawn, arguments["nz"], options.seed)
    generator.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pygan.fuse(generator)
    batches = _batches(generator, z, options.number, options.batch_size, options.bn, device)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            _write_folder(out, batches)
        elif out.suffix.lower() == ".npy":
            shape = (options.number, size, size, arguments["channels"])
            replace_file(out, _npy_writer(shape, batches))
        else:
            picture = grid(np.concatenate(list(batches)))
            replace_file(out, _encoded(picture, out))
    except OSError as error:
        kind = cli.Failure if full(error) else UserError
        raise kind(
            f"{out} cannot be written ({error.strerror or error}); free some space or give "
            "another --out"
        ) from error
    print(f"{options.number} images of {options.source} are in {out}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _sample(argv))


if __name__ == "__main__":
    sys.exit(main())
