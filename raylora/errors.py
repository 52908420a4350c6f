"""One picklable tree of errors whose messages say what was wrong, where, and what to do.

The exit code is a property of the error, so that the command line, a Ray job and a script agree on it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence


class RayloraError(Exception):
    """Base of every error raised on purpose; ``hint`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both in args, so that the error survives pickling between actors
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class UsageError(RayloraError):
    """Bad input found before anything started: nothing ran and nothing was written."""

    exit_code = 2


class SpecError(UsageError):
    """The run's specification is not valid."""


class DataError(UsageError):
    """A data set is missing, empty, or does not fit the task."""


class BaseError(UsageError):
    """The base model cannot be found, loaded or adapted as asked."""


class PlacementError(UsageError):
    """The cluster cannot hold what the spec asks for."""


class StoreError(RayloraError):
    """The run directory is damaged or cannot be written."""


class LostRunError(StoreError):
    """Another process has taken the run directory over, so that this one may not write to it any more."""


class UnreachableError(UsageError):
    """The storage of runs cannot be used from here: no package, no bucket, no credentials, no connection."""


class RunDirectoryError(UsageError):
    """The run directory belongs to something else, or does not exist."""


class TrainingError(RayloraError):
    """A member could not be trained."""


class Interrupted(RayloraError):
    """A signal stopped the run; it can be resumed. 128 + the signal's number is the exit code."""

    def __init__(self, message: str, hint: str = "", signal_number: int = 2) -> None:
        super().__init__(message, hint)
        self.args = (message, hint, signal_number)
        self.exit_code = 128 + signal_number


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known word, or the list of known words."""
    names = sorted(known)
    near = nearest(word, names)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"known: {', '.join(names)}" if names else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that takes the fewest edits to reach, or None where nothing is alike.

    Case does not count, and a number is the number however many zeros stand before it: ``member-1`` is ``member-001``.
    """
    plain = _plain(word)
    alike = [
        name for name in sorted(known)
        if _plain(name) == plain or difflib.SequenceMatcher(None, word.casefold(), name.casefold()).ratio() >= 0.6
    ]
    typed = word.casefold()
    return min(alike, key=lambda name: (_plain(name) != plain, *_distance(typed, name.casefold())), default=None)


def _plain(word: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", word.casefold())


def _distance(one: str, other: str) -> tuple[int, int]:
    """Return the edits, and, fewest for the longest, how much of the beginning is the same: people slip at the end."""
    return _edits(one, other), -len(os.path.commonprefix([one, other]))


def _edits(one: str, other: str) -> int:
    """Return how many letters have to be put in, left out, replaced or swapped with their neighbor."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        earlier, before, row = before, row, [i + 1]
        for j, wanted in enumerate(other):
            swapped = i and j and letter == other[j - 1] and one[i - 1] == wanted
            row.append(min(
                before[j + 1] + 1, row[j] + 1, before[j] + (letter != wanted),
                earlier[j - 1] + 1 if swapped else len(one) + len(other),
            ))
    return row[-1]


def combine(errors: Sequence[str], what: str) -> str:
    """Join several findings into one message, one per line, so that a person fixes them in one go."""
    head = f"{what}: {len(errors)} problem{'s' if len(errors) != 1 else ''}"
    return "\n".join([head, *(f"  - {error}" for error in errors)])
