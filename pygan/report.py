"""What this machine is, and what pygan runs on it: the report that `python -m pygan` prints."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pygan import __version__, ops
from pygan.ops import cuda_native, native

LOG_TAIL = 20  # lines

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; memory in bytes, capability as in `sm_90`."""

    name: str
    memory: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """The computer: processor name, the cores this process may use, memory in bytes."""

    system: str
    cpu: str
    cores: int
    memory: int | None
    gpus: list[Gpu]


@dataclass(frozen=True)
class Native:
    """The native extension: why it is not loaded, or the instruction set it runs.

    `runnable` lists the instruction sets that the extension holds and this machine has: the
    values of `PYGAN_ISA`. `build_log` is what is left of a build that failed: the cause in a
    sentence, then the end of what the compiler said.
    """

    reason: str | None
    instruction_set: str | None
    runnable: list[str]
    build_log: list[str]


@dataclass(frozen=True)
class Cuda:
    """The CUDA extension: why it does not run, whether it is built, and for which capabilities
    (`sm_80`); `build_log` as in `Native`."""

    reason: str | None
    built: bool
    targets: list[str]
    build_log: list[str]


@dataclass(frozen=True)
class Operation:
    """One operation: each implementation's reason not to run here, and the choice per device."""

    implementations: dict[str, str | None]
    chosen: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything `python -m pygan` prints; `versions` holds None for what is not installed."""

    machine: Machine
    versions: dict[str, str | None]
    native: Native
    cuda: Cuda
    operations: dict[str, Operation]

    def to_dict(self) -> dict[str, object]:
        """The report as plain dictionaries, lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        blocks = (_machine_lines(self), _native_lines(self), _operation_lines(self))
        return "\n\n".join("\n".join(lines) for lines in blocks)


def collect() -> Report:
    """Look at this machine and at pygan's implementations on it."""
    return Report(_machine(), _versions(), _native(), _cuda(), _operations())


def _machine() -> Machine:
    properties = [
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    ]
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=_cores(),
        memory=_memory(),
        gpus=[Gpu(p.name, p.total_memory, f"sm_{p.major}{p.minor}") for p in properties],
    )


def cpu_facts() -> dict[str, str]:
    """What Linux tells of the first CPU, such as its "model name"; nothing elsewhere."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    facts = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in facts}


def _cpu_name() -> str:
    return cpu_facts().get("model name") or platform.processor() or "unknown CPU"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"pygan": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _native() -> Native:
    module = native.load()
    if module is not None:
        return Native(None, module.isa(), list(module.isas()), [])
    return Native(native.reason(), None, [], _build_log(native.BUILD_LOG))


def _cuda() -> Cuda:
    module, reason = cuda_native.load(), cuda_native.reason()
    if module is None:
        return Cuda(reason, False, [], _build_log(cuda_native.BUILD_LOG))
    return Cuda(reason, True, [f"sm_{target}" for target in module.architectures().split()], [])


def _build_log(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[:1] + lines[1:][-LOG_TAIL:]


def _operations() -> dict[str, Operation]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        name: Operation(
            dict(implementations), {device: ops.chosen(name, device=device) for device in devices}
        )
        for name, implementations in ops.implementations().items()
    }


def _gibibytes(size: int | None) -> str:
    return "memory unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _machine_lines(report: Report) -> list[str]:
    machine = report.machine
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    gpus = [f"{gpu.name}, {_gibibytes(gpu.memory)}, {gpu.capability}" for gpu in machine.gpus]
    versions = [f"{name} {found or 'not installed'}" for name, found in report.versions.items()]
    return [
        f"Machine     {machine.cpu}, {cores}, {_gibibytes(machine.memory)}, {machine.system}",
        *(f"GPU         {gpu}" for gpu in gpus or ["none that torch sees"]),
        f"Versions    {', '.join(versions)}",
    ]


def _native_lines(report: Report) -> list[str]:
    return _cpu_lines(report.native) + _cuda_lines(report.cuda)


def _cuda_lines(extension: Cuda) -> list[str]:
    if extension.built:
        state = "loaded" if extension.reason is None else f"built, does not run: {extension.reason}"
        return [f"CUDA        {state}; kernels for {', '.join(extension.targets)}"]
    lines = [f"CUDA        not loaded: {extension.reason}"]
    return lines + [f"            | {line}" for line in extension.build_log]


def _cpu_lines(extension: Native) -> list[str]:
    if extension.reason is None:
        lines = [f"Native      loaded, instruction set {extension.instruction_set}"]
        others = [name for name in extension.runnable if name != extension.instruction_set]
        if others:
            lines.append(f"            PYGAN_ISA={'|'.join(others)} forces another one")
        return lines
    lines = [f"Native      not loaded: {extension.reason}"]
    if extension.build_log:
        lines.extend(f"            | {line}" for line in extension.build_log)
    return lines


def _operation_lines(report: Report) -> list[str]:
    rows = [("Operation", "Implementation", "On this machine")]
    for name, operation in report.operations.items():
        for implementation, reason in operation.implementations.items():
            devices = [d for d, choice in operation.chosen.items() if choice == implementation]
            chosen = f", chosen on {' and '.join(devices)}" if devices else ""
            rows.append((name, implementation, (reason or "runs") + chosen))
            name = ""
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows]
