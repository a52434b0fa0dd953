"""What the commands that measure have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pygan import cli
from pygan.run_folder import replace_file


def write(path: Path, result: dict[str, Any]) -> None:
    """Puts the figures of a command into a JSON file."""
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())


def run(
    parser: cli.Parser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], Iterator[str]],
    arguments: Sequence[str] | None,
) -> int:
    """Measures, prints the report, writes ``--json`` where asked; the exit status."""

    def body() -> int:
        options = parser.parse_args(arguments)
        result = measure(options)
        for line in report(result):
            print(line)
        if options.json:
            write(options.json, result)
        return 0

    return cli.run(parser.prog, body)
