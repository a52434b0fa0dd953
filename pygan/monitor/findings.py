"""What can go wrong with a GAN in training, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple


class Fault(NamedTuple):
    """A kind of finding: ``severity`` is "warning" or "error"."""

    severity: str
    title: str
    meaning: str
    advice: str
    source: str


FAULTS: Final[Mapping[str, Fault]] = {
    "d_overpowers": Fault(
        "warning",
        "D overpowers G",
        "D tells nearly every generated image from the real ones, G does not manage to deceive "
        "it, and a D that is this sure leaves G little gradient to learn from.",
        "one-sided label smoothing (real_target 0.9), a lower learning rate for D, noise on D's "
        "input, more steps of G, or spectral norm in D",
        "Arjovsky and Bottou 2017, arXiv:1701.04862; Salimans et al. 2016, arXiv:1606.03498; "
        "Miyato et al. 2018, arXiv:1802.05957",
    ),
    "d_fooled": Fault(
        "warning",
        "D is fooled",
        "D takes generated images for real more readily than the real ones, so G's loss falls "
        "while it learns nothing about the data, and its samples may all look alike.",
        "a lower learning rate for G or a higher one for D, more steps of D, or a wider D",
        "Heusel et al. 2017, arXiv:1706.08500; Goodfellow 2016, arXiv:1701.00160, section 5",
    ),
    "frozen": Fault(
        "warning",
        "both losses stand still",
        "Losses that do not move while the batches change come from outputs that are saturated or "
        "clamped, or from a D that gives every image the same value; nothing is learnt.",
        "give the loss logits without clamp or sigmoid, lower the learning rates, and check that "
        "the optimizers hold the parameters",
        "Arjovsky and Bottou 2017, arXiv:1701.04862",
    ),
    "exploding": Fault(
        "warning",
        "gradients explode",
        "One step may undo what many have learnt, and infinity is near.",
        "lower learning rates, clipped gradients, a gradient penalty (R1), or spectral norm in D",
        "Mescheder et al. 2018, arXiv:1801.04406; Miyato et al. 2018, arXiv:1802.05957",
    ),
    "vanishing": Fault(
        "warning",
        "gradients vanish",
        "Next to nothing reaches the parameters, so the network stands still; with a saturating "
        "loss and a strong D this is what G gets.",
        "the non-saturating loss (bce) in place of minimax, a weaker D (label smoothing, noise on "
        "its input), or norm layers",
        "Goodfellow et al. 2014, arXiv:1406.2661, section 3; Arjovsky and Bottou 2017, "
        "arXiv:1701.04862",
    ),
    "mode_collapse": Fault(
        "warning",
        "mode collapse",
        "Images from different latents look alike, far more than the real images do: G has "
        "settled on few images that D accepts.",
        "a larger batch, a higher learning rate for D than for G, more steps of D, or minibatch "
        "discrimination",
        "Goodfellow 2016, arXiv:1701.00160, section 5.1.1; Salimans et al. 2016, "
        "arXiv:1606.03498; Arora and Zhang 2017, arXiv:1706.08224 (near-duplicates)",
    ),
    "partial_collapse": Fault(
        "warning",
        "partial mode collapse",
        "Whole groups of similar real images have next to no counterpart among the samples.",
        "a larger batch, more steps of D, wider networks, or longer training",
        "Goodfellow 2016, arXiv:1701.00160, section 5.1.1; Richardson and Weiss 2018, "
        "arXiv:1805.12462 (bins of the data)",
    ),
    "stalled": Fault(
        "warning",
        "G learns little",
        "The samples' average is far from that of the real images, and little nearer than after "
        "half as many steps; the losses need not show it.",
        "clipped gradients (--clip-grad 5: large gradients of the first steps stay in Adam's "
        "averages and shorten a thousand steps), a higher learning rate for G or a lower one for "
        "D, fewer steps of D, or another loss",
        "Kingma and Ba 2015, arXiv:1412.6980, section 2.1; Heusel et al. 2017, arXiv:1706.08500",
    ),
    "copies": Fault(
        "warning",
        "samples copy training images",
        "Many samples lie much nearer to one training image than that image's nearest neighbour "
        "does: G reproduces images in place of making new ones.",
        "more or augmented training images (DiffAugment, --flip), a smaller G, or an earlier stop",
        "Meehan et al. 2020, arXiv:2004.05675; Zhao et al. 2020, arXiv:2006.10738",
    ),
    "nonfinite": Fault(
        "error",
        "NaN or infinity",
        "From here on every number that depends on it is lost.",
        "go back to the last good checkpoint with lower learning rates; bf16 in place of fp16; a "
        "gradient penalty (R1)",
        "Mescheder et al. 2018, arXiv:1801.04406",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing found, or found to be over.

    Attributes:
        code: a key of `FAULTS`.
        step: when it was seen.
        values: the signals by name; probabilities and shares are from 0 to 1.
        where: the tensor or layer it was seen in, or "".
        over: the end of an earlier finding.
    """

    code: str
    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    where: str = ""
    over: bool = False

    @property
    def severity(self) -> str:
        """ "warning", "error", or "note" for the end of a finding."""
        return "note" if self.over else FAULTS[self.code].severity

    @property
    def meaning(self) -> str:
        return FAULTS[self.code].meaning

    @property
    def advice(self) -> str:
        return FAULTS[self.code].advice

    @property
    def source(self) -> str:
        return FAULTS[self.code].source

    def __str__(self) -> str:
        title = FAULTS[self.code].title
        seen = [self.where] if self.where else []
        seen += [f"{name} {value:.3g}" for name, value in self.values.items()]
        signal = f" ({', '.join(seen)})" if seen else ""
        if self.over:
            return f"Step {self.step}: over: {title}{signal}."
        return (
            f"Step {self.step}: {title}{signal}. {self.meaning} What to try: {self.advice} "
            f"({self.source})."
        )

    def row(self) -> dict[str, int | str]:
        """As a row of log.jsonl."""
        code = f"{self.code}_over" if self.over else self.code
        return {
            "step": self.step, "finding": code, "severity": self.severity, "text": str(self),
        }  # fmt: skip
