"""`python -m pygan.train`: trains a GAN on images, into one folder that can always be resumed.

Without `--fused` this is the loop of the well-known DCGAN example in plain torch; with it the same
networks go through the fused operations and `AdversarialStep`. Initial weights, order of the data
and latents depend on the seed alone, so the two can be compared number by number.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import pygan
from pygan import checkpoint, cli, data
from pygan.config import (
    PROG,
    Config,
    Request,
    continued,
    fixed,
    flag_text,
    parse,
    stored_config,
)
from pygan.data import Images
from pygan.distributed import Follower, World, check_batch, is_lost, joined, world
from pygan.errors import UserError
from pygan.memory import check_memory
from pygan.run_folder import CONFIG, RESUME, RunFolder, check_new, read_config
from pygan.training import Networks, StopSignal, Training


def _check_length(config: Config, new: Config, steps_per_epoch: int, path: Path) -> None:
    before, after = (c.total_steps(steps_per_epoch) for c in (config, new))
    if after < before:
        raise UserError(
            f"the run in {path} is set to {before} steps and cannot be shortened to {after}; give "
            f"--steps of at least {before}, or stop it with Ctrl-C where you like"
        )


def load_images(config: Config) -> Images:
    """The data of a run.

    Raises:
        UserError: it cannot be read, or holds fewer images than one batch.
    """
    # 0 workers is what people type for "in this process".
    workers = 1 if config.workers == 0 else config.workers
    read = data.stream if config.stream else data.load
    images: Images = read(
        config.data,
        image_size=config.image_size,
        workers=workers,
        follow_links=config.follow_links,
    )
    if len(images) < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size} is larger than the data set, {config.data} with "
            f"{len(images)} images; give a --batch-size from 1 to {len(images)}"
        )
    return images


def _describe(images: Images) -> dict[str, Any]:
    return {
        "name": images.name,
        "images": len(images),
        "image_size": images.image_size,
        "channels": images.channels,
        "fingerprint": images.fingerprint,
        "skipped": [list(item) for item in images.skipped],
    }


def _check_same_data(images: Images, stored: dict[str, Any], path: Path) -> None:
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


def _write_config(folder: RunFolder | Follower, config: Config, images: Images) -> None:
    content = {
        "pygan": {"version": pygan.__version__, "torch": torch.__version__, "cpu": _cpu()},
        "config": asdict(config),
        "data": _describe(images),
    }
    folder.write(CONFIG, json.dumps(content, indent=1).encode() + b"\n")


def _cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _device(name: str, here: World) -> torch.device:
    """The device of this process.

    Raises:
        UserError: it is not there.
    """
    device = cli.device(name)
    if here.alone or device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if here.local_rank >= count:
        raise UserError(
            f"process {here.local_rank} of this machine has no GPU of its own, there are {count}; "
            f"start {count} with --nproc-per-node, or give --device cpu"
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


def _settle(config: Config, here: World) -> tuple[Config, torch.device]:
    """Replaces what was left to the machine by what it chose, so that a resumed run does too."""
    check_batch(config.batch_size, here)
    device = _device(config.device, here)
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    return replace(config, device=device.type, threads=threads), device


def _shared_images(config: Config, here: World) -> Images:
    """The data, which the first process decodes and the others find in the cache."""
    if not here.is_first:
        here.wait()
    images = load_images(config)
    if here.is_first:
        here.wait()
    return images


def _networks(config: Config, images: Images, device: torch.device, here: World) -> Networks:
    check_memory(
        device,
        image_size=images.image_size,
        channels=images.channels,
        batch_size=config.batch_size // here.size,
        nz=config.nz,
        ngf=config.ngf,
        ndf=config.ndf,
        amp=config.amp != "off",
    )
    return Networks(config, images.image_size, images.channels, device, here)


Run = tuple[Training, RunFolder | Follower]


def _new_run(request: Request, here: World) -> Run:
    path = Path(request.outf or time.strftime("runs/%Y-%m-%d-%H%M%S"))
    if here.is_first:
        check_new(path, overwrite=request.overwrite)
    config, device = _settle(Config(**request.given), here)
    images = _shared_images(config, here)
    networks = _networks(config, images, device, here)
    # What was left open came to this, and stays so wherever the run goes on.
    config = replace(config, image_size=images.image_size, amp=networks.step.amp)
    # Only now, when little is left that can fail, may --overwrite remove the old run.
    folder = (
        RunFolder.create(path, overwrite=request.overwrite) if here.is_first else Follower(path)
    )
    try:
        training = Training(config, images, networks, folder, device, here)
        training.start()
        training.save()
        # Written last: a folder with a configuration always has a checkpoint.
        _write_config(folder, config, images)
    except BaseException:
        folder.close()
        raise
    here.wait()
    return training, folder


def _check_state(state: dict[str, Any], config: Config, path: Path) -> None:
    theirs, ours = state.get("config", {}), fixed(config)
    differing = [
        f"{flag_text(name, theirs.get(name))} there, {flag_text(name, value)} in {CONFIG}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise UserError(
            f"{path / RESUME} belongs to a run with another configuration ({'; '.join(differing)});"
            " restore the run's own, or start a new run"
        )


def _restore(training: Training, state: dict[str, Any], path: Path) -> None:
    try:
        training.restore(state)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Whole, but written by something else: any part may lack or be of another kind.
        raise UserError(
            f"{path / RESUME} is not of this version of pygan ({type(error).__name__} at its "
            "content); continue the run with the version that wrote it, or start a new one"
        ) from error


def _resumed(request: Request, here: World) -> Run:
    path = Path(request.resume or "")
    path = path.parent if path.name == RESUME else path
    stored = read_config(path)
    started = stored_config(path, stored)
    config = continued(started, request.given, path)
    if config.threads != started.threads:
        here.say(
            f"the run used {started.threads} threads and goes on with {config.threads}, so it will "
            "not end in the very same bytes as one left alone",
        )
    if (stored["pygan"].get("torch"), stored["pygan"].get("cpu")) != (torch.__version__, _cpu()):
        here.say(
            f"the run began with torch {stored['pygan'].get('torch')} on a "
            f"{stored['pygan'].get('cpu')} CPU and goes on with torch {torch.__version__} on "
            f"{_cpu()}, so it may not end in the very same bytes as one left alone",
        )
    config, device = _settle(config, here)
    images = _shared_images(config, here)
    _check_same_data(images, stored["data"], path)
    _check_length(started, config, len(images) // config.batch_size, path)
    networks = _networks(config, images, device, here)
    folder = RunFolder.reopen(path) if here.is_first else Follower(path)
    try:
        state, warning = checkpoint.read_newest(path)
        if warning is not None:
            here.say(warning)
        _check_state(state, config, path)
        training = Training(config, images, networks, folder, device, here)
        _restore(training, state, path)
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
    streamed = ", streamed" if config.stream else ""
    print(
        f"{len(training.images)} images of {config.image_size}x{config.image_size}x"
        f"{training.images.channels} from {config.data}{streamed}; {way}, amp {step.amp}, "
        f"{config.device}, {config.threads} threads; step {training.step} of {training.total}; "
        f"run folder {training.folder.path}",
        flush=True,
    )


def _as_restarted(request: Request, here: World) -> Request:
    """A run in several processes that were started anew goes on from its last checkpoint.

    Raises:
        UserError: the processes would not find each other's folder.
    """
    if here.alone or request.resume is not None:
        return request
    if request.outf is None:
        raise UserError("the processes of a run share a folder; name it with --outf")
    path = Path(request.outf)
    if here.restarts and (path / CONFIG).exists():
        return replace(request, resume=str(path), outf=None, overwrite=False)
    # One that fell before its first checkpoint begins again.
    return replace(request, overwrite=request.overwrite or here.restarts > 0)


def _train(argv: Sequence[str] | None) -> int:
    here = world()
    request = _as_restarted(parse(argv), here)
    with joined(here, _device(request.given.get("device", "auto"), here)):
        try:
            return _train_here(request, here)
        except RuntimeError as error:
            if here.alone or not is_lost(error):
                raise
            path = request.resume or request.outf
            raise cli.Failure(
                "another process of this run has ended or does not answer; the last checkpoint is "
                f"kept: go on with {PROG} --resume {path} in torchrun, whose --max-restarts does "
                "so by itself"
            ) from error


def _train_here(request: Request, here: World) -> int:
    start = _new_run if request.resume is None else _resumed
    training, folder = start(request, here)
    path, first = folder.path, training.step
    with folder:
        if first == training.total:
            here.say(
                f"the run in {path} is finished ({first} of {training.total} steps); give --epochs "
                "or --steps a larger number to train on",
            )
            return 0
        if here.is_first:
            _announce(training)
        began = time.perf_counter()
        try:
            with StopSignal() as stop:
                training.run(stop)
        except BaseException:
            training.close(failed=True)
            raise
        training.close()
    if training.replaced:
        here.say(
            f"{training.replaced:,} times an image could not be read and another took its place"
        )
    rate = (training.step - first) * training.config.batch_size / (time.perf_counter() - began)
    if training.step < training.total:
        here.say(
            f"stopped and saved at step {training.step} of {training.total}; continue with {PROG} "
            f"--resume {path}",
        )
        return 128 + (stop.number or signal.SIGTERM)
    here.say(f"samples are in {path} (fake_samples_epoch_*.png); {rate:.1f} images/s")
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
