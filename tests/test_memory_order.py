from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.profiler import ProfilerActivity, profile

import pygan
from pygan import models
from pygan.memory_order import MemoryOrder

LAST = torch.channels_last
SHAPES = ((6, 5, 4, 4), (7,), (3, 8), (4, 3, 3, 3))


def trained(optimizer: Any, mode: Any, formats: tuple[Any, ...], **options: Any) -> list[Any]:
    """Parameters and moments after three updates, and the layouts of the moments."""
    generator = torch.Generator().manual_seed(1)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=format))
        for shape, format in zip(SHAPES, formats, strict=True)
    ]
    made = optimizer(parameters, lr=0.1, fused=True, **options)
    schedule = ExponentialLR(made, 0.5)
    for _ in range(3):
        for each in parameters:
            grad = torch.randn(each.shape, generator=generator)
            each.grad = (
                grad.to(memory_format=LAST) if each.is_contiguous(memory_format=LAST) else grad
            )
        with mode():
            made.step()
        schedule.step()
    moments = [made.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    return [*parameters, *moments]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}])
def test_updates_are_those_without_it_to_the_bit(optimizer: Any, options: dict[str, Any]) -> None:
    plain = torch.contiguous_format
    formats = (LAST, plain, plain, plain)
    expected = trained(optimizer, contextlib.nullcontext, formats, **options)
    found = trained(optimizer, MemoryOrder, formats, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride()


def test_a_step_copies_no_gradient() -> None:
    G, D = (net.to(memory_format=LAST) for net in models.dcgan(image_size=16, nz=8, ngf=8, ndf=8))
    adams = [torch.optim.Adam(net.parameters(), fused=True) for net in (G, D)]
    step = pygan.AdversarialStep(G, D, *adams, amp="off")
    real = torch.rand(4, 3, 16, 16) * 2 - 1
    step(real)

    def copies(update: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            update()
        inside = [e for e in seen.events() if e.name == "aten::_fused_adam_"]
        assert inside
        return sum(child.name == "aten::clone" for e in inside for child in _below(e))

    assert copies(adams[0].step) > 0  # torch's own
    assert copies(lambda: step(real)) == 0


def _below(event: Any) -> list[Any]:
    return [each for child in event.cpu_children for each in (child, *_below(child))]
