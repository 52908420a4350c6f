"""The state machine: every run ends, stale reports change nothing, and the log alone rebuilds the state."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora import control
from raylora.control import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    BaseFailed,
    BasePrepared,
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
    State,
    StopJobs,
    WorkerLost,
    WorkerReady,
    transition,
)


def start(jobs: int = 2, workers: int = 1, min_members: int | None = None, max_failures: int = 1) -> RunStarted:
    names = {f"job-{j}": [f"member-{2 * j}", f"member-{2 * j + 1}"] for j in range(jobs)}
    required = [unit for units in names.values() for unit in units]
    return RunStarted(names, [f"w{n}" for n in range(workers)], required, min_members or len(required), max_failures)


def fold(*events: Event, state: State | None = None) -> tuple[State, list[Any]]:
    state, commands = state or State(), []
    for event in events:
        state, commands = transition(state, event)
    return state, commands


class Cluster:
    """Carries commands out as a cluster would: anything may fail, and reports come in any order."""

    def __init__(self, seed: int, failure_rate: float) -> None:
        self.random, self.rate = random.Random(seed), failure_rate
        self.pending: list[Event] = []
        self.log: list[Event] = []
        self.trained: list[str] = []
        self.state = State()

    def run(self, first: RunStarted, most: int = 2000) -> State:
        self.pending = [first]
        while self.pending and len(self.log) < most:
            event = self.pending.pop(self.random.randrange(len(self.pending)))
            self.log.append(event)
            before = self.state
            self.state, commands = transition(before, event)
            self.check(before, event)
            for command in commands:
                self.carry_out(command)
        return self.state

    def carry_out(self, command: Any) -> None:
        fails = self.random.random() < self.rate
        if isinstance(command, StartWorker):
            lost = WorkerLost(command.worker, "died")
            self.pending.append(lost if fails else WorkerReady(command.worker))
        elif isinstance(command, RunJob):
            if not fails:
                self.trained += command.units
                self.pending.append(JobFinished(command.job, command.attempt))
            else:
                some = {command.units[0]: "loss is nan"}
                self.pending.append(self.random.choice([
                    WorkerLost(command.worker, "died"),
                    JobFailed(command.job, command.attempt, "out of memory"),
                    JobFailed(command.job, command.attempt, "bad", fatal=True),
                    JobFinished(command.job, command.attempt, some),
                ]))
        elif isinstance(command, Aggregate):
            self.pending.append(WorkerLost(command.worker, "died") if fails else Aggregated())

    def check(self, before: State, event: Event) -> None:
        running = [job.worker for job in self.state.jobs.values() if job.status is JobState.RUNNING]
        assert len(running) == len(set(running)), f"a worker has two jobs after {event}"
        if not isinstance(event, RunStarted):
            for name, job in before.jobs.items():
                if job.status is JobState.FINISHED:
                    assert self.state.jobs[name].status is JobState.FINISHED


cases = st.tuples(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))


@given(cases)
@settings(max_examples=300, deadline=None)
def test_every_run_ends_and_no_unit_is_trained_after_it_finished(case: tuple[int, float, int, int, int]) -> None:
    seed, rate, jobs, workers, max_failures = case
    cluster = Cluster(seed, rate)
    first = start(jobs, workers, min_members=1, max_failures=max_failures)
    state = cluster.run(first)
    assert state.phase.terminal, state
    assert len(cluster.trained) == len(set(cluster.trained))
    finished = [u for u in state.required if u in state.finished_units()]
    if state.phase is Phase.SUCCEEDED:
        assert finished == first.required
    if state.phase is Phase.DEGRADED:
        assert 1 <= len(finished) < len(first.required)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_replaying_the_log_gives_the_state(case: tuple[int, float, int, int, int]) -> None:
    seed, rate, jobs, workers, max_failures = case
    cluster = Cluster(seed, rate)
    state = cluster.run(start(jobs, workers, 1, max_failures))
    written = [json.loads(json.dumps({**control.to_record(e), "at": 1.5})) for e in cluster.log]
    assert control.replay(control.from_record(record) for record in written) == state


@given(cases, st.data())
@settings(max_examples=150, deadline=None)
def test_stale_and_repeated_reports_change_nothing(case: tuple[int, float, int, int, int], data: Any) -> None:
    seed, rate, jobs, workers, max_failures = case
    cluster = Cluster(seed, rate)
    cluster.run(start(jobs, workers, 1, max_failures), most=data.draw(st.integers(1, 12)))
    state = cluster.state
    for name, job in state.jobs.items():
        for attempt in range(job.attempt + 3):
            if attempt != job.attempt or job.status is not JobState.RUNNING:
                for event in (JobFinished(name, attempt), JobFailed(name, attempt, "x"), JobInterrupted(name, attempt)):
                    assert transition(state, event) == (state, [])
    assert transition(state, JobFinished("no-such-job", 1)) == (state, [])
    assert transition(state, WorkerLost("no-such-worker", "x")) == (state, [])


@given(cases, st.integers(1, 15))
@settings(max_examples=200, deadline=None)
def test_an_interrupted_run_ends_and_a_resume_finishes_the_rest(
    case: tuple[int, float, int, int, int], at: int
) -> None:
    seed, _, jobs, workers, max_failures = case
    cluster = Cluster(seed, 0.0)
    first = start(jobs, workers, max_failures=max_failures)
    cluster.run(first, most=at)
    before = cluster.state
    state, commands = transition(before, InterruptRequested(15))
    if before.phase.terminal:
        assert (state, commands) == (before, [])
        return
    assert commands[0] == StopJobs()
    for name, job in before.jobs.items():
        if job.status is JobState.RUNNING:
            state, commands = transition(state, JobInterrupted(name, job.attempt))
    assert state.phase is Phase.INTERRUPTED and commands[-1] == Finish(Phase.INTERRUPTED, "signal 15")
    assert transition(state, WorkerReady("w0")) == (state, [])
    done = set(state.finished_units())
    again = Cluster(seed, 0.0)
    again.state = state
    assert again.run(first).phase is Phase.SUCCEEDED
    assert not done & set(again.trained)


def test_jobs_go_to_idle_workers_in_order_and_then_the_results_are_aggregated() -> None:
    state, commands = fold(start())
    assert commands == [StartWorker("w0")]
    state, commands = fold(WorkerReady("w0"), state=state)
    assert commands == [RunJob("job-0", 1, "w0", ("member-0", "member-1"))]
    state, commands = fold(JobFinished("job-0", 1), state=state)
    assert commands == [RunJob("job-1", 1, "w0", ("member-2", "member-3"))]
    state, commands = fold(JobFinished("job-1", 1), state=state)
    assert commands == [Aggregate("w0", ("member-0", "member-1", "member-2", "member-3"))]
    state, commands = fold(Aggregated(), state=state)
    assert commands == [Finish(Phase.SUCCEEDED)] and state.phase is Phase.SUCCEEDED


def test_fewer_members_than_asked_but_enough_is_degraded_and_says_who_failed() -> None:
    state, commands = fold(
        start(1, min_members=1), WorkerReady("w0"), JobFinished("job-0", 1, {"member-1": "nan"}), Aggregated()
    )
    assert state.phase is Phase.DEGRADED
    assert commands == [Finish(Phase.DEGRADED, "1 of 2 members failed: member-1")]


def test_too_few_members_fail_the_run_at_once_with_the_reasons() -> None:
    state, _ = fold(start(2), WorkerReady("w0"), JobFinished("job-0", 1, {"member-1": "loss is nan"}))
    assert state.phase is Phase.FAILED
    assert "3 members can finish, 4 are needed" in state.reason and "member-1: loss is nan" in state.reason


def test_a_job_is_retried_max_failures_times_and_then_fails() -> None:
    state, _ = fold(start(1, max_failures=2), WorkerReady("w0"))
    for attempt in (1, 2):
        state, commands = fold(JobFailed("job-0", attempt, "out of memory"), state=state)
        assert commands == [RunJob("job-0", attempt + 1, "w0", ("member-0", "member-1"))]
    state, _ = fold(JobFailed("job-0", 3, "out of memory"), state=state)
    assert state.phase is Phase.FAILED and "out of memory" in state.reason


def test_a_fatal_failure_is_not_retried() -> None:
    state, _ = fold(start(1, max_failures=5), WorkerReady("w0"), JobFailed("job-0", 1, "bad", fatal=True))
    assert state.phase is Phase.FAILED and state.jobs["job-0"].status is JobState.FAILED


def test_a_lost_worker_is_restarted_and_its_job_runs_again_under_a_new_attempt() -> None:
    state, commands = fold(start(1), WorkerReady("w0"), WorkerLost("w0", "killed"))
    assert commands == [StartWorker("w0")] and state.jobs["job-0"].status is JobState.PENDING
    state, commands = fold(WorkerReady("w0"), state=state)
    assert commands == [RunJob("job-0", 2, "w0", ("member-0", "member-1"))]
    assert transition(state, JobFinished("job-0", 1)) == (state, [])


def test_another_worker_takes_over_the_lost_ones_job() -> None:
    state, _ = fold(start(2, workers=2), WorkerReady("w0"), WorkerReady("w1"), JobFinished("job-1", 1))
    state, commands = fold(WorkerLost("w0", "killed"), state=state)
    assert commands == [StartWorker("w0"), RunJob("job-0", 2, "w1", ("member-0", "member-1"))]


def test_a_worker_that_cannot_start_is_given_up_and_with_the_last_one_the_run() -> None:
    state, commands = fold(start(2, workers=2), WorkerLost("w0", "no such base"))
    assert commands == [] and state.phase is Phase.TRAINING
    state, commands = fold(WorkerLost("w1", "no such base"), state=state)
    assert state.phase is Phase.FAILED and commands == [Finish(Phase.FAILED, "no worker is left: no such base")]


def test_a_worker_that_dies_forever_while_aggregating_is_given_up_after_max_failures() -> None:
    state, _ = fold(start(1, max_failures=2), WorkerReady("w0"), JobFinished("job-0", 1))
    for _ in range(2):
        state, commands = fold(WorkerLost("w0", "out of memory"), state=state)
        assert commands == [StartWorker("w0")]
        state, commands = fold(WorkerReady("w0"), state=state)
        assert commands == [Aggregate("w0", ("member-0", "member-1"))]
    state, _ = fold(WorkerLost("w0", "out of memory"), state=state)
    assert state.phase is Phase.FAILED and "out of memory" in state.reason


def test_a_job_that_kills_its_worker_does_not_use_up_the_worker() -> None:
    state, _ = fold(start(2, min_members=2, max_failures=1), WorkerReady("w0"))
    state, _ = fold(WorkerLost("w0", "x"), WorkerReady("w0"), WorkerLost("w0", "x"), WorkerReady("w0"), state=state)
    assert state.jobs["job-0"].status is JobState.FAILED and state.jobs["job-1"].status is JobState.RUNNING
    state, _ = fold(JobFinished("job-1", 1), Aggregated(), state=state)
    assert state.phase is Phase.DEGRADED


def test_losing_an_idle_worker_while_another_aggregates_starts_no_second_aggregation() -> None:
    state, _ = fold(start(1, workers=3), *(WorkerReady(f"w{n}") for n in range(3)), JobFinished("job-0", 1))
    state, commands = fold(WorkerLost("w2", "killed"), state=state)
    assert state.phase is Phase.AGGREGATING and commands == [StartWorker("w2")]
    state, commands = fold(WorkerReady("w2"), state=state)
    assert commands == [] and state.phase is Phase.AGGREGATING


def test_a_repeated_ready_of_a_busy_worker_gives_it_no_second_job() -> None:
    state, _ = fold(start(2), WorkerReady("w0"))
    assert transition(state, WorkerReady("w0")) == (state, [])
    assert transition(state, WorkerReady("stranger")) == (state, [])


@pytest.mark.parametrize("event", [Aggregated(), AggregationFailed("x")])
def test_news_of_an_aggregation_counts_only_while_there_is_one(event: Event) -> None:
    for state in (State(), fold(start(2), WorkerReady("w0"))[0]):
        assert transition(state, event) == (state, [])


def test_a_failed_aggregation_fails_the_run_and_a_resume_only_aggregates() -> None:
    first = start(1)
    state, _ = fold(first, WorkerReady("w0"), JobFinished("job-0", 1), AggregationFailed("disk is full"))
    assert state.phase is Phase.FAILED and "disk is full" in state.reason
    state, commands = fold(first, WorkerReady("w0"), state=state)
    assert commands == [Aggregate("w0", ("member-0", "member-1"))]


def test_a_resume_tries_failed_units_again() -> None:
    first = start(2)
    state, _ = fold(first, WorkerReady("w0"), JobFinished("job-0", 1), JobFinished("job-1", 1, {"member-3": "oom"}))
    assert state.phase is Phase.FAILED
    state, commands = fold(first, WorkerReady("w0"), state=state)
    assert commands == [RunJob("job-1", 2, "w0", ("member-2", "member-3"))]
    state, _ = fold(JobFinished("job-1", 2), Aggregated(), state=state)
    assert state.phase is Phase.SUCCEEDED and not state.failed_units


def test_a_worker_lost_after_an_interrupt_is_not_restarted() -> None:
    state, commands = fold(start(1), WorkerReady("w0"), InterruptRequested(2))
    assert commands == [StopJobs()] and state.phase is Phase.TRAINING
    state, commands = fold(WorkerLost("w0", "killed"), state=state)
    assert state.phase is Phase.INTERRUPTED and commands == [Finish(Phase.INTERRUPTED, "signal 2")]


@pytest.mark.parametrize("phase", [p for p in Phase if p.terminal])
def test_nothing_but_a_start_leaves_a_terminal_phase(phase: Phase) -> None:
    state = replace(fold(start(1), WorkerReady("w0"))[0], phase=phase)
    for event in (
        WorkerReady("w0"), WorkerLost("w0", "x"), JobFinished("job-0", 1), JobFailed("job-0", 1, "x"),
        InterruptRequested(2), JobInterrupted("job-0", 1), Aggregated(), AggregationFailed("x"),
    ):
        assert transition(state, event) == (state, [])
    assert transition(state, start(1))[0].phase is Phase.TRAINING


def test_a_transition_never_changes_the_state_it_was_given() -> None:
    state, _ = fold(start(2, workers=2), WorkerReady("w0"))
    before = repr(state)
    for event in (WorkerReady("w1"), WorkerLost("w0", "x"), JobFinished("job-0", 1, {"member-0": "x"})):
        transition(state, event)
        assert repr(state) == before


# --- a base that is prepared first ---------------------------------------------------------------------------
def prepares(**options: Any) -> RunStarted:
    return replace(start(**options), prepare_base=True)


def test_no_worker_starts_before_the_base_is_prepared() -> None:
    state, commands = fold(prepares(workers=2))
    assert state.phase is Phase.PREPARING and commands == [PrepareBase()]
    assert transition(state, WorkerReady("w0")) == (state, [])
    state, commands = transition(state, BasePrepared())
    assert state.phase is Phase.TRAINING and commands == [StartWorker("w0"), StartWorker("w1")]
    assert transition(state, BasePrepared()) == (state, [])


def test_a_base_that_fails_ends_the_run_with_its_reason() -> None:
    state, commands = fold(prepares(), BaseFailed("layer 3: NaN"))
    assert (state.phase, state.reason) == (Phase.FAILED, "layer 3: NaN")
    assert commands[-1] == Finish(Phase.FAILED, "layer 3: NaN")
    again, commands = transition(state, prepares())
    assert again.phase is Phase.PREPARING and commands == [PrepareBase()]


@pytest.mark.parametrize("answer", [PreparationInterrupted(), BasePrepared()])
def test_an_interrupt_while_preparing_waits_for_the_block(answer: Event) -> None:
    state, commands = fold(prepares(), InterruptRequested(15))
    assert state.phase is Phase.PREPARING and commands[-1] == StopJobs()
    state, commands = transition(state, answer)
    assert state.phase is Phase.INTERRUPTED and commands == [Finish(Phase.INTERRUPTED, "signal 15")]
