"""One alternating update of discriminator and generator.

Two classes with one interface: ``AdversarialStep`` is the fast one, ``ReferenceStep`` the loop as
it is usually written. In float32 they compute the same numbers up to rounding.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygan.augment import diff_augment
from pygan.cuda_graph import CudaGraphs
from pygan.errors import UserError
from pygan.functional import image_batch
from pygan.fuse import why_not_mergeable
from pygan.losses import check_loss, d_loss_term, gan_d_loss, gan_g_loss, has_kernel, is_paired
from pygan.memory_order import MemoryOrder
from pygan.ops import map_memory
from pygan.ops.norm_act import batch_groups
from pygan.penalties import gradient_penalty, r1_penalty
from pygan.repeated_step import Inputs, RepeatedStep
from pygan.step_graph import GraphedStep
from pygan.step_program import ProgrammedStep
from pygan.tricks import Ema, Tricks

logger = logging.getLogger("pygan")

_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_MERGED = 1 << 20  # bytes of a step's images, in float32 on a CPU


# D's of real and of generated images: of all, or of each.
Targets = tuple[float | Tensor, float | Tensor]


class StepResult(NamedTuple):
    """Float32 ``[]`` tensors on the device, which no later step changes; reading them is the
    caller's synchronisation.

    ``d_real`` = mean D(x), ``d_fake`` and ``d_fake_after`` = mean D(G(z)) before and after D's
    update.
    """

    loss_d: Tensor
    loss_g: Tensor
    d_real: Tensor
    d_fake: Tensor
    d_fake_after: Tensor


def resolve_amp(amp: str, device: torch.device) -> str:
    """ "off", "bf16" or "fp16" for a wish that may be "auto".

    Auto takes bfloat16 where the device computes in it, float16 on older GPUs, else float32.

    Raises:
        UserError: an unknown name.
    """
    if amp in _DTYPES:
        return amp
    if amp != "auto":
        raise UserError(f"amp is {amp!r}; it is 'auto', 'off', 'bf16' or 'fp16'")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        # torch has no public question for this; without an answer float32 is always right.
        fast = any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return "bf16" if fast else "off"
    return "off"


class _Step:
    """Settings that both steps share."""

    def __init__(
        self,
        G: nn.Module,
        D: nn.Module,
        opt_g: torch.optim.Optimizer,
        opt_d: torch.optim.Optimizer,
        *,
        loss: str = "bce",
        loss_weight: float = 1.0,
        real_target: float = 1.0,
        amp: str = "auto",
        graph: str = "auto",
        merge: bool | str = "auto",
        generator: torch.Generator | None = None,
        tricks: Tricks | None = None,
        ema: Ema | None = None,
    ) -> None:
        self.tricks = Tricks() if tricks is None else tricks
        flips = (self.tricks.flip_labels, 0.0)
        check_loss(loss, real_target=(real_target, 1.0), flip_labels=flips)
        if graph not in ("auto", "off", "on"):
            raise UserError(f"graph is {graph!r}; it is 'auto', 'off' or 'on'")
        if merge not in (True, False, "auto"):
            raise UserError(f"merge is {merge!r}; it is True, False or 'auto'")
        self._G, self._D = _plain(G), _plain(D)
        if isinstance(list(D.modules())[-1], nn.Sigmoid):
            raise UserError(
                "the discriminator ends in a Sigmoid; the losses take logits, so remove it"
            )
        self.G, self.D, self.opt_g, self.opt_d = G, D, opt_g, opt_d
        self.loss, self.loss_weight, self.real_target = loss, loss_weight, real_target
        self.device = next(D.parameters()).device
        self.amp = resolve_amp(amp, self.device)
        self.merge = merge
        self._spares_memory = False
        self.graph = graph
        self.generator = generator
        self.ema = ema
        self.totals: Tensor | None = None
        self.updates = 0
        double = next(D.parameters()).dtype == torch.float64
        zero = torch.zeros((), device=self.device, dtype=torch.float64 if double else torch.float32)
        self._of_g = zero, zero.clone()
        self._noise: Tensor | None = None
        self.noise = self.tricks.noise
        scaling = self.amp == "fp16"
        self._scaler_d = torch.amp.GradScaler(self.device.type, enabled=scaling)
        self._scaler_g = torch.amp.GradScaler(self.device.type, enabled=scaling)

    def __call__(self, real: Tensor, z: Tensor | None = None) -> StepResult:
        """One update of D, then one of G.

        Args:
            real: ``[N, C, H, W]``, float in [-1, 1] or uint8.
            z: latent vectors for G, ``[N, nz, 1, 1]``; drawn from N(0, 1) when None.

        Raises:
            UserError: no z is given and G does not tell its length.
        """
        return self._run(Inputs(real, z=z))

    def gathered(
        self, images: Tensor, index: Tensor, *, flip: Tensor | None = None, z: Tensor | None = None
    ) -> StepResult:
        """The same on ``image_batch(images, index, flip=flip)``, gathered as part of the step.

        Args:
            images: ``[M, H, W, C]`` uint8 on the device, the same tensor in every step.
            index: ``[N]`` int64 on the device.
            flip: ``[N]`` bool on the device, or None.
            z: as above.

        Raises:
            UserError: as above, and as :func:`pygan.functional.image_batch`.
        """
        return self._run(Inputs(None, images, index, flip, z))

    def several(
        self, images: Tensor, index: Tensor, *, flip: Tensor | None = None
    ) -> list[StepResult]:
        """Steps of :meth:`gathered`, one after another, with z drawn: the same numbers bit for bit.

        Where the step is a CUDA graph, one replay makes as many of them as were measured to be
        fastest.

        Args:
            images: as above.
            index: ``[K, N]`` int64 on the device, a row for each step.
            flip: ``[K, N]`` bool on the device, or None.

        Raises:
            UserError: as above.
        """
        return self._run_several(Inputs(None, images, index, flip))

    @property
    def at_once(self) -> int:
        """Steps that it gains to give :meth:`several` now; 1 where that gains nothing."""
        return 1

    def _run(self, inputs: Inputs) -> StepResult:
        result = self._once(inputs)
        # Not as part of it: what repeats a step repeats no Python.
        self.updates += 1
        return result

    def _once(self, inputs: Inputs) -> StepResult:
        return self.run_eagerly(inputs)

    def _run_several(self, inputs: Inputs) -> list[StepResult]:
        assert inputs.which is not None
        return [self._run(inputs.at(i)) for i in range(len(inputs.which))]

    def run_eagerly(self, inputs: Inputs) -> StepResult:
        """One update, operation by operation, whose number is `updates`; it does not count it."""
        real, z = self._real(inputs), inputs.z
        if z is None:
            shape = (real.shape[0], _latent_size(self._G), 1, 1)
            z = torch.randn(shape, device=self.device, generator=self.generator)
        result = self._update(real, z)
        if self.totals is not None:
            self.totals.add_(torch.stack(result))
        return result

    def _real(self, inputs: Inputs) -> Tensor:
        if inputs.real is not None:
            return self._prepared(inputs.real)
        assert inputs.images is not None and inputs.which is not None
        dtype = _DTYPES[self.amp]
        return image_batch(inputs.images, inputs.which, flip=inputs.flip, dtype=dtype)

    def _update(self, real: Tensor, z: Tensor) -> StepResult:
        raise AssertionError("a step defines its update")

    def _update_g(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and mean D(G(z))."""
        raise AssertionError("a step defines how G learns")

    def _turn_of_g(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """G's update, or in a step without one what the last one gave."""
        learns, _ = self.tricks.turn(self.updates)
        if not learns:
            loss, probability = (value.clone() for value in self._of_g)
            return loss, probability
        found = self._update_g(real, fake)
        if self.tricks.n_critic > 1:
            # In place, where the steps until G's next turn read them.
            for kept, value in zip(self._of_g, found, strict=True):
                kept.copy_(value)
        if self.ema is not None:
            self.ema.update(self._G)
        return found

    def _generated(self, z: Tensor) -> Tensor:
        # A parallel G that is called waits for its backward.
        learns, _ = self.tricks.turn(self.updates)
        fake: Tensor = (self.G if learns else self._G)(z)
        return fake

    def _shown(self, images: Tensor) -> Tensor:
        """Images as D sees them."""
        if self.tricks.augment:
            images = diff_augment(images, self.tricks.augment, generator=self.generator)
        if self._noise is not None:
            drawn = torch.empty_like(images).normal_(generator=self.generator)
            images = images + drawn * self._noise.to(images.dtype)
        return images

    def _targets(self, count: int) -> Targets:
        """D's targets of ``count`` real and as many generated images, ``[count]`` where they
        differ."""
        share = self.tricks.flip_labels
        if not share:
            return self.real_target, 0.0
        drawn = torch.rand((2, count), device=self.device, generator=self.generator)
        real, fake = drawn < share
        return torch.where(real, 0.0, self.real_target), torch.where(fake, self.real_target, 0.0)

    def _add_penalties(self, real: Tensor, fake: Tensor) -> None:
        tricks = self.tricks
        terms = []
        if tricks.turn(self.updates)[1]:
            terms.append(0.5 * tricks.r1 * tricks.r1_every * r1_penalty(self._D, real))
        if tricks.gradient_penalty:
            penalty = gradient_penalty(self._D, real, fake, generator=self.generator)
            terms.append(tricks.gradient_penalty * penalty)
        for term in terms:
            self._scaler_d.scale(term).backward()

    def _finish(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        if self.tricks.clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.tricks.clip_grad)
        scaler.step(optimizer)
        scaler.update()

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on what D sees; may be set between two steps."""
        return self._noise_now

    @noise.setter
    def noise(self, deviation: float) -> None:
        self._noise_now = deviation
        if self._noise is None and deviation:
            self._noise = torch.zeros((), device=self.device)
        if self._noise is not None:
            # In place: a graph goes on with it.
            self._noise.fill_(deviation)

    def _prepared(self, real: Tensor) -> Tensor:
        if real.dtype != torch.uint8:
            return real
        last = real.permute(0, 2, 3, 1)
        index = torch.arange(real.shape[0], device=real.device)
        dtype = _DTYPES[self.amp]
        return image_batch(last.contiguous(), index, dtype=dtype)

    def _autocast(self) -> torch.autocast:
        enabled = self.amp != "off"
        dtype = _DTYPES[self.amp] if enabled else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def state_dict(self) -> dict[str, Any]:
        """State of the gradient scalers (empty unless fp16), the place among the steps, and the
        average of G."""
        return {
            "scaler_g": self._scaler_g.state_dict(),
            "scaler_d": self._scaler_d.state_dict(),
            "updates": self.updates,
            "of_g": self._of_g,
            "ema": None if self.ema is None else self.ema.network.state_dict(),
            "ema_updates": None if self.ema is None else self.ema.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._scaler_g.load_state_dict(state["scaler_g"])
        self._scaler_d.load_state_dict(state["scaler_d"])
        self.updates = state["updates"]
        for kept, value in zip(self._of_g, state["of_g"], strict=True):
            kept.copy_(value)
        if self.ema is not None and state["ema"] is not None:
            self.ema.network.load_state_dict(state["ema"])
            # A state without it is of an average that kept one share from the first update.
            self.ema.updates.fill_(float(state.get("ema_updates", torch.inf)))


def _plain(network: nn.Module) -> nn.Module:
    """The network itself, which a parallel one holds."""
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = network.module
        return inner
    return network


def _latent_size(G: nn.Module) -> int:
    nz = getattr(G, "nz", None)
    if isinstance(nz, int):
        return nz
    for layer in G.modules():
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d, nn.Conv2d)):
            return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    raise UserError("no z was given and the generator does not tell its length; pass z")


@contextlib.contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters get no gradient, so none is computed."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


class AdversarialStep(_Step):
    """The fast update: ``result = step(real, z=None)``.

    - D sees real and generated images as one batch of 2N, with statistics for each half and running
      statistics in order: the numbers of two calls in half the launches. Where D holds something
      that may mix samples, and in float32 on a CPU, where the halves fit the caches better, it is
      called twice.
    - G runs once; its images serve D's update and, with D's new weights, G's.
    - D is constant while G learns: its weight gradients are not computed.
    - Losses, their gradients and the mean probabilities come from one pass over the logits.
    - Nothing is read back from the device.
    - On a CUDA device the whole step is one graph, after three steps as usual for every shape, and
      one graph holds several of those that are given together, where that is faster: see
      :mod:`pygan.step_graph`.
    - On a CPU it is a program of its operations, after two steps as usual for every shape: see
      :mod:`pygan.step_program`.

    Convolution weights are brought to channels_last, in place.

    Args:
        G, D: networks; D returns logits, any shape with the batch first. Fuse them first
            (:func:`pygan.fuse`) for the fast layers, and wrap them in DistributedDataParallel last,
            with ``broadcast_buffers=False``: gradients are exchanged in one backward of each.
            Bring their weights to channels_last before, which is faster.
        opt_g, opt_d: torch optimizers.
        loss: a name that :func:`pygan.functional.gan_d_loss` knows: "bce" (non-saturating),
            "minimax" (zero-sum; ``loss_g`` without the term that does not depend on G), "logistic",
            "hinge", "lsgan", "wasserstein", "relativistic" or "relativistic_pairing". For the last
            two G's update asks D about the real images once more, without gradients.
        loss_weight: 0.5 for the one-half scaled losses.
        real_target: below 1 for one-sided label smoothing (Salimans et al. 2016), where the loss
            has targets.
        amp: "auto", "off", "bf16" or "fp16" (with a gradient scaler for each optimizer).
        graph: "auto" captures a CUDA graph, or on a CPU a program, where that repeats all that a
            step does, and else says once in the log what hinders it; "on" raises then; "off". A
            graph needs optimizers with ``capturable=True``; a program is made of networks with code
            of their own only where this is "on". Changed hyperparameters, loaded states and train
            or eval mode are seen, on a CPU hooks and a layer's numbers too; after another change in
            the networks, on a GPU of a layer's momentum, say, or of its hooks, call
            :meth:`recapture`. A learning rate that changes often is best a tensor on the device,
            filled in place.
        merge: one call of D for both halves, which is faster: "auto" (where it is known to be the
            same, and in float32 on a CPU for images of up to 1 MiB a step, because the maps of both
            halves take more memory), True or False to force.
        generator: for z and all else that is drawn.
        tricks: what helps besides, :class:`pygan.Tricks`. Where steps differ by turns, each kind
            has a graph, or a program, of its own.
        ema: an average of G, updated after each of its updates.

    Attributes:
        totals: None, or a float32 ``[5]`` on the device, to which every step adds its result.

    Raises:
        UserError: an unknown setting, a target for a loss without, a D that ends in a sigmoid, or a
            graph that has to be and is not for this device.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1 with one step of D.
    """

    def __init__(
        self,
        G: nn.Module,
        D: nn.Module,
        opt_g: torch.optim.Optimizer,
        opt_d: torch.optim.Optimizer,
        **settings: Any,
    ) -> None:
        super().__init__(G, D, opt_g, opt_d, **settings)
        for module in (G, D):
            # A parallel network has laid out its exchange for the weights as they are.
            if module is _plain(module) and any(p.dim() == 4 for p in module.parameters()):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.merge == "auto":
            self._spares_memory = self.device.type == "cpu" and self.amp == "off"
            reason = why_not_mergeable(self._D)
            self.merge = reason is None
            if reason is not None:
                logger.info("D is called twice a step, because %s", reason)
        if self.graph == "on" and self.device.type not in ("cpu", "cuda"):
            raise UserError(
                f"graph is 'on' and the networks are on {self.device}; a step is captured on a "
                "CUDA device and on a CPU, so give 'auto' or 'off'"
            )
        self._graphed: RepeatedStep[Any] | None = None
        if self.graph == "off":
            return
        required = self.graph == "on"
        if self.device.type == "cuda":
            self._graphed = GraphedStep(self, CudaGraphs(self.device), required=required)
        elif self.device.type == "cpu":
            self._graphed = ProgrammedStep(self, required=required)

    def _finish(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        if self.device.type != "cpu":
            super()._finish(network, optimizer, scaler)
            return
        if not optimizer.state:
            # What it makes now stays; memory that maps have left is not kept beside it.
            map_memory.give_back()
        with MemoryOrder():
            super()._finish(network, optimizer, scaler)

    def _once(self, inputs: Inputs) -> StepResult:
        return self.run_eagerly(inputs) if self._graphed is None else self._graphed(inputs)

    def _run_several(self, inputs: Inputs) -> list[StepResult]:
        if self._graphed is None or self.tricks.turns > 1:
            return super()._run_several(inputs)
        found = self._graphed.several(inputs)
        self.updates += len(found)
        return found

    @property
    def at_once(self) -> int:
        return 1 if self._graphed is None or self.tricks.turns > 1 else self._graphed.at_once

    def recapture(self) -> None:
        """Drops the graphs; the next steps make them anew, from the networks as they are then."""
        if self._graphed is not None:
            self._graphed.forget()

    def _update(self, real: Tensor, z: Tensor) -> StepResult:
        # Not only before G's own update, or its gradients would lie about through D's.
        self.opt_g.zero_grad(set_to_none=True)
        with self._autocast():
            fake = self._generated(z)
        targets = self._targets(len(real))
        seen = self._shown(real), self._shown(fake.detach())
        loss_d, d_real, d_fake = self._update_d(*seen, targets)
        loss_g, d_fake_after = self._turn_of_g(real, fake)
        return StepResult(loss_d, loss_g, d_real, d_fake, d_fake_after)

    def _update_d(
        self, real: Tensor, fake: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.opt_d.zero_grad(set_to_none=True)
        together = self._merges(real) or is_paired(self.loss)
        gradients = self._gradients_at_once if together else self._separate_gradients
        # First, so that the backward that follows, which a parallel D shares, takes all along.
        self._add_penalties(real, fake)
        losses = gradients(real, fake, targets)
        self._finish(self.D, self.opt_d, self._scaler_d)
        return losses

    def _merges(self, real: Tensor) -> bool:
        if self._spares_memory and real.nbytes > _MOST_MERGED:
            return False
        return bool(self.merge)

    def _gradients_at_once(
        self, real: Tensor, fake: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self._autocast():
            if self._merges(real):
                both = _joined(real, fake)
                with batch_groups(2):
                    logits = self.D(both).flatten()
                real_logits, fake_logits = logits.split(logits.numel() // 2)
            else:
                real_logits, fake_logits = self._D(real).flatten(), self.D(fake).flatten()
        loss, d_real, d_fake = gan_d_loss(
            real_logits,
            fake_logits,
            loss=self.loss,
            real_target=_of_logits(targets[0], real_logits),
            fake_target=_of_logits(targets[1], fake_logits),
            weight=self.loss_weight,
        )
        self._scaler_d.scale(loss).backward()
        assert d_real is not None
        return loss.detach(), d_real, d_fake

    def _separate_gradients(
        self, real: Tensor, fake: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A backward after each forward, so that what it reads may still be in the caches.
        losses, probabilities = [], []
        sides, networks = ("real", "fake"), (self._D, self.D)
        for side, D, images, of_images in zip(sides, networks, (real, fake), targets, strict=True):
            with self._autocast():
                logits = D(images).flatten()
            target = _of_logits(of_images, logits)
            loss, probability = d_loss_term(side, logits, target, self.loss_weight, loss=self.loss)
            self._scaler_d.scale(loss).backward()
            losses.append(loss.detach())
            probabilities.append(probability)
        return losses[0] + losses[1], probabilities[0], probabilities[1]

    def _update_g(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        with _constant(self.D):
            with self._autocast():
                paired = is_paired(self.loss)
                real_logits = self._D(self._shown(real)).flatten() if paired else None
                logits = self._D(self._shown(fake)).flatten()
            found = gan_g_loss(logits, real_logits, loss=self.loss, weight=self.loss_weight)
            self._scaler_g.scale(found.loss).backward()
        self._finish(self.G, self.opt_g, self._scaler_g)
        return found.loss.detach(), found.d_fake


def _of_logits(target: float | Tensor, logits: Tensor) -> float | Tensor:
    """Targets of images as those of their logits, of which each image has as many."""
    if not isinstance(target, Tensor):
        return target
    return target.repeat_interleave(logits.numel() // target.numel())


def _joined(real: Tensor, fake: Tensor) -> Tensor:
    """Both as one batch in the dtype of fake, and in channels_last where fake is, in one copy."""
    last = fake.dim() == 4 and fake.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    if not fake.is_cpu or real.shape[1:] != fake.shape[1:]:
        return torch.cat([real.to(fake.dtype).contiguous(memory_format=memory_format), fake])
    size = (len(real) + len(fake), *fake.shape[1:])
    both = map_memory.empty(size, fake.dtype, memory_format)
    both[: len(real)].copy_(real)
    both[len(real) :].copy_(fake)
    return both


class ReferenceStep(_Step):
    """The update as it is usually written: the baseline of every comparison.

    D on real and on generated images in two calls, with a backward each where the loss is a sum
    over both, then G through D with all gradients; losses from ``binary_cross_entropy_with_logits``
    where they are of that kind, else from the torch operations of :mod:`pygan.losses`. Arguments
    and result as :class:`AdversarialStep`; ``merge`` and ``graph`` have no meaning here.
    """

    def _bce(self, logits: Tensor, target: float | Tensor) -> Tensor:
        if isinstance(target, Tensor):
            labels = target.to(logits.dtype).view(logits.shape)
        else:
            labels = torch.full_like(logits, target)
        return F.binary_cross_entropy_with_logits(logits, labels) * self.loss_weight

    def _half_of_d(self, side: str, logits: Tensor, target: float | Tensor) -> Tensor:
        target = _of_logits(target, logits)
        if has_kernel(self.loss):
            return self._bce(logits, target)
        flat = logits.flatten()
        return d_loss_term(side, flat, target, self.loss_weight, loss=self.loss)[0]

    def _pairs_of_d(self, logits_real: Tensor, logits_fake: Tensor, targets: Targets) -> Tensor:
        return gan_d_loss(
            logits_real.flatten(),
            logits_fake.flatten(),
            loss=self.loss,
            real_target=_of_logits(targets[0], logits_real),
            fake_target=_of_logits(targets[1], logits_fake),
            weight=self.loss_weight,
        ).loss

    def _loss_of_g(self, logits: Tensor, logits_real: Tensor | None) -> Tensor:
        if has_kernel(self.loss):
            return -self._bce(logits, 0.0) if self.loss == "minimax" else self._bce(logits, 1.0)
        return gan_g_loss(logits, logits_real, loss=self.loss, weight=self.loss_weight).loss

    def _update(self, real: Tensor, z: Tensor) -> StepResult:
        paired = is_paired(self.loss)
        losses_d = []
        targets = self._targets(len(real))
        self.D.zero_grad()
        seen = self._shown(real)
        with self._autocast():
            logits_real = self._D(seen)
            if not paired:
                losses_d.append(self._half_of_d("real", logits_real, targets[0]))
        if not paired:
            self._scaler_d.scale(losses_d[0]).backward()
        with self._autocast():
            fake = self._generated(z)
            seen_fake = self._shown(fake.detach())
        self._add_penalties(seen, seen_fake)
        with self._autocast():
            logits_fake = self.D(seen_fake)
            if paired:
                losses_d.append(self._pairs_of_d(logits_real, logits_fake, targets))
            else:
                losses_d.append(self._half_of_d("fake", logits_fake, targets[1]))
        self._scaler_d.scale(losses_d[-1]).backward()
        self._finish(self.D, self.opt_d, self._scaler_d)
        loss_g, d_fake_after = self._turn_of_g(real, fake)
        with torch.no_grad():
            d_real, d_fake = (torch.sigmoid(t.float()).mean() for t in (logits_real, logits_fake))
            loss_d = torch.stack(losses_d).sum().float()
        return StepResult(loss_d, loss_g, d_real, d_fake, d_fake_after)

    def _update_g(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        self.G.zero_grad()
        with self._autocast():
            compared = self._D(self._shown(real)).detach() if is_paired(self.loss) else None
            logits = self._D(self._shown(fake))
            loss_g = self._loss_of_g(logits, compared)
        self._scaler_g.scale(loss_g).backward()
        self._finish(self.G, self.opt_g, self._scaler_g)
        return loss_g.detach().float(), torch.sigmoid(logits.detach().float()).mean()
