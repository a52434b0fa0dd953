from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pygan
from pygan import known_operations, pending, sequential
from pygan import layers as _layers
from pygan.fuse import why_not_mergeable
from pygan.ops import layout, norm_act, norm_conv
from pygan.ops.norm_act import batch_groups
from pygan.sequential import FusedSequential


def blocks() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8, 0.8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 6, 4, 2, 1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(True),
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False), nn.Tanh()),
        nn.BatchNorm2d(6, track_running_stats=False),
    )


def forward_backward(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(y.square().mean() + y[:, :1].sin().sum(), [x, *parameters])
    return [y.detach(), *grads, *[b.clone() for b in module.buffers()]]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    plain = blocks()
    fused = copy.deepcopy(plain)
    report = pygan.fuse(fused)
    assert len(report.fused) == 6
    assert report.skipped == []
    return plain, fused


def test_same_numbers_in_training_and_evaluation() -> None:
    plain, fused = pair()
    for step in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        assert_same(forward_backward(plain, x), forward_backward(fused, x))
    plain.eval()
    fused.eval()
    assert_same(forward_backward(plain, x), forward_backward(fused, x))


def test_fused_blocks_call_the_fused_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair()
    # pygan.fuse the function hides pygan.fuse the module.
    module = sys.modules["pygan.sequential"]
    calls = []
    norm_act, norm_conv = module.norm_act, module.norm_conv

    def watch_norm(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(("norm_act", kwargs["activation"]))
        return norm_act(*args, **kwargs)

    def watch_conv(*args: object) -> Tensor:
        calls.append(("norm_conv", args[5].activation))
        return norm_conv(*args)

    monkeypatch.setattr(module, "norm_act", watch_norm)
    monkeypatch.setattr(module, "norm_conv", watch_conv)
    fused(torch.randn(4, 3, 8, 8))
    assert calls == [
        ("norm_conv", "leaky_relu"),
        ("norm_act", "relu"),
        ("norm_act", "tanh"),
        ("norm_act", "none"),
    ]


def test_state_class_names_and_undo() -> None:
    plain, fused = pair()
    assert list(plain.state_dict()) == list(fused.state_dict())
    names = [type(m).__name__ for m in fused.modules() if not list(m.children())]
    assert names == [type(m).__name__ for m in plain.modules() if not list(m.children())]
    assert isinstance(fused, nn.Sequential)
    assert repr(fused) == repr(plain)
    again = pygan.fuse(fused)
    assert len(again.fused) == 6
    pygan.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


def test_copies_and_pickles_stay_fused() -> None:
    plain, fused = pair()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    x = torch.randn(4, 3, 8, 8)
    expected = forward_backward(plain, x)
    for other in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        assert type(other) is FusedSequential
        assert_same(expected, forward_backward(other, x))


def test_double_half_and_tracing_still_work() -> None:
    plain, fused = pair()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    a = forward_backward(plain.double(), x)
    for p, q in zip(a, forward_backward(fused.double(), x), strict=True):
        torch.testing.assert_close(p, q)
    traced = torch.fx.symbolic_trace(fused.eval())
    torch.testing.assert_close(traced(x), plain.eval()(x))


def test_hooks_are_honoured_whenever_they_come() -> None:
    _, fused = pair()
    seen: list[str] = []
    handle = fused[1].register_forward_hook(lambda *_: seen.append("norm"))
    fused[5].register_forward_pre_hook(lambda *_: seen.append("activation"))
    fused(torch.randn(4, 3, 8, 8))
    assert seen == ["norm", "activation"]
    report = pygan.fuse(fused)
    assert ("1 BatchNorm2d", "it has hooks") in report.skipped
    handle.remove()
    fused(torch.randn(4, 3, 8, 8))
    assert seen == ["norm", "activation", "activation"]


def test_global_hooks_see_every_layer() -> None:
    _, fused = pair()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(type(m).__name__)
    )
    try:
        fused(torch.randn(4, 3, 8, 8))
    finally:
        handle.remove()
    assert seen.count("BatchNorm2d") == 4


def test_report_names_what_is_left() -> None:
    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(x))

    class OwnNorm(nn.BatchNorm2d):
        pass

    network = nn.Sequential(Attribute(), OwnNorm(3), nn.BatchNorm2d(3), nn.ReLU())
    report = pygan.fuse(network)
    assert report.fused == [
        "2 BatchNorm2d + 3 ReLU",
        "0.norm BatchNorm2d (with what follows it)",
    ]
    assert report.skipped == [("1 OwnNorm", "OwnNorm is a class of its own")]
    assert str(report).splitlines()[0].split() == ["2", "BatchNorm2d", "+", "3", "ReLU", "fused"]
    with pytest.raises(pygan.UserError, match="OwnNorm"):
        pygan.fuse(copy.deepcopy(network), strict=True)


def test_wrong_input_keeps_torch_errors() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    pygan.fuse(norm)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(2, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))


def test_groups_equal_calls_in_order() -> None:
    plain, fused = pair()
    halves = torch.randn(2, 4, 3, 8, 8)
    one_by_one = torch.cat([plain(half) for half in halves])
    with batch_groups(2):
        together = fused(halves.flatten(0, 1))
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
    assert_same(list(plain.buffers()), list(fused.buffers()))


def test_what_may_be_merged() -> None:
    _, network = pygan.models.dcgan(32, 1, ngf=4, ndf=4)
    reason = why_not_mergeable(network)
    assert reason is not None and "BatchNorm2d" in reason
    pygan.fuse(network)
    assert why_not_mergeable(network) is None
    network.main[0].register_forward_hook(lambda *_: None)
    reason = why_not_mergeable(network)
    assert reason is not None and "hooks" in reason

    class Deviation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    for layer in (Deviation(), nn.Dropout(0.5), nn.InstanceNorm2d(3, track_running_stats=True)):
        reason = why_not_mergeable(nn.Sequential(nn.Conv2d(3, 3, 1), layer))
        assert reason is not None and type(layer).__name__ in reason
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)))
    assert why_not_mergeable(spectral) is not None


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(10, 8, 4, 1, 0),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 5, 4, 2, 1, output_padding=(1, 0)),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.Conv2d(7, 6, 4, 2, 1),
        nn.Conv2d(6, 4, 4, 2, 1, bias=False),
        nn.Conv2d(4, 2, (4, 4)),
    )


def test_convolutions_without_batch_norm_are_fused() -> None:
    plain = convolutions()
    fused = copy.deepcopy(plain)
    report = pygan.fuse(fused)
    assert report.fused == [
        "0 ConvTranspose2d (of 1x1 maps)",
        "2 ConvTranspose2d",
        "4 ConvTranspose2d",
        "6 Conv2d",
        "7 Conv2d",
        "8 Conv2d (of 4x4 maps)",
        "5 Conv2d (with what follows it)",
    ]
    assert report.skipped == []
    assert type(fused) is FusedSequential
    for training in (True, False):
        plain.train(training)
        fused.train(training)
        for shape in ((3, 10, 1, 1), (2, 10, 2, 3)):
            x = torch.randn(shape)
            assert_same(forward_backward(plain, x), forward_backward(fused, x))


def test_fused_convolutions_call_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = convolutions()
    pygan.fuse(fused)
    module = sys.modules["pygan.sequential"]
    calls = []
    for name in ("conv2d", "conv_transpose2d"):

        def watched(*args: object, name: str = name, moments: object = None) -> Tensor:
            calls.append(name)
            return getattr(nn.functional, name)(*args)

        monkeypatch.setattr(module, name, watched)
    seen: list[str] = []
    fused[2].register_forward_hook(lambda *_: seen.append("hook"))
    fused(torch.randn(2, 10, 1, 1))
    assert calls == ["conv_transpose2d"] * 2 + ["conv2d"] * 3
    assert seen == ["hook"]


def test_networks_of_a_gan_give_the_same_numbers() -> None:
    for index, shape in enumerate([(4, 20, 1, 1), (4, 3, 32, 32)]):
        torch.manual_seed(2)
        plain = pygan.models.dcgan(32, nz=20, ngf=8, ndf=8)[index].main
        fused = copy.deepcopy(plain)
        report = pygan.fuse(fused)
        assert not report.skipped
        assert {row.split()[0] for row in report.fused} == {
            name for name, layer in plain.named_children() if type(layer) in module_convolutions()
        }
        x = torch.randn(shape)
        assert_same(forward_backward(plain, x), forward_backward(fused, x))


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 4, 2, 1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 2, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(2, 3, 4, 2, 1),
        nn.LeakyReLU(-0.5),
    )


def test_convolutions_of_images_take_their_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = images()
    fused = copy.deepcopy(plain)
    assert pygan.fuse(fused).fused == [
        "0 Conv2d + 1 LeakyReLU",
        "2 ConvTranspose2d",
        "4 Conv2d + 5 ReLU",
        "6 Conv2d + 7 BatchNorm2d + 8 LeakyReLU",
        "9 Conv2d",
        "11 Conv2d + 12 LeakyReLU",
    ]
    module = sys.modules["pygan.sequential"]
    calls = []
    real = module.down

    def watched(*args: object) -> Tensor:
        calls.append(args[3:])
        return real(*args)

    monkeypatch.setattr(module, "down", watched)
    for shape in ((2, 3, 64, 64), (1, 3, 66, 65)):
        x = torch.randn(shape)
        assert_same(forward_backward(plain, x), forward_backward(fused, x))
    assert calls[:3] == [("leaky_relu", 0.2), ("relu", 0.0), ("leaky_relu", -0.5)]
    calls.clear()
    seen: list[str] = []
    fused[1].register_forward_hook(lambda *_: seen.append("hook"))
    assert_same(forward_backward(plain, x), forward_backward(fused, x))
    assert seen == ["hook"]
    assert calls == [("relu", 0.0), ("leaky_relu", -0.5)]
    assert pygan.fuse(fused).fused[0] == "0 Conv2d"


def test_first_layer_of_a_discriminator_is_reported_with_its_activation() -> None:
    _, discriminator = pygan.models.dcgan(32, 1, ngf=4, ndf=4)
    assert pygan.fuse(discriminator).fused[0] == "main.0 Conv2d + main.1 LeakyReLU"


def test_gradient_penalty_through_a_fused_activation() -> None:
    torch.manual_seed(4)
    plain = pygan.models.dcgan(32, nz=20, ngf=8, ndf=8)[1]
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    results = []
    for network in (plain, fused):
        (dx,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        results.append(list(torch.autograd.grad(penalty, list(network.parameters()))))
    assert_same(*results)


def module_convolutions() -> tuple[type[nn.Module], ...]:
    return sys.modules["pygan.sequential"].CONVOLUTIONS


def test_report_names_convolutions_that_are_left() -> None:
    class OwnConvolution(nn.Conv2d):
        pass

    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    watched = nn.Conv2d(4, 4, 4, 2, 1)
    watched.register_forward_hook(lambda *_: None)
    network = nn.Sequential(
        nn.Conv2d(4, 4, 4, 2, 1, groups=2),
        nn.Conv2d(4, 4, 4, 2, 1, padding_mode="reflect"),
        OwnConvolution(4, 4, 4, 2, 1),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 4, 2, 1)),
        nn.utils.spectral_norm(nn.Conv2d(4, 4, 4, 2, 1)),
        nn.Conv2d(4, 4, 1, groups=2),
        watched,
        nn.Conv2d(4, 4, 4, 2, 1, dilation=2),
        Attribute(),
    )
    plain = copy.deepcopy(network)
    report = pygan.fuse(network)
    assert report.fused == [
        "1 Conv2d (with what follows it)",
        "3 ParametrizedConv2d (with what follows it)",
        "4 Conv2d (with what follows it)",
        "8.conv Conv2d (with what follows it)",
    ]
    assert report.skipped == [
        ("0 Conv2d", "it has groups or a dilation"),
        ("2 OwnConvolution", "OwnConvolution is a class of its own"),
        ("6 Conv2d", "it has hooks"),
        ("7 Conv2d", "it has groups or a dilation"),
    ]
    assert type(network) is nn.Sequential
    with pytest.raises(pygan.UserError, match="0 Conv2d cannot be fused: it has groups"):
        pygan.fuse(plain, strict=True)
    assert "nothing to fuse" in str(pygan.fuse(nn.Sequential(nn.Linear(3, 3))))


def test_bfloat16_autocast_keeps_float32_gradients() -> None:
    fused = convolutions()
    pygan.fuse(fused)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(torch.randn(2, 10, 1, 1))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_by_jit() -> None:
    plain, fused = pair()
    plain.eval()
    fused.eval()
    x = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(fused, x[0])
        torch.testing.assert_close(traced(x[1]), plain(x[1]))


def pairs() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.AvgPool2d(2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.AvgPool2d((2, 2), (2, 2)),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(24, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, 0.8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.UpsamplingNearest2d(scale_factor=(2, 2)),
        nn.Conv2d(16, 3, 3, 1, 1, bias=False),
        nn.Tanh(),
    )


PAIR_ROWS = [
    "0 Conv2d + 1 AvgPool2d",
    "3 Conv2d + 4 AvgPool2d + 5 BatchNorm2d + 6 ReLU",
    "7 Upsample + 8 Conv2d + 9 BatchNorm2d + 10 LeakyReLU",
    "11 UpsamplingNearest2d + 12 Conv2d",
]


def assert_near(a: list[Tensor], b: list[Tensor]) -> None:
    """Both within the floor of float32 convolutions, 3e-6, of the same truth."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x - y).double().norm() <= 6e-6 * y.double().norm()


def watch_folds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs of every folded operation that is called."""
    module = sys.modules["pygan.sequential"]
    calls: list[tuple[int, ...]] = []
    for name in ("upsample_conv2d", "conv2d_avg_pool"):

        def watched(x: Tensor, *args: object, real: object = getattr(module, name)) -> Tensor:
            calls.append(tuple(x.shape))
            assert callable(real)
            return real(x, *args)

        monkeypatch.setattr(module, name, watched)
    return calls


def test_convolutions_beside_upsampling_and_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    plain = pairs()
    fused = copy.deepcopy(plain)
    report = pygan.fuse(fused, strict=True)
    assert report.fused == PAIR_ROWS
    assert report.skipped == []
    calls = watch_folds(monkeypatch)
    for training in (True, False):
        plain.train(training)
        fused.train(training)
        # Large enough for the fold, too small for it, and odd.
        for shape in ((4, 3, 32, 32), (2, 3, 16, 16), (4, 3, 33, 35)):
            x = torch.randn(shape)
            assert_near(forward_backward(plain, x), forward_backward(fused, x))
            assert len(calls) == 4
            calls.clear()
    assert list(plain.state_dict()) == list(fused.state_dict())
    pygan.unfuse(fused)
    fused(x)
    assert calls == []


def test_copies_pickles_and_traces_of_folded_layers() -> None:
    torch.manual_seed(3)
    plain = pairs().eval()
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    x = torch.randn(4, 3, 32, 32)
    expected = forward_backward(plain, x)
    for other in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        assert type(other) is FusedSequential
        assert_near(expected, forward_backward(other, x))
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), plain(x))


@pytest.mark.parametrize("layer", [7, 8], ids=["upsampling", "convolution"])
def test_hooks_between_folded_layers_are_honoured(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = pairs()
    pygan.fuse(fused)
    calls, seen = watch_folds(monkeypatch), []
    handle = fused[layer].register_forward_hook(lambda *_: seen.append(layer))
    fused(torch.randn(2, 3, 16, 16))
    assert seen == [layer]
    assert len(calls) == 3
    assert pygan.fuse(fused).fused[2] == "9 BatchNorm2d + 10 LeakyReLU"
    handle.remove()
    fused(torch.randn(2, 3, 16, 16))
    assert seen == [layer]
    assert len(calls) == 7


def test_what_is_not_folded() -> None:
    class OwnUpsample(nn.Upsample):
        pass

    def conv(**change: object) -> nn.Conv2d:
        arguments = {"kernel_size": 3, "padding": 1} | change
        return nn.Conv2d(4, 4, **arguments)  # type: ignore[arg-type]

    left = [
        (nn.Upsample(scale_factor=2, mode="bilinear"), conv()),
        (nn.Upsample(scale_factor=3), conv()),
        (nn.Upsample(scale_factor=(1, 2)), conv()),
        (nn.Upsample(size=(16, 16)), conv()),
        (OwnUpsample(scale_factor=2), conv()),
        (nn.Upsample(scale_factor=2), nn.ReLU()),
        (nn.Upsample(scale_factor=2), conv(stride=2)),
        (nn.Upsample(scale_factor=2), conv(groups=2)),
        (nn.Upsample(scale_factor=2), conv(dilation=2)),
        (nn.Upsample(scale_factor=2), conv(padding=0)),
        (nn.Upsample(scale_factor=2), conv(padding_mode="reflect")),
        (nn.Upsample(scale_factor=2), conv(kernel_size=5)),
        (nn.Upsample(scale_factor=2), nn.utils.parametrizations.spectral_norm(conv())),
        (conv(), nn.ReLU()),
        (conv(), nn.AvgPool2d(3)),
        (conv(), nn.AvgPool2d(2, 1)),
        (conv(), nn.AvgPool2d(2, 2, 1)),
        (conv(), nn.AvgPool2d(2, ceil_mode=True)),
        (conv(), nn.AvgPool2d(2, divisor_override=3)),
        (conv(), nn.MaxPool2d(2)),
        (conv(padding_mode="circular"), nn.AvgPool2d(2)),
    ]
    for first, second in left:
        network = nn.Sequential(first, second)
        plain = copy.deepcopy(network)
        pygan.fuse(network)
        kinds = [kind for _, kind, _ in sys.modules["pygan.sequential"].fused_runs(list(network))]
        assert not set(kinds) & set(sys.modules["pygan.sequential"].FOLDED), network
        x = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(network(x), plain(x))


def test_unbatched_images_keep_torchs_meaning() -> None:
    torch.manual_seed(3)
    up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 5, 3, padding=1))
    down = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.AvgPool2d(2))
    for plain in (up, down):
        fused = copy.deepcopy(plain)
        assert pygan.fuse(fused).fused
        x = torch.randn(4, 6, 8)
        torch.testing.assert_close(fused(x), plain(x))


def test_gradient_penalty_through_folded_layers() -> None:
    torch.manual_seed(4)
    plain = nn.Sequential(*list(pairs())[:3], nn.Conv2d(16, 8, 3, padding=1), nn.AvgPool2d(2))
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    results = []
    for network in (plain, fused):
        (dx,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        weights = [network[0].weight, network[3].weight]
        results.append(list(torch.autograd.grad(penalty, weights)))
    assert_near(*results)


def test_folded_layers_under_autocast_keep_float32_gradients() -> None:
    torch.manual_seed(3)
    fused = pairs()
    pygan.fuse(fused)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(torch.randn(4, 3, 32, 32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


class Attributes(nn.Module):
    """Layers that its forward calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.relu(self.bn(self.conv(x))))


def test_example_inputs_leave_no_trace_but_what_was_found_out() -> None:
    network = Attributes()
    state = copy.deepcopy(network.state_dict())
    report = pygan.fuse(network, example_inputs=(torch.randn(2, 3, 16, 16),))
    assert report.fused[-1] == "the input: conv2d, batch_norm, relu, conv2d"
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key
    before = torch.get_rng_state()
    pygan.fuse(network, example_inputs=(torch.ones(2, 3, 16, 16),))
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_that_kernels_do_not_take() -> None:
    with torch.device("meta"):
        networks = [Attributes(), nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8))]
    for network in networks:
        report = pygan.fuse(network)
        assert not report.fused and "on meta" in report.skipped[0][1]
        with pytest.raises(pygan.UserError, match=r"Conv2d cannot be fused.*meta"):
            pygan.fuse(network, strict=True)
    lazy = nn.Sequential(nn.LazyConv2d(8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    assert pygan.fuse(lazy).skipped == [("0 LazyConv2d", "it is lazy and not initialized yet")]
    assert lazy(torch.randn(2, 3, 8, 8)).shape == (2, 8, 4, 4)
    assert pygan.fuse(lazy).fused
    script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert pygan.fuse(script).skipped[0][1] == "it is a script of torch.jit"


def test_a_module_without_anything_to_fuse_stays_as_it_is() -> None:
    """So a call of it takes no longer."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.GELU()))
    before = [(type(m), dict(vars(m))) for m in network.modules()]
    assert not pygan.fuse(network).fused
    assert [(type(m), dict(vars(m))) for m in network.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("make", [Attributes, lambda: nn.Sequential(*Attributes().children())])
def test_little_layers_are_left_to_torch(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "LEAST_ELEMENTS", 8 * 8 * 8 * 2)
    monkeypatch.setattr(pending, "LEAST_MACS", 8 * 8 * 8 * 4 * 16 * 2)
    network = make()
    pygan.fuse(network)
    for size, kernels in ((16, True), (8, False)):
        calls = counted(monkeypatch, norm_conv, "_prepared")
        for _ in range(4):
            network(torch.randn(2, 3, size, size))
        assert bool(calls) == kernels


def counted(monkeypatch: pytest.MonkeyPatch, place: ModuleType, name: str) -> list[None]:
    """Grows with each call of a function."""
    calls: list[None] = []
    function = getattr(place, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, call)
    return calls


@pytest.mark.native
@pytest.mark.parametrize("form", ["attributes", "Sequential"])
@pytest.mark.parametrize(
    ("dtype", "last", "activated", "least"),
    [
        (torch.float32, False, True, 1),
        (torch.float32, False, "in place", 1),
        (torch.float32, False, False, 2),
        (torch.float32, True, True, 4),
        (torch.bfloat16, False, True, 4),
        (torch.bfloat16, True, False, 8),
    ],
)
def test_norms_are_left_to_torch_by_what_their_maps_gain(
    form: str,
    dtype: torch.dtype,
    last: bool,
    activated: bool | str,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice as large ones where a layer is called by itself."""
    monkeypatch.setattr(pending, "LEAST_NORMED", 4 * 8 * 8 * 2)
    activation = [nn.ReLU(activated == "in place")] if activated else []
    layers = [nn.BatchNorm2d(4), *activation]
    network = nn.Sequential(*layers) if form == "Sequential" else Called(*layers)
    pygan.fuse(network)
    least *= 2 if form == "attributes" else 1
    for batch, kernels in ((least, False), (2 * least, True)):
        calls = counted(monkeypatch, norm_act, "_run_forward")
        x = torch.randn(batch, 4, 8, 8).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        for _ in range(4):
            calls.clear()
            network(x)
        assert bool(calls) == kernels


class Called(nn.Module):
    """Layers that a ``forward`` calls one by one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Upward(nn.Module):
    """Norm, ReLU, upsampling and convolution."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, 1, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm(x * 1))
        return self.conv(nn.functional.interpolate(h, scale_factor=2))


@pytest.mark.native
@pytest.mark.parametrize("activation", [torch.relu, torch.relu_, nn.ReLU(), nn.ReLU(True)])
def test_what_is_folded_behind_a_norm_of_torch_is_found(
    activation: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "LEAST_NORMED", 1 << 30)
    plain, x = Upward(activation), torch.randn(4, 8, 8, 8)
    fused = copy.deepcopy(plain)
    pygan.fuse(fused)
    for _ in range(pending.TRIES):
        assert_same(forward_backward(fused, x), forward_backward(plain, x))
    folded = counted(monkeypatch, known_operations, "upsample_conv2d")
    normed = counted(monkeypatch, norm_act, "_run_forward")
    assert_same(forward_backward(fused, x), forward_backward(plain, x))
    assert folded and not normed


@pytest.mark.native
def test_what_is_left_to_torch_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For inputs of that shape, and until a layer is another one or somebody watches."""
    monkeypatch.setattr(pending, "LEAST_NORMED", 4 * 64)
    network = nn.Sequential(nn.Identity(), nn.BatchNorm2d(4), nn.ReLU())
    pygan.fuse(network)
    looks = counted(monkeypatch, sequential, "fused_runs")
    little, large = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 8, 8)

    def looked(x: Tensor) -> bool:
        looks.clear()
        network(x)
        return bool(looks)

    assert [looked(little), looked(little), looked(large), looked(large)] == [1, 0, 1, 1]
    assert looked(little.bfloat16()) and not looked(little)
    with batch_groups(1):
        assert not looked(little)
    seen: list[None] = []
    handle = network[1].register_forward_hook(lambda *_: seen.append(None))
    assert not looked(little) and seen
    assert looked(torch.randn(2, 4, 4, 4)) and looked(torch.randn(2, 4, 4, 4))  # not while watched
    handle.remove()
    network[1] = nn.BatchNorm2d(4)
    assert looked(little)
    doubled = torch.cat([little, little])
    with batch_groups(2):
        assert looked(doubled) and looked(doubled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYGAN_IMPL", "cpu")
        assert looked(little)


@pytest.mark.native
def test_a_layer_remembers_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Called(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    pygan.fuse(network)
    monkeypatch.setattr(pending, "LEAST_NORMED", 4 * 64)
    looks = counted(monkeypatch, _layers, "may_enter")
    x = torch.randn(1, 3, 8, 8)
    seen = []
    for _ in range(pending.TRIES + 2):
        looks.clear()
        network(x)
        seen.append(len(looks))
    # The network's own input is looked at in every call.
    assert seen[0] > 1 and seen[-1] == 1


@pytest.mark.native
def test_an_input_that_torch_convolves_stays_a_plain_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Called(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    pygan.fuse(network)
    x = torch.randn(2, 3, 16, 16)
    network(x)
    entered = counted(monkeypatch, pending, "entered")
    network(x)
    assert not entered


class Chain(nn.Module):
    """Convolutions that only torch has kernels for, called by their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 16, 3, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(x))
        return self.up(nn.functional.relu(self.norm(self.second(x))))


@pytest.mark.parametrize("form", ["attributes", "Sequential"])
def test_maps_between_convolutions_of_torch_stay_as_they_are(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain()
    relu = nn.ReLU()
    layers = (chain.first, relu, chain.second, chain.norm, relu, chain.up)
    network = chain if form == "attributes" else nn.Sequential(*layers)
    pygan.fuse(network)
    x = torch.randn(8, 3, 32, 32, requires_grad=True)
    for _ in range(4):  # what reads every output is learnt
        network(x).sum().backward()
    calls: list[str] = []
    for function in (layout._Reordered, norm_act._NormAct):

        def noted(
            *arguments: Any, name: str = function.__name__, apply: Any = function.apply
        ) -> Any:
            calls.append(name)
            return apply(*arguments)

        monkeypatch.setattr(function, "apply", noted)
    network(x).sum().backward()
    assert calls == ["_NormAct"]
