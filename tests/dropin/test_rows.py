"""Every layer of the GANs in ``layers.json``, in both forms, against its fused copy."""

from __future__ import annotations

import json

import pytest
import torch
from compare import Inputs, MakeInput, assert_same
from rows import (
    FORMS,
    LAYERS,
    Row,
    geometry,
    input_shape,
    large_rows,
    one_of_each_kind,
    read_rows,
    small,
    small_rows,
)

import pygan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.parametrize("form", FORMS),
]

FIRST = one_of_each_kind(small_rows())
OTHERS = [row for row in small_rows() if row not in FIRST]
LARGE = large_rows()


def draw(row: Row, memory_format: torch.memory_format = torch.contiguous_format) -> MakeInput:
    def make_input(generator: torch.Generator) -> Inputs:
        x = torch.randn(input_shape(row), generator=generator)
        return (x.to(memory_format=memory_format),)

    return make_input


def test_every_row_is_there(form: str) -> None:
    assert len(read_rows()) == 705
    assert {row.kind for row in FIRST} == {row.kind for row in LARGE}
    assert all(FORMS[form](row) for row in FIRST)


# Layers that run as they are: torch's own operation without a norm around it.
LEFT = {"Linear", "Conv1d", "ConvT1d", "Conv3d", "ConvT3d"}
LEAST_SHARE = 0.84


def test_share_of_the_work_that_is_fused(form: str) -> None:
    """By FLOPs, of the generators and of the discriminators alike."""
    shares = {role: [0.0, 0.0] for role in "GD"}
    for entry, row in zip(json.loads(LAYERS.read_text()), read_rows(), strict=True):
        fused = bool(pygan.fuse(FORMS[form](small(row))).fused)
        if not fused:
            grouped = row.dims > 0 and (geometry(row).grouped or geometry(row).dilation > 1)
            assert row.anchor in LEFT or grouped, row
            assert "BN" not in row.pre + row.post
        for role in set(entry["roles"]) & set(shares):
            shares[role][fused] += entry["share"]
    for role, (left, taken) in shares.items():
        assert taken >= LEAST_SHARE * (left + taken), role


@pytest.mark.parametrize("row", FIRST, ids=str)
def test_row(row: Row, form: str) -> None:
    assert_same(lambda: FORMS[form](row), draw(row))


@pytest.mark.slow
@pytest.mark.parametrize("row", OTHERS, ids=str)
def test_row_of_other_channels(row: Row, form: str) -> None:
    assert_same(lambda: FORMS[form](row), draw(row))


@pytest.mark.slow
@pytest.mark.parametrize("row", LARGE, ids=str)
def test_large_row(row: Row, form: str) -> None:
    assert_same(lambda: FORMS[form](row), draw(row))


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in LARGE if row.dims == 2], ids=str)
def test_channels_last_row(row: Row, form: str) -> None:
    assert_same(lambda: FORMS[form](row), draw(row, torch.channels_last))
