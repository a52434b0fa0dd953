"""Batch norm and activation as one operation, with statistics per group of the batch.

    y = f(z),  z = weight * xhat + bias,  xhat = (x - mean) * invstd,  invstd = 1/sqrt(var + eps)

Training: mean and (biased) variance over batch and space of each of ``groups`` equal runs of the
batch; the running statistics follow group by group, with the unbiased variance: the numbers that
``groups`` calls would give. ``averaged`` they follow once, the mean over the groups: with a group
for each image this is instance norm. Evaluation: the running statistics are mean and variance.

Backward, with dz = dy * f'(z), M values a channel and group:

    dbias = sum dz,  dweight = sum dz * xhat
    dx = weight * invstd * (dz - (sum dz + xhat * sum dz * xhat) / M)      (training)
    dx = weight * invstd * dz                                             (evaluation)

Saved: x, weight, bias and the statistics; f'(z) is recomputed from x. Gradient order: x, weight,
bias. Shapes: x, y ``[N, C, *]``; weight, bias, running statistics ``[C]``.
Source: Ioffe and Szegedy 2015, arXiv:1502.03167; one group for real and one for generated images
as in Radford et al. 2015.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError
from pygan.ops import (
    dispatch,
    gpu,
    map_memory,
    native,
    norm_act_cuda,
    norm_act_second,
    norm_act_triton,
)
from pygan.ops.dense import dense
from pygan.ops.moments import Moments
from pygan.ops.native import ACTIVATIONS
from pygan.ops.recorded import recorded
from pygan.ops.wanted import wanted_gradients


class _Grouping(threading.local):
    groups = 1


grouping = _Grouping()


@contextlib.contextmanager
def batch_groups(count: int) -> Iterator[None]:
    """Inside, every fused batch norm in this thread takes its statistics in ``count`` equal runs
    of the batch, so that one call on several batches equals one call for each."""
    before = current_groups()
    grouping.groups = count
    try:
        yield
    finally:
        grouping.groups = before


def current_groups() -> int:
    """Groups that fused modules use now: 1 outside ``batch_groups``."""
    return grouping.groups


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """f(z), differentiable."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    return z


class Settings(NamedTuple):
    """Everything that is not a tensor, in ``batch_norm``'s order."""

    training: bool
    momentum: float
    eps: float
    activation: str
    negative_slope: float
    groups: int
    averaged: bool = False


def norm_act_ref(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The definition in torch: one ``batch_norm`` call a group, or one ``instance_norm``, then the
    activation."""
    training, momentum, eps, activation, negative_slope, groups, averaged = settings
    parameters = (running_mean, running_var, weight, bias, training, momentum, eps)
    apart = averaged or (running_mean is None and running_var is None)
    if training and apart and 1 < groups == x.shape[0] and x.dim() > 2:
        z = F.instance_norm(x, *parameters)
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            z = z.contiguous(memory_format=torch.channels_last)
        return activate(z, activation, negative_slope)
    if averaged:
        raise UserError(f"{groups} groups of {x.shape[0]} images are averaged; give one for each")
    parts = x.chunk(groups) if training else [x]
    zs = [F.batch_norm(part, *parameters) for part in parts]
    return activate(zs[0] if len(zs) == 1 else torch.cat(zs), activation, negative_slope)


def supports_cpu(x: Tensor, *parameters: Tensor | None) -> str | None:
    return _unfit(x, parameters) or dispatch.supports_cpu(x)


def has_kernel(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a kernel takes x where nothing else is wished for."""
    if gpu.holds(x):
        return _supports_cuda(x, *parameters) is None or _supports_triton(x, *parameters) is None
    return supports_cpu(x, *parameters) is None


def _supports_cuda(x: Tensor, *parameters: Tensor | None) -> str | None:
    return _unfit(x, parameters) or norm_act_cuda.supports(x)


def _supports_triton(x: Tensor, *parameters: Tensor | None) -> str | None:
    return _unfit(x, parameters) or norm_act_triton.supports(x)


def _unfit(x: Tensor, parameters: Sequence[Tensor | None]) -> str | None:
    """Reason that no kernel takes these parameters and buffers beside x, or None."""
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.dtype is not torch.float32:
            return f"a parameter or buffer is {parameter.dtype}, not float32"
        if parameter.device != x.device:
            return f"a parameter or buffer is on {parameter.device}, not on {x.device}"
        if not parameter.is_contiguous():
            return "a parameter or buffer is not contiguous"
        if parameter.shape != x.shape[1:2]:
            return f"a parameter or buffer of shape {tuple(parameter.shape)} does not fit the input"
    return None


def shape_of(module: ModuleType, x: Tensor, layout: int, settings: Settings) -> Any:
    size = x.shape
    return module.NormActShape(
        native.DTYPES[x.dtype],
        layout,
        size[0],
        size[1],
        size[2:].numel(),
        settings.groups,
        ACTIVATIONS[settings.activation],
        settings.negative_slope,
        torch.get_num_threads(),
    )


def _cpu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y, and mean and invstd as ``[2, groups, C]``, ``given`` or of x."""
    x, layout = dense(x)
    y = map_memory.empty_like(x)
    statistics = _run_forward(
        x, layout, weight, bias, running_mean, running_var, settings, y=y, given=given
    )
    return y, statistics


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, settings: Settings
) -> Tensor:
    """Mean and invstd of x as ``[2, groups, C]``, for ``given`` of :func:`norm_act`; the running
    statistics follow them. For what ``supports_cpu`` takes."""
    x, layout = dense(x.detach())
    return _run_forward(x, layout, None, None, running_mean, running_var, settings)


def _cpu_coefficients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and invstd as ``[2, groups, C]``, ``given`` or of x, and as ``[groups, 3, C]`` what
    turns a channels_last x into z: mean, scale and shift. Running statistics follow those of x."""
    coefficients = torch.empty((settings.groups, 3, x.shape[1]))
    statistics = _run_forward(
        x,
        0,
        weight,
        bias,
        running_mean,
        running_var,
        settings,
        coefficients=coefficients,
        given=given,
    )
    return statistics, coefficients


def _run_forward(
    x: Tensor,
    layout: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
    *,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    module = native.load()
    assert module is not None
    shape = shape_of(module, x, layout, settings)
    training = settings.training and given is None
    if given is not None:
        statistics = given
    elif training:
        statistics = torch.empty((2, settings.groups, x.shape[1]))
    else:
        assert running_mean is not None and running_var is not None
        statistics = torch.stack([running_mean, torch.rsqrt(running_var + settings.eps)])
    scratch = torch.empty(module.norm_act_scratch(shape), dtype=torch.float64)
    native.run(
        module.norm_act_forward,
        shape,
        x,
        weight,
        bias,
        training,
        settings.eps,
        settings.momentum,
        running_mean if training else None,
        running_var if training else None,
        y,
        *mean_and_invstd(statistics),
        coefficients,
        scratch,
    )
    if training and running_mean is not None and running_var is not None:
        _changed(running_mean, running_var)
    return statistics


def mean_and_invstd(statistics: Tensor) -> tuple[Tensor, native.At]:
    """The arrays that ``[2, groups, C]`` holds."""
    return statistics, native.At(statistics, statistics.numel() // 2 * statistics.element_size())


@recorded
def _changed(*buffers: Tensor) -> None:
    """Tells autograd what a kernel has changed."""
    torch.autograd.graph.increment_version(buffers)


def cpu_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    wants: Sequence[bool],
    settings: Settings,
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each where wanted; ``in_place`` leaves that of x in dy,
    which then has x's layout."""
    module = native.load()
    assert module is not None
    x, layout = dense(x)
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = map_memory.empty_like(x).copy_(dy)
    shape = shape_of(module, x, layout, settings)
    dx = None
    if wants[0]:
        dx = dy if in_place else map_memory.empty_like(x)
    dweight = torch.zeros_like(weight) if wants[1] and weight is not None else None
    dbias = torch.zeros_like(bias) if wants[2] and bias is not None else None
    scratch = torch.empty(module.norm_act_scratch(shape), dtype=torch.float64)
    native.run(
        module.norm_act_backward,
        shape,
        x,
        dy,
        weight,
        bias,
        *mean_and_invstd(statistics),
        settings.training,
        dx,
        dweight,
        dbias,
        scratch,
    )
    return dx, dweight, dbias


class Kernels(NamedTuple):
    """An implementation: y and the statistics, the gradients that are wanted, and the statistics
    with the coefficients by which a convolution normalizes x as it reads it."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    coefficients: Callable[..., tuple[Tensor, Tensor]]


KERNELS = {
    "cpu": Kernels(_cpu_forward, cpu_backward, _cpu_coefficients),
    "cuda": Kernels(norm_act_cuda.forward, norm_act_cuda.backward, norm_act_cuda.coefficients),
    "triton": Kernels(
        norm_act_triton.forward, norm_act_triton.backward, norm_act_triton.coefficients
    ),
}


# The sums that the gradients of weight and bias are come with x's.
_BESIDE = {1: 0, 2: 0}


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        settings: Settings,
        given: Tensor | None,
        kernels: Kernels,
    ) -> Tensor:
        y, statistics = kernels.forward(x, weight, bias, running_mean, running_var, settings, given)
        frozen = (None, None) if settings.training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, bias, statistics, *frozen)
        ctx.settings, ctx.kernels = settings, kernels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, running_mean, running_var = ctx.saved_tensors
        wants = wanted_gradients(ctx, _BESIDE)[:3]
        if torch.is_grad_enabled():
            arguments = (x, grads[0], weight, bias, statistics, running_mean, running_var)
            found = norm_act_second.differentiable_backward(*arguments, wants, ctx.settings)
            return (*found, *(None,) * 5)
        found = ctx.kernels.backward(x, grads[0], weight, bias, statistics, wants, ctx.settings)
        return (*found, *(None,) * 5)


def norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    negative_slope: float = 0.2,
    groups: int = 1,
    averaged: bool = False,
    impl: str = "auto",
    given: Tensor | Moments | None = None,
) -> Tensor:
    """See :func:`pygan.functional.norm_act`; the CPU's kernels do not take ``averaged``. With
    ``given``, from :func:`statistics` of x, the running statistics have followed already; only the
    kernels take it. It may also be what a convolution tells of x, which is used where kernels of a
    GPU run."""
    settings = checked_settings(
        x,
        running_mean,
        running_var,
        Settings(training, momentum, eps, activation, negative_slope, groups, averaged),
    )
    # Statistics that are given are those of the CPU's kernels, whatever is wished.
    chosen = "cpu"
    if not (isinstance(given, Tensor) and impl == "auto" and x.is_cpu):
        chosen = choose(
            impl, x, weight, bias, running_mean, running_var, averaged=settings.averaged
        )
    if chosen == "torch":
        if isinstance(given, Tensor):
            raise UserError("statistics are given, which only kernels take; leave them out")
        return norm_act_ref(x, running_mean, running_var, weight, bias, settings)
    if isinstance(given, Moments):
        parts = parts_for(given, chosen, settings)
        given = None
        if parts is not None:
            buffers = (running_mean, running_var)
            given, _ = norm_act_triton.merged(parts, weight, bias, *buffers, settings)
    arguments, kernels = (running_mean, running_var, settings, given), KERNELS[chosen]
    if torch.is_grad_enabled():
        return _NormAct.apply(x, weight, bias, *arguments, kernels)
    return kernels.forward(x, weight, bias, *arguments)[0]


def parts_for(moments: Moments | None, chosen: str, settings: Settings) -> Tensor | None:
    """The statistics of parts of x that a convolution took, where the kernels ``chosen`` are to
    use them."""
    if moments is None or not settings.training or moments.groups != settings.groups:
        return None
    # What merges them lets the running statistics follow group by group.
    if settings.averaged:
        return None
    return moments.parts if chosen in ("cuda", "triton") else None


def checked_settings(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, settings: Settings
) -> Settings:
    """The settings, with one group in evaluation.

    Raises:
        UserError: they do not fit each other or x.
        ValueError: as ``batch_norm`` does, where a channel has a single value.
    """
    training, _, _, activation, _, groups, averaged = settings
    if activation not in ACTIVATIONS:
        raise UserError(f"activation is {activation!r}; it is one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 2:
        raise UserError(f"the input has shape {tuple(x.shape)}; batch norm takes [N, C, ...]")
    if not training and (running_mean is None or running_var is None):
        raise UserError("running_mean and running_var are None; evaluation needs both")
    if training and (groups < 1 or x.shape[0] % groups):
        raise UserError(f"a batch of {x.shape[0]} does not divide into {groups} groups")
    if training and x.shape[0] // groups * x.shape[2:].numel() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    if not training:
        return settings._replace(groups=1, averaged=False)
    return settings._replace(averaged=averaged and groups > 1 and running_mean is not None)


def choose(impl: str, x: Tensor, *parameters: Tensor | None, averaged: bool = False) -> str:
    """The implementation that runs: one of ``KERNELS``, or "torch"."""

    def of_cpu() -> str | None:
        if averaged:
            return "running statistics follow the mean of groups only on a GPU"
        return supports_cpu(x, *parameters)

    # The usual answer first: it is asked for in every layer of every step.
    if impl == "auto" and dispatch.wished() == "auto" and of_cpu() is None:
        return "cpu"
    candidates = [
        ("cuda", lambda: _supports_cuda(x, *parameters)),
        ("triton", lambda: _supports_triton(x, *parameters)),
        ("cpu", of_cpu),
        ("torch", dispatch.always),
    ]
    return dispatch.choose("norm_act", impl, candidates)
