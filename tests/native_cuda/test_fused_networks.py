"""Networks that are fused on a GPU, whose layers stand in a Sequential or are called by a forward.

On a CPU the tensors pass for a GPU's: kernels of CUDA run by the shim, those of Triton in the
interpreter, and convolutions as where a measurement leaves them to torch.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parents[1] / "dropin"))

from compare import assert_agree, assert_same, build, gradients

import pygan
from pygan import pending
from pygan.ops import dispatch, folded_conv, gpu, norm_act, strided_conv

CHANNELS = 8
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        "cuda",
        pytest.param(
            "triton",
            marks=[
                pytest.mark.triton,
                pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1"),
            ],
        ),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose tensors count as a GPU's."""
    if request.param == "gpu":
        return "cuda"
    if request.param == "cuda":
        if INTERPRETED:
            pytest.skip("CUDA's kernels have nothing to do with Triton's interpreter")
        request.getfixturevalue("on_shim")
    pretend(monkeypatch)
    return "cpu"


def pretend(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu, "holds", lambda x: True)
    names = {norm_act: "supports_cpu", dispatch: "supports_cpu"}
    for module in (norm_act, dispatch, strided_conv, folded_conv):
        name = names.get(module, "_supports_cpu")
        patch.setattr(module, name, lambda *_: "the tensor is on a GPU")
    patch.setattr(strided_conv, "_supports_gpu", lambda *_: "torch's was measured to be faster")


pytestmark = pytest.mark.usefixtures("one_thread")  # the networks are too small for more


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations that batch and instance norms ran with."""
    found: list[str] = []
    real = norm_act.norm_act

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        found.append(kwargs["activation"])
        return real(*args, **kwargs)

    monkeypatch.setattr(norm_act, "norm_act", watched)
    return found


class Form(nn.Module):
    """A convolution, a norm and whatever ``body`` makes of them."""

    def __init__(self, norm: nn.Module, body: Callable[[Form, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.norm = body, norm
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1)
        self.up = nn.ConvTranspose2d(CHANNELS, 4, 4, 2, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS, 0.8),
    "batch untracked": lambda: nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS),
    "instance affine": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "instance tracked": lambda: nn.InstanceNorm2d(
        CHANNELS, 1e-3, 0.3, affine=True, track_running_stats=True
    ),
}
BODIES: dict[str, Callable[[Form, Tensor], Tensor]] = {
    "F.relu": lambda m, x: m.up(F.relu(m.norm(m.down(m.first(x))))),
    "module in place": lambda m, x: m.up(m.relu(m.norm(m.down(m.first(x))))),
    "leaky_relu_": lambda m, x: m.up(F.leaky_relu_(m.norm(m.first(x)), 0.2)),
    "tanh": lambda m, x: torch.tanh(m.norm(m.first(x))),
    "residual": lambda m, x: (lambda h: m.norm(h) + h)(m.first(x)),
    "two readers": lambda m, x: (lambda h: F.relu(h) + h)(m.norm(m.first(x))),
    "overwritten for another reader": lambda m, x: (lambda h: m.relu(h) + h)(m.norm(m.first(x))),
}


def layouts(place: str) -> dict[str, Callable[[torch.Generator], tuple[Tensor]]]:
    def image(g: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(3, 3, 8, 8, generator=g).to(place),)

    def last(g: torch.Generator) -> tuple[Tensor]:
        return (image(g)[0].contiguous(memory_format=torch.channels_last),)

    return {"contiguous": image, "channels_last": last}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_layers_that_a_forward_calls(
    norm: Callable[[], nn.Module], body: Callable[[Form, Tensor], Tensor], place: str
) -> None:
    for image in layouts(place).values():
        # The first run finds out what follows, the second relies on it.
        assert_same(lambda: Form(norm(), body).to(place), image, runs=2)


def sequence(norm: Callable[[], nn.Module], last: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, padding=1),
            norm(),
            nn.ReLU(True),
            nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1),
            norm(),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(CHANNELS, 5, 3, padding=1),
            nn.AvgPool2d(2),
        )
        return layers.to(memory_format=torch.channels_last) if last else layers

    return make


@pytest.mark.parametrize("last", [False, True], ids=["weights first", "weights last"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_layers_of_a_sequential(norm: Callable[[], nn.Module], last: bool, place: str) -> None:
    for image in layouts(place).values():
        assert_same(lambda: sequence(norm, last)().to(place), image, runs=2)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_follows_is_foreseen_from_the_second_call(
    norm: Callable[[], nn.Module], place: str, calls: list[str]
) -> None:
    network = Form(norm(), BODIES["F.relu"]).to(place)
    report = pygan.fuse(network)
    assert [row.split()[0] for row in report.fused] == ["norm", "down", "up"]
    assert not report.skipped
    x = torch.randn(3, 3, 16, 16, device=place)
    for expected in (["none"], ["relu"], ["relu"]):
        network(x).sum().backward()
        assert calls == expected
        calls.clear()
    network.body = BODIES["tanh"]
    for expected in (["relu", "none"], [], []):
        network(x).sum().backward()
        # What varied once is not foreseen again.
        assert calls == expected
        calls.clear()


class Operations(TorchDispatchMode):
    """Counts what torch runs on values, not what makes views or memory."""

    FREE = ("view", "empty", "detach", "alias", "t", "transpose", "permute", "as_strided", "select")
    FREE += ("unsqueeze", "squeeze", "expand", "slice", "_unsafe_view", "lift_fresh", "chunk")
    FREE += ("new_empty", "empty_permuted")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name.removesuffix("_like").removesuffix("_strided") not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def _counted(run: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    def counted(*args: Any, **more: Any) -> Any:
        found.append(run.__name__)
        return run(*args, **more)

    return counted


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs operations of torch")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["F.relu", "leaky_relu_", "residual", "two readers", "sequence"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_fused_layers_take_no_more_operations(
    norm: Callable[[], nn.Module],
    form: str,
    last: bool,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels: list[str] = []
    for name, each in norm_act.KERNELS.items():
        counted = norm_act.Kernels(*(_counted(run, kernels) for run in each))
        monkeypatch.setitem(norm_act.KERNELS, name, counted)

    def make() -> nn.Module:
        network = sequence(norm)() if form == "sequence" else Form(norm(), BODIES[form])
        network = network.to(memory_format=torch.channels_last) if last else network
        return network.to(place)

    counts = []
    for fused in (False, True):
        network = build(make)
        if fused:
            pygan.fuse(network)
        for training in (True, False):
            network.train(training)
            (x,) = layouts(place)["channels_last" if last else "contiguous"](torch.Generator())
            for _ in range(3):
                network(x).sum().backward()
            kernels.clear()
            with Operations() as operations:
                network(x).sum().backward()
            counts.append(len(operations.names) + len(kernels))
    in_training, evaluation, fused_in_training, fused_evaluation = counts
    assert fused_in_training <= in_training and fused_evaluation <= evaluation
    if form in ("F.relu", "leaky_relu_", "sequence"):
        assert fused_in_training < in_training and fused_evaluation < evaluation


def test_running_statistics_follow_whoever_reads(place: str) -> None:
    plain, fused = (build(lambda: Form(NORMS["batch"](), BODIES["F.relu"])) for _ in range(2))
    pygan.fuse(fused.to(place))
    x = torch.randn(3, 3, 8, 8)
    for network, images in ((plain, x), (fused, x.to(place))):
        network(images)
        network(images)
        # Nobody reads what the norm puts out.
        h = network.norm(network.first(2 * images))
        del h
        network(-images)
    assert isinstance(plain.norm, nn.BatchNorm2d) and isinstance(fused.norm, nn.BatchNorm2d)
    assert fused.norm.num_batches_tracked == 4
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(fused.norm, name).cpu(), getattr(plain.norm, name))


def test_gradients_are_those_of_the_mode_of_each_reader(place: str) -> None:
    def body(m: Form, x: Tensor) -> Tensor:
        h = m.norm(m.first(x))
        with torch.no_grad():
            constant = F.relu(h)
        assert not constant.requires_grad
        return torch.tanh(h) * constant

    def run(module: nn.Module, draw: Any) -> dict[str, Tensor]:
        seen = {}
        for step in range(3):
            module.zero_grad()
            module(draw(3, 3, 8, 8).to(place)).square().sum().backward()
            seen |= {f"{step}{k}": v.clone() for k, v in gradients(module).items()}
        return seen

    assert_agree(lambda: Form(NORMS["batch"](), body).to(place), run)


def test_the_map_may_change_behind_the_norm(place: str) -> None:
    def body(m: Form, x: Tensor) -> Tensor:
        h = m.first(x)
        y = F.relu(m.norm(h.detach()))
        h.detach().mul_(0)
        return y

    def run(module: nn.Module, draw: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return {str(step): module(draw(3, 3, 8, 8).to(place)) for step in range(3)}

    assert_agree(lambda: Form(NORMS["batch"](), body).to(place), run)


class Shared(nn.Module):
    """One norm, and one activation, in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(CHANNELS), nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.convs[0](x)))
        return torch.sigmoid(self.norm(self.convs[1](h)))


def test_shared_layers(place: str) -> None:
    def image(g: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(3, CHANNELS, 6, 6, generator=g).to(place),)

    assert_same(lambda: Shared().to(place), image, runs=3)


class Cast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
            return self.network(x).float() if x.dtype != torch.float64 else self.network(x)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter truncates to bfloat16")
@pytest.mark.parametrize("norm", ["batch", "instance affine", "instance tracked"])
def test_autocast(norm: str, place: str) -> None:
    def make() -> nn.Module:
        return Cast(Form(NORMS[norm](), BODIES["tanh"])).to(place)

    assert_same(make, layouts(place)["contiguous"], runs=2, penalty=False)


def test_convolutions_of_a_forward_are_measured(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Form(NORMS["instance"](), BODIES["F.relu"]).to(place)
    pygan.fuse(network)
    seen = []
    for name in ("up", "down"):
        real = getattr(strided_conv, name)

        def watched(
            x: Tensor, *args: Any, name: str = name, real: Any = real, **more: Any
        ) -> Tensor:
            seen.append((name, type(x), tuple(x.shape[1:])))
            return real(x, *args, **more)

        monkeypatch.setattr(strided_conv, name, watched)
    x = torch.randn(2, 3, 8, 8, device=place)
    for _ in range(2):
        network(x)
    expected = [("down", Tensor, (CHANNELS, 8, 8)), ("up", Tensor, (CHANNELS, 4, 4))]
    assert seen == 2 * expected


class NoReads(TorchDispatchMode):
    """What a capture of a graph refuses."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_nothing_is_read_back(norm: Callable[[], nn.Module], place: str) -> None:
    networks = [sequence(norm)(), Form(norm(), BODIES["F.relu"]), Form(norm(), BODIES["residual"])]
    for network, calls in itertools.product(networks, (1, 3)):
        pygan.fuse(network.to(place))
        x = torch.randn(3, 3, 8, 8, device=place)
        with NoReads():
            for _ in range(calls):
                network(x).sum().backward()


def test_values_are_handed_on_plain(place: str) -> None:
    network = Form(NORMS["instance affine"](), BODIES["F.relu"]).to(place)
    pygan.fuse(network)
    seen: list[type] = []
    network.up.register_forward_hook(lambda m, args, out: seen.append(type(args[0])))
    for _ in range(3):
        assert type(network(torch.randn(2, 3, 8, 8, device=place))) is Tensor
    assert seen == [Tensor] * 3
    assert pending.HANDLERS


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_gpu_graphs_of_others_hold_fused_networks(norm: Callable[[], nn.Module]) -> None:
    network = build(lambda: Form(norm(), BODIES["F.relu"])).cuda()
    pygan.fuse(network)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            network(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    network.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = network(x)
        y.sum().backward()
    x.normal_()
    graph.replay()
    pygan.unfuse(network)
    torch.testing.assert_close(y, network(x), rtol=1e-2, atol=1e-2)
