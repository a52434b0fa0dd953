"""What helps a GAN besides its loss: augmentation, penalties, averages, and the step with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import resume, train

import pygan
from pygan import AdversarialStep, ReferenceStep, Tricks, UserError, augment
from pygan.checkpoint import load_generator, read_state
from pygan.config import Config
from pygan.functional import diff_augment, gradient_penalty, r1_penalty
from pygan.models import Discriminator, dcgan
from pygan.run_folder import RESUME

SIZE, NZ = 16, 8


def _drawn(*values: float) -> Callable[[Tensor], Tensor]:
    """Draws these numbers, one for every call."""
    left = list(values)
    return lambda empty: empty.fill_(left.pop(0))


def _images(count: int = 6, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# Augmentation


def test_colours_by_hand() -> None:
    x = _images()
    # Brightness +0.25, saturation 0.5, contrast 1.25.
    bright = x + 0.25
    grey = bright.mean(1, keepdim=True)
    dull = grey + 0.5 * (bright - grey)
    middle = dull.mean((1, 2, 3), keepdim=True)
    expected = middle + 1.25 * (dull - middle)
    found = augment._color(x, _drawn(0.75, 0.25, 0.75))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("drawn", "moved"), [(0.0, -2), (0.5, 0), (0.999, 2)])
def test_translation_moves_zeros_in(drawn: float, moved: int) -> None:
    x = _images()
    found = augment._translation(x, _drawn(drawn, 0.5))
    expected = torch.zeros_like(x)
    rows = torch.arange(SIZE)
    kept = (rows + moved >= 0) & (rows + moved < SIZE)
    expected[:, :, rows[kept]] = x[:, :, rows[kept] + moved]
    assert torch.equal(found, expected)


def test_cutout_leaves_a_hole_of_half_the_side() -> None:
    x = _images() + 1
    found = augment._cutout(x, _drawn(0.5, 0.5))
    hole = found == 0
    assert hole.sum() == x.shape[0] * x.shape[1] * (SIZE // 2) ** 2
    assert torch.equal(found[~hole], x[~hole])
    # At the edge a part of it lies outside.
    assert (augment._cutout(x, _drawn(0.0, 0.5)) == 0).sum() == hole.sum() / 2


def test_every_image_in_its_own_way_and_the_same_again() -> None:
    x = _images(1).expand(64, -1, -1, -1)
    for name in augment.POLICIES:
        found, again = (
            diff_augment(x, [name], generator=torch.Generator().manual_seed(1)) for _ in range(2)
        )
        assert torch.equal(found, again) and found.shape == x.shape
        assert len(torch.unique(found.flatten(1), dim=0)) > 8


@pytest.mark.parametrize("name", augment.POLICIES)
def test_gradients_go_through(name: str) -> None:
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return diff_augment(x, [name], generator=torch.Generator().manual_seed(2)).square()

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_nothing_is_done_without_a_policy() -> None:
    x = _images()
    assert diff_augment(x, ()) is x


@pytest.mark.parametrize(
    ("images", "policy", "text"),
    [
        (_images(), ["colour"], "'colour' is not known"),
        (_images()[0], ["color"], "give floating"),
        (_images().to(torch.uint8), ["color"], "give floating"),
    ],
)
def test_what_cannot_be_augmented(images: Tensor, policy: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        diff_augment(images, policy)


# Penalties


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * SIZE * SIZE, dtype=torch.float64).float())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def test_penalties_of_a_plane() -> None:
    D, real, fake = _Linear(), _images(), _images() + 1
    length = D.weight.norm()
    r1 = r1_penalty(D, real)
    torch.testing.assert_close(r1, length.square())
    r1.backward()
    torch.testing.assert_close(D.weight.grad, 2 * D.weight.detach())
    torch.testing.assert_close(gradient_penalty(D, real, fake), (length - 1).square())


def test_the_gradient_penalty_lies_between() -> None:
    seen = []

    def D(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().flatten(1).sum(1)

    real, fake = torch.zeros(500, 1, 2, 2), torch.ones(500, 1, 2, 2)
    gradient_penalty(D, real, fake, generator=torch.Generator().manual_seed(3))
    (between,) = seen
    shares = between[:, 0, 0, 0]
    assert torch.equal(between, shares[:, None, None, None].expand_as(between))
    assert 0 <= shares.min() < 0.05 and 0.95 < shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.05)


def test_a_gradient_of_zero_has_a_penalty() -> None:
    weight = torch.zeros(3 * SIZE * SIZE, requires_grad=True)
    gradient_penalty(lambda x: x.flatten(1) @ weight, _images(), _images()).backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_penalties_are_of_float32_under_autocast() -> None:
    D = Discriminator(SIZE, 3, 8, "none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = r1_penalty(D, _images())
    assert torch.equal(found, r1_penalty(D, _images()))


# The average of a generator


def test_the_average_is_that_of_torch() -> None:
    torch.manual_seed(0)
    G, _ = dcgan(SIZE, 3, NZ, 8, 8)
    ours = pygan.Ema(G, 0.9, warm_up=False)
    theirs = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    # torch's takes over the first network as it is.
    theirs.update_parameters(G)
    for _ in range(3):
        with torch.no_grad():
            for tensor in G.state_dict().values():
                tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)
        ours.update(G)
        theirs.update_parameters(G)
    expected = theirs.module.state_dict()
    for name, tensor in ours.network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name])
        else:
            assert torch.equal(tensor, G.state_dict()[name])
    assert not ours.network.training
    assert not any(p.requires_grad for p in ours.network.parameters())


def test_an_average_soon_forgets_its_beginning() -> None:
    network = torch.nn.Linear(1, 1)
    average = pygan.Ema(network, 0.8)
    expected = network.weight.item()
    for n in range(50):
        with torch.no_grad():
            network.weight.fill_(n)
        average.update(network)
        kept = min(0.8, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * n
        assert average.network.weight.item() == pytest.approx(expected, rel=1e-5)


# In the step

TRICKS = {
    "flip_labels": Tricks(flip_labels=0.3),
    "noise": Tricks(noise=0.2),
    "n_critic": Tricks(n_critic=2),
    "clip_grad": Tricks(clip_grad=0.05),
    "r1": Tricks(r1=5.0, r1_every=2),
    "gradient_penalty": Tricks(gradient_penalty=10.0),
    "augment": Tricks(augment=("color", "translation", "cutout")),
    "all": Tricks(
        flip_labels=0.1, noise=0.1, n_critic=2, clip_grad=0.5, r1=1.0, r1_every=3,
        gradient_penalty=1.0, augment=("color",),
    ),
}  # fmt: skip


def _step(kind: type, tricks: Tricks, *, fused: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    G, D = dcgan(SIZE, 1, NZ, 8, 8, "none")
    with torch.no_grad():
        # Gradients of some size, so that penalties and clipping do something.
        for parameter in D.parameters():
            parameter.mul_(4)
    if fused:
        pygan.fuse(G)
        pygan.fuse(D)
    optimizers = [torch.optim.SGD(network.parameters(), 0.05) for network in (G, D)]
    generator = torch.Generator().manual_seed(7)
    return kind(G, D, *optimizers, amp="off", tricks=tricks, generator=generator, **settings)


def _run(step: Any, count: int = 4) -> list[list[float]]:
    data = torch.Generator().manual_seed(9)
    found = []
    for _ in range(count):
        real = torch.rand(8, 1, SIZE, SIZE, generator=data) * 2 - 1
        found.append([value.item() for value in step(real, torch.randn(8, NZ, generator=data))])
    return found


def _weights(step: Any) -> Tensor:
    parameters = (p.detach().flatten() for net in (step.G, step.D) for p in net.parameters())
    return torch.cat(list(parameters))


@pytest.mark.parametrize("loss", ["bce", "relativistic"])
@pytest.mark.parametrize("name", TRICKS)
def test_the_fast_step_does_what_the_plain_one_does(name: str, loss: str) -> None:
    steps = [
        _step(AdversarialStep, TRICKS[name], loss=loss, fused=True),
        _step(ReferenceStep, TRICKS[name], loss=loss),
    ]
    fast, plain = map(_run, steps)
    np.testing.assert_allclose(fast, plain, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(_weights(steps[0]), _weights(steps[1]), rtol=1e-3, atol=1e-5)
    without = _step(AdversarialStep, Tricks(), loss=loss)
    _run(without)
    assert not torch.allclose(_weights(without), _weights(steps[0]), atol=1e-5)


def test_labels_are_flipped_in_their_share() -> None:
    step = _step(AdversarialStep, Tricks(flip_labels=0.2), real_target=0.9)
    real, fake = step._targets(10_000)
    assert real.unique().tolist() == pytest.approx([0.0, 0.9])
    assert (real == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (fake != 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    # All of them: D learns the opposite.
    flipped = _run(_step(AdversarialStep, Tricks(flip_labels=1.0)), 1)[0][0]
    logits = _step(AdversarialStep, Tricks())
    assert flipped == pytest.approx(_run(logits, 1)[0][0], abs=0.2)


def test_the_noise_is_what_is_set() -> None:
    step = _step(AdversarialStep, Tricks())
    images = torch.zeros(64, 1, SIZE, SIZE)
    assert step._shown(images) is images
    step.noise = 0.5
    assert step._shown(images).std().item() == pytest.approx(0.5, rel=0.03)
    step.noise = 0.0
    assert torch.equal(step._shown(images), images)


def test_g_learns_every_nth_time_and_begins() -> None:
    step = _step(AdversarialStep, Tricks(n_critic=3))
    changed = []
    results = []
    for _ in range(6):
        before = [p.detach().clone() for p in step.G.parameters()]
        results += _run(step, 1)
        pairs = zip(before, step.G.parameters(), strict=True)
        changed.append(not all(torch.equal(a, b) for a, b in pairs))
    assert changed == [True, False, False, True, False, False]
    losses = [result[1] for result in results]
    assert losses[0] == losses[1] == losses[2] != losses[3] == losses[4]


def test_gradients_are_clipped() -> None:
    step = _step(AdversarialStep, Tricks(clip_grad=0.001))
    _run(step, 1)
    for network in (step.G, step.D):
        squares = sum(p.grad.square().sum() for p in network.parameters() if p.grad is not None)
        assert float(squares) ** 0.5 == pytest.approx(0.001, rel=1e-3)


def test_the_r1_penalty_comes_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from pygan import step as module

    calls: list[int] = []
    step = _step(AdversarialStep, Tricks(r1=1.0, r1_every=3), graph="off")

    def counted(D: nn.Module, real: Tensor) -> Tensor:
        calls.append(step.updates)
        return r1_penalty(D, real)

    monkeypatch.setattr(module, "r1_penalty", counted)
    _run(step, 7)
    assert calls == [0, 3, 6]


def test_the_average_follows_g() -> None:
    step = _step(AdversarialStep, Tricks(n_critic=2))
    step.ema = pygan.Ema(step.G, 0.5, warm_up=False)
    start = [p.detach().clone() for p in step.G.parameters()]
    _run(step, 2)
    for average, before, now in zip(
        step.ema.network.parameters(), start, step.G.parameters(), strict=True
    ):
        torch.testing.assert_close(average, (before + now.detach()) / 2)


def test_a_step_goes_on_where_it_was() -> None:
    tricks = Tricks(n_critic=2, r1=1.0, r1_every=3)
    whole = _step(AdversarialStep, tricks)
    whole.ema = pygan.Ema(whole.G, 0.9)
    expected = _run(whole, 3)
    state = copy.deepcopy(whole.state_dict())
    networks = [copy.deepcopy(net.state_dict()) for net in (whole.G, whole.D)]
    other = _step(AdversarialStep, tricks)
    other.ema = pygan.Ema(other.G, 0.9)
    for network, kept in zip((other.G, other.D), networks, strict=True):
        network.load_state_dict(kept)
    other.load_state_dict(state)
    assert _run(whole, 3) == _run(other, 3) != expected
    for a, b in zip(whole.ema.network.parameters(), other.ema.network.parameters(), strict=True):
        assert torch.equal(a, b)
    del state["ema_updates"]
    other.load_state_dict(state)
    assert other.ema.updates.isinf()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"flip_labels": 1.5}, "flip_labels is 1.5"),
        ({"n_critic": 0}, "n_critic is 0"),
        ({"clip_grad": 0.0}, "clip_grad is 0"),
        ({"augment": ("blur",)}, "'blur' is not known"),
    ],
)
def test_what_is_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Tricks(**settings)


def test_only_losses_with_targets_have_labels() -> None:
    with pytest.raises(UserError, match="flip_labels was given and loss 'hinge' has no targets"):
        _step(AdversarialStep, Tricks(flip_labels=0.1), loss="hinge")


def test_kinds_of_steps() -> None:
    assert Tricks(noise=1.0, augment=("color",), r1=1.0, r1_every=1).turns == 1
    tricks = Tricks(n_critic=2, r1=1.0, r1_every=3)
    assert (tricks.turns, Tricks(n_critic=5).turns, Tricks(r1=1.0).turns) == (4, 2, 2)
    kinds = [tricks.turn(step) for step in range(4)]
    assert kinds == [(True, True), (False, False), (True, False), (False, True)]
    assert Tricks(n_critic=2).turn(0) == (True, False)


# Networks


@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_discriminators_without_batch_norm(norm: str) -> None:
    torch.manual_seed(0)
    D = Discriminator(32, 1, 8, norm)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in D.modules())
    convolutions = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4 and all(m.bias is not None for m in convolutions)
    x = torch.randn(4, 1, 32, 32)
    if norm == "spectral":
        for _ in range(50):
            D(x)
        weight = convolutions[1].weight.flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, rel=0.02)
    D.eval()
    before = D(x)
    pygan.fuse(D)
    torch.testing.assert_close(D(x), before, rtol=1e-4, atol=1e-5)


def test_norms_have_names() -> None:
    with pytest.raises(UserError, match="D's norm is 'layer'"):
        dcgan(16, 1, d_norm="layer")


# The command

SWITCHES = (
    "--lr-g=1e-4", "--lr-d=4e-4", "--real-target=0.9", "--flip-labels=0.05", "--noise=0.1",
    "--noise-steps=12", "--n-critic=2", "--clip-grad=5", "--d-norm=spectral", "--r1=1",
    "--r1-every=3", "--gradient-penalty=0.1", "--augment=color,cutout", "--ema=0.9",
)  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16), "u1")
    np.save(tmp_path / "images.npy", pixels)
    return f"--data={tmp_path / 'images.npy'}"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_run_with_every_switch_is_resumed_to_the_bit(
    fused: bool, images: str, tmp_path: Path
) -> None:
    flags = [images, *SWITCHES, *(["--fused"] if fused else [])]
    assert train(*flags, "--steps=16", f"--outf={tmp_path / 'whole'}") == 0
    assert train(*flags, "--steps=7", f"--outf={tmp_path / 'parts'}") == 0
    assert resume(tmp_path / "parts", "--steps=16") == 0
    whole, parts = (read_state(tmp_path / name / RESUME) for name in ("whole", "parts"))
    for name, tensor in whole["networks"]["netG"].items():
        assert torch.equal(tensor, parts["networks"]["netG"][name]), name
    for name, tensor in whole["networks"]["step"]["ema"].items():
        assert torch.equal(tensor, parts["networks"]["step"]["ema"][name]), name
    # What is sampled from is the average.
    generator, _ = load_generator(tmp_path / "whole")
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, whole["networks"]["step"]["ema"][name]), name
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["config"]
    assert config["augment"] == ["color", "cutout"] and config["lr_d"] == 4e-4


def test_the_noise_falls_to_none(images: str, tmp_path: Path) -> None:
    from pygan.training import Training

    run = Training.__new__(Training)
    run.total, run.config = 100, replace(Config(), noise=0.4)
    found = []
    for step in (0, 25, 100):
        run.step = step
        found.append(run._noise())
    assert found == pytest.approx([0.4, 0.3, 0.0])
    run.config = replace(run.config, noise_steps=50)
    assert run._noise() == 0.0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--gradient-penalty=10"], "--d-norm none"),
        (["--noise-steps=5"], "give --noise too"),
        (["--augment=blur"], "'blur' is not known"),
        (["--flip-labels=0.1", "--loss=hinge"], "has no targets"),
        (["--ema=1"], "below 1"),
        (["--d-norm=layer"], "--d-norm"),
    ],
)
def test_bad_switches(
    flags: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*flags, "--steps=1", f"--outf={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert text in error and len(error.splitlines()) == 1
