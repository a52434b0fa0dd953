"""Weights and the state of a run as files, read without ever unpickling an object.

The state of a run is one safetensors file: every tensor under a number, and beside them a JSON
tree that says where each belongs and holds the plain values, with a SHA-256 digest of it all.
Weights go out twice: `.pth`, a plain state_dict with the names of the well-known DCGAN example,
and `.safetensors`, whose metadata says which network they are of.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pygan import cli
from pygan.data.arrays import check_room
from pygan.data.image_list import SIZES
from pygan.errors import UserError, printable
from pygan.models import Generator
from pygan.run_folder import PREVIOUS, RESUME

_METADATA = "pygan"
_TREE = "run-state-1"
_ARGUMENTS = {"image_size", "channels", "nz", "ngf"}  # of a DCGAN generator


class Damaged(ValueError):
    """A file that is not what its name says; the message is the reason alone."""


def _still(tensor: Tensor) -> Tensor:
    """A copy on the CPU in plain contiguous order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _pack(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> bytes:
    # One metadata entry: the format keeps entries in no particular order, and equal contents
    # are to be equal bytes.
    text = json.dumps(content)
    metadata = {"content": content, "digest": _digest(text, tensors)}
    return safetensors.torch.save(dict(tensors), {_METADATA: json.dumps(metadata)})


def _unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and content of a safetensors file; content is None in one that is not of pygan.

    Raises:
        Damaged: it is no safetensors file, or not the bytes that were written.
        OSError: it cannot be read.
    """
    with open(path, "rb"):
        pass
    try:
        with safe_open(path, framework="pt") as file:
            # .clone(): the file is mapped, and may be replaced while its tensors are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_METADATA)
    except (SafetensorError, ValueError) as error:
        raise Damaged(" ".join(str(error).split())) from None
    if text is None:
        return tensors, None
    try:
        metadata = json.loads(text)
        content, digest = metadata["content"], metadata["digest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged("its metadata cannot be read") from None
    if _digest(json.dumps(content), tensors) != digest:
        raise Damaged("its digest does not match its content")
    return tensors, content


def _plant(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved out to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _still(value)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _plant(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plant(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_plant(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} has no place in the state of a run")


def _regrow(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_regrow(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_regrow(item, tensors) for item in content)
    return {key: _regrow(item, tensors) for key, item in content}


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Nested dicts, lists and tuples of tensors and plain values as the bytes of a resume file.

    Tensors keep dtype and shape and come back on the CPU, contiguous; dict keys keep their type.

    Raises:
        TypeError: a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    tree = _plant(state, tensors)
    return _pack(tensors, {"kind": _TREE, "tree": tree})


def read_state(path: Path) -> dict[str, Any]:
    """What `pack_state` packed.

    Raises:
        UserError: the file is missing, damaged, or not the state of a run.
    """
    advice = (
        f"restore it from a copy, or start a new run from its weights with --netG and --netD "
        f"{path.parent}/net[GD]_epoch_*.pth"
    )
    try:
        tensors, content = _unpack(path)
    except Damaged as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    if not isinstance(content, dict) or content.get("kind") != _TREE:
        raise UserError(f"{path} is not the state of a pygan run; {advice}")
    try:
        state = _regrow(content["tree"], tensors)
    except (AttributeError, KeyError, TypeError, ValueError):
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged (its values are in no order); {advice}")
    return state


def read_newest(run: Path) -> tuple[dict[str, Any], str | None]:
    """The state of a run: its last one, or if that cannot be read the one before, and then a
    sentence that says so.

    Raises:
        UserError: neither can be read; about the last one.
    """
    try:
        return read_state(run / RESUME), None
    except UserError as error:
        reason = str(error).partition(";")[0]
        try:
            state = read_state(run / PREVIOUS)
        except UserError:
            raise error from None
    return state, f"{reason}; the run goes on from the checkpoint before it, {run / PREVIOUS}"


def nonfinite(state: Any, name: str = "") -> str | None:
    """Where in a nested state the first NaN or infinity is, or None."""
    if isinstance(state, Tensor):
        bad = state.is_floating_point() and not bool(torch.isfinite(state).all())
        return name if bad else None
    items: list[tuple[Any, Any]] = []
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, (list, tuple)):
        items = list(enumerate(state))
    found = (nonfinite(item, f"{name}.{key}" if name else str(key)) for key, item in items)
    return next((where for where in found if where), None)


def pack_weights(module: nn.Module, about: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """A module's parameters and buffers as the bytes of a `.pth` and of a `.safetensors` file.

    Args:
        module: fused or not; the names are those of the plain module.
        about: JSON values kept in the `.safetensors` file, e.g. the network and its arguments.
    """
    tensors = {name: _still(tensor) for name, tensor in module.state_dict().items()}
    pth = io.BytesIO()
    torch.save(tensors, pth)
    return pth.getvalue(), _pack(tensors, {"kind": "weights", **about})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and buffers by name, and what the file says about them (may be empty).

    Reads `.safetensors`, and anything else as a state_dict written by torch.save; the prefix
    `module.` that DataParallel puts before every name is dropped.

    Raises:
        UserError: the file is missing, damaged, or holds something other than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            state, about = _unpack(path)
        else:
            _check_packed(path)
            state, about = torch.load(path, map_location="cpu", weights_only=True), None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a .safetensors file or a .pth file "
            "with a state_dict"
        ) from None
    except Exception as error:
        # A stream that is no pickle makes torch's reader fail in any way, and its own message goes
        # on for a paragraph about how to load it unsafely.
        reason = str(error) if isinstance(error, Damaged) else "torch cannot read it as tensors"
        raise UserError(
            f"{path} is damaged or holds more than weights ({reason}); give a .safetensors file "
            "or a .pth file with a state_dict"
        ) from None
    named = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and _is_whole(value)
        for name, value in state.items()
    )
    if not named or not state:
        raise UserError(
            f"{path} holds something else than named tensors; give the file of a network's "
            "state_dict"
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state), about if isinstance(about, dict) else {}


def _check_packed(path: Path) -> None:
    """Raises Damaged for a zip that unpacks to more than memory holds; torch.save packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    try:
        check_room(size)
    except ValueError as error:
        raise Damaged(str(error)) from None


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is of numbers that are all in the file: a view may repeat few of them without
    end, and a network of its size would take all memory."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.is_cpu:
        return False
    size = tensor.numel() * tensor.element_size()
    return not tensor.is_complex() and size <= tensor.untyped_storage().nbytes()


def fill(module: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Copies weights into a module, in place.

    Raises:
        UserError: names or shapes differ; the first difference is named.
    """
    check_fit(module, state, source)
    module.load_state_dict(dict(state))


def check_fit(module: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Whether `fill` may copy them.

    Raises:
        UserError: names or shapes differ; the first difference is named.
    """
    mine = module.state_dict()
    for name in [*mine, *state]:
        # Files from before torch 1.0 do not count the batches; batch norm then starts at zero.
        if name in mine and name not in state and not name.endswith("num_batches_tracked"):
            raise UserError(f"{source} lacks {name}; its network is another, so give its own flags")
        if name in state and name not in mine:
            raise UserError(
                f"{source} has {printable(name)}, which this network has not; give the flags of "
                "its network"
            )
        if name in state and state[name].shape != mine[name].shape:
            raise UserError(
                f"{source} has {name} of shape {list(state[name].shape)}, but this network needs "
                f"{list(mine[name].shape)}; give the flags (--image-size, --nz, --ngf, --ndf) of "
                "the network that was saved"
            )


def _epoch(path: Path) -> int:
    match = re.search(r"_epoch_(\d+)\.", path.name)
    return int(match[1]) if match else -1


def find_generator(source: Path) -> Path:
    """The weights file that `source` means: itself, or the newest netG of a run folder.

    Raises:
        UserError: there is none.
    """
    if not source.is_dir():
        return source
    found = [*source.glob("netG_epoch_*.safetensors"), *source.glob("netG_epoch_*.pth")]
    if found:
        return max(found, key=lambda path: (_epoch(path), path.suffix == ".safetensors"))
    if (source / RESUME).exists():
        raise UserError(
            f"{source} holds a run that has not finished an epoch; let it train on with "
            f"python -m pygan.train --resume {source}"
        )
    raise UserError(
        f"{source} holds no netG_epoch_*.safetensors or .pth; give the folder of a run, or a file "
        "of weights"
    )


def dcgan_arguments(state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """`image_size, channels, nz, ngf` of the DCGAN generator with these weights, or None.

    Every layer is a ConvTranspose2d `main.N.weight [in, out, 4, 4]`; the widths halve from
    `ngf * image_size / 8` after the first to `ngf` before the last.
    """
    found = {
        int(match[1]): tuple(tensor.shape)
        for name, tensor in state.items()
        if (match := re.fullmatch(r"main\.(\d{1,3})\.weight", name)) and tensor.dim() == 4
    }
    shapes = [found[number] for number in sorted(found)]
    if not 3 <= len(shapes) <= 7 or any(shape[2:] != (4, 4) for shape in shapes):
        return None
    ngf = shapes[-1][0]
    widths = [ngf << level for level in reversed(range(len(shapes) - 1))]
    if [shape[0] for shape in shapes[1:]] != widths or [s[1] for s in shapes[:-1]] != widths:
        return None
    size = 4 << (len(shapes) - 1)
    return {"image_size": size, "channels": shapes[-1][1], "nz": shapes[0][0], "ngf": ngf}


def load_generator(source: Path) -> tuple[Generator, dict[str, int]]:
    """The generator of a run folder, a `.safetensors` file or a plain `.pth` state_dict.

    The architecture comes from the metadata where pygan wrote it, otherwise from the shapes.
    Returned with it: its arguments `image_size, channels, nz, ngf`.

    Raises:
        UserError: no weights there, or not those of a DCGAN generator.
    """
    path = find_generator(source)
    state, about = read_weights(path)
    arguments = about.get("arguments") if about.get("network") == "dcgan.Generator" else None
    arguments = arguments or dcgan_arguments(state)
    if not _are_arguments(arguments):
        first = ", ".join(f"{n} {list(t.shape)}" for n, t in list(state.items())[:2])
        raise UserError(
            f"{path} does not hold a DCGAN generator (its first tensors are "
            f"{printable(first)}); give the weights of netG"
        )
    # What is in the file has to fit before memory is taken for it.
    with torch.device("meta"):
        try:
            described = Generator(**arguments)
        except (RuntimeError, OverflowError):  # more elements than torch counts
            raise UserError(
                f"{path} describes a generator with nz {arguments['nz']} and ngf "
                f"{arguments['ngf']}, which has more weights than any file; give the weights of "
                "netG as they were saved"
            ) from None
        check_fit(described, state, path)
    generator = Generator(**arguments)
    fill(generator, state, path)
    return generator, arguments


def _are_arguments(arguments: Any) -> TypeGuard[dict[str, int]]:
    """Whether a DCGAN generator takes them."""
    if not isinstance(arguments, dict) or arguments.keys() != _ARGUMENTS:
        return False
    if not all(type(value) is int and 0 < value <= cli.INT_MAX for value in arguments.values()):
        return False
    return arguments["image_size"] in SIZES and arguments["channels"] in (1, 3)
