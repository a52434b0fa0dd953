"""Pages of results in Markdown, by the commands among the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def publish(title: str, about: str, table: Sequence[str], command: str, out: Path | None) -> None:
    """Prints a page, and writes it where ``out`` is given; ``table`` is its lines."""
    text = "\n".join([f"# {title}", "", about, "", *table, "", f"`{command}`", ""])
    print(text)
    if out:
        out.write_text(text)
