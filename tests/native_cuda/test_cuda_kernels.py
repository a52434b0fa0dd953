"""gan_loss, image_batch and norm_act in CUDA against float64, by the shim and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

from pygan.functional import gan_d_loss, gan_g_loss, image_batch
from pygan.ops import cuda_native, norm_act_cuda
from pygan.ops.norm_act import Settings, norm_act_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["f32", "bf16", "f16"]


def evaluate(function: Callable[..., object], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = function(*leaves)
    assert isinstance(loss, Tensor)
    return tuple(t.cpu() for t in (loss.detach(), *torch.autograd.grad(loss, leaves)))


def bce(x: Tensor, target: float | Tensor) -> Tensor:
    target = torch.as_tensor(target, dtype=x.dtype).expand_as(x)
    return F.binary_cross_entropy_with_logits(x, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("sizes", [(1, 3), (1000, 77), (9001, 4096), (70, 12289)])
def test_gan_loss(sizes: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    g = torch.Generator().manual_seed(sizes[0])
    real, fake = ((torch.randn(size, generator=g) * 8).to(dtype) for size in sizes)
    targets = torch.rand(sizes[1], generator=g)
    ours = evaluate(
        lambda r, f: (
            gan_d_loss(
                r, f, real_target=0.9, fake_target=targets.to(device), weight=0.5, impl="cuda"
            ).loss
        ),
        real.to(device),
        fake.to(device),
    )

    def plain(r: Tensor, f: Tensor) -> Tensor:
        return 0.5 * (bce(r, 0.9) + bce(f, targets))

    oracle, same = evaluate(plain, real.double(), fake.double()), evaluate(plain, real, fake)
    for name, a, b, c in zip(("loss", "d_real", "d_fake"), ours, same, oracle, strict=True):
        assert_accurate(name, a, b, c, torch.float32 if name == "loss" else dtype)
    result = gan_d_loss(real.to(device), fake.to(device), impl="cuda")
    for value, x in ((result.d_real, real), (result.d_fake, fake)):
        assert value is not None
        mean = x.float().sigmoid().mean()
        assert_accurate("probability", value.cpu(), mean, x.double().sigmoid().mean(), mean.dtype)


def test_gan_loss_is_exact_at_the_ends(device: torch.device) -> None:
    x = torch.tensor([1e4, -1e4], device=device)
    assert gan_d_loss(x[:1], x[1:], impl="cuda").loss.item() == 0.0
    assert gan_d_loss(x[1:], x[:1], impl="cuda").loss.item() == 2e4
    leaf = x.clone().requires_grad_()
    gan_g_loss(leaf, impl="cuda").loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(5, 7, 3), (1, 1, 1), (16, 16, 3), (3, 400, 1)])
def test_image_batch(
    size: tuple[int, int, int], flipped: bool, dtype: torch.dtype, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (11, *size), dtype=torch.uint8, generator=g)
    index = torch.tensor([3, 0, 10, 3, 7])
    flip = torch.tensor([True, False, True, False, True]) if flipped else None
    on_device = [t if t is None else t.to(device) for t in (source, index, flip)]
    ours = image_batch(*on_device[:2], flip=on_device[2], dtype=dtype, impl="cuda")
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours.cpu(), image_batch(source, index, flip=flip, dtype=dtype, impl="torch"))


CASES = [
    # shape, channels_last, groups, activation, affine
    ((6, 5, 3, 7), True, 3, "leaky_relu", True),
    ((4, 64, 6, 6), True, 2, "relu", True),
    ((2, 264, 3, 3), True, 1, "tanh", False),
    ((7, 24), True, 1, "sigmoid", True),
    ((6, 5, 3, 7), False, 3, "none", True),
    ((4, 3, 20, 24), False, 2, "leaky_relu", True),
    ((3, 2, 5001), False, 1, "tanh", False),
    ((33, 16, 8, 8), True, 1, "leaky_relu", True),
    # Instance norms: a group for each image.
    ((6, 5, 3, 7), True, 6, "relu", True),
    ((40, 33, 2, 2), True, 40, "leaky_relu", True),
    ((7, 16, 9, 8), False, 7, "tanh", True),
    ((5, 3, 90, 61), False, 5, "none", False),
    ((5, 8, 64, 66), True, 5, "relu", True),
]


@pytest.mark.parametrize("mode", ["training", "averaged", "evaluation", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("shape", "last", "groups", "activation", "affine"), CASES)
def test_norm_act(
    shape: tuple[int, ...],
    last: bool,
    groups: int,
    activation: str,
    affine: bool,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
) -> None:
    if mode == "given" and dtype is not torch.bfloat16:
        return
    if mode == "averaged" and groups != shape[0]:
        return
    training = mode != "evaluation"
    averaged = mode == "averaged"
    settings = Settings(training, 0.3, 1e-3, activation, 0.2, groups if training else 1, averaged)
    g = torch.Generator().manual_seed(1)
    # A mean of many deviations: sums of squares would lose it.
    x = (torch.randn(shape, generator=g) + 30).to(dtype)
    dy = torch.randn(shape, generator=g).to(dtype)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = shape[1]
    weight = torch.rand(channels, generator=g) + 0.5 if affine else None
    bias = torch.randn(channels, generator=g) if affine else None
    running = (torch.randn(channels, generator=g) + 30, torch.rand(channels, generator=g) + 0.5)

    def plain(dtype: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        leaf = x.to(dtype).detach().requires_grad_()
        parameters = [None if p is None else p.to(wide).requires_grad_() for p in (weight, bias)]
        buffers = [t.to(wide, copy=True) for t in running]
        y = norm_act_ref(leaf, *buffers, *parameters, settings)
        leaves = [leaf, *(p for p in parameters if p is not None)]
        found = torch.autograd.grad(y, leaves, dy.to(dtype))
        names = ("dx", "dweight", "dbias")[: len(found)]
        values = {"y": y.detach(), **dict(zip(names, found, strict=True))}
        if mode in ("training", "averaged"):
            values |= {"running_mean": buffers[0], "running_var": buffers[1]}
        return values

    oracle, same = plain(torch.float64, torch.float64), plain(dtype, torch.float32)
    parameters = [None if p is None else p.to(device) for p in (weight, bias)]
    buffers = [t.to(device, copy=True) for t in running]
    source, given = x.to(device), None
    if mode == "given":
        given = norm_act_cuda.statistics(source, *(t.clone() for t in buffers), settings)
    y, statistics = norm_act_cuda.forward(source, *parameters, *buffers, settings, given)
    ours = {"y": y, "running_mean": buffers[0], "running_var": buffers[1]}
    wants = (True, affine, affine)
    grads = norm_act_cuda.backward(source, dy.to(device), *parameters, statistics, wants, settings)
    ours |= {k: v for k, v in zip(("dx", "dweight", "dbias"), grads, strict=True) if v is not None}
    assert y.stride() == x.stride()
    if mode not in ("training", "averaged"):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(buffers, running, strict=True))
    for name in oracle:
        wide = torch.float32 if name not in ("y", "dx") else dtype
        assert_accurate(name, ours[name].cpu(), same[name], oracle[name], wide)
    again = norm_act_cuda.backward(
        source,
        torch.empty_like(source).copy_(dy),
        *parameters,
        statistics,
        wants,
        settings,
        in_place=True,
    )
    assert again[0] is not None
    assert torch.equal(again[0], grads[0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norm_act_coefficients(training: bool, device: torch.device) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(4, 19, 3, 5, generator=g).contiguous(memory_format=torch.channels_last)
    x = x.to(device)
    weight, bias, mean, var = ((torch.rand(19, generator=g) + 0.5).to(device) for _ in range(4))
    settings = Settings(training, 0.1, 1e-5, "none", 0.0, 2 if training else 1)
    buffers, again = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    found, coefficients = norm_act_cuda.coefficients(x, weight, bias, *buffers, settings)
    y, expected = norm_act_cuda.forward(x, weight, bias, *again, settings)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(buffers, again, strict=True))
    each = coefficients.repeat_interleave(4 // settings.groups, 0)[..., None, None]
    z = (x - each[:, 0]) * each[:, 1] + each[:, 2]
    torch.testing.assert_close(z, y, rtol=1e-6, atol=1e-6)
    given = (None, None, settings, found)
    taken, same = norm_act_cuda.coefficients(x, weight, bias, *given)
    assert taken is found and torch.equal(same, coefficients)


def test_norm_act_keeps_nan(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, 5)
    x[1, 2, 3, 4] = float("nan")
    settings = Settings(True, 0.1, 1e-5, "relu", 0.2, 1)
    y, _ = norm_act_cuda.forward(x.to(device), None, None, None, None, settings)
    assert y[:, 2].isnan().all()
    assert not y[:, :2].isnan().any()


class Guarded:
    """Arrays between guards, a given number of elements away from an aligned address."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: list[tuple[Tensor, int, int]] = []

    def array(self, values: Tensor, offset: int) -> Tensor:
        start, size = 64 + offset, values.numel()
        buffer = torch.full((start + size + 64,), 7.0, dtype=values.dtype, device=self.device)
        buffer[start : start + size] = values.flatten().to(self.device)
        self.buffers.append((buffer, start, size))
        return buffer[start : start + size]

    def check(self) -> None:
        for buffer, start, size in self.buffers:
            assert (buffer[:start] == 7.0).all()
            assert (buffer[start + size :] == 7.0).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(("batch", "channels", "spatial"), [(2, 7, 5), (4, 8, 40), (2, 40, 16)])
def test_norm_act_writes_its_outputs_only(
    batch: int, channels: int, spatial: int, layout: int, offset: int, device: torch.device
) -> None:
    module = cuda_native.load()
    assert module is not None
    memory = Guarded(device)
    shape = module.NormActShape(1, layout, batch, channels, spatial, 2, 2, 0.2)
    x = memory.array(torch.randn(batch * channels * spatial).bfloat16(), offset)
    y, dx = (memory.array(torch.full_like(x, float("nan")), offset) for _ in range(2))
    mean, invstd, dweight, dbias = (
        memory.array(torch.full((count * channels,), float("nan")), offset)
        for count in (2, 2, 1, 1)
    )
    coefficients = memory.array(torch.full((6 * channels,), float("nan")), offset)
    variance = memory.array(torch.full((2 * channels,), float("nan")), offset)
    scratch = memory.array(
        torch.full((module.norm_act_scratch(shape),), float("nan"), dtype=torch.float64), 0
    )
    p = Tensor.data_ptr
    cuda_native.run(
        module.norm_act_forward,
        *(x, shape, p(x), 0, 0, True, 1e-5, 0.1, 0, 0),
        *(p(y), p(mean), p(invstd), p(coefficients), p(variance), p(scratch)),
    )
    cuda_native.run(
        module.norm_act_backward,
        *(x, shape, p(x), p(y), 0, 0, p(mean), p(invstd), True),
        *(p(dx), p(dweight), p(dbias), p(scratch)),
    )
    memory.check()
    outputs = (y, dx, mean, invstd, dweight, dbias, coefficients, variance)
    assert not any(t.isnan().any() for t in outputs)


def test_index_outside_the_images_is_nan(device: torch.device) -> None:
    module = cuda_native.load()
    assert module is not None
    memory = Guarded(device)
    images = torch.full((2, 1, 3, 1), 255, dtype=torch.uint8, device=device)
    index = torch.tensor([-1, 1, 2], device=device)
    out = memory.array(torch.zeros(9), 1)
    cuda_native.run(
        module.image_batch,
        *(out, images.data_ptr(), 2, 1, 3, 1, index.data_ptr(), 0, 3, 0, out.data_ptr()),
    )
    memory.check()
    assert out.view(3, 3).isnan().all(1).tolist() == [True, False, True]


def test_wrong_arguments_are_sentences(device: torch.device) -> None:
    module = cuda_native.load()
    assert module is not None
    with pytest.raises(ValueError, match="a size is negative, does not divide"):
        module.norm_act_backward(
            module.NormActShape(0, 0, 3, 4, 5, 2, 0, 0.0), *(0,) * 6, True, *(0,) * 5
        )
    with pytest.raises(ValueError, match="a required array is missing"):
        module.image_batch(0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="a dtype, layout or activation is unknown"):
        module.gan_loss(3, ((0, 0, 0.0, 1.0, 1, 0, 0),), 0, 0, 0)
