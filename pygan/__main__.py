"""`python -m pygan`: what runs where on this machine, and why; and the door to the commands."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from pygan import cli
from pygan.errors import UserError

COMMANDS = {
    "train": "train a GAN (python -m pygan.train)",
    "sample": "draw samples from a trained generator (python -m pygan.sample)",
    "run": "run a training script as it is, its networks fused (python -m pygan.run)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or print the report; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(f"pygan.{arguments[0]}").main(arguments[1:])
    return cli.run("pygan", lambda: _report(arguments))


def _report(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        raise UserError(
            f"{arguments[0]!r} is not a command of pygan; give {' or '.join(COMMANDS)}, "
            "or no command for a report on this machine"
        )
    parser = cli.Parser(
        prog="pygan",
        usage="pygan [--json] | pygan {" + ",".join(COMMANDS) + "} ...",
        description="Reports the machine, the versions, and for each operation which "
        "implementation runs here and why the others do not.",
        epilog="; ".join(f"pygan {name}: {what}" for name, what in COMMANDS.items()),
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)

    from pygan import report

    found = report.collect()
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
