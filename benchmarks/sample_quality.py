"""How good are the samples of a run? ``python -m benchmarks.sample_quality RUN``.

A small classifier is trained on the run's real images, which need labels, and kept in pygan's
cache. In its penultimate features the Fréchet distance between samples and all real images is
taken (`pygan.metrics`), for the first and the last epoch saved, or with ``--every-epoch`` for all.
Beside it: how the classifier sorts 1,000 samples into classes, and their variety, the mean distance
between two samples in feature space relative to that between two real images; kernel distance,
precision, recall, density, coverage and copies in the same features (`pygan.metrics`).

The distance depends on the classifier, so only its ratio between epochs or runs means something.
It is reported against that of the real images themselves, one half against the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import pygan
from pygan import cli, data
from pygan.checkpoint import load_generator
from pygan.data.cache import Cache
from pygan.errors import UserError
from pygan.metrics import feature_statistics, frechet_distance, kernel_distance, neighbours
from pygan.run_folder import read_config, replace_file
from pygan.sample import generate, latents

PROG = "python -m benchmarks.sample_quality"
SORTED = 1000
BATCH = 500
MOST_RATIO, LARGEST_SHARE = 0.1, 0.3


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


def _train(real: data.ImageSet, labels: Tensor, recipe: Recipe) -> tuple[Classifier, float]:
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


def classifier(real: data.ImageSet, recipe: Recipe, folder: Path) -> tuple[Classifier, float]:
    """The classifier of ``real`` and its held-out accuracy, from ``folder`` where it is kept.

    Raises:
        UserError: the images have no labels.
    """
    if real.labels is None:
        raise UserError(
            f"the images of {real.name} have no labels, which the classifier needs; measure a run "
            "on fashion-mnist"
        )
    labels = torch.from_numpy(np.array(real.labels))
    key = hashlib.sha256(f"{real.fingerprint} {recipe}".encode()).hexdigest()[:32]
    path = folder / f"{key}.safetensors"
    if path.exists():
        model = Classifier(real.channels, int(labels.max()) + 1, recipe)
        with safe_open(path, "pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            accuracy = float(file.metadata()["accuracy"])
        return model.eval(), accuracy
    print(f"training the classifier on {len(real):,} images", file=sys.stderr, flush=True)
    model, accuracy = _train(real, labels, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    replace_file(path, save(state, {"accuracy": repr(accuracy)}))
    return model, accuracy


class Quality(NamedTuple):
    """What is said of a set of samples."""

    distance: float
    shares: list[float]
    variety: float
    kernel: float
    precision: float
    recall: float
    density: float
    coverage: float
    copies: float


def spread(features: Tensor) -> float:
    """Mean Euclidean distance between two different rows."""
    n = len(features)
    return torch.cdist(features.double(), features.double()).sum().item() / (n * (n - 1))


def quality(model: Classifier, samples: np.ndarray, real_features: Tensor) -> Quality:
    """Compare uint8 samples ``[N, H, W, C]`` with the features of the real images."""
    features, scores = describe_images(model, samples)
    found = scores[:SORTED].argmax(1)
    counts = torch.bincount(found, minlength=scores.shape[1])
    return Quality(
        distance=frechet_distance(features, real_features),
        shares=(counts / len(found)).tolist(),
        variety=spread(features[:SORTED]) / spread(real_features[:SORTED]),
        kernel=kernel_distance(features, real_features).mean,
        **neighbours(real_features, features)._asdict(),
    )


def draw(path: Path, count: int, bn: str, seed: int) -> np.ndarray:
    """``count`` samples of the generator in ``path``, uint8 ``[count, H, W, C]``."""
    generator, arguments = load_generator(path)
    pygan.fuse(generator)
    # Whole batches: with statistics of the batch, a short one would be drawn from another model.
    z = latents(BATCH * math.ceil(count / BATCH), arguments["nz"], seed)
    return np.concatenate([generate(generator, part, bn=bn) for part in z.split(BATCH)])[:count]


def saved_epochs(run: Path) -> dict[int, Path]:
    """Weights of G by epoch; .safetensors before .pth.

    Raises:
        UserError: none is saved.
    """
    found: dict[int, Path] = {}
    for suffix in ("pth", "safetensors"):
        for path in run.glob(f"netG_epoch_*.{suffix}"):
            number = path.stem.removeprefix("netG_epoch_")
            if number.isdigit():
                found[int(number)] = path
    if not found:
        raise UserError(
            f"{run} holds no netG_epoch_N.safetensors or .pth; give the folder of a run that has "
            "finished an epoch"
        )
    return dict(sorted(found.items()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quality of the chosen epochs of a run, as the JSON that is written."""
    epochs = saved_epochs(options.run)
    source = read_config(options.run)["config"]["data"]
    _, arguments = load_generator(next(iter(epochs.values())))
    size, channels = arguments["image_size"], arguments["channels"]
    real = data.load(source, image_size=size, channels=channels)
    recipe = Recipe()
    model, accuracy = classifier(real, recipe, Cache().folder.parent / "classifiers")
    features, _ = describe_images(model, real.images)
    halves = frechet_distance(*(feature_statistics(features[half::2].numpy()) for half in range(2)))
    chosen = list(epochs) if options.every_epoch else sorted({min(epochs), max(epochs)})
    rows = []
    for epoch in chosen:
        samples = draw(epochs[epoch], options.number, options.bn, options.seed)
        rows.append({"epoch": epoch, **quality(model, samples, features)._asdict()})
        rows[-1]["ratio"] = rows[-1]["distance"] / rows[0]["distance"]
    return {
        "data": source,
        "fingerprint": real.fingerprint,
        "real_images": len(real),
        "samples": options.number,
        "bn": options.bn,
        "seed": options.seed,
        "classifier": {"accuracy": accuracy, **asdict(recipe)},
        "distance_of_real_halves": halves,
        "epochs": rows,
    }


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table."""
    yield (
        f"classifier: {result['classifier']['accuracy']:.1%} of held-out images right; "
        f"{result['samples']:,} samples against {result['real_images']:,} real images "
        f"({result['data']}), batch norm: {result['bn']}"
    )
    yield (
        f"distance of one half of the real images to the other: "
        f"{result['distance_of_real_halves']:.2f}"
    )
    yield ""
    yield "epoch   distance   ratio to first   classes   largest   smallest   variety"
    for row in result["epochs"]:
        shares = row["shares"]
        yield (
            f"{row['epoch']:>5}   {row['distance']:>8.2f}   {row['ratio']:>14.3f}   "
            f"{sum(share > 0 for share in shares):>2} of {len(shares)}   {max(shares):>7.1%}   "
            f"{min(shares):>8.1%}   {row['variety']:>7.2f}"
        )
    yield ""
    yield "epoch   kernel distance   precision   recall   density   coverage   copies"
    for row in result["epochs"]:
        yield (
            f"{row['epoch']:>5}   {row['kernel']:>15.4g}   {row['precision']:>9.1%}   "
            f"{row['recall']:>6.1%}   {row['density']:>7.2f}   {row['coverage']:>8.1%}   "
            f"{row['copies']:>6.1%}"
        )
    last = result["epochs"][-1]
    passed = {
        f"ratio at most {MOST_RATIO}": last["ratio"] <= MOST_RATIO,
        "every class found": min(last["shares"]) > 0,
        f"none above {LARGEST_SHARE:.0%}": max(last["shares"]) <= LARGEST_SHARE,
    }
    yield ""
    verdicts = [f"{what}: {'yes' if ok else 'no'}" for what, ok in passed.items()]
    yield f"last epoch: {'; '.join(verdicts)}"


def command_line() -> cli.Parser:
    """The options that :func:`measure` takes."""
    parser = cli.Parser(prog=PROG, description="Quality of the samples of a run.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run of pygan.train")
    add("--every-epoch", action="store_true", help="all epochs saved, not only first and last")
    add("-n", "--number", type=cli.whole_number(SORTED), default=10_000, help="samples")
    add("--bn", choices=("eval", "batch"), default="eval", help="as in pygan.sample")
    add("--seed", type=cli.whole_number(0, cli.SEED_MAX), default=0, help="of the latents")
    add("--json", type=Path, metavar="OUT", help="write the figures there as well")
    return parser


def write(path: Path, result: dict[str, Any]) -> None:
    """Puts the figures of a command into a JSON file."""
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())


def run_command(
    parser: cli.Parser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], Iterator[str]],
    arguments: Sequence[str] | None,
) -> int:
    """Measures, prints the report, writes ``--json`` where asked; the exit status."""

    def body() -> int:
        options = parser.parse_args(arguments)
        result = measure(options)
        for line in report(result):
            print(line)
        if options.json:
            write(options.json, result)
        return 0

    return cli.run(parser.prog, body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(command_line(), measure, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
