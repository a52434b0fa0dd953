"""The 4x4 convolution of stride 2 and padding 1, its transpose, and the gradient of their weight.

With small ``[N, A, H, W]``, big ``[N, B, 2H or 2H + 1, 2W or 2W + 1]``, w ``[A, B, 4, 4]`` and
big zero outside its edges:

    down: small[n, a, y, x] = sum_{b, i, j} big[n, b, 2y - 1 + i, 2x - 1 + j] w[a, b, i, j]
    up:   big[n, b, p, q] = sum of small[n, a, y, x] w[a, b, i, j] over 2y - 1 + i = p,
          2x - 1 + j = q
    weight_grad: dw[a, b, i, j] = sum_{n, y, x} small[n, a, y, x] big[n, b, 2y - 1 + i, 2x - 1 + j]

One trilinear form sum(small * down(big, w)) has them as its three derivatives, so each one's
gradients are the other two:

    y = up(small, w):            dsmall = down(dy, w),     dw = weight_grad(small, dy)
    y = down(big, w):            dbig = up(dy, w),         dw = weight_grad(dy, big)
    g = weight_grad(small, big): dsmall = down(big, dg),   dbig = up(small, dg)

with dbias = sum of dy over batch and space, and so on to any order. The kernels split big by the
parity of its rows and columns, where the 4x4 of stride 2 is four 2x2 convolutions of stride 1,
and compute these by Winograd's minimal filtering. Sums are float32; the weight and its gradient
are float32 for bfloat16 activations too.

A ReLU or LeakyReLU behind down runs with it where the direct kernels take all three passes. With
y = act(down(big, w)) and gate = 1 where y > 0, else the slope, the gradients are those of down
with dy * gate in dy's place, multiplied as the kernels read dy.

A tanh behind up, whose gradient is dy * (1 - y * y), runs with it where CUDA's kernels do.

On a GPU the passes are Triton's implicit GEMMs over the same parities, or kernels of CUDA where
big is an image, wherever these are measured to be faster than cuDNN; see
:mod:`pygan.ops.strided_conv_gpu`.

Saved: the input where the weight wants a gradient, the weight where the input does, and y where
there is an activation. Gradient order: input, weight, bias. Source: Lavin and Gray 2016,
arXiv:1509.09308.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pygan.errors import UserError
from pygan.ops import (
    dispatch,
    few_positions,
    image_conv_cuda,
    map_memory,
    native,
    norm_conv_gpu,
    strided_conv_gpu,
    torch_conv,
)
from pygan.ops.layout import is_last, reordered
from pygan.ops.matrix_product import matrix_product
from pygan.ops.moments import Moments
from pygan.ops.norm_conv_gpu import Norm
from pygan.ops.torch_conv import Sweep
from pygan.ops.wanted import wanted_gradients

METHODS = {"auto": 0, "direct": 2, "f22": 3, "f42": 4}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2}
DIRECT_CHANNELS = 4  # of big, at most

PASSES = {"up": 0, "down": 1, "weight_grad": 2}
_MAPS = {"none": 0, "small": 1, "big": 2}
_NORMALIZED = {"up": "small", "down": "big"}  # the map that a pass may read so
_NONE = 1
_TAKES = {
    "direct": f", it is for 1 to {DIRECT_CHANNELS} big channels",
    "f42": ", it is not for bfloat16 on a CPU that multiplies bfloat16 itself",
}
_LAST, _FIRST = torch.channels_last, torch.contiguous_format

_LIKE_DOWN = ((2, 2), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups


def up_ref(
    small: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]
) -> Tensor:
    """The definition in torch; an output padding of 1 makes the big side odd."""
    return F.conv_transpose2d(small, weight, bias, 2, 1, tuple(output_padding))


def down_ref(
    big: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """The definition in torch."""
    return activated(F.conv2d(big, weight, bias, 2, 1), activation, negative_slope)


def activated(z: Tensor, activation: str, negative_slope: float = 0.0) -> Tensor:
    """The output of a convolution with the activation behind it."""
    if activation == "none":
        return z
    if activation == "tanh":
        # What a convolution puts out is nobody else's, and no gradient needs it.
        return torch.tanh_(z)
    return F.relu(z) if activation == "relu" else F.leaky_relu(z, negative_slope)


def weight_grad_ref(small: Tensor, big: Tensor) -> Tensor:
    """The definition in torch: ``[A, B, 4, 4]`` in the type of small and big."""
    shape = (small.shape[1], big.shape[1], 4, 4)
    return conv2d_weight(big, shape, small, 2, 1)


class _Kernel(NamedTuple):
    shape: Any
    scratch: int  # bytes
    method: int


class _Layer(NamedTuple):
    """What the three passes between a small and a big map share, to any order of gradient."""

    small_size: tuple[int, ...]
    big_size: tuple[int, ...]
    weight_format: torch.memory_format
    # None where torch is to run the pass.
    up: _Kernel | None
    down: _Kernel | None
    weight_grad: _Kernel | None
    refused: tuple[str, ...]  # passes that the named method does not take
    # Who runs the passes of maps that are not the CPU's.
    gpu: strided_conv_gpu.Passes | None = None
    normalized: str = "none"  # "small" or "big", the map that they normalize as they read it
    ordinary: strided_conv_gpu.Passes | None = None  # those between maps that count as they are
    takes_moments: bool = False  # whether they take statistics of the map that is put out
    takes_tanh: bool = False  # whether up does

    @property
    def native(self) -> bool:
        return bool(self.up and self.down and self.weight_grad)

    def plain(self, dtype: torch.dtype) -> _Layer:
        """The same between maps that count as they are."""
        if self.gpu is not None:
            return _Layer(*self[:7], self.ordinary)
        sizes = (self.small_size, self.big_size)
        threads = torch.get_num_threads()
        return _layer(dtype, self.weight_format, *sizes, "auto", False, "none", threads)

    @property
    def takes_activation(self) -> bool:
        if self.gpu is not None:
            return self.gpu.take_activation
        return all(
            k and k.method == METHODS["direct"] for k in (self.up, self.down, self.weight_grad)
        )


@functools.lru_cache(maxsize=1024)
def _layer(
    dtype: torch.dtype,
    weight_format: torch.memory_format,
    small_size: tuple[int, ...],
    big_size: tuple[int, ...],
    method: str,
    named: bool,
    normalized: str,
    threads: int,
) -> _Layer:
    """The kernels by ``method``; a named one that does not take a pass leaves it to "auto".
    Those that read the map ``normalized`` ("none", "small" or "big") forward normalize it."""
    module = native.load()
    assert module is not None
    batch, a, height, width = small_size
    _, b, big_height, big_width = big_size

    def kernel(name: str, method: str) -> _Kernel | None:
        reads = name == "weight_grad" or _NORMALIZED[name] == normalized
        shape = module.StridedConvShape(
            native.DTYPES[dtype],
            0 if weight_format is _LAST else 1,
            batch,
            height,
            width,
            big_height,
            big_width,
            a,
            b,
            METHODS[method],
            _MAPS[normalized if reads else "none"],
            threads,
        )
        found = module.strided_conv_method(shape, PASSES[name])
        if found == _NONE:
            return None
        return _Kernel(shape, module.strided_conv_scratch(shape, PASSES[name]), found)

    found = {name: kernel(name, method) for name in PASSES}
    refused = tuple(name for name in PASSES if named and found[name] is None)
    found |= {name: kernel(name, "auto") for name in refused}
    kernels = (found["up"], found["down"], found["weight_grad"])
    return _Layer(small_size, big_size, weight_format, *kernels, refused=refused)


def _in_format(x: Tensor, last: bool) -> Tensor:
    if is_last(x) == last:
        return x
    if not x.is_cpu:
        form = _LAST if last else _FIRST
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=form).copy_(x)
    return map_memory.empty(x.shape, x.dtype, _LAST if last else _FIRST).copy_(x)


def _norm_of(coefficients: Tensor | None) -> tuple[Tensor | None, int]:
    """A normalized map's coefficients and their groups, as the kernels take them."""
    return coefficients, 0 if coefficients is None else coefficients.shape[0]


def _extra(layer: _Layer, coefficients: Tensor | None, slope: float) -> dict[str, Any]:
    """How a pass on a GPU reads its input."""
    if coefficients is None:
        return {}
    return {"normalized": strided_conv_gpu.Normalized(layer.normalized, coefficients, slope)}


def run_up(
    small: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: _Layer,
    last: bool,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
    coefficients: Tensor | None = None,
    moments: Moments | None = None,
    activation: str = "none",
) -> Tensor:
    """big in channels_last where ``last``, else contiguous. Only a layer that takes an activation
    takes a channels_last ``gate``, only one that normalizes small ``coefficients``, only one that
    takes ``moments`` fills them, and only one that takes tanh has that ``activation``."""
    kernel, dtype = layer.up, small.dtype
    if kernel is None:
        if layer.gpu is not None and (config := layer.gpu.up) is not None:
            operands = (small, weight, bias, gate, negative_slope)
            extra = _extra(layer, coefficients, negative_slope)
            extra |= {"moments": moments if layer.takes_moments else None}
            extra |= {"activation": activation}
            big = strided_conv_gpu.up(layer.gpu.shape, config, *operands, **extra)
            return _in_format(big, last)
        odd = [layer.big_size[i] - 2 * layer.small_size[i] for i in (2, 3)]
        bias = None if bias is None else bias.to(dtype)
        big = torch.convolution(small, weight.to(dtype), bias, (2, 2), (1, 1), (1, 1), True, odd, 1)
        return _in_format(big, last)
    module = native.load()
    assert module is not None
    small = small.contiguous(memory_format=_LAST)
    weight = weight.contiguous(memory_format=layer.weight_format)
    big = map_memory.empty(layer.big_size, dtype, _LAST)
    native.run(
        module.strided_conv_up,
        kernel.shape,
        small,
        gate,
        *_norm_of(coefficients),
        negative_slope,
        weight,
        bias,
        big,
        native.Scratch(kernel.scratch),
    )
    return big if last else _in_format(big, last)


def run_down(
    big: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: _Layer,
    last: bool,
    activation: str = "none",
    negative_slope: float = 0.0,
    coefficients: Tensor | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """small in channels_last where ``last``, else contiguous. Only a layer that takes an activation
    is given one, only one that normalizes big ``coefficients``, and only one that takes ``moments``
    fills them."""
    kernel, dtype = layer.down, big.dtype
    if kernel is None:
        if layer.gpu is not None and (config := layer.gpu.down) is not None:
            operands = (big, weight, bias, activation, negative_slope)
            extra = _extra(layer, coefficients, negative_slope)
            extra |= {"moments": moments if layer.takes_moments else None}
            small = strided_conv_gpu.down(layer.gpu.shape, config, *operands, **extra)
            return _in_format(small, last)
        bias = None if bias is None else bias.to(dtype)
        small = torch.convolution(
            big, weight.to(dtype), bias, (2, 2), (1, 1), (1, 1), False, (0, 0), 1
        )
        return _in_format(small, last)
    module = native.load()
    assert module is not None
    big = big.contiguous(memory_format=_LAST)
    weight = weight.contiguous(memory_format=layer.weight_format)
    small = map_memory.empty(layer.small_size, dtype, _LAST)
    native.run(
        module.strided_conv_down,
        kernel.shape,
        big,
        *_norm_of(coefficients),
        weight,
        bias,
        ACTIVATIONS[activation],
        negative_slope,
        small,
        native.Scratch(kernel.scratch),
    )
    return small if last else _in_format(small, last)


def run_weight_grad(
    small: Tensor,
    big: Tensor,
    layer: _Layer,
    gate: Tensor | None = None,
    negative_slope: float = 0.0,
    coefficients: Tensor | None = None,
) -> Tensor:
    """float32 ``[A, B, 4, 4]`` in the weight's memory format; ``gate`` and ``coefficients`` as in
    :func:`run_up`."""
    kernel = layer.weight_grad
    if kernel is None:
        if layer.gpu is not None and (config := layer.gpu.weight_grad) is not None:
            maps = (small, big, gate, negative_slope)
            extra = _extra(layer, coefficients, negative_slope)
            return strided_conv_gpu.weight_grad(layer.gpu.shape, config, *maps, **extra)
        return weight_grad_ref(small, big).float().contiguous(memory_format=layer.weight_format)
    module = native.load()
    assert module is not None
    small, big = small.contiguous(memory_format=_LAST), big.contiguous(memory_format=_LAST)
    size = (layer.small_size[1], layer.big_size[1], 4, 4)
    dweight = map_memory.empty(size, torch.float32, layer.weight_format)
    native.run(
        module.strided_conv_weight_grad,
        kernel.shape,
        small,
        gate,
        *_norm_of(coefficients),
        negative_slope,
        big,
        dweight,
        native.Scratch(kernel.scratch),
    )
    return dweight


def _passes() -> tuple[Any, Any, Any]:
    """up, down and weight_grad: differentiable ones while a graph of the gradients is wanted."""
    if torch.is_grad_enabled():
        up, down = (functools.partial(Conv.apply, conv_pass) for conv_pass in ("up", "down"))
        return up, down, WeightGrad.apply
    return run_up, run_down, run_weight_grad


class Conv(torch.autograd.Function):
    """``apply(conv_pass, x, weight, bias, layer, last)``: up or down, and behind it the
    activation that its layer takes; the moments of a layer that takes them."""

    @staticmethod
    def forward(
        ctx: Any,
        conv_pass: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: _Layer,
        last: bool,
        activation: str = "none",
        negative_slope: float = 0.0,
        moments: Moments | None = None,
    ) -> Tensor:
        _, *wants = ctx.needs_input_grad
        if conv_pass == "up":
            y = run_up(x, weight, bias, layer, last, moments=moments, activation=activation)
        else:
            operands = (x, weight, bias, layer, last, activation, negative_slope)
            y = run_down(*operands, None, moments)
        gate = y if activation != "none" else None
        ctx.save_for_backward(x if wants[1] else None, weight if wants[0] else None, gate)
        ctx.conv_pass, ctx.layer, ctx.last = conv_pass, layer, is_last(x)
        ctx.slope = negative_slope if activation == "leaky_relu" else 0.0
        ctx.bends = activation == "tanh"
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, y), (_, *wants) = ctx.saved_tensors, wanted_gradients(ctx, {3: 2})
        up, down, weight_grad = _passes()
        dy = grads[0].contiguous(memory_format=_LAST)
        gate: tuple[Any, ...] = ()
        if ctx.bends:
            dy = torch.ops.aten.tanh_backward(dy, y)
        elif y is not None:
            gate = (y.detach().contiguous(memory_format=_LAST), ctx.slope)
            if wants[2] or torch.is_grad_enabled():
                # Neither the sum for the bias nor a graph is in the kernels.
                dy, gate = torch.ops.aten.leaky_relu_backward(dy, *gate, True), ()
        going_up = ctx.conv_pass == "up"
        adjoint = down if going_up else up
        maps = (x, dy) if going_up else (dy, x)
        return (
            None,
            adjoint(dy, weight, None, ctx.layer, ctx.last, *gate) if wants[0] else None,
            weight_grad(*maps, ctx.layer, *gate) if wants[1] else None,
            dy.sum((0, 2, 3), dtype=torch.float32) if wants[2] else None,
            *(None,) * 5,
        )


class WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, small: Tensor, big: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(small, big)
        ctx.layer = layer
        return run_weight_grad(small, big, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (small, big), wants = ctx.saved_tensors, wanted_gradients(ctx)
        up, down, _ = _passes()
        return (
            down(big, grads[0], None, ctx.layer, is_last(small)) if wants[0] else None,
            up(small, grads[0], None, ctx.layer, is_last(big)) if wants[1] else None,
            None,
        )


def _autocast_dtype(device: str = "cpu") -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _supports_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    side: int,
    taps: tuple[int, int] = (4, 4),
) -> str | None:
    """Reason that the kernels cannot take x, whose channels are dimension ``side`` of weight."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if (reason := dispatch.supports_cpu(*tensors)) is not None:
        return reason
    if (reason := _misfit(x, weight, bias, side, taps)) is not None:
        return reason
    autocast = _autocast_dtype()
    if autocast is None:
        if any(t.dtype is not x.dtype for t in tensors):
            return "input, weight and bias have different dtypes"
    elif autocast not in native.DTYPES:
        return f"autocast is to {autocast}, not to bfloat16"
    return None


def _misfit(
    x: Tensor, weight: Tensor, bias: Tensor | None, side: int, taps: tuple[int, int]
) -> str | None:
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[2:] != taps:
        shapes, wanted = f"{tuple(x.shape)} and {tuple(weight.shape)}", "x".join(map(str, taps))
        return f"the shapes are {shapes}, not 4-D with {wanted} taps"
    if x.shape[1] != weight.shape[side]:
        return f"{x.shape[1]} channels do not fit a weight of shape {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[1 - side : 2 - side]:
        return f"a bias of shape {tuple(bias.shape)} does not fit the weight"
    return None


def _sizes(
    conv_pass: str, x: Tensor, weight: Tensor, output_padding: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the small and the big map."""
    (batch, _, height, width), (a, b, _, _) = x.shape, weight.shape
    if conv_pass == "up":
        extra_height, extra_width = output_padding
        big_size = (batch, b, 2 * height + extra_height, 2 * width + extra_width)
        return (batch, a, height, width), big_size
    return (batch, a, height // 2, width // 2), (batch, b, height, width)


def _supports_gpu(
    name: str,
    conv_pass: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: Sequence[int],
    named: bool,
) -> str | None:
    """Reason that the kernels ``name``, "triton" or "cuda", cannot take x, or are not to unless
    they are ``named``."""
    side = 0 if conv_pass == "up" else 1
    if name == "cuda":
        reason = image_conv_cuda.supports(x, weight, bias, side)
    else:
        tensors = (x, weight) if bias is None else (x, weight, bias)
        reason = strided_conv_gpu.supports(tensors, _autocast_dtype(x.device.type))
    if reason is None:
        reason = _misfit(x, weight, bias, side, (4, 4))
    if reason is None and not (named or is_last(x) or is_last(weight)):
        reason = "neither the input nor the weight is channels_last"
    if reason is not None:
        return reason
    return strided_conv_gpu.supports_sizes(*_sizes(conv_pass, x, weight, output_padding))


class Call(NamedTuple):
    """up or down by the kernels: operands as they take them, and x's dtype the one computed in."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    layer: _Layer
    last: bool


def prepare(
    conv_pass: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: Sequence[int] = (0, 0),
    *,
    method: str = "auto",
    impl: str = "auto",
    normalized: Norm | None = None,
    moments: Moments | None = None,
    activation: str = "none",
) -> Call | None:
    """What the kernels run for up or down, or None where torch's own operation is to run. With
    ``normalized``, a batch norm, they normalize x as they read it, else the answer is None; the
    ``moments`` of the output are taken, and a tanh behind up runs, where the layer then says so."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    side = 0 if conv_pass == "up" else 1
    if impl == "auto":
        impl = dispatch.wished()
    if impl == "auto" and method != "auto":
        impl = "cpu"
    # The usual answer first: it is asked for in every layer of every step.
    if impl != "auto" or _supports_cpu(x, weight, bias, side) is not None:
        operands = (x, weight, bias, output_padding, impl != "auto")
        candidates = [
            ("cuda", lambda: _supports_gpu("cuda", conv_pass, *operands)),
            ("triton", lambda: _supports_gpu("triton", conv_pass, *operands)),
            ("cpu", lambda: _supports_cpu(x, weight, bias, side)),
            ("torch", dispatch.always),
        ]
        chosen = dispatch.choose("strided_conv", impl, candidates)
        if chosen != "cpu":
            if method != "auto":
                raise UserError(
                    f"method {method!r} is of the cpu implementation, not of {chosen}'s"
                )
            if chosen == "torch":
                return None
            by_name = None if impl == "auto" else chosen
            if chosen == "cuda" and _supports_gpu("triton", conv_pass, *operands) is not None:
                # Only Triton's kernels have what follows.
                if normalized is not None:
                    return None
                moments = None
            return _prepare_gpu(conv_pass, *operands[:-1], by_name, normalized, moments, activation)
    small_size, big_size = _sizes(conv_pass, x, weight, output_padding)
    autocast, named = _autocast_dtype(), method != "auto"
    layer = _layer(
        x.dtype if autocast is None else autocast,
        _LAST if weight.is_contiguous(memory_format=_LAST) else _FIRST,
        small_size,
        big_size,
        # Winograd's transforms round a bfloat16 weight, which torch takes as it is, once more.
        "direct" if weight.dtype is torch.bfloat16 and not named else method,
        named,
        _NORMALIZED[conv_pass] if normalized is not None else "none",
        torch.get_num_threads(),
    )
    if conv_pass in layer.refused:
        raise UserError(
            f"method {method!r} cannot run {conv_pass} between {small_size} and {big_size}"
            f"{_TAKES.get(method, '')}; take another one, or 'auto'"
        )
    if impl == "auto" and not (getattr(layer, conv_pass) and layer.weight_grad):
        return None
    last = is_last(x) or is_last(weight)
    if autocast is not None:
        x = x.to(autocast)
    return Call(x, weight.float(), None if bias is None else bias.float().contiguous(), layer, last)


def _prepare_gpu(
    conv_pass: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: Sequence[int],
    named: str | None,
    norm: Norm | None,
    moments: Moments | None,
    activation: str,
) -> Call | None:
    autocast = _autocast_dtype(x.device.type)
    if autocast is not None:
        x = x.to(autocast)
    weight_format = _LAST if weight.is_contiguous(memory_format=_LAST) else _FIRST
    sizes = _sizes(conv_pass, x, weight, output_padding)
    precision = strided_conv_gpu.precision(x.dtype)
    shape = strided_conv_gpu.Shape(x.dtype, weight_format, *sizes, precision)
    ordinary = strided_conv_gpu.passes(shape, x.device, named)
    passes = ordinary
    bends = conv_pass == "up" and activation == "tanh"
    if bends:
        passes = ordinary._replace(up=strided_conv_gpu.up_with_tanh(ordinary, x.device, named))
    takes = moments is not None and named != strided_conv_gpu.CUDA
    if moments is not None and takes:
        config = norm_conv_gpu.with_statistics(ordinary, x.device, named, conv_pass, moments.groups)
        takes = config is not None
        if config is not None:
            passes = ordinary._replace(**{conv_pass: config})
    if norm is not None:
        learns = weight.requires_grad and torch.is_grad_enabled()
        groups = 0 if moments is None else moments.groups
        behind = norm_conv_gpu.Behind(groups, bends, getattr(passes, conv_pass), takes)
        found = norm_conv_gpu.normalizing(
            ordinary, x.device, named, conv_pass, norm, learns, behind
        )
        if found is None:
            return None
        passes, takes = found, moments is not None
    if not (passes.up or passes.down or passes.weight_grad):
        return None
    normalized = "none" if norm is None else _NORMALIZED[conv_pass]
    layer = _Layer(
        *(*sizes, weight_format, None, None, None, (), passes, normalized, ordinary, takes),
        takes_tanh=bends and passes.up == strided_conv_gpu.CUDA,
    )
    last = is_last(x) or is_last(weight)
    return Call(x, weight.float(), None if bias is None else bias.float().contiguous(), layer, last)


def up(
    small: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    output_padding: Sequence[int] = (0, 0),
    activation: str = "none",
    *,
    method: str = "auto",
    impl: str = "auto",
    moments: Moments | None = None,
) -> Tensor:
    """``conv_transpose2d(small, weight, bias, 2, 1, output_padding)``, see
    :func:`pygan.functional.conv_transpose2d`, and behind it ``activation``: "none" or "tanh".
    ``moments`` of the output, given only where there is no activation, are taken where the kernels
    that run take them."""
    if activation not in ("none", "tanh"):
        raise UserError(f"activation is {activation!r}; it is one of none, tanh")
    call = prepare(
        *("up", small, weight, bias, output_padding),
        method=method,
        impl=impl,
        moments=moments,
        activation=activation,
    )
    if call is None:
        fits = all(0 <= odd < 2 for odd in output_padding)  # else torch has a word for it
        if fits and _may_be_small("up", small, weight, bias, method, impl):
            y = few_positions.up(small, weight, bias, tuple(output_padding))
            y = _in_format(y, is_last(small) or is_last(weight))
        else:
            sweep = Sweep((2, 2), (1, 1), (1, 1), True, tuple(output_padding))
            y = _by_torch(small, weight, bias, sweep)
        return activated(y, activation)
    taken = activation if call.layer.takes_tanh else "none"
    if torch.is_grad_enabled():
        y = Conv.apply("up", *call, taken, 0.0, moments)
    else:
        y = run_up(*call, moments=moments, activation=taken)
    return activated(y, "none" if taken == activation else activation)


def down(
    big: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
    *,
    method: str = "auto",
    impl: str = "auto",
    moments: Moments | None = None,
) -> Tensor:
    """``conv2d(big, weight, bias, 2, 1)``, see :func:`pygan.functional.conv2d`, and behind it
    ``activation``: "none", "relu" or "leaky_relu" with ``negative_slope``. ``moments`` as
    :func:`up`'s; they are given only where there is no activation."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation is {activation!r}; it is one of {', '.join(ACTIVATIONS)}")
    call = prepare("down", big, weight, bias, method=method, impl=impl, moments=moments)
    if call is None:
        if _may_be_small("down", big, weight, bias, method, impl):
            z = few_positions.down(big, weight, bias)
            z = _in_format(z, is_last(big) or is_last(weight))
        else:
            z = _by_torch(big, weight, bias, Sweep((2, 2), (1, 1)))
        return activated(z, activation, negative_slope)
    extra = ("none", 0.0)
    # Below a slope of 0 the signs behind the activation do not tell those before it.
    if activation != "none" and call.layer.takes_activation and negative_slope >= 0:
        extra, activation = (activation, negative_slope), "none"
    if torch.is_grad_enabled():
        z = Conv.apply("down", *call, *extra, moments)
    else:
        z = run_down(*call, *extra, None, moments)
    return activated(z, activation, negative_slope)


def _may_be_small(
    conv_pass: str, x: Tensor, weight: Tensor, bias: Tensor | None, method: str, impl: str
) -> bool:
    """Whether torch is to run a convolution as a product of matrices."""
    return (
        (method, impl, dispatch.wished()) == ("auto", "auto", "auto")
        and _supports_cpu(x, weight, bias, 0 if conv_pass == "up" else 1) is None
        and few_positions.is_small(conv_pass, x, weight)
    )


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep) -> Tensor:
    """A convolution that torch runs: it copies a weight whose layout is not the map's, so a map
    that is the smaller of both is copied instead."""
    maps = x.dim() == weight.dim() == 4 and x.is_cpu
    if maps and weight.numel() > 2 * x.numel() and is_last(x) and not is_last(weight):
        return _in_format(torch_conv.conv(reordered(x, _FIRST), weight, bias, sweep), True)
    return torch_conv.conv(x, weight, bias, sweep)


def pair(size: Any) -> tuple[Any, ...]:
    """A size of both dimensions, as torch's convolutions take it."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, impl: str) -> bool:
    """Whether a convolution in which each output meets x with one tap may be a product of
    matrices: on a CPU, where that is faster, and with operands that both take alike."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if _autocast_dtype() is None:
        alike = all(t.dtype is x.dtype for t in tensors)
    else:
        alike = all(t.dtype in native.DTYPES for t in tensors)
    return (
        alike
        and weight.dim() == 4
        and x.numel() > 0
        and x.is_floating_point()
        and (bias is None or bias.shape == (channels,))
        and all(t.is_cpu and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and "torch" not in (impl, dispatch.wished())
    )


def has_kernel(
    transposed: bool,
    size: Sequence[int],
    weight_size: Sequence[int],
    sweep: tuple[Any, ...],
) -> bool:
    """Whether :func:`conv2d`, or ``transposed`` :func:`conv_transpose2d`, has another way than
    torch's for a 4-D map of this ``size``; ``sweep`` is stride, padding and dilation in both
    dimensions, and groups."""
    taps = tuple(weight_size[2:])
    if taps == (4, 4) and sweep == _LIKE_DOWN:
        return True
    if sweep[1:] != ((0, 0), (1, 1), 1) or taps == (1, 1):
        return False
    met = (weight_size[0], 1, 1) if transposed else weight_size[1:]
    return tuple(size[1:]) == tuple(met)


def _whole_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d`` of ``[N, B, h, w]`` with ``[A, B, h, w]`` to ``[N, A, 1, 1]``, as a product of
    matrices in x's memory order."""
    last = is_last(x) or is_last(weight)
    if is_last(x):
        x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    y = matrix_product(x.flatten(1), weight.flatten(1).t(), bias)
    return y[:, None, None].permute(0, 3, 1, 2) if last else y[:, :, None, None]


def _from_point(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv_transpose2d`` of ``[N, A, 1, 1]`` with ``[A, B, h, w]`` to ``[N, B, h, w]``, as a
    product of matrices in the memory order of the result."""
    _, b, height, width = weight.shape
    last = is_last(x) or is_last(weight)
    x = x.flatten(1)
    if not last:
        every = None if bias is None else bias.repeat_interleave(height * width)
        return matrix_product(x, weight.flatten(1), every).view(-1, b, height, width)
    every = None if bias is None else bias.repeat(height * width)
    y = matrix_product(x, weight.permute(0, 2, 3, 1).flatten(1), every)
    return y.view(-1, height, width, b).permute(0, 3, 1, 2)


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
    moments: Moments | None = None,
) -> Tensor:
    """See :func:`pygan.functional.conv2d`."""
    taps = weight.shape[2:]
    rest = (pair(padding), pair(dilation), groups)
    if taps == (4, 4) and (pair(stride), *rest) == _LIKE_DOWN:
        return down(input, weight, bias, method=method, impl=impl, moments=moments)
    _only_strided(method, impl)
    if (
        rest == ((0, 0), (1, 1), 1)
        and taps.numel() > 1
        and input.shape[1:] == weight.shape[1:]
        and _dense(input, weight, bias, weight.shape[0], impl)
    ):
        return _whole_map(input, weight, bias)
    if isinstance(padding, str):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _by_torch(input, weight, bias, Sweep(pair(stride), *rest[:2], groups=groups))


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
    moments: Moments | None = None,
) -> Tensor:
    """See :func:`pygan.functional.conv_transpose2d`."""
    taps, outer = weight.shape[2:], pair(output_padding)
    rest = (pair(padding), pair(dilation), groups)
    if taps == (4, 4) and (pair(stride), *rest) == _LIKE_DOWN:
        return up(input, weight, bias, outer, method=method, impl=impl, moments=moments)
    _only_strided(method, impl)
    if (
        rest == ((0, 0), (1, 1), 1)
        and outer == (0, 0)
        and taps.numel() > 1
        and input.shape[1:] == (*weight.shape[:1], 1, 1)
        and _dense(input, weight, bias, weight.shape[1], impl)
    ):
        return _from_point(input, weight, bias)
    sweep = Sweep(pair(stride), *rest[:2], True, outer, groups)
    return _by_torch(input, weight, bias, sweep)


def _only_strided(method: str, impl: str) -> None:
    if method != "auto" or impl not in ("auto", "torch"):
        raise UserError(
            f"method {method!r} and implementation {impl!r} were asked for; only 4x4 convolutions "
            "of stride 2 and padding 1 have a choice, so leave out both for others"
        )
