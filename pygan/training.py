"""The training loop: networks and data of a run, and everything it writes on the way."""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pygan
from pygan import checkpoint, cli, evaluate, models, power
from pygan.cli import Failure
from pygan.config import Config, fixed
from pygan.data import BatchOrder, Images, ImageStream, StreamOrder, Windows
from pygan.distributed import ALONE, Follower, World, parallel, synchronize_batch_norms
from pygan.errors import UserError
from pygan.functional import image_batch
from pygan.metrics import Neighbours
from pygan.metrics.describe import space_of
from pygan.metrics.quality import Reference
from pygan.monitor import AutoFix, Finding, Monitor, halve, nonfinite
from pygan.run_folder import (
    PREVIOUS,
    QUALITY,
    REPORT,
    RESUME,
    RunFolder,
    has_numbers,
    replace_file,
)
from pygan.run_report import page
from pygan.sample import encode, generate, grid, latents

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SAMPLES: Final = 64
# The numbers of a step, in the order of StepResult.
NUMBERS: Final = ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_after")
# Of the memory that is free once the networks are on the GPU, for the images.
RESIDENT_SHARE: Final = 0.5
# Of the data, for the monitor.
REFERENCES: Final = 512
# Times that NaN or infinity sends a run back to its last checkpoint.
ROLLBACKS: Final = 3
EVENTS: Final = "the TensorBoard events"


class Diverged(Failure):
    """NaN or infinity in a run; ``what`` is not finite."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


class StopSignal:
    """Ctrl-C and SIGTERM as a request to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                # Only the main thread gets signals; elsewhere its owner decides.
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class Progress:
    """What is seen while training: a bar on a terminal, the classic line everywhere else."""

    def __init__(self, step: int, total: int, batch_size: int, steps_per_epoch: int) -> None:
        self._total, self._per_epoch, self._batch = total, steps_per_epoch, batch_size
        self._bar = None
        if sys.stdout.isatty():
            # Terminals made by programs may say that they are 0 columns wide.
            wide = os.get_terminal_size(sys.stdout.fileno()).columns > 0
            self._bar = tqdm(
                total=total * batch_size, initial=step * batch_size, unit=" images",
                unit_scale=True, dynamic_ncols=wide, ncols=None if wide else 80, file=sys.stdout,
                smoothing=0.05,
            )  # fmt: skip

    def advance(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps * self._batch)

    def show(self, step: int, row: dict[str, float]) -> None:
        """`row` as the numbers of the steps up to `step` (counted from 1)."""
        text = (
            f"Loss_D: {row['loss_d']:.4f} Loss_G: {row['loss_g']:.4f} D(x): {row['d_real']:.4f} "
            f"D(G(z)): {row['d_fake']:.4f} / {row['d_fake_after']:.4f}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            return
        epoch, position = divmod(step - 1, self._per_epoch)
        epochs = -(-self._total // self._per_epoch)
        print(f"[{epoch}/{epochs}][{position}/{self._per_epoch}] {text}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def rewind(self, step: int) -> None:
        """Goes back to a step."""
        if self._bar is not None:
            self._bar.n = self._bar.last_print_n = step * self._batch
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Silence(Progress):
    """Of a process that is not the first."""

    def __init__(self, *place: int) -> None:
        self._bar = None

    def show(self, step: int, row: dict[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Networks:
    """G, D, their optimizers and the step that updates them."""

    def __init__(
        self,
        config: Config,
        size: int,
        channels: int,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        torch.manual_seed(config.seed)
        self.G, self.D = models.dcgan(
            size, channels, config.nz, config.ngf, config.ndf, config.d_norm
        )
        self.arguments = {
            "G": {"image_size": size, "channels": channels, "nz": config.nz, "ngf": config.ngf},
            "D": {
                "image_size": size, "channels": channels, "ndf": config.ndf, "norm": config.d_norm,
            },
        }  # fmt: skip
        for network, file in ((self.G, config.netG), (self.D, config.netD)):
            if file is not None:
                checkpoint.fill(network, checkpoint.read_weights(Path(file))[0], file)
        self.G.to(device)
        self.D.to(device)
        for network in (self.G, self.D):
            if config.sync_bn:
                synchronize_batch_norms(network)
            if config.fused:
                pygan.fuse(network)
        self.opt_g = self._adam(self.G, config.lr_g, config, device)
        self.opt_d = self._adam(self.D, config.lr_d, config, device)
        self.ema = None if config.ema is None else pygan.Ema(self.G, config.ema)
        tricks = pygan.Tricks(**{f.name: getattr(config, f.name) for f in fields(pygan.Tricks)})
        step: type[Any] = pygan.AdversarialStep if config.fused else pygan.ReferenceStep
        learning: list[nn.Module] = [self.G, self.D]
        if not world.alone:
            for each in learning if config.fused else ():
                each.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            learning = [parallel(each) for each in learning]
        self.step: pygan.AdversarialStep | pygan.ReferenceStep = step(
            *learning, self.opt_g, self.opt_d,
            loss=config.loss, loss_weight=config.loss_weight, real_target=config.real_target,
            graph=config.graph, tricks=tricks, ema=self.ema,
            amp=config.amp or ("auto" if config.fused else "off"),
        )  # fmt: skip

    @staticmethod
    def _adam(
        network: nn.Module, rate: float | None, config: Config, device: torch.device
    ) -> torch.optim.Adam:
        keywords = {"fused": True, "capturable": device.type == "cuda"} if config.fused else {}
        return torch.optim.Adam(
            network.parameters(), lr=config.lr if rate is None else rate,
            betas=(config.beta1, 0.999), **keywords,
        )  # fmt: skip

    @property
    def sampled(self) -> nn.Module:
        """What samples come from: G, or its average."""
        return self.G if self.ema is None else self.ema.network

    def state(self) -> dict[str, Any]:
        """Everything that training changes, as tensors and plain values."""
        return {
            "netG": self.G.state_dict(),
            "netD": self.D.state_dict(),
            "opt_g": self.opt_g.state_dict(),
            "opt_d": self.opt_d.state_dict(),
            "step": self.step.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, keeping the memory layout of this process."""
        checkpoint.fill(self.G, state["netG"], RESUME)
        checkpoint.fill(self.D, state["netD"], RESUME)
        for optimizer, name in ((self.opt_g, "opt_g"), (self.opt_d, "opt_d")):
            optimizer.load_state_dict(state[name])
            for parameter, kept in optimizer.state.items():
                for key, value in kept.items():
                    # Adam walks parameter and moments through raw memory, in parallel.
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        kept[key] = torch.empty_like(parameter).copy_(value)
        self.step.load_state_dict(state["step"])


def _seeds(seed: int) -> list[int]:
    """Seeds of the latents, the fixed latents, the pictures shown, and the flips."""
    children = np.random.SeedSequence(seed).spawn(4)
    return [int(child.generate_state(1, np.uint64)[0]) & cli.SEED_MAX for child in children]


class Batches:
    """Real images and latents of any step, on the device."""

    def __init__(
        self, config: Config, images: Images, device: torch.device, world: World = ALONE
    ) -> None:
        self._config, self._device = config, device
        # Every process knows the whole batch, and takes its part: as many make the same steps.
        self._part = world.part(config.batch_size)
        z_seed, _, _, self._flip_seed = _seeds(config.seed)
        self.generator = torch.Generator(device).manual_seed(z_seed)
        place = (len(images), config.batch_size, config.seed)
        self.order: BatchOrder | StreamOrder
        self._windows: Windows | None = None
        if isinstance(images, ImageStream):
            self.order = StreamOrder(*place, images.window)
            self._windows = Windows(images, self.order, self._part)
            self._images = torch.empty(0)
        else:
            self.order = BatchOrder(*place)
            with warnings.catch_warnings():
                # The array is a read-only memory map, and nobody writes to it.
                warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
                self._images = torch.from_numpy(images.images)
        self.resident = False
        if device.type == "cuda" and self._windows is None:
            free = torch.cuda.mem_get_info(device)[0]
            self.resident = self._images.nbytes <= RESIDENT_SHARE * free
            if self.resident:
                self._images = self._images.to(device)
        self._epoch = -1
        self._orders = self._flips = torch.empty(0)

    def at_once(self, networks: Networks) -> int:
        """Steps of one epoch that :meth:`update` may gain to make together."""
        whole = self._part == slice(0, self._config.batch_size)
        return networks.step.at_once if self.resident and self._config.fused and whole else 1

    def update(self, networks: Networks, step: int, count: int = 1) -> None:
        """Trains on the batch of a step, which counts from 0, and on those of the next ones up to
        ``count``, which :meth:`at_once` allows.

        Images that are on the GPU are gathered as part of the update, by an order that went there
        once for the epoch.
        """
        if not (self.resident and self._config.fused):
            networks.step(self.real(step), self.latent())
            return
        if self._part == slice(0, self._config.batch_size):
            networks.step.generator = self.generator
            index, flip = self._rows(step, count)
            networks.step.several(self._images, index, flip=flip)
        else:
            index, flip = self.chosen(step)
            networks.step.gathered(self._images, index, flip=flip, z=self.latent())

    def chosen(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Indices int64 ``[N]`` of the images of a step, and bool ``[N]`` which are mirrored, on
        the device."""
        index, flip = self._rows(step, 1)
        return index[0], None if flip is None else flip[0]

    def _rows(self, step: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The same for ``count`` steps of one epoch, a row for each."""
        epoch, position = divmod(step, self.order.steps_per_epoch)
        if epoch != self._epoch:
            first = epoch * self.order.steps_per_epoch
            steps = range(first, first + self.order.steps_per_epoch)
            orders = np.stack([self.order.index(i) for i in steps])
            self._orders = self._uploaded(torch.from_numpy(orders))
            if self._config.flip:
                mirrored = np.stack([self._mirrored(i) for i in steps])
                self._flips = self._uploaded(torch.from_numpy(mirrored))
            self._epoch = epoch
        rows = slice(position, position + count)
        flips = self._flips[rows, self._part] if self._config.flip else None
        return self._orders[rows, self._part], flips

    def _uploaded(self, host: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _mirrored(self, step: int) -> np.ndarray:
        random = np.random.default_rng((self._flip_seed, step))
        return random.random(self._config.batch_size) < 0.5

    def real(self, step: int) -> Tensor:
        """float32 `[N, C, H, W]` in [-1, 1]; `step` counts from 0.

        channels_last for the fused step, contiguous as usual for the plain one.

        Raises:
            Failure: no image of a stream can be read any more.
        """
        images = self._images
        if self.resident:
            index, flip = self.chosen(step)
        else:
            if self._windows is None:
                index = torch.from_numpy(self.order.index(step)[self._part])
            else:
                images = self._streamed(self._windows, step)
                index = torch.arange(len(images))
            flip = None
            if self._config.flip:
                flip = torch.from_numpy(self._mirrored(step)[self._part])
        real = image_batch(images, index, flip=flip)
        if not self.resident:
            real = self._uploaded(real)
        return real if self._config.fused else real.contiguous()

    @staticmethod
    def _streamed(windows: Windows, step: int) -> Tensor:
        try:
            return torch.from_numpy(windows.batch(step))
        except UserError as error:
            # Some could be read when the run began.
            raise Failure(f"{error}; the last checkpoint is kept for --resume") from error

    def newly_replaced(self) -> int:
        """Images in whose place others came, since this was last asked."""
        if self._windows is None:
            return 0
        found, self._windows.replaced = self._windows.replaced, 0
        return found

    def close(self) -> None:
        """Ends the threads that decode; another batch starts them again."""
        if self._windows is not None:
            self._windows.close()

    def latent(self) -> Tensor:
        """The next `[N, nz, 1, 1]` of the run's own generator."""
        shape = (self._config.batch_size, self._config.nz, 1, 1)
        return torch.randn(shape, generator=self.generator, device=self._device)[self._part]


class Training:
    """A run in progress: where it is, and everything it writes."""

    def __init__(
        self,
        config: Config,
        images: Images,
        networks: Networks,
        folder: RunFolder | Follower,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.config, self.images, self.networks = config, images, networks
        self.folder, self.device, self.world = folder, device, world
        self.batches = Batches(config, images, device, world)
        self.per_epoch = self.batches.order.steps_per_epoch
        self.total = config.total_steps(self.per_epoch)
        self.fixed_z = latents(SAMPLES, config.nz, _seeds(config.seed)[1]).to(device)
        self.monitor = self._monitor() if config.monitor else None
        self.reference: Reference | None = None
        if config.evaluate_every is not None and world.is_first:
            sample = images.sample()
            self.reference = Reference(sample, space_of(sample))
        self.auto_fix = AutoFix(networks.step)
        self.rollbacks = 0
        # Of a stream: images in whose place others came.
        self.replaced = 0
        self.step = 0
        self.saved = 0
        self.seconds = 0.0
        if not world.alone:
            # What a step draws by itself is to differ between the processes.
            torch.manual_seed(_seeds(config.seed)[0] ^ (world.rank << 32))
        self.sums = networks.step.totals = torch.zeros(len(NUMBERS), device=device)
        self.count = 0
        self._tick = self._last_log = time.perf_counter()
        self._events: SummaryWriter | None = None
        self._power = power.PowerLog(device)

    def _monitor(self) -> Monitor:
        chosen = np.sort(self._shuffled()[:REFERENCES])
        real = torch.from_numpy(self.images.gather(chosen)).permute(0, 3, 1, 2)
        step = self.networks.step
        return Monitor(
            self.networks.G, self.networks.D,
            real=real if len(real) >= 16 else None, fixed_z=self.fixed_z,
            loss=self.config.loss, scaled=step.amp == "fp16",
        )  # fmt: skip

    def _shuffled(self) -> np.ndarray:
        """Indices of the images, in an order of their own for what is shown."""
        return np.random.default_rng(_seeds(self.config.seed)[2]).permutation(len(self.images))

    def state(self) -> dict[str, Any]:
        """The whole state of the run between two steps."""
        random = {"torch": torch.get_rng_state(), "latents": self.batches.generator.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": fixed(self.config),
            "position": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "count": self.count,
            "random": random,
            "networks": self.networks.state(),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "auto_fix": self.auto_fix.state_dict(),
            "rollbacks": self.rollbacks,
            "replaced": self.replaced,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        if type(state["position"]) is not int or not 0 <= state["position"] <= self.total:
            raise ValueError("its position is outside the run")
        self.networks.restore(state["networks"])
        self.step = self.saved = state["position"]
        self.seconds = state["seconds"]
        self.sums.copy_(state["sums"])
        self.count = state["count"]
        self.rollbacks = state["rollbacks"]
        self.replaced = state["replaced"]
        self.batches.newly_replaced()
        self.auto_fix.load_state_dict(state["auto_fix"])
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.load_state_dict(state["monitor"])
        random = state["random"]
        if self.world.is_first:
            torch.set_rng_state(random["torch"])
        self.batches.generator.set_state(random["latents"])
        if self.device.type == "cuda" and self.world.is_first:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def start(self) -> None:
        """Opens the logs; a new run also gets its first checkpoint and `real_samples.png`."""
        if self.step == 0:
            real = self.images.gather(np.sort(self._shuffled()[:SAMPLES]))
            self.folder.write("real_samples.png", encode(grid(real)))
        self.folder.start_log(self.step)
        if not self.world.is_first:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self.folder.failing(EVENTS):
            self._events = SummaryWriter(
                str(self.folder.path),
                purge_step=self.step + 1 if self.step or self.rollbacks else None,
            )

    def run(self, stop: StopSignal) -> None:
        """Trains until the last step, or until `stop` is asked for.

        Raises:
            Failure: a loss is not finite for the fourth time, or a file cannot be written.
        """
        self._tick = self._last_log = time.perf_counter()
        place = (self.step, self.total, self.config.batch_size, self.per_epoch)
        progress = Progress(*place) if self.world.is_first else Silence(*place)
        try:
            stopping = False
            while self.step < self.total and not stopping:
                if self.config.noise:
                    self.networks.step.noise = self._noise()
                steps = self._steps_ahead()
                self.batches.update(self.networks, self.step, steps)
                self.count += steps
                self.step += steps
                progress.advance(steps)
                # Asked here alone: a signal that comes later than this gets further steps. Several
                # processes ask each other, where they talk to each other anyway.
                if self.world.alone or self._due(self.config.log_every):
                    stopping = self.world.any(bool(stop.number), self.device)
                try:
                    self._after_step(stopping, progress)
                except Diverged as error:
                    self._roll_back(error, progress)
        finally:
            progress.close()
            self.batches.close()

    def _steps_ahead(self) -> int:
        """How many steps to make now: no more than there are until something has to be done
        between two of them."""
        if self.config.noise:
            return 1
        config, step = self.config, self.step
        every = (config.log_every, config.save_every, config.sample_every, self.per_epoch)
        until = [n - step % n for n in every if n is not None]
        return min(self.batches.at_once(self.networks), self.total - step, *until)

    def _noise(self) -> float:
        """Its standard deviation in this step."""
        steps = self.config.noise_steps or self.total
        return self.config.noise * max(0.0, 1 - self.step / steps)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _after_step(self, stopping: bool, progress: Progress) -> None:
        last = self.step == self.total
        milestone = last or self.step % self.per_epoch == 0
        if self._due(self.config.log_every) or last:
            row = self._log()
            progress.show(self.step, row)
            self._examine(row, progress)
        if milestone or self._due(self.config.sample_every):
            self._numbers()
            self._draw()
        if milestone or stopping or self._due(self.config.save_every):
            self.save(export=milestone or stopping)
        every = self.config.evaluate_every
        if every is not None and (last or (milestone and (self._epoch() + 1) % every == 0)):
            self._evaluate(progress)
        if (last or stopping) and self.world.is_first:
            with self.folder.failing(REPORT):
                replace_file(self.folder.path / REPORT, page(self.folder.path).encode())

    def _evaluate(self, progress: Progress) -> None:
        """Measures samples of G; the time it takes is not that of training."""
        if self.reference is None:
            return
        now = time.perf_counter()
        self.seconds += now - self._tick
        samples = evaluate.draw(self.networks.sampled, self.config.nz, evaluate.SAMPLES)
        row = evaluate.row_of(self.reference, samples)
        with self.folder.failing(QUALITY):
            evaluate.add_rows(self.folder.path, [{**row, "epoch": self._epoch()}])
        progress.say(f"Epoch {self._epoch()}: {evaluate.sentence(row)}")
        names = ("distance", "kernel", *Neighbours._fields)
        self._scalars({f"quality/{name}": row[name] for name in names})
        self._tick = time.perf_counter()
        self._last_log += self._tick - now

    def _examine(self, row: dict[str, Any], progress: Progress) -> None:
        """Asks the monitor, writes what it found, and does about it what is allowed."""
        if self.monitor is None:
            return
        found = self.monitor.check(self.step, [row[name] for name in NUMBERS[:4]])
        # Buffers differ between processes, and what is done about a finding must not.
        for finding in self.world.share(found):
            if finding.code == "nonfinite":
                self._diverged(finding.where)
            self._report(finding.row(), progress)
            fix = self.auto_fix.apply(finding) if self.config.auto_fix else None
            if fix is not None:
                self.monitor.again(finding.code)
                note = {"finding": "auto_fix", "severity": "note", "text": f"Auto-fix: {fix}."}
                self._report({"step": self.step, **note}, progress)

    def _report(self, row: dict[str, Any], progress: Progress) -> None:
        progress.say(row["text"])
        self.folder.log(row)
        if self._events is not None:
            with self.folder.failing(EVENTS):
                self._events.add_text("findings", row["text"], self.step)

    def _roll_back(self, error: Diverged, progress: Progress) -> None:
        """Goes on from the last checkpoint, more slowly.

        Raises:
            Diverged: this has been done often enough.
        """
        if self.rollbacks == ROLLBACKS:
            raise error
        found = Finding("nonfinite", self.step, where=error.what)
        self.close()
        state, warning = checkpoint.read_newest(self.folder.path)
        if warning is not None:
            progress.say(warning)
        self.restore(state)
        self.rollbacks += 1
        # A run repeats itself to the bit, and would end where it did.
        seed = _seeds(self.config.seed)[0] ^ self.rollbacks
        self.batches.generator.manual_seed(seed)
        rates = [halve(optimizer) for optimizer in (self.networks.opt_g, self.networks.opt_d)]
        self.start()
        self._tick = self._last_log = time.perf_counter()
        progress.rewind(self.step)
        text = (
            f"{found} Rollback {self.rollbacks} of {ROLLBACKS}: the run goes on from its "
            f"checkpoint of step {self.step} with halved learning rates ({rates[0]:g} of G, "
            f"{rates[1]:g} of D) and other latents."
        )
        self._report({**found.row(), "step": self.step, "text": text}, progress)
        self.save()

    def _numbers(self) -> list[float]:
        """Means since the last log line.

        Raises:
            Diverged: one of them is NaN or infinite.
        """
        values = self.world.average(self.sums / max(self.count, 1)).tolist()
        for name, value in zip(NUMBERS, values, strict=True):
            if not math.isfinite(value):
                where = nonfinite(self.networks.G, self.networks.D, self.fixed_z)
                self._diverged(f"{name} is {value}" + (f" (also {where})" if where else ""))
        return values

    def _diverged(self, what: str) -> NoReturn:
        newest = sorted(self.folder.path.glob("netG_epoch_*.pth"))
        weights = f", or from its weights, {newest[-1]}, with --netG" if newest else ""
        raise Diverged(
            what,
            f"{what} after step {self.step}, so training has diverged and stops; the last good "
            f"checkpoint is {self.folder.path / RESUME} of step {self.saved}; start a new run with "
            f"a lower --lr{weights}",
        )

    def _epoch(self) -> int:
        return max(self.step - 1, 0) // self.per_epoch

    def _count_replaced(self) -> None:
        found = torch.tensor(float(self.batches.newly_replaced()), device=self.device)
        self.replaced += round(self.world.average(found).item() * self.world.size)

    def _log(self) -> dict[str, Any]:
        values = self._numbers()
        now = time.perf_counter()
        self.seconds += now - self._tick
        rate = self.count * self.config.batch_size / (now - self._last_log)
        self._tick = self._last_log = now
        row = {"step": self.step, "epoch": self._epoch(), **dict(zip(NUMBERS, values, strict=True))}
        drawn = self._power.since_last(self.count * self.config.batch_size)
        self.sums.zero_()
        self.count = 0
        self._scalars(dict(zip(NUMBERS, values, strict=True)) | {"images_per_s": rate})
        row = {**row, "images_per_s": round(rate, 2), "seconds": round(self.seconds, 3)}
        if self.config.stream:
            self._count_replaced()
            row["replaced"] = self.replaced
            self._scalars({"replaced": self.replaced})
        row |= drawn
        self.folder.log(row)
        return row

    def _scalars(self, values: dict[str, float]) -> None:
        if self._events is not None:
            with self.folder.failing(EVENTS):
                for name, value in values.items():
                    self._events.add_scalar(name, value, self.step)

    def _draw(self) -> None:
        if self._events is None:
            return
        picture = grid(generate(self.networks.sampled, self.fixed_z))
        self.folder.write(f"fake_samples_epoch_{self._epoch():03d}.png", encode(picture))
        with self.folder.failing(EVENTS):
            self._events.add_image("fake_samples", picture, self.step, dataformats="HWC")

    def save(self, *, export: bool = False) -> None:
        """Writes the resume file; `export` also writes the weights of the epoch and losses.png.

        Raises:
            Failure: the state is not finite, or the disk refused; the last checkpoint is kept.
        """
        self._numbers()
        if self.config.stream:
            self._count_replaced()
        now = time.perf_counter()
        self.seconds += now - self._tick
        self._tick = now
        state = self.state()
        where = self.world.share(checkpoint.nonfinite(state))
        if where is not None:
            self._diverged(f"{where} is not finite")
        if export and self.world.is_first:
            self._export()
        if self._events is not None:
            self.folder.sync_log()
            with self.folder.failing(EVENTS):
                self._events.flush()
        # Last: from here on the run resumes after everything above.
        if self.world.is_first:
            self.folder.write_beside(RESUME, checkpoint.pack_state(state), PREVIOUS)
        self.world.wait()
        self.saved = self.step

    def _export(self) -> None:
        epoch = self._epoch()
        for letter, kind in (("G", "dcgan.Generator"), ("D", "dcgan.Discriminator")):
            network = self.networks.sampled if letter == "G" else self.networks.D
            about = {
                "network": kind, "arguments": self.networks.arguments[letter],
                "epoch": epoch, "step": self.step,
            }  # fmt: skip
            pth, safetensors = checkpoint.pack_weights(network, about)
            self.folder.write(f"net{letter}_epoch_{epoch}.pth", pth)
            self.folder.write(f"net{letter}_epoch_{epoch}.safetensors", safetensors)
        self.folder.write("losses.png", plot(self.folder.rows()))

    def close(self, *, failed: bool = False) -> None:
        """Closes the TensorBoard file."""
        if self._events is None:
            return
        try:
            self._events.close()
        except OSError:
            if not failed:
                raise


def plot(rows: Sequence[dict[str, float]]) -> bytes:
    """Losses and probabilities over the steps, as a PNG; rows without them are left out."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if has_numbers(row, "step", *NUMBERS)]
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, probabilities = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    for axes, names in (
        (losses, {"loss_d": "Loss_D", "loss_g": "Loss_G"}),
        (probabilities, {"d_real": "D(x)", "d_fake": "D(G(z))", "d_fake_after": "D(G(z)) after"}),
    ):
        for name, label in names.items():
            axes.plot(steps, [row[name] for row in rows], label=label, linewidth=1)
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    losses.set_ylabel("loss")
    probabilities.set(ylabel="mean probability", ylim=(0, 1), xlabel="step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
