"""The folder of a run: one writer, and every file whole or absent.

A file is written under a temporary name beside its place, flushed to the disk, and renamed, so a
kill, a full disk or a power cut leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pygan.cli import Failure
from pygan.errors import UserError

CONFIG = "config.json"
LOG = "log.jsonl"
RESUME = "resume.safetensors"
PREVIOUS = "resume.previous.safetensors"
QUALITY = "quality.jsonl"
REPORT = "report.html"
# Larger numbers overflow where they are drawn.
_LARGEST = 1e300
_LOCK = ".lock"
_TEMPORARY = ".tmp"
# What a run writes, and so all that --overwrite removes.
_OURS = re.compile(
    r"config\.json|log\.jsonl|resume(\.previous)?\.safetensors|losses\.png|real_samples\.png|quality\.jsonl"
    r"|report\.html"
    r"|fake_samples_epoch_\d+\.png|net[GD]_epoch_\d+\.(pth|safetensors)"
    r"|events\.out\.tfevents\..*|\..*\.tmp"
)
_TEMPORARIES = re.compile(r"\..*\.tmp")
# What may be left of a run that was killed before its configuration was written; events come from
# any program.
_UNBORN = re.compile(
    r"log\.jsonl|resume(\.previous)?\.safetensors|real_samples\.png|events\..*|\..*\.tmp"
)


def full(error: OSError) -> bool:
    """Whether a write failed for want of room or a broken disk, and not by the user's choice."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def replace_file(path: Path, write: bytes | Callable[[BinaryIO], object]) -> None:
    """Puts a file in place in one move: temporary name, flush to disk, rename.

    Args:
        path: where it goes; its folder must exist.
        write: the content, or a function that writes it to an open binary file.

    Raises:
        OSError: nothing is left of the new file and `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(write) if isinstance(write, bytes) else write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _holds_run(path: Path) -> bool:
    """Whether a new run in this folder would replace something of an older one."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if _OURS.fullmatch(entry.name)}
    logged = LOG in names and (path / LOG).stat().st_size > 0
    return logged or not all(_UNBORN.fullmatch(name) for name in names)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Early check, before long work, that a new run could be written to `path`.

    Raises:
        UserError: it holds a run, or it cannot be a folder one can write to.
    """
    check_writable(path, "--outf")
    if not overwrite and _holds_run(path):
        raise UserError(
            f"{path} already holds a run; continue it with --resume {path}, replace it with "
            "--overwrite, or give another --outf"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, but a run needs a folder; give another --outf")


def check_writable(path: Path, flag: str) -> None:
    """Early check that `path`, which may not exist yet, can be created and written.

    Raises:
        UserError: it cannot; `flag` is what to change.
    """
    parent = path
    try:
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
    except OSError as error:  # a name that is too long
        raise UserError(
            f"{path} cannot be created ({error.strerror}); give another {flag}"
        ) from None
    if path != parent and not parent.is_dir():
        raise UserError(f"{path} cannot be created: {parent} is not a folder; give another {flag}")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable; give another {flag}, or its permissions")


class RunFolder:
    """A run's folder, locked by this process. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._log: BinaryIO | None = None

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> RunFolder:
        """A folder for a new run.

        Raises:
            UserError: it holds another run and `overwrite` is not set, another process is
                training in it, or it cannot be written.
        """
        check_new(path, overwrite=overwrite)
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder._acquire()
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); give another --outf"
            ) from None
        try:
            check_new(path, overwrite=overwrite)
            folder._clear(_OURS if overwrite else _TEMPORARIES)
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run to be continued.

        Raises:
            UserError: there is no run in it, or another process is training in it.
        """
        read_config(path)
        folder = cls(path)
        try:
            folder._acquire()
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}), so the run in it cannot go on; "
                "change its permissions or copy it"
            ) from None
        folder._clear(_TEMPORARIES)
        return folder

    def _acquire(self) -> None:
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise UserError(
                    f"another process is training in {self.path}; wait for it, stop it, or give "
                    "another --outf"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise

    def _clear(self, names: re.Pattern[str]) -> None:
        # The configuration goes first: without it the folder no longer claims to hold a run.
        found = [entry for entry in self.path.iterdir() if names.fullmatch(entry.name)]
        for entry in sorted(found, key=lambda entry: entry.name != CONFIG):
            if not entry.is_dir():
                entry.unlink()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up the lock."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, name: str, content: bytes | Callable[[BinaryIO], object]) -> None:
        """Replaces one file, whole or not at all.

        Raises:
            Failure: the disk refused; the old file is still there.
        """
        with self.failing(name):
            replace_file(self.path / name, content)

    def write_beside(self, name: str, content: bytes, kept: str) -> None:
        """Replaces one file, whole or not at all; what it was before goes on as ``kept``.

        Raises:
            Failure: the disk refused; the old file is still there.
        """
        with self.failing(kept), contextlib.suppress(FileNotFoundError):
            temporary = self.path / f".{kept}{_TEMPORARY}"
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.path / name, temporary)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                # A file system without links: for a moment the kept one is all there is.
                os.replace(self.path / name, temporary)
            os.replace(temporary, self.path / kept)
        self.write(name, content)

    @contextlib.contextmanager
    def failing(self, name: str) -> Iterator[None]:
        """Turns an OSError of a write into the sentence that says how to go on."""
        try:
            yield
        except OSError as error:
            kept = (
                f"the last checkpoint is kept: free some space, then go on with "
                f"python -m pygan.train --resume {self.path}"
                if (self.path / CONFIG).exists()
                else "free some space or give another --outf"
            )
            raise Failure(
                f"{self.path / name} cannot be saved ({error.strerror or error}); {kept}"
            ) from error

    def start_log(self, step: int) -> None:
        """Opens log.jsonl for appending, first cutting back what was logged after `step`."""
        path = self.path / LOG
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _logged_step(line) <= step]
            if len(kept) != len(lines):
                self.write(LOG, b"".join(kept))
        if self._log is not None:
            self._log.close()
        with self.failing(LOG):
            self._log = open(path, "ab", buffering=0)  # noqa: SIM115

    def log(self, row: Mapping[str, object]) -> None:
        """Appends one row to log.jsonl."""
        assert self._log is not None
        with self.failing(LOG):
            line = json.dumps(row).encode() + b"\n"
            if self._log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync_log(self) -> None:
        """Flushes log.jsonl to the disk, so that a checkpoint never is ahead of it."""
        assert self._log is not None
        with self.failing(LOG):
            os.fsync(self._log.fileno())

    def rows(self) -> list[dict[str, float]]:
        """Every row of log.jsonl."""
        with open(self.path / LOG, "rb") as file:
            return [json.loads(line) for line in file]


def has_numbers(row: Mapping[Any, Any], *names: Any) -> bool:
    """Whether a row has them all, as numbers that can be drawn."""
    found = [row.get(name) for name in names]
    return all(isinstance(value, (int, float)) and not abs(value) > _LARGEST for value in found)


def _logged_step(line: bytes) -> float:
    """The step of a log line; infinity for one that a kill tore."""
    if not line.endswith(b"\n"):
        return float("inf")
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if isinstance(step, (int, float)) else float("inf")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the run in `path`.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    name = path / CONFIG
    try:
        content = json.loads(name.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} holds no run to continue ({CONFIG} is missing); give the folder that "
            "--outf named, or start a new run without --resume"
        ) from None
    except OSError as error:
        raise UserError(
            f"{name} cannot be read ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, RecursionError):
        content = None
    parts = ("pygan", "config", "data")
    if not isinstance(content, dict) or any(type(content.get(part)) is not dict for part in parts):
        raise damaged_config(path)
    return content


def damaged_config(path: Path) -> UserError:
    """What is said of a config.json in the folder `path` that does not hold what it has to."""
    return UserError(
        f"{path / CONFIG} is damaged or was not written by pygan.train; restore it from a copy, or "
        "start a new run"
    )
