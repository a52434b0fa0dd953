from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ops.accuracy import assert_accurate
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import gan_d_loss, gan_g_loss
from pygan.losses import NAMES, d_loss_term, has_kernel, is_paired

Formula = Callable[..., Tensor]


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def bce(x: Tensor, t: Any) -> Tensor:
    return (t * softplus(-x) + (1 - t) * softplus(x)).mean()


# D(r, f, real_target, fake_target) and G(f, r, target, fake_target), as their papers write them.
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "bce": (lambda r, f, a, b: bce(r, a) + bce(f, b), lambda f, r, a, b: bce(f, a)),
    "minimax": (
        lambda r, f, a, b: bce(r, a) + bce(f, b),
        lambda f, r, a, b: -bce(r, 1.0) - bce(f, b),
    ),
    "logistic": (
        lambda r, f, a, b: softplus(-r).mean() + softplus(f).mean(),
        lambda f, r, a, b: softplus(-f).mean(),
    ),
    "softplus": (
        lambda r, f, a, b: softplus(-r).mean() + softplus(f).mean(),
        lambda f, r, a, b: softplus(-f).mean(),
    ),
    "hinge": (
        lambda r, f, a, b: (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(),
        lambda f, r, a, b: -f.mean(),
    ),
    "lsgan": (
        lambda r, f, a, b: ((r - a) ** 2).mean() + ((f - b) ** 2).mean(),
        lambda f, r, a, b: ((f - a) ** 2).mean(),
    ),
    "wasserstein": (lambda r, f, a, b: f.mean() - r.mean(), lambda f, r, a, b: -f.mean()),
    "relativistic": (
        lambda r, f, a, b: bce(r - f.mean(), a) + bce(f - r.mean(), b),
        lambda f, r, a, b: bce(f - r.mean(), a) + bce(r - f.mean(), b),
    ),
    "relativistic_pairing": (
        lambda r, f, a, b: softplus(f - r).mean(),
        lambda f, r, a, b: softplus(r - f).mean(),
    ),
}
TARGETED = ["bce", "lsgan", "relativistic"]
EVERY = pytest.mark.parametrize("loss", NAMES)


def test_every_name_has_a_formula() -> None:
    assert set(FORMULAS) == set(NAMES)


def logits(kind: str, size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = {"normal": 1.0, "wide": 30.0, "far": 3000.0}[kind]
    return (torch.randn(size, generator=g) * scale).to(dtype)


def gradients(call: Formula, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value and, where they have one, the gradients of the inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = call(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(t for t in found if t is not None)]


def compare(ours: Formula, plain: Formula, inputs: Sequence[Tensor]) -> None:
    dtype = inputs[0].dtype
    sides = (
        gradients(ours, inputs),
        gradients(lambda *t: plain(*(x.float() for x in t)), inputs),
        gradients(plain, [t.double() for t in inputs]),
    )
    for i, (a, b, c) in enumerate(zip(*sides, strict=True)):
        assert a.dtype == (dtype if i else torch.float32)
        assert_accurate(f"part {i}", a, b, c, dtype if i else torch.float32)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "wide", "far"])
@pytest.mark.parametrize("size", [1, 13, 1000])
def test_value_and_gradients(loss: str, size: int, kind: str, dtype: torch.dtype) -> None:
    real, fake = logits(kind, size, 1, dtype), logits(kind, size, 2, dtype)
    d, g = FORMULAS[loss]
    compare(
        lambda r, f: gan_d_loss(r, f, loss=loss, weight=0.5).loss,
        lambda r, f: 0.5 * d(r, f, 1.0, 0.0),
        (real, fake),
    )
    compare(
        lambda f, r: gan_g_loss(f, r, loss=loss, weight=0.5).loss,
        lambda f, r: 0.5 * g(f, r, 1.0, 0.0),
        (fake, real),
    )


@pytest.mark.parametrize("loss", TARGETED)
def test_targets(loss: str) -> None:
    real, fake = logits("wide", 24, 3, torch.float32), logits("wide", 20, 4, torch.float32)
    each = torch.linspace(-0.2, 1.2, 20)
    d, g = FORMULAS[loss]
    for a, b in ((0.9, 0.1), (1.2, -0.5), (0.0, each)):
        compare(
            lambda r, f, a=a, b=b: gan_d_loss(r, f, loss=loss, real_target=a, fake_target=b).loss,
            lambda r, f, a=a, b=b: d(r, f, a, b),
            (real, fake),
        )
    for a in (0.9, each):
        compare(
            lambda f, r, a=a: gan_g_loss(f, r, loss=loss, target=a, fake_target=0.1).loss,
            lambda f, r, a=a: g(f, r, a, 0.1),
            (fake, real),
        )


def test_targets_broadcast_to_maps_of_logits() -> None:
    real, fake = logits("normal", 40, 5).view(2, 1, 4, 5), logits("normal", 60, 6).view(3, 1, 4, 5)
    target = torch.tensor([0.7, 0.8, 0.9, 1.0, 1.1], dtype=torch.float64)
    found = gan_d_loss(real, fake, loss="lsgan", real_target=target).loss
    torch.testing.assert_close(found, ((real - target) ** 2).mean() + (fake**2).mean())


@EVERY
def test_probabilities_are_means_without_a_gradient(loss: str) -> None:
    real, fake = (logits("wide", 9, i, torch.bfloat16).requires_grad_() for i in (7, 8))
    for result in (gan_d_loss(real, fake, loss=loss), gan_g_loss(fake, real, loss=loss)):
        assert result.d_real is not None
        for value, source in ((result.d_real, real), (result.d_fake, fake)):
            assert not value.requires_grad and value.shape == () and value.dtype == torch.float32
            torch.testing.assert_close(value.double(), source.double().sigmoid().mean())
    if not is_paired(loss):
        assert gan_g_loss(fake, loss=loss).d_real is None


@EVERY
def test_first_and_second_derivatives_by_differences(loss: str) -> None:
    # The formulas are not smooth at 1 and -1 only; no logit is near.
    real, fake = (logits("normal", 5, i).requires_grad_() for i in (9, 10))
    assert min((t.abs() - 1).abs().min().item() for t in (real, fake)) > 1e-2

    def d(r: Tensor, f: Tensor) -> Tensor:
        return gan_d_loss(r, f, loss=loss).loss

    def g(f: Tensor, r: Tensor) -> Tensor:
        return gan_g_loss(f, r, loss=loss).loss

    for call, inputs in ((d, (real, fake)), (g, (fake, real))):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("loss", [n for n in NAMES if n not in ("hinge", "wasserstein", "lsgan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_third_derivative(loss: str, dtype: torch.dtype) -> None:
    def third(call: Formula, x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        found = call(leaf)
        for _ in range(3):
            (slope,) = torch.autograd.grad(found, leaf, create_graph=True)
            found = (slope * torch.linspace(1, 2, len(slope), dtype=slope.dtype)).sum()
        return slope.detach()

    fake, real = logits("normal", 6, 11, dtype), logits("normal", 6, 12, dtype)
    _, plain = FORMULAS[loss]
    ours = third(lambda x: gan_g_loss(x, real, loss=loss).loss, fake)
    same = third(lambda x: plain(x, real, 1.0, 0.0), fake)
    oracle = third(lambda x: plain(x, real.double(), 1.0, 0.0), fake.double())
    if dtype == torch.float64:
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-14)
    else:
        assert_accurate("third derivative", ours, same, oracle, dtype)


FAR = torch.tensor([1e4, -1e4])


@pytest.mark.parametrize(
    ("loss", "right", "wrong", "generator"),
    [
        ("bce", 0.0, 2e4, 1e4),
        ("minimax", 0.0, 2e4, 0.0),
        ("logistic", 0.0, 2e4, 1e4),
        ("hinge", 0.0, 20002.0, 1e4),
        ("lsgan", 9999.0**2 + 1e8, 10001.0**2 + 1e8, 10001.0**2),
        ("wasserstein", -2e4, 2e4, 1e4),
        ("relativistic", 0.0, 4e4, 4e4),
        ("relativistic_pairing", 0.0, 2e4, 2e4),
    ],
)
def test_exact_at_ten_thousand(loss: str, right: float, wrong: float, generator: float) -> None:
    high, low = FAR[:1].requires_grad_(), FAR[1:].requires_grad_()
    for real, fake, value in ((high, low, right), (low, high, wrong)):
        found = gan_d_loss(real, fake, loss=loss).loss
        assert found.item() == torch.tensor(value).item()
        assert all(g.isfinite() for g in torch.autograd.grad(found, (real, fake)))
    given = high.detach() if is_paired(loss) else None
    found = gan_g_loss(low, given, loss=loss).loss
    assert found.item() == torch.tensor(generator).item()
    assert torch.autograd.grad(found, low)[0].isfinite()


@pytest.mark.parametrize("x", [20.0, 60.0, 90.0])
def test_a_right_and_certain_discriminator_keeps_its_small_loss(x: float) -> None:
    for loss in ("relativistic", "relativistic_pairing"):
        found = gan_d_loss(torch.tensor([x / 2]), torch.tensor([-x / 2]), loss=loss).loss.item()
        terms = 2 if loss == "relativistic" else 1
        assert found == pytest.approx(terms * torch.tensor(-x).double().exp().item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["relativistic", "relativistic_pairing"])
def test_large_logits_keep_the_digits_of_float64(loss: str) -> None:
    real, fake = (torch.tensor([x], dtype=torch.float64) for x in (-12.5, 12.5))
    terms = 2 if loss == "relativistic" else 1
    excess = gan_d_loss(real, fake, loss=loss).loss.item() - 25 * terms
    assert excess == pytest.approx(terms * math.exp(-25), rel=1e-3)


@EVERY
def test_sums_are_taken_in_float32(loss: str) -> None:
    # In float16 the squares and the sum of 4096 of these would overflow.
    real, fake = torch.full((4096,), 300.0).half(), torch.full((4096,), -300.0).half()
    wide = gan_d_loss(fake.double(), real.double(), loss=loss).loss
    found = gan_d_loss(fake, real, loss=loss).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide)


def test_logistic_is_bce_with_hard_targets() -> None:
    real, fake = logits("wide", 33, 13, torch.float32), logits("wide", 33, 14, torch.float32)
    for name in ("logistic", "softplus"):
        ours = gan_d_loss(real, fake, loss=name), gan_g_loss(fake, loss=name)
        assert ours == (gan_d_loss(real, fake), gan_g_loss(fake))


@pytest.mark.parametrize("loss", [n for n in NAMES if not is_paired(n)])
def test_terms_of_both_sides_add_up(loss: str) -> None:
    real, fake = logits("normal", 12, 15), logits("normal", 8, 16)
    terms = [
        d_loss_term(side, x, target, 0.5, loss=loss)
        for side, x, target in (("real", real, 1.0), ("fake", fake, 0.0))
    ]
    whole = gan_d_loss(real, fake, loss=loss, weight=0.5)
    torch.testing.assert_close(terms[0][0] + terms[1][0], whole.loss)
    assert whole.d_real is not None
    torch.testing.assert_close((terms[0][1], terms[1][1]), (whole.d_real, whole.d_fake))


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gan_d_loss(X, X, loss="wgan"), "loss is 'wgan'; it is one of " + ", ".join(NAMES)),
        (lambda: gan_g_loss(X, loss="ragan"), "loss is 'ragan'; it is one of bce, "),
        (lambda: gan_g_loss(X, loss="relativistic"), "real_logits is None; .* so give both"),
        (lambda: gan_g_loss(X, loss="relativistic_pairing"), "real_logits is None; .* so give bot"),
        (
            lambda: gan_d_loss(X, X[:3], loss="relativistic_pairing"),
            "there are 4 real and 3 fake logits; loss 'relativistic_pairing' compares them one by",
        ),
        (
            lambda: gan_g_loss(X, X[:3], loss="relativistic_pairing"),
            "there are 3 real and 4 fake logits",
        ),
        (lambda: gan_d_loss(X, X, loss="hinge", real_target=0.9), "real_target was given and loss"),
        (lambda: gan_d_loss(X, X, loss="logistic", fake_target=X), "fake_target was given and lo"),
        (lambda: gan_g_loss(X, loss="wasserstein", target=0.9), "target was given and loss 'wass"),
        (
            lambda: gan_d_loss(X, X, loss="lsgan", real_target=torch.ones(3)),
            "the real target has shape .3,., which does not broadcast to the logits' .4,.",
        ),
        (lambda: gan_d_loss(X, X, loss="hinge", impl="cpu"), "'hinge' has no implementation 'cpu'"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@EVERY
def test_no_logits_are_refused(loss: str) -> None:
    for call in (
        lambda: gan_d_loss(X[:0], X, loss=loss),
        lambda: gan_d_loss(X, X[:0], loss=loss),
        lambda: gan_g_loss(X[:0], X, loss=loss),
    ):
        with pytest.raises(UserError, match=r"the (real|fake) logits are empty"):
            call()


def test_those_with_a_kernel() -> None:
    assert [n for n in NAMES if has_kernel(n)] == ["bce", "minimax", "logistic", "softplus"]
