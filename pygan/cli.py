"""Command lines: argument types, and the one place where an error becomes a sentence.

Exit statuses: 0 done, 1 the work failed (disk full, diverged, out of memory), 2 a mistake of the
user's, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from pygan.errors import UserError

INT_MAX = 2**31 - 1
SEED_MAX = 2**63 - 1


class Failure(RuntimeError):
    """Work that cannot go on through no mistake in the input. Commands exit with status 1."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are `UserError` sentences.

    Flags are never abbreviated, because `--data` and `--dataset` mean different things; their
    dashes may be typed as underscores.
    """

    def __init__(self, **keywords: object) -> None:
        super().__init__(allow_abbrev=False, **keywords)  # type: ignore[arg-type]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the parent's, with underscores accepted for the dashes inside a flag."""
        words = list(sys.argv[1:] if args is None else args)
        known = {flag for action in self._actions for flag in action.option_strings}
        for position, word in enumerate(words):
            flag, equals, value = word.partition("=")
            dashed = flag.replace("_", "-")
            if flag not in known and dashed in known:
                words[position] = f"{dashed}{equals}{value}"
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            raise UserError(self._unknown(unknown[1].split()))
        # "argument --nz/--latent_dim: ..." names every spelling; the first one is enough.
        message = re.sub(r"^argument ([^\s/:,]+)[^:]*: ", r"\1: ", message)
        raise UserError(f"{message}; {self.prog} --help lists what is accepted")

    def _unknown(self, words: list[str]) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings]
        word = next((w for w in words if w.startswith("-")), words[0]).split("=")[0]
        near = difflib.get_close_matches(word, flags, n=1)
        advice = f"did you mean {near[0]}" if near else f"{self.prog} --help lists the flags"
        return f"{word} is not a flag of {self.prog}; {advice}"


def _number(text: str, kind: Callable[[str], float], name: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; give {name}") from None


def whole_number(low: int, high: int = INT_MAX) -> Callable[[str], int]:
    """An argparse type: an int from `low` to `high`."""
    name = f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        value = int(_number(text, int, name))
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {name}")
        return value

    return parse


def real_number(
    low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = True
) -> Callable[[str], float]:
    """An argparse type: a finite float from `low` to `high`, the ends excluded where open."""
    above = f"{'above' if open_low else 'of at least'} {low:g}"
    below = f" and {'below' if open_high else 'at most'} {high:g}" if high < math.inf else ""
    name = f"a finite number {above}{below}"

    def parse(text: str) -> float:
        value = _number(text, float, name)
        low_ok = value > low if open_low else value >= low
        high_ok = value < high if open_high else value <= high
        if not (math.isfinite(value) and low_ok and high_ok):
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {name}")
        return value

    return parse


def image_size(text: str) -> int:
    """An argparse type: the sizes the networks are defined for, in pixels."""
    sizes = (16, 32, 64, 128, 256)
    value = _number(text, int, "16, 32, 64, 128 or 256")
    if value not in sizes:
        raise argparse.ArgumentTypeError(
            f"{text} is not a power of two from 16 to 256; give 16, 32, 64, 128 or 256"
        )
    return int(value)


def thread_count(text: str) -> int:
    """An argparse type: CPU threads, as many as the machine has at most."""
    return whole_number(1, os.cpu_count() or 1)(text)


def device(name: str) -> torch.device:
    """`auto` (an NVIDIA GPU where there is one), `cpu` or `cuda`, as a torch.device.

    Raises:
        UserError: a device asked for by name that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda was asked for, but torch sees no NVIDIA GPU here; "
            "use --device cpu, or install a CUDA build of torch"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def run(prog: str, body: Callable[[], int]) -> int:
    """Runs a command and returns its exit status; mistakes and failures become one sentence."""
    try:
        return body()
    except UserError as error:
        return say(prog, str(error), 2)
    except Failure as error:
        return say(prog, str(error), 1)
    except KeyboardInterrupt:
        return say(prog, "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        return say(prog, f"out of memory ({reason}); lower --batch-size or the network widths", 1)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        reason = "torch could not take what it needs"
        return say(prog, f"out of memory ({reason}); lower --batch-size or the network widths", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return say(prog, f"{where}{error.strerror or error}", 1)


def say(prog: str, message: str, status: int) -> int:
    """Prints an error as one sentence, and returns the exit status."""
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status
