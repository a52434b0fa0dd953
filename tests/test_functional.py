from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.accuracy import assert_accurate_convolution
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import conv_norm_act, conv_transpose_norm_act

LAST = torch.channels_last
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclasses.dataclass
class Case:
    up: bool
    shape: tuple[int, int, int, int]  # of the input
    channels: int  # of the output
    kernel: int = 4
    stride: int = 2
    padding: int = 1
    activation: str = "leaky_relu"
    training: bool = True
    affine: bool = True
    tracked: bool = True
    bias: bool = False
    groups: int = 1
    dtype: torch.dtype = torch.float32
    last: bool = True


def make(case: Case) -> dict[str, Any]:
    g = torch.Generator().manual_seed(21)
    inside = case.shape[1]
    sides = (inside, case.channels) if case.up else (case.channels, inside)
    taps = case.kernel**2 * inside
    x = torch.randn(case.shape, generator=g).to(case.dtype)
    weight = torch.randn(*sides, case.kernel, case.kernel, generator=g) * taps**-0.5

    def channels(there: bool, spread: float, least: float = 0.0) -> Tensor | None:
        return torch.rand(case.channels, generator=g) * spread + least if there else None

    return {
        "input": x.contiguous(memory_format=LAST) if case.last else x,
        "weight": weight,
        "bias": channels(case.bias, 0.5),
        "running_mean": channels(case.tracked, 0.2),
        "running_var": channels(case.tracked, 1.0, 0.5),
        "norm_weight": channels(case.affine, 1.0, 0.5),
        "norm_bias": channels(case.affine, 1.0),
    }


def plain(case: Case, given: dict[str, Any]) -> Tensor:
    """The block in torch, a batch norm for each group."""
    convolution = F.conv_transpose2d if case.up else F.conv2d
    y = convolution(given["input"], given["weight"], given["bias"], case.stride, case.padding)
    running, affine = ("running_mean", "running_var"), ("norm_weight", "norm_bias")
    tensors = [given[k] for k in (*running, *affine)]
    parts = [F.batch_norm(p, *tensors, case.training, 0.2, 1e-3) for p in y.chunk(case.groups)]
    return ACTIVATIONS[case.activation](torch.cat(parts))


def fused(case: Case, given: dict[str, Any], impl: str = "auto") -> Tensor:
    block = conv_transpose_norm_act if case.up else conv_norm_act
    return block(
        *given.values(),
        stride=case.stride,
        padding=case.padding,
        training=case.training,
        momentum=0.2,
        eps=1e-3,
        activation=case.activation,
        batch_groups=case.groups,
        impl=impl,
    )


def run(case: Case, how: Any, wide: bool = False, second: bool = False) -> dict[str, Tensor]:
    """The output, the buffers, the gradients and, if asked, those of a gradient penalty."""
    values = make(case)
    if wide:
        values = {k: v if v is None else v.double() for k, v in values.items()}
    names = ("input", "weight", "bias", "norm_weight", "norm_bias")
    leaves = {
        k: values[k].detach().requires_grad_()
        for k in names
        # In training the norm takes the bias out again: its gradient is rounding alone.
        if values[k] is not None and not (k == "bias" and case.training)
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.bfloat16 and not wide):
        y = how(case, values | leaves)
    g = torch.Generator().manual_seed(22)
    dy = torch.randn(y.shape, generator=g).to(case.dtype).to(y.dtype).requires_grad_(second)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=second)
    result = {"y": y.detach()}
    result |= {k: values[k] for k in ("running_mean", "running_var") if values[k] is not None}
    result |= {f"d_{k}": v.detach() for k, v in zip(leaves, grads, strict=True)}
    if second:
        factor = torch.randn(grads[0].shape, generator=g).to(grads[0].dtype)
        penalty = (grads[0] * factor).sum() + (grads[1] * grads[1]).sum()
        inputs = {k: leaves[k] for k in ("input", "weight")} | {"dy": dy}
        twice = torch.autograd.grad(penalty, list(inputs.values()))
        result |= {f"d2_{k}": v for k, v in zip(inputs, twice, strict=True)}
    return result


def check(case: Case, second: bool = False) -> None:
    sides = run(case, fused, False, second), run(case, plain, False, second)
    oracle = run(case, plain, True, second)
    assert sides[0].keys() == oracle.keys()
    for name, ours in sides[0].items():
        three = (ours, sides[1][name], oracle[name])
        if name.startswith("running"):
            assert_accurate_convolution(name, *three, case.dtype)
        else:
            weight_grad = name in ("d_weight", "d2_weight")
            assert_accurate_convolution(name, *three, case.dtype, weight_grad=weight_grad)
    for name in ("y", "d_input"):
        assert sides[0][name].dtype == sides[1][name].dtype
        # Of a 1x1 map either order is both.
        if sides[1][name].shape[2:] != (1, 1):
            last = sides[1][name].is_contiguous(memory_format=LAST)
            assert sides[0][name].is_contiguous(memory_format=LAST) == last, name


UP, DOWN = Case(True, (8, 64, 8, 8), 32), Case(False, (8, 32, 16, 16), 64)
BOTH = pytest.mark.parametrize("base", [UP, DOWN], ids=["up", "down"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@DTYPES
@BOTH
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(base: Case, activation: str, training: bool, dtype: torch.dtype) -> None:
    check(dataclasses.replace(base, activation=activation, training=training, dtype=dtype))


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case(True, (16, 20, 1, 1), 24, stride=1, padding=0, activation="relu"),
        Case(False, (16, 24, 4, 4), 20, stride=1, padding=0),
        Case(True, (4, 6, 5, 7), 3),
        Case(False, (4, 3, 9, 10), 6),
        Case(False, (4, 6, 9, 9), 5, kernel=3, stride=1),
        Case(True, (4, 6, 9, 9), 5, kernel=3, stride=1),
    ],
    ids=lambda c: f"{'up' if c.up else 'down'}-{c.shape}-{c.kernel}-{c.stride}",
)
def test_sizes(case: Case, dtype: torch.dtype) -> None:
    check(dataclasses.replace(case, dtype=dtype))


@BOTH
@pytest.mark.parametrize(
    "changes",
    [
        {"affine": False},
        {"tracked": False},
        {"bias": True},
        {"bias": True, "training": False},
        {"groups": 2},
        {"last": False},
        {"shape": (1, 64, 8, 8)},
    ],
    ids=str,
)
def test_settings(base: Case, changes: dict[str, Any]) -> None:
    check(dataclasses.replace(base, **changes))


@BOTH
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_grad_of_grad(base: Case, training: bool) -> None:
    check(dataclasses.replace(base, activation="tanh", training=training), second=True)


@BOTH
def test_derivatives_by_differences(base: Case) -> None:
    case = dataclasses.replace(
        base, shape=(2, 3, 4, 4), channels=2, activation="tanh", tracked=False
    )
    values = {k: v if v is None else v.double() for k, v in make(case).items()}
    leaves = {k: v.requires_grad_() for k, v in values.items() if v is not None}

    def call(*tensors: Tensor) -> Tensor:
        return fused(case, values | dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.native
@BOTH
def test_runs_by_the_fused_operations(base: Case) -> None:
    values = make(base)
    values["weight"].requires_grad_()
    y = fused(base, values, "cpu")
    assert y.grad_fn is not None
    names = [type(y.grad_fn).__name__, type(y.grad_fn.next_functions[0][0]).__name__]
    assert names == ["_NormActBackward", "ConvBackward"]
    y = fused(base, make(base) | {"weight": values["weight"]}, "torch")
    assert type(y.grad_fn).__name__ == "LeakyReluBackward0"


def test_parameters_that_do_not_fit_are_refused() -> None:
    for base in (UP, DOWN):
        for name in ("running_mean", "running_var", "norm_weight", "norm_bias"):
            for size in (base.channels - 1, base.channels + 1):
                with pytest.raises(RuntimeError, match=f"should contain {base.channels} elements"):
                    fused(base, make(base) | {name: torch.ones(size)})


@pytest.mark.parametrize(
    ("changes", "impl", "message"),
    [
        ({"activation": "gelu"}, "auto", "activation is 'gelu'; it is one of none, relu"),
        ({"groups": 3}, "auto", "a batch of 8 does not divide into 3 groups"),
        ({"training": False, "tracked": False}, "auto", "evaluation needs both"),
        ({"kernel": 3, "stride": 1}, "cpu", "only 4x4 convolutions of stride 2"),
        ({"dtype": torch.float16}, "cpu", "cannot run as 'cpu': the dtype is torch.float16"),
        ({}, "opencl", "has no implementation 'opencl'"),
    ],
)
@BOTH
def test_wrong_arguments_are_named(
    base: Case, changes: dict[str, Any], impl: str, message: str
) -> None:
    case = dataclasses.replace(base, **changes)
    with pytest.raises(UserError, match=message):
        fused(case, make(case), impl)


def test_one_value_a_channel_is_refused() -> None:
    case = Case(False, (1, 3, 4, 4), 2, stride=1, padding=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(case, make(case))
