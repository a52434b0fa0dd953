"""An empty cache for every test of the data package."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the cache of this test is written to; it does not exist yet."""
    base = tmp_path / "own-cache"
    monkeypatch.setenv("PYGAN_CACHE", str(base))
    return base / "data"
