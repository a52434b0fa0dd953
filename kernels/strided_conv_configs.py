"""The tiles that the strided convolution's kernels are worth trying with.

A tile of 128x128 multiplies 64 times for each value it reads, one of 64x64 half as often; small
ones are for the layers that would leave multiprocessors idle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """One way to run a pass: the tile, and how many threads run it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    phases: int = 1  # of big that a program of up computes: 1 or 4
    flat: bool = False  # of down and weight_grad: a block goes over several taps
    descriptors: bool = False  # of up and down: tiles are copied by tensor descriptors


# Each compiles for compute capabilities 8.0, 9.0 and 10.0 without spilling a register where the
# channels are multiples of 16; others load value by value, and spill.
CONFIGS = {
    "half": {
        "up": (
            Config(128, 128, 64, 8, 3),
            Config(128, 64, 32, 4, 4),
            Config(64, 128, 64, 4, 3),
            Config(64, 128, 64, 8, 3, phases=4),
            Config(128, 16, 64, 4, 3, phases=4),
        ),
        "down": (
            Config(128, 128, 64, 8, 4),
            Config(64, 128, 64, 8, 4),
            Config(128, 64, 32, 8, 4),
            Config(64, 64, 64, 4, 1, flat=True),
        ),
        "weight_grad": (
            Config(128, 128, 64, 8, 3),
            Config(128, 64, 64, 8, 4),
            Config(64, 64, 64, 4, 4),
            Config(64, 64, 64, 4, 2, flat=True),
        ),
    },
    "tf32": {
        "up": (
            Config(128, 128, 32, 8, 3),
            Config(64, 64, 32, 4, 3),
            Config(128, 16, 32, 4, 3, phases=4),
        ),
        "down": (
            Config(128, 128, 32, 8, 3),
            Config(64, 64, 32, 4, 3),
            Config(64, 64, 16, 4, 2, flat=True),
        ),
        "weight_grad": (
            Config(128, 128, 32, 8, 3),
            Config(64, 64, 32, 4, 3),
            Config(64, 64, 16, 4, 2, flat=True),
        ),
    },
    "ieee": {
        "up": (Config(64, 64, 16, 8, 2), Config(128, 16, 32, 4, 3, phases=4)),
        "down": (Config(64, 64, 16, 8, 2), Config(64, 64, 16, 8, 2, flat=True)),
        "weight_grad": (Config(64, 64, 16, 8, 2), Config(64, 64, 16, 4, 2, flat=True)),
    },
}
# The same for passes that take the statistics of their output, or normalize the map they read, or
# both: they need more registers.
FUSED = {
    "half": {
        "up": (
            Config(128, 128, 64, 8, 3),
            Config(128, 64, 32, 8, 4),
            Config(64, 128, 64, 4, 3),
            Config(128, 16, 64, 4, 3, phases=4),
        ),
        "down": CONFIGS["half"]["down"],
        "weight_grad": (
            Config(128, 128, 64, 8, 3),
            Config(128, 64, 64, 8, 4),
            Config(64, 64, 64, 4, 4),
            Config(64, 64, 64, 8, 2, flat=True),
        ),
    },
    "tf32": {
        "up": CONFIGS["tf32"]["up"],
        "down": CONFIGS["tf32"]["down"],
        "weight_grad": (
            Config(128, 128, 32, 8, 3),
            Config(64, 64, 32, 8, 3),
            Config(64, 64, 16, 4, 2, flat=True),
        ),
    },
    # These normalize no map: those that did would spill.
    "ieee": {"up": CONFIGS["ieee"]["up"], "down": CONFIGS["ieee"]["down"], "weight_grad": ()},
}
_COPIED_HALVES = (
    Config(256, 128, 64, 8, 4, descriptors=True),
    Config(128, 128, 64, 8, 3, descriptors=True),
    Config(256, 64, 64, 4, 2, descriptors=True),
    Config(128, 64, 64, 4, 4, descriptors=True),
)
# Each compiles for compute capabilities 9.0 and 10.0 without spilling a register. Both operands are
# multiplied from shared memory but for up's weight in float32: from there TF32 takes only what lies
# along the terms of the sums, so that one goes through registers.
DESCRIPTORS = {
    "half": {"up": _COPIED_HALVES, "down": _COPIED_HALVES},
    "tf32": {
        "up": (Config(128, 128, 32, 8, 3, descriptors=True),),
        "down": (
            Config(128, 128, 32, 8, 3, descriptors=True),
            Config(128, 64, 32, 8, 4, descriptors=True),
        ),
    },
}
# Spills where it takes statistics.
_PLAIN_ONLY = Config(256, 64, 64, 4, 2, descriptors=True)
_COPIED = 16  # bytes, of which a map's channels are a multiple where descriptors are made for it
FLAT_CHANNELS = 32  # of big, below which down is flat


def with_descriptors(
    conv_pass: str,
    small_channels: int,
    big_channels: int,
    dtype: torch.dtype,
    precision: str,
    statistics: bool = False,
) -> tuple[Config, ...]:
    """The ways to run a pass with tensor descriptors, and ``statistics`` of its output, that are
    worth trying, often none. They are for compute capability 9.0 and later, and for down where
    big's sizes are even."""
    found = DESCRIPTORS.get("half" if dtype.itemsize == 2 else precision, {}).get(conv_pass, ())
    if statistics:
        found = tuple(c for c in found if c != _PLAIN_ONLY)
    if conv_pass == "up":
        columns = big_channels
        if any(c * dtype.itemsize % _COPIED for c in (small_channels, big_channels)):
            return ()
    else:
        columns = small_channels
        found = tuple(c for c in found if big_channels % c.block_k == 0)
    # One of 64 columns is the narrowest; at least half of a wider one has to be of use.
    return tuple(c for c in found if c.block_n < max(2 * columns, 65))


def configs(
    conv_pass: str, small_channels: int, big_channels: int, dtype: torch.dtype, precision: str
) -> tuple[Config, ...]:
    """The ways to run a pass between so many channels that are worth trying, at least one, none of
    them with descriptors. ``precision``, "tf32" or "ieee", is how float32 is multiplied."""
    found = CONFIGS["half" if dtype.itemsize == 2 else precision][conv_pass]
    return _fitting(found, conv_pass, small_channels, big_channels)


def with_statistics(
    conv_pass: str, small_channels: int, big_channels: int, dtype: torch.dtype, precision: str
) -> tuple[Config, ...]:
    """As :func:`configs`, of up and down that take the statistics of their output."""
    found = FUSED["half" if dtype.itemsize == 2 else precision][conv_pass]
    return _fitting(found, conv_pass, small_channels, big_channels)


def normalizing(
    conv_pass: str, small_channels: int, big_channels: int, dtype: torch.dtype, precision: str
) -> tuple[Config, ...]:
    """As :func:`configs`, of passes that normalize a map as they read it; there may be none."""
    kind = "half" if dtype.itemsize == 2 else precision
    if kind == "ieee":
        return ()
    return _fitting(FUSED[kind][conv_pass], conv_pass, small_channels, big_channels)


def _fitting(
    found: tuple[Config, ...], conv_pass: str, small_channels: int, big_channels: int
) -> tuple[Config, ...]:
    if conv_pass == "up":
        columns = {phases: phases * big_channels for phases in (1, 4)}
        # Tiles of little width are for few columns, those of much for many.
        fitting = [
            c
            for c in found
            if c.block_n <= 2 * columns[c.phases] and (c.block_n > 16 or columns[c.phases] <= 64)
        ]
        return tuple(fitting) or found[-1:]
    if conv_pass == "down":
        found = tuple(c for c in found if c.flat == (big_channels < FLAT_CHANNELS))
        fitting = [c for c in found if c.block_n <= 2 * small_channels]
    else:
        found = tuple(c for c in found if c.flat or big_channels % c.block_n == 0)
        found = tuple(c for c in found if not c.flat) or found
        fitting = [c for c in found if c.block_m <= 2 * small_channels]
    return tuple(fitting) or found[-1:]
