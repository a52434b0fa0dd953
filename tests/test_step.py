from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pygan
from pygan.losses import NAMES
from pygan.step import resolve_amp

SIZE, WIDTH, BATCH = 32, 8, 16


def networks(
    dtype: torch.dtype = torch.float32, smooth: bool = False
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator, discriminator = pygan.models.dcgan(SIZE, 1, nz=20, ngf=WIDTH, ndf=WIDTH)
    for layers in (generator.main, discriminator.main) if smooth else ():
        for i, layer in enumerate(layers):
            if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
                layers[i] = nn.Tanh()
    return generator.to(dtype), discriminator.to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    shapes = ((BATCH, 1, SIZE, SIZE), (BATCH, 20, 1, 1))
    return [
        (
            (torch.rand(shapes[0], generator=g) * 2 - 1).to(dtype),
            torch.randn(shapes[1], generator=g).to(dtype),
        )
        for _ in range(steps)
    ]


def train(
    kind: type[Any],
    steps: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adam",
    fused: bool = False,
    smooth: bool = False,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Every parameter and buffer after ``steps`` updates, and the results of each."""
    G, D = networks(dtype, smooth)
    if fused:
        pygan.fuse(G)
        pygan.fuse(D)
    make = {
        "adam": lambda m: torch.optim.Adam(m.parameters(), 2e-4, betas=(0.5, 0.999), fused=fused),
        "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.5),
    }[optimizer]
    step = kind(G, D, make(G), make(D), amp="off", **settings)
    results = [[t.item() for t in step(real, z)] for real, z in batches(steps, dtype)]
    state = {f"G.{k}": v for k, v in G.state_dict().items()}
    return state | {f"D.{k}": v for k, v in D.state_dict().items()}, results


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative L2 difference of any parameter or buffer."""
    assert a.keys() == b.keys()
    return max(((a[k].double() - b[k].double()).norm() / b[k].double().norm()).item() for k in a)


@pytest.mark.parametrize("loss", NAMES)
def test_update_is_the_reference_update_in_float64(loss: str) -> None:
    settings: dict[str, Any] = {"loss": loss, "loss_weight": 0.5}
    if loss in ("bce", "minimax", "lsgan", "relativistic"):
        settings["real_target"] = 0.9
    ours, results = train(
        pygan.AdversarialStep, 20, torch.float64, fused=True, graph="off", **settings
    )
    plain, expected = train(pygan.ReferenceStep, 20, torch.float64, **settings)
    assert distance(ours, plain) < 1e-9
    torch.testing.assert_close(torch.tensor(results), torch.tensor(expected))


@pytest.mark.native
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_twenty_steps_in_float32_within_1e_5(optimizer: str) -> None:
    # With smooth activations: where an input of a ReLU rounds to the other side of zero, a gradient
    # changes by a finite amount, in plain torch between its own memory formats too.
    settings = {"optimizer": optimizer, "smooth": True}
    ours, _ = train(pygan.AdversarialStep, 20, fused=True, **settings)
    plain, _ = train(pygan.ReferenceStep, 20, **settings)
    start, _ = train(pygan.ReferenceStep, 0, **settings)
    assert distance(ours, plain) < 1e-5
    assert distance(start, plain) > 1e-2


@pytest.mark.parametrize("loss", ["bce", "hinge", "relativistic", "relativistic_pairing"])
def test_merged_and_separate_calls_agree(loss: str) -> None:
    (merged, merged_results), (separate, separate_results) = (
        train(pygan.AdversarialStep, 5, torch.float64, fused=True, merge=merge, loss=loss)
        for merge in (True, False)
    )
    assert distance(merged, separate) < 1e-10
    torch.testing.assert_close(torch.tensor(merged_results), torch.tensor(separate_results))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", [pygan.AdversarialStep, pygan.ReferenceStep])
def test_a_relativistic_update_is_the_one_written_out(kind: Any, merge: bool) -> None:
    settings: dict[str, Any] = {"optimizer": "sgd", "loss": "relativistic_pairing", "merge": merge}
    fused = kind is pygan.AdversarialStep
    ours, results = train(kind, 2, torch.float64, fused=fused, **settings)
    G, D = networks(torch.float64)
    opt_g, opt_d = (torch.optim.SGD(m.parameters(), 0.02, momentum=0.5) for m in (G, D))
    for (real, z), found in zip(batches(2, torch.float64), results, strict=True):
        fake = G(z)
        d_real, d_fake = D(real), D(fake.detach())
        loss_d = nn.functional.softplus(d_fake - d_real, threshold=40).mean()
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        compared = D(real)
        after = D(fake)
        loss_g = nn.functional.softplus(compared - after, threshold=40).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        means = [t.sigmoid().mean().item() for t in (d_real, d_fake, after)]
        assert found == pytest.approx([loss_d.item(), loss_g.item(), *means], rel=1e-6)
    expected = {f"G.{k}": v for k, v in G.state_dict().items()}
    assert distance(ours, expected | {f"D.{k}": v for k, v in D.state_dict().items()}) < 1e-10


@pytest.mark.parametrize("merge", [True, False])
def test_only_relativistic_losses_ask_about_real_images_again(merge: bool) -> None:
    for loss in NAMES:
        G, D = networks()
        calls: list[tuple[int, bool]] = []
        D.register_forward_hook(lambda _, x, y, seen=calls: seen.append((len(y), y.requires_grad)))
        sgd = torch.optim.SGD(G.parameters()), torch.optim.SGD(D.parameters())
        step = pygan.AdversarialStep(G, D, *sgd, amp="off", merge=merge, loss=loss)
        step(*batches(1)[0])
        of_d = [(2 * BATCH, True)] if merge else [(BATCH, True)] * 2
        again = [(BATCH, False)] if loss.startswith("relativistic") else []
        assert calls == [*of_d, *again, (BATCH, True)]


@pytest.mark.parametrize(("beyond", "calls"), [(0, 2), (1, 3)])
def test_float32_is_merged_on_a_cpu_while_images_are_small(
    beyond: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    G, D = networks()
    pygan.fuse(D)
    sgd = torch.optim.SGD(G.parameters()), torch.optim.SGD(D.parameters())
    step = pygan.AdversarialStep(G, D, *sgd, amp="off")
    real, z = batches(1)[0]
    monkeypatch.setattr("pygan.step._MOST_MERGED", real.nbytes - beyond)
    seen: list[int] = []
    D.register_forward_hook(lambda _, x, y: seen.append(len(y)))
    step(real, z)
    assert len(seen) == calls


@pytest.mark.parametrize("kind", [pygan.AdversarialStep, pygan.ReferenceStep])
@pytest.mark.parametrize("loss", NAMES)
def test_every_loss_learns_in_bfloat16(loss: str, kind: Any) -> None:
    G, D = networks()
    before = {k: v.clone() for k, v in (G.state_dict() | D.state_dict()).items()}
    adam = torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters())
    step = kind(G, D, *adam, amp="bf16", loss=loss)
    for real, z in batches(2):
        assert all(t.isfinite() and t.dtype == torch.float32 for t in step(real, z))
    after = G.state_dict() | D.state_dict()
    assert not any(torch.equal(before[k], after[k]) for k in before if k.endswith("weight"))


def test_a_discriminator_that_mixes_samples_is_called_twice() -> None:
    class Mixing(nn.Module):
        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return self.inner(x) + x.std(0).mean()

    G, D = networks()
    mixing = Mixing(D)
    step = pygan.AdversarialStep(
        G, mixing, torch.optim.SGD(G.parameters()), torch.optim.SGD(D.parameters()), amp="off"
    )
    assert step.merge is False
    step(*batches(1)[0])
    assert Mixing.calls == 3


@pytest.mark.parametrize(("merge", "backwards"), [(True, 1), (False, 2)])
def test_discriminator_is_constant_while_the_generator_learns(merge: bool, backwards: int) -> None:
    G, D = networks()
    frozen = next(D.parameters())
    frozen.requires_grad_(False)
    step = pygan.AdversarialStep(
        G,
        D,
        torch.optim.SGD(G.parameters()),
        torch.optim.SGD(D.parameters()),
        amp="off",
        merge=merge,
    )
    wanted = [p.requires_grad for p in D.parameters()]
    before = {}
    for name, p in D.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda g, n=name: before.__setitem__(n, before.get(n, 0) + 1))
    step(*batches(1)[0])
    assert set(before.values()) == {backwards}
    assert [p.requires_grad for p in D.parameters()] == wanted


def test_bytes_are_scaled_images() -> None:
    G, D = networks()
    twins = copy.deepcopy(G), copy.deepcopy(D)
    real, z = batches(1)[0]
    image = ((real + 1) * 127.5).round().to(torch.uint8)
    results = []
    for (g, d), x in (((G, D), image), (twins, (image.float() - 127.5) / 127.5)):
        step = pygan.AdversarialStep(
            g, d, torch.optim.SGD(g.parameters()), torch.optim.SGD(d.parameters()), amp="off"
        )
        results.append(step(x, z))
    assert [t.item() for t in results[0]] == [t.item() for t in results[1]]


@pytest.mark.parametrize("kind", [pygan.AdversarialStep, pygan.ReferenceStep])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_result_is_on_the_device_and_z_comes_from_the_generator(kind: Any, amp: str) -> None:
    values = []
    for _ in range(2):
        G, D = networks()
        step = kind(
            G,
            D,
            torch.optim.Adam(G.parameters()),
            torch.optim.Adam(D.parameters()),
            amp=amp,
            generator=torch.Generator().manual_seed(3),
        )
        result = step(batches(1)[0][0])
        for name, value in result._asdict().items():
            assert value.shape == () and value.dtype == torch.float32, name
            assert not value.requires_grad, name
        assert 0.3 < result.d_real.item() < 0.7
        values.append([t.item() for t in result])
    assert values[0] == values[1]


def test_half_precision_scales_and_learns() -> None:
    G, D = networks()
    pygan.fuse(G)
    pygan.fuse(D)
    before = copy.deepcopy(G.state_dict())
    step = pygan.AdversarialStep(
        G, D, torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters()), amp="fp16"
    )
    for real, z in batches(3):
        result = step(real, z)
    assert all(t.isfinite() for t in result)
    assert not torch.equal(before["main.0.weight"], G.state_dict()["main.0.weight"])
    state = step.state_dict()
    assert state["scaler_d"]["scale"] > 1
    step.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "wgan"}, "loss is 'wgan'"),
        ({"loss": "hinge", "real_target": 0.9}, "real_target was given and loss 'hinge' has no"),
        ({"amp": "int8"}, "amp is 'int8'"),
        ({"graph": "always"}, "graph is 'always'"),
        ({"merge": "maybe"}, "merge is 'maybe'"),
    ],
)
def test_unknown_settings_are_named(settings: dict[str, Any], message: str) -> None:
    G, D = networks()
    with pytest.raises(pygan.UserError, match=message):
        pygan.AdversarialStep(
            G, D, torch.optim.SGD(G.parameters()), torch.optim.SGD(D.parameters()), **settings
        )


def test_a_sigmoid_at_the_end_is_refused() -> None:
    G, D = networks()
    D.main.append(nn.Sigmoid())
    with pytest.raises(pygan.UserError, match="ends in a Sigmoid"):
        pygan.AdversarialStep(
            G, D, torch.optim.SGD(G.parameters()), torch.optim.SGD(D.parameters())
        )


def test_auto_precision_is_one_the_device_has() -> None:
    assert resolve_amp("auto", torch.device("cpu")) in ("off", "bf16")
    assert resolve_amp("fp16", torch.device("cpu")) == "fp16"
