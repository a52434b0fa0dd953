"""What a strided convolution and a batch norm do for each other on a GPU, where that is faster.

Triton's kernels take the statistics of the map that they write, so the batch norm behind them does
not read it for those, and normalize and activate the map that they read, so the one before them
need not write it. Either way costs the convolution some of its speed, and cuDNN's does neither. So
on first use of a shape, outside the capture of a graph, both are timed against the same operations
one after the other, by the tuner of :mod:`pygan.ops.strided_conv_gpu`:

* a convolution with the batch norm behind it: the pass as it is chosen without one, then
  ``norm_act``; or the pass in each configuration with statistics, then their merging and the
  values;
* a batch norm with the convolution behind it: ``norm_act``, then the pass and, where the weight
  learns, the gradient of the weight as they are chosen; or those in the fastest configurations that
  normalize the map as they read it. Another batch norm behind both is timed with them.

A shape first met during capture runs one after the other. Asked for by name the kernels always do
both.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygan.ops import norm_act, strided_conv_gpu
from pygan.ops.moments import Moments
from pygan.ops.norm_act import Settings
from pygan.ops.strided_conv_gpu import Normalized, Passes, Shape, measured, name_of

READS = {"up": "small", "down": "big"}  # the map that a pass may normalize

_APART = "apart"
_JOINED = "joined"
_BATCH = Settings(True, 0.1, 1e-5, "relu", 0.0, 1)
_SLOPE = 0.0  # of the activation that is timed; another one is as quick


class Norm(NamedTuple):
    """The batch norm in front of a convolution, as far as the time depends on it."""

    statistics: str  # where they come from: "moments" of x, the "batch" or the "running" ones
    groups: int


class Behind(NamedTuple):
    """What follows a convolution, and how that runs on a map as it is."""

    groups: int = 0  # of a batch norm by its statistics of the batch; 0 for none
    tanh: bool = False
    config: Any = None  # as in ``Passes``
    takes_statistics: bool = False


def _statistics_configs(shape: Shape, device: torch.device, conv_pass: str) -> dict[str, Any]:
    found = strided_conv_gpu.configs(shape, device, conv_pass, statistics=True)
    return {name_of(config): config for config in found}


def _reading_configs(shape: Shape, conv_pass: str) -> dict[str, Any]:
    from pygan.kernels.strided_conv_configs import normalizing

    return {name_of(config): config for config in normalizing(*shape.given(conv_pass))}


def with_statistics(
    passes: Passes, device: torch.device, named: str | None, conv_pass: str, groups: int
) -> Any:
    """The configuration in which the pass takes the statistics of its output for a batch norm of
    so many groups; None where that takes its own."""
    try:
        return _with_statistics(passes, device, named, conv_pass, groups)
    except strided_conv_gpu.Unmeasured:
        if named is None:
            return None
        return next(iter(_statistics_configs(passes.shape, device, conv_pass).values()))


@functools.lru_cache(maxsize=1024)
def _with_statistics(
    passes: Passes, device: torch.device, named: str | None, conv_pass: str, groups: int
) -> Any:
    shape = passes.shape
    by_name = _statistics_configs(shape, device, conv_pass)
    if strided_conv_gpu.interpreted():
        return next(iter(by_name.values()))

    def candidates() -> dict[str, Any]:
        maps = strided_conv_gpu.random_maps(shape, device)

        def run(config: Any, taken: bool) -> None:
            moments = Moments(groups) if taken else None
            y = strided_conv_gpu.run(shape, config, conv_pass, maps, moments=moments)
            _normed(y, groups, moments)

        found: dict[str, Any] = {
            name: functools.partial(run, config, True) for name, config in by_name.items()
        }
        if named is None:
            found[_APART] = functools.partial(run, getattr(passes, conv_pass), False)
        return found

    names = by_name if named else {_APART: None} | by_name
    key = f"strided_conv {conv_pass} with statistics of {groups} groups {shape.key}"
    choice = measured(
        *(device, f"{key}{' named' if named else ''}", names, None if named else _APART),
        candidates,
    )
    return by_name.get(choice)


def _normed(y: Tensor, groups: int, moments: Moments | None) -> Tensor:
    settings = _BATCH._replace(groups=groups)
    return norm_act.norm_act(y, None, None, **settings._asdict(), given=moments)


def normalizing(
    passes: Passes,
    device: torch.device,
    named: str | None,
    conv_pass: str,
    norm: Norm,
    learns: bool,
    behind: Behind,
) -> Passes | None:
    """Passes of which ``conv_pass`` and the gradient of the weight normalize the map that they
    read; None where ``norm_act`` is to write it. ``learns`` tells whether that gradient is
    wanted."""
    try:
        return _normalizing(passes, device, named, conv_pass, norm, learns, behind)
    except strided_conv_gpu.Unmeasured:
        return _first(passes, conv_pass) if named else None


def _first(passes: Passes, conv_pass: str) -> Passes | None:
    found: dict[str, Any] = {
        name: next(iter(_reading_configs(passes.shape, name).values()), None)
        for name in (conv_pass, "weight_grad")
    }
    return None if None in found.values() else passes._replace(**found)


@functools.lru_cache(maxsize=1024)
def _normalizing(
    passes: Passes,
    device: torch.device,
    named: str | None,
    conv_pass: str,
    norm: Norm,
    learns: bool,
    behind: Behind,
) -> Passes | None:
    if strided_conv_gpu.interpreted():
        return _first(passes, conv_pass)
    shape = passes.shape
    chosen: dict[str, Any] = {}
    for name in (conv_pass, "weight_grad"):
        by_name = _reading_configs(shape, name)
        if not by_name:
            return None
        key = f"strided_conv {name} behind {READS[conv_pass]} norm of {norm.groups} groups"
        if name == conv_pass and behind.groups:
            key += f" with statistics of {behind.groups} groups"

        def candidates(name: str = name, by_name: dict[str, Any] = by_name) -> dict[str, Any]:
            timed = _Timed(passes, device, conv_pass, norm, behind)
            return {k: functools.partial(timed.one, name, config) for k, config in by_name.items()}

        try:
            choice = measured(device, f"{key} {shape.key}", by_name, None, candidates)
        except RuntimeError:
            if named is not None:
                raise
            return None
        chosen[name] = by_name[choice]
    joined = passes._replace(**chosen)
    if named is not None:
        return joined

    def forms() -> dict[str, Any]:
        timed = _Timed(passes, device, conv_pass, norm, behind)
        return {
            _APART: functools.partial(timed.apart, learns),
            _JOINED: functools.partial(timed.joined, joined, learns),
        }

    key = f"norm_conv {conv_pass} {norm.statistics} of {norm.groups} groups"
    key += f" with statistics of {behind.groups} groups" if behind.groups else ""
    key += f"{' with tanh' * behind.tanh}{' learning' * learns} {shape.key}"
    choice = measured(device, key, (_APART, _JOINED), _APART, forms)
    return joined if choice == _JOINED else None


class _Timed:
    """A batch norm with the convolution behind it, on maps of its own."""

    def __init__(
        self,
        passes: Passes,
        device: torch.device,
        conv_pass: str,
        norm: Norm,
        behind: Behind,
    ) -> None:
        self.passes, self.conv_pass, self.behind = passes, conv_pass, behind
        self.activation = "tanh" if behind.tanh else "none"
        self.maps = strided_conv_gpu.random_maps(passes.shape, device)
        self.x: Tensor = getattr(self.maps, READS[conv_pass])
        self.implementation = norm_act.choose("auto", self.x)
        channels = self.x.shape[1]
        self.running = None, None
        self.settings = _BATCH._replace(groups=norm.groups)
        if norm.statistics == "running":
            self.running = self.x.new_zeros(channels).float(), self.x.new_ones(channels).float()
            self.settings = _BATCH._replace(training=False)
        statistics = self.x.new_ones((2, norm.groups, channels), dtype=torch.float32)
        self.given = statistics if norm.statistics == "moments" else None
        coefficients = self.x.new_ones((norm.groups, 3, channels), dtype=torch.float32)
        self.normalized = Normalized(READS[conv_pass], coefficients, _SLOPE)

    def one(self, name: str, config: Any) -> None:
        """A pass that normalizes."""
        moments = self._moments(self.behind.groups > 0 and name == self.conv_pass)
        shape = self.passes.shape
        strided_conv_gpu.run(shape, config, name, self.maps, self.normalized, moments)

    def apart(self, learns: bool) -> None:
        f, _ = norm_act.KERNELS[self.implementation].forward(
            *(self.x, None, None, *self.running, self.settings, self.given)
        )
        maps = self.maps._replace(**{READS[self.conv_pass]: f})
        shape, moments = self.passes.shape, self._moments(self.behind.takes_statistics)
        extra = (None, moments, self.activation)
        y = strided_conv_gpu.run(shape, self.behind.config, self.conv_pass, maps, *extra)
        self._finish(y, moments)
        if learns:
            strided_conv_gpu.run(shape, self.passes.weight_grad, "weight_grad", maps)

    def joined(self, joined: Passes, learns: bool) -> None:
        normalized = self.normalized
        if self.given is None:
            _, coefficients = norm_act.KERNELS[self.implementation].coefficients(
                *(self.x, None, None, *self.running, self.settings)
            )
            normalized = normalized._replace(coefficients=coefficients)
        shape, config = joined.shape, getattr(joined, self.conv_pass)
        moments = self._moments(self.behind.groups > 0)
        extra = (normalized, moments, self.activation)
        y = strided_conv_gpu.run(shape, config, self.conv_pass, self.maps, *extra)
        self._finish(y, moments)
        if learns:
            strided_conv_gpu.run(shape, joined.weight_grad, "weight_grad", self.maps, normalized)

    def _moments(self, taken: bool) -> Moments | None:
        return Moments(self.behind.groups) if taken else None

    def _finish(self, y: Tensor, moments: Moments | None) -> None:
        if self.behind.groups:
            _normed(y, self.behind.groups, moments)
