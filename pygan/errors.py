"""Errors that a user can correct."""


class UserError(ValueError):
    """A wrong input. Its message is one sentence: what was given, what is accepted, what to do.

    Commands print the sentence and exit with status 2; library calls raise it like any ValueError.
    """
