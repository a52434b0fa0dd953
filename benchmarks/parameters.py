"""Test parameters made of cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.measure import Case


def pairs(cases: Mapping[str, Case]) -> list[Any]:
    """A parameter set ``(case name, side id)`` for each side, with ids such as
    ``dcgan64-eager-fp32``; the sides of a case follow one another."""
    return [
        pytest.param(name, side.id, id=f"{name}-{side.id}")
        for name, case in cases.items()
        for side in case.sides
    ]
