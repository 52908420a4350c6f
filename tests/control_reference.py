"""The state machine as it was first written: whole dicts are copied and scanned for every event.

Slow and plain: what :mod:`raylora.control` is held against. It gives jobs out in their order and splits none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raylora.control import (
    Aggregate,
    Aggregated,
    BaseFailed,
    BasePrepared,
    Command,
    Event,
    Finish,
    InterruptRequested,
    JobFailed,
    JobFinished,
    JobInterrupted,
    JobState,
    Phase,
    PreparationInterrupted,
    PrepareBase,
    RunJob,
    RunStarted,
    StartWorker,
    StopJobs,
    WorkerLost,
    WorkerReady,
    WorkerState,
)


@dataclass(frozen=True)
class Job:
    """A pack of units and how far it is."""

    units: tuple[str, ...]
    status: JobState = JobState.PENDING
    attempt: int = 0
    failures: int = 0
    worker: str = ""
    later: bool = False


@dataclass(frozen=True)
class State:
    """Everything the coordinator knows; rebuilt from the event log at any time."""

    phase: Phase = Phase.PENDING
    jobs: dict[str, Job] = field(default_factory=dict)
    workers: dict[str, WorkerState] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    min_members: int = 1
    max_failures: int = 0
    failed_units: dict[str, str] = field(default_factory=dict)
    worker_failures: dict[str, int] = field(default_factory=dict)
    """How often a worker died without a job; deaths with a job count against the job."""
    signal_number: int = 0
    reason: str = ""

    def finished_units(self) -> tuple[str, ...]:
        """Units whose results are committed, in job order."""
        done = (u for job in self.jobs.values() if job.status is JobState.FINISHED for u in job.units)
        return tuple(u for u in done if u not in self.failed_units)


def transition(state: State, event: Event) -> tuple[State, list[Command]]:
    """Fold one event into the state and say what to do about it."""
    if isinstance(event, RunStarted):
        return _start(state, event)
    if state.phase.terminal:
        return state, []
    if isinstance(event, BasePrepared | BaseFailed | PreparationInterrupted):
        return _end_preparation(state, event)
    if isinstance(event, WorkerReady):
        if state.workers.get(event.worker) is not WorkerState.STARTING:
            return state, []  # said twice, or by a worker that was given up
        return _assign(replace(state, workers={**state.workers, event.worker: WorkerState.IDLE}))
    if isinstance(event, WorkerLost):
        return _lose_worker(state, event)
    if isinstance(event, JobFinished | JobFailed | JobInterrupted):
        return _end_job(state, event)
    if isinstance(event, InterruptRequested):
        return _interrupt(state, event)
    if state.phase is not Phase.AGGREGATING:
        return state, []
    if isinstance(event, Aggregated):
        short = [u for u in state.required if u not in state.finished_units()]
        phase = Phase.DEGRADED if short else Phase.SUCCEEDED
        reason = f"{len(short)} of {len(state.required)} members failed: {', '.join(short)}" if short else ""
        return _finish(state, phase, reason)
    return _finish(state, Phase.FAILED, f"aggregation failed: {event.reason}")


def _start(state: State, event: RunStarted) -> tuple[State, list[Command]]:
    """Begin, or begin again: what is finished stays finished, all else is pending, failed units too."""
    jobs = {}
    for name, units in event.jobs.items():
        old = state.jobs.get(name)
        done = old is not None and old.status is JobState.FINISHED and old.units == tuple(units)
        done = done and not any(unit in state.failed_units or unit in event.reopened for unit in units)
        attempt = old.attempt if old else 0
        status = JobState.FINISHED if done else JobState.PENDING
        jobs[name] = Job(tuple(units), status, attempt, later=name in event.later)
    fresh = State(
        phase=Phase.TRAINING,
        jobs=jobs,
        workers={worker: WorkerState.STARTING for worker in event.workers},
        required=tuple(event.required),
        min_members=event.min_members,
        max_failures=event.max_failures,
    )
    if event.prepare_base:
        waiting = {worker: WorkerState.WAITING for worker in event.workers}
        return replace(fresh, phase=Phase.PREPARING, workers=waiting), [PrepareBase()]
    return fresh, [StartWorker(worker) for worker in event.workers]


def _end_preparation(
    state: State, event: BasePrepared | BaseFailed | PreparationInterrupted
) -> tuple[State, list[Command]]:
    if state.phase is not Phase.PREPARING:
        return state, []
    if isinstance(event, BaseFailed):
        return _finish(state, Phase.FAILED, event.reason)
    if isinstance(event, PreparationInterrupted) or state.signal_number:
        return _finish(state, Phase.INTERRUPTED, f"signal {state.signal_number}")
    workers = dict.fromkeys(state.workers, WorkerState.STARTING)
    return replace(state, phase=Phase.TRAINING, workers=workers), [StartWorker(worker) for worker in workers]


def _assign(state: State) -> tuple[State, list[Command]]:
    """Give pending jobs to idle workers; with none left to do, aggregate."""
    if state.signal_number:
        return _settle_interrupt(state)
    jobs, workers = dict(state.jobs), dict(state.workers)
    commands: list[Command] = []
    first_ended = not any(job.status.open for job in jobs.values() if not job.later)
    if first_ended and any(job.status.open for job in jobs.values()):
        alive = [u for u in state.required if u in state.finished_units()]
        if len(alive) < state.min_members:
            return _too_few(state, len(alive))
    for name, job in state.jobs.items():
        idle = next((w for w, found in workers.items() if found is WorkerState.IDLE), None)
        if idle is None:
            break
        if job.status is JobState.PENDING and (first_ended or not job.later):
            jobs[name] = replace(job, status=JobState.RUNNING, attempt=job.attempt + 1, worker=idle)
            workers[idle] = WorkerState.BUSY
            commands.append(RunJob(name, jobs[name].attempt, idle, job.units))
    state = replace(state, jobs=jobs, workers=workers)
    open_jobs = [j for j in jobs.values() if j.status.open]
    idle = next((w for w, found in workers.items() if found is WorkerState.IDLE), None)
    if state.phase is Phase.TRAINING and not open_jobs and idle is not None:
        alive = [u for u in state.required if u in state.finished_units()]
        if len(alive) < state.min_members:
            return _too_few(state, len(alive))
        workers[idle] = WorkerState.BUSY
        commands.append(Aggregate(idle, state.finished_units()))
        state = replace(state, phase=Phase.AGGREGATING, workers=workers)
    return state, commands


def _end_job(state: State, event: JobFinished | JobFailed | JobInterrupted) -> tuple[State, list[Command]]:
    job = state.jobs.get(event.job)
    if job is None or job.status is not JobState.RUNNING or job.attempt != event.attempt:
        return state, []  # a report of an attempt that is no longer the current one
    workers = dict(state.workers)
    if workers.get(job.worker) is WorkerState.BUSY:
        workers[job.worker] = WorkerState.IDLE
    if isinstance(event, JobFinished):
        ended, failed = replace(job, status=JobState.FINISHED), {**state.failed_units, **event.failed}
    elif isinstance(event, JobInterrupted):
        ended, failed = replace(job, status=JobState.PENDING), dict(state.failed_units)
    else:
        ended, failed = _retry(state, job, event.reason, event.fatal)
    state = replace(state, jobs={**state.jobs, event.job: ended}, workers=workers, failed_units=failed)
    return _stop_if_hopeless(state)


def _retry(state: State, job: Job, reason: str, fatal: bool) -> tuple[Job, dict[str, str]]:
    failures = job.failures + 1
    if fatal or failures > state.max_failures:
        return replace(job, status=JobState.FAILED, failures=failures), {
            **state.failed_units, **{unit: reason for unit in job.units}
        }
    return replace(job, status=JobState.PENDING, failures=failures), dict(state.failed_units)


def _lose_worker(state: State, event: WorkerLost) -> tuple[State, list[Command]]:
    """Put the worker's job back and start the worker again, as often as jobs may fail."""
    before = state.workers.get(event.worker, WorkerState.LOST)
    if before in (WorkerState.LOST, WorkerState.WAITING):  # who is not started cannot be lost
        return state, []
    jobs, failed = dict(state.jobs), dict(state.failed_units)
    for name, job in state.jobs.items():
        if job.status is JobState.RUNNING and job.worker == event.worker:
            jobs[name], failed = _retry(replace(state, failed_units=failed), job, event.reason, fatal=False)
    deaths = dict(state.worker_failures)
    if jobs == state.jobs:
        deaths[event.worker] = deaths.get(event.worker, 0) + 1
    too_often = deaths.get(event.worker, 0) > state.max_failures
    given_up = before is WorkerState.STARTING or state.signal_number or too_often
    aggregating = state.phase is Phase.AGGREGATING and before is not WorkerState.BUSY  # the only busy worker aggregates
    state = replace(
        state,
        jobs=jobs,
        failed_units=failed,
        worker_failures=deaths,
        phase=Phase.AGGREGATING if aggregating else Phase.TRAINING,
        workers={**state.workers, event.worker: WorkerState.LOST if given_up else WorkerState.STARTING},
    )
    if all(s is WorkerState.LOST for s in state.workers.values()) and not state.signal_number:
        return _finish(state, Phase.FAILED, f"no worker is left: {event.reason}")
    state, commands = _stop_if_hopeless(state)
    restart = [] if given_up or state.phase.terminal else [StartWorker(event.worker)]
    return state, [*restart, *commands]


def _stop_if_hopeless(state: State) -> tuple[State, list[Command]]:
    possible = [u for u in state.required if u not in state.failed_units]
    if len(possible) < state.min_members:
        return _too_few(state, len(possible))
    return _assign(state)


def _too_few(state: State, alive: int) -> tuple[State, list[Command]]:
    why = "; ".join(f"{unit}: {reason}" for unit, reason in state.failed_units.items())
    return _finish(state, Phase.FAILED, f"{alive} members can finish, {state.min_members} are needed ({why})")


def _interrupt(state: State, event: InterruptRequested) -> tuple[State, list[Command]]:
    if state.phase is Phase.PREPARING:  # it answers when its block is committed
        return replace(state, signal_number=event.signal_number), [StopJobs()]
    state, commands = _settle_interrupt(replace(state, signal_number=event.signal_number))
    return state, [StopJobs(), *commands]


def _settle_interrupt(state: State) -> tuple[State, list[Command]]:
    if any(job.status is JobState.RUNNING for job in state.jobs.values()):
        return state, []
    return _finish(state, Phase.INTERRUPTED, f"signal {state.signal_number}")


def _finish(state: State, phase: Phase, reason: str = "") -> tuple[State, list[Command]]:
    return replace(state, phase=phase, reason=reason), [Finish(phase, reason)]
