"""What the CUDA sources promise: every launch names its stream, and none waits or allocates."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
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


def calls(function: str, text: str) -> list[list[str]]:
    """The arguments of every call of a function."""
    found = []
    for start in re.finditer(rf"\b{function}\(", text):
        depth = 1
        for end in range(start.end(), len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                break
        found.append(arguments(text[start.end() : end]))
    return found


def test_every_call_hands_its_stream_to_the_launch() -> None:
    found = 0
    for source in SOURCES:
        if source.suffix == ".cu":
            text = source.read_text()
            launches = calls("launch", text)
            assert all(launch[3] == "stream" for launch in launches), source.name
            # What the extension offers takes it last.
            outcomes = re.findall(r"^Outcome \w+\((.*?)\) \{", text, re.DOTALL | re.MULTILINE)
            assert outcomes and all("Stream stream" in outcome for outcome in outcomes), source.name
            found += len(launches)
    assert found == sum(len(re.findall(r"\blaunch\(", p.read_text())) for p in SOURCES) - 1
    bindings = (ROOT / "csrc" / "bindings_cuda.cpp").read_text()
    assert bindings.count("pointer<void>(stream)") == bindings.count('py::arg("stream")') > 0


@pytest.mark.parametrize(
    "source", [*SOURCES, ROOT / "csrc" / "bindings_cuda.cpp"], ids=lambda path: path.name
)
def test_nothing_waits_or_allocates(source: Path) -> None:
    text = source.read_text()
    waits = r"\bcu(da)?[A-Z]?\w*(Synchronize|Malloc|Memcpy|Memset|Free|HostAlloc|StreamQuery)\w*\("
    assert not re.search(waits, text)
    assert not re.search(r"\b(new|malloc|atomic\w+|printf)\b *[\w(]", re.sub("//.*", "", text))


def test_every_architecture_is_compiled_by_the_checks() -> None:
    built = re.search(r"foreach\(target ([\d ]+)\)", (CUDA / "CMakeLists.txt").read_text())
    checked = re.search(r"for target in ([\d ]+);", (ROOT / ".ci" / "run").read_text())
    assert built and checked
    assert built[1].split() == checked[1].split()
    assert {"75", "80", "90", "100", "120"} <= set(built[1].split())


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
