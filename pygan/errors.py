"""Errors that a user can correct."""

from __future__ import annotations

import unicodedata


class UserError(ValueError):
    """A wrong input. Its message is one sentence: what was given, what is accepted, what to do.

    Commands print the sentence and exit with status 2; library calls raise it like any ValueError.
    """


def printable(name: str) -> str:
    """With what breaks a line or stands for no character as an escape."""
    unseen = {c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    return name.translate({ord(c): c.encode("unicode_escape").decode() for c in unseen})
