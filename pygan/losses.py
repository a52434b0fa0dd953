"""Losses of discriminator and generator, from logits.

    r, f     logits D(x), D(G(z));  t_r, t_f  targets of D;  t  target of G
    bce(x, t) = mean(softplus(x) - x t),  softplus(x) = log(1 + exp(x))

    name                    D                                     G
    bce                     bce(r, t_r) + bce(f, t_f)             bce(f, t)
    minimax                 as bce                                -(bce(r, t_r) + bce(f, t_f))
    logistic, softplus      mean softplus(-r) + mean softplus(f)  mean softplus(-f)
    hinge                   mean relu(1-r) + mean relu(1+f)       -mean f
    lsgan                   mean (r-t_r)^2 + mean (f-t_f)^2       mean (f-t)^2
    wasserstein             mean f - mean r                       -mean f
    relativistic            bce(r - mean f, t_r)                  bce(f - mean r, t)
                            + bce(f - mean r, t_f)                + bce(r - mean f, t_f)
    relativistic_pairing    mean softplus(-(r-f))                 mean softplus(-(f-r))

"logistic" is "bce" with targets of 1 and 0. These and "minimax" run in the fused kernel of
``ops/gan_loss.py``, the others as torch operations, in float32 for shorter types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pygan.errors import UserError
from pygan.ops.gan_loss import checked_target, gan_loss, term_of

Target = float | Tensor


class GanLoss(NamedTuple):
    """A loss and what it was computed from, each float32 (float64 of such logits) ``[]`` on the
    logits' device.

    ``d_real`` = mean D(x) and ``d_fake`` = mean D(G(z)) carry no gradient; ``d_real`` is None
    where no real logits were given.
    """

    loss: Tensor
    d_real: Tensor | None
    d_fake: Tensor


class _Apart(NamedTuple):
    """A loss in which real and fake logits do not meet: D's two terms and G's one, each of logits
    and a target."""

    real: Callable[[Tensor, Target], Tensor]
    fake: Callable[[Tensor, Target], Tensor]
    generator: Callable[[Tensor, Target], Tensor]


def _softplus(x: Tensor) -> Tensor:
    # Not torch's softplus, which is x itself from 20 on: too early for float64.
    return -F.logsigmoid(-x)


def _bce(x: Tensor, target: Target) -> Tensor:
    # In this form nothing cancels where x is large and right.
    return (target * _softplus(-x) + (1 - target) * _softplus(x)).mean()


def _squares(x: Tensor, target: Target) -> Tensor:
    return (x - target).square().mean()


def _mean(x: Tensor, target: Target) -> Tensor:
    return x.mean()


def _minus_mean(x: Tensor, target: Target) -> Tensor:
    return -x.mean()


def _above_one(x: Tensor, target: Target) -> Tensor:
    return F.relu(1 - x).mean()


def _below_minus_one(x: Tensor, target: Target) -> Tensor:
    return F.relu(1 + x).mean()


def _against_average(
    first: Tensor, second: Tensor, first_target: Target, second_target: Target
) -> Tensor:
    above, below = first - second.mean(), second - first.mean()
    return _bce(above, first_target) + _bce(below, second_target)


def _in_pairs(first: Tensor, second: Tensor, first_target: Target, second_target: Target) -> Tensor:
    return _softplus(second - first).mean()


_FUSED = ("bce", "minimax", "logistic", "softplus")
_APART = {
    "hinge": _Apart(_above_one, _below_minus_one, _minus_mean),
    "lsgan": _Apart(_squares, _squares, _squares),
    "wasserstein": _Apart(_minus_mean, _mean, _minus_mean),
}
# Of the logits that are to be higher, the others, and the targets of both.
_PAIRED = {"relativistic": _against_average, "relativistic_pairing": _in_pairs}
_TARGETED = ("bce", "minimax", "lsgan", "relativistic")

NAMES = (*_FUSED, *_APART, *_PAIRED)


def has_kernel(loss: str) -> bool:
    """Whether it is a binary cross-entropy, which one fused pass computes."""
    return loss in _FUSED


def is_paired(loss: str) -> bool:
    """Whether every logit's term depends on logits of the other kind, so that D's loss needs both
    at once and G's needs D(x)."""
    return loss in _PAIRED


def check_loss(loss: str, impl: str = "auto", **targets: tuple[Target, float]) -> None:
    """Checks the name, and of each target, given with its default, that the loss has one.

    Raises:
        UserError: it has not, or the implementation is not one of this loss.
    """
    if loss not in NAMES:
        raise UserError(f"loss is {loss!r}; it is one of {', '.join(NAMES)}")
    if loss not in _FUSED and impl not in ("auto", "torch"):
        raise UserError(
            f"loss {loss!r} has no implementation {impl!r}; it has torch and auto, or choose one "
            f"of {', '.join(_FUSED)}"
        )
    for name, (target, default) in targets.items():
        given = isinstance(target, Tensor) or target != default
        if given and loss not in _TARGETED:
            raise UserError(
                f"{name} was given and loss {loss!r} has no targets; leave it out, or choose one "
                f"of {', '.join(_TARGETED)}"
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
    """Discriminator loss, ``weight`` times:

    - "bce", "minimax": ``mean BCE(real, real_target) + mean BCE(fake, fake_target)``;
    - "logistic" or "softplus": ``mean softplus(-real) + mean softplus(fake)``, which is "bce" with
      targets of 1 and 0;
    - "hinge": ``mean relu(1 - real) + mean relu(1 + fake)``;
    - "lsgan": ``mean (real - real_target)^2 + mean (fake - fake_target)^2``;
    - "wasserstein": ``mean fake - mean real``, for a D that something else keeps Lipschitz;
    - "relativistic": ``mean BCE(real - mean fake, real_target) + mean BCE(fake - mean real,
      fake_target)``;
    - "relativistic_pairing": ``mean softplus(-(real - fake))``, logit by logit in their order.

    Args:
        real_logits, fake_logits: D before the sigmoid, any shapes, one dtype; float16 and bfloat16
            are summed in float32. As many of one as of the other for "relativistic_pairing". The
            loss is finite and exact for any logit up to 1e4 in size, "bce" for any finite one.
        loss: one of the names above.
        real_target, fake_target: a number or a tensor that broadcasts to the logits; smoothed,
            flipped and above 1 are all defined. Of "bce", "minimax", "lsgan" and "relativistic".
        weight: 0.5 gives the one-half scaled form.
        impl: "auto", "cpu", "triton" or "torch"; the last for "hinge" and those below it.

    Returns:
        A :class:`GanLoss`. Differentiable to any order.

    Raises:
        UserError: an unknown loss or implementation, empty logits, a target that does not fit or
            that the loss does not have, logits that do not pair.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, equation 1; Karras et al. 2019,
    arXiv:1812.04948 (logistic); Lim and Ye 2017, arXiv:1705.02894 (hinge); Mao et al. 2017,
    arXiv:1611.04076 (lsgan); Arjovsky et al. 2017, arXiv:1701.07875 (wasserstein);
    Jolicoeur-Martineau 2018, arXiv:1807.00734 (relativistic, its average form); Huang et al. 2025,
    arXiv:2501.05441, section 2 (relativistic_pairing).
    """
    check_loss(loss, impl, real_target=(real_target, 1.0), fake_target=(fake_target, 0.0))
    if loss in _FUSED:
        terms = (
            term_of("real", real_logits, real_target, weight),
            term_of("fake", fake_logits, fake_target, weight),
        )
        logits = torch.cat([real_logits.reshape(-1), fake_logits.reshape(-1)])
        value, probabilities = gan_loss(logits, terms, impl)
        return GanLoss(value, probabilities[0], probabilities[1])
    if loss in _APART:
        real, d_real = d_loss_term("real", real_logits, real_target, weight, loss=loss)
        fake, d_fake = d_loss_term("fake", fake_logits, fake_target, weight, loss=loss)
        return GanLoss(real + fake, d_real, d_fake)
    r, t_r = _prepared("real", real_logits, real_target)
    f, t_f = _prepared("fake", fake_logits, fake_target)
    _check_pairs(loss, r, f)
    return GanLoss(weight * _PAIRED[loss](r, f, t_r, t_f), _probability(r), _probability(f))


def d_loss_term(
    side: str, logits: Tensor, target: float | Tensor, weight: float = 1.0, *, loss: str = "bce"
) -> tuple[Tensor, Tensor]:
    """What the "real" or the "fake" logits add to :func:`gan_d_loss`, and their mean probability,
    for a loss that is not paired."""
    if loss in _FUSED:
        value, probabilities = gan_loss(
            logits.reshape(-1), (term_of(side, logits, target, weight),)
        )
        return value, probabilities[0]
    x, target = _prepared(side, logits, target)
    term = _APART[loss].real if side == "real" else _APART[loss].fake
    return weight * term(x, target), _probability(x)


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
    """Generator loss, ``weight`` times:

    - "bce", non-saturating: ``mean BCE(fake, target)``, J_G = -mean log D(G(z));
    - "minimax", zero-sum: ``-(mean BCE(real, real_target) + mean BCE(fake, fake_target))``,
      L_G = -L_D; without ``real_logits`` its real term, which does not depend on G, is left out,
      and the gradient is the same;
    - "logistic" or "softplus": ``mean softplus(-fake)``, which is "bce" with a target of 1;
    - "hinge", "wasserstein": ``-mean fake``;
    - "lsgan": ``mean (fake - target)^2``;
    - "relativistic": ``mean BCE(fake - mean real, target) + mean BCE(real - mean fake,
      fake_target)``;
    - "relativistic_pairing": ``mean softplus(-(fake - real))``.

    Args:
        fake_logits: D(G(z)) before the sigmoid, any shape.
        real_logits: D(x) before the sigmoid: what the relativistic losses compare with, and for
            the full value of "minimax".
        loss: one of the names above.
        target: of "bce", "lsgan" and "relativistic".
        real_target, fake_target: as D's; of "minimax", and ``fake_target`` of "relativistic" too.
        weight, impl: as in :func:`gan_d_loss`.

    Returns:
        A :class:`GanLoss`. Differentiable to any order.

    Raises:
        UserError: as :func:`gan_d_loss`; a relativistic loss without ``real_logits``.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, section 3; Goodfellow 2016,
    arXiv:1701.00160, sections 3.2.2 and 3.2.3; the others as :func:`gan_d_loss`.
    """
    check_loss(
        loss,
        impl,
        target=(target, 1.0),
        real_target=(real_target, 1.0),
        fake_target=(fake_target, 0.0),
    )
    if loss in _PAIRED:
        if real_logits is None:
            raise UserError(
                f"loss is {loss!r} and real_logits is None; G's loss compares D(G(z)) with D(x), "
                "so give both"
            )
        f, t_f = _prepared("fake", fake_logits, target)
        r, t_r = _prepared("real", real_logits, fake_target)
        _check_pairs(loss, r, f)
        return GanLoss(weight * _PAIRED[loss](f, r, t_f, t_r), _probability(r), _probability(f))
    if loss == "minimax" and real_logits is not None:
        terms = (
            term_of("real", real_logits, real_target, -weight),
            term_of("fake", fake_logits, fake_target, -weight),
        )
        logits = torch.cat([real_logits.reshape(-1), fake_logits.reshape(-1)])
        value, probabilities = gan_loss(logits, terms, impl)
        return GanLoss(value, probabilities[0], probabilities[1])
    d_real = None if real_logits is None else _probability(_prepared("real", real_logits, 1.0)[0])
    if loss in _FUSED:
        aim, factor = (fake_target, -weight) if loss == "minimax" else (target, weight)
        term = term_of("fake", fake_logits, aim, factor)
        value, probabilities = gan_loss(fake_logits.reshape(-1), (term,), impl)
        return GanLoss(value, d_real, probabilities[0])
    f, aim = _prepared("fake", fake_logits, target)
    return GanLoss(weight * _APART[loss].generator(f, aim), d_real, _probability(f))


def _prepared(side: str, logits: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flat logits in float32 or float64, and a target checked and alike."""
    target = checked_target(side, logits, target)
    flat = logits.reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.float(), target


def _probability(x: Tensor) -> Tensor:
    return torch.sigmoid(x.detach()).mean()


def _check_pairs(loss: str, real: Tensor, fake: Tensor) -> None:
    if loss == "relativistic_pairing" and real.numel() != fake.numel():
        raise UserError(
            f"there are {real.numel()} real and {fake.numel()} fake logits; loss {loss!r} compares "
            "them one by one, so give as many of both"
        )
