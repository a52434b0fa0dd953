"""`python -m pygan.train`: trains a GAN on images, into one folder that can always be resumed.

Without `--fused` this is the loop of the well-known DCGAN example in plain torch; with it the same
networks go through the fused operations and `AdversarialStep`. Initial weights, order of the data
and latents depend on the seed alone, so the two can be compared number by number.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pygan
from pygan import checkpoint, cli, data, models
from pygan.cli import Failure
from pygan.data import ImageSet
from pygan.errors import UserError
from pygan.functional import image_batch
from pygan.memory import check_memory
from pygan.run import CONFIG, RESUME, RunFolder, check_new, read_config
from pygan.sample import encode, generate, grid, latents

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROG: Final = "python -m pygan.train"
SAMPLES: Final = 64
BUILT_IN: Final = ("fashion-mnist", "fake")
FOLDER_SETS: Final = ("folder", "imagenet", "lfw", "celeba")
# The numbers of a step, in the order of StepResult.
NUMBERS: Final = ("loss_d", "loss_g", "d_real", "d_fake", "d_fake_after")


@dataclass(frozen=True)
class Config:
    """What a run is; kept in config.json. Only the fields in `MAY_CHANGE` may differ on resume."""

    data: str = "fashion-mnist"
    image_size: int | None = None
    batch_size: int = 64
    epochs: int = 10
    steps: int | None = None
    lr: float = 2e-4
    beta1: float = 0.5
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    seed: int = 0
    fused: bool = False
    amp: str | None = None
    loss: str = "bce"
    loss_weight: float = 1.0
    flip: bool = False
    netG: str | None = None
    netD: str | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    log_every: int = 20
    save_every: int = 500
    sample_every: int | None = None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run: `steps` where given, otherwise `epochs` passes."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps


MAY_CHANGE: Final = {
    "epochs", "steps", "threads", "workers", "log_every", "save_every", "sample_every",
}  # fmt: skip


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog=PROG,
        description="Train a GAN on images. Without arguments: DCGAN on Fashion-MNIST (embedded).",
        argument_default=argparse.SUPPRESS,
    )
    count, positive = cli.whole_number(1), cli.real_number(0, open_low=True)
    default = Config()

    def add(*flags: str, help: str, **keywords: Any) -> None:
        name = keywords.get("dest", flags[0].lstrip("-").replace("-", "_"))
        value = getattr(default, name, None)
        shown = f" (default {value:g})" if isinstance(value, (int, float)) and value else ""
        parser.add_argument(*flags, help=help + shown, **keywords)

    add(
        "--data",
        "--dataroot",
        metavar="SOURCE",
        help="folder or .zip of images, .npy, .npz, idx file, fashion-mnist (default) or fake",
    )
    add(
        "--dataset",
        metavar="NAME",
        help="fashion-mnist, fake, or folder, imagenet, lfw, celeba: those need --dataroot",
    )
    add("--batch-size", "--batchSize", "--batch_size", type=count, help="images in a step")
    add("--epochs", "--niter", "--n_epochs", "--n-epochs", type=count, help="passes over the data")
    add("--steps", type=count, help="total number of steps, in place of --epochs")
    add("--lr", type=positive, help="learning rate of both Adams")
    add("--beta1", "--b1", type=cli.real_number(0, 1), help="Adam's beta1")
    add("--nz", "--latent_dim", "--latent-dim", type=count, help="length of the latent vector")
    add("--ngf", type=count, help="width of the generator")
    add("--ndf", type=count, help="width of the discriminator")
    add(
        "--image-size",
        "--imageSize",
        "--image_size",
        "--img_size",
        "--img-size",
        type=cli.image_size,
        metavar="PIXELS",
        help="16, 32, 64, 128 or 256 (default: 32 for the embedded images, otherwise 64)",
    )
    add("--workers", type=cli.whole_number(0), help="threads that decode images")
    add(
        "--seed",
        "--manualSeed",
        type=cli.whole_number(0, cli.SEED_MAX),
        help="of initial weights, order of the data and latents (default 0)",
    )
    add("--outf", "--outdir", metavar="RUN", help="folder of the run (default runs/<date-time>)")
    add("--resume", metavar="RUN", help="continue the run in this folder")
    add("--overwrite", action="store_true", help="replace the run that --outf holds")
    add("--dry-run", action="store_true", help="one step, with everything it writes")
    add("--netG", metavar="FILE", help="start weights of the generator")
    add("--netD", metavar="FILE", help="start weights of the discriminator")
    add("--fused", action="store_true", help="fused operations and one merged step")
    add(
        "--amp",
        choices=("off", "bf16", "fp16", "auto"),
        help="mixed precision (default auto with --fused, otherwise off)",
    )
    add("--loss", choices=("bce", "minimax"), help="bce: non-saturating (default)")
    add("--loss-weight", "--loss_weight", type=positive, help="factor of both losses")
    add("--device", choices=("auto", "cpu", "cuda"), help="default auto")
    add("--threads", type=cli.thread_count, help="CPU threads (default: torch's choice)")
    add(
        "--save-every",
        "--save_every",
        type=count,
        metavar="STEPS",
        help="steps between checkpoints, which also end every epoch",
    )
    add("--log-every", "--log_every", type=count, metavar="STEPS", help="steps between log lines")
    add(
        "--sample-every",
        "--sample_every",
        type=count,
        metavar="STEPS",
        help="steps between sample pictures, which also end every epoch",
    )
    add("--flip", action="store_true", help="mirror images at random")
    return parser  # fmt: skip


def _source(given: dict[str, Any]) -> dict[str, Any]:
    """`--dataset NAME --dataroot PATH` folded into `data`, its path made absolute."""
    name = given.pop("dataset", None)
    if name in BUILT_IN:
        if given.setdefault("data", name) != name:
            raise UserError(
                f"--dataset {name} is built in and reads no files, but --dataroot {given['data']} "
                "was given too; leave out one of them"
            )
    elif name in FOLDER_SETS:
        if "data" not in given:
            raise UserError(f"--dataset {name} needs --dataroot, the folder its images are in")
    elif name is not None:
        raise UserError(
            f"--dataset {name} is not known; give one of {', '.join(BUILT_IN + FOLDER_SETS)}, or "
            "just --data with a folder of images"
        )
    for key in ("data", "netG", "netD"):
        if key in given and given[key] not in (BUILT_IN if key == "data" else ()):
            given[key] = str(Path(given[key]).absolute())
    return given


@dataclass(frozen=True)
class Request:
    """A parsed command line: `given` holds only what was typed, by the names of `Config`."""

    given: dict[str, Any]
    outf: str | None
    resume: str | None
    overwrite: bool


def parse(argv: Sequence[str] | None) -> Request:
    """The command line as a `Request`.

    Raises:
        UserError: an unknown flag, a value out of range, or flags that contradict each other.
    """
    given = vars(_parser().parse_args(argv))
    outf, resume = given.pop("outf", None), given.pop("resume", None)
    overwrite, dry_run = given.pop("overwrite", False), given.pop("dry_run", False)
    if resume is not None and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; give one of them")
    if resume is not None and outf is not None and Path(outf).resolve() != Path(resume).resolve():
        raise UserError(f"--resume {resume} goes on in its own folder; leave out --outf {outf}")
    if "epochs" in given and "steps" in given:
        raise UserError("--epochs and --steps both say when to stop; give one of them")
    if dry_run:
        if resume is not None:
            raise UserError("--dry-run tries out a new run; leave it out, or leave out --resume")
        given.pop("epochs", None)
        given["steps"] = 1
    return Request(_source(given), outf, resume, overwrite)


def _stored_config(path: Path, stored: dict[str, Any]) -> Config:
    names = {field.name for field in fields(Config)}
    config = stored["config"]
    if not isinstance(config, dict) or config.keys() != names:
        raise UserError(
            f"{path / CONFIG} was written by another version of pygan; continue the run with that "
            "version, or start a new one"
        )
    return Config(**config)


def _flag(name: str, value: Any) -> str:
    flag = "--" + (name if name.startswith("net") else name.replace("_", "-"))
    if isinstance(value, bool) or value is None:
        return flag if value else f"no {flag}"
    return f"{flag} {value}"


def continued(config: Config, given: dict[str, Any], path: Path) -> Config:
    """The configuration of a run that goes on with further flags.

    Raises:
        UserError: a flag says otherwise than the run was started with.
    """
    # "auto" asks for what the run settled on.
    resolved = {
        name: getattr(config, name) if name in ("device", "amp") and value == "auto" else value
        for name, value in given.items()
    }
    differing = [
        f"{_flag(name, value)} (the run has {_flag(name, getattr(config, name))})"
        for name, value in resolved.items()
        if name not in MAY_CHANGE and value != getattr(config, name)
    ]
    if differing:
        raise UserError(
            f"{', '.join(differing)} contradicts the run in {path}; leave it out, or start a new "
            "run with another --outf"
        )
    allowed = {name: value for name, value in resolved.items() if name in MAY_CHANGE}
    if "epochs" in allowed:
        allowed["steps"] = None
    return replace(config, **allowed)


def _check_length(config: Config, new: Config, steps_per_epoch: int, path: Path) -> None:
    before, after = (c.total_steps(steps_per_epoch) for c in (config, new))
    if after < before:
        raise UserError(
            f"the run in {path} is set to {before} steps and cannot be shortened to {after}; give "
            f"--steps of at least {before}, or stop it with Ctrl-C where you like"
        )


def load_images(config: Config) -> ImageSet:
    """The data of a run.

    Raises:
        UserError: it cannot be read, or holds fewer images than one batch.
    """
    # 0 workers is what people type for "in this process".
    workers = 1 if config.workers == 0 else config.workers
    images = data.load(config.data, image_size=config.image_size, workers=workers)
    if len(images) < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size} is larger than the data set, {config.data} with "
            f"{len(images)} images; give a --batch-size from 1 to {len(images)}"
        )
    return images


def _describe(images: ImageSet) -> dict[str, Any]:
    return {
        "name": images.name,
        "images": len(images),
        "image_size": images.image_size,
        "channels": images.channels,
        "fingerprint": images.fingerprint,
        "skipped": [list(item) for item in images.skipped],
    }


def _check_same_data(images: ImageSet, stored: dict[str, Any], path: Path) -> None:
    now = _describe(images)
    names = ("images", "image_size", "channels", "fingerprint")
    differing = [
        f"{name.replace('_', ' ')} {str(stored.get(name))[:12]} then, {str(now[name])[:12]} now"
        for name in names
        if stored.get(name) != now[name]
    ]
    if differing:
        raise UserError(
            f"the data in {images.name} has changed since the run in {path} was started "
            f"({'; '.join(differing)}); restore it, or start a new run"
        )


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
            self._bar = tqdm(
                total=total * batch_size, initial=step * batch_size, unit=" images",
                unit_scale=True, dynamic_ncols=True, file=sys.stdout, smoothing=0.05,
            )  # fmt: skip

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(self._batch)

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

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Networks:
    """G, D, their optimizers and the step that updates them."""

    def __init__(self, config: Config, size: int, channels: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.G, self.D = models.dcgan(size, channels, config.nz, config.ngf, config.ndf)
        self.arguments = {
            "G": {"image_size": size, "channels": channels, "nz": config.nz, "ngf": config.ngf},
            "D": {"image_size": size, "channels": channels, "ndf": config.ndf},
        }
        for network, file in ((self.G, config.netG), (self.D, config.netD)):
            if file is not None:
                checkpoint.fill(network, checkpoint.read_weights(Path(file))[0], file)
        self.G.to(device)
        self.D.to(device)
        if config.fused:
            pygan.fuse(self.G)
            pygan.fuse(self.D)
        self.opt_g, self.opt_d = (self._adam(net, config, device) for net in (self.G, self.D))
        step = pygan.AdversarialStep if config.fused else pygan.ReferenceStep
        self.step = step(
            self.G, self.D, self.opt_g, self.opt_d,
            loss=config.loss, loss_weight=config.loss_weight,
            amp=config.amp or ("auto" if config.fused else "off"),
        )  # fmt: skip

    @staticmethod
    def _adam(network: nn.Module, config: Config, device: torch.device) -> torch.optim.Adam:
        keywords = {"fused": True, "capturable": device.type == "cuda"} if config.fused else {}
        return torch.optim.Adam(
            network.parameters(), lr=config.lr, betas=(config.beta1, 0.999), **keywords
        )

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

    def __init__(self, config: Config, images: ImageSet, device: torch.device) -> None:
        self._config, self._device = config, device
        self.order = data.BatchOrder(len(images), config.batch_size, config.seed)
        z_seed, _, _, self._flip_seed = _seeds(config.seed)
        self.generator = torch.Generator(device).manual_seed(z_seed)
        with warnings.catch_warnings():
            # The array is a read-only memory map, and nobody writes to it.
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            self._images = torch.from_numpy(images.images)
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if self._images.nbytes <= free // 2:
                self._images = self._images.to(device)

    def real(self, step: int) -> Tensor:
        """float32 `[N, C, H, W]` in [-1, 1]; `step` counts from 0.

        channels_last for the fused step, contiguous as usual for the plain one.
        """
        source = self._images.device
        index = torch.from_numpy(self.order.index(step))
        flip = None
        if self._config.flip:
            random = np.random.default_rng((self._flip_seed, step))
            flip = torch.from_numpy(random.random(self._config.batch_size) < 0.5)
        if source.type == "cuda":
            index = index.pin_memory().to(source, non_blocking=True)
            flip = flip if flip is None else flip.pin_memory().to(source, non_blocking=True)
        real = image_batch(self._images, index, flip=flip).to(self._device, non_blocking=True)
        return real if self._config.fused else real.contiguous()

    def latent(self) -> Tensor:
        """The next `[N, nz, 1, 1]` of the run's own generator."""
        shape = (self._config.batch_size, self._config.nz, 1, 1)
        return torch.randn(shape, generator=self.generator, device=self._device)


class Training:
    """A run in progress: where it is, and everything it writes."""

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        networks: Networks,
        folder: RunFolder,
        device: torch.device,
    ) -> None:
        self.config, self.images, self.networks = config, images, networks
        self.folder, self.device = folder, device
        self.batches = Batches(config, images, device)
        self.per_epoch = self.batches.order.steps_per_epoch
        self.total = config.total_steps(self.per_epoch)
        self.fixed_z = latents(SAMPLES, config.nz, _seeds(config.seed)[1]).to(device)
        self.step = 0
        self.saved = 0
        self.seconds = 0.0
        self.sums = torch.zeros(len(NUMBERS), device=device)
        self.count = 0
        self._tick = self._last_log = time.perf_counter()
        self._events: SummaryWriter | None = None

    def state(self) -> dict[str, Any]:
        """The whole state of the run between two steps."""
        random = {"torch": torch.get_rng_state(), "latents": self.batches.generator.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": _fixed(self.config),
            "position": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "count": self.count,
            "random": random,
            "networks": self.networks.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        self.networks.restore(state["networks"])
        self.step = self.saved = state["position"]
        self.seconds = state["seconds"]
        self.sums.copy_(state["sums"])
        self.count = state["count"]
        random = state["random"]
        torch.set_rng_state(random["torch"])
        self.batches.generator.set_state(random["latents"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def start(self) -> None:
        """Opens the logs; a new run also gets its first checkpoint and `real_samples.png`."""
        if self.step == 0:
            chosen = np.random.default_rng(_seeds(self.config.seed)[2]).permutation(
                len(self.images)
            )
            real = self.images.images[np.sort(chosen[:SAMPLES])]
            self.folder.write("real_samples.png", encode(grid(real)))
        self.folder.start_log(self.step)
        from torch.utils.tensorboard import SummaryWriter

        with self.folder.failing("the TensorBoard events"):
            self._events = SummaryWriter(
                str(self.folder.path), purge_step=self.step + 1 if self.step else None
            )

    def run(self, stop: StopSignal) -> None:
        """Trains until the last step, or until `stop` is asked for.

        Raises:
            Failure: a loss is not finite, or a file cannot be written.
        """
        self._tick = self._last_log = time.perf_counter()
        progress = Progress(self.step, self.total, self.config.batch_size, self.per_epoch)
        try:
            stopping = False
            while self.step < self.total and not stopping:
                real, z = self.batches.real(self.step), self.batches.latent()
                self.sums += torch.stack(self.networks.step(real, z))
                self.count += 1
                self.step += 1
                progress.advance()
                # Asked once a step: a signal that comes later than this gets another step.
                stopping = bool(stop.number)
                self._after_step(stopping, progress)
        finally:
            progress.close()

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _after_step(self, stopping: bool, progress: Progress) -> None:
        last = self.step == self.total
        milestone = last or self.step % self.per_epoch == 0
        if self._due(self.config.log_every) or last:
            row = self._log()
            progress.show(self.step, row)
        if milestone or self._due(self.config.sample_every):
            self._numbers()
            self._draw()
        if milestone or stopping or self._due(self.config.save_every):
            self.save(export=milestone or stopping)

    def _numbers(self) -> list[float]:
        """Means since the last log line.

        Raises:
            Failure: one of them is NaN or infinite.
        """
        values = (self.sums / max(self.count, 1)).tolist()
        for name, value in zip(NUMBERS, values, strict=True):
            if not math.isfinite(value):
                self._diverged(f"{name} is {value}")
        return values

    def _diverged(self, what: str) -> None:
        newest = sorted(self.folder.path.glob("netG_epoch_*.pth"))
        weights = f", or from its weights, {newest[-1]}, with --netG" if newest else ""
        raise Failure(
            f"{what} after step {self.step}, so training has diverged and stops; the last good "
            f"checkpoint is {self.folder.path / RESUME} of step {self.saved}; start a new run with "
            f"a lower --lr{weights}"
        )

    def _epoch(self) -> int:
        return max(self.step - 1, 0) // self.per_epoch

    def _log(self) -> dict[str, float]:
        values = self._numbers()
        now = time.perf_counter()
        self.seconds += now - self._tick
        rate = self.count * self.config.batch_size / (now - self._last_log)
        self._tick = self._last_log = now
        row = {"step": self.step, "epoch": self._epoch(), **dict(zip(NUMBERS, values, strict=True))}
        self.sums.zero_()
        self.count = 0
        with self.folder.failing("the TensorBoard events"):
            assert self._events is not None
            for name, value in (*zip(NUMBERS, values, strict=True), ("images_per_s", rate)):
                self._events.add_scalar(name, value, self.step)
        row = {**row, "images_per_s": round(rate, 2), "seconds": round(self.seconds, 3)}
        self.folder.log(row)
        return row

    def _draw(self) -> None:
        picture = grid(generate(self.networks.G, self.fixed_z))
        self.folder.write(f"fake_samples_epoch_{self._epoch():03d}.png", encode(picture))
        with self.folder.failing("the TensorBoard events"):
            assert self._events is not None
            self._events.add_image("fake_samples", picture, self.step, dataformats="HWC")

    def save(self, *, export: bool = False) -> None:
        """Writes the resume file; `export` also writes the weights of the epoch and losses.png.

        Raises:
            Failure: the state is not finite, or the disk refused; the last checkpoint is kept.
        """
        self._numbers()
        now = time.perf_counter()
        self.seconds += now - self._tick
        self._tick = now
        state = self.state()
        where = checkpoint.nonfinite(state)
        if where is not None:
            self._diverged(f"{where} is not finite")
        if export:
            self._export()
        if self._events is not None:
            self.folder.sync_log()
            with self.folder.failing("the TensorBoard events"):
                self._events.flush()
        # Last: from here on the run resumes after everything above.
        self.folder.write(RESUME, checkpoint.pack_state(state))
        self.saved = self.step

    def _export(self) -> None:
        epoch = self._epoch()
        for letter, kind in (("G", "dcgan.Generator"), ("D", "dcgan.Discriminator")):
            network = self.networks.G if letter == "G" else self.networks.D
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
    """Losses and probabilities over the steps, as a PNG."""
    from matplotlib.figure import Figure

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


def _fixed(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}


def _write_config(folder: RunFolder, config: Config, images: ImageSet) -> None:
    content = {
        "pygan": {"version": pygan.__version__, "torch": torch.__version__, "cpu": _cpu()},
        "config": asdict(config),
        "data": _describe(images),
    }
    folder.write(CONFIG, json.dumps(content, indent=1).encode() + b"\n")


def _cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _settle(config: Config) -> tuple[Config, torch.device]:
    """Replaces what was left to the machine by what it chose, so that a resumed run does too."""
    device = cli.device(config.device)
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    return replace(config, device=device.type, threads=threads), device


def _networks(config: Config, images: ImageSet, device: torch.device) -> Networks:
    check_memory(
        device,
        image_size=images.image_size,
        channels=images.channels,
        batch_size=config.batch_size,
        nz=config.nz,
        ngf=config.ngf,
        ndf=config.ndf,
        amp=config.amp != "off",
    )
    return Networks(config, images.image_size, images.channels, device)


def _new_run(request: Request) -> tuple[Training, RunFolder]:
    path = Path(request.outf or time.strftime("runs/%Y-%m-%d-%H%M%S"))
    check_new(path, overwrite=request.overwrite)
    config, device = _settle(Config(**request.given))
    images = load_images(config)
    networks = _networks(config, images, device)
    # What was left open came to this, and stays so wherever the run goes on.
    config = replace(config, image_size=images.image_size, amp=networks.step.amp)
    # Only now, when little is left that can fail, may --overwrite remove the old run.
    folder = RunFolder.create(path, overwrite=request.overwrite)
    try:
        training = Training(config, images, networks, folder, device)
        training.start()
        training.save()
        # Written last: a folder with a configuration always has a checkpoint.
        _write_config(folder, config, images)
    except BaseException:
        folder.close()
        raise
    return training, folder


def _check_state(state: dict[str, Any], config: Config, path: Path) -> None:
    theirs, ours = state.get("config", {}), _fixed(config)
    differing = [
        f"{_flag(name, theirs.get(name))} there, {_flag(name, value)} in {CONFIG}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise UserError(
            f"{path / RESUME} belongs to a run with another configuration ({'; '.join(differing)});"
            " restore the run's own, or start a new run"
        )


def _resumed(request: Request) -> tuple[Training, RunFolder]:
    path = Path(request.resume or "")
    path = path.parent if path.name == RESUME else path
    stored = read_config(path)
    started = _stored_config(path, stored)
    config = continued(started, request.given, path)
    if config.threads != started.threads:
        print(
            f"the run used {started.threads} threads and goes on with {config.threads}, so it will "
            "not end in the very same bytes as one left alone", flush=True,
        )  # fmt: skip
    if (stored["pygan"].get("torch"), stored["pygan"].get("cpu")) != (torch.__version__, _cpu()):
        print(
            f"the run began with torch {stored['pygan'].get('torch')} on a "
            f"{stored['pygan'].get('cpu')} CPU and goes on with torch {torch.__version__} on "
            f"{_cpu()}, so it may not end in the very same bytes as one left alone", flush=True,
        )  # fmt: skip
    config, device = _settle(config)
    images = load_images(config)
    _check_same_data(images, stored["data"], path)
    _check_length(started, config, len(images) // config.batch_size, path)
    networks = _networks(config, images, device)
    folder = RunFolder.reopen(path)
    try:
        state = checkpoint.read_state(path / RESUME)
        _check_state(state, config, path)
        training = Training(config, images, networks, folder, device)
        training.restore(state)
        if config != started:
            _write_config(folder, config, images)
        if training.step < training.total:
            training.start()
    except BaseException:
        folder.close()
        raise
    return training, folder


def _announce(training: Training) -> None:
    config, step = training.config, training.networks.step
    way = "fused" if config.fused else "plain torch"
    print(
        f"{len(training.images)} images of {config.image_size}x{config.image_size}x"
        f"{training.images.channels} from {config.data}; {way}, amp {step.amp}, {config.device}, "
        f"{config.threads} threads; step {training.step} of {training.total}; run folder "
        f"{training.folder.path}",
        flush=True,
    )


def _train(argv: Sequence[str] | None) -> int:
    request = parse(argv)
    training, folder = _new_run(request) if request.resume is None else _resumed(request)
    path, first = folder.path, training.step
    with folder:
        if first == training.total:
            print(
                f"the run in {path} is finished ({first} of {training.total} steps); give --epochs "
                "or --steps a larger number to train on",
                flush=True,
            )
            return 0
        _announce(training)
        began = time.perf_counter()
        try:
            with StopSignal() as stop:
                training.run(stop)
        except BaseException:
            training.close(failed=True)
            raise
        training.close()
    rate = (training.step - first) * training.config.batch_size / (time.perf_counter() - began)
    if training.step < training.total:
        print(
            f"stopped and saved at step {training.step} of {training.total}; continue with {PROG} "
            f"--resume {path}",
            flush=True,
        )
        return 128 + stop.number
    print(f"samples are in {path} (fake_samples_epoch_*.png); {rate:.1f} images/s", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (see `pygan.cli`)."""
    threads = torch.get_num_threads()
    try:
        return cli.run(PROG, lambda: _train(argv))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
