"""Blocks of generators and discriminators as modules that run fused from the start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pygan.errors import UserError
from pygan.sequential import FusedSequential

__all__ = ["DiscriminatorBlock", "GeneratorBlock"]

Size = int | tuple[int, int]


class _Block(FusedSequential):
    """``conv``, ``norm`` and ``activation``, the last two where there are any."""

    def __init__(
        self,
        conv: nn.Module,
        channels: int,
        norm: bool,
        activation: str,
        negative_slope: float,
        **settings: Any,
    ) -> None:
        layers: dict[str, nn.Module] = {"conv": conv}
        if norm:
            layers["norm"] = nn.BatchNorm2d(channels, **settings)
        if (follower := _activation(activation, negative_slope)) is not None:
            layers["activation"] = follower
        super().__init__(OrderedDict(layers))

    def __getitem__(self, index: slice | int) -> Any:
        # A part of a block is no block: its class could not be built from layers.
        if isinstance(index, slice):
            return FusedSequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _activation(name: str, negative_slope: float) -> nn.Module | None:
    made: dict[str, Callable[[], nn.Module | None]] = {
        "none": lambda: None,
        "relu": lambda: nn.ReLU(inplace=True),
        "leaky_relu": lambda: nn.LeakyReLU(negative_slope, inplace=True),
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
    }
    if name not in made:
        raise UserError(f"activation is {name!r}; it is one of {', '.join(made)}")
    return made[name]()


def _check_channels(**channels: int) -> None:
    for name, count in channels.items():
        if count < 1:
            raise UserError(f"{name} is {count}; give a whole number of at least 1")


class GeneratorBlock(_Block):
    """ConvTranspose2d, BatchNorm2d and an activation: ``[N, in_channels, H, W]`` to ``[N,
    out_channels, 2H, 2W]`` with the usual kernel of 4, stride of 2 and padding of 1.

    The first block of a generator, ``stride=1, padding=0``, makes ``[N, out_channels, 4, 4]`` of a
    latent ``[N, nz, 1, 1]``. The last has ``norm=False, activation="tanh"``.

    A ``nn.Sequential`` of ``conv``, ``norm`` and ``activation``, which are torch's own modules:
    ``state_dict`` has the keys ``conv.weight``, ``norm.running_mean`` and so on; hooks, deep
    copies, pickles and ``.to`` work as ever. Computes what these modules do in turn, in the dtype
    and memory format that they would give, by the operations of :func:`pygan.fuse`.

    Args:
        in_channels, out_channels: at least 1.
        kernel_size, stride, padding, output_padding: of the convolution, as torch's.
        norm: whether there is a batch norm.
        activation: "none", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of "leaky_relu".
        bias: of the convolution; None for one where there is no norm to take it out again.
        eps, momentum, affine, track_running_stats: of the batch norm, as torch's.
        device, dtype: of parameters and buffers.

    Raises:
        UserError: an unknown activation, no channels.

    Source: Radford, Metz and Chintala 2015, arXiv:1511.06434, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Size = 4,
        stride: Size = 2,
        padding: Size = 1,
        output_padding: Size = 0,
        norm: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.2,
        bias: bool | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_channels(in_channels=in_channels, out_channels=out_channels)
        conv = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            bias=not norm if bias is None else bias,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            conv,
            out_channels,
            norm,
            activation,
            negative_slope,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )


class DiscriminatorBlock(_Block):
    """Conv2d, BatchNorm2d and an activation: ``[N, in_channels, H, W]`` to ``[N, out_channels,
    H/2, W/2]`` with the usual kernel of 4, stride of 2 and padding of 1.

    The first block of a discriminator has ``norm=False``. The last, ``stride=1, padding=0,
    norm=False, activation="none"``, makes one logit ``[N, 1, 1, 1]`` of a 4x4 map.

    Args and everything else: as :class:`GeneratorBlock`, without ``output_padding``.

    Raises:
        UserError: an unknown activation, no channels.

    Source: Radford, Metz and Chintala 2015, arXiv:1511.06434, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Size = 4,
        stride: Size = 2,
        padding: Size = 1,
        norm: bool = True,
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        bias: bool | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_channels(in_channels=in_channels, out_channels=out_channels)
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=not norm if bias is None else bias,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            conv,
            out_channels,
            norm,
            activation,
            negative_slope,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
