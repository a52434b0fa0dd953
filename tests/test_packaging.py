"""What is built and what is installed: the extension's ELF file, the wheel, PYGAN_EXT."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pygan.ops import native

ROOT = Path(__file__).resolve().parents[1]
LINUX_X86_64 = sys.platform == "linux" and platform.machine() == "x86_64"
needs_linux_x86_64 = pytest.mark.skipif(
    not LINUX_X86_64, reason="the extension is built on Linux x86-64 only"
)
# The finder of an editable installation also answers for the modules that another copy lacks.
ONLY_THIS_COPY = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""
NOT_SOURCES = (
    ".*",
    "*.egg-info",
    "*.so",
    "__pycache__",
    "_build_log.txt",
    "_cuda_build_log.txt",
    "build",
    "dist",
    "runs",
)


def run(
    *command: str | Path, cwd: Path, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and a clean PYGAN_EXT, and take what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYGAN_EXT", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without anything built."""
    copy = tmp_path_factory.mktemp("sources") / "pygan"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


def elf_sections(path: Path) -> dict[str, bytes]:
    """The named sections of a 64-bit little-endian ELF file (System V ABI, chapter 4)."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    names = headers[names_index][4]
    return {
        string_at(data, names + name): data[offset : offset + length]
        for name, _, _, _, offset, length in headers
    }


def string_at(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


@pytest.fixture(scope="module")
def extension() -> dict[str, bytes]:
    spec = importlib.util.find_spec("pygan._C")
    assert spec is not None and spec.origin is not None
    return elf_sections(Path(spec.origin))


@pytest.mark.native
def test_extension_needs_no_torch_and_no_openmp(extension: dict[str, bytes]) -> None:
    entries = struct.iter_unpack("<QQ", extension[".dynamic"])
    needed = [string_at(extension[".dynstr"], value) for tag, value in entries if tag == 1]
    assert "libc.so.6" in needed
    foreign = re.compile(r"torch|c10|python|gomp|iomp|omp\.|cudart")
    assert [name for name in needed if foreign.search(name)] == []


@pytest.mark.native
def test_extension_exports_only_its_init_function(extension: dict[str, bytes]) -> None:
    symbols = struct.iter_unpack("<IBBHQQ", extension[".dynsym"])
    defined = [
        string_at(extension[".dynstr"], name)
        for name, info, _, section, _, _ in symbols
        if section != 0 and info >> 4 != 0  # in this file, and not local
    ]
    assert defined == ["PyInit__C"]


@pytest.mark.native
def test_extension_imports_without_torch(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("pygan._C")
    assert spec is not None and spec.origin is not None
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pygan._C", {spec.origin!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(*module.isas())
"""
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    expected = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    }
    assert result.stdout.split() == [name for name, needs in expected.items() if needs <= flags]


@needs_linux_x86_64
def test_auto_survives_a_broken_cuda_compiler(sources: Path, tmp_path: Path) -> None:
    result = build(sources, tmp_path, PYGAN_EXT="auto", CXX="/bin/false", CUDACXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert "installed without its CUDA extension" in result.stderr
    assert "/bin/false" in (tmp_path / "pygan" / "_cuda_build_log.txt").read_text()


@pytest.mark.native
def test_stub_describes_the_extension() -> None:
    stub = ast.parse((ROOT / "pygan" / "_C.pyi").read_text())
    described = {
        node.name: [argument.arg for argument in node.args.args]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    module = native.load()
    # The first line that pybind11 writes: "name(first: int, second: float) -> None".
    signatures = {
        name: re.findall(r"[(,] ?(\w+):", value.__doc__.splitlines()[0])
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, type)
    }
    assert described == {k: v for k, v in signatures.items() if not k.startswith("_")}


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, built in place and into dist/*.whl."""
    folder = tmp_path_factory.mktemp("built")
    packed = run("setup.py", "-q", "sdist", "-d", folder, cwd=sources)
    assert packed.returncode == 0, packed.stderr
    (archive,) = folder.glob("*.tar.gz")
    run("-m", "tarfile", "-e", archive, folder, cwd=folder).check_returncode()
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    (unpacked / "pygan" / "_build_log.txt").write_text("An earlier build failed.\n")
    # What nvcc makes is no part of these tests, and takes as long as all the rest.
    made = run(
        *("setup.py", "build_ext", "--inplace", "bdist_wheel"),
        cwd=unpacked,
        PYGAN_EXT="require",
        CUDACXX="no-nvcc",
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return unpacked


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = (built / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
@pytest.mark.native
class TestBuild:
    def test_wheel_holds_every_module(self, wheel: zipfile.ZipFile) -> None:
        modules = {
            str(path.relative_to(ROOT))
            for folder in (ROOT / "pygan", ROOT / "pygan" / "kernels")
            for path in folder.rglob("*.py")
        }
        kernels = {f"pygan/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
        assert kernels <= modules
        assert modules <= set(wheel.namelist())

    def test_wheel_holds_the_data_and_the_extension(self, wheel: zipfile.ZipFile) -> None:
        names = set(wheel.namelist())
        data = ROOT / "pygan" / "data" / "fashion_mnist"
        assert "LICENSE" in os.listdir(data)
        assert {f"pygan/data/fashion_mnist/{name}" for name in os.listdir(data)} <= names
        assert {"pygan/py.typed", "pygan/_C.pyi"} <= names
        assert len([name for name in names if re.fullmatch(r"pygan/_C\..*\.so", name)]) == 1

    def test_wheel_has_one_top_level_package(self, wheel: zipfile.ZipFile) -> None:
        tops = {name.partition("/")[0] for name in wheel.namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"pygan"}

    def test_success_removes_the_message_of_an_earlier_failure(
        self, built: Path, wheel: zipfile.ZipFile
    ) -> None:
        assert list((built / "pygan").glob("_C.*.so"))
        assert not (built / "pygan" / "_build_log.txt").exists()
        assert "pygan/_build_log.txt" not in wheel.namelist()

    def test_unpacked_wheel_imports(self, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
        wheel.extractall(tmp_path / "site")
        code = "import pygan.kernels as k, pygan._C as c; print(k.__file__, c.__file__, sep='\\n')"
        result = run("-c", ONLY_THIS_COPY + code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
        assert result.returncode == 0, result.stderr
        assert all(Path(f).is_relative_to(tmp_path / "site") for f in result.stdout.splitlines())

    def test_instruction_sets_share_no_symbol(self, built: Path) -> None:
        """A weak symbol compiled with AVX-512 could be the copy that every other file gets."""
        objects = list(built.glob("build/temp*/cmake-*/CMakeFiles/pygan_avx*.dir/**/*.o"))
        assert len(objects) >= 3
        for path in objects:
            isa = re.search(r"pygan_(avx\w+)\.dir", str(path))[1]
            command = ["nm", "--defined-only", str(path)]
            symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            shared = [line.split(maxsplit=2)[1:] for line in symbols.splitlines()]
            outside = [name for kind, name in shared if not kind.islower() or kind in "uvw"]
            # pygan::<isa> as compilers write it: what names lambdas no tool writes out.
            assert [name for name in outside if f"5pygan{len(isa)}{isa}" not in name] == []


def build(sources: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `pip install` runs for a wheel, with its results in `folder`/pygan."""
    options = ("--build-lib", folder, "--build-temp", folder / "temp")
    return run("setup.py", "-q", "build", *options, cwd=sources, **variables)


@needs_linux_x86_64
def test_auto_survives_a_broken_compiler_and_keeps_its_message(
    sources: Path, tmp_path: Path
) -> None:
    result = build(sources, tmp_path, PYGAN_EXT="auto", CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert "installed without its native extension" in result.stderr
    assert "/bin/false" in (tmp_path / "pygan" / "_build_log.txt").read_text()
    code = "import runpy; sys.argv[1:] = ['--json']; runpy.run_module('pygan', run_name='__main__')"
    report = run("-c", ONLY_THIS_COPY + code, cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    native = json.loads(report.stdout)["native"]
    assert native["reason"] and native["instruction_set"] is None
    assert any("/bin/false" in line for line in native["build_log"])


@needs_linux_x86_64
def test_require_fails_with_a_broken_compiler(sources: Path, tmp_path: Path) -> None:
    result = build(sources, tmp_path, PYGAN_EXT="require", CXX="/bin/false")
    assert result.returncode == 1
    assert "/bin/false" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("pygan: PYGAN_EXT=require, and the native ")
    assert "Traceback" not in result.stderr


def test_unknown_mode_is_one_sentence(sources: Path, tmp_path: Path) -> None:
    result = build(sources, tmp_path, PYGAN_EXT="yes")
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert "PYGAN_EXT='yes'" in sentence
    assert all(mode in sentence for mode in ("'auto'", "'require'", "'off'"))


def test_other_processors_install_without_the_extension(sources: Path, tmp_path: Path) -> None:
    code = (
        "import platform, runpy, sys; platform.machine = lambda: 'aarch64'; "
        f"sys.argv = ['setup.py', '-q', 'build', '--build-lib', {str(tmp_path)!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run("-c", code, cwd=sources, CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    (reason,) = (tmp_path / "pygan" / "_build_log.txt").read_text().splitlines()
    assert "aarch64" in reason
    refused = run("-c", code, cwd=sources, PYGAN_EXT="require")
    assert refused.returncode == 1
    assert "aarch64" in refused.stderr.splitlines()[-1]


def test_editable_install_without_the_extension(sources: Path, tmp_path: Path) -> None:
    stale = sources / "pygan" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"an earlier build")
    hook = f"import setuptools.build_meta as b; print(b.build_editable({str(tmp_path)!r}))"
    result = run("-c", hook, cwd=sources, PYGAN_EXT="off")
    assert result.returncode == 0, result.stderr
    assert not stale.exists()
    assert "PYGAN_EXT=off" in (sources / "pygan" / "_build_log.txt").read_text()

    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import importlib.util, site
sys.path.insert(0, {str(tmp_path / "site")!r})
site.addsitedir(sys.path[0])
import pygan.kernels
print(pygan.kernels.__file__, importlib.util.find_spec("kernels"))
"""
    imported = run("-c", ONLY_THIS_COPY + code, cwd=tmp_path)
    assert imported.stdout.split() == [str(sources / "pygan/kernels/__init__.py"), "None"]


def test_torch_finds_the_backend_by_its_name(sources: Path, tmp_path: Path) -> None:
    made = run("setup.py", "-q", "egg_info", "--egg-base", tmp_path, cwd=sources)
    assert made.returncode == 0, made.stderr
    code = """
import torch
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 2, 1), torch.nn.ReLU())
x = torch.randn(2, 3, 8, 8)
faster = torch.compile(network, backend="pygan", fullgraph=True)
assert torch.allclose(faster(x), network(x), atol=1e-5)
print("pygan" in torch._dynamo.list_backends())
"""
    found = run("-c", code, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert found.stdout.split() == ["True"], found.stderr


def test_bare_checkout_imports(sources: Path, tmp_path: Path) -> None:
    code = "import pygan.kernels; print(pygan.kernels.__file__)"
    result = run("-c", ONLY_THIS_COPY + code, cwd=tmp_path, PYTHONPATH=str(sources))
    assert result.stdout.strip() == str(sources / "pygan/kernels/__init__.py"), result.stderr
