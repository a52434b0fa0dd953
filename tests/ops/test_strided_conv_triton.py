"""Triton's strided convolutions in the interpreter, and the choice of a configuration."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate_convolution
from differentiated import differentiated
from implementations import DTYPES, INTERPRETED
from test_strided_conv import Case, call, make
from torch import Tensor, nn

import pygan
from pygan.errors import UserError
from pygan.functional import conv2d
from pygan.ops import (
    cuda_native,
    gpu,
    image_conv_cuda,
    norm_conv_gpu,
    strided_conv_gpu,
    tuning,
)
from pygan.ops import strided_conv as op

pytest.importorskip("triton")

interpreted = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1"),
]
LAST = torch.channels_last
PASSES = pytest.mark.parametrize("conv_pass", ["up", "down"])


def in_interpreter(test: Any) -> Any:
    for mark in interpreted:
        test = mark(test)
    return test


def check(case: Case, second: bool = False) -> None:
    def result(impl: str, wide: bool = False) -> dict[str, Tensor]:
        values = make(case)
        if wide:
            values = {k: v.double() for k, v in values.items()}
        return differentiated(
            lambda given: call(case, given, impl), values, autocast=False, second=second
        )

    ours, plain, oracle = result("triton"), result("torch"), result("torch", wide=True)
    assert ours.keys() == oracle.keys()
    assert ours["y"].stride() == plain["y"].stride()
    for name, value in ours.items():
        about = f"{case} {name}"
        assert value.dtype == plain[name].dtype, about
        triple = (value, plain[name], oracle[name])
        weight_grad = name in ("dweight", "d2weight")
        assert_accurate_convolution(about, *triple, case.dtype, weight_grad=weight_grad)


@in_interpreter
@PASSES
@pytest.mark.parametrize(
    ("size", "odd", "layout", "dtype"),
    [
        ((1, 19, 3, 5, 7), (1, 0), "channels_last", DTYPES[1]),
        ((2, 5, 1, 2, 1), (0, 1), "strided", DTYPES[0]),
        ((2, 64, 4, 4, 64), (0, 0), "shifted", DTYPES[1]),
        ((2, 33, 2, 3, 40), (1, 1), "contiguous", DTYPES[0]),
    ],
    ids=str,
)
def test_odd_shapes(
    size: tuple[int, int, int, int, int],
    odd: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    conv_pass: str,
) -> None:
    check(Case(conv_pass, size, odd, dtype, dtype, layout, layout))


@in_interpreter
@PASSES
def test_grad_of_grad(conv_pass: str) -> None:
    check(Case(conv_pass, (2, 9, 3, 2, 5), (1, 0), weight_layout="contiguous"), second=True)


@in_interpreter
@PASSES
def test_autocast(conv_pass: str) -> None:
    case = Case(conv_pass, (2, 20, 3, 4, 6))
    values = make(case)
    y_and_grads = []
    for impl, autocast in (("triton", True), ("torch", True), ("torch", False)):
        given = {k: v if autocast else v.double() for k, v in values.items()}
        leaves = {k: given[k].clone().requires_grad_() for k in ("x", "weight", "bias")}
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y = call(case, leaves, impl)
        dy = given["dy"].to(y.dtype)
        y_and_grads.append([y, *torch.autograd.grad(y, list(leaves.values()), dy)])
    for name, ours, plain, oracle in zip(
        ("y", "dx", "dweight", "dbias"), *y_and_grads, strict=True
    ):
        assert ours.dtype == plain.dtype, name
        weight_grad = name == "dweight"
        args = (name, ours, plain, oracle, torch.float16)
        assert_accurate_convolution(*args, weight_grad=weight_grad)


def normalized(x: Tensor, coefficients: Tensor | None, slope: float) -> Tensor:
    if coefficients is None:
        return x
    each = coefficients.to(x).repeat_interleave(x.shape[0] // coefficients.shape[0], 0)
    mean, scale, shift = each[..., None, None].unbind(1)
    z = (x - mean) * scale + shift
    return torch.maximum(z, slope * z)


def poisoned(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(size, torch.nan, dtype=dtype).contiguous(memory_format=LAST)


@in_interpreter
@pytest.mark.parametrize(
    ("form", "groups", "dtype"),
    [("plain", 1, DTYPES[1]), ("plain", 2, DTYPES[0]), ("other", 2, DTYPES[0])],
    ids=str,
)
@PASSES
def test_statistics_and_normalized_input(
    conv_pass: str, dtype: torch.dtype, groups: int, form: str
) -> None:
    from pygan.kernels.strided_conv_configs import Config

    n, a, h, w, b = 4, 18, 2, 2, 17
    config = Config(16, 16, 16, 4, 2)
    if form == "other":
        config = config._replace(phases=4, flat=True)
    case = Case(conv_pass, (n, a, h, w, b), (1, 0), dtype, torch.float32)
    coefficients = torch.rand(groups, 3, a if conv_pass == "up" else b) + 0.5
    check_pass(case, config, groups, coefficients)


def check_pass(case: Case, config: Any, groups: int, coefficients: Tensor | None) -> None:
    """A pass with bias and statistics, of a map normalized by the coefficients if there are any."""
    from pygan.kernels import strided_conv as kernels
    from pygan.kernels.strided_conv_weight import pack

    conv_pass, dtype = case.conv_pass, case.dtype
    values = make(case)
    x, weight, bias = values["x"], values["weight"], values["bias"]
    y = poisoned(values["dy"].shape, dtype)
    small, big = (x, y) if conv_pass == "up" else (y, x)
    partials = kernels.partials(conv_pass, small, big, groups, config).fill_(torch.nan)
    packed = pack(weight, dtype)
    extra = (bias, partials, coefficients, 0.2, groups)
    kernels.run(conv_pass, small, big, packed, config, "ieee", *extra)

    def reference(kind: torch.dtype) -> Tensor:
        f = normalized(x.to(torch.promote_types(kind, torch.float32)), coefficients, 0.2).to(kind)
        return call(case, {"x": f, "weight": weight.to(kind), "bias": bias.to(kind)}, "torch")

    plain, oracle = reference(dtype), reference(torch.float64)
    assert_accurate_convolution("y", y, plain, oracle, dtype)
    count, mean, deviations = partials.double().unbind(2)
    every = oracle.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    assert (count.sum(1) == every.shape[2]).all()
    total = (count * mean).sum(1) / every.shape[2]
    square = (deviations + count * (mean - total[:, None]) ** 2).sum(1)
    rounded = plain.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    assert_accurate_convolution("mean", total, rounded.mean(2), every.mean(2), dtype)
    spread = (every.var(2, unbiased=False), rounded.var(2, unbiased=False))
    assert_accurate_convolution("variance", square / every.shape[2], *spread[::-1], dtype)


@in_interpreter
@pytest.mark.parametrize(
    ("b", "groups", "which", "layout"),
    [
        (5, 1, "none", torch.contiguous_format),
        (16, 2, "small", LAST),
        (3, 2, "big", torch.contiguous_format),
    ],
    ids=str,
)
def test_weight_gradient_in_splits(
    b: int,
    groups: int,
    which: str,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pygan.kernels import strided_conv_weight as kernels
    from pygan.kernels.strided_conv_configs import Config

    monkeypatch.setattr(kernels, "LEAST_STEPS", 1)
    n, a, h, w = 4, 18, 3, 5
    config = Config(32, 16, 16, 4, 2, flat=b % 16 != 0)
    case = Case("down", (n, a, h, w, b), (0, 1))
    values = make(case)
    small, big = values["dy"].contiguous(memory_format=LAST), values["x"]
    coefficients = None
    if which != "none":
        coefficients = torch.rand(groups, 3, a if which == "small" else b) + 0.5
    splits, chunk = kernels.split(small, big, groups, config, 1000)
    assert splits > 1
    assert (splits - 1) * chunk < n // groups * h * w <= splits * chunk
    results = []
    for _ in range(2):
        dweight = torch.full((a, b, 4, 4), torch.nan).contiguous(memory_format=layout)
        extra = (which, coefficients, 0.2)
        kernels.weight_grad(dweight, small, big, config, "ieee", 1000, *extra)
        assert dweight.is_contiguous(memory_format=layout)
        results.append(dweight)
    assert torch.equal(*results)

    def reference(kind: torch.dtype) -> Tensor:
        maps = {"small": small.to(kind), "big": big.to(kind)}
        if which != "none":
            maps[which] = normalized(maps[which], coefficients, 0.2)
        return op.weight_grad_ref(**maps)

    plain, oracle = reference(torch.float32), reference(torch.float64)
    args = ("dweight", results[0], plain, oracle, torch.float32)
    assert_accurate_convolution(*args, weight_grad=True)


@in_interpreter
def test_packed_weights() -> None:
    from pygan.kernels.strided_conv_weight import pack

    for b in (1, 3, 130):
        weight = torch.randn(5, b, 4, 4)
        for layout in (LAST, torch.contiguous_format):
            packed = pack(weight.contiguous(memory_format=layout), torch.float16)
            assert torch.equal(packed, weight.half())
            assert packed.is_contiguous(memory_format=LAST)
    last = weight.contiguous(memory_format=LAST)
    assert pack(last, torch.float32) is last


@in_interpreter
def test_methods_are_the_cpus() -> None:
    with pytest.raises(UserError, match="not of triton's"):
        x, weight = torch.randn(2, 6, 8, 8), torch.randn(5, 6, 4, 4)
        conv2d(x, weight, None, 2, 1, method="f22", impl="triton")
    with pytest.raises(UserError, match="float64"):
        conv2d(x.double(), weight.double(), None, 2, 1, impl="triton")


def test_every_shape_has_a_configuration() -> None:
    from pygan.kernels.strided_conv_configs import configs

    kinds = [(torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    channels = itertools.product((1, 3, 16, 100, 512), (*range(1, 66), 96, 128, 200, 1024))
    for (a, b), kind in itertools.product(channels, kinds):
        assert configs("up", a, b, *kind)
        assert configs("down", a, b, *kind)
        found = configs("weight_grad", a, b, *kind)
        assert found
        assert all(c.flat or b % c.block_n == 0 for c in found)


@in_interpreter
def test_a_fused_network(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Sequential(
        nn.ConvTranspose2d(5, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 4, 2, 1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(6, 3, 4, 2, 1),
        nn.Tanh(),
    ).to(memory_format=LAST)
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    found = []
    for network, impl in ((plain, "auto"), (fused, "triton")):
        monkeypatch.setenv("PYGAN_IMPL", impl)
        x = torch.randn(3, 5, 4, 5, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=LAST).requires_grad_()
        network(x).square().sum().backward()
        grads = [p.grad for p in network.parameters()]
        found.append([network(x).detach(), x.grad, *grads, *network.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


CPU = torch.device("cpu")
SHAPE = strided_conv_gpu.Shape(torch.bfloat16, LAST, (2, 64, 4, 4), (2, 32, 8, 8), "tf32")


def forget_choices() -> None:
    """What this process knows beside the file."""
    strided_conv_gpu._passes.cache_clear()
    strided_conv_gpu._up_with_tanh.cache_clear()
    norm_conv_gpu._with_statistics.cache_clear()
    norm_conv_gpu._normalizing.cache_clear()


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose times are in ``times``, torch's 1.0, and which keeps what was timed."""

    class Machine:
        def __init__(self) -> None:
            self.times: dict[str, float] = {}
            self.asked: list[str] = []
            self.capturing = False
            self.tuner = tuning.Tuner("a GPU", lambda run: 1.0, tmp_path)
            self.tuner.choose = self.choose  # type: ignore[method-assign]

        def choose(self, key: str, candidates: dict[str, Any], baseline: str | None = None) -> str:
            self.asked.append(key)
            times = {id(run): self.times.get(name, 9.0) for name, run in candidates.items()}
            if baseline is not None:
                times[id(candidates[baseline])] = 1.0
            self.tuner._timer = lambda run: times[id(run)]
            return tuning.Tuner.choose(self.tuner, key, candidates, baseline)

    machine = Machine()
    monkeypatch.setattr(strided_conv_gpu, "interpreted", lambda: False)
    monkeypatch.setattr(strided_conv_gpu, "_capturing", lambda: machine.capturing)
    monkeypatch.setattr(tuning, "device_stamp", lambda device: "a GPU")
    monkeypatch.setattr(strided_conv_gpu, "_tuner", lambda stamp: machine.tuner)
    forget_choices()
    yield machine
    forget_choices()


def test_random_numbers_stay_those_of_the_training(tuner: Any) -> None:
    before = torch.get_rng_state()
    passes()
    assert len(tuner.asked) == 3
    assert torch.equal(torch.get_rng_state(), before)


def passes(named: str | None = None) -> strided_conv_gpu.Passes:
    return strided_conv_gpu.passes(SHAPE, CPU, named)


def test_the_fastest_way_runs(tuner: Any) -> None:
    fast = strided_conv_gpu.configs(SHAPE, CPU, "down")[-1]
    tuner.times = {strided_conv_gpu.name_of(fast): 0.5}
    found = passes()
    assert found.down == fast
    assert found.up is None or strided_conv_gpu.name_of(found.up) in tuner.times
    assert len(tuner.asked) == 3
    assert passes() is found
    strided_conv_gpu._passes.cache_clear()
    assert passes() == found
    assert len(tuner.asked) == 3  # a second process asks the file


def test_descriptors_may_win(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = SHAPE._replace(big_size=(2, 64, 8, 8))
    monkeypatch.setattr(gpu, "copies_tensors", lambda device: True)
    found = {p: strided_conv_gpu.configs(wide, CPU, p)[-1] for p in ("up", "down")}
    tuner.times = {strided_conv_gpu.name_of(config): 0.5 for config in found.values()}
    won = strided_conv_gpu.passes(wide, CPU, None)
    assert (won.up, won.down, won.weight_grad) == (found["up"], found["down"], None)
    assert won.up.descriptors and won.down.descriptors


def test_torch_stays_where_nothing_is_faster(tuner: Any) -> None:
    assert passes()[1:] == (None, None, None)
    named = passes(named="triton")
    assert all(config is not None for config in named[1:])


def test_nothing_is_timed_during_capture(tuner: Any) -> None:
    tuner.capturing = True
    assert passes()[1:] == (None, None, None)
    first = tuple(strided_conv_gpu.configs(SHAPE, CPU, p)[0] for p in strided_conv_gpu.PASSES)
    assert passes(named="triton")[1:] == first
    assert tuner.asked == []
    tuner.capturing = False
    tuner.times = {strided_conv_gpu.name_of(config): 0.5 for config in first}
    assert any(config is not None for config in passes()[1:])
    tuner.capturing = True
    assert any(config is not None for config in passes()[1:])


def test_image_layers_may_be_cudas(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = strided_conv_gpu.Shape(torch.bfloat16, LAST, (2, 64, 4, 4), (2, 3, 8, 8), "tf32")
    device = torch.device("cpu")
    monkeypatch.setattr(cuda_native, "reason", lambda: None)
    for conv_pass in strided_conv_gpu.PASSES:
        monkeypatch.setattr(image_conv_cuda, conv_pass, lambda *given: None)
    tuner.times = {"cuda": 0.5}
    assert passes()[1:] == (None, None, None)  # of 32 channels
    found = strided_conv_gpu.passes(images, device, None)
    assert found[1:] == ("cuda", "cuda", "cuda") and found.take_activation
    assert "cuda" not in strided_conv_gpu.passes(images, device, "triton")[1:]
    assert strided_conv_gpu.passes(SHAPE, device, "cuda").take_activation


def test_precision_is_that_of_torchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            expected = "tf32" if allowed else "ieee"
            assert strided_conv_gpu.precision(torch.float32) == expected
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_contiguous_maps_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strided_conv_gpu, "supports", lambda *given: None)
    x, weight = torch.randn(2, 6, 8, 8), torch.randn(5, 6, 4, 4)

    def reason(*operands: Tensor, named: bool = False) -> str | None:
        return op._supports_gpu("triton", "down", *operands, None, (0, 0), named)

    assert "channels_last" in (reason(x, weight) or "")
    assert reason(x, weight, named=True) is None
    assert reason(x.contiguous(memory_format=LAST), weight) is None
    assert reason(x, weight.contiguous(memory_format=LAST)) is None
    assert "do not lie" in (
        op._supports_gpu("triton", "up", torch.randn(2, 5, 4, 4), weight, None, (2, 0), True) or ""
    )
