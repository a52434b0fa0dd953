"""Which GPUs and which sizes the kernels take, told without one."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pygan.errors import UserError
from pygan.functional import norm_act
from pygan.ops import cuda_native, dispatch, image_batch, norm_act_triton, strided_conv_gpu

OF_ALL = "75 80 86 89 90 100 120"


@pytest.fixture
def capabilities(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """A machine whose GPUs have these, to be filled."""
    found: list[tuple[int, int]] = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device=None: found[0 if device is None else device.index],
    )
    kept = (dispatch.triton_reason, dispatch._too_old, cuda_native.reason)
    for function in kept:
        function.cache_clear()
    yield found
    for function in kept:
        function.cache_clear()


def on_gpu(index: int = 0) -> Any:
    """What is asked of a tensor that is on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", index))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_triton_does_not_compile_for_old_gpus(
    capability: tuple[int, int], capabilities: list[tuple[int, int]]
) -> None:
    pytest.importorskip("triton")
    capabilities.append(capability)
    said = "sm_{}{}; Triton compiles for sm_80 and later".format(*capability)
    assert said in (dispatch.triton_reason() or "")
    assert said in (dispatch.supports_triton(on_gpu()) or "")


def test_triton_runs_on_the_gpus_that_are_new_enough(capabilities: list[tuple[int, int]]) -> None:
    pytest.importorskip("triton")
    capabilities += [(7, 5), (9, 0), (10, 0)]
    assert dispatch.triton_reason() is None
    assert "sm_75" in (dispatch.supports_triton(on_gpu(0)) or "")
    assert dispatch.supports_triton(on_gpu(1)) is None
    assert dispatch.supports_triton(on_gpu(2), on_gpu(2)) is None
    assert "on cuda:2, another one on cuda:1" in (
        dispatch.supports_triton(on_gpu(1), on_gpu(2)) or ""
    )


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (OF_ALL, (7, 0), False),
        (OF_ALL, (7, 5), True),
        (OF_ALL, (8, 7), True),
        (OF_ALL, (10, 3), True),
        # Machine code is of another major version, and the portable code is of a later one.
        (OF_ALL, (11, 0), False),
        (OF_ALL, (12, 1), True),
        (OF_ALL, (13, 0), True),
        ("80", (9, 0), True),
        ("86", (8, 0), False),
        ("90 80", (8, 6), True),
    ],
)
def test_architectures_that_the_extension_runs_on(
    architectures: str,
    capability: tuple[int, int],
    runs: bool,
    capabilities: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extension = SimpleNamespace(unusable=lambda: "", architectures=lambda: architectures)
    monkeypatch.setattr(cuda_native, "_load", lambda: (extension, None))
    capabilities.append(capability)
    reason = cuda_native.reason()
    assert (reason is None) == runs
    if reason is not None:
        assert "the GPU is sm_{}{}; ".format(*capability) in reason and "sm_8" in reason


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_what_an_index_of_32_bits_does_not_reach() -> None:
    assert "values" in (norm_act_triton.supports(empty(2**21, 1024)) or "")
    for small, big in (((2**19, 8, 63, 63), (2**19, 8, 126, 126)), ((1, 2**14, 1, 1),) * 2):
        big = (*big[:2], 2 * small[2], 2 * small[3])
        assert strided_conv_gpu.supports_sizes(small, big) is not None
    assert strided_conv_gpu.supports_sizes((1024, 1024, 64, 64), (1024, 512, 128, 128)) is None
    index = empty(1, dtype=torch.int64)
    for images, fits in ((empty(1, 2**15, 2**15, 1), False), (empty(2**20, 64, 64, 3), True)):
        assert (image_batch._apart(images, index, None) is None) == fits


def test_parameters_elsewhere_are_named() -> None:
    x, weight = torch.randn(4, 3, 2, 2), torch.ones(3, device="meta")
    with pytest.raises(UserError, match="on meta, not on cpu"):
        norm_act(x, None, None, weight, training=True, impl="cpu")


def test_the_wish_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYGAN_IMPL", raising=False)
    assert dispatch.wished() == "auto"
    monkeypatch.setenv("PYGAN_IMPL", "cpu")
    assert dispatch.wished() == "cpu"
    monkeypatch.setenv("PYGAN_IMPL", "")
    assert dispatch.wished() == ""


def test_the_environment_is_read_without_its_dict_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.os, "environ", {"PYGAN_IMPL": "torch"})
    read = dispatch._variable("PYGAN_IMPL")
    assert read() == "torch"
    assert dispatch._variable("PYGAN_NONE")() is None
