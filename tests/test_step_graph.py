"""Training steps by graphs: on a CPU by a stand-in that executes a step again at every replay, on a
GPU by CUDA's own."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pygan
from pygan import cuda_graph
from pygan.capturable import line_of
from pygan.cuda_graph import CaptureError
from pygan.pace import SAMPLE, SAMPLES, SIZES, Pace
from pygan.repeated_step import KEPT
from pygan.step_graph import WARM_UP, GraphedStep

SIZE, BATCH, NZ = 16, 8, 12
STEPS = 20


pytestmark = pytest.mark.usefixtures("one_thread")  # the networks are too small for more


class Replay:
    """A step that is executed again, with the hyperparameters that it was captured with."""

    def __init__(
        self, run: Callable[[], Tensor], shape: torch.Size, optimizers: Sequence[Any]
    ) -> None:
        self.run, self.optimizers = run, optimizers
        groups = [g for o in optimizers for g in o.param_groups]
        self.grads = [(p, p.grad) for g in groups for p in g["params"] if p.grad is not None]
        self.groups = [self.hyperparameters(o) for o in optimizers]
        self.out = torch.full(shape, float("nan"))
        self.closed, self.done = False, 0

    @staticmethod
    def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    def _set(self, values: Sequence[list[dict[str, Any]]]) -> None:
        for optimizer, groups in zip(self.optimizers, values, strict=True):
            for group, value in zip(optimizer.param_groups, groups, strict=True):
                group.update(value)

    def replay(self) -> Tensor:
        assert not self.closed
        self.done += 1
        now = [self.hyperparameters(o) for o in self.optimizers]
        shown = [(p, p.grad) for o in self.optimizers for g in o.param_groups for p in g["params"]]
        self._set(self.groups)
        self.out.copy_(self.run())
        self._set(now)
        # A graph writes where it wrote while it was captured, and sets no attributes.
        for parameter, grad in self.grads:
            grad.copy_(parameter.grad)
        for parameter, before in shown:
            parameter.grad = before
        return self.out

    def close(self) -> None:
        self.closed = True


class StandIn:
    """Captures as CUDA does: Python runs once, and no tensor gets another value."""

    def __init__(self, step: pygan.AdversarialStep) -> None:
        self.step, self.replays = step, list[Replay]()
        self.capturing = False
        self.times: dict[int, float] = {}  # of samples, by the steps a replay; others are slow
        self.choices: dict[str, str] = {}
        self.samples: list[int] = []
        step._graphed = GraphedStep(step, self, required=step.graph == "on")

    def is_capturing(self) -> bool:
        return False

    def join(self) -> None:
        pass

    def warm_up(self, run: Callable[[], Any], *, watch: bool) -> tuple[Any, str | None]:
        return run(), None

    def clock(self, run: Callable[[], Any]) -> float:
        before = [r.done for r in self.replays]
        run()
        # By the replays that served a sample.
        made = sum(r.done for r in self.replays) - sum(before)
        self.samples.append(SAMPLE // made)
        return self.times.get(self.samples[-1], 9.0)

    def known(self, key: str, candidates: Sequence[str]) -> str | None:
        return self.choices.get(key)

    def keep(self, key: str, choice: str) -> None:
        self.choices[key] = choice

    def _tensors(self) -> list[Tensor]:
        step = self.step
        found = [*step.G.state_dict().values(), *step.D.state_dict().values(), *step._of_g]
        if step.ema is not None:
            found += [*step.ema.network.state_dict().values(), step.ema.updates]
        for optimizer in (step.opt_g, step.opt_d):
            found += [v for s in optimizer.state.values() for v in s.values()]
        for scaler in (step._scaler_g, step._scaler_d):
            found += [scaler._scale, scaler._growth_tracker] if scaler.is_enabled() else []
        return found + ([] if step.totals is None else [step.totals])

    def capture(self, run: Callable[[], Tensor], generators: Sequence[torch.Generator]) -> Replay:
        before = [(t, t.clone()) for t in self._tensors()]
        states = [g.get_state() for g in generators]
        self.capturing = True
        try:
            shape = run().shape
        except Exception as error:
            raise CaptureError(f"{error}, at {line_of(error)}") from error
        finally:
            self.capturing = False
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
        self.replays.append(Replay(run, shape, (self.step.opt_g, self.step.opt_d)))
        return self.replays[-1]


def make(
    device: str = "cpu",
    *,
    amp: str = "off",
    lr: Any = 2e-4,
    last: nn.Module | None = None,
    **more: Any,
) -> pygan.AdversarialStep:
    torch.manual_seed(0)
    G, D = pygan.models.dcgan(SIZE, 1, nz=NZ, ngf=8, ndf=8)
    if last is not None:
        D.main.append(last)
    G, D = G.to(device), D.to(device)
    adam = [
        torch.optim.Adam(m.parameters(), lr, betas=(0.5, 0.999), fused=True, capturable=True)
        for m in (G, D)
    ]
    for optimizer in adam:
        # Not asked for on a CPU, where torch takes it for a mistake.
        optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
    generator = torch.Generator(device).manual_seed(3)
    return pygan.AdversarialStep(G, D, *adam, amp=amp, generator=generator, **more)


def pair(**settings: Any) -> tuple[pygan.AdversarialStep, pygan.AdversarialStep, StandIn]:
    """An eager step, a captured one of the same networks, and what captures it."""
    last = settings.pop("last", None)
    eager = make(last=None if last is None else last(), graph="off", **settings)
    graphed = make(last=None if last is None else last(), **settings)
    return eager, graphed, StandIn(graphed)


def batch(step: int, size: int = BATCH, device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    real = torch.rand((size, 1, SIZE, SIZE), generator=g) * 2 - 1
    return real.to(device), torch.randn((size, NZ, 1, 1), generator=g).to(device)


def everything(step: pygan.AdversarialStep) -> dict[str, Tensor]:
    found = {f"G.{k}": v for k, v in step.G.state_dict().items()}
    found |= {f"D.{k}": v for k, v in step.D.state_dict().items()}
    for name, optimizer in (("g", step.opt_g), ("d", step.opt_d)):
        for i, state in optimizer.state_dict()["state"].items():
            found |= {f"opt_{name}.{i}.{k}": v for k, v in state.items()}
    for name, network in (("G", step.G), ("D", step.D)):
        grads = ((k, p.grad) for k, p in network.named_parameters())
        found |= {f"{name}.{k}.grad": grad for k, grad in grads if grad is not None}
    return found


def require_equal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [k for k in ours if not torch.equal(ours[k], theirs[k])]


def require_equal(one: pygan.AdversarialStep, other: pygan.AdversarialStep) -> None:
    require_equal_tensors(everything(one), everything(other))
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("way", ["given", "drawn", "gathered", "bfloat16", "float16"])
def test_replays_are_eager_steps_bit_for_bit(way: str) -> None:
    amp = {"bfloat16": "bf16", "float16": "fp16"}.get(way, "off")
    eager, graphed, graphs = pair(amp=amp)
    images = torch.randint(0, 256, (30, SIZE, SIZE, 1), dtype=torch.uint8)
    results = []
    for step in (eager, graphed):
        step.totals = torch.zeros(5)
        kept = []
        for i in range(STEPS):
            real, z = batch(i)
            if way == "gathered":
                index = torch.arange(i, i + BATCH)
                kept.append(step.gathered(images, index, flip=index % 3 == 0))
            else:
                kept.append(step(real, None if way == "drawn" else z))
        results.append(torch.stack([torch.stack(result) for result in kept]))
        torch.testing.assert_close(step.totals, results[-1].sum(0))
        out = {value.data_ptr() for result in kept for value in result}
        assert len(out) == 5 * STEPS
    # Kept until now: no replay wrote over what an earlier step gave.
    assert torch.equal(*results)
    require_equal(eager, graphed)
    assert len(graphs.replays) == 1
    assert torch.equal(eager.generator.get_state(), graphed.generator.get_state())


def test_shapes_have_graphs_of_their_own_and_few_are_kept() -> None:
    eager, graphed, graphs = pair()
    sizes = [size for size in range(2, 2 + KEPT) for _ in range(WARM_UP + 1)]
    # The first was used last of these, so that the second goes when one comes that is new.
    sizes += [2, *[9] * (WARM_UP + 1), 2, 4]
    for i, size in enumerate(sizes):
        real, z = batch(i, size)
        assert torch.equal(torch.stack(eager(real, z)), torch.stack(graphed(real, z)))
    require_equal(eager, graphed)
    assert [r.closed for r in graphs.replays] == [False, True, False, False, False]
    assert len(graphs.replays) == KEPT + 1


def lower_rates(step: pygan.AdversarialStep) -> None:
    for optimizer in (step.opt_g, step.opt_d):
        optimizer.param_groups[0]["lr"] *= 0.1


def _fill_rates(step: pygan.AdversarialStep) -> None:
    step.opt_d.param_groups[0]["lr"].mul_(0.1)


def load_optimizer(step: pygan.AdversarialStep) -> None:
    state = copy.deepcopy(step.opt_d.state_dict())
    for values in state["state"].values():
        values["exp_avg"].mul_(-2)
    step.opt_d.load_state_dict(state)


def load_networks(step: pygan.AdversarialStep) -> None:
    step.G.load_state_dict({k: v * 0.5 for k, v in step.G.state_dict().items()})


def evaluate(step: pygan.AdversarialStep) -> None:
    step.G.eval()


def freeze(step: pygan.AdversarialStep) -> None:
    step.D.main[0].weight.requires_grad_(False)


def weigh(step: pygan.AdversarialStep) -> None:
    step.loss_weight = 0.5


def reseed(step: pygan.AdversarialStep) -> None:
    assert step.generator is not None
    step.generator.manual_seed(99)


@pytest.mark.parametrize(
    ("change", "captures"),
    [
        (lower_rates, 2),
        (_fill_rates, 2),
        (load_optimizer, 2),
        (load_networks, 1),
        (evaluate, 2),
        (freeze, 2),
        (weigh, 2),
        (reseed, 1),
    ],
)
def test_changes_after_the_capture_take_effect(
    change: Callable[[pygan.AdversarialStep], None], captures: int
) -> None:
    rates = [torch.tensor(2e-4), torch.tensor(2e-4)] if change is _fill_rates else [2e-4, 2e-4]
    eager, graphed = (make(lr=lr) for lr in rates)
    graphs = StandIn(graphed)
    for i in range(14):
        if i == 6:
            for step in (eager, graphed):
                change(step)
        real, _ = batch(i)
        assert torch.equal(torch.stack(eager(real)), torch.stack(graphed(real))), i
    require_equal(eager, graphed)
    assert len(graphs.replays) == captures


def test_modes_that_come_back_are_not_captured_again() -> None:
    eager, graphed, graphs = pair()
    for i in range(24):
        for step in (eager, graphed):
            step.G.train(i // 6 % 2 == 0)
        assert torch.equal(torch.stack(eager(*batch(i))), torch.stack(graphed(*batch(i))))
    assert len(graphs.replays) == 2


class Refusing(nn.Module):
    """Cannot be captured, and says so when half a step is done."""

    graphs: StandIn | None = None
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.graphs is not None and self.graphs.capturing:
            type(self).calls += 1
            torch.rand(3)
            if self.calls == 3:
                raise RuntimeError("operation not permitted")  # the line that is named
        return x


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_failed_capture_leaves_eager_steps_unharmed(
    amp: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refusing, "calls", 0)
    eager, graphed, graphs = pair(last=Refusing, amp=amp)
    graphed.D.main[-1].graphs = graphs
    drawn = []
    with caplog.at_level(logging.WARNING, "pygan"):
        for step in (eager, graphed):
            torch.manual_seed(5)
            for i in range(8):
                step(*batch(i))
            drawn.append(torch.rand(3))
    require_equal(eager, graphed)
    assert torch.equal(*drawn) and Refusing.calls == 3 and not graphs.replays
    (record,) = caplog.records
    message = record.getMessage()
    assert "operation not permitted" in message and "test_step_graph.py:" in message
    assert "the line that is named" in message and f"[{BATCH}, 1, {SIZE}, {SIZE}]" in message
    assert not hasattr(graphed.opt_d, "grad_scale")


@pytest.mark.parametrize("place", ["opt_g.step", "_scaler_g.update"])
def test_a_capture_that_fails_in_an_optimizer_leaves_its_scaler_unharmed(place: str) -> None:
    eager, graphed, graphs = pair(amp="fp16")
    owner, name = place.split(".")
    original = getattr(getattr(graphed, owner), name)

    def refusing() -> None:
        if graphs.capturing:
            raise RuntimeError("operation not permitted")
        original()

    setattr(getattr(graphed, owner), name, refusing)
    for i in range(8):
        assert torch.equal(torch.stack(eager(*batch(i))), torch.stack(graphed(*batch(i))))
    require_equal(eager, graphed)
    assert graphed._graphed is not None and graphed._graphed.reason is not None


def test_the_memory_of_the_set_is_not_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graphed, graphs = pair()
    images = torch.randint(0, 256, (30, SIZE, SIZE, 1), dtype=torch.uint8)
    cloned = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **more: cloned.append(t.shape) or clone(t))
    for i in range(WARM_UP + 2):
        graphed.gathered(images, torch.arange(i, i + BATCH))
    assert len(graphs.replays) == 1 and images.shape not in cloned


def test_no_memory_for_the_inputs_of_a_graph(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, graphed, graphs = pair()
    detach = Tensor.detach

    def refusing(tensor: Tensor) -> Tensor:
        if tensor.shape == (BATCH, 1, SIZE, SIZE):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return detach(tensor)

    with caplog.at_level(logging.WARNING, "pygan"):
        for i in range(WARM_UP + 2):
            eager(*batch(i))
            with monkeypatch.context() as patch:
                if i == WARM_UP:
                    # The copy of real is the first thing that a capture makes.
                    patch.setattr(graphs, "capture", None)
                    patch.setattr(Tensor, "clone", lambda t: refusing(t))
                graphed(*batch(i))
    require_equal(eager, graphed)
    (record,) = caplog.records
    said = record.getMessage()
    assert "Tried to allocate 2.00 GiB" in said and f"[{BATCH}, 1, {SIZE}, {SIZE}]" in said


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Raising(Counting):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("not now")
        return super().forward(x)


def test_a_step_that_raises_is_none_of_the_warm_up() -> None:
    eager, graphed, graphs = pair(last=Raising, merge=False)
    for step in (eager, graphed):
        for i in range(WARM_UP + 4):
            # The last of the warm-up, which is watched.
            step.D.main[-1].fails = i == WARM_UP - 1
            with pytest.raises(RuntimeError) if step.D.main[-1].fails else contextlib.nullcontext():
                step(*batch(i))
    # What it would have shown the next one shows, so that no graph leaves it out.
    require_equal(eager, graphed)
    assert not graphs.replays


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean() * 0.1
        return x - self.mean


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, args, out: out * 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (Counting, "calls went from"),
        (Averaging, "mean becomes another tensor in every step"),
        (Drawing, "random numbers of the CPU"),
        (Hooked, r"\(Hooked\) has a hook"),
    ],
)
def test_what_python_does_in_a_step_is_not_left_out(last: type[nn.Module], reason: str) -> None:
    eager, graphed, graphs = pair(last=last, merge=False)
    results = []
    for step in (eager, graphed):
        random.seed(1)
        results.append([torch.stack(step(*batch(i))) for i in range(8)])
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))
    require_equal(eager, graphed)
    assert not graphs.replays
    required = make(last=last(), merge=False)
    required.graph = "on"
    StandIn(required)
    with pytest.raises(pygan.UserError, match=f"graph is 'on' and .* because .*{reason}"):
        for i in range(WARM_UP + 1):
            required(*batch(i))


@pytest.mark.parametrize(
    ("kind", "amp", "reason"),
    [
        (torch.optim.Adam, "off", r"opt_g \(Adam\) counts its steps .* capturable=True"),
        (torch.optim.SGD, "fp16", r"opt_g \(SGD\) is not fused, so float16"),
    ],
)
def test_optimizers_that_cannot_be_captured_are_named(
    kind: Any, amp: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    G, D = pygan.models.dcgan(SIZE, 1, nz=NZ, ngf=8, ndf=8)
    optimizers = [kind(m.parameters(), lr=1e-4) for m in (G, D)]
    step = pygan.AdversarialStep(G, D, *optimizers, amp=amp)
    graphs = StandIn(step)
    with caplog.at_level(logging.WARNING, "pygan"):
        step(*batch(0))
    assert not graphs.replays
    (record,) = caplog.records
    assert re.search(reason, record.getMessage())


def test_a_rate_that_changes_all_the_time_is_not_captured_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    eager, graphed, graphs = pair()
    with caplog.at_level(logging.WARNING, "pygan"):
        for i in range(48):
            for step in (eager, graphed):
                step.opt_g.param_groups[0]["lr"] = 2e-4 / (1 + i // 5)
            real, z = batch(i)
            assert torch.equal(torch.stack(eager(real, z)), torch.stack(graphed(real, z)))
    assert len(graphs.replays) == 8
    (record,) = caplog.records
    assert "until hyperparameters of an optimizer changed" in record.getMessage()


def test_recapture_sees_what_a_step_cannot() -> None:
    _, graphed, graphs = pair()
    for i in range(WARM_UP + 2):
        graphed(*batch(i))
    graphed.recapture()
    assert graphs.replays[0].closed
    for i in range(WARM_UP + 1):
        graphed(*batch(i))
    assert len(graphs.replays) == 2


def test_a_graph_that_has_to_be_needs_a_device_for_it() -> None:
    networks = [m.to("meta") for m in pygan.models.dcgan(SIZE, 1, nz=NZ, ngf=8, ndf=8)]
    optimizers = [torch.optim.SGD(m.parameters(), 1e-4) for m in networks]
    with pytest.raises(pygan.UserError, match="graph is 'on' and the networks are on meta"):
        pygan.AdversarialStep(*networks, *optimizers, graph="on")


def test_a_wait_for_the_device_is_told_by_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)  # as item() does
            return x

    def warm_up() -> list[str]:
        with cuda_graph._watched() as waits:
            nn.Sequential(nn.Identity(), Reading())(torch.zeros(1))
            with pytest.warns(UserWarning, match="another"):
                warnings.warn("another", stacklevel=1)
        return waits

    (found,) = warm_up()
    assert "test_step_graph.py:" in found and "as item() does" in found


class FakeCuda:
    """The parts of ``torch.cuda`` that a capture calls, on a machine without."""

    def __init__(self, patch: pytest.MonkeyPatch, *, end_fails: bool = False) -> None:
        self.end_fails, self.calls = end_fails, list[str]()
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.calls.append("replay")

            def reset(self) -> None:
                fake.calls.append("reset")

            def register_generator_state(self, generator: torch.Generator) -> None:
                fake.calls.append("register")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.calls.append("record")

            def synchronize(self) -> None:
                fake.calls.append("wait for event")

            def elapsed_time(self, stop: Event) -> float:
                return 2.5

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.waited = 0

            def synchronize(self) -> None:
                fake.calls.append("wait for stream")

            def wait_stream(self, other: Any) -> None:
                self.waited += 1

        @contextlib.contextmanager
        def graph(graph: Graph, **settings: Any) -> Iterator[None]:
            assert settings["capture_error_mode"] == "thread_local"
            yield
            if fake.end_fails:
                fake.end_fails = False
                raise RuntimeError("capture was invalidated")

        def done(name: str) -> Callable[..., None]:
            return lambda *args: fake.calls.append(name)

        current = Stream()
        for name, value in {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "Event": Event,
            "graph": graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "current_stream": lambda device=None: current,
            "is_current_stream_capturing": lambda: False,
            "graph_pool_handle": lambda: (0, 1),
            "default_generators": [torch.default_generator],
            "mem_get_info": lambda device: (3 << 29, 4 << 30),
            "memory_reserved": lambda device: 2 << 30,
            "synchronize": done("synchronize"),
            "empty_cache": done("empty_cache"),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": done("watch"),
        }.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, done(name), raising=False)


def test_cuda_captures_once_and_counts_what_shares_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda(monkeypatch)
    step = make()
    step._graphed = GraphedStep(step, cuda_graph.CudaGraphs(torch.device("cpu")))
    for i in range(WARM_UP + 2):
        step(*batch(i))
    # Once to begin watching in the last step of the warm-up, once to end.
    assert fake.calls == ["watch", "watch", "replay", "replay"]
    step.recapture()
    assert fake.calls[4:] == ["synchronize", "reset"]
    assert step._graphed._graphs._alive == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("end_fails", [False, True])
def test_cuda_recovers_where_a_capture_fails(
    end_fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch, end_fails=end_fails)
    graphs = cuda_graph.CudaGraphs(torch.device("cpu"))

    def body() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory") if not end_fails else ValueError("mine")

    message = r"mine, at .*test_step_graph.py:\d+ \(raise torch" if end_fails else (
        "not enough memory for its graph: 1.50 of 4.00 GiB are free, and torch holds 2.00 GiB"
    )  # fmt: skip
    with pytest.raises(CaptureError, match=message):
        graphs.capture(body, [])
    recovered = ["_cuda_endAllocateToPool", "_cuda_releasePool", "reset"] if end_fails else []
    assert fake.calls == [*recovered, "reset", "synchronize", "empty_cache"]
    assert graphs._alive == 0


def gpu_step(**settings: Any) -> pygan.AdversarialStep:
    return make("cuda", **settings)


def run_on_gpu(
    step: pygan.AdversarialStep, steps: Sequence[int], size: int = BATCH, *, drawn: bool = False
) -> Tensor:
    found = []
    for i in steps:
        real, z = batch(i, size, "cuda")
        found.append(torch.stack(step(real, None if drawn else z)))
    return torch.stack(found)


def graphs_of(step: pygan.AdversarialStep) -> int:
    assert step._graphed is not None and step._graphed.reason is None
    return sum(entry.captured is not None for entry in step._graphed._entries.values())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_gpu_replays_follow_their_inputs(amp: str) -> None:
    losses = []
    for graph in ("off", "on"):
        step = gpu_step(amp=amp, graph=graph)
        losses.append(run_on_gpu(step, range(STEPS)))
        if graph == "on":
            assert graphs_of(step) == 1
    assert losses[1].isfinite().all()
    # Over 20 steps the order of sums by atomics makes a difference of this size.
    tolerance = {"off": 1e-3, "bf16": 5e-2, "fp16": 2e-2}[amp]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    assert (losses[1][WARM_UP:].diff(dim=0)[:, 0] != 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tricks", [pygan.Tricks(n_critic=3), pygan.Tricks(r1=1.0, r1_every=3)], ids=["n_critic", "R1"]
)
def test_gpu_steps_by_turns_have_a_graph_each(tricks: pygan.Tricks) -> None:
    steps = [gpu_step(graph=graph, tricks=tricks) for graph in ("off", "on")]
    losses = [run_on_gpu(step, range(23)) for step in steps]
    assert graphs_of(steps[1]) == 2
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    shown = [[p.grad is None for p in step.G.parameters()] for step in steps]
    assert shown[0] == shown[1] == [tricks.n_critic > 1] * len(shown[0])


@pytest.mark.gpu
def test_gpu_draws_of_a_graph_are_those_of_eager_steps() -> None:
    states, first = [], []
    for graph in ("off", "on", "on"):
        step = gpu_step(graph=graph)
        losses = run_on_gpu(step, range(12), drawn=True)
        assert step.generator is not None
        states.append(step.generator.get_state())
        step.generator.manual_seed(7)
        first.append(torch.cat([losses, run_on_gpu(step, range(12, 16), drawn=True)]))
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])
    torch.testing.assert_close(first[1], first[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first[2], first[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_steps_on_other_streams_and_in_two_shapes() -> None:
    losses = []
    for graph in ("off", "on"):
        step = gpu_step(graph=graph)
        found = []
        for i in range(16):
            stream = torch.cuda.Stream() if i % 3 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(run_on_gpu(step, [i], BATCH if i % 2 else 5))
            torch.cuda.current_stream().wait_stream(stream)
        losses.append(torch.cat(found))
        if graph == "on":
            assert graphs_of(step) == 2
            step.recapture()
            run_on_gpu(step, range(WARM_UP + 2))
            assert graphs_of(step) == 1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 if x.sum().item() > 0 else 2)  # waits


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.cuda.synchronize()  # is not seen before the capture
        return x


@pytest.mark.gpu
@pytest.mark.parametrize(("last", "line"), [(Reading, "# waits"), (Waiting, "# is not seen")])
def test_gpu_goes_on_eagerly_after_what_cannot_be_captured(
    last: type[nn.Module], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    eager, step = (gpu_step(last=last(), graph=graph) for graph in ("off", "auto"))
    with caplog.at_level(logging.WARNING, "pygan"):
        losses = [run_on_gpu(each, range(8), drawn=True) for each in (eager, step)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    (record,) = [r for r in caplog.records if "without a CUDA graph" in r.getMessage()]
    assert line in record.getMessage()
    # The device, its allocator and its generators still serve graphs of others.
    torch.rand(4, device="cuda")
    other = gpu_step(graph="on")
    run_on_gpu(other, range(WARM_UP + 2), drawn=True)
    assert graphs_of(other) == 1


@pytest.mark.gpu
def test_gpu_averages_follow_in_replays_as_on_a_cpu() -> None:
    step = gpu_step(graph="on")
    step.ema = pygan.Ema(step.G, 0.7)
    expected = pygan.Ema(copy.deepcopy(step.G).cpu(), 0.7)
    for i in range(STEPS):
        run_on_gpu(step, [i])
        expected.update(copy.deepcopy(step.G).cpu())
    assert graphs_of(step) == 1 and step.ema.updates.item() == STEPS
    for name, tensor in step.ema.network.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected.network.state_dict()[name])


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_curves_of_500_steps_are_eager_ones() -> None:
    curves = [
        run_on_gpu(gpu_step(graph=graph), range(500), drawn=True).cpu()
        for graph in ("off", "off", "on")
    ]
    means = [curve.view(10, 50, 5).mean(1) for curve in curves]
    # What two eager runs differ by, through sums in another order, and a floor of one percent.
    noise = (means[0] - means[1]).abs().max().item()
    assert (means[2] - means[0]).abs().max().item() < max(3 * noise, 0.01 * means[0].abs().max())


@pytest.mark.gpu
def test_gpu_changes_after_the_capture_take_effect() -> None:
    for change in (lower_rates, load_optimizer, load_networks, evaluate, weigh):
        losses = []
        for graph in ("off", "on"):
            step = gpu_step(graph=graph)
            before = run_on_gpu(step, range(6))
            change(step)
            losses.append(torch.cat([before, run_on_gpu(step, range(6, 14))]))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_networks_serve_the_graphs_of_others() -> None:
    step = gpu_step(graph="auto")
    pygan.fuse(step.G)
    z = batch(0, device="cuda")[1]
    by_graph = torch.cuda.make_graphed_callables(copy.deepcopy(step.G), (z,))
    torch.testing.assert_close(by_graph(z), step.G(z), rtol=1e-3, atol=1e-3)
    real, z = batch(1, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(real, z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(real, z)
    found = []
    for _ in range(3):
        graph.replay()
        found.append(result.loss_d.item())
    assert len(set(found)) == 3
    assert step._graphed is not None and step._graphed.reason is None


IMAGES = 40


@functools.cache
def bytes_of_images() -> Tensor:
    """Always the same tensor: a graph reads it where it is."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (IMAGES, SIZE, SIZE, 1), dtype=torch.uint8, generator=g)


def chosen(steps: Sequence[int], size: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Images, and rows of which ones, and of which are mirrored, for some steps."""
    index = torch.tensor([[(7 * i + j) % IMAGES for j in range(size)] for i in steps])
    return bytes_of_images(), index, index % 3 == 0


def single_steps(step: pygan.AdversarialStep, count: int, size: int = BATCH) -> Tensor:
    images, index, flip = chosen(range(count), size)
    rows = zip(index, flip, strict=True)
    return torch.stack([torch.stack(step.gathered(images, i, flip=f)) for i, f in rows])


def steps_together(
    step: pygan.AdversarialStep, runs: Sequence[int], size: int = BATCH, first: int = 0
) -> Tensor:
    images, index, flip = chosen(range(first, first + sum(runs)), size)
    found = []
    for rows, mirrored in zip(index.split(list(runs)), flip.split(list(runs)), strict=True):
        found += step.several(images, rows, flip=mirrored)
    return torch.stack([torch.stack(result) for result in found])


MEASURED = SAMPLE * SAMPLES * len(SIZES)


@pytest.mark.parametrize("fastest", SIZES)
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_steps_of_one_replay_are_single_steps_bit_for_bit(amp: str, fastest: int) -> None:
    eager, graphed, graphs = pair(amp=amp)
    graphs.times = {fastest: 2.0}
    # The warm-up, all samples, runs that leave a rest, and runs too short for any.
    runs = [1] * WARM_UP + [1, MEASURED // 2, MEASURED // 2 + 3, 17, 5, 1, 8]
    losses = []
    for step in (eager, graphed):
        step.totals = torch.zeros(5)
    losses.append(single_steps(eager, sum(runs)))
    losses.append(steps_together(graphed, runs))
    assert torch.equal(*losses)
    require_equal(eager, graphed)
    assert eager.totals is not None and graphed.totals is not None
    assert torch.equal(eager.totals, graphed.totals)
    assert eager.generator is not None and graphed.generator is not None
    assert torch.equal(eager.generator.get_state(), graphed.generator.get_state())
    assert graphs.samples == [size for size in SIZES for _ in range(SAMPLES)]
    assert list(graphs.choices.values()) == [str(fastest)]
    assert graphed.at_once == (1 if fastest == 1 else SAMPLE)
    alive = sorted(len(r.out.view(-1, 5)) for r in graphs.replays if not r.closed)
    assert alive == sorted({1, fastest})


def test_no_more_than_two_graphs_serve_a_shape_while_it_is_measured() -> None:
    _, graphed, graphs = pair()
    steps_together(graphed, [1] * (WARM_UP + 1))
    for i in range(MEASURED // SAMPLE):
        steps_together(graphed, [SAMPLE], first=i * SAMPLE)
        assert sum(not r.closed for r in graphs.replays) <= 2
    # No number of steps was faster than one.
    assert [r.closed for r in graphs.replays] == [False, True, True, True]
    graphed.recapture()
    assert all(r.closed for r in graphs.replays)


def test_what_was_measured_before_is_not_measured_again() -> None:
    eager, graphed, graphs = pair()
    graphs.times = {4: 1.0}
    steps_together(graphed, [1] * (WARM_UP + 1) + [MEASURED])
    other = make()
    again = StandIn(other)
    again.choices = graphs.choices
    assert other.at_once == 1
    together = steps_together(other, [1] * WARM_UP + [1, 9, 3])
    assert torch.equal(together, single_steps(eager, WARM_UP + 13))
    require_equal(eager, other)
    assert not again.samples
    # The first of the step after the warm-up, two of four, and one by one what was left.
    assert [(r.done, len(r.out.view(-1, 5))) for r in again.replays] == [(5, 1), (2, 4)]


def test_shapes_have_graphs_of_several_steps_of_their_own() -> None:
    eager, graphed, graphs = pair()
    graphs.times = {2: 1.0}
    for turn, size in enumerate((BATCH, 5, BATCH)):
        runs = [1] * (WARM_UP + 1) + [MEASURED + 4]
        assert torch.equal(
            steps_together(graphed, runs, size), single_steps(eager, sum(runs), size)
        ), turn
    require_equal(eager, graphed)
    assert len(graphs.choices) == 2
    assert sum(not r.closed for r in graphs.replays) == 4


@pytest.mark.parametrize("change", [lower_rates, load_optimizer, evaluate, weigh])
def test_several_steps_see_changes_after_their_capture(
    change: Callable[[pygan.AdversarialStep], None],
) -> None:
    eager, graphed, graphs = pair()
    graphs.times = {4: 1.0}
    runs = [1] * (WARM_UP + 1) + [MEASURED + 8]
    found = []
    for step in (eager, graphed):
        ours = single_steps(step, sum(runs)) if step is eager else steps_together(step, runs)
        change(step)
        rest = single_steps(step, 20) if step is eager else steps_together(step, [12, 8])
        found.append(torch.cat([ours, rest]))
    assert torch.equal(*found)
    require_equal(eager, graphed)
    # What was measured holds for the graphs that take the place of the dropped ones.
    last = [r for r in graphs.replays if not r.closed]
    assert {len(r.out.view(-1, 5)) for r in last} == {1, 4} and all(r.done for r in last)


@pytest.mark.parametrize("known", [False, True])
def test_where_no_graph_holds_several_steps_one_does(
    known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    eager, graphed, graphs = pair()
    capture = graphs.capture

    def short_of_memory(run: Callable[[], Tensor], generators: Any) -> Replay:
        recorded = capture(run, generators)
        if len(recorded.out.view(-1, 5)) > 2:
            graphs.replays.pop()
            raise CaptureError("there is not enough memory for its graph")
        return recorded

    graphs.capture = short_of_memory  # type: ignore[method-assign]
    graphs.times = {2: 1.0}
    if known:
        graphs.known = lambda key, candidates: "8"  # type: ignore[method-assign]
    runs = [1] * (WARM_UP + 1) + [MEASURED, 10]
    with caplog.at_level(logging.INFO, "pygan"):
        together = steps_together(graphed, runs)
    assert torch.equal(together, single_steps(eager, sum(runs)))
    require_equal(eager, graphed)
    assert graphed._graphed is not None and graphed._graphed.reason is None
    (said,) = [r.getMessage() for r in caplog.records if "no graph holds" in r.getMessage()]
    assert said.startswith(f"no graph holds {8 if known else 4} steps") and "memory" in said
    assert not graphs.choices
    alive = sorted(len(r.out.view(-1, 5)) for r in graphs.replays if not r.closed)
    assert alive == ([1] if known else [1, 2])


@pytest.mark.parametrize("last", [Counting, Averaging, Drawing])
def test_several_steps_that_no_graph_repeats_stay_eager(last: type[nn.Module]) -> None:
    eager, graphed, graphs = pair(last=last, merge=False)
    found = []
    for step in (eager, graphed):
        random.seed(1)
        found.append(single_steps(step, 25) if step is eager else steps_together(step, [9, 16]))
    assert torch.equal(*found)
    require_equal(eager, graphed)
    assert not graphs.replays and graphed.at_once == 1


def test_several_steps_by_turns_are_made_one_by_one() -> None:
    eager, graphed, graphs = pair(tricks=pygan.Tricks(n_critic=3))
    assert graphed.at_once == 1
    assert torch.equal(single_steps(eager, 21), steps_together(graphed, [4, 17]))
    require_equal(eager, graphed)
    # G learns in the steps 0, 3, 6, 9 and so on.
    assert [r.done for r in graphs.replays] == [21 - 7 - WARM_UP, 7 - WARM_UP]


def test_an_exception_among_several_steps_leaves_those_before_it() -> None:
    eager, graphed, _ = pair(last=Raising, merge=False)
    images, index, flip = chosen(range(6))
    single_steps(eager, 4)
    calls = [0]
    forward = Raising.forward

    def failing(self: Raising, x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 12:  # the fifth step, of three calls each
            raise RuntimeError("not now")
        return forward(self, x)

    graphed.D.main[-1].forward = failing.__get__(graphed.D.main[-1])
    with pytest.raises(RuntimeError, match="not now"):
        graphed.several(images, index, flip=flip)
    ours, theirs = everything(graphed), everything(eager)
    trained = [k for k in ours if "opt" in k or k.endswith((".weight", ".bias"))]
    # It went through G, and half way into D.
    assert trained and not [k for k in trained if not torch.equal(ours[k], theirs[k])]
    assert not torch.equal(
        ours["G.main.1.num_batches_tracked"], theirs["G.main.1.num_batches_tracked"]
    )


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ({1: 8.0, 2: 4.0, 4: 3.0, 8: 3.5}, 4),
        ({1: 8.0, 2: 7.9, 4: 8.1, 8: 9.0}, 1),  # within noise
        ({1: 8.0, 2: 7.0, 4: 6.0, 8: 5.0}, 8),
    ],
)
def test_pace_is_the_fastest_beyond_noise(times: dict[int, float], choice: int) -> None:
    pace = Pace()
    seen = []
    while (size := pace.wanted) is not None:
        first = size not in seen
        seen.append(size)
        # The first replay of a graph takes longer.
        pace.add(size, 100.0 if first else times[size])
    assert seen == [size for size in SIZES for _ in range(SAMPLES)]
    assert pace.choice == choice


def test_cuda_times_a_call_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    graphs = cuda_graph.CudaGraphs(torch.device("cpu"))
    assert graphs.clock(lambda: fake.calls.append("run")) == 2.5
    assert fake.calls == ["wait for stream", "record", "run", "record", "wait for event"]


def test_cuda_keeps_what_was_measured_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "device_stamp", lambda device: "one GPU")
    one, other = (cuda_graph.CudaGraphs(torch.device("cpu")) for _ in range(2))
    one.keep("a kind of step", "4")
    assert other.known("a kind of step", ("1", "4")) == "4"
    assert other.known("another", ("1", "4")) is None
    monkeypatch.setattr(cuda_graph, "device_stamp", lambda device: "another GPU")
    assert cuda_graph.CudaGraphs(torch.device("cpu")).known("a kind of step", ("4",)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_gpu_several_steps_follow_their_inputs(amp: str) -> None:
    losses, states = [], []
    for together in (False, True):
        step = gpu_step(amp=amp, graph="on")
        count = WARM_UP + 1 + MEASURED + 20
        images, index, flip = (t.cuda() for t in chosen(range(count)))
        runs = [1] * count if not together else [1] * (WARM_UP + 1) + [MEASURED, 9, 3, 8]
        found: list[Any] = []
        for rows, mirrored in zip(index.split(runs), flip.split(runs), strict=True):
            found += step.several(images, rows, flip=mirrored)
        losses.append(torch.stack([torch.stack(result) for result in found]))
        assert step.generator is not None
        states.append(step.generator.get_state())
    assert torch.equal(*states)
    tolerance = 1e-2 if amp == "off" else 5e-2
    first = slice(0, STEPS)  # later ones are apart by sums in another order
    torch.testing.assert_close(losses[1][first], losses[0][first], rtol=tolerance, atol=tolerance)
    assert losses[1].isfinite().all() and (losses[1].diff(dim=0)[:, 0] != 0).all()
