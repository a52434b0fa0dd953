"""Hugging Face datasets, with the library where it is installed and with a stand-in everywhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pygan import data
from pygan.config import parse
from pygan.data import hub
from pygan.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), "u1")
CLASSES = [0, 1, 2, 0, 1, 2]


def refused(source: Path | str, pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        data.load(source, image_size=16)
    sentence = str(caught.value)
    assert re.search(pattern, sentence), sentence
    assert "\n" not in sentence and not sentence.endswith(".")


def same(source: Path | str, chosen: slice = slice(None)) -> None:
    found = data.load(source, image_size=16)
    np.testing.assert_array_equal(found.images, PIXELS[chosen])
    assert found.labels is not None and found.labels.tolist() == CLASSES[chosen]


# The library itself


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("datasets", reason="needs the library datasets")


@pytest.mark.slow
def test_saved_datasets(tmp_path: Path, library: Any) -> None:
    features = library.Features(
        {"picture": library.Image(), "kind": library.ClassLabel(names=["a", "b", "c"])}
    )
    rows = {"picture": [Image.fromarray(one) for one in PIXELS], "kind": CLASSES}
    whole = library.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    same(tmp_path / "one")
    same(f"hf:{tmp_path / 'one'}")
    splits = library.DatasetDict({"test": whole.select(range(2)), "train": whole})
    splits.save_to_disk(tmp_path / "two")
    same(tmp_path / "two")
    same(f"hf:{tmp_path / 'two'}:test", slice(2))
    refused(f"hf:{tmp_path / 'two'}:val", "no split 'val'; give one of test, train as hf:")
    whole.remove_columns("picture").save_to_disk(tmp_path / "none")
    refused(tmp_path / "none", "has no column of images, only kind; cast")
    (tmp_path / "one/data-00000-of-00001.arrow").write_bytes(b"broken")
    refused(tmp_path / "one", "the Hugging Face dataset .* cannot be read")


# A stand-in


class Kind:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Label:
    pass


class Table:
    """As much of `datasets.Dataset` as is used, on rows in memory."""

    split, _fingerprint = None, "1f"

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if isinstance(key, slice):
            return {name: [row[name] for row in self.rows[key]] for name in self.features}
        assert all(getattr(kind, "decode", False) is False for kind in self.features.values())
        return self.rows[key]

    def select_columns(self, names: list[str]) -> Table:
        rows = [{name: row[name] for name in names} for row in self.rows]
        return Table(rows, {name: self.features[name] for name in names})

    def cast_column(self, name: str, kind: Any) -> Table:
        return Table(self.rows, self.features | {name: kind})


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What can be loaded, by name."""
    there: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in there:
            raise ConnectionError(f"Couldn't reach '{name}'.\nmore")
        return there[name]

    module = ModuleType("datasets")
    vars(module).update(Image=Kind, ClassLabel=Label, load_dataset=load, load_from_disk=load)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return there


def table(labels: list[Any] | None = None) -> Table:
    rows = []
    for pixels, label in zip(PIXELS, labels or CLASSES, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"id": 7, "image": {"bytes": stream.getvalue(), "path": None}, "kind": label})
    return Table(rows, {"id": object(), "image": Kind(), "kind": Label()})


def test_a_dataset_of_the_hub(standing_in: dict[str, Any]) -> None:
    standing_in["who/what"] = {"train": table(), "test": table()}
    same("hf:who/what")
    same("hf:who/what:test")
    refused("hf:who/what:val", "no split 'val'; give one of train, test")
    standing_in["who/one"] = table()
    same("hf:who/one")
    refused("hf:who/one:train", "has no splits; leave out :train")
    standing_in["who/two"] = {"a": table(), "b": table()}
    refused("hf:who/two", "no split 'train'; give one of a, b")
    refused("hf:who/else", r"'who/else' cannot be read \(Couldn't reach 'who/else'\); give hf:NAME")


def test_a_saved_folder_needs_no_prefix(tmp_path: Path, standing_in: dict[str, Any]) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    standing_in[str(tmp_path)] = table()
    same(tmp_path)
    same(f"hf:{tmp_path}")


def test_rows_without_an_image_or_a_label(
    tmp_path: Path, standing_in: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    odd = standing_in["odd"] = table([0, 1, 2, 0, -1, None])
    odd.rows[0]["image"], odd.rows[1]["image"] = None, {"bytes": b"broken", "path": "1.png"}
    Image.fromarray(PIXELS[2]).save(tmp_path / "2.png")
    odd.rows[2]["image"] = {"bytes": None, "path": str(tmp_path / "2.png")}
    odd.rows[3]["image"] = {"bytes": None, "path": None}
    found = data.load("hf:odd", image_size=16)
    np.testing.assert_array_equal(found.images, PIXELS[[2, 4, 5]])
    assert [name for name, _ in found.skipped] == ["image 0", "image 1", "image 3"]
    assert found.labels is None and "not every image has a label" in caplog.text


def test_columns(standing_in: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    standing_in["none"] = Table([{"id": 7}], {"id": object()})
    refused("hf:none", "has no column of images, only id; cast the one that holds them")
    standing_in["empty"] = Table([], {"image": Kind()})
    refused("hf:empty", "holds no rows")
    two = standing_in["two"] = table()
    two.features["mask"] = Kind()
    for row in two.rows:
        row["mask"] = None
    same("hf:two")
    assert "image gives the images" in caplog.text


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:who/what", "needs the library datasets; install it with pip install datasets")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.split_name("hf:who/what") == ("who/what", None)
    assert hub.split_name("hf:who/what:test") == ("who/what", "test")
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.split_name("hf:a:b") == ("a:b", None)
    assert hub.split_name("hf:a:b:test") == ("a:b", "test")
    assert parse(["--data=hf:a:b:test"]).given["data"] == f"hf:{tmp_path / 'a:b'}:test"
    assert parse(["--data=hf:who/what"]).given["data"] == "hf:who/what"
    assert parse(["--data=s/{0..9}.tar"]).given["data"] == str(tmp_path / "s/{0..9}.tar")
