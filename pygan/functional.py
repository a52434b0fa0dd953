"""Operations as functions, torch's argument order first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pygan.errors import UserError
from pygan.ops import gan_loss as _loss
from pygan.ops import image_batch as _batch
from pygan.ops import norm_act as _norm

__all__ = ["GanLoss", "gan_d_loss", "gan_g_loss", "image_batch", "norm_act"]


class GanLoss(NamedTuple):
    """A loss and what it was computed from, each float32 ``[]`` on the logits' device.

    ``d_real`` = mean D(x) and ``d_fake`` = mean D(G(z)) carry no gradient; ``d_real`` is None
    where no real logits were given.
    """

    loss: Tensor
    d_real: Tensor | None
    d_fake: Tensor


def norm_act(
    input: Tensor,
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
    """``activation(batch_norm(input))``, in one operation.

    Args:
        input: ``[N, C, *]``, contiguous or channels_last; float32 and bfloat16 run natively on a
            CPU, other types and devices as torch operations.
        running_mean, running_var: float32 ``[C]``, updated in place when ``training``; None for
            no running statistics.
        weight, bias: ``[C]`` or None.
        training: statistics of the batch, else the running ones.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        activation: "none", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of "leaky_relu".
        groups: training statistics are taken in this many equal runs of the batch; the running
            statistics follow them in order.
        impl: "auto", "cpu" or "torch".

    Returns:
        Tensor of the shape, dtype and layout of ``input``. Differentiable to any order.

    Raises:
        UserError: an unknown activation or implementation, sizes that do not fit.
        ValueError: one value a channel while training, as torch's batch norm.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    return _norm.norm_act(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        activation=activation,
        negative_slope=negative_slope,
        groups=groups,
        impl=impl,
    )


def gan_d_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    *,
    loss: str = "bce",
    real_target: float | Tensor = 1.0,
    fake_target: float | Tensor = 0.0,
    weight: float = 1.0,
    impl: str = "auto",
) -> GanLoss:
    """Discriminator loss ``weight * (mean BCE(real, real_target) + mean BCE(fake, fake_target))``.

    Args:
        real_logits, fake_logits: D before the sigmoid, any shapes, one dtype. The loss is finite
            and exact for any finite logit.
        loss: "bce" or "minimax": D's loss is the same in both.
        real_target, fake_target: a number or a tensor that broadcasts to the logits; smoothed,
            flipped and above 1 are all defined.
        weight: 0.5 gives the one-half scaled form.
        impl: "auto", "cpu", "triton" or "torch".

    Raises:
        UserError: an unknown loss or implementation, empty logits, a target that does not fit.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, equation 1.
    """
    _check_loss(loss)
    terms = (
        _loss.term_of("real", real_logits, real_target, weight),
        _loss.term_of("fake", fake_logits, fake_target, weight),
    )
    logits = torch.cat([real_logits.reshape(-1), fake_logits.reshape(-1)])
    value, probabilities = _loss.gan_loss(logits, terms, impl)
    return GanLoss(value, probabilities[0], probabilities[1])


def gan_g_loss(
    fake_logits: Tensor,
    real_logits: Tensor | None = None,
    *,
    loss: str = "bce",
    target: float | Tensor = 1.0,
    real_target: float | Tensor = 1.0,
    fake_target: float | Tensor = 0.0,
    weight: float = 1.0,
    impl: str = "auto",
) -> GanLoss:
    """Generator loss.

    "bce" is non-saturating: ``weight * mean BCE(fake, target)``, J_G = -mean log D(G(z)).
    "minimax" is zero-sum: ``-weight * (mean BCE(real, real_target) + mean BCE(fake,
    fake_target))``, L_G = -L_D; without ``real_logits`` its real term, which does not depend on
    G, is left out, and the gradient is the same.

    Args:
        fake_logits: D(G(z)) before the sigmoid, any shape.
        real_logits: D(x) before the sigmoid, for the full value of "minimax".
        target: of "bce"; real_target, fake_target: of "minimax", as D's.
        weight, impl: as in :func:`gan_d_loss`.

    Raises:
        UserError: as :func:`gan_d_loss`.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, section 3; Goodfellow 2016,
    arXiv:1701.00160, sections 3.2.2 and 3.2.3.
    """
    _check_loss(loss)
    if loss == "bce":
        term = _loss.term_of("fake", fake_logits, target, weight)
        value, probabilities = _loss.gan_loss(fake_logits.reshape(-1), (term,), impl)
        return GanLoss(value, None, probabilities[0])
    fake = _loss.term_of("fake", fake_logits, fake_target, -weight)
    if real_logits is None:
        value, probabilities = _loss.gan_loss(fake_logits.reshape(-1), (fake,), impl)
        return GanLoss(value, None, probabilities[0])
    real = _loss.term_of("real", real_logits, real_target, -weight)
    logits = torch.cat([real_logits.reshape(-1), fake_logits.reshape(-1)])
    value, probabilities = _loss.gan_loss(logits, (real, fake), impl)
    return GanLoss(value, probabilities[0], probabilities[1])


def _check_loss(loss: str) -> None:
    if loss not in ("bce", "minimax"):
        raise UserError(f"loss is {loss!r}; it is 'bce' (non-saturating) or 'minimax' (zero-sum)")


def image_batch(
    images: Tensor,
    index: Tensor,
    *,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """A batch in [-1, 1] from a set of uint8 images, in one pass.

    Args:
        images: uint8 ``[N, H, W, C]``.
        index: int64 ``[B]``, which images.
        flip: bool ``[B]``, which of them to mirror left to right; None for none.
        dtype: of the result.
        impl: "auto", "cpu", "triton" or "torch".

    Returns:
        ``[B, C, H, W]`` in channels_last, -1 for 0 and 1 for 255, exactly.

    Raises:
        UserError: wrong dtypes or shapes; an index outside the set (checked on a CPU only, where
            it costs no synchronisation).
    """
    return _batch.image_batch(images, index, flip=flip, dtype=dtype, impl=impl)
