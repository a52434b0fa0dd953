"""Files and arguments that nobody means well: ``python tests/fuzz.py --minutes 10 --out FILE.md``.

Hypothesis draws changes to whole files (bytes flipped, numbers in headers replaced, parts cut out,
doubled or moved) and arguments of operations. A reader has to return or to raise `UserError`, an
operation to return or to raise one of the errors of torch's own; neither may do anything else, nor
take more than `MOST_BYTES` of memory.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import resource
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from pygan import checkpoint, data, functional, run_report
from pygan.checkpoint import pack_state, pack_weights
from pygan.config import Config
from pygan.errors import UserError
from pygan.metrics.quality import Quality
from pygan.models import Generator
from pygan.run_folder import CONFIG, LOG, QUALITY, read_config

MOST_BYTES = 2**30  # more than before
EXAMPLES = 60
TORCH_ERRORS = (UserError, RuntimeError, TypeError, ValueError, IndexError)
LENGTHS = (0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


class Reader(NamedTuple):
    """Whole files and what reads one; `read` is given the path of a changed one. Of a slow one a
    short pass takes few ``examples``."""

    name: str
    whole: Sequence[bytes]
    suffix: str
    read: Callable[[Path], object]
    examples: int = EXAMPLES


class Outcome(NamedTuple):
    """How many examples there were, and how many of them were refused."""

    examples: int
    refused: int
    seconds: float


# Whole files


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, "u1")


def _idx() -> bytes:
    return struct.pack(">HBBIII", 0, 8, 3, 6, 16, 16) + _pixels(6, 16, 16).tobytes()


def _saved(save: Callable[..., Any], *arguments: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *arguments, **named)
    return file.getvalue()


def _image(kind: str, mode: str = "RGB") -> bytes:
    picture = Image.fromarray(_pixels(20, 24, 3)).convert(mode)
    return _saved(picture.save, kind)


def _zip(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for number in range(3):
            archive.writestr(f"a/{number}.png", _image("PNG"))
    return file.getvalue()


def _tar(kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for number in range(3):
            for suffix, content in (("cls", b"7"), ("png", _image("PNG"))):
                # Longer than a plain header holds.
                header = tarfile.TarInfo(f"{'a' * 120}/{number}.{suffix}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


def _weights(place: int) -> bytes:
    return pack_weights(Generator(16, 1, 4, 4), {"network": "dcgan.Generator"})[place]


def _state() -> bytes:
    return pack_state({"position": 3, "tensors": [torch.arange(5.0), torch.zeros(2, 3)]})


def _config() -> bytes:
    content = {"pygan": {}, "config": asdict(Config()), "data": {"images": 5}}
    return json.dumps(content).encode()


def _log() -> bytes:
    row = {"step": 1, "epoch": 0, "loss_d": 1.0, "loss_g": 1.0, "d_real": 0.5, "d_fake": 0.5,
           "d_fake_after": 0.5, "images_per_s": 9.0, "seconds": 1.0}  # fmt: skip
    return b"".join(json.dumps(row | {"step": step}).encode() + b"\n" for step in range(1, 6))


def _quality() -> bytes:
    row = {"features": "pixels", "about": "it", "samples": 9, "bn": "eval", "seed": 0, "epoch": 1}
    row |= dict.fromkeys((*Quality._fields, "distance_of_halves"), 1.0) | {"shares": [0.5, 0.5]}
    return b"".join(json.dumps(row | {"epoch": epoch}).encode() + b"\n" for epoch in range(3))


# Readers


def _load(path: Path) -> None:
    images = data.load(path, image_size=16, workers=1, progress=False, cache_dir=path.parent / "c")
    assert images.images.dtype == np.uint8 and images.image_size == 16


def _load_folder(path: Path) -> None:
    # A sound one beside it: what cannot be read is skipped.
    folder = path.parent / "images"
    folder.mkdir(exist_ok=True)
    (folder / "sound.png").write_bytes(_image("PNG"))
    os.replace(path, folder / path.name)
    try:
        _load(folder)
    finally:
        (folder / path.name).unlink()


def _read_run(path: Path) -> None:
    os.replace(path, path.parent / CONFIG)
    read_config(path.parent)


def _report(name: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        (path.parent / CONFIG).write_bytes(_config())
        for other in (LOG, QUALITY):
            (path.parent / other).unlink(missing_ok=True)
        os.replace(path, path.parent / name)
        run_report.page(path.parent)

    return read


READERS = (
    Reader("idx", (_idx(), gzip.compress(_idx())), ".idx", _load),
    Reader("npy", (_saved(np.save, _pixels(6, 16, 16)),), ".npy", _load),
    Reader("npz", (_saved(np.savez, images=_pixels(6, 16, 16)),), ".npz", _load),
    Reader("zip", (_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED)), ".zip", _load),
    Reader("tar", (_tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT)), ".tar", _load),
    Reader("PNG", (_image("PNG"), _image("PNG", "P")), ".png", _load_folder),
    Reader("JPEG", (_image("JPEG"), _image("JPEG", "L")), ".jpg", _load_folder),
    Reader("checkpoint", (_state(),), ".safetensors", checkpoint.read_state),
    Reader("weights, safetensors", (_weights(1),), ".safetensors", checkpoint.load_generator),
    Reader("weights, pth", (_weights(0),), ".pth", checkpoint.load_generator),
    Reader("config.json", (_config(),), ".json", _read_run),
    Reader("log.jsonl", (_log(),), ".jsonl", _report(LOG), examples=10),
    Reader("quality.jsonl", (_quality(),), ".jsonl", _report(QUALITY)),
)


@st.composite
def changed(draw: st.DrawFn, whole: Sequence[bytes]) -> bytes:
    """One of the files with a few changes."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        # Headers are at the beginning or the end.
        size = len(content)
        near = st.one_of(st.integers(0, min(size, 128)), st.integers(0, size))
        place = draw(near)
        place = size - place if draw(st.booleans()) else place
        kind = draw(st.sampled_from(("flip", "number", "cut", "insert", "end", "double")))
        if kind == "flip" and place < size:
            content[place] ^= draw(st.integers(1, 255))
        elif kind == "number":
            form = draw(st.sampled_from(("<H", ">H", "<I", ">I", "<Q", ">Q")))
            length = draw(st.sampled_from(LENGTHS)) % (1 << 8 * struct.calcsize(form))
            content[place : place + struct.calcsize(form)] = struct.pack(form, length)
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 64))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "end":
            del content[place:]
        elif kind == "double":
            content += content[place : place + 256]
    return bytes(content)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _many(
    strategy: st.SearchStrategy[Any], one: Callable[[Any], bool], examples: int, number: int
) -> Outcome:
    """``one`` tells of an example whether it was refused."""
    count = refused = 0

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def each(value: Any) -> None:
        nonlocal count, refused
        count += 1
        refused += one(value)

    start, before = time.perf_counter(), _peak()
    each()
    grown = _peak() - before
    assert grown < MOST_BYTES, f"{grown / 2**20:.0f} MiB were taken"
    return Outcome(count, refused, time.perf_counter() - start)


def read_many(reader: Reader, examples: int, number: int = 0) -> Outcome:
    """Changed files through a reader.

    Raises:
        Exception: what the reader raised besides UserError.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"it{reader.suffix}"

        def one(content: bytes) -> bool:
            path.write_bytes(content)
            try:
                reader.read(path)
            except UserError as error:
                assert "\n" not in str(error)
                return True
            return False

        return _many(changed(reader.whole), one, examples, number)


# Operations


_sizes = st.lists(st.sampled_from((0, 1, 2, 3, 5, 8)), min_size=0, max_size=5)
_types = st.sampled_from(
    (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8)
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any small tensor: any shape, type, strides and values, NaN and infinity too."""
    sizes, dtype = draw(_sizes), draw(_types)
    x = torch.linspace(-4, 4, max(1, int(np.prod(sizes, dtype=int)))).repeat(2)
    if dtype.is_floating_point:
        x[0] = draw(st.sampled_from((0.0, float("nan"), float("inf"), -1e30)))
    x = x.to(dtype)[: int(np.prod(sizes, dtype=int))].reshape(sizes)
    if len(sizes) == 4 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if sizes and draw(st.booleans()):
        x = x.transpose(0, len(sizes) - 1)
    return x.requires_grad_(dtype.is_floating_point and draw(st.booleans()))


_whole = st.sampled_from((-1, 0, 1, 2, 3, 4, 7))
OPERATIONS: dict[str, st.SearchStrategy[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    name: st.tuples(st.tuples(*arguments), st.fixed_dictionaries({}, optional=named))
    for name, arguments, named in (
        ("gan_d_loss", (tensors(), tensors()),
         {"real_target": tensors() | st.floats(), "weight": st.floats()}),
        ("gan_g_loss", (tensors(),), {"target": tensors() | st.floats()}),
        ("image_batch", (tensors(), tensors()), {"flip": tensors()}),
        ("norm_act", (tensors(),),
         {"weight": tensors(), "bias": tensors(), "activation": st.text(max_size=5)}),
        ("conv2d", (tensors(), tensors()),
         {"bias": tensors(), "stride": _whole, "padding": _whole, "groups": _whole}),
        ("conv_transpose2d", (tensors(), tensors()),
         {"bias": tensors(), "stride": _whole, "padding": _whole, "output_padding": _whole}),
        ("upsample_conv2d", (tensors(), tensors()), {"bias": tensors()}),
        ("conv2d_avg_pool", (tensors(), tensors()), {"bias": tensors()}),
        ("binary_cross_entropy", (tensors(), tensors()), {"weight": tensors()}),
        ("diff_augment", (tensors(), st.just(("color", "translation", "cutout"))), {}),
    )
}  # fmt: skip


def call_many(name: str, examples: int = EXAMPLES, number: int = 0) -> Outcome:
    """Drawn arguments through an operation, forward and backward.

    Raises:
        Exception: what the operation raised besides `TORCH_ERRORS`.
    """
    operation = getattr(functional, name)

    def one(drawn: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        arguments, named = drawn
        try:
            found = operation(*arguments, **named)
            found = found.loss if hasattr(found, "loss") else found
            if found.requires_grad:
                found.float().sum().backward()
        except TORCH_ERRORS:
            return True
        return False

    return _many(OPERATIONS[name], one, examples, number)


# The long pass


def _until(seconds: float, run: Callable[[int], Outcome]) -> Outcome:
    """Passes with other numbers until the time is over, their sum."""
    total, number = Outcome(0, 0, 0.0), 1
    while total.seconds < seconds:
        found = run(number)
        total = Outcome(*(a + b for a, b in zip(total, found, strict=True)))
        number += 1
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; the exit status."""
    parser = argparse.ArgumentParser(description="Drawn files and arguments.")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each target")
    parser.add_argument("--only", nargs="*", help="names of targets")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options: Any = parser.parse_args(arguments)
    targets: dict[str, Callable[[int], Outcome]] = {
        f"reader of {reader.name}": lambda n, reader=reader: read_many(
            reader, 5 * reader.examples, n
        )
        for reader in READERS
    }
    targets |= {
        f"functional.{name}": lambda n, name=name: call_many(name, 500, n) for name in OPERATIONS
    }
    lines = ["| target | examples | refused | minutes |", "|---|---:|---:|---:|"]
    for name, run in targets.items():
        if options.only and not any(word in name for word in options.only):
            continue
        found = _until(60 * options.minutes, run)
        row = f"| {name} | {found.examples:,} | {found.refused:,} | {found.seconds / 60:.1f} |"
        print(row, flush=True)
        lines.append(row)
    if options.out:
        text = [
            "# Files and arguments drawn to do harm",
            "",
            "None crashed, hung, or raised anything but what it should; memory grew by less than "
            f"{MOST_BYTES >> 20} MiB.",
            "",
            *lines,
            "",
            f"`python tests/fuzz.py --minutes {options.minutes:g}`",
            "",
        ]
        options.out.write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
