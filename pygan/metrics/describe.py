"""Spaces in which images are compared: features of a network, or averaged pixels."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pygan.data import ImageSet
from pygan.data.cache import Cache
from pygan.errors import UserError
from pygan.metrics.classifier import (
    BATCH,
    Recipe,
    describe_images,
    packaged,
    read,
    scaled,
    train,
    write,
)

SPACES = ("auto", "classifier", "inception", "pixels")
PIXELS = 8  # to a side
INCEPTION_BATCH = 50


class Space(NamedTuple):
    """``describe`` turns uint8 ``[N, H, W, C]`` into float32 features ``[N, d]``, and scores of
    classes ``[N, classes]`` where there are any."""

    name: str
    about: str
    describe: Callable[[np.ndarray], tuple[Tensor, Tensor | None]]


def classifier(real: ImageSet, recipe: Recipe, folder: Path) -> tuple[Any, float]:
    """The classifier of ``real`` and its held-out accuracy: the package's, or one from ``folder``,
    where it is kept once it has been trained.

    Raises:
        UserError: the images have no labels.
    """
    if (found := packaged(real)) is not None and recipe == Recipe():
        return found
    if real.labels is None:
        raise UserError(
            f"the images of {real.name} have no labels, which a classifier needs; give --features "
            "inception or pixels"
        )
    key = hashlib.sha256(f"{real.fingerprint} {recipe}".encode()).hexdigest()[:32]
    path = folder / f"{key}.safetensors"
    if path.exists():
        model, about = read(path, recipe)
        return model, float(about["accuracy"])
    print(f"training a classifier of {len(real):,} images", file=sys.stderr, flush=True)
    model, accuracy = train(real, torch.from_numpy(np.array(real.labels)), recipe)
    folder.mkdir(parents=True, exist_ok=True)
    write(path, model, {"accuracy": repr(accuracy)})
    return model, accuracy


def _of_classifier(real: ImageSet) -> Space:
    model, accuracy = classifier(real, Recipe(), Cache().folder.parent / "classifiers")
    about = f"a classifier that sorts {accuracy:.1%} of held-out images right"
    return Space("classifier", about, lambda images: describe_images(model, images))


def _pixels(images: np.ndarray) -> tuple[Tensor, None]:
    found = [
        F.adaptive_avg_pool2d(scaled(images[start : start + BATCH]), PIXELS).flatten(1)
        for start in range(0, len(images), BATCH)
    ]
    return torch.cat(found), None


def has_inception() -> bool:
    """Whether torch-fidelity is installed."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        return False
    return True


def _inception() -> Space:
    if not has_inception():
        raise UserError(
            "--features inception needs torch-fidelity; install it with pip install torch-fidelity"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    except OSError as error:
        raise UserError(
            f"the weights of Inception cannot be downloaded ({error}); see to the connection, or "
            "give --features classifier or pixels"
        ) from None

    def describe(images: np.ndarray) -> tuple[Tensor, None]:
        found = []
        with torch.no_grad():
            for start in range(0, len(images), INCEPTION_BATCH):
                part = torch.from_numpy(np.array(images[start : start + INCEPTION_BATCH]))
                (features,) = network(part.permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
                found.append(features)
        return torch.cat(found), None

    return Space("inception", "Inception-v3 of torch-fidelity, pooled to 2,048 features", describe)


def space_of(real: ImageSet, name: str = "auto") -> Space:
    """The space in which images are set against ``real``.

    Args:
        real: the images.
        name: "classifier" (its penultimate layer), "inception", "pixels" (averaged to 8x8), or
            "auto": the classifier where there are labels, else Inception where torch-fidelity is
            installed, else pixels.

    Raises:
        UserError: an unknown name, no labels for a classifier, or no Inception.
    """
    if name not in SPACES:
        raise UserError(f"features are {name!r}; they are {', '.join(SPACES)}")
    if name == "auto":
        name = "pixels" if real.labels is None else "classifier"
        if name == "pixels" and has_inception():
            name = "inception"
    if name == "inception":
        return _inception()
    if name == "pixels":
        return Space("pixels", f"pixels averaged to {PIXELS}x{PIXELS}", _pixels)
    return _of_classifier(real)
