"""What strided convolutions and batch norms on a GPU do for each other: in the interpreter, with a
tuner that is told the times, and by the same checks on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, assert_accurate_convolution, assert_cancels
from implementations import DTYPES
from test_norm_conv import Case, check
from test_strided_conv_triton import CPU, LAST, SHAPE, forget_choices, in_interpreter, tuner
from torch import Tensor, nn

import pygan
from pygan.functional import conv_norm_act, conv_transpose_norm_act
from pygan.ops import norm_act, norm_act_triton, norm_conv, strided_conv, strided_conv_gpu, tuning
from pygan.ops import norm_conv_gpu as op
from pygan.ops.moments import Moments
from pygan.ops.norm_act import Settings
from pygan.ops.norm_conv import Conv

pytest.importorskip("triton")
assert tuner  # a fixture

PASSES = pytest.mark.parametrize("conv_pass", ["up", "down"])


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGAN_IMPL", "triton")


# The normalized forms.


@in_interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case("up", (4, 19, 3, 2, 5), (1, 0), DTYPES[1], groups=2, bias=True),
        Case("up", (3, 6, 2, 3, 3), (0, 1), activation="leaky_relu", training=False),
        Case("down", (2, 7, 2, 3, 18), (0, 1), groups=2, activation="none", affine=False),
        Case("down", (3, 20, 3, 2, 33), (1, 1), DTYPES[1], activation="leaky_relu", bias=True),
        Case("down", (3, 9, 2, 2, 32), dtype=DTYPES[1], training=False, weight_last=False),
    ],
    ids=str,
)
def test_normalized_as_it_is_read(case: Case, by_name: None) -> None:
    check(case)


@in_interpreter
@PASSES
@pytest.mark.parametrize(("training", "groups"), [(True, 2), (False, 1)])
def test_grad_of_grad(conv_pass: str, training: bool, groups: int, by_name: None) -> None:
    case = Case(conv_pass, (4, 9, 2, 3, 6), (1, 0), groups=groups, activation="leaky_relu")
    check(dataclasses.replace(case, training=training), second=True)


# Statistics that a convolution takes.


@in_interpreter
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "alone"])
@pytest.mark.parametrize(
    ("groups", "rows", "channels", "offset"),
    [(1, 1, 5, 0.0), (3, 40, 17, 30.0), (2, 300, 17, 3000.0)],
    ids=str,
)
def test_parts_are_merged(
    groups: int, rows: int, channels: int, offset: float, tracked: bool
) -> None:
    g = torch.Generator().manual_seed(rows)
    parts = torch.rand(groups, rows, 3, channels, generator=g)
    parts[:, :, 0] = torch.randint(0, 9, (groups, rows, 1), generator=g)
    parts[:, 0, 0] = 3
    parts[:, :, 1] += offset
    parts *= (parts[:, :, :1] > 0).float()  # the empty ones are zero
    weight, bias, mean, var = (torch.rand(channels, generator=g) + 0.5 for _ in range(4))
    settings = Settings(True, 0.3, 1e-5, "relu", 0.0, groups)

    def reference(kind: torch.dtype) -> dict[str, Tensor]:
        count, means, deviations = parts.to(kind).unbind(2)
        total = count.sum(1)
        middle = (count * means).sum(1) / total
        squares = (deviations + count * (means - middle[:, None]).square()).sum(1)
        scale = (squares / total + 1e-5).rsqrt()
        found = {"mean": middle, "invstd": scale}
        if not tracked:
            return found | {"scale": scale}
        running_mean, running_var = mean.to(kind), var.to(kind)
        for each, spread in zip(middle, squares / (total - 1), strict=True):
            running_mean = torch.lerp(running_mean, each, 0.3)
            running_var = torch.lerp(running_var, spread, 0.3)
        found |= {"running mean": running_mean, "running var": running_var}
        return found | {"scale": scale * weight.to(kind)}

    plain, oracle = reference(torch.float32), reference(torch.float64)
    affine = (weight, bias) if tracked else (None, None)
    buffers = (mean.clone(), var.clone()) if tracked else (None, None)
    found, coefficients = norm_act_triton.merged(parts, *affine, *buffers, settings)
    ours = {"mean": found[0], "invstd": found[1], "scale": coefficients[:, 1]}
    ours |= {"running mean": buffers[0], "running var": buffers[1]} if tracked else {}
    assert ours.keys() == oracle.keys()
    for name, value in oracle.items():
        assert_accurate(name, ours[name], plain[name], value, torch.float32)
    assert torch.equal(coefficients[:, 0], found[0])
    shift = bias if tracked else torch.zeros(channels)
    assert torch.equal(coefficients[:, 2], shift.expand(groups, channels))
    assert all(t._version > 0 for t in buffers if t is not None)


@in_interpreter
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_coefficients(training: bool) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(4, 19, 3, 5, generator=g).contiguous(memory_format=LAST)
    weight, bias, mean, var = (torch.rand(19, generator=g) + 0.5 for _ in range(4))
    settings = Settings(training, 0.1, 1e-5, "none", 0.0, 2 if training else 1)
    buffers = mean.clone(), var.clone()
    found, coefficients = norm_act_triton.coefficients(x, weight, bias, *buffers, settings)
    again = mean.clone(), var.clone()
    y, expected = norm_act_triton.forward(x, weight, bias, *again, settings, None)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(buffers, again, strict=True))
    each = coefficients.repeat_interleave(4 // settings.groups, 0)[..., None, None]
    z = (x - each[:, 0]) * each[:, 1] + each[:, 2]
    torch.testing.assert_close(z, y, rtol=1e-6, atol=1e-6)
    taken, same = norm_act_triton.coefficients(x, weight, bias, None, None, settings, found)
    assert taken is found and torch.equal(same, coefficients)


@in_interpreter
def test_statistics_are_those_of_what_is_stored() -> None:
    """A constant far from zero is normalized to zero, whatever its rounding."""
    small = torch.ones(4, 1, 3, 3, dtype=torch.float16)
    weight, bias = torch.zeros(1, 2, 4, 4), torch.tensor([100.03, -7.001])
    moments, settings = Moments(2), Settings(True, 0.1, 1e-5, "none", 0.0, 2)
    extra: dict[str, Any] = {"impl": "triton", "moments": moments}
    y = strided_conv.up(small, weight.half(), bias.half(), **extra)
    shape = strided_conv_gpu.Shape(torch.float16, LAST, small.shape, y.shape, "tf32")
    config = strided_conv_gpu.configs(shape, CPU, "up", statistics=True)[0]
    strided_conv_gpu.up(shape, config, small, weight, bias, moments=moments)
    assert moments.parts is not None
    (mean, _), _ = norm_act_triton.merged(moments.parts, None, None, None, None, settings)
    assert torch.equal(mean, bias.half().float().expand(2, 2))


@dataclasses.dataclass
class Chain:
    """A convolution, batch norm and activation, a second one, and batch norm and activation."""

    passes: tuple[str, str]
    channels: tuple[int, int, int]
    size: tuple[int, int, int]  # batch, and the first map's height and width
    odd: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    groups: int = 1
    training: bool = True
    bias: bool = False


CHAINS = [
    Chain(("up", "up"), (5, 18, 7), (4, 2, 3), (1, 0), groups=2, bias=True),
    Chain(("up", "up"), (16, 9, 3), (3, 1, 2), dtype=DTYPES[1]),
    Chain(("down", "down"), (33, 20, 17), (4, 9, 8), dtype=DTYPES[1], groups=2),
    Chain(("down", "up"), (6, 5, 4), (2, 6, 5), (0, 1), bias=True),
    Chain(("up", "down"), (5, 18, 7), (4, 2, 3), groups=2, training=False),
]


def chain(
    case: Chain, how: str, moments: list[Moments | None], device: str = "cpu"
) -> dict[str, Tensor]:
    """Output, gradients and buffers: "ours", "plain" by torch in the same type, or "wide"."""
    g = torch.Generator().manual_seed(7)
    kind = torch.float64 if how == "wide" else torch.float32

    def drawn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g).to(device, kind)
        return x.contiguous(memory_format=LAST) if len(shape) == 4 else x

    n, h, w = case.size
    x = drawn(n, case.channels[0], h, w)
    x = (x.to(case.dtype).to(kind) if how == "wide" else x.to(case.dtype)).requires_grad_()
    weights, biases, norms, buffers = [], [], [], []
    for conv_pass, a, b in zip(case.passes, case.channels[:2], case.channels[1:], strict=True):
        size = (a, b) if conv_pass == "up" else (b, a)
        weights.append((drawn(*size, 4, 4) * (16 * a) ** -0.5).requires_grad_())
        biases.append(drawn(b).requires_grad_() if case.bias else None)
        norms.append([(drawn(b) * 0.2 + 1).requires_grad_(), drawn(b).requires_grad_()])
        buffers.append([drawn(b) * 0.1, drawn(b).abs() + 0.5])
    groups = case.groups if case.training else 1
    settings = Settings(case.training, 0.1, 1e-5, "leaky_relu", 0.2, groups)
    odd = {p: case.odd if p == "up" else (0, 0) for p in case.passes}
    convs = [
        Conv(p, weight, bias, odd[p], moments=each)
        for p, weight, bias, each in zip(case.passes, weights, biases, moments, strict=True)
    ]
    half = case.dtype != torch.float32 and how != "wide"
    with torch.autocast(device, case.dtype if half else torch.bfloat16, enabled=half):
        if how == "ours":
            first = convs[0]
            if first.conv_pass == "up":
                y = strided_conv.up(*(x, *first[1:4]), moments=moments[0])
            else:
                y = strided_conv.down(*(x, *first[1:3]), moments=moments[0])
            y = norm_conv.norm_conv(y, *buffers[0], *norms[0], settings, convs[1], moments[0])
            rest: dict[str, Any] = settings._asdict() | {"given": moments[1]}
            y = norm_act.norm_act(y, *buffers[1], *norms[1], **rest)
        else:
            y = x
            for conv, norm, running in zip(convs, norms, buffers, strict=True):
                if conv.conv_pass == "up":
                    y = strided_conv.up_ref(y, conv.weight, conv.bias, conv.output_padding)
                else:
                    y = strided_conv.down_ref(y, conv.weight, conv.bias)
                y = norm_act.norm_act_ref(y, *running, *norm, settings)
    leaves = {"x": x, "weight": weights[0], "second weight": weights[1]}
    leaves |= {"norm weight": norms[0][0], "norm bias": norms[0][1]}
    dy = torch.randn(y.shape, generator=g).to(device, case.dtype).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"y": y.detach()} | dict(zip((f"d {name}" for name in leaves), grads, strict=True))
    names = ("mean", "var", "second mean", "second var")
    return found | dict(zip(names, itertools.chain(*buffers), strict=True))


def check_chain(case: Chain, moments: list[Moments | None], device: str = "cpu") -> None:
    ours, plain, oracle = (chain(case, how, moments, device) for how in ("ours", "plain", "wide"))
    for name, value in ours.items():
        weight_grad = name.startswith("d ") and name.endswith("weight")
        triple = (value, plain[name], oracle[name])
        assert_accurate_convolution(f"{case} {name}", *triple, case.dtype, weight_grad=weight_grad)
    assert ours["y"].is_contiguous(memory_format=LAST)


def forbid(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    def forbidden(*given: Any, **named: Any) -> Any:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(place, name, forbidden)


@in_interpreter
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_chain(case: Chain, by_name: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from pygan.kernels import norm_act as kernels

    # No map is read for its statistics.
    forbid(monkeypatch, kernels, "statistics_and_values")
    moments: list[Moments | None] = [None, None]
    if case.training:
        moments = [Moments(case.groups) for _ in range(2)]
    check_chain(case, moments)
    assert all(each is None or each.parts is not None for each in moments)


@in_interpreter
def test_blocks_as_functions(by_name: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from pygan.kernels import norm_act as kernels

    x, weight = torch.randn(4, 6, 4, 6), torch.randn(6, 5, 4, 4) * 0.1
    x, weight = (t.contiguous(memory_format=LAST) for t in (x, weight))
    sweep: dict[str, Any] = {"stride": 2, "padding": 1, "training": True, "batch_groups": 2}
    calls: list[tuple[Callable[..., Tensor], Tensor]] = [
        (conv_transpose_norm_act, weight),
        (conv_norm_act, weight.transpose(0, 1).contiguous(memory_format=LAST)),
    ]
    for call, given in calls:
        arguments = (x, given, None, torch.zeros(5), torch.ones(5))
        expected = call(*arguments, **sweep, impl="torch")
        with monkeypatch.context() as patch:
            forbid(patch, kernels, "statistics_and_values")
            torch.testing.assert_close(call(*arguments, **sweep), expected, rtol=1e-4, atol=1e-4)


# What the tuner chooses.

PLAIN = strided_conv_gpu.Passes(SHAPE, None, None, None)
NORM = op.Norm("moments", 2)


def test_statistics_are_taken_where_that_is_faster(tuner: Any) -> None:
    assert op.with_statistics(PLAIN, CPU, None, "up", 1) is None
    found = strided_conv_gpu.configs(SHAPE, CPU, "up", statistics=True)
    tuner.times = {strided_conv_gpu.name_of(found[-1]): 0.5}
    assert op.with_statistics(PLAIN, CPU, None, "up", 1) is None
    assert op.with_statistics(PLAIN, CPU, None, "up", 2) == found[-1]
    assert len(tuner.asked) == 2
    forget_choices()
    assert op.with_statistics(PLAIN, CPU, None, "up", 2) == found[-1]
    assert len(tuner.asked) == 2  # another process asks the file


def test_by_name_statistics_are_always_taken(tuner: Any) -> None:
    assert op.with_statistics(PLAIN, CPU, "triton", "down", 1) is not None
    tuner.capturing = True
    first = strided_conv_gpu.configs(SHAPE, CPU, "down", statistics=True)[0]
    assert op.with_statistics(PLAIN, CPU, "triton", "down", 4) == first
    assert op.with_statistics(PLAIN, CPU, None, "down", 4) is None
    assert len(tuner.asked) == 1
    # What was unknown during capture is not remembered.
    tuner.capturing, tuner.times = False, {strided_conv_gpu.name_of(first): 0.5}
    assert op.with_statistics(PLAIN, CPU, None, "down", 4) == first


@PASSES
def test_maps_are_normalized_where_that_is_faster(tuner: Any, conv_pass: str) -> None:
    def choice(norm: op.Norm, learns: bool = True, taken: int = 0) -> Any:
        return op.normalizing(PLAIN, CPU, None, conv_pass, norm, learns, op.Behind(taken))

    assert choice(NORM) is None
    assert len(tuner.asked) == 3  # the fastest forward, the fastest gradient, and both or neither
    last = {
        name: list(op._reading_configs(SHAPE, name).items())[-1]
        for name in ("weight_grad", conv_pass)
    }
    tuner.times = {"joined": 0.5} | {name: 0.1 for name, _ in last.values()}
    other = op.Norm("batch", 1)
    found = choice(other)
    assert found is not None
    assert all(getattr(found, name) == config for name, (_, config) in last.items())
    adjoint = {"up": "down", "down": "up"}[conv_pass]
    assert getattr(found, adjoint) is None
    before = len(tuner.asked)
    # Frozen weights, other statistics and a batch norm behind are questions of their own.
    for norm, learns, taken in (
        (other, False, 0),
        (op.Norm("running", 1), True, 0),
        (other, True, 1),
    ):
        assert choice(norm, learns, taken) is not None
        assert len(tuner.asked) > before
        before = len(tuner.asked)
    forget_choices()
    assert choice(other) == found
    assert len(tuner.asked) == before
    assert choice(NORM) is None


def test_nothing_is_timed_during_capture(tuner: Any) -> None:
    tuner.capturing = True
    given = ("up", NORM, True, op.Behind())
    assert op.normalizing(PLAIN, CPU, None, *given) is None
    named = op.normalizing(PLAIN, CPU, "triton", *given)
    assert named is not None and named.up is not None and named.weight_grad is not None
    assert tuner.asked == []
    tuner.capturing, tuner.times = False, {"joined": 0.5}
    assert op.normalizing(PLAIN, CPU, None, *given) is not None


def test_float32_that_is_not_rounded_is_never_normalized(tuner: Any) -> None:
    exact = SHAPE._replace(dtype=torch.float32, precision="ieee")
    passes = PLAIN._replace(shape=exact)
    for named in (None, "triton"):
        assert op.normalizing(passes, CPU, named, "up", NORM, True, op.Behind()) is None
    assert op.with_statistics(passes, CPU, "triton", "up", 1) is not None


def test_forms_that_do_not_run_are_left_out(tuner: Any) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("out of shared memory")

    tuner.choose = tuner.tuner.choose = fails
    assert op.normalizing(PLAIN, CPU, None, "up", NORM, True, op.Behind()) is None


@in_interpreter
@PASSES
def test_every_candidate_runs(
    conv_pass: str, by_name: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def timer(run: Callable[[], Any]) -> float:
        try:
            run()
        except Exception as error:
            pytest.fail(f"a candidate does not run: {error!r}")
        timed.append("")
        return 1.0

    stand_in = tuning.Tuner("a GPU", timer, tmp_path)
    monkeypatch.setattr(strided_conv_gpu, "interpreted", lambda: False)
    monkeypatch.setattr(tuning, "device_stamp", lambda device: "a GPU")
    monkeypatch.setattr(strided_conv_gpu, "_tuner", lambda stamp: stand_in)
    forget_choices()
    shape = strided_conv_gpu.Shape(torch.float16, LAST, (2, 16, 2, 2), (2, 16, 4, 4), "tf32")
    passes = PLAIN._replace(shape=shape)
    assert op.with_statistics(passes, CPU, None, conv_pass, 2) is None
    configs = strided_conv_gpu.configs(shape, CPU, conv_pass, statistics=True)
    for source, taken in (("moments", 2), ("batch", 0), ("running", 0)):
        norm, before = op.Norm(source, 1 if source == "running" else 2), len(timed)
        behind = op.Behind(taken, False, configs[0], True) if taken else op.Behind(tanh=True)
        given = (conv_pass, norm, True, behind)
        assert op.normalizing(passes, CPU, None, *given) is None
        assert len(timed) > before
    forget_choices()


# As on a GPU: "auto", where the CPU's kernels do not count.


def network() -> nn.Sequential:
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for conv, channels in (
        (nn.ConvTranspose2d(5, 18, 4, 2, 1, bias=False), 18),
        (nn.ConvTranspose2d(18, 7, 4, 2, 1), 7),
        (nn.Conv2d(7, 9, 4, 2, 1, bias=False), 9),
    ):
        layers += [conv, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
    result = nn.Sequential(*layers, nn.Conv2d(9, 4, 4, 2, 1))
    return result.to(memory_format=LAST)


def trained(net: nn.Sequential, x: Tensor, halves: bool) -> dict[str, Tensor]:
    """One call in training mode and its gradients, one in evaluation, and the buffers."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    net.train()
    y = torch.cat([net(part) for part in x.chunk(2)]) if halves else net(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d {k}": p.grad for k, p in net.named_parameters()}
    found |= {k: b.clone() for k, b in net.named_buffers()}
    net.eval()
    with torch.no_grad():
        found["evaluated"] = net(x)
    return found


def counted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[None]:
    """Grows with each call of a function."""
    calls: list[None] = []
    function = getattr(place, name)

    def call(*given: Any) -> Any:
        calls.append(None)
        return function(*given)

    monkeypatch.setattr(place, name, call)
    return calls


FORMS = {
    "apart": lambda name: 9.0,
    "statistics": lambda name: 0.5 if "-" in name else 9.0,
    "joined": lambda name: 0.5,
}


@in_interpreter
@pytest.mark.parametrize("form", FORMS)
def test_a_network_as_on_a_gpu(form: str, tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Times(dict[str, float]):
        def get(self, name: str, default: Any = None) -> Any:
            return FORMS[form](name)

    tuner.times = Times()
    for place, name in ((norm_act, "supports_cpu"), (strided_conv, "_supports_cpu")):
        monkeypatch.setattr(place, name, lambda *given: "this is a GPU")
    told = counted(monkeypatch, norm_act_triton, "merged")
    joined = counted(monkeypatch, norm_conv._NormConv, "apply")
    plain = network()
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    x = torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(1))
    x = x.contiguous(memory_format=LAST)
    with norm_act.batch_groups(2):
        ours = trained(fused, x, halves=False)
    theirs = trained(plain, x, halves=True)
    wide = trained(network().double(), x.double(), halves=True)
    for name, value in ours.items():
        if name == "d 3.bias":  # the batch norm behind it takes it away
            assert_cancels(name, value, wide["d 3.weight"], torch.float32)
        elif value.dtype != torch.int64:
            weight_grad = name.startswith("d ") and name.endswith("weight")
            triple = (value, theirs[name], wide[name])
            assert_accurate_convolution(name, *triple, torch.float32, weight_grad=weight_grad)
        else:
            assert torch.equal(value, theirs[name])
    assert len(told) == {"apart": 0, "statistics": 3, "joined": 3}[form]
    assert len(joined) == {"apart": 0, "statistics": 0, "joined": 3}[form]


# On a GPU.

LARGE = [
    Chain(("up", "up"), (256, 128, 64), (16, 8, 8), dtype=torch.bfloat16, groups=2),
    Chain(("down", "down"), (64, 128, 256), (32, 32, 32), dtype=torch.bfloat16, groups=2),
]


@pytest.fixture
def untimed(by_name: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything runs by the first configuration, so that few are compiled."""
    monkeypatch.setattr(strided_conv_gpu, "interpreted", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    forget_choices()
    yield
    forget_choices()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CHAINS, *LARGE], ids=str)
def test_chain_on_a_gpu(case: Chain, untimed: None) -> None:
    moments: list[Moments | None] = [None, None]
    if case.training:
        moments = [Moments(case.groups) for _ in range(2)]
    check_chain(case, moments, "cuda")
    assert all(each is None or each.parts is not None for each in moments)


@pytest.mark.gpu
def test_timed_chain_on_a_gpu() -> None:
    check_chain(LARGE[0], [Moments(2), Moments(2)], "cuda")


@pytest.mark.gpu
def test_captured_as_a_graph(untimed: None) -> None:
    fused = network().cuda()
    pygan.fuse(fused)
    x = torch.randn(32, 5, 16, 16, device="cuda").contiguous(memory_format=LAST)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def step() -> list[Tensor]:
        y = fused(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(fused.parameters()))]

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), norm_act.batch_groups(2):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph), norm_act.batch_groups(2):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    with norm_act.batch_groups(2):
        expected = step()
    for ours, theirs in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
