"""The monitor: signals gathered on the device, read once per check, judged with patience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from pygan.errors import UserError
from pygan.losses import check_loss
from pygan.monitor import tensors
from pygan.monitor.findings import Finding
from pygan.monitor.variety import SIGNALS, Variety

# A fault is reported once it was seen in this many checks in a row that span this many steps.
PATIENCE: Final = 3
LASTING: Final = 100
# Untrained networks show nearly every sign of trouble, and lose them by themselves.
WARM_UP: Final = 300

# D's loss below which it makes next to no mistakes. The relativistic ones are no sign of it: they
# are as small in good runs.
_EASY: Final = {
    "bce": 0.05, "minimax": 0.05, "logistic": 0.05, "softplus": 0.05, "hinge": 0.05,
    "lsgan": 0.02,
}  # fmt: skip
# Losses whose logits are those of a probability, of an image alone.
_PROBABILITIES: Final = ("bce", "minimax", "logistic", "softplus")
_MEANS: Final = ("loss_d", "loss_g", "d_real", "d_fake")

# Samples are far from the real images, and little nearer than after half as many steps. Untrained
# networks begin at a gap of 1 (0.2 where the images' average is grey), and healthy ones are below
# the first bound before step 500.
_FAR: Final = 0.35
_NEARER: Final = 0.75
# D(x) - D(G(z)) of a D that tells them; a loss that wants 1 and 0 of logits ends at 0.23.
_AHEAD: Final = 0.05
# Median distance to the nearest real image, of networks that have not begun to learn 3.5.
_UNLIKE: Final = 1.5
# Of the gaps kept, each was read this much later than the one before.
_SPACED: Final = 1.1

Judged = tuple[bool, dict[str, float], str]


class Monitor:
    """Looks after the training of a GAN: ``update`` in every step, ``check`` now and then.

    Args:
        G, D: networks, fused or not; G takes ``fixed_z``.
        real: ``[M, C, H, W]`` real images, float in [-1, 1] or uint8, some hundred from all over
            the data; None leaves out what compares samples with them.
        fixed_z: ``[N, nz, 1, 1]`` latents whose images are compared, N at least 32; as many from
            N(0, 1) with a seed of their own when None and ``nz`` is given.
        nz: length of the latents, when ``fixed_z`` is None.
        loss: what G and D are trained with, a name of :func:`pygan.functional.gan_d_loss`.
        variety_every: least number of steps between two looks at G's images.
        warm_up: steps in which only NaN, infinity and frozen losses are looked for.
        scaled: a gradient scaler is at work, so that infinite gradients are part of its trade.

    Attributes:
        signals: what the last check read, by name.

    Gradients are looked at as the last step left them in ``grad``; in a loop in which G's loss goes
    back through D, D's hold what that added.

    Raises:
        UserError: an unknown loss, neither ``fixed_z`` nor ``nz`` with ``real``, or too few images.
    """

    def __init__(
        self,
        G: nn.Module,
        D: nn.Module,
        *,
        real: Tensor | None = None,
        fixed_z: Tensor | None = None,
        nz: int | None = None,
        loss: str = "bce",
        variety_every: int = 100,
        warm_up: int = WARM_UP,
        scaled: bool = False,
    ) -> None:
        check_loss(loss)
        self.G, self.D, self.loss = G, D, loss
        self._device = next(G.parameters()).device
        self._every, self._warm_up, self._scaled = variety_every, warm_up, scaled
        if fixed_z is None and nz is not None:
            fixed_z = torch.randn(64, nz, 1, 1, generator=torch.Generator().manual_seed(0))
        self._z = None if fixed_z is None else fixed_z.to(self._device)
        self._variety: Variety | None = None
        if real is not None:
            if self._z is None or len(self._z) < 32:
                raise UserError(
                    "real was given without at least 32 latents to compare its images with; give "
                    "fixed_z, or nz"
                )
            self._variety = Variety(real, len(self._z)).to(self._device)
        self._totals = torch.zeros(len(_MEANS), device=self._device)
        self._count = 0
        self.signals: dict[str, float] = {}
        self._before: list[float] = []
        self._looked: int | None = None
        self._gaps: list[tuple[int, float]] = []
        # Of every fault: since when it is seen, in how many checks, and whether it was reported.
        self._seen: dict[str, list[int]] = {}
        self._open: dict[str, int] = {}

    def update(
        self,
        loss_d: Tensor | float,
        loss_g: Tensor | float,
        d_real: Tensor | float,
        d_fake: Tensor | float,
    ) -> None:
        """Adds a step: its losses and the mean probabilities D(x) and D(G(z)), as ``[]`` tensors
        that stay on the device."""
        given = (loss_d, loss_g, d_real, d_fake)
        with torch.no_grad():
            row = [torch.as_tensor(v, dtype=torch.float32, device=self._device) for v in given]
            self._totals += torch.stack(row)
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as plain values and one tensor."""
        return {
            "totals": self._totals, "count": self._count, "before": list(self._before),
            "looked": self._looked, "gaps": [list(at) for at in self._gaps],
            "seen": {k: list(v) for k, v in self._seen.items()}, "open": dict(self._open),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._totals.copy_(state["totals"])
        self._count, self._looked = state["count"], state["looked"]
        self._before = list(state["before"])
        # States of before there were gaps have none.
        self._gaps = [(step, gap) for step, gap in state.get("gaps", ())]
        self._seen = {k: list(v) for k, v in state["seen"].items()}
        self._open = dict(state["open"])

    def again(self, code: str) -> None:
        """Reports a fault anew if it goes on, after something was done about it."""
        self._open.pop(code, None)
        self._seen.pop(code, None)

    def check(self, step: int, means: Sequence[float] | None = None) -> list[Finding]:
        """Reads what was gathered since the last check, and says what has begun or ended.

        Args:
            step: how many steps were done.
            means: loss_d, loss_g, D(x) and D(G(z)) over these, where the caller has them; else
                those of :meth:`update` count.
        """
        look = self._variety is not None and (
            self._looked is None or step - self._looked >= self._every
        )
        names, values = self._read(look)
        if means is None:
            means = [v / self._count for v in values[: len(_MEANS)]] if self._count else []
            self._totals.zero_()
            self._count = 0
        self.signals = dict(zip(_MEANS, means, strict=False))
        judged = self._gradients(names, values[len(_MEANS) :])
        if look:
            self._looked = step
            self.signals |= dict(zip(SIGNALS, values[-len(SIGNALS) :], strict=True))
        where = self._nonfinite(values, means)
        if where is not None:
            return self._judge(step, {"nonfinite": (True, {}, where)}, at_once=True)
        judged |= self._losses(look)
        if look:
            # What was said of losses or gradients tells why.
            explained = any(code in self._open for code in judged)
            judged |= self._samples(step, explained)
        if step < self._warm_up:
            judged = {"frozen": judged["frozen"]} if "frozen" in judged else {}
        return self._judge(step, judged)

    def _read(self, look: bool) -> tuple[list[list[str]], list[float]]:
        """The one read: means, largest elements and gradient norms of G and D, variety."""
        names, parts = [], [self._totals]
        with torch.no_grad():
            parts.append(torch.stack([tensors.largest(net) for net in (self.G, self.D)]))
            for net in (self.G, self.D):
                of, norms = tensors.gradients(net)
                names.append(of)
                if norms is not None:
                    parts.append(norms)
            if look:
                parts.append(self._look())
        return names, torch.cat([part.float() for part in parts]).tolist()

    def _look(self) -> Tensor:
        assert self._variety is not None
        modes = [(m, m.training) for m in self.G.modules()]
        try:
            self.G.eval()
            return self._variety.signals(self.G(self._z))
        finally:
            for module, mode in modes:
                module.training = mode

    def _gradients(self, names: list[list[str]], values: list[float]) -> dict[str, Judged]:
        """Gradient norms of both networks; ``values`` begins with the largest elements."""
        at, lines = 2, {}
        worst = {"exploding": (0.0, ""), "vanishing": (float("inf"), "")}
        for letter, of in zip("GD", names, strict=True):
            norms = values[at : at + len(of)]
            at += len(of)
            if not of:
                continue
            total = sum(norm * norm for norm in norms) ** 0.5
            lines[f"grad_{letter.lower()}"] = total
            name = max(zip(norms, of, strict=True))[1]
            if total > worst["exploding"][0]:
                worst["exploding"] = (total, f"most in {name} of {letter}")
            if total < worst["vanishing"][0]:
                worst["vanishing"] = (total, f"in {letter}")
        self.signals |= lines
        if not lines:
            return {}
        return {
            "exploding": (worst["exploding"][0] > 100, lines, worst["exploding"][1]),
            "vanishing": (worst["vanishing"][0] < 1e-5, lines, worst["vanishing"][1]),
        }

    def _nonfinite(self, values: list[float], means: Sequence[float]) -> str | None:
        largest = values[len(_MEANS) : len(_MEANS) + 2]
        grads = [] if self._scaled else [v for k, v in self.signals.items() if k.startswith("grad")]
        if all(v - v == 0 for v in (*means, *largest, *grads)):
            return None
        where = tensors.nonfinite(self.G, self.D, self._z)
        lost = [n for n, v in zip(_MEANS, means, strict=False) if v - v != 0]
        # Norms of large finite gradients overflow too.
        return ", ".join([*lost, *([where] if where else [])]) or None

    def _losses(self, look: bool) -> dict[str, Judged]:
        s = self.signals
        if "loss_d" not in s:
            return {}
        both = {name: s[name] for name in _MEANS}
        easy = s["loss_d"] < _EASY.get(self.loss, -float("inf"))
        if self.loss in _PROBABILITIES:
            easy = easy and s["d_fake"] < 0.05
        now = [s["loss_d"], s["loss_g"]]
        pairs = zip(now, self._before, strict=False)
        still = bool(self._before) and all(abs(a - b) <= 1e-5 * abs(a) for a, b in pairs)
        self._before = now
        return {
            "d_overpowers": (easy, both, ""),
            "d_fooled": (s["d_fake"] - s["d_real"] > 0.2, both, ""),
            "frozen": (still, both, ""),
        }

    def _samples(self, step: int, explained: bool) -> dict[str, Judged]:
        s = self.signals

        def of(*names: str) -> dict[str, float]:
            return {name: s[name] for name in names if name in s}

        collapsed = s["spread"] < 0.3 or s["duplicates"] > 0.5
        partly = s["missing"] > 0.4 and not collapsed
        # The samples of a G that has learnt nothing look alike too: like no real image, and D tells
        # them.
        ahead = s.get("d_real", 0.0) - s.get("d_fake", 0.0) > _AHEAD
        untaught = ahead and s["nearest"] > _UNLIKE
        still, before = self._standstill(step)
        stalled = still and (untaught or not (collapsed or partly))
        return {
            "mode_collapse": (collapsed and not stalled, of("spread", "duplicates"), ""),
            "partial_collapse": (partly and not stalled, of("missing", "spread"), ""),
            "stalled": (stalled and not explained, of("gap", "d_real", "d_fake"), before),
            # Real images that are none of these reach 0.05.
            "copies": (s["copies"] > 0.1, of("copies"), ""),
        }

    def _standstill(self, step: int) -> tuple[bool, str]:
        """Whether samples stay far from the real images, and what was seen when."""
        gap = self.signals["gap"]
        if not self._gaps or step >= _SPACED * self._gaps[-1][0]:
            self._gaps.append((step, gap))
        earlier = [at for at in self._gaps if 2 * at[0] <= step]
        if not earlier:
            return False, ""
        then, before = earlier[-1]
        return gap > max(_FAR, _NEARER * before), f"gap {before:.3g} at step {then}"

    def _judge(
        self, step: int, judged: dict[str, Judged], *, at_once: bool = False
    ) -> list[Finding]:
        found = []
        for code, (bad, values, where) in judged.items():
            if bad:
                since = self._seen.setdefault(code, [step, 0])
                since[1] += 1
                lasting = since[1] >= PATIENCE and step - since[0] >= LASTING
                if code in self._open:
                    self._open[code] = 0
                elif lasting or at_once:
                    self._open[code] = 0
                    found.append(Finding(code, step, values, where))
                continue
            self._seen.pop(code, None)
            if code in self._open:
                self._open[code] += 1
                if self._open[code] >= PATIENCE:
                    del self._open[code]
                    found.append(Finding(code, step, values, where, over=True))
        return found
