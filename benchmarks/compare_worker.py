"""Times training steps of whichever pygan is importable, one line of JSON for each it reads.

Only what every revision has is used: `pygan.models.dcgan`, `pygan.fuse`, `pygan.AdversarialStep`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import pygan
from pygan.models import dcgan

IMAGES = {"dcgan32": (1, 32, 32), "dcgan64": (3, 64, 64), "dcgan16": (1, 16, 16)}
BATCH = 64
SAMPLE_SECONDS = 0.3


def build(case: str, amp: str) -> Callable[[], object]:
    """A step, warmed up."""
    torch.manual_seed(0)
    channels, size, _ = IMAGES[case]
    networks = dcgan(image_size=size, channels=channels)
    optimizers = []
    for network in networks:
        pygan.fuse(network)
        adam = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        optimizers.append(adam)
    step = pygan.AdversarialStep(*networks, *optimizers, amp=amp)
    real = torch.rand(BATCH, *IMAGES[case]) * 2 - 1
    for _ in range(3):
        step(real)
    return lambda: step(real)


def seconds(call: Callable[[], Any], times: int) -> float:
    """Of one call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def main() -> None:
    """Answers until its input ends."""
    call: Callable[[], object] | None = None
    times = 1
    for line in sys.stdin:
        question = json.loads(line)
        answer = 0.0
        if "build" in question:
            call = build(question["build"], question["amp"])
            times = max(1, math.ceil(SAMPLE_SECONDS / seconds(call, 1)))
        elif call is not None:
            answer = seconds(call, times)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
