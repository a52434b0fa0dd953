"""A training batch from a set of uint8 images: gather, flip, scale and cast in one pass.

    out[b, c, y, x] = (images[index[b], y, x', c] - 127.5) / 127.5,  x' = W-1-x where flip[b]

Exactly -1 at 0 and 1 at 255. Shapes: images ``[N, H, W, C]`` uint8, index ``[B]`` int64, flip
``[B]`` bool; out ``[B, C, H, W]``, channels_last. There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pygan.errors import UserError
from pygan.ops import cuda_native, dispatch, gpu, map_memory, native
from pygan.ops.recorded import recorded

_MOST_VALUES = 1 << 30  # of an image, whose index is 32 bits wide


def image_batch_ref(
    images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition in torch."""
    batch = images[index]
    if flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(2), batch)
    # float32 whatever the target: half precision cannot hold all of 0 ... 255 minus 127.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ((batch.to(wide) - 127.5) / 127.5).to(dtype).permute(0, 3, 1, 2)


def _apart(images: Tensor, index: Tensor, flip: Tensor | None) -> str | None:
    """Reason that the kernels cannot read all of these, or None."""
    for name, tensor in (("index", index), ("flip", flip)):
        if tensor is not None and tensor.device != images.device:
            return f"{name} is on {tensor.device}, the images are on {images.device}"
    if not images.is_contiguous():
        return "the images are not contiguous as [N, H, W, C]"
    if images.shape[1:].numel() >= _MOST_VALUES:
        return f"an image has {images.shape[1:].numel()} values, not below {_MOST_VALUES}"
    return None


def _supports_cpu(
    images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype
) -> str | None:
    if images.device.type != "cpu" or index.device.type != "cpu":
        return f"the images are on {images.device}, not on the CPU"
    if dtype not in native.DTYPES:
        return f"the dtype is {dtype}, not float32 or bfloat16"
    return _apart(images, index, flip) or native.reason()


def _supports_cuda(
    images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype
) -> str | None:
    if (reason := gpu.unfit(dtype)) is not None:
        return reason
    if not images.is_cuda:
        return f"the images are on {images.device}, not on a GPU"
    return _apart(images, index, flip) or cuda_native.reason()


def _supports_triton(
    images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype
) -> str | None:
    unfit = gpu.unfit(dtype) or _apart(images, index, flip)
    return unfit or dispatch.supports_triton(images)


def _cpu(out: Tensor, images: Tensor, index: Tensor, flip: Tensor | None) -> None:
    module = native.load()
    assert module is not None
    count, height, width, channels = images.shape
    module.image_batch(
        images.data_ptr(),
        count,
        height,
        width,
        channels,
        index.data_ptr(),
        native.address(flip),
        index.numel(),
        native.DTYPES[out.dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _cuda(out: Tensor, images: Tensor, index: Tensor, flip: Tensor | None) -> None:
    cuda_native.run(
        cuda_native.module().image_batch,
        images,
        images.data_ptr(),
        *images.shape,
        index.data_ptr(),
        native.address(flip),
        index.numel(),
        gpu.DTYPES[out.dtype],
        out.data_ptr(),
    )


def _triton(out: Tensor, images: Tensor, index: Tensor, flip: Tensor | None) -> None:
    from pygan.kernels import image_batch as kernels

    kernels.image_batch(out, images, index, flip)


_KERNELS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton}


@recorded
def image_batch(
    images: Tensor,
    index: Tensor,
    *,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """See :func:`pygan.functional.image_batch`."""
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; give uint8 [N, H, W, C]"
        )
    if index.dtype != torch.int64 or index.dim() != 1:
        raise UserError(f"index is {index.dtype} of shape {tuple(index.shape)}; give int64 [B]")
    if flip is not None and (flip.dtype != torch.bool or flip.shape != index.shape):
        raise UserError(
            f"flip is {flip.dtype} of shape {tuple(flip.shape)}; give bool {tuple(index.shape)}"
        )
    chosen = dispatch.choose(
        "image_batch",
        impl,
        [
            ("cuda", lambda: _supports_cuda(images, index, flip, dtype)),
            ("triton", lambda: _supports_triton(images, index, flip, dtype)),
            ("cpu", lambda: _supports_cpu(images, index, flip, dtype)),
            ("torch", dispatch.always),
        ],
    )
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= images.shape[0]:
            raise UserError(
                f"index runs from {low} to {high}; there are {images.shape[0]} images, so it must "
                f"stay within 0 and {images.shape[0] - 1}"
            )
    if chosen == "torch":
        return image_batch_ref(images, index, flip, dtype)
    size = (index.numel(), *images.shape[1:])
    if images.is_cpu:
        out = map_memory.empty(size, dtype)
    else:
        out = torch.empty(size, dtype=dtype, device=images.device)
    flip = None if flip is None else flip.contiguous()
    _KERNELS[chosen](out, images, index.contiguous(), flip)
    return out.permute(0, 3, 1, 2)
