"""Where pieces of memory lie over one another, if it is known when each of them is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Piece(NamedTuple):
    size: int  # bytes
    first: int  # moment in which it is used
    last: int


def places(pieces: Sequence[Piece]) -> tuple[list[int], int]:
    """An offset for each, such that none lies over another that is used at the same time, and the
    end of all. The largest come first, each at the lowest place that is free.

    Source: greedy by size, Pisarchyk and Lee 2020, arXiv:2001.03288.
    """
    offsets = [0] * len(pieces)
    done: list[int] = []
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].size):
        piece, offset = pieces[i], 0
        beside = (j for j in done if _meet(pieces[j], piece))
        for low, size in sorted((offsets[j], pieces[j].size) for j in beside):
            if offset + piece.size <= low:
                break
            offset = max(offset, aligned(low + size))
        offsets[i] = offset
        done.append(i)
    return offsets, max((o + p.size for o, p in zip(offsets, pieces, strict=True)), default=0)


def _meet(one: Piece, other: Piece) -> bool:
    return one.first <= other.last and other.first <= one.last
