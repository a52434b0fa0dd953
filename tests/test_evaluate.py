"""The quality of samples: spaces of features, what is said of a set, and the command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from training import train

from pygan import data, evaluate
from pygan.data import ImageSet
from pygan.errors import UserError
from pygan.metrics import describe, quality
from pygan.metrics.classifier import PACKAGED, Recipe, packaged
from pygan.run_folder import QUALITY


@pytest.fixture(scope="module")
def two_kinds() -> ImageSet:
    """Two classes, dark and bright: one epoch finds them."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400)
    images = generator.integers(0, 100, (400, 32, 32, 1)) + 150 * labels[:, None, None, None]
    return ImageSet(images.astype(np.uint8), labels, "made up", "abc")


def test_variety_is_the_mean_distance() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert quality.spread(rows) == pytest.approx((5 + 0 + 5) / 3)


def test_a_classifier_is_kept(
    two_kinds: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(widths=(4, 8), features=8, epochs=2, batch=20)
    model, accuracy = describe.classifier(two_kinds, recipe, tmp_path)
    assert accuracy == 1.0
    monkeypatch.setattr(describe, "train", lambda *_: pytest.fail("trained again"))
    again, kept = describe.classifier(two_kinds, recipe, tmp_path)
    assert kept == accuracy
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)

    space = describe.Space("it", "", lambda images: describe.describe_images(model, images))
    reference = quality.Reference(two_kinds, space)
    labels = two_kinds.labels
    assert labels is not None
    same = reference.quality(two_kinds.images)
    dark = reference.quality(two_kinds.images[labels == 0])
    assert same.distance == pytest.approx(0.0, abs=1e-6)
    assert same.variety == pytest.approx(1.0)
    assert same.shares == pytest.approx([1 - labels.mean(), labels.mean()])
    assert (same.precision, same.recall, same.coverage, same.copies) == (1, 1, 1, 1)
    assert dark.shares == [1.0, 0.0]
    assert dark.distance > 1.0 and dark.variety < same.variety
    assert dark.recall < 0.7 and dark.coverage < 0.7
    halves = reference.halves
    assert 0 < halves.distance < 0.1 * dark.distance


def test_the_packaged_classifier_knows_its_images() -> None:
    real = data.load()
    found = packaged(real)
    assert found is not None and PACKAGED.stat().st_size < 500_000
    model, accuracy = found
    assert real.labels is not None
    _, scores = describe.describe_images(model, real.images)
    right = (scores.argmax(1).numpy() == real.labels).mean()
    # It has seen most of these images; of those it has not, it knows `accuracy`.
    assert accuracy > 0.85 and right > accuracy
    assert packaged(ImageSet(real.images[:9], real.labels[:9], "others", "abc")) is None


def test_spaces_by_what_there_is(two_kinds: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = ImageSet(two_kinds.images, None, "photos", "abc")
    monkeypatch.setattr(describe, "has_inception", lambda: False)
    space = describe.space_of(photos)
    features, scores = space.describe(photos.images[:3])
    assert space.name == "pixels" and scores is None
    mean = photos.images[:3].reshape(3, 8, 4, 8, 4).mean((2, 4)).reshape(3, 64)
    np.testing.assert_allclose(features.numpy(), mean / 127.5 - 1, atol=1e-5)
    with pytest.raises(UserError, match="photos have no labels"):
        describe.space_of(photos, "classifier")
    with pytest.raises(UserError, match="needs torch-fidelity"):
        describe.space_of(photos, "inception")
    with pytest.raises(UserError, match="features are 'best'"):
        describe.space_of(photos, "best")


class _Extractor(torch.nn.Module):
    """Takes what torch-fidelity's extractor takes."""

    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        assert name == "inception-v3-compat" and features == ["2048"]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (x.float().mean((2, 3)),)


class _Offline(_Extractor):
    def __init__(self, *_: Any) -> None:
        raise OSError("no route to host")


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    extractors = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, extractors.__name__, extractors)
    return extractors


def test_inception_sees_three_channels(two_kinds: ImageSet, fidelity: ModuleType) -> None:
    fidelity.FeatureExtractorInceptionV3 = _Extractor  # type: ignore[attr-defined]
    photos = ImageSet(two_kinds.images, None, "photos", "abc")
    space = describe.space_of(photos)
    features, _ = space.describe(photos.images[:120])
    assert space.name == "inception" and features.shape == (120, 3)
    assert features[:, 0].numpy() == pytest.approx(photos.images[:120].mean((1, 2, 3)), rel=1e-5)


def test_inception_without_a_network(two_kinds: ImageSet, fidelity: ModuleType) -> None:
    fidelity.FeatureExtractorInceptionV3 = _Offline  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\)"):
        describe.space_of(two_kinds, "inception")


def test_large_sets_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "REAL", 50)
    images = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2)
    seen: list[np.ndarray] = []

    def described(given: np.ndarray) -> tuple[torch.Tensor, None]:
        seen.append(given[:, 0, 0, 0])
        return torch.from_numpy(given.reshape(len(given), -1)[:, :2].astype(np.float32)), None

    reference = quality.Reference(
        ImageSet(images, None, "many", "abc"), describe.Space("", "", described)
    )
    assert reference.count == 50 == len(set(seen[0]))
    # Not in the order of the set, whose first half may be another class than its second.
    halves = reference.halves
    assert halves.distance < 0.2 * images[:, 0, 0, 0].astype(float).var()


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two short epochs on images of its own, without labels."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 16, 16), "u1"))
    assert train(f"--data={folder / 'images.npy'}", "--epochs=2", f"--outf={folder / 'run'}") == 0
    return folder / "run"


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / QUALITY
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_last_epoch_is_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    words = [str(run), "-n", "1000", "--features", "pixels"]
    assert evaluate.main([*words, "--json", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "1,000 samples against 64 real images" in table[0]
    assert [row.split()[0] for row in table[2:]] == ["epoch", "real", "1"]
    result = json.loads(out.read_text())
    (kept,) = _rows(run)
    assert kept["epoch"] == 1 and kept["features"] == "pixels"
    assert kept["distance"] == result["epochs"][0]["distance"] > result["halves"]["distance"]
    # The same again, and nothing kept where that is not wanted.
    assert evaluate.main([*words, "--every-epoch", "--no-keep", "--json", str(out)]) == 0
    again = json.loads(out.read_text())
    assert [row["epoch"] for row in again["epochs"]] == [0, 1]
    assert again["epochs"][1] == result["epochs"][0]
    assert len(_rows(run)) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--epoch", "7"], "epoch 7 of .* is not saved; there are 0, 1"),
        (["--features", "classifier"], "have no labels"),
        (["-n", "10"], "-n"),
    ],
)
def test_bad_input(
    run: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(text, error)


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_epochs_of_a_run(tmp_path: Path) -> None:
    for name in ("netG_epoch_10.pth", "netG_epoch_2.pth", "netG_epoch_2.safetensors", "netG.pth"):
        (tmp_path / name).touch()
    found = evaluate.saved_epochs(tmp_path)
    assert {epoch: path.name for epoch, path in found.items()} == {
        2: "netG_epoch_2.safetensors",
        10: "netG_epoch_10.pth",
    }
    assert list(found) == [2, 10]
    with pytest.raises(UserError, match="holds no netG"):
        evaluate.saved_epochs(tmp_path / "missing")
