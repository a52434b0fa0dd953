from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
sys.path.append(str(ROOT / "tests" / "ops"))  # accuracy.py
SOURCES = [
    *sorted((CSRC / "cuda").glob("*.cu")),
    CSRC / "cuda" / "status.cpp",
    CSRC / "bindings_cuda.cpp",
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor starts as NaN, so an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module ``_cuda`` whose kernels run on the CPU: the same sources, by a C++ compiler."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("shim")
    flags = [
        *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
        *("-Wno-unknown-pragmas", "-DPYGAN_HOST_SHIM", '-DPYGAN_CUDA_TARGETS="75"'),
        # A misaligned access of 16 bytes ends the process, as it does a kernel.
        *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"),
        *(f"-I{CSRC}", f"-I{Path(__file__).parent}"),
        *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
    ]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        level = "-O1" if source.suffix == ".cu" else "-O0"
        command = [compiler, level, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_shim(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """pygan takes the CUDA kernels for CPU tensors, and runs them on the CPU."""
    from pygan.ops import cuda_native, dispatch, gan_loss, image_batch

    monkeypatch.setattr(cuda_native, "load", lambda: shim)
    monkeypatch.setattr(dispatch, "supports_cuda", lambda *_: None)
    monkeypatch.setattr(image_batch, "_supports_cuda", lambda *_: None)
    monkeypatch.setattr(gan_loss, "_supports_cuda", lambda *_: None)
    return shim


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run: the same checks on a CPU, by the shim, and on a GPU."""
    if request.param == "shim":
        request.getfixturevalue("on_shim")
        return torch.device("cpu")
    from pygan.ops import cuda_native

    if (reason := cuda_native.reason()) is not None:
        pytest.skip(reason)
    return torch.device("cuda")
