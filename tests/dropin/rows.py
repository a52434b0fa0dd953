"""Layers of real GANs, one row each (``layers.json``), as small modules in two forms.

A row says what comes before the weight layer, the layer, and what follows; ``>`` means then and
``!`` in place. The forms are a ``nn.Sequential`` of modules, and a module that calls the layers
with parameters as attributes and everything else as functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

LAYERS = Path(__file__).with_name("layers.json")
GEOMETRY = re.compile(r"k([\dx]+)s([\dx]+)p([\dx]+)(?:op(\d+))?(?:d(\d+))?(?:g(\d+))?(dw)?")
NORM = re.compile(r"(BN|INa?)(\+track)?(?:\((.*)\))?")
# Kept as they are: the channels of images, of logits, of two classes.
FEW_CHANNELS = 4


@dataclass(frozen=True)
class Row:
    """A layer with what stands around it; ``size`` is the map that the weight layer takes."""

    pre: str
    anchor: str
    geom: str
    weight: str
    bias: bool
    post: str
    cin: int
    cout: int
    size: tuple[int, ...]
    batch: int

    @property
    def kind(self) -> tuple[str, ...]:
        return self.pre, self.anchor, self.geom, self.weight, self.post

    @property
    def dims(self) -> int:
        return 0 if self.anchor == "Linear" else int(self.anchor[-2])

    def __str__(self) -> str:
        layer = f"{self.weight}{self.anchor}{self.geom}{'' if self.bias else '-nobias'}"
        parts = filter(None, (self.pre, layer, self.post))
        size = "x".join(map(str, (self.batch, self.cin, *self.size)))
        return f"{'>'.join(parts)}:{size}:{self.cout}"


@dataclass(frozen=True)
class Geometry:
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: int
    dilation: int
    grouped: bool


def geometry(row: Row) -> Geometry:
    match = GEOMETRY.fullmatch(row.geom)
    assert match is not None, row.geom
    kernel, stride, padding, output, dilation, groups, depthwise = match.groups()

    def per_dim(text: str) -> tuple[int, ...]:
        values = tuple(map(int, text.split("x")))
        return values * row.dims if len(values) == 1 else values

    return Geometry(
        per_dim(kernel),
        per_dim(stride),
        per_dim(padding),
        int(output or 0),
        int(dilation or 1),
        bool(groups or depthwise),
    )


def read_rows() -> list[Row]:
    """Every row as it was found, with no batch yet."""
    return [
        Row(
            x["pre"],
            x["anchor"],
            x["geom"],
            x["weight"],
            x["bias"],
            x["post"],
            x["cin"],
            x["cout"],
            tuple(x["hw"]),
            0,
        )
        for x in json.loads(LAYERS.read_text())
    ]


def _with_channels(row: Row, scale: Callable[[int], int]) -> Row:
    cin, cout = scale(row.cin), scale(row.cout)
    if row.dims and geometry(row).grouped:
        cout = cin
    if "PixelShuffle" in row.post:
        cout = max(4, cout - cout % 4)
    return replace(row, cin=cin, cout=cout)


def small(row: Row) -> Row:
    """A quarter of the channels, 8 to 48 of them, and at most 16 pixels a side; less in 3-D."""
    most = 16 if row.dims == 3 else 48
    scaled = _with_channels(row, lambda c: c if c <= FEW_CHANNELS else min(most, max(8, c // 4)))
    limit = 16 if row.dims < 3 else 8 if row.anchor == "Conv3d" else 4
    return replace(scaled, size=tuple(min(limit, n) for n in row.size), batch=3)


def large(row: Row) -> Row:
    """As many channels and pixels as kernels are written for."""
    scaled = _with_channels(row, lambda c: c if c <= FEW_CHANNELS else 32)
    # A kernel of length 1 goes with a side that is no map's: the period of a sound.
    least = 16 if "Pad" in row.pre or "Up2" in row.pre else 8
    if row.anchor == "ConvT3d":
        least = 4
    size = tuple(n if n == 3 else least for n in row.size)
    if row.dims == 1:
        size = (64,)
    return replace(scaled, size=size, batch=4 if row.dims == 3 else 8)


def small_rows() -> list[Row]:
    """Every row, scaled down; those that become the same are one."""
    return list(dict.fromkeys(small(row) for row in read_rows()))


def one_of_each_kind(rows: Iterable[Row]) -> list[Row]:
    kinds: dict[tuple[object, ...], Row] = {}
    for row in rows:
        kinds.setdefault(row.kind, row)
    return list(kinds.values())


def large_rows() -> list[Row]:
    """Every combination of layers once."""
    return one_of_each_kind(map(large, read_rows()))


def _pad(row: Row) -> int:
    """What each padding of a row adds before and behind, together."""
    kernel = max(geometry(row).kernel)
    if "ZeroPad" in row.pre:
        return 1
    return 2 * ((kernel - 1) // 2)


def input_shape(row: Row) -> tuple[int, ...]:
    """Of the module that is built from the row."""
    size = row.size
    for token in reversed(row.pre.split(">")):
        if "Pad" in token:
            size = tuple(n - _pad(row) if n > 3 else n for n in size)
        elif token.startswith("Up2"):
            size = tuple(max(1, n // 2) for n in size)
    return (row.batch, row.cin, *size)


class Scaled(nn.Conv2d):
    """A convolution whose weight is scaled at every call (equalised learning rate)."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / self.weight[0].numel() ** 0.5
        return F.conv2d(x, self.weight * scale, self.bias, self.stride, groups=self.groups)


def weight_layer(row: Row, *, hooks: bool) -> nn.Module:
    """The row's layer; a norm of its weight as a hook of the older kind, or as a
    parametrization."""
    layer: nn.Module
    if not row.dims:
        layer = nn.Linear(row.cin, row.cout, row.bias)
    else:
        g = geometry(row)
        groups = 1
        if g.grouped:
            groups = row.cin if row.geom.endswith("dw") else row.cin // 4
        transposed = row.anchor.startswith("ConvT")
        name = f"Conv{'Transpose' if transposed else ''}{row.dims}d"
        kind = Scaled if row.weight == "scaled" else getattr(nn, name)
        options = {"output_padding": g.output_padding} if transposed else {}
        layer = kind(
            row.cin,
            row.cout,
            g.kernel,
            g.stride,
            g.padding,
            dilation=g.dilation,
            groups=groups,
            bias=row.bias,
            **options,
        )
    if row.weight == "SN":
        return (nn.utils.spectral_norm if hooks else parametrizations.spectral_norm)(layer)
    if row.weight == "WN":
        if hooks:
            return nn.utils.weight_norm(layer)
        return parametrizations.weight_norm(layer)
    return layer


def _slope(token: str) -> float:
    return float(token.removeprefix("LReLU").rstrip("!"))


def _padding(row: Row, token: str) -> tuple[int, ...]:
    """Last dimension first, as torch counts."""
    if token == "ZeroPad":
        return (1, 0) * row.dims
    half = _pad(row) // 2
    return tuple(half if n > 3 else 0 for n in reversed(row.size) for _ in range(2))


def _dropout(token: str) -> tuple[bool, float]:
    whole_maps = token.startswith("Dropout2d")
    return whole_maps, float(token.removeprefix("Dropout2d" if whole_maps else "Dropout"))


def _norm(row: Row, token: str, channels: int) -> nn.Module | None:
    match = NORM.fullmatch(token)
    if match is None:
        return None
    kind, track, options = match.groups()
    name = "BatchNorm" if kind == "BN" else "InstanceNorm"
    arguments: dict[str, bool | float] = {"affine": kind != "IN" and options != "noaffine"}
    if options and options.startswith("eps="):
        arguments["eps"] = float(options.removeprefix("eps="))
    if kind != "BN":
        arguments["track_running_stats"] = track is not None
    layer: nn.Module = getattr(nn, f"{name}{max(1, row.dims)}d")(channels, **arguments)
    return layer


def _module(row: Row, token: str, channels: int) -> nn.Module:
    """A word of ``pre`` or ``post`` as a module."""
    inplace = token.endswith("!")
    if (norm := _norm(row, token, channels)) is not None:
        return norm
    if token.startswith("LReLU"):
        return nn.LeakyReLU(_slope(token), inplace)
    if token.startswith("ReLU"):
        return nn.ReLU(inplace)
    if token.startswith("Up2"):
        return nn.Upsample(scale_factor=2, mode=token[4:] or "nearest")
    if token.startswith("Dropout"):
        whole_maps, p = _dropout(token)
        return nn.Dropout2d(p) if whole_maps else nn.Dropout(p)
    if token == "ReflPad":
        return nn.ReflectionPad2d(_padding(row, token))
    if token == "ZeroPad":
        return nn.ZeroPad2d(_padding(row, token))
    plain = {
        "Tanh": nn.Tanh,
        "Sigmoid": nn.Sigmoid,
        "ELU": nn.ELU,
        "PReLU": nn.PReLU,
        "PixelShuffle": lambda: nn.PixelShuffle(2),
        "Softmax": lambda: nn.Softmax(1),
    }
    return plain[token]()


def _function(row: Row, token: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """A word of ``pre`` or ``post`` without parameters as a function."""
    inplace = token.endswith("!")
    if token.startswith("LReLU"):
        return lambda m, x: F.leaky_relu(x, _slope(token), inplace)
    if token.startswith("ReLU"):
        return lambda m, x: F.relu(x, inplace)
    if token.startswith("Up2"):
        return lambda m, x: F.interpolate(x, scale_factor=2, mode=token[4:] or "nearest")
    if token.startswith("Dropout"):
        whole_maps, p = _dropout(token)
        drop = F.dropout2d if whole_maps else F.dropout
        return lambda m, x: drop(x, p, m.training)
    if token.endswith("Pad"):
        mode = "reflect" if token == "ReflPad" else "constant"
        return lambda m, x: F.pad(x, _padding(row, token), mode)
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
        "ELU": F.elu,
        "PixelShuffle": lambda x: F.pixel_shuffle(x, 2),
        "Softmax": lambda x: F.softmax(x, 1),
    }
    return lambda m, x: plain[token](x)


def _words(row: Row) -> Iterator[tuple[str, int]]:
    """Every word in order with the channels there; the weight layer is ``""``."""
    for token in filter(None, row.pre.split(">")):
        yield token, row.cin
    yield "", row.cout
    for token in filter(None, row.post.split(">")):
        yield token, row.cout


def sequential(row: Row) -> nn.Module:
    return nn.Sequential(
        *(
            _module(row, token, channels) if token else weight_layer(row, hooks=True)
            for token, channels in _words(row)
        )
    )


class Attributes(nn.Module):
    """Layers with parameters are attributes, all others are calls of functions in ``forward``."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        self.order: list[tuple[str, str]] = []
        for i, (token, channels) in enumerate(_words(row)):
            name = ""
            if not token:
                name = "layer"
                self.layer = weight_layer(row, hooks=False)
            elif NORM.fullmatch(token) or token == "PReLU":
                name = f"norm{i}" if token != "PReLU" else "prelu"
                self.add_module(name, _module(row, token, channels))
            self.order.append((name, token))

    def forward(self, x: Tensor) -> Tensor:
        for name, token in self.order:
            if name == "prelu":
                x = F.prelu(x, self.prelu.weight)
            elif name:
                x = getattr(self, name)(x)
            else:
                x = _function(self.row, token)(self, x)
        return x


def attributes(row: Row) -> nn.Module:
    return Attributes(row)


FORMS: dict[str, Callable[[Row], nn.Module]] = {
    "sequential": sequential,
    "attributes": attributes,
}
