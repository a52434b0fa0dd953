"""FLOPs and bytes of the minimal algorithm, counted from the layers.

A multiply-add is 2 FLOPs; borders count as if they were interior. Bytes are those that cross
main memory when no tensor stays in a cache and every step that can ride along with another does:

- a convolution pass reads its two operands and writes its result, activation included;
- batch norm reads its input and writes its output (its statistics ride along with the convolution
  before it); its backward reads input and gradient once for the sums and once for the gradient,
  which it writes;
- Adam reads weight, gradient and both moments, and writes weight and moments, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

WEIGHT_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NORM_FORWARD_PASSES = 2
NORM_BACKWARD_PASSES = 5
ADAM_PASSES = 7


class Work(NamedTuple):
    """FLOPs and bytes of one call."""

    flops: float
    bytes: float


@dataclass
class Forward:
    """One image through a network: multiply-adds, and elements moved."""

    macs: int = 0
    first_macs: int = 0
    moved: int = 0
    first_moved: int = 0
    weights: int = 0
    first_weights: int = 0
    normed: int = 0


def _macs(layer: nn.Module, given: Tensor, made: Tensor) -> int:
    """Multiply-adds an image: every weight once per position of the side it is swept over."""
    if isinstance(layer, nn.Linear):
        return layer.weight.numel()
    swept = given if isinstance(layer, nn.ConvTranspose2d) else made
    return layer.weight.numel() * swept[0, 0].numel()  # type: ignore[operator]


def count_forward(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Count one image's forward pass of ``network`` (on the meta device) for input ``[N, *shape]``.

    ``first_*`` is the share of the layer that sees the input: its input gradient is needed only
    when something before the network is trained.
    """
    count = Forward()

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> None:
        given = inputs[0]
        if isinstance(layer, nn.BatchNorm2d):
            count.normed += made[0].numel()
            return
        macs = _macs(layer, given, made)
        moved = given[0].numel() + made[0].numel()
        weights = layer.weight.numel()  # type: ignore[operator]
        if not count.macs:
            count.first_macs, count.first_moved, count.first_weights = macs, moved, weights
        count.macs += macs
        count.moved += moved
        count.weights += weights

    hooks = [
        layer.register_forward_hook(see)
        for layer in network.modules()
        if isinstance(layer, (*WEIGHT_LAYERS, nn.BatchNorm2d))
    ]
    try:
        # Two images: batch norm refuses a 1x1 map of a single one.
        network(torch.empty((2, *shape), device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return count


def update_flops(generator: Forward, discriminator: Forward, *, naive: bool = False) -> int:
    """FLOPs an image of one update of D and then of G on one shared fake batch.

    Minimal: G forward, gradients of its weights and of all inputs but z; D on real and fake with
    the gradients of its weights and of all inputs but the images; D on the fake again with the
    gradient down to the image. ``naive`` adds D's weight gradients in the G step, which loops
    compute and throw away.
    """
    g, d = generator, discriminator
    macs = 3 * g.macs - g.first_macs
    macs += 2 * (3 * d.macs - d.first_macs)
    macs += 2 * d.macs
    if naive:
        macs += d.macs
    return 2 * macs


def update_bytes(
    generator: Forward, discriminator: Forward, parameters: int, batch: int, itemsize: int
) -> float:
    """Bytes an image of the same update, with activations of ``itemsize`` bytes an element."""
    g, d = generator, discriminator
    elements = 3 * g.moved - g.first_moved
    elements += 2 * (3 * d.moved - d.first_moved) + 2 * d.moved
    elements += (NORM_FORWARD_PASSES + NORM_BACKWARD_PASSES) * (g.normed + 3 * d.normed)
    per_batch = 3 * g.weights - g.first_weights + 3 * d.weights - d.first_weights + 2 * d.weights
    return elements * itemsize + (per_batch * itemsize + ADAM_PASSES * 4 * parameters) / batch


def train_step_work(
    generator: nn.Module,
    discriminator: nn.Module,
    latent: tuple[int, ...],
    image: tuple[int, int, int],
    batch: int,
    itemsize: int,
) -> Work:
    """One update of ``batch`` images ``[C, H, W]``, as D sees them; the networks live on the meta
    device."""
    g = count_forward(generator, latent)
    d = count_forward(discriminator, image)
    parameters = sum(p.numel() for net in (generator, discriminator) for p in net.parameters())
    flops = update_flops(g, d)
    return Work(batch * flops, batch * update_bytes(g, d, parameters, batch, itemsize))


def penalty_work(network: nn.Module, shape: tuple[int, ...], batch: int, itemsize: int) -> Work:
    """A penalty on the gradient of ``network``'s output with respect to ``batch`` inputs: forward,
    that gradient, and the way back through it: gradients of the weights, and of what it was made
    of. Without norms and with piecewise linear activations nothing comes back to the forward. The
    network lives on the meta device.
    """
    count = count_forward(network, shape)
    moved = batch * count.moved + (count.weights if batch else 0)
    return Work(8.0 * batch * count.macs, 4.0 * moved * itemsize)


def forward_work(network: nn.Module, shape: tuple[int, ...], batch: int, itemsize: int) -> Work:
    """A forward pass of ``batch`` inputs ``shape`` alone, with known statistics of batch norm: norm
    and activation ride along with the convolution before them. The network lives on the meta
    device.
    """
    count = count_forward(network, shape)
    moved = batch * count.moved + count.weights
    return Work(2.0 * batch * count.macs, float(moved * itemsize))


def forward_backward_work(
    networks: Iterable[tuple[nn.Module, tuple[int, ...]]], batch: int, itemsize: int
) -> Work:
    """Forward and backward of each network for ``batch`` inputs of its shape, with the gradients
    of its weights and of its input. The networks live on the meta device.
    """
    flops = moved = 0.0
    for network, shape in networks:
        count = count_forward(network, shape)
        flops += 6.0 * batch * count.macs
        moved += batch * (
            3 * count.moved + (NORM_FORWARD_PASSES + NORM_BACKWARD_PASSES) * count.normed
        )
        moved += 3 * count.weights
    return Work(flops, moved * itemsize)


def norm_act_work(elements: int, itemsize: int) -> Work:
    """Batch norm + activation, forward and backward, alone: nothing rides along.

    Forward reads the input for the statistics and again to normalise, and writes; backward reads
    input and gradient twice and writes: 8 passes. FLOPs an element: sum and sum of squares 3,
    normalise 2, activation 1; mask 1, two sums 3, gradient 4.
    """
    return Work(14.0 * elements, 8.0 * elements * itemsize)


def gan_loss_work(logits: int, itemsize: int) -> Work:
    """A GAN loss, its gradient and the mean probability: one read, one write of the gradient.

    FLOPs a logit, an exponential or a logarithm as one: 10 (loss 5, sigmoid 2, gradient 2, mean 1).
    """
    return Work(10.0 * logits, 2.0 * logits * itemsize)


def image_batch_work(elements: int, itemsize: int) -> Work:
    """uint8 in, ``itemsize`` bytes out; one multiply-add an element."""
    return Work(2.0 * elements, float(elements * (1 + itemsize)))


def strided_conv_work(
    batch: int, size: int, small_channels: int, big_channels: int, itemsize: int
) -> Work:
    """A pass of the 4x4 convolution of stride 2 between maps of ``size`` and ``2 * size`` squared.

    The three passes sweep the weight over the small map alike; each reads two of small map, big map
    and weight, and writes the third.
    """
    weights = 16 * small_channels * big_channels
    positions = batch * size * size
    moved = positions * (small_channels + 4 * big_channels) + weights
    return Work(2.0 * positions * weights, float(moved * itemsize))


def folded_conv_work(
    batch: int, size: int, small_channels: int, big_channels: int, passes: int, itemsize: int
) -> Work:
    """A 3x3 convolution folded with an upsampling or pooling by 2: ``passes`` of the 4x4 one.

    The weight has 9 taps in memory and 16 in the sums.
    """
    flops, moved = strided_conv_work(batch, size, small_channels, big_channels, itemsize)
    spared = (16 - 9) * small_channels * big_channels * itemsize
    return Work(passes * flops, passes * (moved - spared))
