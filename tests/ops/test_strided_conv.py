from __future__ import annotations

import ctypes
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    CONVOLUTION_FLOOR,
    assert_accurate_convolution,
    relative_error,
)
from differentiated import differentiated
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import conv2d, conv_transpose2d
from pygan.ops import native
from pygan.ops import strided_conv as op

pytestmark = pytest.mark.native

LAST = torch.channels_last
LAYOUTS = ["contiguous", "channels_last", "strided", "shifted"]
METHODS = ["auto", "direct", "f22", "f42"]
WINOGRAD = (op.METHODS["f22"], op.METHODS["f42"])
CANARY = 64  # bytes


class Guarded(threading.local):
    def __init__(self) -> None:
        self.ends: list[int] = []


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch starts as NaN, and nothing is written behind its end."""
    real = native.scratch
    guarded = Guarded()

    def check() -> None:
        while guarded.ends:
            assert ctypes.string_at(guarded.ends.pop(), CANARY) == b"\xff" * CANARY

    def poisoned(size: int) -> int:
        check()
        address = real(size + CANARY)
        ctypes.memset(address, 0xFF, size + CANARY)
        guarded.ends.append(address + size)
        return address

    monkeypatch.setattr(native, "scratch", poisoned)
    yield
    check()


@dataclasses.dataclass
class Case:
    """``size`` is N, A, H, W, B of the small map and the channels of the big one."""

    conv_pass: str
    size: tuple[int, int, int, int, int]
    odd: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32  # float32 beside bfloat16 means autocast
    layout: str = "channels_last"
    weight_layout: str = "channels_last"
    bias: bool = True
    activation: str = "none"
    slope: float = 0.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n, a, h, w, b = self.size
        return (n, a, h, w), (n, b, 2 * h + self.odd[0], 2 * w + self.odd[1])


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=LAST)
    if layout == "strided":
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "shifted":
        # channels_last that starts one element behind an aligned address
        n, c, h, w = x.shape
        room = x.new_zeros(x.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        return room.copy_(x)
    return x


def make(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    small, big = case.shapes
    x, y = (small, big) if case.conv_pass == "up" else (big, small)
    weight = torch.randn(small[1], big[1], 4, 4, generator=g) * 0.02
    values = {
        "x": arrange(torch.randn(x, generator=g).to(case.dtype), case.layout),
        "weight": arrange(weight.to(case.weight_dtype), case.weight_layout),
        "dy": torch.randn(y, generator=g).to(case.dtype),
        "ddx": torch.randn(x, generator=g).to(case.dtype),
        "ddweight": torch.randn(weight.shape, generator=g).to(case.weight_dtype),
    }
    if case.bias:
        values["bias"] = torch.randn(y[1], generator=g).to(case.weight_dtype)
    if case.activation != "none":
        # Rounding decides about the sign of what is almost zero: no gradient comes from there.
        wide = {k: v.double() for k, v in values.items()}
        z = call(dataclasses.replace(case, activation="none"), wide, "torch")
        values["dy"] *= z.abs() > 0.02 * z.square().mean().sqrt()
    return values


def call(case: Case, values: dict[str, Tensor], impl: str, method: str = "auto") -> Tensor:
    x, weight, bias = values["x"], values["weight"], values.get("bias")
    if case.conv_pass == "up":
        return conv_transpose2d(x, weight, bias, 2, 1, case.odd, method=method, impl=impl)
    if case.activation != "none":
        return op.down(x, weight, bias, case.activation, case.slope, method=method, impl=impl)
    return conv2d(x, weight, bias, 2, 1, method=method, impl=impl)


def run(
    case: Case, impl: str, method: str = "auto", wide: bool = False, second: bool = False
) -> dict[str, Tensor]:
    """Output, gradients and, if asked, gradients of a function of the gradients."""
    values = make(case)
    if wide:
        values = {k: v.double() for k, v in values.items()}
    autocast = case.dtype != case.weight_dtype and not wide
    result = differentiated(
        lambda given: call(case, given, impl, method), values, autocast=autocast, second=second
    )
    if second and case.activation != "none":
        result["d2dy"] = result["d2dy"] * (values["dy"] != 0)
    return result


def layer_of(case: Case, method: str) -> Any:
    weight = make(case)["weight"]
    form = LAST if weight.is_contiguous(memory_format=LAST) else torch.contiguous_format
    named = method != "auto"
    threads = torch.get_num_threads()
    return op._layer(case.dtype, form, *case.shapes, method, named, "none", threads)


def promised(case: Case, method: str) -> bool:
    """Whether a method keeps the rule: the Winograd methods whose transforms are rounded to
    bfloat16 do where "auto" takes one, and that is no place for a bfloat16 weight."""
    coarse = case.dtype == torch.bfloat16 and native.load().isa() == "avx512_bf16"
    if not coarse or method not in ("f22", "f42"):
        return True
    chosen = layer_of(case, "auto")
    winograd = all(k and k.method in WINOGRAD for k in (chosen.up, chosen.down, chosen.weight_grad))
    return winograd and case.weight_dtype == torch.float32


def check(case: Case, methods: Sequence[str] = ("auto",), second: bool = False) -> None:
    plain = run(case, "torch", second=second)
    oracle = run(case, "torch", wide=True, second=second)
    for method in methods:
        if case.conv_pass in layer_of(case, method).refused:
            with pytest.raises(UserError, match=f"method '{method}' cannot run {case.conv_pass}"):
                run(case, "cpu", method)
            continue
        ours = run(case, "cpu", method, second=second)
        assert ours.keys() == oracle.keys()
        y, like = ours["y"], plain["y"]
        # torch's activations give a dimension of one element a stride of their own.
        for dim in range(4):
            ignored = case.activation != "none" and y.shape[dim] == 1
            assert ignored or y.stride(dim) == like.stride(dim)
        in_rule = promised(case, method)
        for name in ours:
            about, triple = f"{case} {method} {name}", (ours[name], plain[name], oracle[name])
            assert ours[name].dtype == plain[name].dtype, about
            assert ours[name].isfinite().all(), about
            if in_rule:
                weight_grad = name in ("dweight", "d2weight")
                assert_accurate_convolution(about, *triple, case.dtype, weight_grad=weight_grad)


# The inner layers of a 64 pixel DCGAN, its first and last.
DCGAN = [
    (1, 512, 4, 4, 256),
    (1, 256, 8, 8, 128),
    (1, 128, 16, 16, 64),
    (1, 64, 32, 32, 3),
]
SHAPES = [
    (3, 1, 1, 1, 1),
    (2, 2, 1, 3, 5),
    (1, 33, 5, 6, 48),
    (2, 100, 3, 5, 7),
    (5, 7, 9, 4, 2),
    (1, 16, 17, 19, 1),
    (3, 48, 6, 11, 4),
    (2, 5, 13, 2, 100),
    (1, 300, 5, 6, 300),
]
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


@TYPES
@PASSES
@pytest.mark.parametrize("size", DCGAN, ids=str)
def test_dcgan_layers(
    size: tuple[int, int, int, int, int],
    conv_pass: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    check(Case(conv_pass, size, dtype=dtype, weight_dtype=weight_dtype), METHODS)


@TYPES
@PASSES
@pytest.mark.parametrize("odd", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_odd_shapes(
    size: tuple[int, int, int, int, int],
    odd: tuple[int, int],
    conv_pass: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    check(Case(conv_pass, size, odd, dtype, weight_dtype), METHODS)


@PASSES
@pytest.mark.parametrize("channels", [1, 3, 24])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(
    layout: str, weight_layout: str, bias: bool, channels: int, conv_pass: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(
            Case(
                conv_pass,
                (2, 20, 5, 4, channels),
                dtype=dtype,
                layout=layout,
                weight_layout=weight_layout,
                bias=bias,
            )
        )


@TYPES
@PASSES
@pytest.mark.parametrize("size", [(2, 9, 5, 4, 3), (4, 24, 8, 9, 32)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_grad_of_grad(
    layout: str,
    size: tuple[int, int, int, int, int],
    conv_pass: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    case = Case(conv_pass, size, (1, 0), dtype, weight_dtype, layout, layout)
    check(case, METHODS, second=True)


@PASSES
def test_third_derivative(conv_pass: str) -> None:
    case = Case(conv_pass, (2, 6, 4, 3, 5))

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
    small_channels=st.integers(1, 72),
    big_channels=st.one_of(st.integers(1, 5), st.integers(1, 72)),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    odd=st.tuples(st.integers(0, 1), st.integers(0, 1)),
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
    small_channels: int,
    big_channels: int,
    height: int,
    width: int,
    odd: tuple[int, int],
    layout: str,
    weight_layout: str,
    types: tuple[torch.dtype, torch.dtype],
    bias: bool,
) -> None:
    size = (batch, small_channels, height, width, big_channels)
    check(Case(conv_pass, size, odd, *types, layout, weight_layout, bias), METHODS)


@settings(max_examples=30)
@given(
    conv_pass=st.sampled_from(["up", "down"]),
    batch=st.integers(2, 4),
    channels=st.tuples(st.integers(48, 96), st.integers(48, 96)),
    maps=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    odd=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    layout=st.sampled_from(LAYOUTS),
)
def test_named_winograd_in_bfloat16(
    conv_pass: str,
    batch: int,
    channels: tuple[int, int],
    maps: tuple[int, int],
    odd: tuple[int, int],
    layout: str,
) -> None:
    case = Case(conv_pass, (batch, channels[0], *maps, channels[1]), odd, torch.bfloat16)
    case.layout = layout
    assume(promised(case, "f22"))
    check(case, ["auto", "f22", "f42"])


def test_f42_is_refused_where_its_transforms_would_be_rounded() -> None:
    case = Case("down", (2, 64, 8, 8, 64), dtype=torch.bfloat16)
    names = ("up", "down", "weight_grad")
    rounded = native.load().isa() == "avx512_bf16"
    assert layer_of(case, "f42").refused == (names if rounded else ())
    assert layer_of(dataclasses.replace(case, dtype=torch.float32), "f42").refused == ()
    if rounded:
        values = make(case)
        values |= {k: values[k].bfloat16() for k in ("weight", "bias")}
        with pytest.raises(UserError, match="on a CPU that multiplies bfloat16 itself"):
            call(case, values, "cpu", "f42")


def test_kernels_take_the_layers_of_a_gan() -> None:
    for size in DCGAN:
        for conv_pass in ("up", "down"):
            for dtype in (torch.float32, torch.bfloat16):
                method = "f22" if size[4] > 4 else "direct"
                layer = layer_of(Case(conv_pass, size, dtype=dtype), method)
                assert layer.refused == ()
                assert layer.up and layer.down and layer.weight_grad


ACTIVATIONS = pytest.mark.parametrize(
    ("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.2)], ids=["relu", "leaky_relu"]
)


@ACTIVATIONS
@TYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(
    "size", [(3, 64, 8, 8, 3), (2, 19, 5, 7, 1), (2, 33, 9, 6, 4), (1, 40, 3, 12, 2)], ids=str
)
def test_activation(
    size: tuple[int, int, int, int, int],
    layout: str,
    bias: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    activation: str,
    slope: float,
) -> None:
    case = Case(
        *("down", size, (1, 0), dtype, weight_dtype, layout, layout, bias, activation, slope)
    )
    assert layer_of(case, "auto").takes_activation
    check(case, METHODS, second=True)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 4),
    small_channels=st.integers(1, 72),
    big_channels=st.integers(1, 4),
    maps=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    odd=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    activation=st.sampled_from(["relu", "leaky_relu"]),
    slope=st.sampled_from([0.0, 0.01, 0.2, 1.5]),
)
def test_activation_of_any_shape(
    batch: int,
    small_channels: int,
    big_channels: int,
    maps: tuple[int, int],
    odd: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    bias: bool,
    activation: str,
    slope: float,
) -> None:
    size = (batch, small_channels, *maps, big_channels)
    case = Case("down", size, odd, dtype, layout=layout, bias=bias)
    check(dataclasses.replace(case, activation=activation, slope=slope))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_activation_is_in_the_kernels(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("down", (2, 16, 4, 4, 3), bias=bias, activation="leaky_relu", slope=0.2)
    expected = run(case, "torch")
    monkeypatch.setattr(F, "leaky_relu", None)
    if not bias:
        monkeypatch.setattr(torch.ops.aten, "leaky_relu_backward", None)
    for name, value in run(case, "cpu").items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("channels", "method", "slope"), [(3, "f22", 0.2), (24, "auto", 0.2), (3, "auto", -0.5)]
)
def test_activation_that_the_kernels_do_not_take(channels: int, method: str, slope: float) -> None:
    case = Case("down", (2, 20, 6, 4, channels), activation="leaky_relu", slope=slope)
    check(case, [method], second=True)


def test_other_methods_refuse_activations_and_gates() -> None:
    module = native.load()
    assert module is not None
    shapes = ((1, 4, 4, 16), (1, 8, 8, 3), (16, 4, 4, 3), (1 << 20,))
    arrays = [torch.ones(shape) for shape in shapes]
    *at, room = [t.data_ptr() for t in arrays]

    def down(shape: Any, activation: int = 2) -> None:
        module.strided_conv_down(shape, at[1], 0, 0, at[2], 0, activation, 0.2, at[0], room)

    def up(shape: Any) -> None:
        module.strided_conv_up(shape, at[0], at[0], 0, 0, 0.2, at[2], 0, at[1], room)

    def weight_grad(shape: Any) -> None:
        module.strided_conv_weight_grad(shape, at[0], at[0], 0, 0, 0.2, at[1], at[2], room)

    for method in METHODS:
        shape = module.StridedConvShape(0, 0, 1, 4, 4, 8, 8, 16, 3, op.METHODS[method], 0, 1)
        for attempt in (down, up, weight_grad):
            if method in ("f22", "f42"):
                with pytest.raises(ValueError, match="not with an activation or a gate"):
                    attempt(shape)
            else:
                attempt(shape)
        with pytest.raises(ValueError, match="activation is unknown"):
            down(shape, 3)


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_activation_passes_nan(dtype: torch.dtype, activation: str, slope: float) -> None:
    case = Case("down", (2, 20, 7, 6, 3), dtype=dtype, weight_dtype=dtype)
    case.activation, case.slope = activation, slope
    values = make(case)
    values["x"][1, 1, 2, 3] = float("nan")
    ours, plain = call(case, values, "cpu"), call(case, values, "torch")
    assert plain[1].isnan().any()
    assert ours[plain.isnan()].isnan().all()
    assert ours[0].isfinite().all()
    for value in (float("inf"), float("-inf"), float("nan")):
        values["x"].zero_()
        values["bias"].fill_(value)
        ours, plain = call(case, values, "cpu"), call(case, values, "torch")
        torch.testing.assert_close(ours, plain, equal_nan=True)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(UserError, match="activation is 'tanh'; it is one of none, relu"):
        op.down(torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4), None, "tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "size", [(4, 48, 8, 8, 32), (3, 24, 9, 7, 3), (2, 160, 7, 6, 140)], ids=str
)
@PASSES
def test_threads(conv_pass: str, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(conv_pass, size, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(run(case, "cpu"))
            for name, value in run(case, "cpu").items():
                assert torch.equal(value, results[-1][name]), f"{name}, {count} threads"
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            floor = CONVOLUTION_FLOOR[value.dtype]
            assert relative_error(other[name], value.double()) <= floor, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
@PASSES
def test_nan_and_infinity_come_through(conv_pass: str, method: str, value: float) -> None:
    case = Case(conv_pass, (2, 6, 7, 6, 3))
    values = make(case)
    values["x"][1, 1, 2, 3] = value
    ours, plain = call(case, values, "cpu", method), call(case, values, "torch")
    touched = ~plain.isfinite()
    assert touched[1].any()
    # Winograd adds neighbours together, so those of a touched element may be touched too.
    assert not ours[touched].isfinite().any()
    assert ours[0].isfinite().all()


@PASSES
@pytest.mark.parametrize("channels", [3, 24])
def test_edits_of_weight_data_count_at_once(channels: int, conv_pass: str) -> None:
    case = Case(conv_pass, (2, 16, 4, 4, channels), bias=False)
    values = make(case)
    parameter = torch.nn.Parameter(values["weight"])
    before = call(case, values | {"weight": parameter}, "cpu").detach()
    parameter.data.mul_(2)
    assert torch.equal(call(case, values | {"weight": parameter}, "cpu").detach(), 2 * before)


@PASSES
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_backward_does_not_depend_on_autocast(inside: bool, conv_pass: str) -> None:
    case = Case(conv_pass, (2, 16, 4, 4, 8))
    values = make(case)
    x, weight = values["x"].requires_grad_(), values["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, values, "cpu")
        torch_y = call(case, values, "torch")
    assert y.dtype == torch_y.dtype == torch.bfloat16
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
def test_only_wanted_gradients_are_computed(
    conv_pass: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(conv_pass, (2, 16, 4, 4, 8))
    names = ("run_up", "run_down", "run_weight_grad")
    calls: list[str] = []
    for name in names:
        real = getattr(op, name)

        def watched(
            *args: Any, name: str = name, real: Callable[..., Tensor] = real, **kwargs: Any
        ) -> Tensor:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(op, name, watched)
    back = "run_down" if conv_pass == "up" else "run_up"
    for wanted, expected in (("x", [back]), ("weight", ["run_weight_grad"]), ("bias", [])):
        values = make(case)
        values[wanted].requires_grad_()
        y = call(case, values, "cpu")
        calls.clear()
        y.sum().backward()
        assert calls == expected


def every_layout(shape: tuple[int, ...]) -> list[Tensor]:
    return [
        torch.randn(shape),
        torch.empty(shape, memory_format=LAST).normal_(),
        torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    ]


@PASSES
def test_memory_format_is_torchs(conv_pass: str) -> None:
    maps = ((1, 1), (1, 3), (2, 1))
    for n, a, (h, w), b in itertools.product((1, 2), (1, 4), maps, (1, 3)):
        case = Case(conv_pass, (n, a, h, w, b))
        small, big = case.shapes
        for x, weight in itertools.product(
            every_layout(small if conv_pass == "up" else big), every_layout((a, b, 4, 4))
        ):
            x, weight = x.requires_grad_(), weight.requires_grad_()
            operands = {"x": x, "weight": weight}
            y, plain = call(case, operands, "cpu"), call(case, operands, "torch")
            about = f"{x.shape} {x.stride()} {weight.stride()}"
            assert y.stride() == plain.stride(), about
            y.sum().backward()
            assert x.grad is not None and weight.grad is not None
            assert op.is_last(x.grad) == op.is_last(x), about
            assert weight.grad.is_contiguous(
                memory_format=LAST
                if weight.is_contiguous(memory_format=LAST)
                else torch.contiguous_format
            )


def test_scratch_is_kept() -> None:
    found: dict[str, list[int]] = {}

    def loop(name: str) -> None:
        case = Case("up", (2, 64, 8, 8, 32))
        run(case, "cpu")
        addresses = [native.scratch(1)]
        for _ in range(3):
            run(case, "cpu")
            addresses.append(native.scratch(1))
        found[name] = addresses

    loop("main")
    other = threading.Thread(target=loop, args=("other",))
    other.start()
    other.join()
    for addresses in found.values():
        assert len(set(addresses)) == 1
        assert addresses[0] % 64 == 0
    assert native.scratch(1 << 24) % 64 == 0
    ctypes.memset(native.scratch(1 << 24), 0, 1 << 24)


def test_what_the_kernels_do_not_take_runs_as_torch() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    assert torch.equal(
        conv2d(x.double(), weight.double(), None, 2, 1),
        F.conv2d(x.double(), weight.double(), None, 2, 1),
    )
    assert conv2d(x[0], weight, None, 2, 1).shape == (5, 4, 4)
    assert conv2d(x[:0], weight, None, 2, 1).shape == (0, 5, 4, 4)
    with torch.autocast("cpu", torch.float16):
        assert conv2d(x, weight, None, 2, 1).dtype == torch.float16
    with pytest.raises(UserError, match="float64"):
        conv2d(x.double(), weight.double(), None, 2, 1, impl="cpu")
    with pytest.raises(UserError, match="float64"):
        conv2d(x.double(), weight.double(), None, 2, 1, method="f22")


def test_errors_are_torchs() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    with pytest.raises(RuntimeError, match="type"):
        conv2d(x.bfloat16(), weight, None, 2, 1)
    with pytest.raises(RuntimeError, match="expected input"):
        conv2d(x, weight[:, :2], None, 2, 1)
    with pytest.raises(RuntimeError, match="output padding must be smaller"):
        conv_transpose2d(torch.randn(2, 5, 4, 4), weight, None, 2, 1, 2)
    with pytest.raises(RuntimeError):
        conv2d(x[:, :, :1], weight, None, 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fft"}, "method is 'fft'"),
        ({"method": "direct"}, "it is for 1 to 4 big channels"),
        ({"method": "f22", "impl": "torch"}, "not of torch's"),
        ({"impl": "opencl"}, "no implementation 'opencl'"),
        ({"method": "f22", "stride": 1}, "only 4x4 convolutions of stride 2"),
        ({"impl": "cpu", "padding": 0}, "only 4x4 convolutions of stride 2"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"stride": 2, "padding": 1} | change
    with pytest.raises(UserError, match=message):
        conv2d(torch.randn(2, 6, 8, 8), torch.randn(5, 6, 4, 4), **arguments)


def test_environment_names_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    monkeypatch.setenv("PYGAN_IMPL", "torch")
    monkeypatch.setattr(op, "run_down", None)
    assert torch.equal(conv2d(x, weight, None, 2, 1), F.conv2d(x, weight, None, 2, 1))
    monkeypatch.setenv("PYGAN_IMPL", "cpu")
    with pytest.raises(UserError, match="float64"):
        conv2d(x.double(), weight.double(), None, 2, 1)


def grads(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=g).to(y.dtype)
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    twice = torch.autograd.grad(sum((t.float() ** 2).sum() for t in first), inputs)
    return [y.detach(), *(t.detach() for t in first), *twice]


DENSE: dict[str, tuple[Any, Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "latents": (conv_transpose2d, F.conv_transpose2d, (5, 10, 1, 1), (10, 12, 4, 4), {}),
    "latents, strided": (
        conv_transpose2d,
        F.conv_transpose2d,
        (5, 10, 1, 1),
        (10, 1, 3, 2),
        {"stride": 2},
    ),
    "head": (conv2d, F.conv2d, (5, 12, 4, 4), (1, 12, 4, 4), {}),
    "wide head": (conv2d, F.conv2d, (5, 12, 4, 3), (7, 12, 4, 3), {"stride": (3, 1)}),
    "one channel": (conv2d, F.conv2d, (1, 1, 4, 4), (7, 1, 4, 4), {}),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_one_tap_an_output(
    biased: bool,
    dtype: torch.dtype,
    autocast: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, plain, x_shape, weight_shape, arguments = DENSE[name]
    half = autocast or dtype == torch.bfloat16
    channels = weight_shape[1 if ours is conv_transpose2d else 0]
    for x, weight in itertools.product(every_layout(x_shape), every_layout(weight_shape)):
        x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        bias = torch.randn(channels, dtype=dtype, requires_grad=True) if biased else None
        inputs = (x, weight) if bias is None else (x, weight, bias)

        def evaluate(
            function: Callable[..., Tensor], operands: tuple[Tensor, ...], **more: Any
        ) -> tuple[Tensor, list[Tensor]]:
            y = function(*operands, **arguments, **more)
            return y, grads(y, *operands[:2])

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, same = evaluate(plain, inputs)
            with monkeypatch.context() as patch:
                patch.setattr(F, plain.__name__, None)
                y, found = evaluate(ours, inputs)
        wide = tuple(t.detach().double().requires_grad_() for t in inputs)
        _, oracle = evaluate(plain, wide)
        assert y.dtype == expected.dtype
        assert y.stride() == expected.stride(), (x.stride(), weight.stride())
        for part, a, b, c in zip(
            ("y", "dx", "dweight", "d2x", "d2weight"), found, same, oracle, strict=True
        ):
            assert a.dtype == b.dtype
            kind = torch.bfloat16 if half else torch.float32
            assert_accurate_convolution(part, a, b, c, kind, weight_grad="weight" in part)


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2},
        {"padding": 1},
        {"stride": (2, 1), "padding": (1, 1)},
        {"padding": "same"},
        {"stride": 2, "padding": 1, "dilation": 2},
        {"stride": 2, "padding": 1, "groups": 2},
        {"stride": 2, "padding": 1},
        {"stride": (2, 2), "padding": [1, 1]},
    ],
    ids=str,
)
def test_other_convolutions_are_torchs(arguments: dict[str, Any]) -> None:
    x = torch.randn(2, 4, 17, 17)
    for taps in (1, 3, 4, 9):
        weight = torch.randn(6, 4 // arguments.get("groups", 1), taps, taps)
        bias = torch.randn(6)
        expected = F.conv2d(x, weight, bias, **arguments)
        torch.testing.assert_close(conv2d(x, weight, bias, **arguments), expected)
    if arguments.get("padding") != "same":
        weight = torch.randn(4, 6 // arguments.get("groups", 1), 4, 4)
        bias = torch.randn(weight.shape[1] * arguments.get("groups", 1))
        expected = F.conv_transpose2d(x, weight, bias, **arguments)
        torch.testing.assert_close(conv_transpose2d(x, weight, bias, **arguments), expected)
