"""Hugging Face datasets, through the library `datasets`: those it has saved, and those of its hub.

Images are found by the features of the dataset and read at random from its Arrow files, which are
mapped, not loaded. A dataset of the hub is downloaded whole before the first image is read: the
library's own streaming knows neither how many images there are nor how to go to one of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pygan.data import decode
from pygan.data.image_list import ImageList, Numbered
from pygan.errors import UserError

PREFIX = "hf:"
log = logging.getLogger("pygan.data")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a dataset, or of a dictionary of its splits, wrote this folder."""
    if (folder / "dataset_dict.json").is_file():
        return True
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def split_name(name: str) -> tuple[str, str | None]:
    """The name or path, and the split, of `hf:NAME_OR_PATH[:SPLIT]`."""
    where = name.removeprefix(PREFIX)
    place, colon, split = where.rpartition(":")
    if not colon or Path(where).expanduser().exists():
        place, split = where, ""
    path = Path(place).expanduser()
    return (str(path) if path.exists() else place), split or None


def absolute(name: str) -> str:
    """`name` with its path, if it is one, made absolute."""
    where, split = split_name(name)
    where = str(Path(where).absolute()) if Path(where).exists() else where
    return f"{PREFIX}{where}" + (f":{split}" if split else "")


def open_dataset(where: str, split: str | None) -> Any:
    """The `datasets.Dataset` in a folder or of the hub.

    Args:
        where: a folder that `save_to_disk` wrote, or whatever `load_dataset` takes.
        split: None for the only one, or else "train".

    Raises:
        UserError: the library is not installed, there is no such dataset or split, or it cannot
            be read.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{where!r} is a Hugging Face dataset, which needs the library datasets; install it "
            "with pip install datasets"
        ) from None
    try:
        saved = is_saved(Path(where))
        found = datasets.load_from_disk(where) if saved else datasets.load_dataset(where)
    except Exception as error:
        # Of the network, of files, of parsers.
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"the Hugging Face dataset {where!r} cannot be read ({reason}); give "
            f"{PREFIX}NAME[:SPLIT] of one that datasets.load_dataset loads, or a folder that "
            "save_to_disk wrote"
        ) from error
    return _split(found, where, split)


def _split(found: Any, where: str, split: str | None) -> Any:
    if not isinstance(found, dict):
        if split is not None and str(found.split) != split:
            raise UserError(f"{where!r} has no splits; leave out :{split}")
        return found
    wanted = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if wanted not in found:
        raise UserError(
            f"{where!r} has no split {wanted!r}; give one of {', '.join(found)} as "
            f"{PREFIX}{where}:SPLIT"
        )
    return found[wanted]


def image_list(dataset: Any, name: str) -> ImageList:
    """The images of a `datasets.Dataset`, and its class labels.

    Raises:
        UserError: no column holds images, or there are no rows.
    """
    import datasets

    columns = dataset.features
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    if not images:
        raise UserError(
            f"{name!r} has no column of images, only {', '.join(columns) or 'none at all'}; cast "
            "the one that holds them to datasets.Image"
        )
    if not len(dataset):
        raise UserError(f"{name!r} holds no rows; give a dataset with images in it")
    for kind, keys in (("images", images), ("class labels", labels)):
        if len(keys) > 1:
            log.warning("%s: of the columns %s, %s gives the %s", name, keys, keys[0], kind)
    # As they are stored: what decodes them here knows the size that is wanted.
    stored = dataset.select_columns(images[:1])
    stored = stored.cast_column(images[0], datasets.Image(decode=False))

    def read(i: int, size: int) -> Image.Image:
        cell = stored[i][images[0]] or {}
        if cell.get("bytes") is not None:
            return decode.read(BytesIO(cell["bytes"]), size)
        if cell.get("path") is None:
            raise ValueError("is empty")
        with open(cell["path"], "rb") as file:
            return decode.read(file, size)

    def labels_of(kept: Sequence[int]) -> np.ndarray | None:
        if not labels:
            return None
        found = dataset.select_columns(labels[:1])[:][labels[0]]
        chosen = [found[i] for i in kept]
        # None and -1 are for images whose class is not told.
        if any(label is None or label < 0 for label in chosen):
            log.warning("%s: not every image has a label, and they are not used", name)
            return None
        return np.array(chosen, np.int64)

    return ImageList(Numbered(len(dataset)), read, labels_of)


def stamp(dataset: Any) -> str:
    """Says which data it is: the library's own fingerprint, and the number of rows."""
    return json.dumps([str(dataset._fingerprint), len(dataset)])
