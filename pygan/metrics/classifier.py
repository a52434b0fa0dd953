"""A small classifier of labelled images, in whose penultimate features samples are compared.

The package holds the one of its embedded images: ``packaged`` reads it, and
``python -m pygan.metrics.classifier --out FILE.safetensors`` trains it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from pygan import cli, data
from pygan.errors import UserError
from pygan.run_folder import check_writable, replace_file

if TYPE_CHECKING:
    from pygan.data import ImageSet

PROG = "python -m pygan.metrics.classifier"
PACKAGED = Path(__file__).with_name("fashion_mnist.safetensors")
BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """Everything that the classifier depends on besides the images: the key of its cache entry."""

    widths: tuple[int, ...] = (32, 64, 128)
    features: int = 64
    epochs: int = 12
    batch: int = 100
    lr: float = 2e-3
    weight_decay: float = 5e-4
    held_out: float = 0.15
    seed: int = 0
    revision: int = 1


class Classifier(nn.Module):
    """``x [N, C, S, S]`` in [-1, 1] -> class scores ``[N, classes]``; `features` the layer before.

    Three strided 3x3 convolutions with batch norm, a 2x2 average map, one hidden layer.
    """

    def __init__(self, channels: int, classes: int, recipe: Recipe) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for wider in recipe.widths:
            layers += [nn.Conv2d(width, wider, 3, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(wider), nn.ReLU(True)]
            width = wider
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        layers += [nn.Linear(4 * width, recipe.features), nn.ReLU(True)]
        self.features = nn.Sequential(*layers)
        self.scores = nn.Linear(recipe.features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.features(x))


def scaled(images: np.ndarray) -> Tensor:
    """uint8 ``[N, H, W, C]`` to float32 ``[N, C, H, W]`` in [-1, 1]."""
    # A copy: a part of a memory map is read-only, which torch warns about.
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(real: data.ImageSet, labels: Tensor, recipe: Recipe) -> tuple[Classifier, float]:
    """A classifier trained on most of the images, and its accuracy on the rest."""
    order = np.random.default_rng(recipe.seed).permutation(len(real))
    cut = round(len(real) * recipe.held_out)
    held_out, used = order[:cut], order[cut:]
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = Classifier(real.channels, int(labels.max()) + 1, recipe)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(
            model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        steps = recipe.epochs * (len(used) // recipe.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
        batches = data.BatchOrder(len(used), recipe.batch, recipe.seed)
        for step in range(steps):
            index = used[batches.index(step)]
            x = scaled(real.images[index])
            flip = torch.rand(len(x), 1, 1, 1) < 0.5
            loss = F.cross_entropy(model(torch.where(flip, x.flip(3), x)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    _, scores = describe_images(model, real.images[held_out])
    accuracy = (scores.argmax(1) == labels[held_out]).float().mean().item()
    return model, accuracy


def describe_images(model: Classifier, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features ``[N, d]`` and class scores ``[N, classes]`` of uint8 ``[N, H, W, C]``."""
    features = []
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            features.append(model.features(scaled(images[start : start + BATCH])))
        joined = torch.cat(features)
        return joined, model.scores(joined)


def write(path: Path, model: Classifier, about: Mapping[str, str]) -> None:
    """Puts weights and what is known about them into a .safetensors file."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    replace_file(path, save(state, dict(about)))


def read(path: Path, recipe: Recipe) -> tuple[Classifier, dict[str, str]]:
    """A classifier in eval mode and what was written about it; half precision becomes float32."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = dict(file.metadata())
    channels, classes = state["features.0.weight"].shape[1], len(state["scores.bias"])
    model = Classifier(channels, classes, recipe)
    model.load_state_dict(state)
    return model.eval(), about


def packaged(real: ImageSet) -> tuple[Classifier, float] | None:
    """The package's classifier and its accuracy on held-out images, if it was trained on these."""
    model, about = read(PACKAGED, Recipe())
    return (model, float(about["accuracy"])) if about["fingerprint"] == real.fingerprint else None


def _train_packaged(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Train the classifier of the embedded images.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    options = parser.parse_args(arguments)
    check_writable(options.out, "--out")
    real = data.load()
    if real.labels is None:
        raise UserError(f"the images of {real.name} have no labels, which the classifier needs")
    model, accuracy = train(real, torch.from_numpy(np.array(real.labels)), Recipe())
    # Half precision: features differ by less than their own rounding matters.
    about = {"accuracy": repr(accuracy), "fingerprint": real.fingerprint}
    write(options.out, model.half(), about)
    print(f"{accuracy:.1%} of the held-out images are classified right")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _train_packaged(arguments))


if __name__ == "__main__":
    sys.exit(main())
