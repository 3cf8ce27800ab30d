"""Every error that is the user's to fix, as one tree.

    CompressError
    ├── RecipeError       a recipe or command line that cannot be obeyed           exit code 2
    ├── ModelError        a model that cannot be read, or is not understood        exit code 3
    │   └── NotMeasurable a question that this kind of model does not answer
    ├── DataError         text that is missing, too short, or not text             exit code 4
    ├── CheckpointError   an output that cannot be written, or fails its checks    exit code 5
    └── PluginError       a plug-in that does not import or breaks its contract    exit code 6

The command line prints the message on one line and leaves with the exit code; anything that is
not a CompressError is a defect of this library (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """Says what was wrong, where, and what to do."""

    exit_code = 1


class RecipeError(CompressError):
    """A recipe or command line that cannot be obeyed."""

    exit_code = 2


class ModelError(CompressError):
    """A model that cannot be read, or is not understood."""

    exit_code = 3


class NotMeasurable(ModelError):
    """A question that this kind of model does not answer: text for a vision model, say."""


class DataError(CompressError):
    """Text that is missing, too short, or not text."""

    exit_code = 4


class CheckpointError(CompressError):
    """An output that cannot be written, or fails its checks."""

    exit_code = 5


class PluginError(CompressError):
    """A plug-in that does not import or breaks its contract."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'bits'?"`` — or, with nothing close, the choices themselves."""
    choices = sorted(set(known))
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from {', '.join(choices)}" if choices else ""


def first_line(error: Exception, most: int = 160) -> str:
    """What an error says, in one line of ``most`` letters; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
