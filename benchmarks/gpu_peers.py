"""The training step as experts make it fast: torch.compile, and a CUDA graph captured by hand.

With `benchmarks.bench_train_step`'s they are the peers of a GPU; those of torch.compile are a CPU's
as well. All but the plain ones use
automatic mixed precision in bfloat16, channels_last, fused Adam, and no weight gradients of D in
the step of G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_train_step import NZ, WAYS, Way, pygan_step
from benchmarks.same_update import Build, Models, Stepper
from benchmarks.steps import Adam, EagerStep, Losses, Networks, Writing, networks
from pygan.errors import UserError

BY_HAND = Writing(channels_last=True, by_hand=True, bf16=True)
WARM_UP = 3


class HandGraph:
    """`EagerStep` captured as one CUDA graph at its first call, for one size of batch.

    The steps that warm it up are undone: weights, buffers and Adam's state are as before.
    """

    def __init__(self, nets: Networks, nz: int, writing: Writing) -> None:
        self._nets, self._nz = nets, nz
        self._eager = EagerStep(nets, nz, writing)
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, real: Tensor, z: Tensor | None = None) -> Losses:
        if self._graph is None:
            self._capture(real)
        assert self._graph is not None
        self._real.copy_(real)
        if z is None:
            self._z.normal_()
        else:
            self._z.copy_(z)
        self._graph.replay()
        return self._losses

    def _capture(self, real: Tensor) -> None:
        if real.device.type != "cuda":
            raise UserError(f"the images are on {real.device}; a CUDA graph needs an NVIDIA GPU")
        self._real = real.clone(memory_format=torch.channels_last)
        self._z = torch.randn(real.shape[0], self._nz, 1, 1, device=real.device)
        nets = (self._nets.generator, self._nets.discriminator)
        state = [t for net in nets for t in (*net.parameters(), *net.buffers())]
        before = [each.detach().clone() for each in state]
        stream = torch.cuda.Stream(real.device)
        stream.wait_stream(torch.cuda.current_stream(real.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._eager.step(self._real, self._z)
        torch.cuda.current_stream(real.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Gradients are made anew inside, in the graph's own memory.
        for optimizer in (self._nets.opt_g, self._nets.opt_d):
            optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._losses = self._eager.step(self._real, self._z)
        with torch.no_grad():
            for tensor, kept in zip(state, before, strict=True):
                tensor.copy_(kept)
            for optimizer in (self._nets.opt_g, self._nets.opt_d):
                for moments in optimizer.state.values():
                    for moment in moments.values():
                        moment.zero_()
        self._graph = graph


def hand_graph(models: Models, device: torch.device, adam: Adam) -> Stepper:
    """The eager step of an expert as a CUDA graph."""
    nets = networks(models, device, channels_last=True, fused_adam=True, adam=adam)
    return Stepper(nets, HandGraph(nets, NZ, BY_HAND).step)


class Compiled:
    """The eager step of an expert with both networks compiled; a `Build`.

    Compiling takes long, so what was checked is what is timed: later builds give the first one's
    networks, with Adam's new settings.
    """

    def __init__(self, writing: Writing = BY_HAND, **options: Any) -> None:
        self._writing, self._options = writing, options
        self._built: Stepper | None = None

    def __call__(self, models: Models, device: torch.device, adam: Adam) -> Stepper:
        if self._built is None:
            self._built = self._compile(models, device, adam)
        for optimizer in (self._built.nets.opt_g, self._built.nets.opt_d):
            for group in optimizer.param_groups:
                group.update(adam._asdict())
        return self._built

    def _compile(self, models: Models, device: torch.device, adam: Adam) -> Stepper:
        nets = networks(models, device, channels_last=True, fused_adam=True, adam=adam)
        # Sizes are fixed, and a second size is another benchmark.
        generator: Any = torch.compile(nets.generator, dynamic=False, **self._options)
        discriminator: Any = torch.compile(nets.discriminator, dynamic=False, **self._options)
        compiled = Networks(generator, discriminator, nets.opt_g, nets.opt_d)
        eager = EagerStep(compiled, NZ, self._writing)

        def step(real: Tensor, z: Tensor | None = None) -> Losses:
            torch.compiler.cudagraph_mark_step_begin()
            return eager.step(real, z)

        return Stepper(nets, step)


ANCHOR = "pygan bf16"
BY_HAND_GRAPH = "eager bf16 by hand, CUDA graph"
_BY_NAME = {way.name: way for way in WAYS}
_EAGER = (
    "eager fp32",
    "eager fp32 channels_last",
    "eager fp32 by hand",
    "eager bf16",
    "eager bf16 by hand",
)
_MODES = ("default", "reduce-overhead", "max-autotune")


def _baseline(name: str, build: Build) -> Way:
    return Way(name, "bf16", build, baseline=True)


def _jax() -> list[Way]:
    from benchmarks import jax_step

    return [_baseline(f"JAX jit bf16, {form}", jax_step.builder(form)) for form in jax_step.FORMS]


def families(tiny: bool = False) -> tuple[str, ...]:
    """Peers that are measured together, in one process, always beside pygan."""
    return ("eager", *(f"compile-{mode}" for mode in (_MODES[:1] if tiny else _MODES)), "jax")


def ways(family: str, tiny: bool = False) -> list[Way]:
    """The sides of a family, pygan's last.

    Raises:
        UserError: what it needs is not installed.
    """
    anchor = _BY_NAME[ANCHOR]
    if family == "eager":
        return [
            *(_BY_NAME[name]._replace(baseline=True) for name in _EAGER),
            _baseline(BY_HAND_GRAPH, hand_graph),
            _BY_NAME["pygan fp32"],
            Way("pygan bf16, no graph", "bf16", pygan_step("bf16", graph="off")),
            anchor,
        ]
    if family == "jax":
        try:
            return [*_jax(), anchor]
        except ImportError as error:
            raise UserError(f"JAX cannot be imported ({error})") from None
    mode = family.removeprefix("compile-")
    options = {"backend": "eager"} if tiny else {"mode": mode}
    return [_baseline(f"torch.compile {mode} bf16", Compiled(**options)), anchor]
