"""Implementations and types that the tests of an operation run through."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.triton,
        pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1"),
    ],
)
CPU = pytest.param("cpu", marks=pytest.mark.native)

# Triton's interpreter truncates to bfloat16 where a GPU rounds, so there the half type is float16.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
