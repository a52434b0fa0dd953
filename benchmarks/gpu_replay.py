"""Short GPU work made long enough to time: captured as one CUDA graph and replayed.

A call of some microseconds costs Python more than the device, so its clock time says nothing of the
kernel. A graph of many such calls does. Where the call cannot be captured it is launched as usual,
and the record says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import Call

WARM_UP = 3
GRAPH, LAUNCHED, ON_CPU = "CUDA graph", "launched one by one", "on a CPU"


class Replay:
    """``replay()`` does ``count`` calls: those that ``builds`` make, in turn, ``repeats`` times.

    Several builds on data of their own keep the data of one call from being in the cache for the
    next. ``how`` says which way they run.
    """

    def __init__(
        self, builds: Sequence[Callable[[], Call]], device: torch.device, repeats: int
    ) -> None:
        self.count = len(builds) * repeats
        self._repeats = repeats
        if device.type != "cuda":
            self._calls = [build() for build in builds]
            self.how, self._run = ON_CPU, self._launch
            return
        # What autograd recorded on a stream it runs backward there: all on the one captured.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._calls = [build() for build in builds]
            for call in self._calls * WARM_UP:
                call()
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._launch()
        except RuntimeError as error:
            print(f"not captured: {error}", file=sys.stderr, flush=True)
            torch.cuda.synchronize(device)
            self.how, self._run = LAUNCHED, self._launch
        else:
            self.how, self._run = GRAPH, self._graph.replay

    def _launch(self) -> None:
        for _ in range(self._repeats):
            for call in self._calls:
                call()

    def __call__(self) -> None:
        self._run()
