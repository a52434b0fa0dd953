"""Strided convolutions whose tiles are copied by tensor descriptors, in the interpreter, and where
they are tried."""

from __future__ import annotations

import itertools

import pytest
import torch
from implementations import DTYPES
from test_strided_conv import Case
from test_strided_conv_triton import LAST, PASSES, check_pass, in_interpreter, poisoned

from pygan.ops import strided_conv_gpu

pytest.importorskip("triton")

WIDE = strided_conv_gpu.Shape(torch.bfloat16, LAST, (2, 64, 4, 4), (2, 64, 8, 8), "tf32")


# Boxes of 1x4x8 positions, of two or four images where a group has three, 1x1x16 and 16x1x1.
@in_interpreter
@pytest.mark.parametrize(
    ("size", "odd", "tile", "groups", "dtype", "layout"),
    [
        ((3, 24, 3, 5, 40), (0, 0), (32, 32, 16), 1, DTYPES[1], "channels_last"),
        ((6, 40, 2, 2, 16), (1, 0), (16, 16, 16), 2, DTYPES[0], "shifted"),
        ((1, 8, 1, 13, 64), (0, 1), (16, 32, 32), 1, DTYPES[1], "shifted"),
        ((18, 17, 1, 1, 32), (0, 0), (16, 16, 32), 1, DTYPES[0], "channels_last"),
    ],
    ids=str,
)
@PASSES
def test_tensor_descriptors(
    conv_pass: str,
    size: tuple[int, int, int, int, int],
    odd: tuple[int, int],
    tile: tuple[int, int, int],
    groups: int,
    dtype: torch.dtype,
    layout: str,
) -> None:
    from pygan.kernels.strided_conv_configs import Config

    n, a, h, w, b = size
    if conv_pass == "up":
        a += -a % 8  # what descriptors need
    else:
        odd, b = (0, 0), b + -b % tile[2]
    case = Case(conv_pass, (n, a, h, w, b), odd, dtype, torch.float32, layout, layout)
    config = Config(*tile, 4, 2, descriptors=True)
    check_pass(case, config, groups, None)


@in_interpreter
def test_descriptors_normalize_no_map() -> None:
    from pygan.kernels import strided_conv as kernels
    from pygan.kernels.strided_conv_configs import Config

    config = Config(16, 16, 16, 4, 2, descriptors=True)
    maps, weight = poisoned((2, 16, 4, 4)), torch.randn(16, 16, 4, 4)
    extra = (None, None, torch.ones(1, 3, 16))
    with pytest.raises(ValueError, match="coefficients"):
        kernels.run("down", maps[..., :2, :2], maps, weight, config, "ieee", *extra)


def test_boxes_cover_in_the_fewest_steps() -> None:
    from pygan.kernels.strided_conv_descriptors import box, tiles

    assert box((16, 4, 4), 128) == (8, 4, 4)
    assert box((2, 32, 32), 128) == (1, 4, 32)
    assert box((7, 1, 1), 256) == (8, 1, 32)
    assert box((1, 1, 300), 256) == (1, 4, 64)
    for covered in itertools.product((1, 3, 64), (1, 5, 17), (1, 6, 100)):
        found = box(covered, 64)
        assert found[0] * found[1] * found[2] == 64
        assert tiles(covered, 64) * 64 >= covered[0] * covered[1] * covered[2]
        for other in ((64, 1, 1), (1, 64, 1), (1, 1, 64), (4, 4, 4), (1, 8, 8), (2, 2, 16)):
            steps = [-(-size // step) for size, step in zip(covered, other, strict=True)]
            assert tiles(covered, 64) <= steps[0] * steps[1] * steps[2]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
def test_descriptors_are_tried_from_hopper_on(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    on_gpu = torch.device("cuda", 0)
    for conv_pass in strided_conv_gpu.PASSES:
        found = strided_conv_gpu.configs(WIDE, on_gpu, conv_pass)
        forms = [config.descriptors for config in found]
        expected = capability >= (9, 0) and conv_pass != "weight_grad"
        assert any(forms) == expected
        # The first one runs where nothing can be timed; the tuner tells them apart by name.
        assert forms == sorted(forms) and not forms[0]
        assert len({strided_conv_gpu.name_of(config) for config in found}) == len(found)
    odd = WIDE._replace(big_size=(2, 64, 9, 8))
    forms = {
        conv_pass: any(c.descriptors for c in strided_conv_gpu.configs(odd, on_gpu, conv_pass))
        for conv_pass in ("up", "down")
    }
    assert forms == {"up": capability >= (9, 0), "down": False}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not any(c.descriptors for c in strided_conv_gpu.configs(WIDE, on_gpu, "up"))


def test_descriptors_are_tried_where_they_fit() -> None:
    from pygan.kernels.strided_conv_configs import with_descriptors

    half, single = (torch.float16, "tf32"), (torch.float32, "tf32")
    assert with_descriptors("up", 8, 64, *half)
    for a, b in ((12, 64), (64, 12), (64, 3)):
        assert with_descriptors("up", a, b, *half) == ()  # rows of memory that do not start aligned
    assert with_descriptors("up", 12, 128, *single)
    assert with_descriptors("up", 10, 128, *single) == ()
    assert with_descriptors("down", 5, 128, *half)
    for b in (32, 96, 3):
        assert with_descriptors("down", 64, b, *half) == ()  # a block of terms over two taps
    assert with_descriptors("down", 64, 96, *single)
    assert {c.block_n for c in with_descriptors("down", 64, 64, *half)} == {64}
    assert {c.block_n for c in with_descriptors("down", 96, 64, *half)} == {64, 128}
    for conv_pass in ("up", "down"):
        assert with_descriptors(conv_pass, 128, 128, torch.float32, "ieee") == ()
