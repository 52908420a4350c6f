"""Where a run is: one typed status, the same from a coordinator actor, a run in this process and ``status.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raylora import control
from raylora.progress import Activity, BlockDone, Progress


@dataclass(frozen=True)
class JobStatus:
    """One job of a run: whom it trains, or which rows it makes targets of."""

    units: list[str]
    status: control.JobState
    attempt: int
    failures: int
    progress: Progress | None = None
    """The latest report of the attempt that is running or has ended."""

    @property
    def left_s(self) -> float | None:
        """An estimate of how long what the job is at will still take; None if nothing is known."""
        progress = self.progress
        if progress is None or not progress.new:
            return None
        return (progress.total - progress.done) * progress.seconds / progress.new


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run while it goes on, and when it has ended."""

    run: str
    phase: control.Phase
    reason: str
    started_at: float
    updated_at: float
    workers: dict[str, control.WorkerState] = field(default_factory=dict)
    preparation: BlockDone | None = None
    jobs: dict[str, JobStatus] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Members that are given up, with the reason."""
    eta_s: float | None = None
    """An estimate of how long training, or the making of targets, will still take; None before it is known."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RunStatus:
        """Return the status that a record was made of."""
        preparation = record["preparation"]
        return cls(**{
            **record,
            "phase": control.Phase(record["phase"]),
            "workers": {name: control.WorkerState(state) for name, state in record["workers"].items()},
            "preparation": BlockDone(**preparation) if preparation else None,
            "jobs": {name: _job_of(job) for name, job in record["jobs"].items()},
        })


OnStatus = Callable[[RunStatus], None]


class StatusBoard:
    """Puts a run's state and its workers' latest reports together."""

    def __init__(self, run: str) -> None:
        self.run, self.started_at = run, time.time()
        self.preparation: BlockDone | None = None
        self._progress: dict[str, Progress] = {}

    def report(self, job: str, progress: Progress) -> None:
        """Take a worker's report; the latest per job is kept."""
        self._progress[job] = progress

    def status(self, state: control.State) -> RunStatus:
        """Return where the run is."""
        jobs = {
            name: JobStatus(list(job.units), job.status, job.attempt, job.failures, self._progress.get(name))
            for name, job in state.jobs.items()
        }
        return RunStatus(
            self.run, state.phase, state.reason, self.started_at, time.time(), dict(state.workers),
            self.preparation, jobs, dict(state.failed_units), _eta_s(jobs, state.workers),
        )


def _job_of(record: Mapping[str, Any]) -> JobStatus:
    progress = record["progress"]
    if progress is not None:
        progress = Progress(**{**progress, "activity": Activity(progress["activity"])})
    return JobStatus(**{**record, "status": control.JobState(record["status"]), "progress": progress})


def _eta_s(jobs: Mapping[str, JobStatus], workers: Mapping[str, control.WorkerState]) -> float | None:
    """Estimate what is left of the jobs' main part: what is still to do, at the pace seen, over the busy workers."""
    seen = [
        job.progress for job in jobs.values()
        if job.progress is not None and job.progress.new and job.progress.activity is not Activity.EVALUATING
    ]
    if not seen:
        return None
    pace_s = sum(p.seconds for p in seen) / sum(p.new for p in seen)
    total = max(p.total for p in seen)
    left = sum(_left(job, total) for job in jobs.values() if job.status.open)
    return left * pace_s / max(1, sum(state is control.WorkerState.BUSY for state in workers.values()))


def _left(job: JobStatus, total: int) -> int:
    """Return what a job that has not ended still has to do, if it has not begun as much as the longest of them."""
    if job.progress is None:
        return total
    return 0 if job.progress.activity is Activity.EVALUATING else job.progress.total - job.progress.done
