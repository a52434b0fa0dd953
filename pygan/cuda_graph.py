"""CUDA graphs as :mod:`pygan.step_graph` uses them: warm-up, capture and replay on one device.

All of them are captured on one side stream and share one pool of memory, which is safe because they
never run at the same time and nobody keeps a tensor of theirs from one replay to the next.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pygan.capturable import line_of, users_line
from pygan.ops.tuning import Tuner, cuda_timer, device_stamp

_GIB = 2**30
_WAITS = "called a synchronizing CUDA operation"


class CaptureError(RuntimeError):
    """A step could not be captured; its message is the reason. Nothing was executed."""


class CudaRecording:
    """A captured step, or several, and the tensor that it leaves its results in."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor, owner: CudaGraphs) -> None:
        self._graph, self._out, self._owner = graph, out, owner

    def replay(self) -> Tensor:
        """Runs it on the current stream; the next replay overwrites what is returned."""
        self._graph.replay()
        return self._out

    def close(self) -> None:
        """Gives its memory back to the pool."""
        self._owner.closed(self._graph)


class CudaGraphs:
    """What :class:`pygan.step_graph.GraphedStep` asks of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._alive = 0
        self._choices: Tuner | None = None

    def is_capturing(self) -> bool:
        """Whether somebody else's graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def join(self) -> None:
        """Lets the current stream wait for the step before, wherever that ran."""
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def warm_up(self, run: Callable[[], Any], *, watch: bool) -> tuple[Any, str | None]:
        """A step on the side stream, where the memory of the first capture comes from.

        Returns:
            Its result, and if it was watched the reason that it waited for the device, or None.
        """
        side, current = self._side(), torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            if watch:
                with _watched() as waits:
                    result = run()
            else:
                result, waits = run(), []
        current.wait_stream(side)
        return result, f"{waits[0]} waits for the device" if waits else None

    def capture(
        self, run: Callable[[], Tensor], generators: Sequence[torch.Generator]
    ) -> CudaRecording:
        """Records a step without executing it.

        Raises:
            CaptureError: it cannot be recorded; the device and its generators are as before.
        """
        with torch.cuda.device(self._device):
            if not self._alive:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            for generator in self._own(generators):
                graph.register_generator_state(generator)
            current, out, failure = torch.cuda.current_stream(), None, None
            try:
                # torch.cuda.graph alone leaves its stream current where a capture ends badly.
                with (
                    torch.cuda.stream(self._side()),
                    torch.cuda.graph(
                        graph,
                        pool=self._pool,
                        stream=self._side(),
                        # Other threads load data and pin memory meanwhile.
                        capture_error_mode="thread_local",
                    ),
                ):
                    try:
                        out = run()
                    except Exception as error:
                        failure = error
            except Exception as error:
                failure = failure or error
                self._recover(generators)
            if failure is not None:
                reason = self._reason(failure)
                # Its frames hold tensors of the pool.
                traceback.clear_frames(failure.__traceback__)
                with contextlib.suppress(RuntimeError):
                    graph.reset()
                self._drop_unused()
                raise CaptureError(reason)
            current.wait_stream(self._side())
        assert out is not None
        self._alive += 1
        return CudaRecording(graph, out, self)

    def clock(self, run: Callable[[], Any]) -> float:
        """Milliseconds of a call on the current stream, from a device that has nothing to do; those
        in which it waits for the host count."""
        with torch.cuda.device(self._device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.current_stream().synchronize()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop))

    def _tuner(self) -> Tuner:
        if self._choices is None:
            self._choices = Tuner(device_stamp(self._device), cuda_timer)
        return self._choices

    def known(self, key: str, candidates: Sequence[str]) -> str | None:
        """What was found to be the fastest here before."""
        return self._tuner().known(key, dict.fromkeys(candidates))

    def keep(self, key: str, choice: str) -> None:
        """Remembers what was found to be the fastest."""
        self._tuner().keep(key, choice)

    def _own(self, generators: Sequence[torch.Generator]) -> Iterator[torch.Generator]:
        # torch registers the device's own by itself.
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        return (g for g in generators if g is not default and g.device.type == "cuda")

    def _reason(self, failure: Exception) -> str:
        if isinstance(failure, torch.OutOfMemoryError):
            free, total = (size / _GIB for size in torch.cuda.mem_get_info(self._device))
            held = torch.cuda.memory_reserved(self._device) / _GIB
            return (
                f"there is not enough memory for its graph: {free:.2f} of {total:.2f} GiB are "
                f"free, and torch holds {held:.2f} GiB"
            )
        text = " ".join(str(failure).split("\n")[0].split()) or type(failure).__name__
        line = line_of(failure)
        return f"{text}, at {line}" if line else text

    def _recover(self, generators: Sequence[torch.Generator]) -> None:
        """After a capture that could not end: the allocator still serves it, and generators still
        count for it, until another one has ended."""
        device = torch.cuda.current_device()
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(RuntimeError, AttributeError, TypeError):
                getattr(torch._C, name)(device, self._pool)
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            for generator in self._own(generators):
                graph.register_generator_state(generator)
            with (
                torch.cuda.stream(self._side()),
                torch.cuda.graph(graph, stream=self._side(), capture_error_mode="thread_local"),
            ):
                torch.zeros(1, device=self._device)
            graph.reset()

    def _drop_unused(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def closed(self, graph: torch.cuda.CUDAGraph) -> None:
        torch.cuda.synchronize(self._device)
        graph.reset()
        self._alive -= 1


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Inside, collects where the device is waited for, as the user's lines."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*debug mode is a prototype")
        warnings.filterwarnings("always", message=f".*{_WAITS}")
        shown = warnings.showwarning

        def note(message: Warning | str, *details: Any, **more: Any) -> None:
            if _WAITS in str(message):
                found.append(_inside(traceback.extract_stack()))
            else:
                shown(message, *details, **more)

        warnings.showwarning = note
        # An error would leave a step half done.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _inside(stack: traceback.StackSummary) -> str:
    """The line of a stack that warm_up came to."""
    start = max(i for i, frame in enumerate(stack) if frame.name == "warm_up")
    inner = [frame for frame in stack[start + 1 :] if frame.filename != warnings.__file__]
    own = [frame for frame in inner if frame.filename != __file__]
    last = own[-1] if own else stack[start]
    return users_line(inner) or f"{last.filename}:{last.lineno} ({(last.line or '').strip()})"
