from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate_convolution
from differentiated import differentiated
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import conv2d_avg_pool, upsample_conv2d
from pygan.ops import folded_conv as op

pytestmark = pytest.mark.native

LAST = torch.channels_last
LAYOUTS = ["contiguous", "channels_last", "strided"]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {"up": upsample_conv2d, "down": conv2d_avg_pool}
REFERENCES = {"up": op.upsample_conv2d_ref, "down": op.conv2d_avg_pool_ref}
METHODS = ["auto", "direct", "f22", "f42"]


@dataclasses.dataclass
class Case:
    """``x`` is the shape of the input; the output has ``channels``."""

    conv_pass: str
    x: tuple[int, int, int, int]
    channels: int
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32  # float32 beside bfloat16 means autocast
    layout: str = "channels_last"
    weight_layout: str = "contiguous"
    bias: bool = True

    @property
    def y(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.x
        if self.conv_pass == "up":
            return n, self.channels, 2 * h, 2 * w
        return n, self.channels, h // 2, w // 2


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=LAST)
    if layout == "strided":
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def make(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    weight_shape = (case.channels, case.x[1], 3, 3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    values = {
        "x": arrange(normal(*case.x).to(case.dtype), case.layout),
        "weight": arrange((normal(*weight_shape) * 0.02).to(case.weight_dtype), case.weight_layout),
        "dy": normal(*case.y).to(case.dtype),
        "ddx": normal(*case.x).to(case.dtype),
        "ddweight": normal(*weight_shape).to(case.weight_dtype),
    }
    if case.bias:
        values["bias"] = normal(case.channels).to(case.weight_dtype)
    return values


def call(case: Case, values: dict[str, Tensor], impl: str, method: str = "auto") -> Tensor:
    operands = (values["x"], values["weight"], values.get("bias"))
    return FUNCTIONS[case.conv_pass](*operands, method=method, impl=impl)


def run(
    case: Case, impl: str, method: str = "auto", wide: bool = False, second: bool = False
) -> dict[str, Tensor]:
    """Output, gradients and, if asked, gradients of a function of the gradients."""
    values = make(case)
    if wide:
        values = {k: v.double() for k, v in values.items()}
    autocast = case.dtype != case.weight_dtype and not wide
    return differentiated(
        lambda given: call(case, given, impl, method), values, autocast=autocast, second=second
    )


def check(case: Case, methods: Sequence[str] = ("auto",), second: bool = False) -> None:
    plain = run(case, "torch", second=second)
    oracle = run(case, "torch", wide=True, second=second)
    for method in methods:
        ours = run(case, "cpu", method, second=second)
        assert ours.keys() == oracle.keys()
        for name in ours:
            about, triple = f"{case} {method} {name}", (ours[name], plain[name], oracle[name])
            assert ours[name].dtype == plain[name].dtype, about
            weight_grad = name in ("dweight", "d2weight")
            assert_accurate_convolution(about, *triple, case.dtype, weight_grad=weight_grad)


TYPES = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=["f32", "autocast", "bf16"],
)
PASSES = pytest.mark.parametrize("conv_pass", ["up", "down"])
# Channels in, of the small map of a generator or discriminator, and out.
NETWORKS = [(4, 512, 8, 256), (4, 256, 8, 128), (1, 128, 16, 64), (1, 64, 32, 3)]
SHAPES = [
    ((3, 2, 2, 2), 5),
    ((2, 2, 3, 2), 5),
    ((1, 33, 5, 6), 48),
    ((2, 5, 7, 3), 100),
    ((5, 2, 4, 9), 7),
    ((1, 1, 17, 19), 16),
    ((3, 4, 11, 6), 48),
    ((2, 40, 2, 13), 3),
]


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(1)).float()


@PASSES
@pytest.mark.parametrize("size", [(2, 2), (5, 4), (7, 9)], ids=str)
def test_identity_is_exact(size: tuple[int, int], conv_pass: str) -> None:
    x, weight = integers(2, 3, *size), integers(5, 3, 3, 3)
    folded = op.fold(weight, conv_pass)
    strided = F.conv_transpose2d if conv_pass == "up" else F.conv2d
    y = strided(x, folded, None, 2, 1)
    assert torch.equal(y, REFERENCES[conv_pass](x, weight, None))


@PASSES
def test_gradient_of_the_fold_is_its_transpose(conv_pass: str) -> None:
    for form in (torch.contiguous_format, LAST):
        v = integers(5, 3, 3, 3).contiguous(memory_format=form).requires_grad_()
        folded = op.fold(v, conv_pass)
        w = integers(*folded.shape).flip(0).requires_grad_()
        (dv,) = torch.autograd.grad((folded * w).sum(), v, create_graph=True)
        assert dv.is_contiguous(memory_format=form)
        assert torch.equal((dv * v).sum(), (folded * w).sum())
        (again,) = torch.autograd.grad((dv * v.detach()).sum(), w)
        assert torch.equal(again, folded)


@TYPES
@pytest.mark.parametrize("size", NETWORKS, ids=str)
@PASSES
def test_layers_of_networks(
    conv_pass: str,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    n, a, side, b = size
    case = Case("up", (n, a, side, side), b, dtype, weight_dtype)
    if conv_pass == "down":
        case = Case("down", (n, b, 2 * side, 2 * side), a, dtype, weight_dtype)
    check(case)


@TYPES
@pytest.mark.parametrize(("x", "channels"), SHAPES, ids=str)
@PASSES
def test_odd_shapes(
    conv_pass: str,
    x: tuple[int, int, int, int],
    channels: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    check(Case(conv_pass, x, channels, dtype, weight_dtype))


@PASSES
def test_smallest_shapes(conv_pass: str) -> None:
    least = 1 if conv_pass == "up" else 2
    for n, height, width in itertools.product((1, 3), (least, 3), (least, 2, 3)):
        check(Case(conv_pass, (n, 1, height, width), 1))


@pytest.mark.parametrize("channels", [3, 24])
@PASSES
def test_methods(conv_pass: str, channels: int) -> None:
    methods = METHODS if channels == 3 else ["auto", "f22", "f42"]
    if conv_pass == "up":
        check(Case("up", (2, 20, 5, 4), channels), methods)
    else:
        check(Case("down", (2, channels, 10, 9), 20), methods)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@PASSES
def test_layouts(conv_pass: str, layout: str, weight_layout: str, bias: bool) -> None:
    for dtype, weight_dtype in ((torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        check(Case(conv_pass, (2, 9, 7, 6), 20, dtype, weight_dtype, layout, weight_layout, bias))


@TYPES
@pytest.mark.parametrize("size", [(2, 9, 5, 4, 3), (4, 24, 8, 9, 32), (4, 48, 17, 16, 64)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@PASSES
def test_grad_of_grad(
    conv_pass: str,
    layout: str,
    size: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    *x, channels = size
    case = Case(conv_pass, (x[0], x[1], x[2], x[3]), channels, dtype, weight_dtype, layout, layout)
    check(case, second=True)


@PASSES
def test_third_derivative(conv_pass: str) -> None:
    case = Case(conv_pass, (2, 6, 5, 4), 5)

    def third(impl: str, wide: bool) -> Tensor:
        values = make(case)
        if wide:
            values = {k: v.double() for k, v in values.items()}
        x, weight = values["x"].requires_grad_(), values["weight"].requires_grad_()
        y = call(case, values, impl)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), weight, create_graph=True)
        return torch.autograd.grad((second**2).sum(), x)[0]

    ours, plain, oracle = third("cpu", False), third("torch", False), third("torch", True)
    assert_accurate_convolution("third", ours, plain, oracle, torch.float32, weight_grad=True)


@settings(max_examples=30)
@given(
    conv_pass=st.sampled_from(["up", "down"]),
    batch=st.integers(1, 4),
    channels_in=st.one_of(st.integers(1, 5), st.integers(1, 72)),
    channels_out=st.one_of(st.integers(1, 5), st.integers(1, 72)),
    height=st.integers(2, 13),
    width=st.integers(2, 13),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
    types=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ]
    ),
    bias=st.booleans(),
)
def test_any_shape(
    conv_pass: str,
    batch: int,
    channels_in: int,
    channels_out: int,
    height: int,
    width: int,
    layout: str,
    weight_layout: str,
    types: tuple[torch.dtype, torch.dtype],
    bias: bool,
) -> None:
    # The folded weight is rounded as often as the other, but the rule is about many roundings.
    assume(types[0] == torch.float32 or channels_in * channels_out >= 8)
    x = (batch, channels_in, height, width)
    check(Case(conv_pass, x, channels_out, *types, layout, weight_layout, bias))


@PASSES
@pytest.mark.parametrize("size", [(2, 16, 16, 16), (1, 4, 32, 16)], ids=str)
def test_memory_format_is_torchs(size: tuple[int, int, int, int], conv_pass: str) -> None:
    for layout, weight_layout in itertools.product(LAYOUTS, LAYOUTS):
        case = Case(conv_pass, size, 8, layout=layout, weight_layout=weight_layout)
        values = make(case)
        x, weight = values["x"].requires_grad_(), values["weight"].requires_grad_()
        y, plain = call(case, values, "cpu"), call(case, values, "torch")
        assert y.stride() == plain.stride(), case
        y.sum().backward()
        assert x.grad is not None and weight.grad is not None
        for given_, grad in ((x, x.grad), (weight, weight.grad)):
            form = LAST if given_.is_contiguous(memory_format=LAST) else torch.contiguous_format
            assert grad.is_contiguous(memory_format=form), case


@PASSES
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_backward_does_not_depend_on_autocast(inside: bool, conv_pass: str) -> None:
    case = Case(conv_pass, (2, 16, 8, 8), 8)
    values = make(case)
    x, weight = values["x"].requires_grad_(), values["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, values, "cpu")
    assert y.dtype == torch.bfloat16
    results = []
    for enabled in (inside, not inside):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y), create_graph=True)
            (twice,) = torch.autograd.grad(grads[0].sum(), weight, retain_graph=True)
        assert [t.dtype for t in (*grads, twice)] == [torch.float32] * 3
        results.append([t.detach() for t in (*grads, twice)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@PASSES
def test_edits_of_weight_data_count_at_once(conv_pass: str) -> None:
    values = make(Case(conv_pass, (2, 16, 16, 16), 8, bias=False))
    parameter = torch.nn.Parameter(values["weight"])
    before = FUNCTIONS[conv_pass](values["x"], parameter).detach()
    parameter.data.mul_(2)
    assert torch.equal(FUNCTIONS[conv_pass](values["x"], parameter).detach(), 2 * before)


@PASSES
def test_first_call_may_be_an_inference(conv_pass: str) -> None:
    op._taps.cache_clear()
    values = make(Case(conv_pass, (2, 8, 32, 32), 8))
    with torch.inference_mode():
        FUNCTIONS[conv_pass](values["x"], values["weight"])
    weight = values["weight"].requires_grad_()
    y = FUNCTIONS[conv_pass](values["x"], weight)
    (dweight,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
    assert dweight.isfinite().all()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which passes ran in the folded form."""
    taken: list[str] = []
    for name in ("up", "down"):

        def watched(*args: Any, name: str = name, **kwargs: Any) -> Tensor:
            taken.append(name)
            return real[name](*args, **kwargs)

        monkeypatch.setattr(op, name, watched)
    return taken


real: dict[str, Callable[..., Tensor]] = {"up": op.up, "down": op.down}


@PASSES
def test_small_maps_run_as_the_pair(conv_pass: str, folds: list[str]) -> None:
    function, reference = FUNCTIONS[conv_pass], REFERENCES[conv_pass]
    weight = torch.randn(24, 24, 3, 3)
    for batch, taken in ((3, []), (4, [conv_pass])):
        x = torch.randn(batch, 24, *((8, 8) if conv_pass == "up" else (17, 16)))
        y = function(x, weight)
        assert folds == taken
        torch.testing.assert_close(y, reference(x, weight, None), rtol=1e-4, atol=1e-4)
    folds.clear()
    function(x[:1], weight, method="f22")
    function(x[:1], weight, impl="cpu")
    assert folds == [conv_pass] * 2


@PASSES
def test_what_the_kernels_do_not_take_runs_as_the_pair(conv_pass: str, folds: list[str]) -> None:
    function, reference = FUNCTIONS[conv_pass], REFERENCES[conv_pass]
    x, weight = torch.randn(4, 8, 16, 16), torch.randn(8, 8, 3, 3)
    wide = (x.double(), weight.double(), None)
    assert torch.equal(function(*wide), reference(*wide))
    assert torch.equal(function(x[:0], weight), reference(x[:0], weight, None))
    if conv_pass == "down":
        assert torch.equal(function(x[0], weight), reference(x[0], weight, None))
    bfloat16 = (x.bfloat16(), weight.bfloat16(), None)
    assert torch.equal(function(*bfloat16), reference(*bfloat16))
    other = torch.randn(8, 8, 5, 5)
    assert torch.equal(function(x, other), reference(x, other, None))
    with torch.autocast("cpu", torch.float16):
        assert function(x, weight).dtype == torch.float16
    assert folds == []


@PASSES
def test_errors_are_torchs(conv_pass: str) -> None:
    function, x, weight = FUNCTIONS[conv_pass], torch.randn(4, 8, 16, 16), torch.randn(8, 8, 3, 3)
    with pytest.raises(RuntimeError, match="type"):
        function(x.bfloat16(), weight)
    with pytest.raises(RuntimeError, match="channels"):
        function(x, weight[:, :2])
    with pytest.raises(RuntimeError):
        function(x, weight, torch.randn(9))
    if conv_pass == "down":
        with pytest.raises(RuntimeError, match="Output size is too small"):
            function(x[:, :, :1], weight)


@PASSES
@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        (torch.float32, {"method": "fft"}, "method is 'fft'; it is one of auto"),
        (torch.float32, {"method": "direct"}, "it is for 1 to 4 big channels"),
        (torch.float32, {"method": "f22", "impl": "torch"}, "not of torch's"),
        (torch.float32, {"impl": "opencl"}, "no implementation 'opencl'"),
        (torch.float64, {"impl": "cpu"}, "cannot run as 'cpu': the dtype is torch.float64"),
        (torch.float64, {"method": "f22"}, "cannot run as 'cpu': the dtype is torch.float64"),
    ],
)
def test_wrong_arguments_are_named(
    dtype: torch.dtype, change: dict[str, Any], message: str, conv_pass: str
) -> None:
    x, weight = torch.randn(2, 6, 8, 8).to(dtype), torch.randn(5, 6, 3, 3).to(dtype)
    with pytest.raises(UserError, match=message):
        FUNCTIONS[conv_pass](x, weight, **change)


def test_a_map_without_a_window_is_named() -> None:
    with pytest.raises(UserError, match=r"a map of \(1, 8\) holds no window of 2x2"):
        conv2d_avg_pool(torch.randn(2, 6, 1, 8), torch.randn(5, 6, 3, 3), impl="cpu")


@PASSES
def test_environment_names_the_implementation(
    conv_pass: str, folds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(4, 8, 16, 16), torch.randn(8, 8, 3, 3)
    monkeypatch.setenv("PYGAN_IMPL", "torch")
    expected = REFERENCES[conv_pass](x, weight, None)
    assert torch.equal(FUNCTIONS[conv_pass](x, weight), expected)
    assert folds == []
    monkeypatch.setenv("PYGAN_IMPL", "cpu")
    FUNCTIONS[conv_pass](x[:1], weight)
    assert folds == [conv_pass]
