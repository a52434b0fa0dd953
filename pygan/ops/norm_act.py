"""Batch norm and activation as one operation, with statistics per group of the batch.

    y = f(z),  z = weight * xhat + bias,  xhat = (x - mean) * invstd,  invstd = 1/sqrt(var + eps)

Training: mean and (biased) variance over batch and space of each of ``groups`` equal runs of the
batch; the running statistics follow group by group, with the unbiased variance: the numbers that
``groups`` calls would give. Evaluation: the running statistics are mean and variance.

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
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError
from pygan.ops import dispatch, native

ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4}

_context = threading.local()


@contextlib.contextmanager
def batch_groups(count: int) -> Iterator[None]:
    """Inside, every fused batch norm in this thread takes its statistics in ``count`` equal runs
    of the batch, so that one call on several batches equals one call for each."""
    before = current_groups()
    _context.groups = count
    try:
        yield
    finally:
        _context.groups = before


def current_groups() -> int:
    """Groups that fused modules use now: 1 outside ``batch_groups``."""
    return getattr(_context, "groups", 1)


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


def norm_act_ref(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    groups: int,
) -> Tensor:
    """The definition in torch: one ``batch_norm`` call a group, then the activation."""
    z = [
        F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        for part in (x.chunk(groups) if training else [x])
    ]
    return activate(z[0] if len(z) == 1 else torch.cat(z), activation, negative_slope)


def _supports_cpu(x: Tensor, *parameters: Tensor | None) -> str | None:
    for parameter in parameters:
        if parameter is not None and parameter.dtype != torch.float32:
            return f"a parameter or buffer is {parameter.dtype}, not float32"
        if parameter is not None and not parameter.is_contiguous():
            return "a parameter or buffer is not contiguous"
    return dispatch.supports_cpu(x, *(p for p in parameters if p is not None))


def _dense(x: Tensor) -> tuple[Tensor, int]:
    """x in a layout the kernels address (itself wherever that is possible), and the layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    if x.dim() == 2 or (last is not None and x.is_contiguous(memory_format=last)):
        return (x if x.dim() > 2 or x.is_contiguous() else x.contiguous()), 0
    return x if x.is_contiguous() else x.contiguous(), 1


def _like(t: Tensor, x: Tensor, layout: int) -> Tensor:
    """t in exactly the strides of x."""
    if t.stride() == x.stride() and t.dtype == x.dtype:
        return t
    return torch.empty_like(x).copy_(t)


def _shape(x: Tensor, layout: int, groups: int, activation: str, slope: float) -> Any:
    module = native.load()
    assert module is not None
    return module.NormActShape(
        native.DTYPES[x.dtype],
        layout,
        x.shape[0],
        x.shape[1],
        x.shape[2:].numel(),
        groups,
        ACTIVATIONS[activation],
        slope,
        torch.get_num_threads(),
    )


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
        slope: float,
        groups: int,
    ) -> Tensor:
        module = native.load()
        assert module is not None
        x_dense, layout = _dense(x)
        y = torch.empty_like(x_dense)
        shape = _shape(x_dense, layout, groups, activation, slope)
        if training:
            mean, invstd = torch.empty(2, groups, x.shape[1])
            scratch = torch.empty(module.norm_act_scratch(shape), dtype=torch.float64)
        else:
            assert running_mean is not None and running_var is not None
            mean, invstd, scratch = running_mean, torch.rsqrt(running_var + eps), None
        at = native.address
        module.norm_act_forward(
            shape,
            at(x_dense),
            at(weight),
            at(bias),
            training,
            eps,
            momentum,
            at(running_mean) if training else 0,
            at(running_var) if training else 0,
            at(y),
            at(mean),
            at(invstd),
            at(scratch),
        )
        if training and running_mean is not None and running_var is not None:
            torch.autograd.graph.increment_version([running_mean, running_var])
        ctx.save_for_backward(x, weight, bias, mean, invstd, None if training else running_var)
        ctx.settings = training, momentum, eps, activation, slope, groups
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, running_var = ctx.saved_tensors
        training, _, _, activation, slope, groups = ctx.settings
        (dy,) = grads
        wants = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _differentiable_grads(
                dy, x, weight, bias, None if training else mean, running_var, wants, ctx.settings
            )
            return (*found, *[None] * 8)
        module = native.load()
        assert module is not None
        x_dense, layout = _dense(x)
        dy = _like(dy, x_dense, layout)
        shape = _shape(x_dense, layout, groups, activation, slope)
        dx = torch.empty_like(x_dense) if wants[0] else None
        dweight = torch.zeros_like(weight) if wants[1] else None
        dbias = torch.zeros_like(bias) if wants[2] else None
        scratch = torch.empty(module.norm_act_scratch(shape), dtype=torch.float64)
        at = native.address
        module.norm_act_backward(
            shape,
            at(x_dense),
            at(dy),
            at(weight),
            at(bias),
            at(mean),
            at(invstd),
            training,
            at(dx),
            at(dweight),
            at(dbias),
            at(scratch),
        )
        return (dx, dweight, dbias, *[None] * 8)


def _differentiable_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    wants: tuple[bool, ...],
    settings: tuple[Any, ...],
) -> list[Tensor | None]:
    """Gradients as functions of dy, x, weight and bias: those of the reference."""
    tensors = zip((x, weight, bias), wants, strict=True)
    inputs = [t for t, wanted in tensors if wanted and t is not None]
    y = norm_act_ref(x, running_mean, running_var, weight, bias, *settings)
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(found) if wanted else None for wanted in wants]


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
    impl: str = "auto",
) -> Tensor:
    """See :func:`pygan.functional.norm_act`."""
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
    chosen = dispatch.choose(
        "norm_act",
        impl,
        [
            ("cpu", lambda: _supports_cpu(x, weight, bias, running_mean, running_var)),
            ("torch", dispatch.always),
        ],
    )
    settings = training, momentum, eps, activation, negative_slope, groups if training else 1
    if chosen == "cpu":
        return _NormAct.apply(x, weight, bias, running_mean, running_var, *settings)
    return norm_act_ref(x, running_mean, running_var, weight, bias, *settings)
