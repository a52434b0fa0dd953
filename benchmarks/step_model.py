"""How long a training step must take on a GPU, from its kernels and the peaks of the device.

``python -m benchmarks.step_model --device h200 --batch 128 --network dcgan64`` runs one
`pygan.AdversarialStep` on the meta device, where nothing is computed, writes down the operations
that it calls, and makes of them the kernels that they come to at best:

- each pass of each convolution is one, with the activation behind it or before it;
- batch norm with its activation is one forward (its statistics ride along with the convolution
  before it) and two backward, for the sums and for the gradient;
- a loss is two, with gradient and mean probability; Adam one a network; the latents and the joining
  of real and generated images one each.

Bytes are counted as in `benchmarks.work`: maps and the weights of convolutions in bfloat16, Adam in
float32. A kernel takes the longer of its arithmetic and its traffic at the device's peaks, and what
starting it costs: `--graph-us` each where the step is one CUDA graph. Without a graph the host
issues them, at `--host-us` each, while the device works. Both costs are assumptions to be replaced
by measured ones.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pygan
from benchmarks.device_peaks import DEVICES, Peaks
from benchmarks.summary import markdown_table
from benchmarks.work import ADAM_PASSES, NORM_BACKWARD_PASSES, NORM_FORWARD_PASSES
from pygan import cli
from pygan.models import dcgan

PROG = "python -m benchmarks.step_model"
NETWORKS = {"dcgan64": (64, 3), "dcgan32": (32, 1)}
ITEMSIZE = 2
GRAPH_US, HOST_US = 1.0, 5.0


@dataclass(frozen=True)
class Kernel:
    """Work that one kernel, or ``launches`` of them, does once a step."""

    name: str
    kind: str
    flops: float
    bytes: float
    launches: int = 1

    def milliseconds(self, peaks: Peaks) -> float:
        """At the peaks of the device."""
        return 1e-9 * max(self.flops / peaks.tflops, self.bytes / peaks.tb_per_s)

    def bound(self, peaks: Peaks) -> str:
        compute, traffic = self.flops / peaks.tflops, self.bytes / peaks.tb_per_s
        return "arithmetic" if compute > traffic else "bytes"


class _Optimizer(torch.optim.Optimizer):
    """Adam's place in the list of kernels."""

    def __init__(self, network: str, module: nn.Module, trace: _Trace) -> None:
        super().__init__(module.parameters(), {})
        self._network, self._trace = network, trace

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weights = sum(p.numel() for group in self.param_groups for p in group["params"])
        self._trace.add(f"Adam of {self._network}", "Adam", 0.0, ADAM_PASSES * 4 * weights)


class _Step(pygan.AdversarialStep):
    def _autocast(self) -> Any:
        # There is none on the meta device; the model counts bytes as if there were.
        return contextlib.nullcontext()


class _Trace(TorchDispatchMode):
    """The kernels of the operations that run inside."""

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._networks = networks
        self._names: dict[int, str] = {}

    def __enter__(self) -> _Trace:
        # Only now: a change of layout gives a parameter other memory.
        self._names = {
            _storage(parameter): f"{letter} {name.rpartition('.')[0]}"
            for letter, network in self._networks.items()
            for name, parameter in network.named_parameters()
        }
        return super().__enter__()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if seen := getattr(self, f"_see_{name}", None):
            seen(args, made)
        return made

    def add(self, name: str, kind: str, flops: float, moved: float, launches: int = 1) -> None:
        self.kernels.append(Kernel(name, kind, flops, moved, launches))

    def _convolution(self, conv_pass: str, maps: Sequence[Tensor], weight: Tensor) -> None:
        # The weight is swept over the map with fewer positions.
        positions = min(each.shape[2:].numel() for each in maps)
        flops = 2.0 * maps[0].shape[0] * positions * weight.numel()
        moved = ITEMSIZE * (sum(each.numel() for each in maps) + weight.numel())
        self.add(f"{self._names[_storage(weight)]} {conv_pass}", "convolution", flops, moved)

    def _see_convolution(self, args: Any, made: Tensor) -> None:
        self._convolution("forward", (args[0], made), args[1])

    def _see_convolution_backward(self, args: Any, made: Any) -> None:
        dy, x, weight = args[:3]
        for conv_pass, found in zip(("input grad", "weight grad"), made, strict=False):
            if found is not None:
                self._convolution(conv_pass, (dy, x), weight)

    def _norm(self, norm_pass: str, x: Tensor, weight: Tensor, passes: int, launches: int) -> None:
        name, moved = self._names[_storage(weight)], passes * ITEMSIZE * x.numel()
        kernel = Kernel(f"{name} {norm_pass}", "norm_act", 0.0, moved, launches)
        if self.kernels[-1].name == kernel.name:
            # Another group of the batch, in the same kernel.
            last = self.kernels.pop()
            kernel = replace(kernel, bytes=last.bytes + kernel.bytes)
        self.kernels.append(kernel)

    def _see_native_batch_norm(self, args: Any, made: Any) -> None:
        self._norm("norm + activation", args[0], args[1], NORM_FORWARD_PASSES, 1)

    def _see_native_batch_norm_backward(self, args: Any, made: Any) -> None:
        self._norm("norm + activation, grad", args[1], args[2], NORM_BACKWARD_PASSES, 2)

    def _see_binary_cross_entropy_with_logits(self, args: Any, made: Tensor) -> None:
        moved = 2.0 * ITEMSIZE * args[0].numel()
        if self.kernels[-1].kind == "loss":
            moved += self.kernels.pop().bytes
        self.add("loss", "loss", 0.0, moved, launches=2)

    def _see_cat(self, args: Any, made: Tensor) -> None:
        if made.dim() == 4:
            self.add("real and fake joined", "copy", 0.0, 2.0 * ITEMSIZE * made.numel())

    def _see_randn(self, args: Any, made: Tensor) -> None:
        self.add("latents", "random", 0.0, 4.0 * made.numel())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def kernels(network: str, batch: int, width: int = 64) -> list[Kernel]:
    """The kernels of one step, in their order. ``network`` is one of `NETWORKS`."""
    size, channels = NETWORKS[network]
    with torch.device("meta"):
        generator, discriminator = dcgan(size, channels, ngf=width, ndf=width)
        real = torch.empty(batch, channels, size, size)
    trace = _Trace({"G": generator, "D": discriminator})
    opt_g, opt_d = _Optimizer("G", generator, trace), _Optimizer("D", discriminator, trace)
    step = _Step(generator, discriminator, opt_g, opt_d, amp="off", graph="off", merge=True)
    with trace:
        step(real)
    return trace.kernels


class Prediction(NamedTuple):
    """Milliseconds an iteration: the arithmetic and the bytes of all kernels at the peaks, the sum
    of the longer of both over the kernels, and that with what starting them costs."""

    arithmetic: float
    bytes: float
    roofs: float
    launches: int
    with_graph: float
    without_graph: float


def predict(
    found: Sequence[Kernel], peaks: Peaks, graph_us: float = GRAPH_US, host_us: float = HOST_US
) -> Prediction:
    """Of the kernels of a step."""
    launches = sum(kernel.launches for kernel in found)
    roofs = sum(kernel.milliseconds(peaks) for kernel in found)
    return Prediction(
        arithmetic=1e-9 * sum(kernel.flops for kernel in found) / peaks.tflops,
        bytes=1e-9 * sum(kernel.bytes for kernel in found) / peaks.tb_per_s,
        roofs=roofs,
        launches=launches,
        with_graph=roofs + 1e-3 * graph_us * launches,
        without_graph=max(roofs, 1e-3 * host_us * launches),
    )


def _rows(found: Sequence[Kernel], peaks: Peaks) -> Iterator[list[str]]:
    for kernel in found:
        yield [
            kernel.name,
            f"{kernel.flops / 1e9:.2f}" if kernel.flops else "–",
            f"{kernel.bytes / 1e6:.2f}",
            str(kernel.launches),
            f"{1e3 * kernel.milliseconds(peaks):.2f}",
            kernel.bound(peaks),
        ]


def _sums(found: Sequence[Kernel], peaks: Peaks) -> Iterator[Kernel]:
    for kind in dict.fromkeys(kernel.kind for kernel in found):
        yield _sum(f"**{kind}**", [kernel for kernel in found if kernel.kind == kind])
    yield _sum("**all**", found)


def _sum(name: str, found: Sequence[Kernel]) -> Kernel:
    flops, moved = sum(k.flops for k in found), sum(k.bytes for k in found)
    return Kernel(name, "", flops, moved, sum(k.launches for k in found))


def table(found: Sequence[Kernel], peaks: Peaks) -> list[str]:
    """Markdown of the kernels, then of their kinds. The time of a sum is the sum of the times."""
    rows = list(_rows(found, peaks))
    for total in _sums(found, peaks):
        chosen = [k for k in found if total.name in (f"**{k.kind}**", "**all**")]
        (row,) = _rows([total], peaks)
        row[4:] = [f"{1e3 * sum(k.milliseconds(peaks) for k in chosen):.2f}", ""]
        rows.append(row)
    return markdown_table(["kernel", "GFLOP", "MB", "launches", "µs", "bound by"], rows)


def lines(found: Sequence[Kernel], peaks: Peaks, batch: int, prediction: Prediction) -> list[str]:
    """Markdown of everything that is known of a step."""
    at = prediction
    gflops = sum(kernel.flops for kernel in found) / batch / 1e9
    megabytes = sum(kernel.bytes for kernel in found) / batch / 1e6
    return [
        f"Peaks of {peaks.name}: {peaks.tflops:g} TFLOP/s in bfloat16, {peaks.tb_per_s:g} TB/s "
        f"({peaks.source}).",
        f"Work: {gflops:.3f} GFLOP and {megabytes:.2f} MB an image, {at.launches} launches.",
        "",
        *markdown_table(
            ["an iteration", "ms", "images/s"],
            [
                [name, f"{ms:.3f}", f"{1e3 * batch / ms:,.0f}"]
                for name, ms in (
                    ("arithmetic alone", at.arithmetic),
                    ("bytes alone", at.bytes),
                    ("floor: the longer of both, kernel by kernel", at.roofs),
                    ("with one CUDA graph", at.with_graph),
                    ("without a graph", at.without_graph),
                )
            ],
        ),
        "",
        *table(found, peaks),
    ]


def _model(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Time that a training step must take on a GPU.")
    parser.add_argument("--device", choices=DEVICES, default="h200", help="default h200")
    parser.add_argument("--network", choices=NETWORKS, default="dcgan64", help="default dcgan64")
    parser.add_argument("--batch", type=cli.whole_number(1), default=128, help="default 128")
    positive = cli.real_number(0, open_low=True)
    parser.add_argument("--tflops", type=positive, help="a measured peak in place of the table's")
    parser.add_argument("--tb-per-s", type=positive, help="likewise, for memory")
    cost = cli.real_number(0)
    parser.add_argument("--graph-us", type=cost, default=GRAPH_US, help=f"default {GRAPH_US:g}")
    parser.add_argument("--host-us", type=cost, default=HOST_US, help=f"default {HOST_US:g}")
    options = parser.parse_args(arguments)
    peaks = DEVICES[options.device]
    given = {"tflops": options.tflops, "tb_per_s": options.tb_per_s}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        rest = "" if len(given) == 2 else f"; the other one {peaks.source}"
        peaks = peaks._replace(**given, source=f"given on the command line{rest}")
    found = kernels(options.network, options.batch)
    prediction = predict(found, peaks, options.graph_us, options.host_us)
    print(f"# One D+G step of {options.network}, batch {options.batch}")
    print()
    print("\n".join(lines(found, peaks, options.batch, prediction)))
    print()
    print(
        f"Starting a kernel is assumed to cost {options.graph_us:g} µs in a graph and "
        f"{options.host_us:g} µs of the host without one."
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _model(arguments))


if __name__ == "__main__":
    sys.exit(main())
