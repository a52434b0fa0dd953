from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import norm_act
from pygan.ops import native, norm_act_second
from pygan.ops import norm_act as op

pytestmark = pytest.mark.native

ACTIVATIONS = ["none", "relu", "leaky_relu", "tanh", "sigmoid"]
LAYOUTS = ["contiguous", "channels_last", "strided"]


@dataclasses.dataclass
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    groups: int = 1
    activation: str = "relu"
    training: bool = True
    affine: bool = True
    tracked: bool = True
    offset: float = 0.5
    momentum: float = 0.1
    eps: float = 1e-5
    device: str = "cpu"
    averaged: bool = False


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.dim() in (4, 5):
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=last)
    if layout == "strided":
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def make(case: Case) -> dict[str, Any]:
    g = torch.Generator().manual_seed(7)
    channels = case.shape[1]
    spread = torch.rand(channels, generator=g) + 0.5
    shape = (1, -1, *[1] * (len(case.shape) - 2))
    x = torch.randn(case.shape, generator=g) * spread.view(shape) + case.offset
    made = {
        "x": arrange(x.to(case.dtype), case.layout),
        "weight": torch.randn(channels, generator=g) if case.affine else None,
        "bias": torch.randn(channels, generator=g) if case.affine else None,
        "running_mean": torch.randn(channels, generator=g) if case.tracked else None,
        "running_var": torch.rand(channels, generator=g) + 0.5 if case.tracked else None,
        "dy": torch.randn(case.shape, generator=g).to(case.dtype),
        "ddx": torch.randn(case.shape, generator=g).to(case.dtype),
    }
    return {k: v if v is None else v.to(case.device) for k, v in made.items()}


def run(case: Case, impl: str, wide: bool = False, second: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients, buffers and, if asked, gradients of a function of the gradients."""
    values = make(case)
    if wide:
        values = {k: v if v is None else v.double() for k, v in values.items()}
    leaves = {
        k: values[k].detach().requires_grad_()
        for k in ("x", "weight", "bias")
        if values[k] is not None
    }
    y = op.norm_act(
        leaves["x"],
        values["running_mean"],
        values["running_var"],
        leaves.get("weight"),
        leaves.get("bias"),
        case.training,
        case.momentum,
        case.eps,
        activation=case.activation,
        negative_slope=0.2,
        groups=case.groups,
        averaged=case.averaged,
        impl=impl,
    )
    result = {"y": y.detach()}
    for name in ("running_mean", "running_var"):
        if values[name] is not None:
            result[name] = values[name].clone()
    dy = values["dy"].requires_grad_(second)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=second)
    result |= {f"d{k}": v.detach() for k, v in zip(leaves, grads, strict=True)}
    if second:
        # A gradient penalty: a function of dx, differentiated by everything it depends on.
        objective = (grads[0] * values["ddx"]).sum() + sum((t * t).sum() for t in grads[1:])
        inputs = [*leaves.values(), dy]
        twice = torch.autograd.grad(objective, inputs, allow_unused=True)
        for name, value in zip([*leaves, "dy"], twice, strict=True):
            result[f"d2{name}"] = torch.zeros(()) if value is None else value
    return result


def check(case: Case, second: bool = False, impl: str = "cpu") -> None:
    ours = run(case, impl, second=second)
    plain = run(case, "torch", second=second)
    oracle = run(case, "torch", wide=True, second=second)
    assert ours.keys() == oracle.keys()
    for name in ours:
        dtype = case.dtype if ours[name].dtype == case.dtype else torch.float32
        assert_accurate(name, ours[name], plain[name], oracle[name], dtype)
    assert ours["y"].dtype == case.dtype
    if case.layout != "strided":
        assert ours["y"].stride() == make(case)["x"].stride()


SHAPES = [
    (8, 37, 5, 7),
    (64, 64, 8, 8),
    (6, 3, 1, 1),
    (1, 20, 4, 4),
    (2, 16, 9, 1),
    (128, 48, 4, 4),
    (12, 3, 70, 67),
    (4, 1, 9, 5),
    (6, 33),
    (4, 5, 11),
    (2, 7, 3, 4, 5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    check(Case(shape, dtype, layout, activation="leaky_relu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, training: bool, layout: str, dtype: torch.dtype) -> None:
    check(Case((6, 21, 5, 6), dtype, layout, activation=activation, training=training))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_equal_separate_calls(groups: int, layout: str) -> None:
    check(Case((6, 21, 5, 6), layout=layout, groups=groups))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(("affine", "tracked"), [(False, True), (True, False), (False, False)])
def test_without_parameters_or_running_statistics(affine: bool, tracked: bool, layout: str) -> None:
    check(Case((4, 19, 6, 5), layout=layout, affine=affine, tracked=tracked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grad_of_grad(
    groups: int, activation: str, training: bool, layout: str, dtype: torch.dtype
) -> None:
    check(Case((6, 9, 5, 4), dtype, layout, groups, activation, training), second=True)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (6, 3, 1, 1)], ids=str)
def test_grad_of_grad_of_odd_shapes(shape: tuple[int, ...]) -> None:
    check(Case(shape, activation="leaky_relu"), second=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 9, 5, 4), (6, 33), (4, 5, 11), (2, 7, 3, 4, 5)], ids=str)
def test_grad_of_grad_runs_by_the_kernels(
    shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run_second = norm_act_second._cpu_second
    monkeypatch.setattr(
        norm_act_second, "_cpu_second", lambda *a: calls.append(None) or run_second(*a)
    )
    run(Case(shape, layout=layout, activation="leaky_relu"), "cpu", second=True)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_third_derivative(activation: str, layout: str, training: bool, dtype: torch.dtype) -> None:
    case = Case((6, 9, 5, 4), dtype, layout, 2, activation, training)

    def third(impl: str, wide: bool) -> dict[str, Tensor]:
        values = make(case)
        if wide:
            values = {k: v.double() for k, v in values.items()}
        made_of = {k: values[k].detach().requires_grad_() for k in ("x", "dy", "weight", "bias")}
        y = norm_act(
            made_of["x"],
            values["running_mean"],
            values["running_var"],
            made_of["weight"],
            made_of["bias"],
            training,
            activation=activation,
            negative_slope=0.2,
            groups=case.groups,
            impl=impl,
        )
        leaves = [made_of[k] for k in ("x", "weight", "bias")]
        first = torch.autograd.grad(y, leaves, made_of["dy"], create_graph=True)
        g = torch.Generator().manual_seed(4)
        inputs = [made_of[k] for k in ("x", "dy", "weight")]
        given = [torch.randn(t.shape, generator=g).to(t) for t in (*first, *inputs)]
        second = torch.autograd.grad(first, inputs, given[:3], create_graph=True)
        found = torch.autograd.grad(second, inputs, given[3:])
        return dict(zip(("d3x", "d3dy", "d3weight"), found, strict=True))

    ours, plain, oracle = third("cpu", False), third("torch", False), third("torch", True)
    for name, value in ours.items():
        assert_accurate(name, value, plain[name], oracle[name], value.dtype)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("offset", [0.0, 100.0, 3000.0])
def test_mean_far_from_zero(offset: float, layout: str) -> None:
    check(Case((16, 33, 8, 9), layout=layout, offset=offset))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 9),
    channels=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 17),
    groups=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    training=st.booleans(),
)
def test_any_shape(
    batch: int,
    channels: int,
    height: int,
    width: int,
    groups: int,
    layout: str,
    dtype: torch.dtype,
    activation: str,
    training: bool,
) -> None:
    # Two values a channel are +-1 after normalisation whatever they were: their gradient is
    # rounding noise, in torch as here.
    batch += 4 if batch * height * width < 4 else 0
    shape = (batch * groups, channels, height, width)
    check(Case(shape, dtype, layout, groups, activation, training))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_bits_do_not_depend_on_threads(layout: str, second: bool) -> None:
    case = Case((32, 70, 16, 16), layout=layout, groups=2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, "cpu", second=second))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_nan_and_infinity_come_through() -> None:
    x = torch.randn(4, 5, 3, 3)
    x[1, 2, 0, 0] = float("nan")
    y = norm_act(x, None, None, training=True, activation="relu", impl="cpu")
    assert y[:, 2].isnan().all()
    assert not y[:, [0, 1, 3, 4]].isnan().any()


def test_double_precision_and_subclasses_run_as_torch() -> None:
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64)
    y = norm_act(x, None, None, weight, training=True)
    assert y.dtype == torch.float64
    with pytest.raises(UserError, match="float64"):
        norm_act(x, None, None, weight, training=True, impl="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"groups": 3}, "does not divide"),
        ({"impl": "opencl"}, "no implementation 'opencl'"),
        ({"training": False}, "running_mean and running_var are None"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"training": True} | change
    with pytest.raises(UserError, match=message):
        norm_act(torch.randn(4, 5, 3, 3), None, None, **arguments)


def test_running_statistics_that_follow_a_mean_are_not_of_the_cpus_kernels() -> None:
    arguments = (torch.randn(4, 5, 3, 3), torch.zeros(5), torch.ones(5))
    with pytest.raises(UserError, match="only on a GPU"):
        op.norm_act(*arguments, training=True, groups=4, averaged=True, impl="cpu")
    with pytest.raises(UserError, match="give one for each"):
        op.norm_act(*arguments, training=True, groups=2, averaged=True)
    y = op.norm_act(*arguments, training=True, groups=4, averaged=True, activation="none")
    torch.testing.assert_close(y, torch.nn.functional.instance_norm(arguments[0]))
    assert arguments[1].ne(0).all()


def test_one_value_a_channel_raises_as_torch_does() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(torch.randn(2, 5, 1, 1), None, None, training=True, groups=2)


def test_groups_are_a_context_of_the_thread() -> None:
    assert op.current_groups() == 1
    with op.batch_groups(2):
        assert op.current_groups() == 2
    assert op.current_groups() == 1


def test_native_kernels_are_loaded() -> None:
    assert native.load() is not None, native.reason()


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("size", [3, 100])
def test_parameters_of_another_size_are_refused(name: str, size: int) -> None:
    names = ("running_mean", "running_var", "weight", "bias")
    given = {k: torch.ones(size if k == name else 64) for k in names}
    x = torch.randn(4, 64, 4, 4)
    for training in (True, False):
        with pytest.raises(RuntimeError):
            norm_act(x, **given, training=training)
        with pytest.raises(UserError, match="does not fit the input"):
            norm_act(x, **given, training=training, impl="cpu")
