"""What can happen in a run, and how it is written to the log.

An event names the job and the attempt it speaks of, so a stale report changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunStarted:
    """A driver began the run, or took it up again after it was interrupted or lost."""

    jobs: dict[str, list[str]]
    """Job -> its units (members and baselines), trained together in one pack."""
    workers: list[str]
    required: list[str]
    """Units that the ensemble is made of; the others are baselines."""
    min_members: int
    max_failures: int
    prepare_base: bool = False
    """The base is quantized on calibration text first, before any worker starts."""
    reopened: list[str] = field(default_factory=list)
    """Units that were finished and are to be done again: they are damaged, or the run has grown."""
    changes: list[str] = field(default_factory=list)
    """``key: old -> new`` of a run that grows, for whoever reads the log."""
    costs: dict[str, float] = field(default_factory=dict)
    """Job -> how long it is expected to take, in any unit: the longest goes first, equal ones in the order of jobs."""
    may_split: list[str] = field(default_factory=list)
    """Jobs that may be cut into smaller packs if they are among the last and have not begun."""
    later: list[str] = field(default_factory=list)
    """Jobs that begin when all others have ended, and with enough members."""
    later_workers: list[str] = field(default_factory=list)
    """Those of the workers for whom only later jobs are left: they are started with these."""
    release_idle: bool = False
    """Workers for whom nothing is left are let go before the last jobs end, and their machines with them."""


@dataclass(frozen=True)
class BasePrepared:
    """The base is quantized and committed."""


@dataclass(frozen=True)
class BaseFailed:
    """The base could not be prepared."""

    reason: str


@dataclass(frozen=True)
class PreparationInterrupted:
    """Preparing the base stopped because it was asked to; the blocks so far are committed."""


@dataclass(frozen=True)
class WorkerReady:
    """A worker has loaded the base and waits for a job."""

    worker: str


@dataclass(frozen=True)
class WorkerLost:
    """A worker died or could not start."""

    worker: str
    reason: str
    by_machine: bool = False
    """Its process or its node went; it did not fail by itself, and may be started again even if it never was ready."""


@dataclass(frozen=True)
class JobFinished:
    """A job's units are trained, evaluated and committed; those in ``failed`` are not."""

    job: str
    attempt: int
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobFailed:
    """A job stopped with an error; ``fatal`` ones would fail again the same way."""

    job: str
    attempt: int
    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class InterruptRequested:
    """A signal asked the run to stop after the current step."""

    signal_number: int


@dataclass(frozen=True)
class JobInterrupted:
    """A job committed its state and stopped because it was asked to."""

    job: str
    attempt: int


@dataclass(frozen=True)
class Aggregated:
    """Metrics and report are written."""


@dataclass(frozen=True)
class AggregationFailed:
    """Metrics or report could not be written."""

    reason: str


Event = (
    RunStarted | BasePrepared | BaseFailed | PreparationInterrupted | WorkerReady | WorkerLost
    | JobFinished | JobFailed | InterruptRequested | JobInterrupted | Aggregated | AggregationFailed
)
_EVENTS: dict[str, Any] = {c.__name__: c for c in Event.__args__}


def to_record(event: Event) -> dict[str, Any]:
    """Return an event as a JSON-able record."""
    return {"event": type(event).__name__, **asdict(event)}


def from_record(record: Mapping[str, Any]) -> Event:
    """Return the event of a record; unknown keys such as the time of writing are ignored."""
    event_class = _EVENTS[record["event"]]
    names = event_class.__dataclass_fields__
    return event_class(**{key: value for key, value in record.items() if key in names})
