"""A network as it is against its fused copy: everything that a caller can see of the two.

Outputs, gradients, buffers and gradients of gradients follow the accuracy rule: against the same
network in float64, the fused one may be off by twice what plain torch in float32 is (three times
for gradients of weights), or by the floor. Where that fails, plain torch's error is taken as the
largest one of several orders of summation, those of a shuffled batch: of a tensor with few
elements one order alone may be right by chance. A gradient that is zero in exact arithmetic has
no scale of its own and takes that of all gradients of the network. That of a bias is a sum over
the batch and the map, whose terms may cancel: its scale is at least what as many elements of the
network's gradients have on average.

An activation with a kink makes a gradient jump, and at the kink float32 may take either side. So
inputs are drawn until no activation of the float64 network lies nearer to its kink than
``KINK_DISTANCE`` times the largest error of plain float32 at that place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accuracy import CONVOLUTION_FLOOR, FACTOR, WEIGHT_GRAD_FACTOR
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pygan

Inputs = tuple[Any, ...]
Make = Callable[[], nn.Module]
MakeInput = Callable[[torch.Generator], Inputs]
Faster = Callable[[nn.Module], Any]  # makes a network faster in place

# Twice plain float32's error is allowed, and its largest is known from one run only.
KINK_DISTANCE = 4.0
# A fraction of the network's gradients that only rounding in float64 leaves.
ZERO = 1e-11
TRIES = 200
ORDERS = 4
FLOOR = CONVOLUTION_FLOOR[torch.float32]
KINKED = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.leaky_relu_.default,
    torch.ops.aten.elu.default,
    torch.ops.aten.elu_.default,
    torch.ops.aten.threshold.default,
    torch.ops.aten._prelu_kernel.default,
    torch.ops.aten.abs.default,
    torch.ops.aten.clamp_min.default,
}


class Kinks(TorchDispatchMode):
    """Keeps what every activation with a kink at zero is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in KINKED:
            self.inputs.append(args[0].detach().clone())
        return function(*args, **(kwargs or {}))


def clear_of_kinks(plain: Sequence[Tensor], oracle: Sequence[Tensor]) -> bool:
    """Whether float32 rounding cannot have moved any activation across its kink."""
    assert len(plain) == len(oracle)
    for x, exact in zip(plain, oracle, strict=True):
        error = (x.double() - exact).abs().max()
        # Zero in both, where padding or another activation has made it so, is exact.
        distance = exact.abs()[(exact != 0) | (x != 0)]
        if distance.numel() and distance.min() <= KINK_DISTANCE * error:
            return False
    return True


@dataclass
class Seen:
    """What a caller sees of one network."""

    values: dict[str, Tensor] = field(default_factory=dict)
    # Values that are gradients, by the pass that made them.
    gradients: dict[str, list[str]] = field(default_factory=dict)
    # What has to be equal, not near: types, shapes, strides, names.
    facts: dict[str, object] = field(default_factory=dict)
    # Norms of the terms that a gradient of one dimension is the sum of.
    terms: dict[str, float] = field(default_factory=dict)

    def tensor(self, name: str, value: Tensor) -> None:
        self.values[name] = value.detach().clone()

    def gradient(self, group: str, name: str, value: Tensor) -> None:
        self.tensor(name, value)
        self.gradients.setdefault(group, []).append(name)


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides that mean something."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def facts(x: Tensor) -> tuple[object, ...]:
    return type(x), x.shape, strides(x), x.requires_grad, x.is_leaf, x.layout, x.device


def settle(module: nn.Module) -> nn.Module:
    """Gives norms the statistics and coefficients of a network that has been trained a while."""
    for layer in module.modules():
        if not isinstance(layer, _NormBase):
            continue
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
        if layer.affine:
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.3)
    return module


def build(make: Make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settle(make())


def is_random(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules()) or getattr(
        module, "random", False
    )


def _doubles(inputs: Inputs) -> Inputs:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(double, inputs)


def _leaves(inputs: Inputs) -> Inputs:
    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            # A clone keeps strides only of dense tensors, and these are.
            return x.detach().clone().requires_grad_()
        return x

    return tree_map(leaf, inputs)


def _entered(inputs: Inputs) -> Inputs:
    """As the networks' inputs come from other layers: not leaves, and free to be overwritten."""
    return tree_map(lambda x: x * 1 if isinstance(x, Tensor) and x.requires_grad else x, inputs)


def outputs_of(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [y for y in tree_leaves(module(*inputs)) if isinstance(y, Tensor)]


def _objective(outputs: list[Tensor], order: Tensor | None) -> Tensor:
    total = 0
    for i, y in enumerate(outputs):
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(i))
        weights = weights.to(y)
        total = total + (y * (weights if order is None else weights[order])).sum()
    assert isinstance(total, Tensor)
    return total


class Terms:
    """Keeps the norms of the gradients that arrive at layers with a bias."""

    def __init__(self, module: nn.Module) -> None:
        self.squares: dict[str, float] = {}
        for name, layer in module.named_modules():
            keys = [k for k, p in layer.named_parameters(name, recurse=False) if p.dim() == 1]
            if keys:
                layer.register_forward_hook(partial(self._watch, keys))

    def _watch(self, keys: list[str], layer: nn.Module, args: object, output: Tensor) -> None:
        def keep(gradient: Tensor) -> None:
            for key in keys:
                self.squares[key] = self.squares.get(key, 0) + _norm(gradient) ** 2

        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(keep)

    def of_pass(self, name: str) -> dict[str, float]:
        norms = {f"{name} grad {key}": square**0.5 for key, square in self.squares.items()}
        self.squares.clear()
        return norms


class Observer:
    """Runs one network through every pass, from the same state and random numbers each time."""

    def __init__(self, module: nn.Module, seed: int, terms: bool = False) -> None:
        self.module, self.seed = module, seed
        self.terms = Terms(module) if terms else None
        self.state = copy.deepcopy(module.state_dict())

    def __call__(self, inputs: Inputs, *, penalty: bool, order: Tensor | None = None) -> Seen:
        """With ``order`` the samples go in shuffled, and what comes out is put back in order."""
        seen = Seen()
        self.order = order
        if order is not None:
            inputs = tree_map(lambda x: x[order] if isinstance(x, Tensor) else x, inputs)
        self._training(seen, inputs)
        self._again(seen, inputs)
        self._evaluation(seen, inputs)
        if penalty:
            self._penalty(seen, inputs)
        self.module.load_state_dict(self.state)
        return seen

    def activated(self, inputs: Inputs) -> list[Tensor]:
        """What the activations with a kink are given in training and in evaluation mode."""
        self.module.load_state_dict(self.state)
        kinks = Kinks()
        with torch.no_grad():
            for training in (True, True, False):
                self._start(training=training)
                with kinks:
                    self.module(*_entered(_leaves(inputs)))
        return kinks.inputs

    def _in_order(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self.order.argsort()]

    def _start(self, *, training: bool) -> None:
        torch.manual_seed(self.seed)
        self.module.train(training)
        for p in self.module.parameters():
            p.grad = None

    def _seen_outputs(self, seen: Seen, name: str, outputs: list[Tensor]) -> None:
        for i, y in enumerate(outputs):
            seen.facts[f"{name} output {i}"] = facts(y)
            seen.tensor(f"{name} output {i}", self._in_order(y))

    def _buffers(self, seen: Seen, name: str) -> None:
        for key, b in self.module.named_buffers():
            seen.tensor(f"{name} buffer {key}", b)
        seen.facts[f"{name} buffers"] = [
            (key, type(b), b.shape) for key, b in self.module.named_buffers()
        ]

    def _gradients(self, seen: Seen, name: str, inputs: Inputs) -> None:
        if self.terms is not None:
            seen.terms |= self.terms.of_pass(name)
        for i, x in enumerate(tree_leaves(inputs)):
            if isinstance(x, Tensor) and x.requires_grad:
                grad = torch.zeros_like(x) if x.grad is None else x.grad
                seen.gradient(name, f"{name} input {i}", self._in_order(grad))
        for key, p in self.module.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                seen.gradient(name, f"{name} grad {key}", grad)

    def _training(self, seen: Seen, inputs: Inputs) -> None:
        self.module.load_state_dict(self.state)
        self._start(training=True)
        leaves = _leaves(inputs)
        entered = _entered(leaves)
        outputs = outputs_of(self.module, entered)
        self._seen_outputs(seen, "training", outputs)
        self._buffers(seen, "training")
        # An in-place layer changes what it is given, and others may read that.
        for i, x in enumerate(tree_leaves(entered)):
            if isinstance(x, Tensor):
                seen.tensor(f"training input {i} afterwards", self._in_order(x))
        _objective(outputs, self.order).backward()
        self._gradients(seen, "training", leaves)
        seen.facts["without a gradient"] = [
            key for key, p in self.module.named_parameters() if p.grad is None
        ]
        if self.order is None:
            seen.facts["random numbers"] = hash(bytes(torch.get_rng_state().tolist()))

    def _again(self, seen: Seen, inputs: Inputs) -> None:
        """A second forward in training mode, as the discriminator's on fake images."""
        self._start(training=True)
        with torch.no_grad():
            self._seen_outputs(seen, "second", outputs_of(self.module, _entered(_leaves(inputs))))
        self._buffers(seen, "second")

    def _evaluation(self, seen: Seen, inputs: Inputs) -> None:
        self._start(training=False)
        leaves = _leaves(inputs)
        outputs = outputs_of(self.module, _entered(leaves))
        self._seen_outputs(seen, "evaluation", outputs)
        _objective(outputs, self.order).backward()
        self._gradients(seen, "evaluation", leaves)
        self._buffers(seen, "evaluation")

    def _penalty(self, seen: Seen, inputs: Inputs) -> None:
        """Gradients of a gradient penalty, through everything it depends on."""
        self.module.load_state_dict(self.state)
        self._start(training=True)
        leaves = _leaves(inputs)
        outputs = outputs_of(self.module, _entered(leaves))
        xs = [x for x in tree_leaves(leaves) if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(
            _objective(outputs, self.order), xs, create_graph=True, allow_unused=True
        )
        norms = [(g.flatten(1).norm(2, dim=1) - 1).square().mean() for g in grads if g is not None]
        total = torch.stack(norms).sum()
        if total.requires_grad:
            total.backward()
        seen.tensor("penalty", total)
        self._gradients(seen, "penalty", leaves)


def _norm(x: Tensor) -> float:
    return x.double().norm().item()


def _scales(oracle: Seen) -> dict[str, float]:
    """What each value's error is measured by."""
    scales = {name: _norm(value) for name, value in oracle.values.items()}
    for names in oracle.gradients.values():
        whole = sum(scales[name] ** 2 for name in names) ** 0.5
        elements = sum(oracle.values[name].numel() for name in names)
        for name in names:
            value = oracle.values[name]
            if scales[name] <= ZERO * whole:
                scales[name] = whole
            elif value.dim() <= 1:
                average = whole * (value.numel() / elements) ** 0.5
                scales[name] = max(scales[name], oracle.terms.get(name, average))
    return scales


def _factor(name: str, value: Tensor) -> float:
    return WEIGHT_GRAD_FACTOR if " grad " in name and value.dim() > 1 else FACTOR


def assert_equal_facts(fused: Seen, plain: Seen) -> None:
    for name, fact in plain.facts.items():
        assert fused.facts[name] == fact, f"{name}: {fused.facts[name]}, not {fact}"
    assert fused.values.keys() == plain.values.keys()


def inaccurate(fused: Seen, plains: Sequence[Seen], oracle: Seen) -> list[str]:
    """The values that break the accuracy rule, each with its error."""
    plain = plains[0]
    scales = _scales(oracle)
    wrong = []
    for name, exact in oracle.values.items():
        value = fused.values[name]
        assert value.shape == exact.shape, f"{name}: shape {value.shape}, not {exact.shape}"
        assert value.dtype == plain.values[name].dtype, f"{name}: {value.dtype}"
        if not exact.is_floating_point():
            assert torch.equal(value, plain.values[name]), f"{name}: not equal"
            continue
        scale = scales[name] or 1.0
        if not torch.isfinite(value).all():
            wrong.append(f"{name}: not finite")
            continue
        allowed = max(_norm(p.values[name].double() - exact) for p in plains) / scale
        error = _norm(value.double() - exact) / scale
        limit = max(_factor(name, value) * allowed, FLOOR)
        if error > limit:
            wrong.append(f"{name}: relative error {error:.2e}, allowed {limit:.2e}")
    return wrong


def shuffles(inputs: Inputs) -> list[Tensor]:
    batch = next(len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor))
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(batch, generator=generator) for _ in range(ORDERS)]


def find_inputs(make_input: MakeInput, plain: Observer, oracle: Observer) -> Inputs:
    """The first inputs drawn that keep clear of every kink."""
    for attempt in range(TRIES):
        inputs = make_input(torch.Generator().manual_seed(attempt))
        if clear_of_kinks(plain.activated(inputs), oracle.activated(_doubles(inputs))):
            return inputs
    raise AssertionError(f"no input of {TRIES} keeps clear of every kink")


def assert_same(
    make: Make,
    make_input: MakeInput,
    *,
    penalty: bool = True,
    seed: int = 0,
    faster: Faster = pygan.fuse,
    runs: int = 1,
) -> None:
    """That ``faster`` changes nothing of ``make()`` but its speed, in each of some ``runs``.

    ``make_input`` draws the arguments of a call from a generator; those that are floating point
    get gradients, and the first dimension of all is the batch.
    """
    module, exact, fused = (build(make, seed) for _ in range(3))
    names = {key: (v.shape, v.dtype) for key, v in module.state_dict().items()}
    faster(fused)
    assert {key: (v.shape, v.dtype) for key, v in fused.state_dict().items()} == names
    # Goes into one network and comes out of the other unchanged.
    fused.load_state_dict(copy.deepcopy(module.state_dict()))
    plain, oracle = Observer(module, seed), Observer(exact.double(), seed, terms=True)
    inputs = find_inputs(make_input, plain, oracle)
    first, truth = plain(inputs, penalty=penalty), oracle(_doubles(inputs), penalty=penalty)
    observer = Observer(fused, seed)
    shuffled: list[Seen] = []
    for _ in range(runs):
        seen = observer(inputs, penalty=penalty)
        assert_equal_facts(seen, first)
        wrong = inaccurate(seen, [first, *shuffled], truth)
        if wrong and not shuffled and not is_random(module):
            orders = shuffles(inputs)
            shuffled = [plain(inputs, penalty=penalty, order=order) for order in orders]
            wrong = inaccurate(seen, [first, *shuffled], truth)
        assert not wrong, "\n".join(wrong)


class Draw:
    """Random tensors of a network's type, the same numbers in every type."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


Run = Callable[[nn.Module, Draw], dict[str, Tensor]]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """For a :data:`Run` to return."""
    return {f" grad {k}": p.grad for k, p in module.named_parameters() if p.grad is not None}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {f"buffer {k}": b for k, b in module.named_buffers()}


def assert_agree(make: Make, run: Run, faster: Faster = pygan.fuse, runs: int = 1) -> None:
    """That ``run`` of the fused network gives what it gives of the plain one.

    The accuracy rule applies to every tensor that ``run`` returns; it may do anything with the
    network, and draws its inputs so that activations keep clear of their kinks.
    """

    def seen(module: nn.Module, seed: int, dtype: torch.dtype) -> Seen:
        torch.manual_seed(seed)
        values = run(module.to(dtype), Draw(seed, dtype))
        result = Seen({k: v.detach().clone() for k, v in values.items()})
        result.gradients["run"] = [k for k in values if " grad " in k]
        return result

    for seed in range(TRIES):
        near, at = Kinks(), Kinks()
        with near:
            plain = seen(build(make), seed, torch.float32)
        with at:
            oracle = seen(build(make), seed, torch.float64)
        if clear_of_kinks(near.inputs, at.inputs):
            break
    else:
        raise AssertionError(f"no inputs of {TRIES} keep clear of every kink")
    # Hooks that a run leaves behind are no state: the next run of a fused network is of another
    # one, and what was found out in one decides how the layers of the other hand on.
    modules = [build(make) for _ in range(2 if faster is pygan.fuse else 1)]
    for module in modules:
        faster(module)
    state = copy.deepcopy(modules[0].state_dict())
    for module in modules:
        for _ in range(runs):
            module.load_state_dict(state)
            module.zero_grad()
            fused = seen(module, seed, torch.float32)
            assert_equal_facts(fused, plain)
            wrong = inaccurate(fused, [plain], oracle)
            assert not wrong, "\n".join(wrong)
        for found, other in zip(module.modules(), modules[-1].modules(), strict=True):
            vars(other).update({k: v for k, v in vars(found).items() if k == "_readers"})


def pair_of(make: Make, faster: Faster = pygan.fuse) -> tuple[nn.Module, nn.Module]:
    """The plain and the fused network of the same weights."""
    plain, fused = build(make), build(make)
    faster(fused)
    return plain, fused


def assert_near(a: Tensor, b: Tensor) -> None:
    """Both within the floor of the same truth."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).double().norm() <= 2 * FLOOR * b.double().norm()
