"""``python -m pygan.run script.py ARGS``: a training script as it is, with its networks fused.

The script is ``__main__``, with the arguments, the path, the exit status and the traceback that
python gives it. What was fused is printed on standard error when it ends.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from pygan import cli, first_call
from pygan.errors import UserError

PROG = "python -m pygan.run"


def _script(path: str) -> tuple[CodeType, ModuleType]:
    """The code of a file, and the module it runs in."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the script in it that is to run")
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); give a Python script"
        ) from None
    whole = os.path.join(os.getcwd(), path.removeprefix("./"))
    main = ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", whole)
    vars(main).update(__file__=whole, __cached__=None, __loader__=loader)
    sys.argv[0] = path
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    return compile(source, whole, "exec", dont_inherit=True), main


def _module(name: str) -> tuple[CodeType, ModuleType]:
    """The code of ``-m name``, and the module it runs in."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd()
    spec = _spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _spec(f"{name}.__main__")
    code = getattr(spec.loader, "get_code", lambda _: None)(spec.name) if spec else None
    if spec is None or code is None:
        raise UserError(f"there is no module {name} that can run; give one that python -m finds")
    main = ModuleType("__main__")
    vars(main).update(
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )
    sys.argv[0] = spec.origin or name
    return code, main


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise
    except ValueError:
        return None


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words for this command, and those for the script, its name first."""
    for at, word in enumerate(words):
        if word == "-m":
            return words[: at + 2], words[at + 1 :]
        if not word.startswith("-") or word == "-":
            return words[: at + 1], words[at:]
    return words, []


def _parse(words: list[str]) -> tuple[bool, str, str | None]:
    """Whether to be quiet, the script, and the module."""
    parser = cli.Parser(
        prog=PROG,
        usage=f"{PROG} [--quiet] (script.py | -m MODULE) ...",
        description="Runs a training script as it is, with its networks fused at their first "
        "call, and prints on standard error what was fused. All words behind the script's name "
        "are its own.",
    )
    parser.add_argument("--quiet", action="store_true", help="print no report")
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python -m")
    parser.add_argument("script", nargs="?", help="the script")
    options = parser.parse_args(words)
    if options.script is None and options.module is None:
        raise UserError(f"no script was given; {PROG} script.py ... runs one")
    return options.quiet, options.script, options.module


def _print_report(process: int) -> None:
    # A script may have put a file in the place of sys.stderr.
    if sys.__stderr__ is None or os.getpid() != process:
        return
    # It may be closed, by the script or by its reader.
    with contextlib.suppress(OSError, ValueError):
        print(f"{PROG}: what was fused\n{first_call.report()}", file=sys.__stderr__, flush=True)


def _shown(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this command."""
    found = []
    while traceback is not None:
        found.append(traceback)
        if traceback.tb_frame.f_code.co_filename == __file__:
            found.clear()
        traceback = traceback.tb_next
    shown = None
    for each in reversed(found):
        if each.tb_frame.f_code.co_filename != first_call.__file__:
            shown = TracebackType(shown, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return shown


def _execute(code: CodeType, main: ModuleType) -> None:
    sys.modules["__main__"] = main
    vars(main)["__builtins__"] = builtins
    exec(code, vars(main))


def _say_plainly(error: BaseException) -> NoReturn:
    """Raises what a script has raised, to be shown as python shows it."""
    show = sys.excepthook

    def shown(kind: Any, error: Any, traceback: Any) -> None:
        chain: BaseException | None = error
        while chain is not None:
            chain.__traceback__ = _shown(chain.__traceback__)
            chain = chain.__cause__ or chain.__context__
        show(kind, error, error.__traceback__)

    sys.excepthook = shown
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script, and returns 0 where it comes to its end."""
    words, theirs = _split(list(sys.argv[1:] if argv is None else argv))
    try:
        quiet, path, name = _parse(words)
        sys.argv[:] = theirs
        code, module = _script(path) if name is None else _module(name)
    except UserError as error:
        return cli.say(PROG, str(error), 2)
    except Exception as error:
        _say_plainly(error)  # of a script that is no Python, or of a module's package
    first_call.install()
    if not quiet:
        atexit.register(_print_report, os.getpid())
    try:
        _execute(code, module)
    except SystemExit:
        raise
    except BaseException as error:
        _say_plainly(error)
    return 0


if __name__ == "__main__":
    # What is defined in here must not be part of the script's __main__.
    from pygan.run import main as _main

    sys.exit(_main())
