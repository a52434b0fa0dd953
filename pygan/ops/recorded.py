"""Functions that a program of a step holds as one operation each.

A recorder (:mod:`pygan.program`) sees what torch runs, and not what kernels of the CPU do. So what
runs one, and what only makes memory or reads values back in a way that a repetition may do again,
is marked here. Its tensors, arguments and results, are what the recorder follows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Recorder(Protocol):
    """Who is told of such functions."""

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls it and takes a note."""


class _Now(threading.local):
    recorder: Recorder | None = None


now = _Now()


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function whose effects are in its arguments and results."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if now.recorder is None:
            return function(*args, **kwargs)
        result: R = now.recorder.call(function, args, kwargs)
        return result

    return called
