"""What helps a GAN along besides its loss: the settings of it, and the average of a generator."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pygan.augment import checked_policy
from pygan.errors import UserError
from pygan.ops.recorded import recorded


@dataclass(frozen=True)
class Tricks:
    """What a step does besides; by default nothing.

    Attributes:
        flip_labels: share of D's labels that are swapped by chance, real ones for generated ones
            and the other way round, for a loss with targets (Chintala et al. 2016, ganhacks).
        noise: standard deviation of normal noise on all that D sees (Arjovsky and Bottou 2017,
            arXiv:1701.04862; Sønderby et al. 2016, arXiv:1610.04490); `AdversarialStep.noise`
            changes it later.
        n_critic: updates of D for one of G, which comes with the first (Arjovsky et al. 2017,
            arXiv:1701.07875, algorithm 1).
        clip_grad: the L2 norm to which each network's gradient is clipped (Pascanu et al. 2012,
            arXiv:1211.5063), or None.
        r1: gamma of :func:`pygan.functional.r1_penalty`; 0 for none.
        r1_every: updates of D from one R1 penalty to the next, which counts so many times (Karras
            et al. 2019, arXiv:1912.04958, appendix B).
        gradient_penalty: lambda of :func:`pygan.functional.gradient_penalty`; 0 for none.
        augment: policy of :func:`pygan.functional.diff_augment`.

    Raises:
        UserError: a number out of its range, or an unknown policy.
    """

    flip_labels: float = 0.0
    noise: float = 0.0
    n_critic: int = 1
    clip_grad: float | None = None
    r1: float = 0.0
    r1_every: int = 16
    gradient_penalty: float = 0.0
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_policy(self.augment)
        for name, fits in (
            ("flip_labels", 0 <= self.flip_labels <= 1),
            ("noise", self.noise >= 0),
            ("n_critic", self.n_critic >= 1),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0),
            ("r1", self.r1 >= 0),
            ("r1_every", self.r1_every >= 1),
            ("gradient_penalty", self.gradient_penalty >= 0),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}, which is out of its range")

    def turn(self, step: int) -> tuple[bool, bool]:
        """Whether G learns in a step, counted from 0, and whether R1 comes with it."""
        return step % self.n_critic == 0, self.r1 > 0 and step % self.r1_every == 0

    @property
    def turns(self) -> int:
        """How many kinds of steps there are at most."""
        return (1 + (self.n_critic > 1)) * (1 + (self.r1 > 0 and self.r1_every > 1))


class Ema:
    """The exponential moving average of a network, buffers included: a ready network, in eval mode.

    Early updates forget faster, so that a short run's average is not mostly of its beginning: after
    n of them ``min(decay, (1 + n) / (10 + n))`` is kept, as TensorFlow's ExponentialMovingAverage
    does where it is told n.

    Attributes:
        network: what is averaged so far; it begins as a copy.
        decay: what is kept of it in each update, in the end; parameters and floating buffers follow
            as ``average = decay * average + (1 - decay) * network``, other buffers are copied.
        updates: float32 ``[]`` on the network's device, how many there were; infinite without
            ``warm_up``, where ``decay`` is kept from the first.

    Raises:
        UserError: a decay outside [0, 1).

    Source: Yazici et al. 2018, arXiv:1806.04498.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, *, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay is {decay}; give one from 0 to below 1")
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        device = next((p.device for p in self.network.parameters()), None)
        self.updates = torch.tensor(0.0 if warm_up else torch.inf, device=device)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes in the network as it is now."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        pairs = (
            *zip(self.network.parameters(), network.parameters(), strict=True),
            *zip(self.network.buffers(), network.buffers(), strict=True),
        )
        for average, value in pairs:
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        device = averages[0].device
        self.updates = self.updates.to(device)  # the same tensor unless the network was moved
        taken = (9 / (10 + self.updates)).clamp_min(1 - self.decay)
        self.updates.add_(1)
        if device.type == "cpu":
            _follow(averages, values, taken)
            return
        # A CUDA graph repeats what is read on the device.
        steps = torch._foreach_sub(values, averages)
        torch._foreach_mul_(steps, taken)
        torch._foreach_add_(averages, steps)


@recorded
def _follow(averages: list[Tensor], values: list[Tensor], taken: Tensor) -> None:
    torch._foreach_lerp_(averages, values, taken.item())
