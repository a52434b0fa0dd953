"""What code around a network does with it and with its tensors: hooks, copies, views, casts."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import Draw, assert_agree, assert_near, buffers, build, gradients, pair_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pygan
from benchmarks.published.dcgan import SequentialDiscriminator, weights_init


class Block(nn.Module):
    """An attribute form with one activation module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.2)
        self.conv1 = nn.Conv2d(3, 8, 4, 2, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)))


def sequence() -> nn.Module:
    shared = nn.LeakyReLU(0.2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.BatchNorm2d(8),
        shared,
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        shared,
    )


both = pytest.mark.parametrize("make", [sequence, Block])
Make = Callable[[], nn.Module]


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@both
@pytest.mark.parametrize("leaf", range(5))
def test_forward_hooks_see_the_same_tensors(make: Make, leaf: int) -> None:
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for module in pair_of(make):
        seen.append([])
        layer = [m for m in module.modules() if not list(m.children())][leaf]
        layer.register_forward_hook(
            lambda _, xs, y, to=seen[-1]: to.append((xs[0].detach().clone(), y.detach().clone()))
        )
        module(images())
    assert len(seen[0]) == len(seen[1]) > 0
    for expected, values in zip(*seen, strict=True):
        for a, b in zip(values, expected, strict=True):
            assert type(a) is Tensor
            assert_near(a, b)


@both
def test_hooks_that_change_something(make: Make) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        norms[0].register_forward_hook(lambda m, xs, y: y * 2)
        norms[1].register_forward_pre_hook(lambda m, xs: (xs[0] + 1,))
        norms[1].register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
        x = draw(3, 3, 16, 16).requires_grad_()
        y = module(x)
        (y * draw(*y.shape)).sum().backward()
        return {"output": y, " grad x": x.grad} | gradients(module) | buffers(module)

    assert_agree(make, run)


@both
def test_hooks_on_tensors_and_parameters(make: Make) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        kept: list[Tensor] = []
        for p in module.parameters():
            p.register_hook(lambda g: g * 2)

        def keep(m: nn.Module, xs: object, y: Tensor) -> None:
            y.retain_grad()
            y.register_hook(lambda g: g * 0.5)
            kept.append(y)

        [m for m in module.modules() if isinstance(m, nn.Conv2d)][1].register_forward_hook(keep)
        y = module(draw(3, 3, 16, 16))
        y.register_hook(lambda g: g + 1)
        (y * draw(*y.shape)).sum().backward()
        return {"kept": kept[0], " grad kept": kept[0].grad} | gradients(module)

    assert_agree(make, run)


@both
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_outputs_are_plain_tensors(make: Make, training: bool) -> None:
    plain, fused = pair_of(make)
    expected, y = plain.train(training)(images()), fused.train(training)(images())
    assert type(y) is Tensor
    assert y.grad_fn is not None
    assert y.data_ptr() == y.untyped_storage().data_ptr()
    assert y.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert type(y.detach()) is type(y[0]) is type(y + 1) is Tensor
    assert_near(torch.from_numpy(y.detach().numpy()), expected.detach())
    assert repr(y).startswith("tensor(")
    assert_near(torch.load(saved(y.detach())), expected.detach())
    assert (y.element_size(), y.numel(), y.is_contiguous()) == (4, expected.numel(), True)


def saved(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


class Cubed(torch.autograd.Function):
    """Somebody's own operation, which works on memory."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * dy


class Uses(nn.Module):
    """What somebody does with the output of a convolution or of a batch norm."""

    def __init__(self, use: Callable[[Uses, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.conv = nn.Conv2d(3, 8, 4, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 8 * 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        return self.use(self, c, self.bn(c))


USES: dict[str, Callable[[Uses, Tensor, Tensor], Tensor]] = {
    "view": lambda m, c, b: m.linear(c.view(len(c), -1)),
    "view of a norm": lambda m, c, b: torch.tanh(m.linear(b.view(b.size(0), -1))),
    "custom function": lambda m, c, b: torch.tanh(Cubed.apply(b)),
    "custom function of a convolution": lambda m, c, b: torch.tanh(Cubed.apply(c)) + b,
    "cat": lambda m, c, b: F.elu(torch.cat([c, b, F.elu(b)], 1)),
    "cat in a list": lambda m, c, b: torch.stack([b, torch.tanh(b)]).sum(0),
    "residual": lambda m, c, b: F.elu(b) + c,
    "residual of a norm": lambda m, c, b: F.elu(b + c),
    "added in place": lambda m, c, b: torch.tanh(b.add_(c)),
    "scaled": lambda m, c, b: F.elu(b * c.mean((2, 3), keepdim=True)),
    "slices": lambda m, c, b: torch.sigmoid(b[:, :4]) * b[:, 4:],
    "chunks": lambda m, c, b: (lambda p, q: torch.sigmoid(p) * torch.tanh(q))(*b.chunk(2, 1)),
    "written to": lambda m, c, b: (lambda y: (y[:, 0].zero_(), torch.tanh(y))[1])(b.clone()),
    "branch on values": lambda m, c, b: F.elu(b) if float(b.detach().sum()) > -1e9 else b,
    "masked": lambda m, c, b: torch.where(b > 0, b, 0.1 * b) + F.elu(c),
    "method tanh": lambda m, c, b: b.tanh(),
    "method sigmoid": lambda m, c, b: b.sigmoid(),
    "torch.relu": lambda m, c, b: torch.relu(b),
    "method relu": lambda m, c, b: b.relu(),
    "clamp": lambda m, c, b: b.clamp(min=0),
    "selu": lambda m, c, b: F.selu(b),
    "silu": lambda m, c, b: F.silu(b),
    "gelu": lambda m, c, b: F.gelu(b),
    "softplus": lambda m, c, b: F.softplus(b),
    "detached": lambda m, c, b: F.elu(b.detach()) + c,
    "no grad inside": lambda m, c, b: F.elu(b) * _constant(b),
    "converted": lambda m, c, b: F.elu(b.to(b.dtype).contiguous().float()).to(b.dtype),
    "transposed": lambda m, c, b: F.elu(b.permute(0, 2, 3, 1)).transpose(1, 3),
    "inner product": lambda m, c, b: torch.einsum("nchw,nchw->nhw", F.elu(b), c),
    "size of it": lambda m, c, b: F.elu(b) / b.numel() * len(b) + b.new_ones(b.shape),
    "grad inside": lambda m, c, b: F.elu(b) + _own_gradient(c),
}


def _constant(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.abs().mean()


def _own_gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(leaf.tanh().sum(), leaf)
    return grad


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_uses_of_an_output(use: Callable[[Uses, Tensor, Tensor], Tensor], training: bool) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        x = draw(3, 3, 16, 16).requires_grad_()
        y = module.train(training)(x)
        assert type(y) is Tensor
        (y * draw(*y.shape)).sum().backward()
        return {"output": y, " grad x": x.grad} | gradients(module) | buffers(module)

    assert_agree(lambda: Uses(use), run)


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(make: Make, reentrant: bool) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        x = draw(3, 3, 16, 16).requires_grad_()
        y = checkpoint(module, x, use_reentrant=reentrant)
        (y * draw(*y.shape)).sum().backward()
        return {"output": y, " grad x": x.grad} | gradients(module) | buffers(module)

    assert_agree(make, run)


@both
def test_bfloat16_autocast(make: Make) -> None:
    plain, fused = pair_of(make)
    results = []
    for module in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(images(8))
        y.float().square().mean().backward()
        results.append((y.dtype, [p.grad.dtype for p in module.parameters()]))
    assert results[0] == results[1]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        values = [m.eval()(images(8)).double() for m in (plain, fused)]
    exact = build(make).double()
    exact.load_state_dict(plain.state_dict())
    with torch.no_grad():
        truth = exact.eval()(images(8).double())
    errors = [(v - truth).norm().item() for v in values]
    # The rule for convolutions in bfloat16.
    assert errors[1] <= max(2.2 * errors[0], 2e-3 * truth.norm().item())


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_converted_networks(make: Make, dtype: torch.dtype) -> None:
    plain, fused = (module.to(dtype) for module in pair_of(make))
    x = images().to(dtype)
    expected, y = plain(x), fused(x)
    assert y.dtype == dtype and [b.dtype for b in plain.buffers()] == [
        b.dtype for b in fused.buffers()
    ]
    truth = build(make).to(dtype).double()(x.double())
    error, allowed = ((v.double() - truth).norm().item() for v in (y, expected))
    assert error <= max(2.2 * allowed, 1e-12 * truth.norm().item())
    y.double().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in fused.parameters())
    fused.float()
    assert fused(images()).dtype == torch.float32


@both
def test_names_types_and_identities(make: Make) -> None:
    plain, fused = build(make), build(make)
    held = {key: id(v) for key, v in fused.named_parameters()}
    pygan.fuse(fused)
    assert {key: id(v) for key, v in fused.named_parameters()} == held
    leaves = [
        [(key, type(m)) for key, m in n.named_modules() if not list(m.children())]
        for n in (plain, fused)
    ]
    assert leaves[0] == leaves[1]
    assert isinstance(fused, type(plain))
    assert [key for key, _ in plain.named_children()] == [key for key, _ in fused.named_children()]
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert plain.state_dict()._metadata == fused.state_dict()._metadata
    plain.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(torch.load(saved(plain.state_dict()), weights_only=True), strict=True)


@both
def test_initialisation_by_class_name_after_fusing(make: Make) -> None:
    plain, fused = pair_of(make)
    for module in (plain, fused):
        torch.manual_seed(3)
        module.apply(weights_init)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_near(fused(images()), plain(images()))


@both
@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(make: Make, how: str, run_before: bool) -> None:
    plain, fused = pair_of(make)
    if run_before:
        plain(images())
        fused(images())
    other = (
        copy.deepcopy(fused) if how == "deepcopy" else torch.load(saved(fused), weights_only=False)
    )
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert not {id(p) for p in other.parameters()} & {id(p) for p in fused.parameters()}
    y = other(images())
    assert_near(y, plain(images()))
    y.sum().backward()
    assert all(p.grad is None for p in fused.parameters())
    assert all(p.grad is not None for p in other.parameters())


def replica_of(module: nn.Module) -> nn.Module:
    """As ``DataParallel`` makes them: parameters are plain tensors with a history."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for original, replica in copies.items():
        for key, child in original._modules.items():
            replica._modules[key] = copies[child] if child is not None else None
        for key, p in original._parameters.items():
            if p is not None:
                replica._former_parameters = {}
                setattr(replica, key, p.view_as(p))
    return copies[module]


@both
def test_replicas_of_data_parallel(make: Make) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        replica = replica_of(module)
        assert not list(replica.parameters())
        y = replica(draw(3, 3, 16, 16))
        (y * draw(*y.shape)).sum().backward()
        return {"output": y} | gradients(module) | buffers(module)

    assert_agree(make, run)


@both
def test_data_parallel_without_devices(make: Make) -> None:
    plain, fused = pair_of(make)
    assert_near(nn.DataParallel(fused)(images()), nn.DataParallel(plain)(images()))


def test_sequential_container_still_works_as_one() -> None:
    plain, fused = pair_of(sequence)
    assert isinstance(plain, nn.Sequential) and isinstance(fused, nn.Sequential)
    assert len(fused) == len(plain) and isinstance(fused[1], nn.BatchNorm2d)
    assert_near(fused[:3](images()), plain[:3](images()))
    h, k = images(), images()
    for a, b in zip(plain, fused, strict=True):
        h, k = a(h), b(k)
        assert_near(k, h)
    for network in (plain, fused):
        network.append(nn.Tanh())
        del network[0]
    x = torch.randn(3, 8, 8, 8)
    assert_near(fused(x), plain(x))


def test_whole_network_fused_in_parts_and_twice() -> None:
    torch.manual_seed(0)
    plain = SequentialDiscriminator()
    fused = copy.deepcopy(plain)
    pygan.fuse(fused.main)
    pygan.fuse(fused)
    pygan.fuse(fused)
    x = torch.randn(3, 3, 32, 32)
    assert_near(fused(x), plain(x))
    assert fused(x).shape == (3,)


@both
def test_functional_call(make: Make) -> None:
    plain, fused = (module.eval() for module in pair_of(make))
    doubled = {key: 2 * v.detach() for key, v in plain.named_parameters()}
    expected = torch.func.functional_call(plain, doubled, images())
    assert_near(torch.func.functional_call(fused, doubled, images()), expected)


@both
def test_mapped_over_samples(make: Make) -> None:
    plain, fused = (module.eval() for module in pair_of(make))
    samples = images().unsqueeze(1)
    assert_near(torch.func.vmap(fused)(samples), torch.func.vmap(plain)(samples))


@both
def test_gradients_of_some_parameters_only(make: Make) -> None:
    def run(module: nn.Module, draw: Draw) -> dict[str, Tensor]:
        for key, p in module.named_parameters():
            p.requires_grad_("bias" in key)
        y = module(draw(3, 3, 16, 16))
        (y * draw(*y.shape)).sum().backward()
        first = {f"first{k}": v.clone() for k, v in gradients(module).items()}
        for key, p in module.named_parameters():
            p.requires_grad_("weight" in key)
            p.grad = None
        y = module(draw(3, 3, 16, 16))
        (y * draw(*y.shape)).sum().backward()
        return first | gradients(module)

    assert_agree(make, run)


@both
def test_overwriting_what_backward_needs(make: Make) -> None:
    """Plain torch raises; so does the fused network, or it kept a copy and is right."""
    plain, fused = pair_of(make)
    x = images()
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    outputs = [plain(inputs[0]), plain(inputs[1]), fused(inputs[2])]
    with torch.no_grad():
        inputs[1].mul_(0)
        inputs[2].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[1].square().sum().backward()
    plain.zero_grad()
    outputs[0].square().sum().backward()
    try:
        outputs[2].square().sum().backward()
    except RuntimeError as error:
        assert "in place" in str(error) or "inplace" in str(error)
        return
    assert inputs[0].grad is not None and inputs[2].grad is not None
    assert_near(inputs[2].grad, inputs[0].grad)
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        # A bias before a batch norm has none but rounding.
        if b.grad.norm() > 1e-3:
            assert_near(a.grad, b.grad)
