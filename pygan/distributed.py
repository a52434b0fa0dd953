"""Training in many processes: who takes part, batch norm over all of them, and one writer.

``torchrun --nproc-per-node N -m pygan.train --fused --outf RUN`` starts N processes of this run.
Each computes its part of every batch; gradients are averaged by
``torch.nn.parallel.DistributedDataParallel`` while backward goes on, by NCCL between GPUs and gloo
between CPUs. The first process writes the run's folder.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from pygan.errors import UserError
from pygan.ops.norm_act import current_groups

# What gloo and NCCL say when a process is gone or does not answer.
_LOST = ("connection closed", "connection reset", "connection refused", "timed out", "timeout",
         "broken pipe", "nccl", "peer", "socket")  # fmt: skip


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank, size: this one's number, and how many there are.
        local_rank: its number on its machine, and that of its GPU.
        restarts: how often torchrun has started them anew.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def part(self, batch: int) -> slice:
        """This process's part of a whole batch."""
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, value: Any) -> Any:
        """What the first process has, in all of them; plain values."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def average(self, values: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if not self.alone:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any of them."""
        if self.alone:
            return flag
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def say(self, text: str) -> None:
        """A line, printed once."""
        if self.is_first:
            print(text, flush=True)

    def wait(self) -> None:
        """For all others to come here."""
        if not self.alone:
            dist.barrier()


ALONE = World()


def world() -> World:
    """As torchrun's environment says."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    rank, size, local, restarts = (int(os.environ.get(name, "0")) for name in names)
    return World(rank, size, local, restarts) if size > 1 else ALONE


@contextlib.contextmanager
def joined(here: World, device: torch.device) -> Iterator[None]:
    """Inside, the processes are in touch."""
    if here.alone:
        yield
        return
    store, rank, size = next(iter(dist.rendezvous("env://")))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        # torchrun's store outlives the processes, and with it addresses of those that are gone.
        store = dist.PrefixStore(f"start {here.restarts}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Wrapped networks hold the group in cycles. Its threads have to end with it: one that lets
        # go of a tensor while the interpreter ends aborts the process.
        gc.collect()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST)


def check_batch(batch: int, here: World) -> None:
    """Raises:
    UserError: the batch cannot be shared out evenly.
    """
    if batch % here.size:
        raise UserError(
            f"--batch-size {batch} is that of all {here.size} processes together and cannot be "
            f"shared out evenly; give a multiple of {here.size}"
        )


def parallel(network: nn.Module) -> nn.Module:
    """The network, whose gradients all processes average while backward goes on.

    Its buffers stay what each process sees. Weights keep the layout that they have now.
    """
    with warnings.catch_warnings():
        # The name that takes its place is not in every torch, and does something else at first.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


class Follower:
    """The folder of a run for all processes but the first: nothing is written.

    It has the methods of :class:`pygan.run_folder.RunFolder` that training calls.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def close(self) -> None:
        pass

    def write(self, name: str, content: object) -> None:
        pass

    def write_beside(self, name: str, content: object, kept: str) -> None:
        pass

    @contextlib.contextmanager
    def failing(self, name: str) -> Iterator[None]:
        yield

    def start_log(self, step: int) -> None:
        pass

    def log(self, row: Mapping[str, object]) -> None:
        pass

    def sync_log(self) -> None:
        pass

    def rows(self) -> list[dict[str, float]]:
        return []


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are of the batches of all processes, on CPUs and GPUs.

    ``x [N, C, H, W]``; as ``torch.nn.SyncBatchNorm``, which takes CUDA tensors only. In
    :func:`pygan.ops.norm_act.batch_groups` each group of the batch has statistics of its own.
    Statistics are taken in two passes in float32 (float64 of such input), each with one exchange.
    """

    def forward(self, x: Tensor) -> Tensor:
        groups = current_groups()
        size = dist.get_world_size() if dist.is_initialized() else 1
        if not self.training or groups == size == 1:
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        parts = wide.reshape(groups, -1, *x.shape[1:])
        count = size * parts[0].numel() // x.shape[1]
        axes, shape = (1, 3, 4), (groups, 1, x.shape[1], 1, 1)
        mean = _over_all(parts.sum(axes), size) / count
        centred = parts - mean.view(shape)
        variance = _over_all(centred.square().sum(axes), size) / count
        self._follow(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            channels = (1, -1, 1, 1)
            y = y * self.weight.view(channels) + self.bias.view(channels)
        return y.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def _follow(self, means: Tensor, variances: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        for mean, variance in zip(means, variances, strict=True):
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked or 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def _over_all(sums: Tensor, size: int) -> Tensor:
    found: Tensor = all_reduce(sums) if size > 1 else sums
    return found


def synchronize_batch_norms(module: nn.Module) -> nn.Module:
    """Every ``nn.BatchNorm2d`` inside as a :class:`SyncBatchNorm2d` with the same parameters and
    buffers, in place; ``state_dict`` keys stay. Call it before :func:`pygan.fuse`."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
    return module
