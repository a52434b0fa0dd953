"""What every test gets: its own cache folder, fixed seeds, and skips that say why."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# The benchmarks are no installed package. Last, so that the pygan that is installed is tested.
sys.path.append(str(Path(__file__).parents[1]))

settings.register_profile("pygan", deadline=None, derandomize=True, database=None)
settings.load_profile("pygan")


def missing_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs an NVIDIA GPU, and torch sees none"


def missing_extension() -> str | None:
    # Where the extension is required, its tests run, and fail without it.
    if os.environ.get("PYGAN_EXT") == "require":
        return None
    from pygan.ops import native

    return None if native.load() else f"needs the native extension: {native.reason()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in {"gpu": missing_gpu, "native": missing_extension}.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded data goes to a folder of these tests, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of the tests are small; their layers run by the kernels all the same."""
    from pygan import pending

    monkeypatch.setattr(pending, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(pending, "LEAST_MACS", 0)
    monkeypatch.setattr(pending, "LEAST_NORMED", 0)
    monkeypatch.setattr(pending, "LEAST_CONVOLVED", 0)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
