"""What a convolution tells of its output to the batch norm behind it."""

from __future__ import annotations

from torch import Tensor


class Moments:
    """Statistics of a map, in ``groups`` equal runs of its batch, that the convolution which makes
    the map takes as it writes it, where its kernels do: asked for by whoever knows that a batch
    norm reads the map, and given to that.

    ``parts`` ``[groups, rows, 3, C]`` are count, mean and sum of squared deviations of as many
    parts of each run; None where nothing has been taken.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.parts: Tensor | None = None
