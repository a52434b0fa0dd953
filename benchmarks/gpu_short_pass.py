"""Every implementation of every operation once, on small odd shapes: for memory checkers.

``compute-sanitizer --tool memcheck python -m benchmarks.gpu_short_pass`` finds reads and writes out
of bounds where each tensor is an allocation of its own, which needs
``PYTORCH_NO_CUDA_MEMORY_CACHING=1``. What an implementation does not take is named and passed over;
whether results are right is for the tests.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pygan import cli, functional
from pygan.errors import UserError

PROG = "python -m benchmarks.gpu_short_pass"
IMPLEMENTATIONS = ("triton", "cuda", "auto")
# N, A, B, height, width of the small map
CONVOLUTIONS = ((1, 5, 3, 3, 2), (3, 16, 1, 4, 4), (2, 40, 24, 5, 7))
MAPS = ((2, 5, 3, 3), (4, 33, 2, 5), (3, 64, 1, 1))


def _maps(device: torch.device, *size: int) -> Tensor:
    made = torch.randn(size, device=device).to(torch.bfloat16)
    return made.to(memory_format=torch.channels_last).requires_grad_()


def _convolution(device: torch.device, impl: str, size: tuple[int, ...], going_up: bool) -> None:
    n, a, b, height, width = size
    run = functional.conv_transpose2d if going_up else functional.conv2d
    x = (
        _maps(device, n, a, height, width)
        if going_up
        else _maps(device, n, b, 2 * height, 2 * width)
    )
    weight = torch.randn(a, b, 4, 4, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = run(x, weight, stride=2, padding=1, impl=impl)
    torch.autograd.grad(y, (x, weight), torch.randn_like(y))


def _norm_act(device: torch.device, impl: str, size: tuple[int, ...], groups: int) -> None:
    x, channels = _maps(device, *size), size[1]
    weight = torch.ones(channels, device=device, requires_grad=True)
    bias = torch.zeros(channels, device=device, requires_grad=True)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    y = functional.norm_act(
        x, mean, var, weight, bias, True,
        activation="leaky_relu", groups=groups, impl=impl,
    )  # fmt: skip
    torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y))


def _loss(device: torch.device, impl: str) -> None:
    if impl != "auto":
        raise UserError("its callers choose by PYGAN_IMPL")
    real, fake = (torch.randn(n, device=device, requires_grad=True) for n in (37, 5001))
    torch.autograd.grad(functional.gan_d_loss(real, fake).loss, (real, fake))


def _images(device: torch.device, impl: str) -> None:
    images = torch.randint(256, (11, 5, 7, 3), dtype=torch.uint8, device=device)
    index = torch.tensor([10, 0, 3], device=device)
    flip = torch.tensor([True, False, True], device=device)
    functional.image_batch(images, index, flip=flip, dtype=torch.bfloat16, impl=impl)


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is done, by name."""
    bound = functools.partial
    for impl in IMPLEMENTATIONS:
        for size in CONVOLUTIONS:
            for up in (True, False):
                name = f"{'up' if up else 'down'} {size} by {impl}"
                yield name, bound(_convolution, device, impl, size, up)
        for shape in MAPS:
            groups = 2 if shape[0] % 2 == 0 else 1
            name = f"norm_act {shape} in {groups} by {impl}"
            yield name, bound(_norm_act, device, impl, shape, groups)
        yield f"gan_loss by {impl}", bound(_loss, device, impl)
        yield f"image_batch by {impl}", bound(_images, device, impl)


def _pass(arguments: Sequence[str] | None) -> int:
    parser = cli.Parser(prog=PROG, description="Every implementation once, on small odd shapes.")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    device = torch.device(parser.parse_args(arguments).device)
    for name, call in calls(device):
        try:
            call()
        except UserError as error:
            print(f"{name}: passed over, {error}", flush=True)
            continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"{name}: ran", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    return cli.run(PROG, lambda: _pass(arguments))


if __name__ == "__main__":
    sys.exit(main())
