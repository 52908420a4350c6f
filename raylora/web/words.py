"""What the page says of a run, in words: its events, one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SIGNALS = {2: "SIGINT", 15: "SIGTERM"}
_GOOD, _BAD, _PLAIN = "good", "bad", "plain"


def event_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event of the log as the page shows it: when, what, and whether that is good or bad.

    An event of a kind that this version does not know is shown by its name.
    """
    name = str(record.get("event", "event"))
    tell = _TELL.get(name)
    try:
        text, tone = tell(record) if tell is not None else (name, _PLAIN)
    except (KeyError, TypeError, AttributeError):
        text, tone = name, _PLAIN
    return {"at": record.get("at", 0.0), "text": text, "tone": tone}


def _started(record: Mapping[str, Any]) -> tuple[str, str]:
    workers, jobs = len(record["workers"]), len(record["jobs"])
    text = f"started: {_count(jobs, 'job')} on {_count(workers, 'worker')}"
    if record.get("reopened"):
        text += f"; again: {_listed(record['reopened'])}"
    if record.get("changes"):
        text += f"; changed: {'; '.join(record['changes'])}"
    return text, _PLAIN


def _finished(record: Mapping[str, Any]) -> tuple[str, str]:
    failed = record.get("failed") or {}
    if failed:
        reasons = "; ".join(f"{unit}: {reason}" for unit, reason in failed.items())
        return f"{record['job']} finished without {_count(len(failed), 'member')}: {reasons}", _BAD
    return f"{record['job']} finished", _GOOD


def _interrupt(record: Mapping[str, Any]) -> tuple[str, str]:
    number = record["signal_number"]
    return f"asked to stop by {_SIGNALS.get(number, f'signal {number}')}: jobs commit after their step", _PLAIN


_TELL = {
    "RunStarted": _started,
    "BasePrepared": lambda record: ("the base is prepared", _GOOD),
    "BaseFailed": lambda record: (f"the base could not be prepared: {record['reason']}", _BAD),
    "PreparationInterrupted": lambda record: ("preparing the base was interrupted; it can go on", _PLAIN),
    "WorkerReady": lambda record: (f"{record['worker']} is ready", _GOOD),
    "WorkerLost": lambda record: (f"{record['worker']} was lost: {record['reason']}", _BAD),
    "JobFinished": _finished,
    "JobFailed": lambda record: (f"{record['job']} failed: {record['reason']}", _BAD),
    "InterruptRequested": _interrupt,
    "JobInterrupted": lambda record: (f"{record['job']} committed its state and stopped", _PLAIN),
    "Aggregated": lambda record: ("metrics and report are written", _GOOD),
    "AggregationFailed": lambda record: (f"metrics could not be written: {record['reason']}", _BAD),
}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
