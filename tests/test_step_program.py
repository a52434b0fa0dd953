"""Training steps on a CPU by programs: the numbers of eager steps, bit for bit, in every mode."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_step_graph import (
    BATCH,
    NZ,
    SIZE,
    Counting,
    Drawing,
    Hooked,
    batch,
    evaluate,
    everything,
    freeze,
    load_networks,
    load_optimizer,
    lower_rates,
    require_equal,
    require_equal_tensors,
    reseed,
    weigh,
)
from torch import Tensor, nn

import pygan
from pygan.pending import is_little
from pygan.repeated_step import KEPT
from pygan.step_program import WARM_UP, ProgrammedStep

STEPS = 9


pytestmark = pytest.mark.usefixtures("one_thread")  # the networks are too small for more


Optimizer = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 2e-4, betas=(0.5, 0.999), fused=True, **more)


def make(
    graph: str,
    *,
    last: nn.Module | None = None,
    optimizer: Optimizer = adam,
    width: int = 8,
    fused: bool = True,
    average: bool = False,
    **settings: Any,
) -> pygan.AdversarialStep:
    torch.manual_seed(0)
    G, D = pygan.models.dcgan(SIZE, 1, nz=NZ, ngf=width, ndf=width)
    if last is not None:
        D.main.append(last)
    for network in (G, D):
        network.to(memory_format=torch.channels_last)
        if fused:
            pygan.fuse(network)
    settings = {"amp": "off", "generator": torch.Generator().manual_seed(3), **settings}
    ema = pygan.Ema(G, 0.9) if average else None
    optimizers = [optimizer(m.parameters()) for m in (G, D)]
    return pygan.AdversarialStep(G, D, *optimizers, graph=graph, ema=ema, **settings)


def pair(**settings: Any) -> tuple[pygan.AdversarialStep, pygan.AdversarialStep]:
    """An eager step, and one by programs of the same networks."""
    last = settings.pop("last", None)
    graph = settings.pop("graph", "auto")
    eager, programmed = (
        make(g, last=None if last is None else last(), **settings) for g in ("off", graph)
    )
    return eager, programmed


def programs(step: pygan.AdversarialStep) -> ProgrammedStep:
    assert isinstance(step._graphed, ProgrammedStep)
    return step._graphed


def require_same_steps(
    eager: pygan.AdversarialStep,
    programmed: pygan.AdversarialStep,
    steps: int = STEPS,
    between: Callable[[pygan.AdversarialStep, int], None] = lambda step, i: None,
    size: Callable[[int], int] = lambda i: BATCH,
) -> None:
    found = []
    for step in (eager, programmed):
        step.totals = torch.zeros(5)
        kept = []
        torch.manual_seed(5)
        random.seed(6)
        for i in range(steps):
            between(step, i)
            real, z = batch(i, size(i))
            kept.append(step(real, z if i % 2 else None))
        found.append(torch.stack([torch.stack(result) for result in kept]))
        torch.testing.assert_close(step.totals, found[-1].sum(0))
        # No step writes over what an earlier one gave.
        assert len({value.data_ptr() for result in kept for value in result}) == 5 * steps
    assert torch.equal(*found)
    require_equal_states(eager, programmed)
    assert torch.equal(eager.generator.get_state(), programmed.generator.get_state())


def require_equal_states(one: pygan.AdversarialStep, other: pygan.AdversarialStep) -> None:
    if one.ema is not None and other.ema is not None:
        require_equal_tensors(one.ema.network.state_dict(), other.ema.network.state_dict())
        assert torch.equal(one.ema.updates, other.ema.updates)
        require_equal_tensors(everything(one), everything(other))
    else:
        require_equal(one, other)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-3, momentum=0.9)


def fused_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-3, momentum=0.9, fused=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 2e-4, fused=True)


TRICKS = (
    pygan.Tricks(noise=0.1),
    pygan.Tricks(flip_labels=0.2),
    pygan.Tricks(augment=("color", "translation", "cutout")),
    pygan.Tricks(r1=1.0, r1_every=1),
    pygan.Tricks(gradient_penalty=1.0),
    pygan.Tricks(clip_grad=0.5),
)
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"amp": "bf16"},
    "wide": {"width": 64},
    "wide, bfloat16": {"amp": "bf16", "width": 64},
    "not fused": {"fused": False},
    "D called twice": {"merge": False},
    "average": {"average": True},
    "label smoothing": {"real_target": 0.9},
    **{
        loss: {"loss": loss}
        for loss in ("minimax", "logistic", "hinge", "lsgan", "wasserstein", "relativistic")
    },
    **{f"tricks {i}": {"tricks": tricks} for i, tricks in enumerate(TRICKS)},
    **{each.__name__: {"optimizer": each} for each in (sgd, fused_sgd, adamw)},
}


@pytest.mark.parametrize("way", WAYS)
def test_programs_make_the_numbers_of_eager_steps(way: str) -> None:
    eager, programmed = pair(**WAYS[way])
    require_same_steps(eager, programmed)
    graphed = programs(programmed)
    assert graphed.reason is None
    # z is drawn in every second step, which is a kind of step of its own.
    assert graphed._repeats == STEPS - 2 * WARM_UP and graphed._made == 2


@pytest.mark.parametrize(
    "tricks",
    [
        pygan.Tricks(n_critic=3),
        pygan.Tricks(r1=1.0, r1_every=4),
        pygan.Tricks(n_critic=2, r1=1.0, r1_every=3, clip_grad=0.5, flip_labels=0.1),
    ],
    ids=["n_critic", "lazy R1", "both"],
)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_steps_by_turns_have_a_program_each(tricks: pygan.Tricks, amp: str) -> None:
    eager, programmed = pair(tricks=tricks, average=True, amp=amp)

    def between(step: pygan.AdversarialStep, i: int) -> None:
        if i == 20:
            step.load_state_dict(copy.deepcopy(step.state_dict()))

    require_same_steps(eager, programmed, 50, between)
    graphed = programs(programmed)
    assert graphed.reason is None
    kinds = {(i % 2, *tricks.turn(i)) for i in range(50)}  # with z and without
    assert graphed._made == len(graphed._entries) == len(kinds) > 2
    assert graphed._repeats == 50 - WARM_UP * len(kinds)


@pytest.mark.parametrize("way", ["uint8", "gathered", "flipped"])
def test_images_of_a_set(way: str) -> None:
    images = torch.randint(0, 256, (30, SIZE, SIZE, 1), dtype=torch.uint8)
    results = []
    eager, programmed = pair()
    for step in (eager, programmed):
        for i in range(STEPS):
            index = torch.arange(i, i + BATCH)
            if way == "uint8":
                result = step(images[index].permute(0, 3, 1, 2))
            else:
                flip = index % 3 == 0 if way == "flipped" else None
                result = step.gathered(images, index, flip=flip)
        results.append(torch.stack(result))
    assert torch.equal(*results)
    require_equal(eager, programmed)
    assert programs(programmed)._repeats == STEPS - WARM_UP
    many = torch.arange(3)[:, None] + torch.arange(BATCH)
    ours, theirs = (step.several(images, many) for step in (eager, programmed))
    assert [*map(tuple, ours)] == [*map(tuple, theirs)]
    with pytest.raises(pygan.UserError, match="index runs from"):
        for _ in range(WARM_UP + 1):
            programmed.gathered(images, torch.full((BATCH,), 30))


def test_layouts_and_places_of_the_images() -> None:
    """A slice of a larger tensor, somewhere else every time, and other strides."""
    eager, programmed = pair()
    data = torch.rand(60, 1, SIZE, SIZE)
    wide = torch.rand(60, 1, SIZE, 2 * SIZE)
    for step in (eager, programmed):
        for i in range(12):
            real = data[i : i + BATCH] if i % 3 else wide[i : i + BATCH, :, :, ::2]
            step(real, torch.full((BATCH, NZ, 1, 1), 0.1 * i))
    require_equal(eager, programmed)
    assert programs(programmed)._made == 2


def test_shapes_have_programs_of_their_own_and_few_are_kept() -> None:
    sizes = [size for size in range(2, 3 + KEPT) for _ in range(WARM_UP + 1)] + [2] * 4 + [6]
    eager, programmed = pair()
    for i, size in enumerate(sizes):
        real, z = batch(i, size)
        assert torch.equal(torch.stack(eager(real, z)), torch.stack(programmed(real, z)))
    require_equal(eager, programmed)
    graphed = programs(programmed)
    assert len(graphed._entries) == KEPT and graphed._made == KEPT + 2


def _data(step: pygan.AdversarialStep) -> None:
    weight = step.G.main[0].weight
    weight.data = weight.data * 0.5


def _edit(step: pygan.AdversarialStep) -> None:
    step.G.main[0].weight.data.mul_(0.5)


def _reset(step: pygan.AdversarialStep) -> None:
    step.totals = step.totals.clone()


def _thread(step: pygan.AdversarialStep) -> None:
    torch.set_num_threads(2)


def _hook(step: pygan.AdversarialStep) -> None:
    step.D.main[0].register_forward_hook(lambda module, args, out: out * 2)


def _hook_of_a_gradient(step: pygan.AdversarialStep) -> None:
    step.D.main[0].weight.register_hook(lambda grad: grad * 2)


def _slope(step: pygan.AdversarialStep) -> None:
    step.D.main[1].negative_slope = 0.5


def _momentum(step: pygan.AdversarialStep) -> None:
    step.G.main[1].momentum = 0.3


def _exchange(step: pygan.AdversarialStep) -> None:
    """Not seen, as after a graph; the step is told."""
    step.D.main[1] = nn.ReLU()
    step.recapture()


CHANGES = (
    *(lower_rates, load_optimizer, load_networks, _data, _edit, evaluate, freeze, weigh),
    *(reseed, _reset, _thread, _hook, _hook_of_a_gradient, _slope, _momentum, _exchange),
)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect(change: Callable[[pygan.AdversarialStep], None]) -> None:
    eager, programmed = pair()

    def between(step: pygan.AdversarialStep, i: int) -> None:
        if i == 0:
            torch.set_num_threads(1)
        if i == 10:
            change(step)

    require_same_steps(eager, programmed, 22, between)
    assert programs(programmed)._repeats >= 4


def test_noise_may_change_between_steps() -> None:
    eager, programmed = pair(tricks=pygan.Tricks(noise=0.1))

    def between(step: pygan.AdversarialStep, i: int) -> None:
        step.noise = 0.1 / (1 + i)

    require_same_steps(eager, programmed, between=between)
    assert programs(programmed)._made == 2


def test_gradients_that_somebody_keeps_stay() -> None:
    _, programmed = pair()
    kept = []
    for i in range(STEPS):
        programmed(*batch(i))
        grads = [p.grad for p in programmed.D.parameters()]
        kept.append((grads, [grad.clone() for grad in grads]))
    for grads, before in kept:
        assert all(map(torch.equal, grads, before))


def test_what_others_do_between_steps_is_theirs() -> None:
    """Maps of another use of the networks stay while steps are made."""
    eager, programmed = pair(width=64)
    z = torch.randn(256, NZ, 1, 1)
    shown = []
    for i in range(STEPS):
        eager(*batch(i))
        programmed(*batch(i))
        with torch.no_grad():
            images = eager.G(z)
            assert torch.equal(images, programmed.G(z))
        shown.append((images, images.clone()))
    require_equal(eager, programmed)
    assert all(torch.equal(*each) for each in shown)


class Reading(nn.Module):
    """Reads a value back, by which a later step may do something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().sum()) > 0 else x


class ByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().sum() > 0)


class Scaled(nn.Module):
    """Code of the user's that may be repeated."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.tensor([0.5]).mul_(2) + torch.rand_like(x)
        return F.leaky_relu(x, 0.3) * noise


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (Counting, "calls went from"),
        (Reading, "_local_scalar_dense.* reads a value back"),
        (ByNumpy, r"numpy\(\) reads a tensor where"),
        (Drawing, "random numbers of the CPU"),
        (Hooked, r"\(Hooked\) has a hook"),
    ],
)
def test_what_cannot_be_repeated_stays_eager(
    last: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    eager, programmed = pair(last=last, merge=False)
    required = make("on", last=last(), merge=False)
    with caplog.at_level(logging.INFO, "pygan"):
        require_same_steps(eager, programmed)
    assert programs(programmed)._made == 0
    said = [r for r in caplog.records if "runs without a program" in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.INFO
    with pytest.raises(pygan.UserError, match=f"graph is 'on' and .* because .*{reason}"):
        for i in range(WARM_UP + 1):
            required(*batch(i))


def test_a_step_that_is_refused_while_it_is_recorded_is_whole() -> None:
    eager, required = pair(last=Reading, merge=False, graph="on")
    for i in range(WARM_UP):
        eager(*batch(i))
        if i < WARM_UP - 1:
            required(*batch(i))
    with pytest.raises(pygan.UserError, match="because"):
        required(*batch(WARM_UP - 1))
    require_equal(eager, required)


def test_code_of_the_users_is_repeated_where_that_is_asked_for() -> None:
    eager, programmed = pair(last=Scaled, merge=False, graph="on")
    require_same_steps(eager, programmed)
    assert programs(programmed)._made == 2
    assert programs(make("auto", last=Scaled(), merge=False)).reason is None


def test_a_watched_step_is_eager() -> None:
    eager, programmed = pair()
    for step in (eager, programmed):
        for i in range(WARM_UP + 2):
            step(*batch(i))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x * 1, lambda x: x):
            step(*batch(20))
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            step(*batch(21))
    require_equal(eager, programmed)
    assert programs(programmed)._repeats == 2


def test_a_step_that_raises_is_none_of_the_warm_up() -> None:
    eager, programmed = pair(last=Scaled, merge=False, graph="on")
    for step in (eager, programmed):
        torch.manual_seed(5)
        for i in range(8):
            if i == WARM_UP - 1:  # that one would be recorded
                with pytest.raises(RuntimeError), torch.utils._device.DeviceContext("meta"):
                    step(*batch(i))
            step(*batch(i))
    require_equal(eager, programmed)


@pytest.mark.native
def test_no_kernel_runs_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step is recorded, every call of the extension is within a function that is."""
    from pygan.ops import native, recorded

    module = native.load()
    assert module is not None
    unseen, seen = [], []

    def watch(name: str) -> Callable[..., Any]:
        original = getattr(module, name)

        def called(*args: Any) -> Any:
            (seen if recorded.now.recorder is None else unseen).append(name)
            return original(*args)

        return called

    effects = [n for n in dir(module) if n.startswith(("norm_act", "strided_conv", "gan_loss"))]
    effects = [n for n in effects if not n.endswith(("_scratch", "_method"))]
    for name in effects:
        monkeypatch.setattr(module, name, watch(name))
    tricks = pygan.Tricks(r1=1.0, r1_every=1)
    programmed = make("on", width=64, tricks=tricks)
    real = torch.randn(32, 1, SIZE, SIZE)
    assert not is_little(torch.empty(32, 64, SIZE // 2, SIZE // 2))
    for _ in range(WARM_UP + 1):
        programmed(real)
    assert programs(programmed)._repeats == 1
    assert not unseen and {"norm_act_second", "strided_conv_up"} <= set(seen)
