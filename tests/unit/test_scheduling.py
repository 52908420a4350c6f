"""The queues of the state machine: equal to the plain one, pure, the longest first, and the last split evenly."""

from __future__ import annotations

import pickle
import random
from dataclasses import fields, replace
from typing import Any

import control_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cluster_simulation import Cluster, Load
from raylora import control
from raylora.control import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    BaseFailed,
    BasePrepared,
    Event,
    InterruptRequested,
    JobFailed,
    JobFinished,
    JobInterrupted,
    JobState,
    Phase,
    PreparationInterrupted,
    ReleaseWorker,
    RunJob,
    RunStarted,
    StartWorker,
    State,
    WorkerLost,
    WorkerReady,
    WorkerState,
    transition,
)
from raylora.control.persistent import IntSet, PersistentMap

seeds = st.integers(0, 10**9)


def started(sizes: list[int], workers: int = 1, **options: Any) -> RunStarted:
    """Return the start of a run with packs of these sizes; of every member one is needed."""
    names = iter(f"member-{m}" for m in range(sum(sizes)))
    jobs = {f"job-{j}": [next(names) for _ in range(size)] for j, size in enumerate(sizes)}
    later = options.get("later", [])
    required = [unit for name, units in jobs.items() if name not in later for unit in units]
    return RunStarted(jobs, [f"w{n}" for n in range(workers)], required, 1, options.pop("max_failures", 2), **options)


def random_event(draw: random.Random, state: State, first: RunStarted) -> Event:
    """Return what may happen next, most of it to jobs that run, the rest stale or meant for nobody."""
    workers = [*first.workers, "stranger"]
    running = [name for name, job in state.jobs.items() if job.status is JobState.RUNNING]
    job = draw.choice(running) if running and draw.random() < 0.8 else draw.choice([*state.jobs, "no-such-job"])
    attempt = state.jobs[job].attempt + draw.choice([0, 0, 0, 0, -1, 1]) if job in state.jobs else 1
    units = state.jobs[job].units if job in state.jobs else ("nobody",)
    kinds: list[tuple[float, Any]] = [
        (3, lambda: WorkerReady(draw.choice(workers))),
        (4, lambda: JobFinished(job, attempt)),
        (1, lambda: JobFinished(job, attempt, {draw.choice(units): "loss is nan"})),
        (1, lambda: JobFailed(job, attempt, "out of memory", draw.random() < 0.2)),
        (1, lambda: WorkerLost(draw.choice(workers), "died")),
        (0.2, lambda: JobInterrupted(job, attempt)),
        (0.1, lambda: InterruptRequested(15)),
        (0.5, BasePrepared), (0.1, lambda: BaseFailed("NaN")), (0.1, PreparationInterrupted),
        (0.3, Aggregated), (0.1, lambda: AggregationFailed("disk is full")),
        (0.3, lambda: replace(first, prepare_base=draw.random() < 0.3,
                              reopened=[draw.choice(first.required)] if draw.random() < 0.3 else [])),
    ]
    return draw.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()


def check_bookkeeping(state: State) -> None:
    """What is kept in queues and counts is what a look at every job and worker finds."""
    jobs, workers = dict(state.jobs), dict(state.workers)
    pending = {name for name, job in jobs.items() if job.status is JobState.PENDING}
    waiting = {name for name in pending if state.later_begun or not jobs[name].later}
    assert state.held == len(pending) - len(waiting)
    if any(job.later and job.status is JobState.RUNNING for job in jobs.values()):
        assert not any(job.status.open for job in jobs.values() if not job.later)
    assert {state.order.jobs[rank] for rank in state.pending} == waiting
    assert {state.order.jobs[rank] for rank in state.can_split} == {name for name in waiting if jobs[name].can_split}
    assert state.pending_units == sum(len(jobs[name].units) for name in waiting)
    assert [state.order.workers[place] for place in state.idle] == [
        name for name, found in workers.items() if found is WorkerState.IDLE
    ]
    assert state.at_work == {job.worker: name for name, job in jobs.items() if job.status is JobState.RUNNING}
    assert state.in_service == sum(found not in (WorkerState.LOST, WorkerState.WAITING) for found in workers.values())
    assert state.possible == sum(unit not in state.failed_units for unit in state.required)


def as_plain(state: Any) -> dict[str, Any]:
    """Return what both machines' states show, order of jobs, workers and failures included."""
    shown = {field.name: getattr(state, field.name) for field in fields(reference.State)}
    shown["jobs"] = [
        (name, job.units, job.status, job.attempt, job.failures, job.worker) for name, job in state.jobs.items()
    ]
    for name in ("workers", "failed_units", "worker_failures"):
        shown[name] = list(shown[name].items())
    return {**shown, "finished": state.finished_units()}


@given(seeds, st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_without_costs_and_splits_it_is_the_plain_machine(
    seed: int, sizes: list[int], workers: int, later: int
) -> None:
    last = [f"job-{j}" for j in range(max(1, len(sizes) - later), len(sizes))]
    draw, first = random.Random(seed), started(sizes, workers, later=last)
    state, plain, event = State(), reference.State(), first
    for _ in range(60):
        state, commands = transition(state, event)
        plain, expected = reference.transition(plain, event)
        assert commands == expected and as_plain(state) == as_plain(plain), event
        check_bookkeeping(state)
        event = random_event(draw, state, first)


@given(seeds, st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_old_states_stay_what_they_were_and_the_log_replays(seed: int, sizes: list[int], workers: int) -> None:
    draw = random.Random(seed)
    first = started(sizes, workers)
    first = replace(first, costs={name: draw.choice([1.0, 2.0, 3.0]) for name in first.jobs}, may_split=[*first.jobs])
    state, events, seen = State(), [first], []
    for _ in range(40):
        state, _ = transition(state, events[-1])
        check_bookkeeping(state)
        placed = [unit for job in state.jobs.values() for unit in job.units]
        assert placed == first.required  # in their order, each in one job
        seen.append((state, repr(state)))
        events.append(random_event(draw, state, first))
    assert all(repr(old) == before for old, before in seen)
    records = [control.to_record(event) for event in events[:-1]]
    again = control.replay(control.from_record(record) for record in records)
    assert again == state and repr(again) == repr(state)
    assert pickle.loads(pickle.dumps(state)) == state


def fold(first: RunStarted, *events: Event) -> tuple[State, list[Any]]:
    state, commands = transition(State(), first)
    given = []
    for event in events:
        state, commands = transition(state, event)
        given += [command for command in commands if not isinstance(command, StartWorker)]
    return state, given


def ready(workers: int) -> list[Event]:
    return [WorkerReady(f"w{n}") for n in range(workers)]


# --- what comes later ---------------------------------------------------------------------------------------
def test_later_jobs_begin_when_all_others_have_ended_and_the_results_come_last() -> None:
    first = started([1, 1, 1, 1], workers=2, later=["job-2", "job-3"], costs={"job-0": 1.0, "job-3": 9.0},
                    release_idle=True)
    state, given = fold(first, *ready(2), JobFinished("job-1", 1))
    assert [command.job for command in given] == ["job-0", "job-1"] and state.held == 2  # nobody is let go
    state, given = fold(first, *ready(2), JobFinished("job-1", 1), JobFinished("job-0", 1))
    assert [command.job for command in given[2:]] == ["job-3", "job-2"] and state.held == 0
    for event in (JobFailed("job-3", 1, "out of memory"), JobFinished("job-2", 1), JobFinished("job-3", 2)):
        state, commands = transition(state, event)
    assert isinstance(commands[0], Aggregate)
    assert commands[0].units == ("member-0", "member-1", "member-2", "member-3")
    state, _ = transition(state, Aggregated())
    assert state.phase is Phase.SUCCEEDED


def test_workers_that_only_answer_are_started_when_the_answers_begin() -> None:
    first = started([3, 1, 1, 1], workers=3, later=["job-1", "job-2", "job-3"], later_workers=["w1", "w2"],
                    may_split=["job-0"], release_idle=True)
    state, commands = transition(State(), first)
    assert commands == [StartWorker("w0")] and state.in_service == 1
    state, commands = transition(state, WorkerReady("w0"))
    assert [command.job for command in commands] == ["job-0"]  # a pack is not cut for those who are not there
    state, commands = transition(state, JobFinished("job-0", 1))
    assert commands[:2] == [StartWorker("w1"), StartWorker("w2")] and commands[2].job == "job-1"
    state, commands = transition(state, WorkerReady("w2"))
    assert [(command.job, command.worker) for command in commands] == [("job-2", "w2")]
    state, commands = transition(state, JobFinished("job-1", 1))
    assert [(c.job, c.worker) if isinstance(c, RunJob) else c for c in commands] == [
        ("job-3", "w0"), ReleaseWorker("w1"),  # which came too late
    ]
    prepared, commands = transition(State(), replace(first, prepare_base=True))
    assert transition(prepared, BasePrepared())[1] == [StartWorker("w0")]


def test_workers_that_were_to_answer_train_when_nobody_else_is_left() -> None:
    first = started([1, 1], workers=2, later=["job-1"], later_workers=["w1"])
    state, commands = transition(transition(State(), first)[0], WorkerLost("w0", "no such library"))
    assert commands == [StartWorker("w1")] and state.phase is Phase.TRAINING
    state, commands = transition(state, WorkerReady("w1"))
    assert [command.job for command in commands] == ["job-0"]
    state, _ = transition(state, WorkerLost("w1", "died"))
    assert state.workers["w1"] is WorkerState.STARTING and state.jobs["job-0"].status is JobState.PENDING


def test_nothing_comes_later_where_too_few_members_are_left() -> None:
    first = replace(started([1, 1, 1], later=["job-2"]), min_members=2)
    state, given = fold(first, WorkerReady("w0"), JobFinished("job-0", 1, {"member-0": "loss is nan"}))
    assert state.phase is Phase.FAILED and "1 members can finish, 2 are needed" in state.reason
    first = replace(first, min_members=1)
    state, given = fold(first, WorkerReady("w0"), JobFinished("job-0", 1, {"member-0": "nan"}), JobFinished("job-1", 1))
    assert [command.job for command in given if isinstance(command, RunJob)] == ["job-0", "job-1", "job-2"]


def test_a_later_job_that_fails_for_good_leaves_the_members_what_they_are() -> None:
    first = started([1, 1], later=["job-1"])
    state, given = fold(first, WorkerReady("w0"), JobFinished("job-0", 1), JobFailed("job-1", 1, "too long", True))
    assert isinstance(given[-1], Aggregate) and given[-1].units == ("member-0",)
    state, _ = transition(state, AggregationFailed("a shard is missing"))
    assert state.phase is Phase.FAILED
    state, _ = transition(state, first)
    assert state.jobs["job-0"].status is JobState.FINISHED and state.jobs["job-1"].status is JobState.PENDING


# --- the longest first -------------------------------------------------------------------------------------
def test_the_longest_job_goes_first_and_equal_ones_in_their_order() -> None:
    first = started([1, 1, 1, 1], workers=4, costs={"job-0": 2.0, "job-1": 5.0, "job-2": 2.0, "job-3": 9.0})
    state, given = fold(first, *ready(4))
    assert [command.job for command in given] == ["job-3", "job-1", "job-0", "job-2"]
    assert list(state.jobs) == ["job-0", "job-1", "job-2", "job-3"]  # shown in the order of the run


def test_a_job_that_is_put_back_goes_again_by_its_length() -> None:
    first = started([1, 1, 1], workers=1, costs={"job-0": 1.0, "job-1": 9.0, "job-2": 5.0})
    _, given = fold(first, WorkerReady("w0"), JobFailed("job-1", 1, "out of memory"), JobFinished("job-1", 2))
    assert [(command.job, command.attempt) for command in given] == [("job-1", 1), ("job-1", 2), ("job-2", 1)]


def test_a_job_of_unknown_length_goes_last() -> None:
    _, given = fold(started([1, 1], workers=2, costs={"job-1": 1.0}), *ready(2))
    assert [command.job for command in given] == ["job-1", "job-0"]


def test_a_log_without_the_newer_fields_is_read() -> None:
    record = control.to_record(started([2, 1], workers=1))
    newer = ("costs", "may_split", "later", "later_workers")
    old = {key: value for key, value in record.items() if key not in newer}
    state = control.replay([control.from_record(old), WorkerReady("w0")])
    assert state == control.replay([control.from_record(record), WorkerReady("w0")])
    assert state.jobs["job-0"].status is JobState.RUNNING


# --- the last split ----------------------------------------------------------------------------------------
def test_one_pack_is_shared_by_all_workers_as_evenly_as_possible() -> None:
    state, given = fold(started([7], workers=3, may_split=["job-0"]), *ready(3))
    assert [(command.job, len(command.units), command.worker) for command in given] == [
        ("job-0.0", 3, "w0"), ("job-0.1", 2, "w1"), ("job-0.2", 2, "w2"),
    ]
    assert all(control.is_piece(name) for name in state.jobs) and not control.is_piece("job-0")
    state, given = fold(
        started([7], workers=3, may_split=["job-0"]), *ready(3), *(JobFinished(f"job-0.{n}", 1) for n in range(3))
    )
    assert given[-1] == Aggregate("w0", tuple(f"member-{m}" for m in range(7)))


def test_no_job_is_split_that_may_not_be() -> None:
    _, given = fold(started([7, 2], workers=3, may_split=["job-1"]), *ready(3))
    assert [command.job for command in given] == ["job-0", "job-1.0", "job-1.1"]


def test_no_job_is_split_while_there_are_jobs_for_all() -> None:
    first = started([2, 2, 2, 2], workers=2, may_split=[f"job-{j}" for j in range(4)])
    _, given = fold(first, *ready(2), JobFinished("job-0", 1))
    assert [command.job for command in given] == ["job-0", "job-1", "job-2"]
    _, given = fold(first, *ready(2), JobFinished("job-0", 1), JobFinished("job-1", 1), JobFinished("job-2", 1))
    assert [command.job for command in given][3:] == ["job-3.0", "job-3.1"]
    _, given = fold(started([4, 1], workers=2, may_split=["job-0"]), *ready(2))
    assert [command.job for command in given] == ["job-0", "job-1"]


def test_a_job_that_has_begun_is_not_split() -> None:
    first = started([4], workers=1, may_split=["job-0"])
    state, _ = fold(first, WorkerReady("w0"), WorkerLost("w0", "killed"))
    state, _ = transition(state, replace(first, workers=["w0", "w1"]))
    _, commands = transition(state, WorkerReady("w0"))
    assert commands == [RunJob("job-0", 2, "w0", tuple(f"member-{m}" for m in range(4)))]


def test_pieces_are_finished_one_by_one_and_their_failures_are_their_own() -> None:
    state, _ = fold(
        started([4], workers=2, may_split=["job-0"]), *ready(2), JobFinished("job-0.0", 1, {"member-1": "nan"}),
        JobFailed("job-0.1", 1, "bad", fatal=True), Aggregated(),
    )
    assert state.phase is Phase.DEGRADED and dict(state.failed_units) == {
        "member-1": "nan", "member-2": "bad", "member-3": "bad",
    }
    assert state.finished_units() == ("member-0",)


def test_a_resume_that_names_the_pieces_goes_on_with_them() -> None:
    first = started([4], workers=2, may_split=["job-0"])
    state, _ = fold(first, *ready(2), JobFinished("job-0.0", 1), InterruptRequested(15), JobInterrupted("job-0.1", 1))
    assert state.phase is Phase.INTERRUPTED
    again = replace(first, jobs={name: list(job.units) for name, job in state.jobs.items()}, may_split=[])
    state, _ = transition(state, again)
    _, commands = transition(state, WorkerReady("w1"))
    assert commands == [RunJob("job-0.1", 2, "w1", ("member-2", "member-3"))]


# --- what it is made of ------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers())), max_size=30))
def test_a_persistent_map_is_a_dict_whose_past_does_not_change(changes: list[tuple[str, int | None]]) -> None:
    made: PersistentMap[int] = PersistentMap()
    plain: dict[str, int] = {}
    past = []
    for key, value in changes:
        past.append((made, dict(plain)))
        if value is not None:
            made, plain[key] = made.set(key, value), value
        elif key in plain:
            made = made.remove(key)
            del plain[key]
        assert list(made.items()) == list(plain.items()) and list(made) == list(plain)
        assert list(made.values()) == list(plain.values()) and len(made) == len(plain) and made == plain
    assert all(old == before for old, before in past)


def test_removing_what_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        PersistentMap({"a": 1}).remove("b")


@given(st.sets(st.integers(0, 200)), st.integers(0, 200))
def test_an_int_set_is_a_set(numbers: set[int], other: int) -> None:
    made = IntSet.where([number in numbers for number in range(201)])
    assert list(made) == sorted(numbers) and len(made) == len(numbers) and bool(made) == bool(numbers)
    assert set(made.add(other)) == numbers | {other} and set(made.discard(other)) == numbers - {other}
    if numbers:
        assert made.smallest() == min(numbers)
    else:
        with pytest.raises(ValueError, match="empty"):
            made.smallest()


# --- on a simulated cluster --------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"lifetime": 5.0, "commit": 0.1}, {"lifetime": 5.0, "slow": 0.1}])
@pytest.mark.parametrize("split", [False, True])
def test_a_simulated_run_trains_every_member_and_ends_above_its_bound(split: bool, options: dict[str, Any]) -> None:
    cluster = Cluster(Load(120, 12, pack=4, split=split, known=True, **options), seed=3)
    done = cluster.run()
    state = control.replay(done.log)
    assert sorted(state.finished_units()) == sorted(state.required) and len(state.required) == 120
    assert done.makespan >= done.bound * (1 - 1e-9)
    assert bool(done.pieces) == split and bool(done.lost_work) == bool(options)


def test_equal_jobs_on_equal_workers_take_what_the_bound_says() -> None:
    done = Cluster(Load(100, 10, spread=0.0), seed=0).run()
    assert done.makespan == pytest.approx(done.bound) == 10.0


def test_the_longest_first_ends_earlier_than_the_order_of_the_plan() -> None:
    known, unknown = (Cluster(Load(200, 20, known=known), seed=1).run() for known in (True, False))
    assert known.bound == unknown.bound and known.makespan < unknown.makespan
