"""``torch.compile(module, backend="pygan")`` against the same network as it is."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import CONVOLUTION_FACTOR, CONVOLUTION_FLOOR, relative_error
from compare import (
    Draw,
    assert_agree,
    assert_near,
    assert_same,
    buffers,
    build,
    gradients,
    pair_of,
    strides,
)
from gans import GANS
from test_hazards import SHORTCUTS, Form, image
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import pygan
from benchmarks.published.dcgan import (
    AttributeGenerator,
    SequentialDiscriminator,
    SequentialGenerator,
)
from pygan.ops import strided_conv

OPERATIONS = {
    "norm_act": sys.modules["pygan.ops.norm_act"],
    "norm_conv": sys.modules["pygan.ops.norm_conv"],
    "down": strided_conv,
    "conv2d": strided_conv,
    "conv_transpose2d": strided_conv,
    "upsample_conv2d": sys.modules["pygan.known_operations"],
    "conv2d_avg_pool": sys.modules["pygan.pending"],
}


@pytest.fixture(autouse=True)
def forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of pygan's operations was called."""
    found: Counter[str] = Counter()
    for name, module in OPERATIONS.items():
        monkeypatch.setattr(module, name, counted(found, name, getattr(module, name)))
    return found


def counted(found: Counter[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        found[name] += 1
        return real(*args, **kwargs)

    return watched


class Outer(nn.Module):
    """A layer of torch alone has no code of its own that ``module.compile`` could compile."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# Of each graph, the first calls see who reads what, and later ones run it so.
RUNS = 3


def compiled(**how: Any) -> Callable[[nn.Module], Any]:
    return lambda module: module.compile(backend=pygan.compile_backend, **how)


# Network, and the operations that run at least so often in one of its forwards.
NETWORKS: dict[str, tuple[str, str, dict[str, int]]] = {
    "dcgan G": ("dcgan", "g", {"conv_transpose2d": 1, "norm_conv": 2}),
    "dcgan D": ("dcgan", "d", {"down": 1, "norm_conv": 1, "norm_act": 1}),
    "attribute G": ("dcgan-attributes", "g", {"norm_conv": 2, "norm_act": 1}),
    "attribute D": ("dcgan-attributes", "d", {"down": 1, "norm_conv": 1}),
    "upsample G": ("dcgan-upsample", "g", {"upsample_conv2d": 2, "norm_act": 3}),
    "residual G": ("sngan", "g", {"upsample_conv2d": 2, "norm_act": 5}),
    "residual D": ("sngan", "d", {"conv2d": 4, "conv2d_avg_pool": 2}),
    "U-Net": ("pix2pix", "g", {"down": 1, "norm_act": 4, "conv_transpose2d": 3}),
    "MLP": ("wgan-clipped", "g", {"norm_act": 2}),
}
networks = pytest.mark.parametrize(("gan", "which", "expected"), NETWORKS.values(), ids=NETWORKS)


def network_and_inputs(gan: str, which: str) -> tuple[Callable[[], nn.Module], Any]:
    if which == "g":
        return GANS[gan].generator, lambda generator: GANS[gan].draw(generator)["g"]
    return GANS[gan].discriminator, lambda generator: GANS[gan].draw(generator)["real"]


@networks
def test_networks_give_the_same_numbers(gan: str, which: str, expected: dict[str, int]) -> None:
    assert_same(*network_and_inputs(gan, which), faster=compiled(), runs=RUNS)


@networks
def test_networks_run_by_operations_of_pygan(
    gan: str, which: str, expected: dict[str, int], calls: Counter[str]
) -> None:
    make, make_input = network_and_inputs(gan, which)
    network = make()
    compiled(fullgraph=True)(network)
    inputs = make_input(torch.Generator())
    for _ in range(RUNS):
        calls.clear()
        network(*inputs)
    calls.clear()
    assert type(network(*inputs)) is Tensor
    assert all(calls[name] >= count for name, count in expected.items()), calls


class Twice(nn.Module):
    """Two graphs, for one cannot hold the print."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            Form(lambda m, x: m.relu(m.bn(m.conv(x)))),
            Form(SHORTCUTS["relu_"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        torch._dynamo.graph_break()
        return self.second(h)


def test_graph_breaks(calls: Counter[str]) -> None:
    assert_same(Twice, image, faster=compiled(), runs=RUNS)
    assert calls["norm_act"]


@pytest.mark.parametrize("body", SHORTCUTS.values(), ids=SHORTCUTS)
def test_readers_of_what_an_activation_overwrites(body: Callable[[Form, Tensor], Tensor]) -> None:
    assert_same(lambda: Form(body), image, faster=compiled(), runs=RUNS)


def normed_then_overwritten(m: Form, x: Tensor) -> Tensor:
    out = m.bn(x)
    x.mul_(2)
    return F.relu(out) + x


def enlarged_then_overwritten(m: Form, x: Tensor) -> Tensor:
    out = F.interpolate(x, scale_factor=2.0)
    view = x.view(-1)
    view.add_(1)
    return m.conv(out)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("body", [normed_then_overwritten, enlarged_then_overwritten])
def test_inputs_that_are_overwritten_before_all_have_read_them(
    body: Callable[[Form, Tensor], Tensor], last: bool
) -> None:
    plain, faster = pair_of(lambda: Form(body), compiled())
    format = torch.channels_last if last else torch.contiguous_format
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 8, 8, 8).to(memory_format=torch.contiguous_format)
            if last and body is normed_then_overwritten:
                x = x.to(memory_format=format)
            y = x.clone()
            assert_near(faster(y), plain(x))
            assert torch.equal(x, y)


def test_forwards_before_one_backward() -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        xs = [draw(3, 3, 32, 32).requires_grad_() for _ in range(2)]
        ys = [module(x) for x in xs]
        (ys[0].log().mean() + (ys[1] * ys[0]).mean()).backward()
        return (
            {f" grad x{i}": x.grad for i, x in enumerate(xs)} | gradients(module) | buffers(module)
        )

    assert_agree(SequentialDiscriminator, run, compiled(), RUNS)


def test_penalties_and_changing_modes() -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for i, training in enumerate([True, False, True]):
            module.train(training)
            real = draw(3, 3, 32, 32).requires_grad_()
            on_real = module(real)
            (g,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            (g.square().flatten(1).sum(1).mean() - on_real.mean()).backward()
            seen |= {f"{i}{name}": value.clone() for name, value in buffers(module).items()}
        return seen | gradients(module)

    assert_agree(SequentialDiscriminator, run, compiled(), RUNS)


def test_dynamic_sizes_are_one_graph(calls: Counter[str]) -> None:
    graphs = 0

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return pygan.compile_backend(gm, inputs)

    plain, faster = pair_of(
        AttributeGenerator, lambda module: module.compile(backend=backend, dynamic=True)
    )
    for batch in (4, 3, 7, 5):
        calls.clear()
        z = torch.randn(batch, 12)
        assert_near(faster(z), plain(z))
    assert graphs == 1
    assert calls["norm_conv"] >= 2


@pytest.mark.parametrize("make", [SequentialGenerator, AttributeGenerator])
def test_autocast(make: Callable[[], nn.Module], calls: Counter[str]) -> None:
    plain, faster = pair_of(make, compiled(fullgraph=True))
    exact = build(make).double()
    z = torch.randn(4, 12, 1, 1)
    z = z if make is SequentialGenerator else z.flatten(1)
    for _ in range(4):  # one more link of the chain is known after each
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = faster(z), plain(z)
        oracle = exact(z.double())
        assert ours.dtype == theirs.dtype == torch.bfloat16
        allowed = CONVOLUTION_FACTOR[torch.bfloat16] * relative_error(theirs, oracle)
        assert relative_error(ours, oracle) <= max(allowed, CONVOLUTION_FLOOR[torch.bfloat16])
    assert calls["norm_conv"] >= 2
    ours.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in faster.parameters())


def test_without_a_gradient(calls: Counter[str]) -> None:
    plain, faster = pair_of(SequentialGenerator, compiled())
    z = torch.randn(4, 12, 1, 1)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        for _ in range(2):
            with mode():
                y = faster(z)
                assert_near(y, plain(z))
                assert y.is_inference() == torch.is_inference_mode_enabled()
                assert not y.requires_grad
    assert calls["norm_conv"]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_layouts_stay(last: bool) -> None:
    def make() -> nn.Module:
        return Outer(next(iter(SequentialDiscriminator().children()))[:6])

    plain, faster = pair_of(make, compiled(fullgraph=True))
    for _ in range(3):
        x = torch.randn(3, 3, 32, 32)
        if last:
            x = x.to(memory_format=torch.channels_last)
        y, z = plain(x), faster(x)
        assert_near(z, y)
        assert strides(y) == strides(z)


def test_an_input_that_is_an_output() -> None:
    def body(m: Form, x: Tensor) -> tuple[Tensor, ...]:
        y = m.relu(m.bn(m.conv(x)))
        return x, y, y, x.view(-1)

    network = Form(body)  # type: ignore[arg-type]
    compiled(fullgraph=True)(network)
    for _ in range(3):
        x = torch.randn(3, 8, 8, 8)
        same, y, again, view = network(x)
        assert same is x and y is again
        assert type(y) is Tensor and view.data_ptr() == x.data_ptr()


class Kept:
    """A backend that keeps the graph and what pygan makes of it."""

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.gm, self.run = gm, pygan.compile_backend(gm, inputs)
        return self.run


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 4)),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), torch.ones(2, 4)),
        (nn.Conv2d(3, 4, 4, 2, 1).double(), torch.ones(1, 3, 8, 8).double()),
        (nn.Conv2d(3, 4, 4, 2, 1).half(), torch.ones(1, 3, 8, 8).half()),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), torch.ones(1, 3, 8)),
    ],
    ids=["linear", "norm alone", "float64", "float16", "1d"],
)
def test_a_graph_with_nothing_for_pygan_runs_itself(module: nn.Module, x: Tensor) -> None:
    kept, network = Kept(), Outer(module)
    expected = network(x)
    network.compile(backend=kept)
    assert torch.equal(network(x), expected)
    assert kept.run == kept.gm.forward
    nodes = [node.target for node in kept.gm.graph.nodes if node.op == "call_function"]
    assert not any(getattr(target, "__module__", "").startswith("pygan") for target in nodes)


def test_environment_variable_is_honoured(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, faster = pair_of(SequentialGenerator, compiled())
    z = torch.randn(4, 12, 1, 1)
    faster(z)
    plain(z)
    monkeypatch.setenv("PYGAN_IMPL", "torch")
    calls.clear()
    assert torch.equal(faster(z), plain(z))
    assert not calls


@pytest.mark.parametrize("backend", [pygan.compile_backend, "eager", "inductor"])
def test_networks_that_are_fused_already(backend: Any, calls: Counter[str]) -> None:
    def make() -> nn.Module:
        return Form(lambda m, x: m.seq(m.relu(m.bn(m.conv(x))) + m.inorm(x)))

    def faster(module: nn.Module) -> None:
        pygan.fuse(module)
        module.compile(backend=backend, fullgraph=True)

    plain, both = pair_of(make, faster)
    for _ in range(RUNS):
        x = torch.randn(3, 8, 8, 8)
        calls.clear()
        y, z = plain(x), both(x)
        assert_near(z, y)
        for a, b in zip(
            *(torch.autograd.grad(o.sin().sum(), n.bn.weight) for o, n in ((y, plain), (z, both))),
            strict=True,
        ):
            assert_near(b, a)
    assert bool(calls) == (backend is pygan.compile_backend)


def test_the_rest_by_inductor(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 4 * 16), nn.BatchNorm2d(4)
            self.up = nn.ConvTranspose2d(4, 3, 4, 2, 1)

        def forward(self, z: Tensor) -> Tensor:
            h = torch.sin(self.linear(z) * 2).view(-1, 4, 4, 4)
            y = self.up(F.relu(self.norm(h)))
            return torch.logsumexp(y, 1) * torch.cos(y.mean(1))

    def latent(generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(4, 6, generator=generator),)

    parts: list[fx.GraphModule] = []
    real = torch._inductor.compile_fx.compile_fx

    def watched(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        parts.append(gm)
        return real(gm, *args, **kwargs)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", watched)
    how = compiled(options={"then": "inductor"})
    assert_same(Network, latent, penalty=False, faster=how, runs=RUNS)
    assert calls["norm_conv"]
    names = [{getattr(n.target, "__name__", "") for n in gm.graph.nodes} for gm in parts]
    assert any("sin" in found for found in names)
    assert any({"logsumexp", "cos"} <= found for found in names)
    assert not any({"batch_norm", "conv_transpose2d"} & found for found in names)
    z = torch.randn(4, 6, requires_grad=True)
    network = Network()
    how(network)
    y = network(z).sum()
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        torch.autograd.grad(y, z, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"mode": "max-autotune"}, "mode='max-autotune' is one of backend='inductor'"),
        ({"options": {"then": "jit"}}, "it takes {'then': 'eager'} and {'then': 'inductor'}"),
        ({"options": {"epilogue_fusion": True}}, "'epilogue_fusion': True} is not known"),
    ],
)
def test_unknown_settings_are_one_sentence(how: dict[str, Any], sentence: str) -> None:
    module = Outer(nn.Conv2d(3, 4, 4, 2, 1))
    compiled(**how)(module)
    with pytest.raises(BackendCompilerFailed) as caught:
        module(torch.ones(1, 3, 8, 8))
    assert isinstance(caught.value.inner_exception, pygan.UserError)
    assert sentence in str(caught.value)


def test_importing_pygan_does_not_import_dynamo() -> None:
    code = "import sys, pygan; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
