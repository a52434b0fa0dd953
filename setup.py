"""Metadata of pygan and the build of its native extension (cmake, ninja, pybind11; no torch).

``PYGAN_EXT`` decides what a failed build means: ``auto`` (the default) keeps the reason and the
compiler's output in ``pygan/_build_log.txt`` and installs pygan without the extension,
``require`` makes the installation fail, ``off`` does not build. ``PYGAN_SANITIZE``, for example
``address,undefined``, compiles these sanitizers in; such an extension loads only into a process
that started with their runtime (``LD_PRELOAD``).

``pygan/_cuda`` is built where nvcc is found, by the same rules and with a message of its own in
``pygan/_cuda_build_log.txt``: that there is no nvcc is no failure. ``PYGAN_CUDA_ARCHITECTURES``,
for example ``80;90``, names the compute capabilities to compile for, else all are.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_EXTENSION, CUDA_EXTENSION = "pygan._C", "pygan._cuda"
XDIST = "pytest-xdist==3.8.0"
BUILD_LOGS = {CPU_EXTENSION: "_build_log.txt", CUDA_EXTENSION: "_cuda_build_log.txt"}
LINUX_X86_64 = "sys_platform == 'linux' and platform_machine == 'x86_64'"


class BuildFailed(Exception):
    """The extension could not be built; the message is one sentence."""


def version() -> str:
    # Importing pygan would import torch.
    source = (ROOT / "pygan" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def extension_mode() -> str:
    mode = os.environ.get("PYGAN_EXT") or "auto"
    if mode not in ("auto", "require", "off"):
        raise SystemExit(
            f"pygan: PYGAN_EXT={mode!r} is not one of 'auto', 'require' and 'off'; "
            "unset it to build the native extension where that is possible."
        )
    return mode


def unsupported_platform() -> str | None:
    """Why the native extension is not built on this platform, or None."""
    if sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 2**32:
        return None
    return (
        "The native kernels are built on 64-bit Linux x86-64 only, and this is "
        f"{platform.system()} {platform.machine()}; pygan runs on torch here."
    )


def unwanted_cuda() -> str | None:
    """Why a machine is not expected to build the CUDA extension, or None."""
    if extension_mode() == "off":
        return "The installation was asked not to build it (PYGAN_EXT=off)."
    if unsupported_platform():
        return "The CUDA kernels are built on 64-bit Linux x86-64 only."
    if os.environ.get("PYGAN_SANITIZE"):
        return "The installation is one with sanitizers, which are for the CPU kernels."
    if nvcc() is None:
        return "nvcc was not found; install the CUDA toolkit, or name nvcc in CUDACXX."
    return None


def build_tool(name: str) -> str:
    """The program that the Python package `name` carries, or else the one on PATH."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        files = []
    # cmake's wheel holds the program under data/bin, beside a launcher that has to import cmake.
    programs = sorted(
        (file for file in files if file.name == name and file.parent.name == "bin"),
        key=lambda file: "data" not in file.parts,
    )
    for program in programs:
        path = Path(str(program.locate())).resolve()
        if os.access(path, os.X_OK):
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise BuildFailed(
            f"{name} was not found; install it, for example with 'pip install {name}'."
        )
    return found


def pybind11_directory() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise BuildFailed(
            "The Python package pybind11 was not found; install it with 'pip install pybind11'."
        ) from error
    return pybind11.get_cmake_dir()


def nvcc() -> str | None:
    """The CUDA compiler: what ``CUDACXX`` names, or else the one on PATH."""
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


class CMakeExtension(Extension):
    """An extension whose sources the CMakeLists.txt in `folder` names."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        # Where there is no nvcc the CUDA extension is missing and nothing is wrong.
        optional = name == CUDA_EXTENSION or extension_mode() != "require"
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    """Builds with cmake and ninja, by the rules of ``PYGAN_EXT``."""

    def build_extension(self, ext: Extension) -> None:
        mode = extension_mode()
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        log = module.parent / BUILD_LOGS[ext.name]
        module.parent.mkdir(parents=True, exist_ok=True)
        output: list[str] = []
        what = "native" if ext.name == CPU_EXTENSION else "CUDA"
        if ext.name == CUDA_EXTENSION and (reason := unwanted_cuda()):
            module.unlink(missing_ok=True)
            log.write_text(f"{reason}\n", encoding="utf-8")
            return
        try:
            if mode == "off":
                raise BuildFailed("The installation was asked not to build it (PYGAN_EXT=off).")
            if reason := unsupported_platform():
                raise BuildFailed(reason)
            self.run_cmake(ext, module, werror=mode == "require", output=output)
        except BuildFailed as error:
            if mode == "require":
                raise SystemExit(
                    f"pygan: PYGAN_EXT=require, and the {what} extension was not built. {error}"
                ) from error
            # An extension of an earlier build would run with sources it does not belong to.
            module.unlink(missing_ok=True)
            log.write_text(f"{error}\n{''.join(output)}", encoding="utf-8")
            self.warn(f"pygan: installed without its {what} extension. {error}")
        else:
            log.unlink(missing_ok=True)

    def run_cmake(
        self, ext: CMakeExtension, module: Path, *, werror: bool, output: list[str]
    ) -> None:
        """Configure and build `module`; what the tools print is appended to `output`."""
        cmake, ninja = build_tool("cmake"), build_tool("ninja")
        build = self.build_directory(ext, werror)
        configure = [
            cmake,
            "-G",
            "Ninja",
            "-S",
            str(ext.folder),
            "-B",
            str(build),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_directory()}",
            f"-DPYGAN_OUTPUT_DIRECTORY={module.parent}",
            f"-DPYGAN_WERROR={'ON' if werror else 'OFF'}",
        ]
        if ext.name == CUDA_EXTENSION:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={nvcc()}",
                f"-DPYGAN_CUDA_ARCHITECTURES={os.environ.get('PYGAN_CUDA_ARCHITECTURES', '')}",
            ]
        else:
            configure.append(f"-DPYGAN_SANITIZE={os.environ.get('PYGAN_SANITIZE', '')}")
        if not run_logged(configure, output):
            shutil.rmtree(build, ignore_errors=True)  # a half-made cache outlives its cause
            raise BuildFailed("cmake could not configure the build; its output ends this message.")
        if not run_logged([cmake, "--build", str(build)], output):
            raise BuildFailed("The C++ sources did not compile; the output ends this message.")
        if not module.exists():
            raise BuildFailed(f"The build made no file named {module.name}.")

    def build_directory(self, ext: CMakeExtension, werror: bool) -> Path:
        # cmake reads these once, when it makes its cache.
        variables = ["CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "PYGAN_SANITIZE"]
        if ext.name == CUDA_EXTENSION:
            variables += ["CUDACXX", "CUDAFLAGS", "PYGAN_CUDA_ARCHITECTURES"]
        key = repr([sys.executable, werror, self.debug, *map(os.environ.get, variables)])
        prefix = "cmake" if ext.name == CPU_EXTENSION else "cmake-cuda"
        name = f"{prefix}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        return Path(self.build_temp).resolve() / name

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the sources get the module, or the reason without it."""
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            built, source = (Path(path) for path in self.module_paths(ext, build_py))
            log = source.parent / BUILD_LOGS[ext.name]
            if built.exists():
                log.unlink(missing_ok=True)
            else:
                source.unlink(missing_ok=True)
                shutil.copyfile(built.parent / BUILD_LOGS[ext.name], log)

    def module_paths(self, ext: Extension, build_py) -> tuple[str, str]:
        """Where `ext` is built, and where an editable installation imports it from."""
        filename = self.get_ext_filename(ext.name)
        package_directory = build_py.get_package_dir(ext.name.rpartition(".")[0])
        built = os.path.join(self.build_lib, filename)
        return built, os.path.join(package_directory, os.path.basename(filename))


def run_logged(command: list[str], output: list[str]) -> bool:
    """Run `command`, print what it prints, append it to `output`; whether it succeeded."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        output.append(f"{command[0]}: {error}\n")
        return False
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    return process.returncode == 0


DATA = ["pillow>=10.1", "tqdm>=4.65"]
VIZ = ["matplotlib>=3.8", "tensorboard>=2.14"]
TIMED = ["pytest>=8", "pytest-benchmark>=5", "psutil>=5.9"]
# With the peers that the benchmarks look for.
BENCH = [*TIMED, "onnx", "onnxruntime", "openvino", "jax"]
# One test builds wheels, without a network: what pyproject.toml asks for has to be there.
TEST = [
    *TIMED,
    "hypothesis>=6.100",
    "setuptools>=77",
    f"cmake>=3.24; {LINUX_X86_64}",
    f"ninja; {LINUX_X86_64}",
    f"pybind11>=2.13; {LINUX_X86_64}",
]

setup(
    name="pygan",
    version=version(),
    description="Trains generative adversarial networks fast, on plain CPUs and on GPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["pygan", "pygan.*"]),
    package_data={
        "pygan": ["py.typed", "*.pyi"],
        "pygan.data": ["fashion_mnist/*"],
        "pygan.metrics": ["*.safetensors"],
    },
    install_requires=[
        "torch>=2.9",
        "numpy>=1.24",
        *DATA,
        *VIZ,
        "safetensors>=0.4.3",
        "nvidia-ml-py>=12; sys_platform == 'linux'",
        f"triton>=3.5; {LINUX_X86_64}",
    ],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        # All but the Hugging Face library is required already; the names say which part needs what.
        "data": [*DATA, "datasets>=2.19"],
        "viz": VIZ,
        "eval": ["torch-fidelity"],
        "dev": [
            *TEST,
            "ruff==0.17.6",
            "mypy==2.4.1",
            "clang-format==23.1.5",
            "pip-audit==2.10.1",
            XDIST,
        ],
    },
    entry_points={
        "console_scripts": ["pygan = pygan.__main__:main"],
        "torch_dynamo_backends": ["pygan = pygan.compile:compile_backend"],
    },
    ext_modules=[
        CMakeExtension(CPU_EXTENSION, ROOT),
        CMakeExtension(CUDA_EXTENSION, ROOT / "csrc" / "cuda"),
    ],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
