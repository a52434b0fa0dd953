"""Binary cross-entropy losses of discriminator and generator, from logits, in one pass.

For logits x with targets t (any real number: smoothed, flipped, above 1) and weight w:

    loss = w * mean(max(x, 0) - x t + log(1 + exp(-|x|))) = w * mean BCE(sigmoid(x), t)
    dloss/dx = w * (sigmoid(x) - t) / n

D sums this over real (t = 1) and fake (t = 0). G, non-saturating, is J_G = -mean log D(G(z)):
fake with t = 1. G, zero-sum, is L_G = -L_D: the weights of D with the other sign. The one-half
scaled form is w = 1/2. The same pass gives mean sigmoid(x), which are D(x) and D(G(z)).

Saved: the gradient with respect to the logits. Sources: Goodfellow et al. 2014, arXiv:1406.2661,
equation 1 and section 3; Goodfellow 2016, arXiv:1701.00160, section 3.2; one-sided smoothing from
Salimans et al. 2016, arXiv:1606.03498.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError
from pygan.ops import cuda_native, dispatch, gpu, native
from pygan.ops.recorded import recorded


class Term(NamedTuple):
    """One run of the logits: how many, against what, with what weight."""

    size: int
    target: float | Tensor
    weight: float


def gan_loss_ref(logits: Tensor, terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """The definition in torch: loss ``[]`` and mean probabilities ``[len(terms)]``."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    loss = x.new_zeros(())
    probabilities = []
    for part, term in zip(x.split([t.size for t in terms]), terms, strict=True):
        # Filled on the device: a number that is copied there would be waited for.
        target = term.target
        if not isinstance(target, Tensor):
            target = torch.full_like(part, target)
        target = target.to(x).expand_as(part)
        loss = loss + term.weight * F.binary_cross_entropy_with_logits(part, target)
        probabilities.append(torch.sigmoid(part).mean())
    return loss, torch.stack(probabilities).detach()


def _no_target_grad(terms: tuple[Term, ...]) -> str | None:
    if any(isinstance(t.target, Tensor) and t.target.requires_grad for t in terms):
        return "a target needs a gradient"
    return None


def _supports_cpu(logits: Tensor, terms: tuple[Term, ...]) -> str | None:
    return dispatch.supports_cpu(logits) or _no_target_grad(terms)


def _supports_cuda(logits: Tensor, terms: tuple[Term, ...]) -> str | None:
    return dispatch.supports_cuda(logits) or _no_target_grad(terms)


def _supports_triton(logits: Tensor, terms: tuple[Term, ...]) -> str | None:
    unfit = gpu.unfit(logits.dtype)
    return unfit or dispatch.supports_triton(logits) or _no_target_grad(terms)


def _groups(logits: Tensor, grad: Tensor, out: Tensor, terms: tuple[Term, ...]) -> tuple[Any, ...]:
    """The terms as the extensions take them; ``terms`` keeps their targets alive."""
    step, start, groups = logits.element_size(), 0, []
    for i, term in enumerate(terms):
        targets = term.target if isinstance(term.target, Tensor) else None
        groups.append(
            (
                logits.data_ptr() + start * step,
                native.address(targets),
                0.0 if targets is not None else term.target,
                term.weight,
                term.size,
                grad.data_ptr() + start * step,
                out.data_ptr() + (1 + i) * out.element_size(),
            )
        )
        start += term.size
    return tuple(groups)


@recorded
def _cpu(logits: Tensor, grad: Tensor, out: Tensor, terms: tuple[Term, ...]) -> None:
    module = native.load()
    assert module is not None
    groups = _groups(logits, grad, out, terms)
    module.gan_loss(native.DTYPES[logits.dtype], groups, out.data_ptr())


def _cuda(logits: Tensor, grad: Tensor, out: Tensor, terms: tuple[Term, ...]) -> None:
    module = cuda_native.module()
    dtype, groups = gpu.DTYPES[logits.dtype], _groups(logits, grad, out, terms)
    scratch = out.new_empty(module.gan_loss_scratch(dtype, groups))
    cuda_native.run(module.gan_loss, logits, dtype, groups, out.data_ptr(), scratch.data_ptr())


def _triton(logits: Tensor, grad: Tensor, out: Tensor, terms: tuple[Term, ...]) -> None:
    from pygan.kernels import gan_loss as kernels

    kernels.gan_loss(logits, grad, out, terms)


_KERNELS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton}


class _GanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, terms: tuple[Term, ...], chosen: str
    ) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(logits)
        out = torch.empty(1 + len(terms), dtype=torch.float32, device=logits.device)
        _KERNELS[chosen](logits, grad, out, terms)
        ctx.save_for_backward(logits, grad)
        ctx.terms = terms
        loss, probabilities = out[0].clone(), out[1:].clone()
        ctx.mark_non_differentiable(probabilities)
        return loss, probabilities

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, grad = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss, _ = gan_loss_ref(logits, ctx.terms)
            return (*torch.autograd.grad(loss, logits, grads[0], create_graph=True), None, None)
        return grad * grads[0], None, None


def gan_loss(logits: Tensor, terms: tuple[Term, ...], impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Loss ``[]`` and mean probabilities ``[len(terms)]`` (float32) of flat ``logits [n]``, whose
    consecutive runs are described by ``terms`` (one or two, sizes adding up to n)."""
    chosen = dispatch.choose(
        "gan_loss",
        impl,
        [
            ("cuda", lambda: _supports_cuda(logits, terms)),
            ("triton", lambda: _supports_triton(logits, terms)),
            ("cpu", lambda: _supports_cpu(logits, terms)),
            ("torch", dispatch.always),
        ],
    )
    if chosen == "torch":
        return gan_loss_ref(logits, terms)
    return _GanLoss.apply(logits.contiguous(), terms, chosen)


def term_of(name: str, logits: Tensor, target: float | Tensor, weight: float) -> Term:
    """A term for ``logits``, its target checked and brought to one float or float32 ``[n]``."""
    return Term(logits.numel(), checked_target(name, logits, target), weight)


def checked_target(name: str, logits: Tensor, target: float | Tensor) -> float | Tensor:
    """A target for n logits as one float, or as ``[n]`` in float32 (float64 for such logits).

    Raises:
        UserError: there are no logits, or it does not broadcast to them.
    """
    if logits.numel() == 0:
        raise UserError(f"the {name} logits are empty; a loss needs at least one")
    if not isinstance(target, Tensor):
        return target
    try:
        target = target.to(logits.device).expand(logits.shape)
    except RuntimeError:
        raise UserError(
            f"the {name} target has shape {tuple(target.shape)}, which does not broadcast to "
            f"the logits' {tuple(logits.shape)}"
        ) from None
    if logits.dtype != torch.float64:
        target = target.float()
    return target.reshape(-1).contiguous()
