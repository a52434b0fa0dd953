from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from ops.accuracy import assert_accurate_convolution
from torch import Tensor, nn

import pygan
from pygan.nn import DiscriminatorBlock, GeneratorBlock
from pygan.ops.norm_act import batch_groups

CASES: dict[str, tuple[type[nn.Sequential], tuple[int, ...], dict[str, Any]]] = {
    "generator": (GeneratorBlock, (8, 64, 8, 8), {}),
    "generator leaky": (GeneratorBlock, (8, 64, 4, 4), {"activation": "leaky_relu"}),
    "first of generator": (GeneratorBlock, (16, 64, 1, 1), {"stride": 1, "padding": 0}),
    "images": (GeneratorBlock, (8, 64, 8, 8), {"norm": False, "activation": "tanh"}),
    "odd": (GeneratorBlock, (4, 64, 5, 5), {"output_padding": 1, "momentum": None}),
    "discriminator": (DiscriminatorBlock, (8, 64, 16, 16), {}),
    "of images": (DiscriminatorBlock, (8, 3, 16, 16), {"norm": False, "negative_slope": 0.1}),
    "logits": (
        DiscriminatorBlock,
        (8, 64, 4, 4),
        {"stride": 1, "padding": 0, "norm": False, "activation": "none"},
    ),
    "3x3": (DiscriminatorBlock, (4, 6, 9, 9), {"kernel_size": 3, "stride": 1, "affine": False}),
    "untracked": (DiscriminatorBlock, (4, 64, 8, 8), {"track_running_stats": False, "bias": True}),
}


def make(name: str) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A block, the same layers in a plain ``nn.Sequential``, and an input."""
    kind, shape, settings = CASES[name]
    torch.manual_seed(0)
    block = kind(shape[1], 32, **settings)
    plain = nn.Sequential(*copy.deepcopy(list(block)))
    return block, plain, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outcome(module: nn.Module, x: Tensor, second: bool = False) -> dict[str, Tensor]:
    """The output, the gradients, the buffers and, if asked, the gradients of a penalty."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    # In training the norm takes a bias of the convolution out again, so its gradient is rounding.
    normed = any(isinstance(m, nn.BatchNorm2d) and m.training for m in module.modules())
    parameters = {
        str(i): p
        for i, (k, p) in enumerate(module.named_parameters())
        if not (normed and k in ("conv.bias", "0.bias"))
    }
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    inputs = [leaf, *parameters.values()]
    grads = torch.autograd.grad(y, inputs, dy, create_graph=second)
    found = {"y": y.detach()}
    found |= {f"d{k}": v.detach() for k, v in zip(["input", *parameters], grads, strict=True)}
    found |= {f"b{i}": b.clone() for i, b in enumerate(module.buffers())}
    if second:
        twice = torch.autograd.grad((grads[0] * leaf.detach().cos()).sum(), parameters["0"])
        found["d20"] = twice[0]
    return found


def compare(block: nn.Module, plain: nn.Module, x: Tensor, second: bool = False) -> None:
    wide = copy.deepcopy(plain).double()
    sides = outcome(block, x, second), outcome(plain, x, second), outcome(wide, x.double(), second)
    assert sides[0].keys() == sides[1].keys()
    for name in sides[0]:
        three = [side[name] for side in sides]
        if three[0].dtype == torch.int64:
            assert torch.equal(three[0], three[1])
            continue
        weight_grad = name in ("d0", "d20")
        assert_accurate_convolution(name, *three, torch.float32, weight_grad=weight_grad)


@pytest.mark.parametrize("name", list(CASES))
def test_computes_what_its_layers_do_in_training_and_evaluation(name: str) -> None:
    block, plain, x = make(name)
    for _ in range(2):
        compare(block, plain, x)
    block.eval()
    plain.eval()
    compare(block, plain, x)


@pytest.mark.parametrize("name", ["generator", "discriminator", "images"])
def test_grad_of_grad(name: str) -> None:
    block, plain, x = make(name)
    if name != "images":
        # A penalty on the gradient behind a ReLU jumps where a rounding changes a sign.
        block.activation, plain[2] = nn.Tanh(), nn.Tanh()
    compare(block, plain, x, second=True)


@pytest.mark.parametrize("last", [True, False])
def test_bfloat16_by_autocast(last: bool) -> None:
    for name in ("generator", "discriminator"):
        block, plain, x = make(name)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        wide = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, same = block(x), plain(x)
        assert ours.dtype == same.dtype
        assert_accurate_convolution("y", ours, same, wide, torch.bfloat16)
        assert ours.stride() == same.stride()


def test_children_and_keys() -> None:
    block = GeneratorBlock(6, 4)
    assert [type(m) for m in block] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert list(block.state_dict()) == [
        "conv.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    assert [k for k, _ in DiscriminatorBlock(6, 4).named_children()] == [
        "conv",
        "norm",
        "activation",
    ]
    first = DiscriminatorBlock(3, 4, norm=False)
    assert list(first.state_dict()) == ["conv.weight", "conv.bias"]
    assert isinstance(first.activation, nn.LeakyReLU) and first.activation.negative_slope == 0.2
    assert list(DiscriminatorBlock(3, 4, norm=False, bias=False).state_dict()) == ["conv.weight"]
    assert len(DiscriminatorBlock(3, 1, norm=False, activation="none")) == 1
    settings = DiscriminatorBlock(3, 4, eps=1e-3, momentum=0.3, dtype=torch.float64)
    assert (settings.norm.eps, settings.norm.momentum) == (1e-3, 0.3)
    assert {p.dtype for p in settings.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["generator", "discriminator", "images"])
def test_copies_pickles_and_states_compute_the_same(name: str) -> None:
    block, _, x = make(name)
    block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    kind, shape, settings = CASES[name]
    loaded = kind(shape[1], 32, **settings)
    loaded.load_state_dict(block.state_dict())
    copies = (copy.deepcopy(block), torch.load(buffer, weights_only=False), loaded)
    expected = outcome(block, x)
    for other in copies:
        assert type(other) is kind
        assert list(other.state_dict()) == list(block.state_dict())
        found = outcome(other, x)
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GeneratorBlock, ["conv_transpose2d", "norm_act relu"]),
        (DiscriminatorBlock, ["conv2d", "norm_act leaky_relu"]),
    ],
)
def test_runs_by_the_fused_operations(
    kind: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = sys.modules["pygan.sequential"], []

    def watch(name: str) -> None:
        original = getattr(module, name)

        def watched(*args: Any, **keywords: Any) -> Tensor:
            calls.append(" ".join([name, *filter(None, [keywords.get("activation")])]))
            return original(*args, **keywords)

        monkeypatch.setattr(module, name, watched)

    for name in ("conv2d", "conv_transpose2d", "norm_act"):
        watch(name)
    kind(6, 4)(torch.randn(2, 6, 8, 8))
    assert calls == expected


def test_hooks_and_slices() -> None:
    block, _, x = make("generator")
    seen = []
    block.norm.register_forward_hook(lambda _, given, y: seen.append(y.shape))
    y = block(x)
    assert seen == [y.shape]
    parts = block[:2], block[2:]
    assert [list(p._modules) for p in parts] == [["conv", "norm"], ["activation"]]
    block.eval()
    assert torch.equal(parts[1](parts[0](x)), block(x))
    assert block[0] is block.conv and block[-1] is block.activation


def test_statistics_follow_groups() -> None:
    block, plain, x = make("discriminator")
    with batch_groups(2):
        y = block(x)
    expected = torch.cat([plain(half) for half in x.chunk(2)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.norm.running_var, plain[1].running_var)
    assert block.norm.num_batches_tracked.item() == 2


def test_networks_of_blocks_train() -> None:
    torch.manual_seed(0)
    G = nn.Sequential(
        GeneratorBlock(8, 32, stride=1, padding=0),
        GeneratorBlock(32, 16),
        GeneratorBlock(16, 1, norm=False, activation="tanh"),
    )
    D = nn.Sequential(
        DiscriminatorBlock(1, 16, norm=False),
        DiscriminatorBlock(16, 32),
        DiscriminatorBlock(32, 1, stride=1, padding=0, norm=False, activation="none"),
    )
    adam = torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters())
    step = pygan.AdversarialStep(G, D, *adam, amp="off", loss="hinge")
    result = step(torch.rand(8, 1, 16, 16) * 2 - 1)
    assert all(t.isfinite() for t in result)


@pytest.mark.parametrize("kind", [GeneratorBlock, DiscriminatorBlock])
def test_wrong_arguments_are_named(kind: Any) -> None:
    with pytest.raises(pygan.UserError, match="activation is 'gelu'; it is one of none, relu"):
        kind(3, 4, activation="gelu")
    with pytest.raises(pygan.UserError, match="out_channels is 0; give a whole number"):
        kind(3, 0)
