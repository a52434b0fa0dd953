"""What the CUDA sources promise: every launch names its stream, and none waits or allocates."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SOURCES = sorted(p for p in CUDA.iterdir() if p.suffix in (".cu", ".cuh"))


def arguments(text: str) -> list[str]:
    """The arguments between commas that no bracket encloses."""
    depth, found = 0, [""]
    for character in text:
        depth += (character in "(<[{") - (character in ")>]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [argument.strip() for argument in found]


def test_every_launch_names_its_stream() -> None:
    launches = [
        launch
        for source in SOURCES
        for launch in re.findall(r"<<<(.*?)>>>", source.read_text(), re.DOTALL)
    ]
    assert launches
    for launch in launches:
        assert len(arguments(launch)) == 4
        assert "stream" in arguments(launch)[3]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_waits_or_allocates(source: Path) -> None:
    text = source.read_text()
    assert not re.search(r"\bcuda\w*(Synchronize|Malloc|Memcpy|Memset|Free)\w*\(", text)
    assert not re.search(r"\b(new|malloc|atomic\w+|printf)\b *[\w(]", re.sub("//.*", "", text))


def test_stub_describes_the_extension(shim: ModuleType) -> None:
    stub = ast.parse((CUDA.parents[1] / "pygan" / "_cuda.pyi").read_text())
    described = {
        node.name: [argument.arg for argument in node.args.args]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    signatures = {
        name: re.findall(r"[(,] ?(\w+):", value.__doc__.splitlines()[0])
        for name, value in vars(shim).items()
        if callable(value) and not isinstance(value, type)
    }
    assert described == {k: v for k, v in signatures.items() if not k.startswith("_")}
