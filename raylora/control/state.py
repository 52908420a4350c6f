"""Where a run stands. A state is never changed: what changes one returns another, in O(log n).

Nothing scans all jobs or workers but what asks for all of them: who is next stands in queues, how many there are in
counts, and :meth:`State.with_job` and :meth:`State.with_worker` keep both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from raylora.control.persistent import IntSet, PersistentMap


class Phase(str, Enum):
    """Where a run stands; the last four are terminal."""

    PENDING = "pending"
    PREPARING = "preparing"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    SUCCEEDED = "succeeded"
    DEGRADED = "degraded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def terminal(self) -> bool:
        """Whether nothing more will happen without a resume."""
        return self in (Phase.SUCCEEDED, Phase.DEGRADED, Phase.FAILED, Phase.INTERRUPTED)


class JobState(str, Enum):
    """Where a job stands."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def open(self) -> bool:
        """Whether the job still has to end."""
        return self in (JobState.PENDING, JobState.RUNNING)


class WorkerState(str, Enum):
    """Where a worker stands; one that waits is started when the base is prepared, or with the later jobs."""

    WAITING = "waiting"
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    LOST = "lost"
    RELEASED = "released"

    @property
    def in_service(self) -> bool:
        """Whether it works, or has been told to."""
        return self not in (WorkerState.WAITING, WorkerState.LOST, WorkerState.RELEASED)


@dataclass(frozen=True)
class Job:
    """A pack of units and how far it is."""

    units: tuple[str, ...]
    status: JobState = JobState.PENDING
    attempt: int = 0
    failures: int = 0
    worker: str = ""
    cost: float = 0.0
    """How long it is expected to take, in any unit."""
    may_split: bool = False
    """Whether it may be cut into smaller packs before it has begun."""
    later: bool = False
    """Whether it begins when all others have ended."""

    @property
    def can_split(self) -> bool:
        """Whether it may be cut now."""
        return self.may_split and self.attempt == 0 and self.status is JobState.PENDING and len(self.units) > 1


@dataclass(frozen=True)
class Order:
    """Who comes before whom. It changes when a run starts or jobs are split, and all other states share it."""

    jobs: tuple[str, ...] = ()
    """By rank: the longest first, equal ones in the order in which the run names them."""
    rank_of: Mapping[str, int] = field(default_factory=dict)
    workers: tuple[str, ...] = ()
    place_of: Mapping[str, int] = field(default_factory=dict)
    """Worker -> its place among the workers."""
    required: frozenset[str] = frozenset()
    largest: int = 0
    """Units of the largest job that can be split."""

    @classmethod
    def of(cls, jobs: Mapping[str, Job], workers: Sequence[str], required: Sequence[str]) -> Order:
        """Return the order of jobs and workers."""
        by_rank = tuple(sorted(jobs, key=lambda name: -jobs[name].cost))
        largest = max((len(job.units) for job in jobs.values() if job.can_split), default=0)
        return cls(by_rank, _places(by_rank), tuple(workers), _places(workers), frozenset(required), largest)


@dataclass(frozen=True)
class State:
    """Everything the coordinator knows; rebuilt from the event log at any time."""

    phase: Phase = Phase.PENDING
    jobs: PersistentMap[Job] = field(default_factory=PersistentMap)
    workers: PersistentMap[WorkerState] = field(default_factory=PersistentMap)
    required: tuple[str, ...] = ()
    min_members: int = 1
    max_failures: int = 0
    release_idle: bool = False
    later_workers: frozenset[str] = frozenset()
    """Who is started with the later jobs, or when nobody else is left."""
    failed_units: PersistentMap[str] = field(default_factory=PersistentMap)
    worker_failures: PersistentMap[int] = field(default_factory=PersistentMap)
    """How often a worker died without a job; deaths with a job count against the job."""
    signal_number: int = 0
    reason: str = ""
    later_begun: bool = False
    """Whether all others have ended, and the later jobs may begin."""
    # What follows from the above, kept so that nothing has to be looked for.
    order: Order = field(default_factory=Order, repr=False)
    pending: IntSet = IntSet()
    """Jobs that wait for a worker, by rank."""
    held: int = 0
    """How many jobs wait for all others to end."""
    can_split: IntSet = IntSet()
    """Those of them that can be split."""
    pending_units: int = 0
    """How many units the jobs that wait have."""
    idle: IntSet = IntSet()
    """Workers that wait, by place."""
    at_work: PersistentMap[str] = field(default_factory=PersistentMap)
    """Worker -> the job that it runs."""
    in_service: int = 0
    """How many workers have been started and are neither lost nor released."""
    possible: int = 0
    """How many required units have not failed."""

    @classmethod
    def starting(
        cls, phase: Phase, jobs: Mapping[str, Job], workers: Mapping[str, WorkerState], required: Sequence[str],
        min_members: int, max_failures: int,
    ) -> State:
        """Return the state that a run begins with; no job runs, no worker is idle, nothing has failed."""
        state = cls(
            phase, PersistentMap(), PersistentMap(workers), tuple(required), min_members, max_failures,
            in_service=sum(worker.in_service for worker in workers.values()), possible=len(required),
        )
        return state.with_jobs(jobs)

    # --- what is asked of it ------------------------------------------------------------------------
    def finished_units(self) -> tuple[str, ...]:
        """Units whose results are committed, in job order."""
        done = (u for job in self.jobs.values() if job.status is JobState.FINISHED for u in job.units)
        return tuple(u for u in done if u not in self.failed_units)

    @property
    def has_open_jobs(self) -> bool:
        """Whether a job still has to end, those apart that wait for all others."""
        return bool(self.pending or self.at_work)

    def next_job(self) -> str:
        """Return the pending job that goes first. Raises: ValueError if there is none."""
        return self.order.jobs[self.pending.smallest()]

    def next_worker(self) -> str:
        """Return the first idle worker. Raises: ValueError if there is none."""
        return self.order.workers[self.idle.smallest()]

    # --- what it becomes ----------------------------------------------------------------------------
    def with_job(self, name: str, job: Job) -> State:
        """Return the state in which a job of the run stands as given."""
        before, rank = self.jobs[name], self.order.rank_of[name]
        at_work = self.at_work.remove(before.worker) if before.status is JobState.RUNNING else self.at_work
        if job.status is JobState.RUNNING:
            at_work = at_work.set(job.worker, name)
        waits = self._waits(job)
        more = waits - self._waits(before)
        return replace(
            self,
            jobs=self.jobs.set(name, job),
            pending=self.pending.add(rank) if waits else self.pending.discard(rank),
            can_split=self.can_split if job.can_split else self.can_split.discard(rank),
            pending_units=self.pending_units + more * len(job.units),
            at_work=at_work,
        )

    def with_jobs(self, jobs: Mapping[str, Job]) -> State:
        """Return the state with other jobs, of which those that run are the same; O(n log n)."""
        order = Order.of(jobs, list(self.workers), self.required)
        by_rank = [jobs[name] for name in order.jobs]
        waiting = [self._waits(job) for job in by_rank]
        pending = sum(job.status is JobState.PENDING for job in by_rank)
        return replace(
            self,
            jobs=PersistentMap(jobs),
            order=order,
            pending=IntSet.where(waiting),
            held=pending - sum(waiting),
            can_split=IntSet.where([job.can_split for job in by_rank]),
            pending_units=sum(len(job.units) for job, waits in zip(by_rank, waiting, strict=True) if waits),
        )

    def with_later(self) -> State:
        """Return the state in which the later jobs wait for a worker, too; O(n log n)."""
        return replace(self, later_begun=True).with_jobs(dict(self.jobs.items()))

    def _waits(self, job: Job) -> bool:
        """Return whether a job waits for a worker and for nothing else."""
        return job.status is JobState.PENDING and (self.later_begun or not job.later)

    def with_worker(self, name: str, worker: WorkerState) -> State:
        """Return the state in which a worker of the run stands as given."""
        place = self.order.place_of[name]
        more = worker.in_service - self.workers[name].in_service
        return replace(
            self,
            workers=self.workers.set(name, worker),
            idle=self.idle.add(place) if worker is WorkerState.IDLE else self.idle.discard(place),
            in_service=self.in_service + more,
        )

    def with_failed(self, reasons: Mapping[str, str]) -> State:
        """Return the state in which units have failed, with the reasons."""
        failed, possible = self.failed_units, self.possible
        for unit, reason in reasons.items():
            possible -= unit in self.order.required and unit not in failed
            failed = failed.set(unit, reason)
        return replace(self, failed_units=failed, possible=possible) if reasons else self


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}
