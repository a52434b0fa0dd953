"""Operations as functions, torch's argument order first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pygan.augment import diff_augment
from pygan.losses import GanLoss, gan_d_loss, gan_g_loss
from pygan.ops import binary_cross_entropy as _bce
from pygan.ops import folded_conv as _folded
from pygan.ops import image_batch as _batch
from pygan.ops import norm_act as _norm
from pygan.ops import strided_conv as _conv
from pygan.ops.moments import Moments
from pygan.penalties import gradient_penalty, r1_penalty

__all__ = [
    "GanLoss",
    "binary_cross_entropy",
    "conv2d",
    "conv2d_avg_pool",
    "conv_norm_act",
    "conv_transpose2d",
    "conv_transpose_norm_act",
    "diff_augment",
    "gan_d_loss",
    "gan_g_loss",
    "gradient_penalty",
    "image_batch",
    "norm_act",
    "r1_penalty",
    "upsample_conv2d",
]


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``torch.nn.functional.binary_cross_entropy``, with the gradient of the logits.

    Where ``input`` is what a sigmoid put out, viewed in another shape perhaps, the gradient behind
    that sigmoid is the one of ``binary_cross_entropy_with_logits``, also where the probabilities
    have become 0 or 1, from where torch's own loss sends none back. Value and every other gradient
    are torch's to the bit. On any device.

    Args:
        input: probabilities, any shape and floating type.
        target: of the same shape.
        weight: of every element, broadcast, or None.
        size_average, reduce: deprecated in torch; with them the loss is torch's own.
        reduction: "mean", "sum" or "none".

    Raises:
        RuntimeError, ValueError: arguments that torch does not take.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, section 3.
    """
    return _bce.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """``torch.nn.functional.conv2d``, faster where a GAN's discriminator calls it.

    4x4 kernels with stride 2 and padding 1 run natively on a CPU. A kernel that covers its whole
    map, without padding, is one product of matrices there. Everything else is torch's.

    Args:
        input: ``[N, B, H, W]``; float32 and bfloat16 run natively. Under autocast to bfloat16 it
            is cast, and a float32 ``weight`` goes in as it is.
        weight: ``[A, B, 4, 4]``, or any that torch takes; changes in place count at once.
        bias: ``[A]`` or None.
        stride, padding, dilation, groups: as torch's.
        method: of the native kernels: "direct" (few input channels), "f22" or "f42" (Winograd
            with 2x2 and 4x4 outputs a tile; no "f42" in bfloat16 on a CPU that multiplies it
            itself), or "auto". A named one runs the gradients too where it can.
        impl: "auto", "cpu", "triton" or "torch".

    Returns:
        ``[N, A, H', W']`` in the dtype and memory format that torch gives. Differentiable to any
        order.

    Raises:
        UserError: an unknown method or implementation, or one that cannot take these arguments.
        RuntimeError: arguments that torch does not take.

    Source: Lavin and Gray 2016, arXiv:1509.09308, on the four parities of rows and columns.
    """
    return _conv.conv2d(
        input, weight, bias, stride, padding, dilation, groups, method=method, impl=impl
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d``, faster where a GAN's generator calls it.

    4x4 kernels with stride 2 and padding 1 run natively on a CPU. A 1x1 map without padding is
    one product of matrices there. Everything else is torch's.

    Args:
        input: ``[N, A, H, W]``, as :func:`conv2d`'s.
        weight: ``[A, B, 4, 4]``, or any that torch takes; changes in place count at once.
        bias: ``[B]`` or None.
        stride, padding, output_padding, groups, dilation: as torch's.
        method: of the native kernels: "direct" (few output channels), "f22", "f42" or "auto".
        impl: "auto", "cpu", "triton" or "torch".

    Returns:
        ``[N, B, H', W']`` in the dtype and memory format that torch gives. Differentiable to any
        order.

    Raises:
        UserError: an unknown method or implementation, or one that cannot take these arguments.
        RuntimeError: arguments that torch does not take.

    Source: as :func:`conv2d`.
    """
    return _conv.conv_transpose2d(
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        method=method,
        impl=impl,
    )


def upsample_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """``conv2d(interpolate(input, scale_factor=2, mode="nearest"), weight, bias, padding=1)``.

    On a CPU it is one 4x4 :func:`conv_transpose2d` of stride 2 with the folded weight, 16
    multiplications in place of 36 and Winograd on top, where that is faster: the sums are the
    same, in another order. Else the two operations of torch.

    Args:
        input: ``[N, B, H, W]``; float32 and bfloat16 run natively, autocast as :func:`conv2d`'s.
        weight: ``[A, B, 3, 3]``; changes in place count at once.
        bias: ``[A]`` or None.
        method: as :func:`conv_transpose2d`'s. A named one runs for every size.
        impl: "auto", "cpu" (the fold, for every size) or "torch".

    Returns:
        ``[N, A, 2H, 2W]`` in the dtype that torch gives, in channels_last where input or weight
        are. Differentiable to any order.

    Raises:
        UserError: an unknown method or implementation, or one that cannot take these arguments.
        RuntimeError: arguments that torch does not take.

    Source: Odena, Dumoulin and Olah 2016, doi:10.23915/distill.00003, for the pair; its kernels as
    :func:`conv2d`.
    """
    return _folded.upsample_conv2d(input, weight, bias, method=method, impl=impl)


def conv2d_avg_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """``avg_pool2d(conv2d(input, weight, bias, padding=1), 2)``.

    On a CPU it is one 4x4 :func:`conv2d` of stride 2 with the folded weight where that is faster,
    as :func:`upsample_conv2d`.

    Args:
        input: ``[N, B, H, W]``, H and W of at least 2; a last odd row or column is dropped as the
            pooling drops it.
        weight, bias, impl: as :func:`upsample_conv2d`'s.
        method: as :func:`conv2d`'s. A named one runs for every size.

    Returns:
        ``[N, A, H // 2, W // 2]``, as :func:`upsample_conv2d`.

    Raises:
        UserError: an unknown method or implementation, or one that cannot take these arguments.
        RuntimeError: arguments that torch does not take.

    Source: Gulrajani et al. 2017, arXiv:1704.00028, the residual blocks, for the pair; its kernels
    as :func:`conv2d`.
    """
    return _folded.conv2d_avg_pool(input, weight, bias, method=method, impl=impl)


def norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    negative_slope: float = 0.2,
    groups: int = 1,
    impl: str = "auto",
) -> Tensor:
    """``activation(batch_norm(input))``, in one operation.

    Args:
        input: ``[N, C, *]``, contiguous or channels_last; float32 and bfloat16 run natively on a
            CPU, other types and devices as torch operations.
        running_mean, running_var: float32 ``[C]``, updated in place when ``training``; None for
            no running statistics.
        weight, bias: ``[C]`` or None.
        training: statistics of the batch, else the running ones.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        activation: "none", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of "leaky_relu".
        groups: training statistics are taken in this many equal runs of the batch; the running
            statistics follow them in order.
        impl: "auto", "cpu" or "torch".

    Returns:
        Tensor of the shape, dtype and layout of ``input``. Differentiable to any order.

    Raises:
        UserError: an unknown activation or implementation, a batch that does not divide.
        ValueError: one value a channel while training, as torch's batch norm.
        RuntimeError: parameters or buffers that do not fit the channels.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    return _norm.norm_act(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        activation=activation,
        negative_slope=negative_slope,
        groups=groups,
        impl=impl,
    )


def _moments(input: Tensor, training: bool, groups: int) -> Moments | None:
    """What a convolution on this batch is to tell the batch norm behind it."""
    divides = input.dim() == 4 and groups > 0 and input.shape[0] % groups == 0
    return Moments(groups) if training and divides else None


def conv_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
    batch_groups: int = 1,
    impl: str = "auto",
) -> Tensor:
    """``activation(batch_norm(conv2d(input)))``: a discriminator's block, by :func:`conv2d` and
    :func:`norm_act`.

    Args:
        input: ``[N, B, H, W]``; types, layouts and autocast as :func:`conv2d`'s.
        weight: ``[A, B, 4, 4]``, or any that torch takes.
        bias: ``[A]`` or None; in training the norm takes it out again.
        running_mean, running_var: float32 ``[A]``, updated in place when ``training``; None for
            no running statistics.
        norm_weight, norm_bias: of the batch norm, ``[A]`` or None.
        stride, padding, dilation, groups: of the convolution, as torch's.
        training, momentum, eps: of the batch norm, as torch's.
        activation, negative_slope: as :func:`norm_act`'s.
        batch_groups: ``groups`` of :func:`norm_act`.
        impl: of both, "auto", "cpu" or "torch"; "cpu" for 4x4 kernels of stride 2 and padding 1.

    Returns:
        ``[N, A, H', W']`` in the dtype and memory format of the convolution's result.
        Differentiable to any order.

    Raises:
        UserError: an unknown activation, an implementation that cannot take these arguments, no
            running statistics in evaluation, a batch that does not divide into its groups.
        ValueError: one value a channel while training, as torch's batch norm.
        RuntimeError: arguments that torch does not take.

    Source: Radford, Metz and Chintala 2015, arXiv:1511.06434, section 3; the operations' own.
    """
    moments = _moments(input, training, batch_groups)
    y = _conv.conv2d(
        *(input, weight, bias, stride, padding, dilation, groups), impl=impl, moments=moments
    )
    return _norm.norm_act(
        y,
        running_mean,
        running_var,
        norm_weight,
        norm_bias,
        training,
        momentum,
        eps,
        activation=activation,
        negative_slope=negative_slope,
        groups=batch_groups,
        impl=impl,
        given=moments,
    )


def conv_transpose_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
    batch_groups: int = 1,
    impl: str = "auto",
) -> Tensor:
    """``activation(batch_norm(conv_transpose2d(input)))``: a generator's block, by
    :func:`conv_transpose2d` and :func:`norm_act`.

    Args:
        input: ``[N, A, H, W]``; types, layouts and autocast as :func:`conv2d`'s.
        weight: ``[A, B, 4, 4]``, or any that torch takes.
        bias: ``[B]`` or None; in training the norm takes it out again.
        running_mean, running_var: float32 ``[B]``, updated in place when ``training``; None for
            no running statistics.
        norm_weight, norm_bias: of the batch norm, ``[B]`` or None.
        stride, padding, output_padding, groups, dilation: of the convolution, as torch's.
        training, momentum, eps, activation, negative_slope, batch_groups, impl: as
            :func:`conv_norm_act`'s.

    Returns:
        ``[N, B, H', W']``, as :func:`conv_norm_act`.

    Raises:
        UserError, ValueError, RuntimeError: as :func:`conv_norm_act`.

    Source: as :func:`conv_norm_act`.
    """
    moments = _moments(input, training, batch_groups)
    y = _conv.conv_transpose2d(
        *(input, weight, bias, stride, padding, output_padding, groups, dilation),
        impl=impl,
        moments=moments,
    )
    return _norm.norm_act(
        y,
        running_mean,
        running_var,
        norm_weight,
        norm_bias,
        training,
        momentum,
        eps,
        activation=activation,
        negative_slope=negative_slope,
        groups=batch_groups,
        impl=impl,
        given=moments,
    )


def image_batch(
    images: Tensor,
    index: Tensor,
    *,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """A batch in [-1, 1] from a set of uint8 images, in one pass.

    Args:
        images: uint8 ``[N, H, W, C]``.
        index: int64 ``[B]``, which images.
        flip: bool ``[B]``, which of them to mirror left to right; None for none.
        dtype: of the result.
        impl: "auto", "cpu", "triton" or "torch".

    Returns:
        ``[B, C, H, W]`` in channels_last, -1 for 0 and 1 for 255, exactly.

    Raises:
        UserError: wrong dtypes or shapes; an index outside the set (checked on a CPU only, where
            it costs no synchronisation).
    """
    return _batch.image_batch(images, index, flip=flip, dtype=dtype, impl=impl)
