"""What a faster network must not change, each seen in somebody's code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import (
    Draw,
    assert_agree,
    assert_near,
    assert_same,
    buffers,
    gradients,
    pair_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

CHANNELS = 8


class Form(nn.Module):
    """A convolution, a batch norm and whatever ``body`` makes of them."""

    def __init__(self, body: Callable[[Form, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.inorm = nn.InstanceNorm2d(CHANNELS, affine=True)
        self.relu = nn.ReLU(inplace=True)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)
        self.seq = nn.Sequential(
            nn.ReLU(True),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.BatchNorm2d(CHANNELS),
            nn.LeakyReLU(0.2, True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def image(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(3, CHANNELS, 8, 8, generator=generator),)


def conv_then(f: Callable[[Tensor], Tensor]) -> Callable[[Form, Tensor], Tensor]:
    """What ``f`` returns, plus the tensor it was given, as that is by then."""

    def body(m: Form, x: Tensor) -> Tensor:
        h = m.bn(m.conv(x))
        return f(h) + h

    return body


def added_in_place(m: Form, x: Tensor) -> Tensor:
    out = m.bn(m.conv(x))
    out += x
    return m.relu(out)


SHORTCUTS: dict[str, Callable[[Form, Tensor], Tensor]] = {
    "residual": lambda m, x: x + m.seq(x),
    "concatenated": lambda m, x: torch.cat([x, m.seq(x)], 1),
    "relu module": lambda m, x: (lambda h: m.relu(h) + h)(m.bn(m.conv(x))),
    "leaky relu module": lambda m, x: (lambda h: m.lrelu(h) + h)(m.bn(m.conv(x))),
    "behind a convolution": lambda m, x: (lambda h: m.lrelu(h) + h)(m.conv(x)),
    "behind an instance norm": lambda m, x: (lambda h: m.lrelu(h) + h)(m.inorm(m.conv(x))),
    "F.relu": conv_then(lambda h: F.relu(h, inplace=True)),
    "F.leaky_relu_": conv_then(lambda h: F.leaky_relu_(h, 0.2)),
    "relu_": conv_then(lambda h: h.relu_()),
    "torch.tanh_": conv_then(torch.tanh_),
    "not in place": conv_then(lambda h: F.relu(h)),
    "a view of it": conv_then(lambda h: F.relu(h.view(h.shape[0], -1), inplace=True).view_as(h)),
    "added in place": added_in_place,
}


@pytest.mark.parametrize("body", SHORTCUTS.values(), ids=SHORTCUTS)
def test_readers_of_what_an_activation_overwrites(body: Callable[[Form, Tensor], Tensor]) -> None:
    assert_same(lambda: Form(body), image)


def test_in_place_on_the_callers_tensor() -> None:
    _, fused = pair_of(lambda: Form(lambda m, x: m.seq(x)))
    x = torch.randn(3, CHANNELS, 8, 8)
    expected = x.relu()
    fused(x)
    assert torch.equal(x, expected)


class PlainWeight(nn.Module):
    """Sets the layer's weight as a plain tensor at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1)
        self.weight_bar = nn.Parameter(self.layer.weight.detach().clone())
        del self.layer._parameters["weight"]
        self.layer.weight = self.weight_bar / 2
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = self.weight_bar / self.weight_bar.norm()
        return F.elu(self.norm(self.layer(x)))


def standardised() -> nn.Module:
    """A forward_pre_hook that makes the weight anew."""
    conv = nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1)
    weight = conv.weight
    del conv._parameters["weight"]
    conv.register_parameter("raw", nn.Parameter(weight.detach()))

    def hook(m: nn.Module, _: object) -> None:
        m.weight = m.raw - m.raw.mean((1, 2, 3), keepdim=True)

    conv.register_forward_pre_hook(hook)
    return nn.Sequential(conv, nn.BatchNorm2d(CHANNELS), nn.ELU())


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        norm(nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1)), nn.BatchNorm2d(CHANNELS), nn.ELU()
    )


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "spectral_norm": normed(nn.utils.spectral_norm),
    "weight_norm": normed(nn.utils.weight_norm),
    "parametrized spectral_norm": normed(parametrizations.spectral_norm),
    "parametrized weight_norm": normed(parametrizations.weight_norm),
    "plain tensor": PlainWeight,
    "hook": standardised,
}


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_made_at_every_forward(make: Callable[[], nn.Module]) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        x, seen = draw(3, CHANNELS, 8, 8), {}
        for step in range(3):
            module.zero_grad()
            y = module(x)
            (y * draw(*y.shape)).sum().backward()
            seen |= {f"{step} output": y}
            seen |= {f"{step}{k}": v.clone() for k, v in gradients(module).items()}
            for p in module.parameters():
                p.data.add_(p.grad, alpha=-0.05)
        return seen

    assert_agree(make, run)


def edits() -> dict[str, Callable[[nn.Module], None]]:
    def clamp(m: nn.Module) -> None:
        for p in m.parameters():
            p.data.clamp_(-0.05, 0.05)

    def average(m: nn.Module) -> None:
        for p in m.parameters():
            p.data.mul_(0.5).add_(torch.ones_like(p.data), alpha=0.5)

    def exchange(m: nn.Module) -> None:
        for p in m.parameters():
            p.data = p.data * 2

    def replace(m: nn.Module) -> None:
        for layer in m.modules():
            for key, p in layer._parameters.items():
                setattr(layer, key, nn.Parameter(p.detach() * 3))

    def statistics(m: nn.Module) -> None:
        for b in m.buffers():
            b.data.add_(1)

    def from_numpy(m: nn.Module) -> None:
        for p in m.parameters():
            p.detach().numpy()[...] *= 2

    def settings(m: nn.Module) -> None:
        for layer in m.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps, layer.momentum = 0.5, 0.9
            if isinstance(layer, nn.LeakyReLU):
                layer.negative_slope = 0.7

    def exchanged_layers(m: nn.Module) -> None:
        assert isinstance(m, nn.Sequential)
        m[1] = nn.BatchNorm2d(CHANNELS, eps=0.3, momentum=0.4)
        m[2] = nn.Tanh()

    return {f.__name__: f for f in (clamp, average, exchange, replace, statistics, from_numpy)} | {
        f.__name__: f for f in (settings, exchanged_layers)
    }


def dcgan_block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.LeakyReLU(0.2, True),
        nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, 2, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(True),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("edit", edits().values(), ids=edits())
def test_edits_that_no_version_counts(edit: Callable[[nn.Module], None], training: bool) -> None:
    plain, fused = pair_of(dcgan_block)
    x = torch.randn(3, CHANNELS, 8, 8)
    for module in (plain, fused):
        module.train(training)
        with torch.no_grad():
            # Whatever is kept of the weights is kept now.
            before = module(x.clone()), module(x.clone())
        edit(module)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = plain(x.clone())
            if not (training and edit.__name__ == "statistics"):
                assert (expected - before[1]).norm() > 0.01 * expected.norm()
            assert_near(fused(x.clone()), expected)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_near(a.float(), b.float())


NORMS: dict[str, Callable[[], nn.Module]] = {
    "eps 0.8": lambda: nn.BatchNorm2d(CHANNELS, 0.8),
    "no affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "momentum None": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "momentum 0": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.0),
    "momentum 1": lambda: nn.BatchNorm2d(CHANNELS, momentum=1.0),
    "no statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS),
    "instance affine": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "instance statistics": lambda: nn.InstanceNorm2d(
        CHANNELS, affine=True, track_running_stats=True
    ),
    "instance statistics only": lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "layer": lambda: nn.LayerNorm([CHANNELS, 8, 8]),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_kinds_of_norms(norm: Callable[[], nn.Module]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1), norm(), nn.LeakyReLU(0.2))

    assert_same(make, image)

    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        for _ in range(3):
            module(draw(3, CHANNELS, 8, 8))
        return buffers(module) | {"evaluation": module.eval()(draw(3, CHANNELS, 8, 8))}

    assert_agree(make, run)


def test_one_norm_in_evaluation_mode_inside_a_network_in_training_mode() -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        assert isinstance(module, nn.Sequential)
        module.train()
        module[1].eval()
        x = draw(3, CHANNELS, 8, 8).requires_grad_()
        y = module(x)
        (y * draw(*y.shape)).sum().backward()
        return {"output": y, " grad x": x.grad} | gradients(module) | buffers(module)

    assert_agree(dcgan_block, run)


@pytest.mark.parametrize("behind", [nn.ReLU(), nn.Identity()], ids=["relu", "nothing"])
def test_errors_of_norms_stay(behind: nn.Module) -> None:
    _, batch = pair_of(lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), behind))
    _, instance = pair_of(lambda: nn.Sequential(nn.InstanceNorm2d(CHANNELS), behind))
    before = [b.clone() for b in batch.buffers()]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch(torch.randn(1, CHANNELS, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        batch(torch.randn(2, CHANNELS))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        instance(torch.randn(2, CHANNELS, 1, 1))
    # torch counts the batch before it finds it too small.
    assert all(torch.equal(a, b) for a, b in zip(before[:2], batch.buffers(), strict=False))
    batch.eval()(torch.randn(1, CHANNELS, 1, 1))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_wrong_number_of_channels(training: bool) -> None:
    # Fewer than there are: with more, a kernel that does not look would write behind the buffers.
    _, fused = pair_of(lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    with pytest.raises(RuntimeError, match="should contain"):
        fused.train(training)(torch.randn(2, CHANNELS // 2, 4, 4))


def test_bias_before_batch_norm() -> None:
    def make() -> nn.Module:
        network = dcgan_block()
        assert isinstance(network, nn.Sequential)
        network[0].bias.data.fill_(3)
        return network

    _, fused = pair_of(make)
    assert isinstance(fused, nn.Sequential)
    fused[1].running_mean.zero_()
    fused(torch.randn(4, CHANNELS, 8, 8)).square().sum().backward()
    assert (fused[1].running_mean > 0.2).all()
    assert fused[0].bias.grad is not None
    assert fused[0].bias.grad.norm() < 1e-4 * fused[0].weight.grad.norm()
    assert_same(make, image)
