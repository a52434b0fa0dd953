"""What may be done about a finding without asking: little, in steps, and said aloud."""

from __future__ import annotations

from typing import Any, Final

from pygan.errors import UserError
from pygan.losses import check_loss
from pygan.monitor.findings import Finding
from pygan.step import AdversarialStep, ReferenceStep

# Salimans et al. 2016, arXiv:1606.03498, section 3.4.
SMOOTHED: Final = 0.9
# Of a learning rate, by half each.
HALVINGS: Final = 3
_SLOWER: Final = {"d_overpowers": "D", "d_fooled": "G", "exploding": "DG"}


class AutoFix:
    """Changes a step and its optimizers' learning rates in answer to findings.

    When D overpowers G: one-sided label smoothing where the loss has targets, then half of D's
    learning rate; when D is fooled, half of G's; when gradients explode, half of both. Three times
    at most for a network.
    """

    def __init__(self, step: AdversarialStep | ReferenceStep) -> None:
        self._step = step
        self._halved = {"D": 0, "G": 0}

    def state_dict(self) -> dict[str, Any]:
        """What was changed, apart from the learning rates, which are the optimizers' state."""
        return {"real_target": self._step.real_target, "halved": dict(self._halved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, and changes the step alike."""
        self._step.real_target = state["real_target"]
        self._halved = dict(state["halved"])

    def apply(self, finding: Finding) -> str | None:
        """What was changed because of a finding, in words; None where nothing safe is left."""
        if finding.over or finding.code not in _SLOWER:
            return None
        step = self._step
        if finding.code == "d_overpowers" and step.real_target == 1.0 and self._has_targets():
            step.real_target = SMOOTHED
            return f"one-sided label smoothing, D's target for real images is {SMOOTHED} from now"
        changed = []
        for letter in _SLOWER[finding.code]:
            if self._halved[letter] < HALVINGS:
                self._halved[letter] += 1
                rate = halve(step.opt_d if letter == "D" else step.opt_g)
                changed.append(f"{letter}'s learning rate is {rate:g} from now")
        return ", ".join(changed) or None

    def _has_targets(self) -> bool:
        try:
            check_loss(self._step.loss, real_target=(SMOOTHED, 1.0))
        except UserError:
            return False
        return True


def halve(optimizer: Any) -> float:
    """Halves the learning rates of an optimizer, and returns the first."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5
    return float(optimizer.param_groups[0]["lr"])
