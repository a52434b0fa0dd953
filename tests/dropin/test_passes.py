"""The passes of a GAN's step: forwards, backwards and penalties in any order, losses, inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import (
    Draw,
    assert_agree,
    assert_near,
    assert_same,
    buffers,
    build,
    gradients,
    pair_of,
)
from torch import Tensor, nn

import pygan

CHANNELS = 8


def smooth() -> nn.Module:
    """A discriminator without a kink."""
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 4, 2, 1),
        nn.Tanh(),
        nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.Tanh(),
        nn.Conv2d(CHANNELS, 1, 4),
        nn.Sigmoid(),
    )


def kinked() -> nn.Module:
    network = smooth()
    assert isinstance(network, nn.Sequential)
    network[1], network[4] = nn.LeakyReLU(0.2, True), nn.LeakyReLU(0.2, True)
    return network


discriminators = pytest.mark.parametrize("make", [smooth, kinked])


@discriminators
def test_forwards_before_one_backward(make: Callable[[], nn.Module]) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        xs = [draw(3, 3, 16, 16).requires_grad_() for _ in range(3)]
        ys = [module(x) for x in xs]
        (ys[0].log().mean() - ys[1].square().mean() + (ys[2] * ys[0]).mean()).backward()
        seen = {f" grad x{i}": x.grad for i, x in enumerate(xs)}
        return seen | gradients(module) | buffers(module)

    assert_agree(make, run)


@discriminators
def test_retained_graph(make: Callable[[], nn.Module]) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        y = module(draw(3, 3, 16, 16))
        y.mean().backward(retain_graph=True)
        once = {f"once{k}": v.clone() for k, v in gradients(module).items()}
        y.mean().backward()
        return once | gradients(module)

    assert_agree(make, run)


@discriminators
def test_penalties(make: Callable[[], nn.Module]) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        real, fake = draw(3, 3, 16, 16).requires_grad_(), draw(3, 3, 16, 16)
        on_real = module(real)
        (g,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        r1 = g.square().flatten(1).sum(1).mean()
        mixed = (0.3 * real.detach() + 0.7 * fake).requires_grad_()
        (g,) = torch.autograd.grad(module(mixed).sum(), mixed, create_graph=True)
        gp = (g.flatten(1).norm(2, 1) - 1).square().mean()
        (module(fake).mean() - on_real.mean() + 5 * r1 + 10 * gp).backward()
        return gradients(module) | buffers(module) | {"r1": r1, "gp": gp}

    assert_agree(make, run)


@discriminators
def test_fake_used_twice(make: Callable[[], nn.Module]) -> None:
    def gan() -> nn.Module:
        generator = nn.Sequential(
            nn.ConvTranspose2d(6, CHANNELS, 4, 1, 0),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(True),
            nn.ConvTranspose2d(CHANNELS, 3, 4, 4),
            nn.Tanh(),
        )
        return nn.ModuleDict({"g": generator, "d": make()})

    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        assert isinstance(module, nn.ModuleDict)
        g, d = module["g"], module["d"]
        optimizer = torch.optim.SGD(d.parameters(), 0.1)
        fake = g(draw(3, 6, 1, 1))
        (d(fake.detach()).mean() - d(draw(3, 3, 16, 16)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        d(fake).log().mean().neg().backward()
        return gradients(module) | buffers(module)

    assert_agree(gan, run)


@pytest.mark.parametrize("target", [1.0, 0.9, 0.0, 1.2])
def test_sigmoid_and_bce(target: float) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        output = module(draw(4, 3, 16, 16)).view(-1)
        label = torch.full((4,), target, dtype=output.dtype)
        if target > 1:
            loss = -(label * output.log() + (1 - label) * (1 - output).log()).mean()
        else:
            loss = nn.BCELoss()(output, label)
        loss.backward()
        assert 0 < output.mean().item() < 1
        return {"D(x)": output, "loss": loss} | gradients(module)

    assert_agree(kinked, run)


def test_saturated_sigmoid_and_bce() -> None:
    plain, fused = pair_of(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Sigmoid()))
    for module in (plain, fused):
        with torch.no_grad():
            module[0].weight.fill_(400)
    x = torch.linspace(-1, 1, 24).view(6, 4)
    results = []
    for module in (plain, fused):
        y = module(x)
        loss = nn.BCELoss()(y, torch.ones_like(y))
        loss.backward()
        results.append((y.detach(), loss.detach(), module[0].weight.grad))
    assert results[0][0].max() == 1
    for a, b in zip(*results, strict=True):
        assert_near(b, a)


class Inputs(nn.Module):
    """Takes latents of any rank, labels, and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(10, CHANNELS, 4, 1, 0), nn.BatchNorm2d(CHANNELS), nn.ReLU(True)
        )

    def forward(self, z: Tensor | list[Tensor]) -> Tensor:
        if isinstance(z, list):
            z = torch.cat(z, 1)
        return self.main(z if z.dim() == 4 else z[:, :, None, None])


def latents(*shape: int) -> Callable[[torch.Generator], tuple[Tensor]]:
    return lambda g: (torch.randn(shape, generator=g),)


def as_list(g: torch.Generator) -> tuple[list[Tensor]]:
    return ([torch.randn(3, 6, generator=g), torch.randn(3, 4, generator=g)],)


def with_strides(g: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(3, 20, 2, 4, generator=g)[:, ::2, :, 1:3],)


def repeated(g: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(3, 10, 1, 1, generator=g).expand(3, 10, 2, 2),)


LATENTS: dict[str, Callable[[torch.Generator], tuple[object, ...]]] = {
    "[N, nz]": latents(3, 10),
    "[N, nz, 1, 1]": latents(3, 10, 1, 1),
    "spatial": latents(2, 10, 3, 2),
    "list": as_list,
    "strides": with_strides,
    "expanded": repeated,
}


@pytest.mark.parametrize("make_input", LATENTS.values(), ids=LATENTS)
def test_inputs(make_input: Callable[[torch.Generator], tuple[object, ...]]) -> None:
    assert_same(Inputs, make_input, penalty=False)


def test_video_of_five_dimensions() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(3, 4, (2, 4, 4), (1, 2, 2), (0, 1, 1)),
            nn.BatchNorm3d(4),
            nn.LeakyReLU(0.2, True),
        )

    assert_same(make, lambda g: (torch.randn(2, 3, 3, 8, 8, generator=g),))


def test_no_gradient_is_wanted() -> None:
    _, fused = pair_of(kinked)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not fused(x).requires_grad
    with torch.inference_mode():
        assert fused(x).is_inference()
    fused.requires_grad_(False)
    assert not fused(x).requires_grad
    fused(x.requires_grad_()).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in fused.parameters())
    fused.requires_grad_(True)
    fused(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_fusing_draws_no_random_numbers() -> None:
    network = build(kinked)
    before = torch.get_rng_state()
    pygan.fuse(network)
    assert torch.equal(torch.get_rng_state(), before)
