from __future__ import annotations

import pytest
import torch
from implementations import CPU, DTYPES, INTERPRETED, TRITON

from pygan.errors import UserError
from pygan.functional import image_batch

IMPLS = [CPU, TRITON]


def images(count: int, height: int, width: int, channels: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "half"])
@pytest.mark.parametrize("flipped", [None, "some"])
@pytest.mark.parametrize("size", [(32, 32, 1), (5, 7, 3), (1, 1, 1), (9, 1500, 3), (64, 64, 3)])
def test_equals_definition(
    size: tuple[int, int, int], flipped: str | None, dtype: torch.dtype, impl: str
) -> None:
    source = images(11, *size)
    index = torch.tensor([3, 0, 10, 3, 7])
    flip = None if flipped is None else torch.tensor([True, False, True, False, True])
    ours = image_batch(source, index, flip=flip, dtype=dtype, impl=impl)
    definition = image_batch(source, index, flip=flip, dtype=dtype, impl="torch")
    assert ours.shape == (5, size[2], size[0], size[1])
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, definition)


@pytest.mark.parametrize("impl", IMPLS)
def test_ends_are_exact(impl: str) -> None:
    source = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1)
    batch = image_batch(source, torch.tensor([0]), impl=impl)
    assert batch.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.native
def test_empty_batch() -> None:
    batch = image_batch(images(3, 4, 4, 1), torch.empty(0, dtype=torch.int64))
    assert batch.shape == (0, 1, 4, 4)


@pytest.mark.native
def test_wrong_arguments_are_named() -> None:
    source = images(3, 4, 4, 1)
    with pytest.raises(UserError, match="stay within 0 and 2"):
        image_batch(source, torch.tensor([0, 3]))
    with pytest.raises(UserError, match="stay within"):
        image_batch(source, torch.tensor([-1]))
    with pytest.raises(UserError, match="uint8"):
        image_batch(source.float(), torch.tensor([0]))
    with pytest.raises(UserError, match="int64"):
        image_batch(source, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(UserError, match="flip is"):
        image_batch(source, torch.tensor([0]), flip=torch.tensor([1]))
    elsewhere = torch.tensor([True], device="meta")
    with pytest.raises(UserError, match="flip is on meta, the images are on cpu"):
        image_batch(source, torch.tensor([0]), flip=elsewhere, impl="cpu")
    with pytest.raises(RuntimeError, match="meta"):
        image_batch(source, torch.tensor([0]), flip=elsewhere)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1")
def test_an_index_on_the_device_that_is_no_images_is_nan() -> None:
    kernels = pytest.importorskip("pygan.kernels.image_batch")
    out = torch.zeros(3, 4, 4, 1)
    kernels.image_batch(out, images(3, 4, 4, 1), torch.tensor([-1, 2, 3]), None)
    assert out.flatten(1).isnan().all(1).tolist() == [True, False, True]
    assert not out[1].isnan().any()
