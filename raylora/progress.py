"""The progress that long work reports: it goes from the worker to the client that waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

_REPORT_EVERY_S = 0.5


class Activity(str, Enum):
    """What a job is at; training counts steps, the others count rows."""

    TRAINING = "training"
    EVALUATING = "evaluating"
    MAKING_TARGETS = "making targets"
    ANSWERING = "answering"


@dataclass(frozen=True)
class Progress:
    """How far a job is, and what its latest step or batch of rows was."""

    activity: Activity
    done: int
    """Steps taken, or rows predicted, of all that this activity has."""
    total: int
    new: int
    """How many of them are new since the last report."""
    seconds: float
    """How long the new ones took."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """The latest step's loss by member."""
    tokens: int = 0
    """That the new steps trained on, or that stand in the new answers."""
    news: tuple[str, ...] = ()
    """What happened that one wants to have read: an epoch's validation, a member that stopped."""
    after_s: float = 0.0
    """An estimate of how long the job will take after this activity."""
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """The norm of the latest step's gradient by member."""
    validations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What an epoch that ended with this step scores in validation: member -> metric -> value."""


OnProgress = Callable[[Progress], None]

Leaving = Callable[[], Collection[str]]
"""Asked at an epoch's end, once it is reported: which members are to train no further, by name."""


def nobody() -> Collection[str]:
    """Let every member train on."""
    return ()


Span = Callable[[str], AbstractContextManager[Any]]
"""Marks the time that something takes, such as a step, on a timeline that somebody looks at."""


def unmarked(what: str) -> AbstractContextManager[None]:
    """Mark nothing."""
    return nullcontext()


@dataclass(frozen=True)
class BlockDone:
    """How far a base's preparation is."""

    block: int
    blocks: int
    block_s: float
    eta_s: float
    error: float | None
    """What is left of the block's outputs' norm as error, averaged over its layers; None without calibration."""


OnBlock = Callable[[BlockDone], None]


class RowCounter:
    """Turns "this set has come so far" into progress over all rows of several sets."""

    def __init__(self, activity: Activity, total: int, report: OnProgress) -> None:
        self._activity, self._total, self._report = activity, total, report
        self._before = self._done = 0
        self._last = time.perf_counter()
        self.seconds, self.tokens = 0.0, 0
        """Of all rows so far."""

    def __call__(self, done: int, of: int, tokens: int = 0) -> None:
        """Take it that ``done`` of the current set's rows are predicted; the last call of a set has ``done == of``.

        Args:
            tokens: how many were written since the last call.
        """
        now = time.perf_counter()
        new, seconds = self._before + done - self._done, now - self._last
        self._done += new
        self.seconds += seconds
        self.tokens += tokens
        self._report(Progress(self._activity, self._done, self._total, new, seconds, tokens=tokens))
        self._last = now
        if done == of:
            self._before = self._done


class Throttle:
    """Adds up reports and lets one through at most twice a second; news and the last of an activity always pass."""

    def __init__(self) -> None:
        self._sent_at = 0.0
        self._activity: Activity | None = None
        self._new, self._seconds, self._tokens = 0, 0.0, 0

    def merged(self, progress: Progress) -> Progress | None:
        """Return what happened since the last report that passed, or None if that was just now."""
        if progress.activity is not self._activity:
            self._activity, self._sent_at = progress.activity, 0.0
            self._new, self._seconds, self._tokens = 0, 0.0, 0
        self._new += progress.new
        self._seconds += progress.seconds
        self._tokens += progress.tokens
        now = time.monotonic()
        if now - self._sent_at < _REPORT_EVERY_S and progress.done < progress.total and not progress.news:
            return None
        merged = replace(progress, new=self._new, seconds=self._seconds, tokens=self._tokens)
        self._sent_at, self._new, self._seconds, self._tokens = now, 0, 0.0, 0
        return merged
