"""Which of several ways to run the same thing is fastest here: measured once, kept on disk.

One file for a device and its software, `<cache>/tuning/<hash>.json`, written under a temporary
name and renamed, so any number of processes may write it; a damaged one is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

LEAST_GAIN = 1.03  # times faster than the baseline that another candidate has to be
_FORMAT = 2  # raise when the same names mean something else, or others are worth a measurement
log = logging.getLogger("pygan")

Timer = Callable[[Callable[[], Any]], float]


class Tuner:
    """Choices for one kind of device.

    Args:
        stamp: everything that a choice depends on beside its key: device and versions.
        timer: seconds, or any other unit, that a call takes.
        folder: of the cache; None is where decoded images are kept.
    """

    def __init__(self, stamp: str, timer: Timer, folder: Path | None = None) -> None:
        if folder is None:
            from pygan.data.cache import default_folder

            folder = default_folder()
        self._stamp, self._timer = f"{_FORMAT} {stamp}", timer
        name = hashlib.sha256(self._stamp.encode()).hexdigest()[:16]
        self.path = folder / "tuning" / f"{name}.json"
        self._lock = threading.Lock()
        self._choices = self._read()

    def known(self, key: str, candidates: Mapping[str, Any]) -> str | None:
        """The choice of an earlier measurement if it still is a candidate."""
        choice = self._choices.get(key)
        return choice if choice in candidates else None

    def choose(
        self, key: str, candidates: Mapping[str, Callable[[], Any]], baseline: str | None = None
    ) -> str:
        """The name of the fastest candidate, but ``baseline`` unless another one is at least
        ``LEAST_GAIN`` times faster. A candidate that fails is left out.

        Raises:
            RuntimeError: every candidate fails.
        """
        with self._lock:
            if (choice := self.known(key, candidates)) is not None:
                return choice
            choice = self._measure(key, candidates, baseline)
            self._keep(key, choice)
            return choice

    def keep(self, key: str, choice: str) -> None:
        """Takes what was measured elsewhere."""
        with self._lock:
            self._keep(key, choice)

    def _keep(self, key: str, choice: str) -> None:
        self._choices = self._choices | self._read() | {key: choice}
        self._write()

    def _measure(
        self, key: str, candidates: Mapping[str, Callable[[], Any]], baseline: str | None
    ) -> str:
        def timed(name: str) -> float:
            try:
                return self._timer(candidates[name])
            except Exception as error:
                # Too much shared memory or too many registers for this device, as a rule.
                log.info("%s: %s does not run here (%s)", key, name, error)
                return math.inf

        log.info("%s: timing %s", key, ", ".join(candidates))
        measured = {name: timed(name) for name in candidates}
        times = {name: time for name, time in measured.items() if time < math.inf}
        if not times:
            raise RuntimeError(f"{key}: none of {', '.join(candidates)} runs on this device")
        if baseline not in times:
            return min(times, key=times.__getitem__)
        others = times.keys() - {baseline}
        best = min(others, key=times.__getitem__, default=baseline)
        # Once more: the first to be measured may have met a device that was still waking up.
        again = {name: timed(name) for name in {best, baseline}}
        times[baseline] = min(times[baseline], again[baseline])
        # Who fails now would fail the caller.
        times[best] = min(times[best], again[best]) if again[best] < math.inf else math.inf
        log.debug("%s: %s", key, times)
        return best if times[best] * LEAST_GAIN <= times[baseline] else baseline

    def _read(self) -> dict[str, str]:
        try:
            entry = json.loads(self.path.read_bytes())
            choices = entry["choices"]
            if entry["check"] != self._check(choices):
                raise ValueError("its checksum is wrong")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("the measured choices in %s are damaged (%s) and ignored", self.path, error)
            return {}
        return dict(choices)

    def _write(self) -> None:
        entry = {"check": self._check(self._choices), "choices": self._choices}
        partial = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix="partial-", dir=self.path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump(entry, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            log.info("what was measured is not kept: %s", error)
            if partial is not None:
                with suppress(OSError):
                    os.unlink(partial)

    def _check(self, choices: dict[str, str]) -> str:
        body = json.dumps(choices, sort_keys=True)
        return hashlib.sha256(f"{self._stamp} {body}".encode()).hexdigest()


def device_stamp(device: torch.device) -> str:
    """A GPU with its software: what it is, and the versions that compile and run kernels."""
    try:
        from triton import __version__ as compiler
    except ImportError:
        compiler = "no triton"
    properties = torch.cuda.get_device_properties(device)
    return repr(
        (
            properties.name,
            properties.multi_processor_count,
            torch.__version__,
            compiler,
            torch.backends.cudnn.version(),
        )
    )


def cuda_timer(run: Callable[[], Any], samples: int = 5, least: float = 0.5) -> float:
    """Milliseconds of one call on the current stream: the least mean of ``samples`` runs of calls
    that take about ``least`` milliseconds each."""

    def elapsed(count: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / count

    elapsed(1)  # compiles, and lets a library choose its algorithm
    count = max(1, min(100, int(least / max(elapsed(1), 1e-3))))
    return min(elapsed(count) for _ in range(samples))
