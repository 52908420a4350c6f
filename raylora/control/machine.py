"""``transition(state, event) -> (state, commands)``: one event's consequences."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace

from raylora.control.commands import (
    Aggregate,
    Command,
    Finish,
    PrepareBase,
    ReleaseWorker,
    RunJob,
    StartWorker,
    StopJobs,
)
from raylora.control.events import (
    Aggregated,
    BaseFailed,
    BasePrepared,
    Event,
    InterruptRequested,
    JobFailed,
    JobFinished,
    JobInterrupted,
    PreparationInterrupted,
    RunStarted,
    WorkerLost,
    WorkerReady,
)
from raylora.control.splitting import split_last
from raylora.control.state import Job, JobState, Phase, State, WorkerState


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
        return _assign(state.with_worker(event.worker, WorkerState.IDLE))
    if isinstance(event, WorkerLost):
        return _lose_worker(state, event)
    if isinstance(event, JobFinished | JobFailed | JobInterrupted):
        return _end_job(state, event)
    if isinstance(event, InterruptRequested):
        return _interrupt(state, event)
    if state.phase is not Phase.AGGREGATING:
        return state, []
    if isinstance(event, Aggregated):
        finished = set(state.finished_units())
        short = [unit for unit in state.required if unit not in finished]
        phase = Phase.DEGRADED if short else Phase.SUCCEEDED
        reason = f"{len(short)} of {len(state.required)} members failed: {', '.join(short)}" if short else ""
        return _finish(state, phase, reason)
    return _finish(state, Phase.FAILED, f"aggregation failed: {event.reason}")


def replay(events: Iterable[Event]) -> State:
    """Return the state after a log of events; the commands were carried out when it was written."""
    state = State()
    for event in events:
        state, _ = transition(state, event)
    return state


def _start(state: State, event: RunStarted) -> tuple[State, list[Command]]:
    """Begin, or begin again: what is finished stays finished, all else is pending, failed units too."""
    reopened, may_split, later = set(event.reopened), set(event.may_split), set(event.later)
    jobs = {}
    for name, units in event.jobs.items():
        old = state.jobs.get(name)
        done = old is not None and old.status is JobState.FINISHED and old.units == tuple(units)
        done = done and not any(unit in state.failed_units or unit in reopened for unit in units)
        jobs[name] = Job(
            tuple(units), JobState.FINISHED if done else JobState.PENDING, old.attempt if old else 0,
            cost=event.costs.get(name, 0.0), may_split=name in may_split, later=name in later,
        )
    fresh = State.starting(
        Phase.PREPARING if event.prepare_base else Phase.TRAINING,
        jobs,
        dict.fromkeys(event.workers, WorkerState.WAITING),
        event.required,
        event.min_members,
        event.max_failures,
    )
    fresh = replace(fresh, release_idle=event.release_idle, later_workers=frozenset(event.later_workers))
    return (fresh, [PrepareBase()]) if event.prepare_base else _start_workers(fresh, fresh.later_workers)


def _start_workers(state: State, but: Container[str] = ()) -> tuple[State, list[Command]]:
    """Start the workers that wait to be, without those that are to wait longer."""
    commands: list[Command] = []
    for worker, found in state.workers.items():
        if found is WorkerState.WAITING and worker not in but:
            state = state.with_worker(worker, WorkerState.STARTING)
            commands.append(StartWorker(worker))
    return state, commands


def _end_preparation(
    state: State, event: BasePrepared | BaseFailed | PreparationInterrupted
) -> tuple[State, list[Command]]:
    if state.phase is not Phase.PREPARING:
        return state, []
    if isinstance(event, BaseFailed):
        return _finish(state, Phase.FAILED, event.reason)
    if isinstance(event, PreparationInterrupted) or state.signal_number:
        return _finish(state, Phase.INTERRUPTED, f"signal {state.signal_number}")
    return _start_workers(replace(state, phase=Phase.TRAINING), state.later_workers)


def _assign(state: State) -> tuple[State, list[Command]]:
    """Give pending jobs to idle workers, the longest first; with none left to do, aggregate."""
    if state.signal_number:
        return _settle_interrupt(state)
    commands: list[Command] = []
    if state.held and not state.has_open_jobs:
        if (alive := _alive(state)) < state.min_members:
            return _too_few(state, alive)
        state, commands = _start_workers(state.with_later())
    while state.pending and state.idle:
        state = split_last(state)
        name, worker = state.next_job(), state.next_worker()
        job = state.jobs[name]
        job = replace(job, status=JobState.RUNNING, attempt=job.attempt + 1, worker=worker)
        state = state.with_job(name, job).with_worker(worker, WorkerState.BUSY)
        commands.append(RunJob(name, job.attempt, worker, job.units))
    if state.phase is Phase.TRAINING and state.idle and not state.has_open_jobs:
        if (alive := _alive(state)) < state.min_members:
            return _too_few(state, alive)
        worker = state.next_worker()
        commands.append(Aggregate(worker, state.finished_units()))
        state = replace(state.with_worker(worker, WorkerState.BUSY), phase=Phase.AGGREGATING)
    return _release(state, commands) if state.release_idle else (state, commands)


def _alive(state: State) -> int:
    """Return how many required units are finished."""
    return len(set(state.required) & set(state.finished_units()))


def _release(state: State, commands: list[Command]) -> tuple[State, list[Command]]:
    """Let go of every worker that has nothing to do, or not begun, while others do the last jobs or aggregate."""
    if state.pending or state.held or not (state.at_work or state.phase is Phase.AGGREGATING):
        return state, commands
    if state.in_service > len(state.at_work) + (state.phase is Phase.AGGREGATING):
        for worker, found in state.workers.items():
            if found in (WorkerState.IDLE, WorkerState.STARTING):
                state = state.with_worker(worker, WorkerState.RELEASED)
                commands.append(ReleaseWorker(worker))
    return state, commands


def _end_job(state: State, event: JobFinished | JobFailed | JobInterrupted) -> tuple[State, list[Command]]:
    job = state.jobs.get(event.job)
    if job is None or job.status is not JobState.RUNNING or job.attempt != event.attempt:
        return state, []  # a report of an attempt that is no longer the current one
    if state.workers.get(job.worker) is WorkerState.BUSY:
        state = state.with_worker(job.worker, WorkerState.IDLE)
    if isinstance(event, JobFinished):
        state = state.with_job(event.job, replace(job, status=JobState.FINISHED)).with_failed(event.failed)
    elif isinstance(event, JobInterrupted):
        state = state.with_job(event.job, replace(job, status=JobState.PENDING))
    else:
        state = _retry(state, event.job, event.reason, event.fatal)
    return _stop_if_hopeless(state)


def _retry(state: State, name: str, reason: str, fatal: bool) -> State:
    """Put a job back that failed, or give it up with its units."""
    job = state.jobs[name]
    failures = job.failures + 1
    if fatal or failures > state.max_failures:
        state = state.with_job(name, replace(job, status=JobState.FAILED, failures=failures))
        return state.with_failed(dict.fromkeys(job.units, reason))
    return state.with_job(name, replace(job, status=JobState.PENDING, failures=failures))


def _lose_worker(state: State, event: WorkerLost) -> tuple[State, list[Command]]:
    """Put the worker's job back and start the worker again, as often as jobs may fail."""
    before = state.workers.get(event.worker, WorkerState.LOST)
    if not before.in_service:
        return state, []
    job, deaths = state.at_work.get(event.worker), state.worker_failures.get(event.worker, 0)
    if job is not None:
        state = _retry(state, job, event.reason, fatal=False)
    else:
        deaths += 1
        state = replace(state, worker_failures=state.worker_failures.set(event.worker, deaths))
    not_started = before is WorkerState.STARTING and not event.by_machine
    given_up = not_started or bool(state.signal_number) or deaths > state.max_failures
    aggregating = state.phase is Phase.AGGREGATING and before is not WorkerState.BUSY  # the only busy worker aggregates
    state = replace(state, phase=Phase.AGGREGATING if aggregating else Phase.TRAINING)
    state = state.with_worker(event.worker, WorkerState.LOST if given_up else WorkerState.STARTING)
    started: list[Command] = [] if given_up else [StartWorker(event.worker)]
    if not state.in_service and not state.signal_number:
        state, started = _start_workers(state)
        if not started:
            return _finish(state, Phase.FAILED, f"no worker is left: {event.reason}")
    state, commands = _stop_if_hopeless(state)
    return state, commands if state.phase.terminal else [*started, *commands]


def _stop_if_hopeless(state: State) -> tuple[State, list[Command]]:
    if state.possible < state.min_members:
        return _too_few(state, state.possible)
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
    if state.at_work:
        return state, []
    return _finish(state, Phase.INTERRUPTED, f"signal {state.signal_number}")


def _finish(state: State, phase: Phase, reason: str = "") -> tuple[State, list[Command]]:
    return replace(state, phase=phase, reason=reason), [Finish(phase, reason)]
