"""Every layer of the GANs in ``layers.json``, in both forms, against its fused copy."""

from __future__ import annotations

import pytest
import torch
from compare import Inputs, MakeInput, assert_same
from rows import FORMS, Row, input_shape, large_rows, one_of_each_kind, read_rows, small_rows

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
