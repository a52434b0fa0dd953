"""Files and arguments that nobody means well: ``python tests/fuzz.py --minutes 10 --out FILE.md``.

Hypothesis draws changes to whole files (bytes flipped, numbers in headers replaced, parts cut out,
doubled or moved) and arguments of operations. A reader has to return or to raise `UserError`, an
operation to return or to raise one of the errors of torch's own; neither may do anything else, nor
take more than `MOST_BYTES` of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import logging
import os
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from pygan import checkpoint, cli, data, evaluate, functional, losses, run_report, sample
from pygan.checkpoint import pack_state, pack_weights
from pygan.config import Config, parse, stored_config
from pygan.data.cache import Cache
from pygan.errors import UserError
from pygan.metrics.quality import Quality
from pygan.models import Generator
from pygan.ops import few_positions, layout, matrix_product, norm_conv, strided_conv, torch_conv
from pygan.ops.norm_act import Settings
from pygan.ops.tuning import Tuner
from pygan.run_folder import CONFIG, LOG, QUALITY, RunFolder, read_config
from pygan.training import plot

MOST_BYTES = 2**30  # more than before
EXAMPLES = 60
TORCH_ERRORS = (UserError, RuntimeError, TypeError, ValueError, IndexError)
LENGTHS = (0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


class Reader(NamedTuple):
    """Whole files and what reads one; `read` is given the path of a changed one. Of a slow one a
    short pass takes few ``examples``. Files that are ``drawn`` are whole, with other content."""

    name: str
    whole: Sequence[bytes]
    suffix: str
    read: Callable[[Path], object]
    examples: int = EXAMPLES
    drawn: st.SearchStrategy[bytes] | None = None


class Outcome(NamedTuple):
    """How many examples there were, how many of them were refused, and the CPU time."""

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


CONFIGURATION = {"pygan": {}, "config": asdict(Config()), "data": {"images": 5}}


def _config() -> bytes:
    return json.dumps(CONFIGURATION).encode()


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
    run = path.parent
    os.replace(path, run / CONFIG)
    stored = read_config(run)
    run_report.page(run)
    stored_config(run, stored)
    # Of a run without weights, so only what comes before them.
    evaluate.measure(evaluate.command_line().parse_args([str(run)]))


def _read_log(path: Path) -> None:
    os.replace(path, path.parent / LOG)
    folder = RunFolder(path.parent)
    folder.start_log(3)
    folder.close()
    plot(folder.rows())


def _read_cache(path: Path) -> None:
    """The entry of decoded images, which is made again where it is not whole."""
    folder = path.parent / "data"
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / "it.json")
    Cache(path.parent).find("it", "it")


def _read_choices(path: Path) -> None:
    tuner = Tuner("it", lambda run: 1.0, path.parent)
    tuner.path.parent.mkdir(exist_ok=True)
    os.replace(path, tuner.path)
    assert Tuner("it", lambda run: 1.0, path.parent).known("a", {"b": 1}) in (None, "b")


def _report(name: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        (path.parent / CONFIG).write_bytes(_config())
        for other in (LOG, QUALITY):
            (path.parent / other).unlink(missing_ok=True)
        os.replace(path, path.parent / name)
        run_report.page(path.parent)

    return read


# Content of another kind


_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(([], {}, [[]], -1, 0, 1, 2**31, 2**63, 10**400, "64", "main.0.weight")),
)  # fmt: skip


@st.composite
def altered(draw: st.DrawFn, whole: Any) -> Any:
    """JSON with a few of its values gone or others."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while holder:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 4)):
                holder = holder[key]
                continue
            if draw(st.integers(0, 3)):
                holder[key] = draw(_values)
            else:
                del holder[key]
            break
    return value


def _nested() -> bytes:
    return b"[" * 100_000


@st.composite
def altered_state(draw: st.DrawFn) -> bytes:
    """The state of a run whose digest is right."""
    numbers: dict[str, torch.Tensor] = {}
    tree = checkpoint._plant({"position": 3, "tensors": [torch.arange(5.0), (1, 2)]}, numbers)
    content = draw(altered({"kind": checkpoint._TREE, "tree": tree}))
    return checkpoint._pack(numbers, content)


_NAMES = st.sampled_from(("main.0.weight", "main.1.bias", "main." + 5000 * "9" + ".weight", ""))


@st.composite
def altered_weights(draw: st.DrawFn, suffix: str) -> bytes:
    """Weights of a generator, some of them of another shape, type or name, and what is said."""
    state = Generator(16, 1, 4, 4).state_dict()
    for name in draw(st.lists(st.sampled_from(list(state)), max_size=2, unique=True)):
        x = state[name]
        kinds = [x.reshape(-1)[:0], x.double(), x.to(torch.int8), x.to(torch.complex64), x[None]]
        if suffix == ".pth":
            kinds += [torch.ones(1).expand(10**9, *x.shape[1:]), x.to_sparse(), x.to("meta"), {}]
        state[name] = draw(st.sampled_from(kinds))
    if draw(st.booleans()):
        state[draw(_NAMES)] = torch.ones(draw(st.sampled_from(((), (0, 4, 4, 4), (2, 3, 4, 4)))))
    if suffix == ".pth":
        return _saved(lambda file: torch.save(state, file))
    arguments = {"image_size": 16, "channels": 1, "nz": 4, "ngf": 4}
    about = {"kind": "weights", "network": "dcgan.Generator", "arguments": arguments}
    return checkpoint._pack(state, draw(altered(about)))


def _json(whole: Any) -> st.SearchStrategy[bytes]:
    return altered(whole).map(lambda value: json.dumps(value).encode()) | st.builds(_nested)


def _json_rows(whole: bytes) -> st.SearchStrategy[bytes]:
    rows = [json.loads(line) for line in whole.splitlines()]
    lines = altered(rows).map(lambda found: [json.dumps(row).encode() for row in found])
    return lines.map(lambda found: b"".join(line + b"\n" for line in [*found, _nested()]))


_ENTRY = {"check": "", "body": {"fingerprint": "0" * 64, "shape": [1, 2, 2, 1], "skipped": []}}

READERS = (
    Reader("idx", (_idx(), gzip.compress(_idx())), ".idx", _load),
    Reader("npy", (_saved(np.save, _pixels(6, 16, 16)),), ".npy", _load),
    Reader("npz", (_saved(np.savez, images=_pixels(6, 16, 16)),), ".npz", _load),
    Reader("zip", (_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED)), ".zip", _load),
    Reader("tar", (_tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT)), ".tar", _load),
    Reader("PNG", (_image("PNG"), _image("PNG", "P")), ".png", _load_folder),
    Reader("JPEG", (_image("JPEG"), _image("JPEG", "L")), ".jpg", _load_folder),
    Reader("other images", (*map(_image, ("GIF", "TIFF", "BMP", "WEBP", "PPM")),), ".png",
           _load_folder),
    Reader("checkpoint", (_state(),), ".safetensors", checkpoint.read_state),
    Reader("weights, safetensors", (_weights(1),), ".safetensors", checkpoint.load_generator),
    Reader("weights, pth", (_weights(0),), ".pth", checkpoint.load_generator),
    Reader("checkpoint, altered", (), ".safetensors", checkpoint.read_state,
           drawn=altered_state()),
    Reader("weights, safetensors, altered", (), ".safetensors", checkpoint.load_generator,
           drawn=altered_weights(".safetensors")),
    Reader("weights, pth, altered", (), ".pth", checkpoint.load_generator,
           drawn=altered_weights(".pth")),
    Reader("config.json", (_config(),), ".json", _read_run),
    Reader("config.json, altered", (), ".json", _read_run, drawn=_json(CONFIGURATION)),
    Reader("log.jsonl", (_log(),), ".jsonl", _report(LOG), examples=10),
    Reader("log.jsonl, altered", (), ".jsonl", _report(LOG), 10, _json_rows(_log())),
    Reader("log.jsonl of a run that goes on", (_log(),), ".jsonl", _read_log, examples=10),
    Reader("log.jsonl of a run that goes on, altered", (), ".jsonl", _read_log, 10,
           _json_rows(_log())),
    Reader("quality.jsonl", (_quality(),), ".jsonl", _report(QUALITY)),
    Reader("quality.jsonl, altered", (), ".jsonl", _report(QUALITY), drawn=_json_rows(_quality())),
    Reader("entry of the cache", (), ".json", _read_cache, drawn=_json(_ENTRY)),
    Reader("measured choices", (), ".json", _read_choices,
           drawn=_json({"check": "", "choices": {"a": "b"}})),
)  # fmt: skip


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

    start, before = time.process_time(), _peak()
    each()
    grown = _peak() - before
    assert grown < MOST_BYTES, f"{grown / 2**20:.0f} MiB were taken"
    return Outcome(count, refused, time.process_time() - start)


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

        drawn = changed(reader.whole) if reader.drawn is None else reader.drawn
        return _many(drawn, one, examples, number)


# Command lines


def _words(flags: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[list[str]]:
    """Flags with values that may fit."""
    strange = st.sampled_from(("", "-1", "0", "nan", "1e999", 5000 * "9", "\N{BELL}", "%s"))
    pairs = [
        st.tuples(st.just(flag), st.one_of(value.map(str), value.map(str), strange)).map("=".join)
        for flag, value in flags.items()
    ]
    return st.lists(st.one_of(*pairs), max_size=4)


_number = st.integers(-1, 40) | st.sampled_from((2**31 - 1, 2**31, 10**20))
_suffix = st.sampled_from(
    (".png", ".npy", "/", "", ".psd", ".jpg", ".webp", ".eps", ".pdf", ".gif", ".xbm", ".fits")
)
_SAMPLE = {
    "-n": _number, "--seed": _number, "--batch-size": _number, "--out": _suffix,
    "--bn": st.sampled_from(("eval", "batch")), "--device": st.just("cpu"),
}  # fmt: skip
_TRAIN = {
    f"--{name}": _number | st.floats() | st.sampled_from(("auto", "off", "bce", "color", "fake"))
    for name in ("data", "image-size", "batch-size", "steps", "lr", "beta1", "nz", "seed", "loss",
                 "amp", "threads", "real-target", "noise", "augment", "ema", "dataset", "sky")
}  # fmt: skip


def draw_samples(folder: Path, words: list[str]) -> None:
    """`pygan.sample` with these words; its UserError."""
    path = folder / "netG.pth"
    if not path.exists():
        path.write_bytes(_weights(0))
    named = [f"--out={folder / 'out'}{w[6:]}" if w.startswith("--out") else w for w in words]
    if named == words:
        named.append(f"--out={folder / 'out.png'}")
    try:
        sample._sample([str(path), *named])
    except cli.Failure as error:
        raise UserError(str(error)) from error
    finally:
        for each in folder.glob("out*"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()


COMMANDS: dict[str, tuple[st.SearchStrategy[list[str]], Callable[[Path, list[str]], object]]] = {
    "pygan.sample": (_words(_SAMPLE), draw_samples),
    "pygan.train": (_words(_TRAIN), lambda folder, words: parse(words)),
}


def command_many(name: str, examples: int = EXAMPLES, number: int = 0) -> Outcome:
    """Drawn words through a command.

    Raises:
        Exception: what the command raised besides UserError.
    """
    drawn, run = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:

        def one(words: list[str]) -> bool:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    run(Path(folder), words)
            except UserError:
                return True
            return False

        return _many(drawn, one, examples, number)


# Operations


_sizes = st.lists(st.sampled_from((0, 1, 2, 3, 5, 8)), min_size=0, max_size=5)
_types = st.sampled_from(
    (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8)
)


@st.composite
def tensors(
    draw: st.DrawFn, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A small tensor, any where nothing is said: of any shape, type, strides and values, NaN and
    infinity too."""
    sizes = draw(_sizes) if shape is None else list(shape)
    dtype = draw(_types) if dtype is None else dtype
    x = torch.linspace(-4, 4, max(1, int(np.prod(sizes, dtype=int)))).repeat(2)
    if dtype.is_floating_point:
        x[0] = draw(st.sampled_from((0.0, 0.0, float("nan"), float("inf"), -1e30)))
    x = x.to(dtype)[: int(np.prod(sizes, dtype=int))].reshape(sizes)
    if len(sizes) == 4 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if shape is None and sizes and draw(st.booleans()):
        x = x.transpose(0, len(sizes) - 1)
    return x.requires_grad_(dtype.is_floating_point and draw(st.booleans()))


_LENGTHS = dict.fromkeys("abcmk", (1, 2, 3, 4, 8, 17)) | {"n": (1, 2, 3)}
_LENGTHS |= dict.fromkeys("hw", (1, 4, 6, 8, 9))


@st.composite
def fitting(draw: st.DrawFn, shapes: str) -> tuple[torch.Tensor | None, ...]:
    """A tensor for each word, one size for each letter: mostly of one type, float32 behind a colon,
    maybe None behind a question mark, and now and then any tensor."""
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float64)))
    sizes: dict[str, int] = {}
    found: list[torch.Tensor | None] = []
    for word in shapes.split():
        letters = word.strip(":?")
        for letter in letters:
            if letter not in sizes:
                sizes[letter] = draw(st.sampled_from(_LENGTHS.get(letter) or (int(letter),)))
        if word.endswith("?") and draw(st.booleans()):
            found.append(None)
        elif draw(st.integers(0, 19)) == 0:
            found.append(draw(tensors()))
        else:
            kind = torch.float32 if word.startswith(":") else dtype
            found.append(draw(tensors([sizes[letter] for letter in letters], kind)))
    return tuple(found)


class Operation(NamedTuple):
    """What is called, with tensors of these shapes (see `fitting`) and named arguments, of which
    those ``needed`` are always there."""

    call: Callable[..., Any]
    shapes: str | st.SearchStrategy[Any]
    named: dict[str, st.SearchStrategy[Any]]
    needed: dict[str, st.SearchStrategy[Any]] = {}  # noqa: RUF012


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((*[usual] * 6 * len(others), *others))


def _batch() -> st.SearchStrategy[Any]:
    """Images, and indices that may lie outside."""
    index = st.lists(_mostly(0, 1, -1, 99), max_size=4).map(lambda i: torch.tensor(i).long())
    images = tensors((2, 5, 3, 1), torch.uint8) | tensors((2, 4, 4, 3), torch.uint8) | tensors()
    return st.tuples(images, index | tensors())


def _squashed(x: torch.Tensor, target: torch.Tensor, *rest: Any) -> torch.Tensor:
    return functional.binary_cross_entropy(torch.sigmoid(x), torch.sigmoid(target), *rest)


_discriminator = st.sampled_from((lambda x: x.square().sum((1, 2, 3)), lambda x: x, torch.sum))


def _penalty(penalty: Callable[..., Any]) -> Callable[..., Any]:
    def call(*images: torch.Tensor, D: Callable[..., Any]) -> torch.Tensor:
        return penalty(D, *images)

    return call


def _norm_conv(*tensors: Any, conv_pass: str, training: bool, activation: str) -> Any:
    settings = Settings(training, 0.1, 1e-5, activation, 0.2, 1)
    conv = norm_conv.Conv(conv_pass, *tensors[5:])
    return norm_conv.norm_conv(*tensors[:5], settings, conv)


_impl = _mostly("auto", "cpu", "torch", "none")
_activation = _mostly("leaky_relu", "relu", "none", "tanh", "sigmoid", "x")
_target = tensors() | st.floats()
_aims = {"loss": st.sampled_from((*losses.NAMES, "x")), "weight": st.floats(), "impl": _impl}
_kernels = {"method": _mostly("auto", "direct", "f22", "f42", "x"), "impl": _impl}
_sweep = {"stride": _mostly(2, 1, 0, 3, (2, 1)), "padding": _mostly(1, 0, -1, 2, "same")}
_spread = {"dilation": _mostly(1, 2, 0), "groups": _mostly(1, 2, 0)}
_norm = {
    "momentum": st.floats(0, 1), "eps": st.floats(0, 1), "activation": _activation,
    "negative_slope": st.floats(-1, 1), "impl": _impl,
}  # fmt: skip
_training = {"training": _mostly(True, False, True)}
_out = {"output_padding": _mostly((0, 0), (1, 0), (2, 2))}
_policy = st.lists(st.sampled_from(("color", "translation", "cutout", "x")), max_size=3)
F = functional
OPERATIONS = {
    name: Operation(*rest)
    for name, *rest in (
        ("gan_d_loss", F.gan_d_loss, "n n", _aims | {"real_target": _target}),
        ("gan_g_loss", F.gan_g_loss, "n n?", _aims | {"target": _target}),
        ("image_batch", F.image_batch, _batch(), {"flip": tensors(), "impl": _impl}),
        ("norm_act", F.norm_act, "nchw :c? :c? :c? :c?", _norm | {"groups": _mostly(1, 2, 0)},
         _training),
        ("conv2d", F.conv2d, "nbhw ab44 a?", _spread | _kernels, _sweep),
        ("conv_transpose2d", F.conv_transpose2d, "nahw ab44 b?", _spread | _kernels | _out, _sweep),
        ("conv_norm_act", F.conv_norm_act, "nbhw ab44 a? :a? :a? :a? :a?", _spread | _norm,
         _sweep | _training),
        ("conv_transpose_norm_act", F.conv_transpose_norm_act, "nahw ab44 b? :b? :b? :b? :b?",
         _spread | _norm | _out, _sweep | _training),
        ("upsample_conv2d", F.upsample_conv2d, "nbhw ab33 a?", _kernels),
        ("conv2d_avg_pool", F.conv2d_avg_pool, "nbhw ab33 a?", _kernels),
        ("binary_cross_entropy", F.binary_cross_entropy, "nc nc nc?", {}),
        ("binary_cross_entropy of a sigmoid", _squashed, "nc nc nc?", {}),
        ("diff_augment", F.diff_augment, "nchw", {}, {"policy": _policy}),
        ("r1_penalty", _penalty(F.r1_penalty), "nchw", {}, {"D": _discriminator}),
        ("gradient_penalty", _penalty(F.gradient_penalty), "nchw nchw", {}, {"D": _discriminator}),
        ("ops.strided_conv.up", strided_conv.up, "nahw ab44 b?", _kernels | _out),
        ("ops.strided_conv.down", strided_conv.down, "nbhw ab44 a?",
         _kernels | {"activation": _activation}),
        ("ops.layout.reordered", layout.reordered, "nchw", {},
         {"format": st.just(torch.channels_last)}),
        ("ops.norm_conv", _norm_conv, "nbhw :b? :b? :b? :b? ab44 a?", {},
         _training | {"conv_pass": st.just("down"), "activation": _activation}),
        ("ops.norm_conv, transposed", _norm_conv, "nahw :a? :a? :a? :a? ab44 b?", {},
         _training | {"conv_pass": st.just("up"), "activation": _activation}),
        ("ops.matrix_product", matrix_product.matrix_product, "nk km m?", {}),
        ("ops.few_positions.down", few_positions.down, "nbhw ab44 a?", {}),
        ("ops.few_positions.up", few_positions.up, "nahw ab44 b?", {}, _out),
        ("ops.torch_conv", torch_conv.conv, "nbhw ab44 a?", {},
         {"sweep": st.just(torch_conv.Sweep((2, 2), (1, 1)))}),
    )
}  # fmt: skip


def call_many(name: str, examples: int = EXAMPLES, number: int = 0) -> Outcome:
    """Drawn arguments through an operation, forward and backward.

    Raises:
        Exception: what the operation raised besides `TORCH_ERRORS`.
    """
    operation = OPERATIONS[name]

    def one(drawn: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        arguments, named = drawn
        try:
            found = operation.call(*arguments, **named)
            found = found.loss if hasattr(found, "loss") else found
            if found.requires_grad:
                found.float().sum().backward()
        except TORCH_ERRORS:
            return True
        return False

    shapes = operation.shapes
    drawn = fitting(shapes) if isinstance(shapes, str) else shapes
    keywords = st.fixed_dictionaries(operation.needed, optional=operation.named)
    return _many(st.tuples(drawn, keywords), one, examples, number)


# The long pass


def _until(seconds: float, run: Callable[[int], Outcome]) -> Outcome:
    """Passes with other numbers until the time is over, their sum."""
    total, number = Outcome(0, 0, 0.0), 1
    while total.seconds < seconds:
        found = run(number)
        total = Outcome(*(a + b for a, b in zip(total, found, strict=True)))
        number += 1
    return total


_HEAD = (
    "# Files and arguments drawn to do harm",
    "",
    "None crashed, hung, or raised anything but what it should; memory grew by less than "
    f"{MOST_BYTES >> 20} MiB. `python tests/fuzz.py`",
    "",
    "| target | examples | refused | CPU minutes |",
    "|---|---:|---:|---:|",
)


def _kept(path: Path | None, targets: Iterable[str]) -> dict[str, str]:
    """The rows of earlier runs in the table."""
    if path is None or not path.exists():
        return {}
    lines = path.read_text().splitlines()
    return {name: line for name in targets for line in lines if line.startswith(f"| {name} | ")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each row and writes the table; rows of other targets that it holds stay."""
    parser = argparse.ArgumentParser(description="Drawn files and arguments.")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a CPU, for each target")
    parser.add_argument("--only", nargs="*", help="names of targets")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="may hold other targets")
    options: Any = parser.parse_args(arguments)
    targets: dict[str, Callable[[int], Outcome]] = {
        f"reader of {reader.name}": lambda n, reader=reader: read_many(
            reader, 5 * reader.examples, n
        )
        for reader in READERS
    }
    targets |= {name: lambda n, name=name: command_many(name, 100, n) for name in COMMANDS}
    targets |= {name: lambda n, name=name: call_many(name, 500, n) for name in OPERATIONS}
    rows = _kept(options.out, targets)
    for name, run in targets.items():
        if options.only and not any(word in name for word in options.only):
            continue
        found = _until(60 * options.minutes, run)
        rows[name] = (
            f"| {name} | {found.examples:,} | {found.refused:,} | {found.seconds / 60:.1f} |"
        )
        print(rows[name], flush=True)
        if options.out:
            table = [rows[name] for name in targets if name in rows]
            options.out.write_text("\n".join((*_HEAD, *table, "")))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()  # every image that is not whole is named
    sys.exit(main())
