"""Where a run is: one typed status, the same from a coordinator actor, a run in this process and ``status.json``."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raylora import control
from raylora.progress import Activity, BlockDone, Progress

_NEWS = 200
"""How many pieces of news a status holds."""


@dataclass(frozen=True)
class JobStatus:
    """One job of a run: whom it trains, or which rows it makes targets of or answers."""

    units: list[str]
    status: control.JobState
    attempt: int
    failures: int
    progress: Progress | None = None
    """The latest report of the attempt that is running or has ended."""
    later: bool = False
    """Whether it begins when all others have ended: such jobs have a pace of their own."""

    @property
    def share_done(self) -> float:
        """How much of the job is done, from 0 to 1; what follows training counts as nothing."""
        if not self.status.open:
            return 1.0
        progress = self.progress
        if progress is None:
            return 0.0
        return 1.0 if progress.activity is Activity.EVALUATING else progress.done / max(1, progress.total)

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "progress": vars(self.progress) if self.progress is not None else None}

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
    """An estimate of how long all jobs will still take, evaluation included; None before it is known."""
    news: list[str] = field(default_factory=list)
    """The latest of what happened: validation at epoch ends, members that stopped early or failed."""
    news_count: int = 0
    """How much happened so far, for those who have seen some of it."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Worker -> the machines that it is on, of those that have a place."""

    @property
    def share_done(self) -> float:
        """How much of all jobs' steps or rows is done, from 0 to 1."""
        if self.phase.terminal:
            return 1.0
        shares = [job.share_done for job in self.jobs.values()]
        return sum(shares) / len(shares) if shares else 0.0

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        # Not asdict, which copies every string's container of every job: it is written while workers wait.
        preparation = vars(self.preparation) if self.preparation is not None else None
        jobs = {name: job.record() for name, job in self.jobs.items()}
        return {**vars(self), "preparation": preparation, "jobs": jobs}

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
        self.nodes: Mapping[str, str] = {}
        self._progress: dict[str, Progress] = {}
        self._main: dict[str, Progress] = {}
        self._news: deque[str] = deque(maxlen=_NEWS)
        self._news_count = 0
        self._state: control.State | None = None
        self._jobs: dict[str, JobStatus] = {}
        """As they were in that state, with the reports since."""
        self._lock = threading.Lock()  # a coordinator takes reports in one thread and answers in another

    def report(self, job: str, progress: Progress) -> None:
        """Take a worker's report; the latest per job is kept, and of its main part, by which others are estimated."""
        with self._lock:
            self._progress[job] = progress
            if progress.activity is not Activity.EVALUATING and progress.new:
                self._main[job] = progress
            self._news.extend(progress.news)
            self._news_count += len(progress.news)
            if job in self._jobs:
                self._jobs[job] = replace(self._jobs[job], progress=progress)

    def tell(self, text: str) -> None:
        """Take a piece of news that is no job's."""
        with self._lock:
            self._news.append(text)
            self._news_count += 1

    def status(self, state: control.State) -> RunStatus:
        """Return where the run is."""
        with self._lock:
            if state is not self._state:  # between two events only reports change anything
                self._state = state
                self._jobs = {
                    name: JobStatus(
                        list(job.units), job.status, job.attempt, job.failures, self._progress.get(name), job.later
                    )
                    for name, job in state.jobs.items()
                }
            jobs, main = dict(self._jobs), dict(self._main)
            news, news_count = list(self._news), self._news_count
        return RunStatus(
            self.run, state.phase, state.reason, self.started_at, time.time(), dict(state.workers.items()),
            self.preparation, jobs, dict(state.failed_units), _eta_s(jobs, main, state.workers), news, news_count,
            dict(self.nodes),
        )


def _job_of(record: Mapping[str, Any]) -> JobStatus:
    progress = record["progress"]
    if progress is not None:
        progress = {**progress, "activity": Activity(progress["activity"]), "news": tuple(progress.get("news", ()))}
        progress = Progress(**progress)
    return JobStatus(**{**record, "status": control.JobState(record["status"]), "progress": progress})


def _eta_s(
    jobs: Mapping[str, JobStatus], main: Mapping[str, Progress], workers: Mapping[str, control.WorkerState]
) -> float | None:
    """Estimate what is left of all jobs, at the pace that was seen in their main part, over the busy workers.

    Of jobs that begin when all others have ended nothing is known before.
    """
    left_s, known = 0.0, False
    for later in (False, True):
        alike = {name: job for name, job in jobs.items() if job.later is later}
        seen = [progress for name, progress in main.items() if name in alike]
        if not seen:
            continue
        known = True
        pace_s = sum(p.seconds for p in seen) / sum(p.new for p in seen)
        total, after_s = max(p.total for p in seen), sum(p.after_s for p in seen) / len(seen)
        left_s += sum(_left_s(job, total, pace_s, after_s) for job in alike.values() if job.status.open)
    return left_s / max(1, sum(state is control.WorkerState.BUSY for state in workers.values())) if known else None


def _left_s(job: JobStatus, total: int, pace_s: float, after_s: float) -> float:
    """Return how long a job will still take; one that has not begun, as long as the longest of them."""
    if job.progress is None:
        return total * pace_s + after_s
    if job.progress.activity is Activity.EVALUATING:
        return job.left_s or 0.0
    return (job.progress.total - job.progress.done) * pace_s + job.progress.after_s
