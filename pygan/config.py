"""What a run is: its settings, the command line that gives them, and what may change later."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, get_origin, get_type_hints

from pygan import cli, losses
from pygan.augment import POLICIES, checked_policy
from pygan.data import hub
from pygan.errors import UserError
from pygan.models.dcgan import D_NORMS
from pygan.run_folder import CONFIG, damaged_config

PROG: Final = "python -m pygan.train"
BUILT_IN: Final = ("fashion-mnist", "fake")
FOLDER_SETS: Final = ("folder", "imagenet", "lfw", "celeba")


@dataclass(frozen=True)
class Config:
    """What a run is; kept in config.json. Only the fields in `MAY_CHANGE` may differ on resume."""

    data: str = "fashion-mnist"
    follow_links: bool = False
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
    graph: str = "auto"
    loss: str = "bce"
    loss_weight: float = 1.0
    flip: bool = False
    stream: bool = False
    lr_g: float | None = None
    lr_d: float | None = None
    real_target: float = 1.0
    flip_labels: float = 0.0
    noise: float = 0.0
    noise_steps: int | None = None
    n_critic: int = 1
    clip_grad: float | None = None
    d_norm: str = "batch"
    r1: float = 0.0
    r1_every: int = 16
    gradient_penalty: float = 0.0
    augment: tuple[str, ...] = ()
    ema: float | None = None
    sync_bn: bool = False
    netG: str | None = None
    netD: str | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    log_every: int = 20
    save_every: int = 500
    sample_every: int | None = None
    evaluate_every: int | None = None
    monitor: bool = True
    auto_fix: bool = False

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run: `steps` where given, otherwise `epochs` passes."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps


MAY_CHANGE: Final = {
    "epochs", "steps", "threads", "workers", "graph", "log_every", "save_every", "sample_every",
    "evaluate_every", "monitor", "auto_fix",
}  # fmt: skip


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog=PROG,
        description="Train a GAN on images. Without arguments: DCGAN on Fashion-MNIST (embedded).",
        epilog="Underscores may stand for the dashes inside a flag.",
        argument_default=argparse.SUPPRESS,
    )
    default = Config()

    def add(*flags: str, help: str, **keywords: Any) -> None:
        value = getattr(default, flags[0].lstrip("-").replace("-", "_"), None)
        shown = f" (default {value:g})" if type(value) in (int, float) and value else ""
        parser.add_argument(*flags, help=help + shown, **keywords)

    _add_data(add)
    _add_training(add)
    _add_tricks(add)
    _add_run(add)
    return parser


# fmt: off
def _add_data(add: Callable[..., None]) -> None:
    add("--data", "--dataroot", metavar="SOURCE",
        help="folder or .zip of images, WebDataset shards (.tar, a folder or pattern of them), "
        "Hugging Face dataset (its folder, or hf:NAME[:SPLIT]), .npy, .npz, idx file, "
        "fashion-mnist (default) or fake")
    add("--dataset", metavar="NAME",
        help="fashion-mnist, fake, or folder, imagenet, lfw, celeba: those need --dataroot")
    add("--follow-links", action="store_true",
        help="follow links in a folder that lead out of it, too")
    add("--image-size", "--imageSize", "--img-size", type=cli.image_size, metavar="PIXELS",
        help="16, 32, 64, 128 or 256 (default: 32 for the embedded images, otherwise 64)")
    add("--flip", action="store_true", help="mirror images at random")
    add("--stream", action="store_true",
        help="decode images while training, without a cache: for more than the disk would hold")
    add("--workers", type=cli.whole_number(0), metavar="N", help="threads that decode images")


def _add_training(add: Callable[..., None]) -> None:
    count, positive = cli.whole_number(1), cli.real_number(0, open_low=True)
    add("--fused", action="store_true", help="fused operations and one merged step")
    add("--epochs", "--niter", "--n-epochs", type=count, metavar="N", help="passes over the data")
    add("--steps", type=count, metavar="N", help="total number of steps, in place of --epochs")
    add("--batch-size", "--batchSize", type=count, metavar="N", help="images in a step")
    add("--lr", type=positive, help="learning rate of both Adams")
    add("--beta1", "--b1", type=cli.real_number(0, 1), help="Adam's beta1")
    add("--nz", "--latent-dim", type=count, metavar="N", help="length of the latent vector")
    add("--ngf", type=count, metavar="N", help="width of the generator")
    add("--ndf", type=count, metavar="N", help="width of the discriminator")
    add("--netG", metavar="FILE", help="start weights of the generator")
    add("--netD", metavar="FILE", help="start weights of the discriminator")
    add("--loss", choices=losses.NAMES,
        help="bce: non-saturating (default); lsgan: learns sooner with --clip-grad 5; wasserstein: "
        "nothing here keeps D Lipschitz")
    add("--loss-weight", type=positive, help="factor of both losses")
    add("--amp", choices=("off", "bf16", "fp16", "auto"),
        help="mixed precision (default auto with --fused, otherwise off)")
    add("--graph", choices=("auto", "off", "on"),
        help="with --fused, a step as one CUDA graph, on a CPU as one program of its operations "
        "(default auto: where that is possible)")
    add("--sync-bn", action="store_true",
        help="batch norm over the processes that torchrun starts, not each on its own")
    add("--device", choices=("auto", "cpu", "cuda"), help="default auto")
    add("--threads", type=cli.thread_count, metavar="N", help="CPU threads (default: torch's)")
    add("--seed", "--manualSeed", type=cli.whole_number(0, cli.SEED_MAX),
        help="of initial weights, order of the data and latents (default 0)")


def _add_tricks(add: Callable[..., None]) -> None:
    count, positive = cli.whole_number(1), cli.real_number(0, open_low=True)
    share = cli.real_number(0, 1)
    add("--lr-g", type=positive, help="learning rate of G's Adam (default: --lr)")
    add("--lr-d", type=positive, help="learning rate of D's Adam (default: --lr)")
    add("--real-target", type=cli.real_number(0, 2), metavar="T",
        help="D's target of real images; 0.9 is one-sided label smoothing")
    add("--flip-labels", type=share, metavar="SHARE", help="of D's labels, swapped by chance")
    add("--noise", type=cli.real_number(0), metavar="DEVIATION",
        help="of normal noise on what D sees, falling to none")
    add("--noise-steps", type=count, metavar="N", help="until there is none (default: all)")
    add("--n-critic", type=count, metavar="N", help="updates of D for one of G")
    add("--clip-grad", type=positive, metavar="NORM", help="largest L2 norm of a gradient")
    add("--d-norm", choices=D_NORMS,
        help="of D: batch (default); spectral, of its weights; none")
    add("--r1", type=cli.real_number(0), metavar="GAMMA", help="R1 penalty on D; 10, say")
    add("--r1-every", type=count, metavar="N", help="updates of D from one R1 penalty to the next")
    add("--gradient-penalty", type=cli.real_number(0), metavar="LAMBDA",
        help="penalty of WGAN-GP; 10 with --loss wasserstein --d-norm none")
    add("--augment", type=_policy, metavar="POLICY",
        help=f"differentiable augmentation: any of {', '.join(POLICIES)}, joined by commas")
    add("--ema", type=cli.real_number(0, 1), metavar="DECAY",
        help="samples and saved weights of G are its moving average; 0.999, say")


def _add_run(add: Callable[..., None]) -> None:
    count = cli.whole_number(1)
    add("--outf", "--outdir", metavar="RUN", help="folder of the run (default runs/<date-time>)")
    add("--resume", metavar="RUN", help="continue the run in this folder")
    add("--overwrite", action="store_true", help="replace the run that --outf holds")
    add("--dry-run", action="store_true", help="one step, with everything it writes")
    add("--log-every", type=count, metavar="STEPS", help="steps between log lines")
    add("--save-every", type=count, metavar="STEPS",
        help="steps between checkpoints, which also end every epoch")
    add("--sample-every", type=count, metavar="STEPS",
        help="steps between sample pictures, which also end every epoch")
    add("--evaluate-every", type=count, metavar="EPOCHS",
        help="epochs between measurements of the samples' quality, which also end the run "
        "(default: none)")
    add("--monitor", action=argparse.BooleanOptionalAction,
        help="say in words what training suffers from (default)")
    add("--auto-fix", action="store_true",
        help="do the safe ones of what the monitor advises: smoothed labels, lower learning rates")
# fmt: on


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
            hosted = key == "data" and given[key].startswith(hub.PREFIX)
            given[key] = hub.absolute(given[key]) if hosted else str(Path(given[key]).absolute())
    return given


def _policy(text: str) -> tuple[str, ...]:
    try:
        return checked_policy(text.split(","))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    if given.get("graph") == "on" and resume is None and not given.get("fused"):
        raise UserError("--graph on captures the fused step; add --fused, or leave it out")
    if given.get("auto_fix") and given.get("monitor") is False:
        raise UserError("--auto-fix does what the monitor advises; leave out one of them")
    if given.get("gradient_penalty") and resume is None and given.get("d_norm", "batch") == "batch":
        raise UserError(
            "--gradient-penalty is of single images, which batch norm mixes; add --d-norm none or "
            "spectral"
        )
    if "noise_steps" in given and resume is None and not given.get("noise"):
        raise UserError("--noise-steps says when --noise ends; give --noise too")
    if dry_run:
        if resume is not None:
            raise UserError("--dry-run tries out a new run; leave it out, or leave out --resume")
        given.pop("epochs", None)
        given["steps"] = 1
    return Request(_source(given), outf, resume, overwrite)


def stored_config(path: Path, stored: dict[str, Any]) -> Config:
    names = {field.name for field in fields(Config)}
    config = stored["config"]
    if config.keys() != names:
        raise UserError(
            f"{path / CONFIG} was written by another version of pygan; continue the run with that "
            "version, or start a new one"
        )
    return _checked(path, config)


def _checked(path: Path, config: dict[str, Any]) -> Config:
    """A stored configuration, whose every value a flag could have given.

    Raises:
        UserError: one could not.
    """
    kinds = get_type_hints(Config)
    # JSON knows no tuples.
    held: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }
    said = []
    for name, value in held.items():
        kind = kinds[name]
        if get_origin(kind) is tuple:
            fits = isinstance(value, tuple) and all(isinstance(word, str) for word in value)
        else:
            fits = isinstance(value, kind)
        if not (fits or (isinstance(value, int) and isinstance(0.0, kind))):
            raise damaged_config(path)
        if type(value) is bool:
            said += [_flag(name)] if value else []
        # As many threads may not be here.
        elif value not in (None, ()) and name not in ("threads", "data"):
            said.append(f"{_flag(name)}={','.join(value) if isinstance(value, tuple) else value}")
    try:
        _parser().parse_args(said)
    except UserError as error:
        raise UserError(f"{damaged_config(path)} ({error})") from None
    return Config(**held)


def _flag(name: str) -> str:
    return "--" + (name if name.startswith("net") else name.replace("_", "-"))


def flag_text(name: str, value: Any) -> str:
    flag = _flag(name)
    if isinstance(value, bool) or value is None:
        return flag if value else f"no {flag}"
    if isinstance(value, (list, tuple)):
        return f"{flag} {','.join(map(str, value))}" if value else f"no {flag}"
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
        f"{flag_text(name, value)} (the run has {flag_text(name, getattr(config, name))})"
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


def fixed(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
