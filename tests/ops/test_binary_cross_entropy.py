"""Binary cross-entropy behind a sigmoid against the one of its logits, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import FACTOR, relative_error
from torch import Tensor, nn

import pygan
from pygan.functional import binary_cross_entropy

LOGITS = (-200.0, -60.0, -28.0, -20.0, -1.0, 0.5, 3.0, 16.0, 17.0, 30.0, 100.0, 1e4)

Loss = Callable[..., Tensor]


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    """Each value twice, for both targets, and many that do not saturate."""
    ordinary = torch.randn(40, generator=torch.Generator().manual_seed(3))
    return torch.cat([torch.tensor(LOGITS * 2), ordinary]).to(dtype)[:, None, None, None]


def targets(count: int) -> Tensor:
    return torch.cat([torch.ones(len(LOGITS)), torch.zeros(count - len(LOGITS))])


def gradient(loss: Loss, x: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of x, of ``loss(sigmoid(x))`` as a script writes it."""
    x = x.detach().requires_grad_()
    value = loss(torch.sigmoid(x).view(-1).squeeze(), targets(len(x)).to(x.dtype), **settings)
    value.sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_logits(reduction: str, weighted: bool, dtype: torch.dtype) -> None:
    x = logits(dtype)
    weight = torch.linspace(0.5, 2.0, len(x)) if weighted else None
    value, dx = gradient(binary_cross_entropy, x, weight=weight, reduction=reduction)
    plain_value, plain_dx = gradient(F.binary_cross_entropy, x, weight=weight, reduction=reduction)
    exact = x.double().view(-1).requires_grad_()
    F.binary_cross_entropy_with_logits(
        exact,
        targets(len(x)).double(),
        None if weight is None else weight.double(),
        reduction=reduction,
    ).sum().backward()
    assert torch.equal(value, plain_value)
    assert exact.grad is not None
    # The yardstick is torch's own loss of logits in the same type.
    with_logits = gradient(
        lambda p, t, **settings: F.binary_cross_entropy_with_logits(x_of(p), t, **settings),
        x,
        weight=weight,
        reduction=reduction,
    )[1]
    allowed = FACTOR * relative_error(with_logits.flatten(), exact.grad)
    assert relative_error(dx.flatten(), exact.grad) <= max(allowed, 4 * torch.finfo(dtype).eps)
    p = torch.sigmoid(x)
    kept = p * (1 - p) >= 1e-12
    assert torch.equal(dx[kept], plain_dx[kept])
    assert (plain_dx[~kept].abs() < dx[~kept].abs()).any()


def x_of(p: Tensor) -> Tensor:
    """The logits that a view of a sigmoid's output comes from, as a leaf of their own graph."""
    x = logits(p.dtype).view(-1)
    node = p.grad_fn
    while node is not None and node.name() != "SigmoidBackward0":
        node = node.next_functions[0][0]
    assert node is not None
    leaf = node.next_functions[0][0].variable
    assert torch.equal(leaf.detach().view(-1), x)
    return leaf.view(-1)


def test_other_readers_of_the_probability_keep_their_gradient() -> None:
    x = logits().requires_grad_()
    p = torch.sigmoid(x).view(-1)
    loss = binary_cross_entropy(p, targets(len(x)))
    other = (p * 3).sum()
    (plain,) = torch.autograd.grad(other, x, retain_graph=True)
    # A backward that ends at p, or before, leaves nothing behind for the next one.
    torch.autograd.grad(loss, p, retain_graph=True)
    assert torch.equal(torch.autograd.grad(other, x, retain_graph=True)[0], plain)
    (of_loss,) = torch.autograd.grad(loss, x, retain_graph=True)
    (both,) = torch.autograd.grad(loss + other, x, retain_graph=True)
    torch.testing.assert_close(both, of_loss + plain, rtol=0, atol=1e-7)
    assert torch.equal(torch.autograd.grad(loss, x)[0], of_loss)


def test_two_losses_of_one_probability() -> None:
    x = logits().requires_grad_()
    p = torch.sigmoid(x).view(-1)
    ones, zeros = torch.ones(len(x)), torch.zeros(len(x))
    loss = binary_cross_entropy(p, ones) + 2 * binary_cross_entropy(p, zeros)
    (dx,) = torch.autograd.grad(loss, x)
    probability = torch.sigmoid(x.detach().double())
    expected = ((probability - 1) + 2 * probability) / len(x)
    torch.testing.assert_close(dx, expected.float(), rtol=1e-5, atol=1e-8)


def test_gradient_of_the_gradient() -> None:
    scale = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([-80.0, -3.0, 0.5, 80.0], requires_grad=True)
    loss = binary_cross_entropy(torch.sigmoid(x), torch.tensor([1.0, 0.0, 1.0, 0.0])) * scale
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    (by_scale,) = torch.autograd.grad(dx.sum(), scale)
    assert dx[0] < -0.7 and dx[3] > 0.7
    torch.testing.assert_close(by_scale, dx.sum().detach() / 3)


@pytest.mark.parametrize(
    "between",
    [lambda p: p.clamp(1e-7, 1 - 1e-7), lambda p: p.flip(0), lambda p: p.mean(1), lambda p: p * 1],
)
def test_what_is_not_a_view_is_torchs(between: Callable[[Tensor], Tensor]) -> None:
    found = []
    for loss in (F.binary_cross_entropy, binary_cross_entropy):
        x = torch.linspace(-80, 80, 12).view(6, 2).requires_grad_()
        p = between(torch.sigmoid(x))
        loss(p, torch.ones_like(p)).backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])


def test_a_fused_criterion_keeps_the_gradient() -> None:
    model = nn.ModuleDict({"D": nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())})
    model["criterion"] = nn.BCELoss()
    with torch.no_grad():
        model["D"][0].bias.fill_(-80.0)
    x = torch.zeros(3, 4)

    def gradient_of_bias() -> float:
        model.zero_grad()
        model["criterion"](model["D"](x), torch.ones(3, 1)).backward()
        return float(model["D"][0].bias.grad)

    assert gradient_of_bias() == pytest.approx(0.0, abs=1e-6)
    for _ in range(2):
        report = pygan.fuse(model)
        assert report.fused == ["criterion BCELoss (with the gradient of the logits)"]
        assert gradient_of_bias() == pytest.approx(-1.0, rel=1e-6)
    assert type(model["criterion"]) is nn.BCELoss
    pygan.unfuse(model)
    assert gradient_of_bias() == pytest.approx(0.0, abs=1e-6)


def test_a_compiled_loss_keeps_the_gradient() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.bias.fill_(80.0)

    def loss(x: Tensor) -> Tensor:
        return F.binary_cross_entropy(torch.sigmoid(layer(x)).squeeze(1), torch.zeros(3))

    torch.compile(loss, backend=pygan.compile_backend, fullgraph=True)(torch.zeros(3, 4)).backward()
    assert float(layer.bias.grad) == pytest.approx(1.0, rel=1e-6)
    torch._dynamo.reset()
