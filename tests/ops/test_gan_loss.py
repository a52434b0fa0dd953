from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from implementations import CPU, DTYPES, TRITON
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import gan_d_loss, gan_g_loss

IMPLS = [CPU, pytest.param("torch", marks=pytest.mark.native), TRITON]


def logits(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(size)
    if kind == "normal":
        return torch.randn(size, generator=g).to(dtype)
    if kind == "wide":
        return (torch.randn(size, generator=g) * 30).to(dtype)
    ends = torch.tensor([1e4, -1e4, 100.0, -100.0, 20.0, -20.0, 0.0, -0.0, 1e-6, -1e-6])
    return ends.repeat(size // 10 + 1)[:size].to(dtype)


def bce(x: Tensor, target: float | Tensor) -> Tensor:
    target = torch.as_tensor(target, dtype=x.dtype).expand_as(x)
    return F.binary_cross_entropy_with_logits(x, target)


def evaluate(function: Callable[..., object], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = function(*leaves)
    loss = result.loss if hasattr(result, "loss") else result
    assert isinstance(loss, Tensor)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "half"])
@pytest.mark.parametrize("kind", ["normal", "wide", "ends"])
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 9001])
def test_discriminator(size: int, kind: str, dtype: torch.dtype, impl: str) -> None:
    real, fake = logits(kind, size, dtype), logits(kind, size + 3, dtype).flip(0)
    for t_real, t_fake, weight in ((1.0, 0.0, 1.0), (0.9, 0.1, 0.5), (1.2, 1.0, 1.0)):

        def plain(r: Tensor, f: Tensor, a: float = t_real, b: float = t_fake, w: float = weight):
            return w * (bce(r, a) + bce(f, b))

        ours = evaluate(
            lambda r, f, a=t_real, b=t_fake, w=weight: gan_d_loss(
                r, f, real_target=a, fake_target=b, weight=w, impl=impl
            ),
            real,
            fake,
        )
        oracle = evaluate(plain, real.double(), fake.double())
        same = evaluate(plain, real, fake)
        for name, a, b, c in zip(("loss", "d_real", "d_fake"), ours, same, oracle, strict=True):
            assert_accurate(name, a, b, c, torch.float32 if name == "loss" else dtype)
        result = gan_d_loss(real, fake, impl=impl)
        assert result.d_real is not None
        for value, source in ((result.d_real, real), (result.d_fake, fake)):
            wide, plain_mean = source.double().sigmoid().mean(), source.float().sigmoid().mean()
            assert_accurate("probability", value, plain_mean, wide, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["normal", "wide", "ends"])
def test_generator_forms(kind: str, impl: str) -> None:
    fake, real = logits(kind, 130, torch.float32), logits(kind, 90, torch.float32)
    forms = {
        "non-saturating": (
            lambda x: gan_g_loss(x, impl=impl),
            lambda x: -F.logsigmoid(x).mean(),
        ),
        "zero-sum": (
            lambda x: gan_g_loss(x, real, loss="minimax", impl=impl),
            lambda x: -(bce(real.to(x.dtype), 1.0) + bce(x, 0.0)),
        ),
        "zero-sum, G's term": (
            lambda x: gan_g_loss(x, loss="minimax", weight=0.5, impl=impl),
            lambda x: 0.5 * F.logsigmoid(-x).mean(),
        ),
        "halved": (
            lambda x: gan_g_loss(x, weight=0.5, impl=impl),
            lambda x: 0.5 * bce(x, 1.0),
        ),
    }
    for name, (fused, plain) in forms.items():
        triple = (evaluate(fused, fake), evaluate(plain, fake), evaluate(plain, fake.double()))
        for part, a, b, c in zip(("loss", "gradient"), *triple, strict=True):
            assert_accurate(f"{name} {part}", a, b, c, torch.float32)


def test_zero_sum_is_minus_d() -> None:
    real, fake = torch.randn(40), torch.randn(50)
    d = gan_d_loss(real, fake, loss="minimax").loss
    g = gan_g_loss(fake, real, loss="minimax").loss
    assert d.item() == -g.item()


@pytest.mark.parametrize("impl", IMPLS)
def test_exact_at_the_ends(impl: str) -> None:
    x = torch.tensor([1e4, -1e4])
    assert gan_d_loss(x[:1], x[1:], impl=impl).loss.item() == 0.0
    assert gan_d_loss(x[1:], x[:1], impl=impl).loss.item() == 2e4
    assert gan_g_loss(x[1:], impl=impl).loss.item() == 1e4
    leaf = x.clone().requires_grad_()
    gan_g_loss(leaf, impl=impl).loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_per_logit(impl: str) -> None:
    g = torch.Generator().manual_seed(3)
    real, fake = torch.randn(4, 1, 5, 5, generator=g), torch.randn(6, 1, 5, 5, generator=g)
    t_real = torch.rand(4, 1, 1, 1, generator=g) * 0.5 + 0.7
    t_fake = (torch.rand(6, 1, 5, 5, generator=g) < 0.1).float()
    ours = evaluate(
        lambda r, f: gan_d_loss(r, f, real_target=t_real, fake_target=t_fake, impl=impl),
        real,
        fake,
    )

    def plain(r: Tensor, f: Tensor) -> Tensor:
        return bce(r, t_real.expand_as(r).to(r)) + bce(f, t_fake.to(f))

    for a, b, c in zip(
        ours,
        evaluate(plain, real, fake),
        evaluate(plain, real.double(), fake.double()),
        strict=True,
    ):
        assert_accurate("per logit", a, b, c, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "half"])
@pytest.mark.parametrize("size", [1, 77, 3000])
def test_grad_of_grad(size: int, dtype: torch.dtype, impl: str) -> None:
    def penalty(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad((g * g * x.detach().cos()).sum(), leaf)[0]

    x = logits("normal", size, dtype)
    # A factor that keeps the gradients of a mean over many logits in range of the half type.
    factor = 3.0 * size
    ours = penalty(lambda t: factor * gan_g_loss(t, target=0.9, impl=impl).loss, x)
    same = penalty(lambda t: factor * bce(t, 0.9), x)
    oracle = penalty(lambda t: factor * bce(t, 0.9), x.double())
    assert_accurate("second derivative", ours, same, oracle, dtype)


@pytest.mark.native
def test_gradients_of_targets_use_torch() -> None:
    target = torch.full((8,), 0.5, requires_grad=True)
    gan_g_loss(torch.randn(8), target=target).loss.backward()
    assert target.grad is not None


@pytest.mark.native
def test_wrong_arguments_are_named() -> None:
    x = torch.randn(4)
    with pytest.raises(UserError, match="loss is 'wgan'"):
        gan_d_loss(x, x, loss="wgan")
    with pytest.raises(UserError, match="logits are empty"):
        gan_g_loss(torch.randn(0))
    with pytest.raises(UserError, match="does not broadcast"):
        gan_g_loss(x, target=torch.ones(3))
