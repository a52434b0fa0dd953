from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from accuracy import (
    CONVOLUTION_FLOOR,
    FLOOR,
    assert_accurate,
    assert_accurate_convolution,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pygan.ops import native, norm_act, strided_conv
from pygan.ops import norm_conv as op
from pygan.ops.norm_act import Settings

pytestmark = pytest.mark.native
LAST = torch.channels_last


@dataclasses.dataclass
class Case:
    conv_pass: str
    size: tuple[int, int, int, int, int]  # batch, small channels, small height, width, big channels
    odd: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    groups: int = 1
    activation: str = "relu"
    slope: float = 0.2
    training: bool = True
    affine: bool = True
    bias: bool = False
    weight_last: bool = True

    @property
    def x_shape(self) -> tuple[int, ...]:
        n, a, h, w, b = self.size
        if self.conv_pass == "up":
            return n, a, h, w
        return n, b, 2 * h + self.odd[0], 2 * w + self.odd[1]


def make(case: Case) -> dict[str, Any]:
    g = torch.Generator().manual_seed(11)
    _, a, _, _, b = case.size
    channels, outputs = (a, b) if case.conv_pass == "up" else (b, a)
    spread = torch.rand(channels, generator=g) + 0.5
    x = torch.randn(case.x_shape, generator=g) * spread.view(1, -1, 1, 1) + 0.5
    weight = torch.randn(a, b, 4, 4, generator=g) * (16 * channels) ** -0.5
    return {
        "x": x.to(case.dtype).contiguous(memory_format=LAST),
        "norm_weight": torch.rand(channels, generator=g) + 0.5 if case.affine else None,
        "norm_bias": torch.randn(channels, generator=g) if case.affine else None,
        "weight": weight.contiguous(memory_format=LAST) if case.weight_last else weight,
        "bias": torch.randn(outputs, generator=g) if case.bias else None,
        "running_mean": torch.randn(channels, generator=g) * 0.1,
        "running_var": torch.rand(channels, generator=g) + 0.5,
    }


def settings_of(case: Case) -> Settings:
    groups = case.groups if case.training else 1
    return Settings(case.training, 0.1, 1e-5, case.activation, case.slope, groups)


def run(case: Case, how: str, second: bool = False) -> dict[str, Tensor]:
    """Output, gradients and buffers: "fused" in one operation, "apart" in two of ours, "plain" by
    torch in the same type, "wide" in float64."""
    values = make(case)
    if how == "wide":
        values = {k: v if v is None else v.double() for k, v in values.items()}
    names = [k for k in ("x", "norm_weight", "norm_bias", "weight", "bias") if k in values]
    leaves = {k: values[k].detach().requires_grad_() for k in names if values[k] is not None}
    given = values | leaves
    conv = op.Conv(case.conv_pass, given["weight"], given["bias"], case.odd)
    arguments = [given[k] for k in ("x", "running_mean", "running_var", "norm_weight", "norm_bias")]
    autocast = case.dtype != torch.float32 and how != "wide"
    with torch.autocast("cpu", case.dtype if autocast else torch.bfloat16, enabled=autocast):
        if how == "fused":
            y = op.norm_conv(*arguments, settings_of(case), conv)
            assert "NormConv" in type(y.grad_fn).__name__
        elif how == "apart":
            f = norm_act.norm_act(*arguments, **settings_of(case)._asdict())
            if case.conv_pass == "up":
                y = strided_conv.up(f, conv.weight, conv.bias, conv.output_padding)
            else:
                y = strided_conv.down(f, conv.weight, conv.bias)
        else:
            y = op.norm_conv_ref(*arguments, settings_of(case), conv)
    g = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=g).to(y.dtype).requires_grad_(second)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=second)
    result = {"y": y.detach()}
    result |= {k: values[k].clone() for k in ("running_mean", "running_var")}
    result |= {f"d_{k}": v.detach() for k, v in zip(leaves, grads, strict=True)}
    if second:
        ddx = torch.randn(grads[0].shape, generator=g).to(grads[0].dtype)
        objective = (grads[0] * ddx).sum() + (grads[1] * grads[1]).sum()
        twice = torch.autograd.grad(objective, [leaves["x"], leaves["weight"], dy])
        result |= {f"d2_{k}": v for k, v in zip(("x", "weight", "dy"), twice, strict=True)}
    return result


def check(case: Case, second: bool = False) -> None:
    ours, plain, oracle = (run(case, how, second) for how in ("fused", "plain", "wide"))
    for name, value in ours.items():
        sides = (value, plain[name], oracle[name])
        if name.startswith("running"):
            assert_accurate(name, *sides, torch.float32)
        elif name == "d_norm_bias" and case.dtype == torch.bfloat16:
            # A sum over all places of what the convolution hands back, in which the rounding of
            # its transformed weights does not average out: held to what it is without fusion.
            apart = relative_error(run(case, "apart")[name], oracle[name])
            assert relative_error(value, oracle[name]) <= 1.1 * apart
        else:
            weight_grad = name.endswith("weight")
            assert_accurate_convolution(name, *sides, case.dtype, weight_grad=weight_grad)
    assert ours["y"].dtype == case.dtype
    assert ours["y"].is_contiguous(memory_format=LAST)
    assert ours["d_x"].is_contiguous(memory_format=LAST)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
SIZES = [
    ("up", (64, 128, 4, 4, 64), (0, 0)),
    ("up", (8, 128, 8, 8, 64), (0, 0)),
    ("up", (7, 80, 10, 9, 52), (1, 0)),
    ("up", (8, 64, 16, 16, 3), (0, 0)),
    ("up", (3, 13, 7, 5, 3), (1, 1)),
    ("up", (2, 9, 6, 6, 1), (0, 0)),
    ("down", (8, 128, 8, 8, 64), (0, 0)),
    ("down", (64, 128, 4, 4, 64), (0, 0)),
    ("down", (7, 61, 9, 12, 70), (1, 1)),
]


@DTYPES
@pytest.mark.parametrize(("conv_pass", "size", "odd"), SIZES, ids=str)
def test_sizes(conv_pass: str, size: Any, odd: tuple[int, int], dtype: torch.dtype) -> None:
    check(Case(conv_pass, size, odd, dtype))


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize(("conv_pass", "size", "odd"), [SIZES[1], SIZES[3], SIZES[6]], ids=str)
def test_activations(
    conv_pass: str, size: Any, odd: Any, activation: str, training: bool, dtype: torch.dtype
) -> None:
    check(Case(conv_pass, size, odd, dtype, activation=activation, training=training))


@DTYPES
@pytest.mark.parametrize("weight_last", [True, False], ids=["last", "contiguous"])
@pytest.mark.parametrize(("conv_pass", "size", "odd"), [SIZES[1], SIZES[3], SIZES[6]], ids=str)
def test_groups_bias_and_no_affine(
    conv_pass: str, size: Any, odd: Any, weight_last: bool, dtype: torch.dtype
) -> None:
    case = Case(conv_pass, size, odd, dtype, groups=2, bias=True, weight_last=weight_last)
    check(case)
    check(dataclasses.replace(case, affine=False, groups=4))


@pytest.mark.parametrize(("conv_pass", "size", "odd"), [SIZES[1], SIZES[3], SIZES[6]], ids=str)
def test_second_order(conv_pass: str, size: Any, odd: tuple[int, int]) -> None:
    for training, groups in ((True, 1), (True, 2), (False, 1)):
        case = Case(conv_pass, size, odd, training=training, groups=groups)
        check(dataclasses.replace(case, activation="leaky_relu"), second=True)


@settings(max_examples=25, deadline=None)
@given(
    conv_pass=st.sampled_from(["up", "down"]),
    batch=st.sampled_from([2, 4, 6]),
    small=st.integers(16, 70),
    maps=st.tuples(st.integers(8, 13), st.integers(8, 13)),
    big=st.integers(16, 70),
    odd=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    groups=st.sampled_from([1, 2]),
    activation=st.sampled_from(["none", "relu", "leaky_relu"]),
)
def test_drawn(
    conv_pass: str, batch: int, small: int, maps: Any, big: int, odd: Any, groups: int, **rest: Any
) -> None:
    case = Case(conv_pass, (batch * 4, small, *maps, big), odd, groups=groups, **rest)
    check(case)


@DTYPES
@pytest.mark.parametrize(("conv_pass", "size", "odd"), [SIZES[1], SIZES[3], SIZES[6]], ids=str)
def test_the_same_as_both_operations(
    conv_pass: str, size: Any, odd: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(conv_pass, size, odd, dtype, groups=2, activation="leaky_relu")
    fused, apart = run(case, "fused"), run(case, "apart")
    for name, value in fused.items():
        if name.startswith("running"):
            assert torch.equal(value, apart[name])
        elif dtype == torch.float32:
            assert relative_error(value, apart[name]) <= FLOOR[dtype], name


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_tanh_behind(graph: bool) -> None:
    case = Case("up", (8, 64, 8, 8, 3))
    values = make(case)
    leaves = [values[k].requires_grad_(graph) for k in ("x", "norm_weight", "norm_bias", "weight")]
    conv = op.Conv("up", leaves[3], activation="tanh")
    arguments = (leaves[0], None, None, *leaves[1:3], settings_of(case))
    y, expected = op.norm_conv(*arguments, conv), op.norm_conv_ref(*arguments, conv)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert op._prepared(leaves[0], leaves[1:3], settings_of(case), conv, None) is not None
    if graph:
        found = [torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected)]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_threads_and_runs_agree() -> None:
    case = Case("up", (8, 128, 8, 8, 64), groups=2)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(run(case, "fused"))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(value, found[3][name])
        for other in found[1:3]:
            assert relative_error(other[name], value) <= CONVOLUTION_FLOOR[torch.float32], name


def test_the_map_between_is_not_kept() -> None:
    case = Case("up", (8, 128, 8, 8, 64))
    values = make(case)
    x = values["x"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv = op.Conv("up", values["weight"].requires_grad_())
        op.norm_conv(x, None, None, None, None, settings_of(case), conv)
    maps = [t for t in kept if t.shape == x.shape]
    assert len(maps) == 1
    assert maps[0].data_ptr() == x.data_ptr()


def test_what_is_not_taken_runs_apart() -> None:
    base = Case("up", (8, 128, 8, 8, 64))
    values = make(base)
    x, weight = values["x"].requires_grad_(), values["weight"]
    usual = settings_of(base)
    conv = op.Conv("up", weight)
    cases = [
        (x.contiguous(), usual, conv),
        (x, usual._replace(activation="tanh"), conv),
        (x, usual._replace(activation="leaky_relu", negative_slope=1.5), conv),
        (x, usual._replace(activation="leaky_relu", negative_slope=-0.1), conv),
        (x[:, :20], usual, op.Conv("up", weight[:20, :8])),
        (x[:, :64], usual, op.Conv("down", weight[:, :64], activation="relu")),
        (x.double(), usual, conv._replace(weight=weight.double())),
    ]
    for given_x, given_settings, given_conv in cases:
        y = op.norm_conv(given_x, None, None, None, None, given_settings, given_conv)
        assert "NormConv" not in type(y.grad_fn).__name__
        f = norm_act.norm_act_ref(given_x, None, None, None, None, given_settings)
        if given_conv.conv_pass == "up":
            expected = strided_conv.up_ref(f, given_conv.weight, None, (0, 0))
        else:
            expected = strided_conv.down_ref(f, given_conv.weight, None, "relu")
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_normalized_map_needs_its_coefficients() -> None:
    module = native.load()
    assert module is not None
    arrays = [torch.ones(1 << 16) for _ in range(4)]
    small, big, weight, room = (t.data_ptr() for t in arrays)
    for normalized, groups, given_coefficients in itertools.product(
        (0, 1, 2), (0, 1, 3), (0, room)
    ):
        shape = module.StridedConvShape(0, 0, 2, 4, 4, 8, 8, 16, 16, 4, normalized, 1)
        fits = normalized == 1 and groups == 1 and given_coefficients
        fits = fits or (normalized == 0 and not given_coefficients)
        scratch = native.scratch(module.strided_conv_scratch(shape, 0) or 64)
        call = (shape, small, 0, given_coefficients, groups, 0.0, weight, 0, big, scratch)
        if fits:
            module.strided_conv_up(*call)
        else:
            with pytest.raises(ValueError, match=r"array is missing|no kernel takes"):
                module.strided_conv_up(*call)
