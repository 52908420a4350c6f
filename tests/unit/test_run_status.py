"""What a run says of itself: one typed status for a person, a file and another process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from run_helpers import run, stop_at

from raylora import control
from raylora.display.status import job_line
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.run_status import JobStatus, RunStatus, StatusBoard
from raylora.engine.training import member_state
from raylora.errors import Interrupted
from raylora.progress import Activity, BlockDone, Progress, RowCounter, Throttle


def training(done: int, total: int = 10, seconds: float = 2.0) -> Progress:
    return Progress(Activity.TRAINING, done, total, 1, seconds, {"member-000": 0.5}, 100)


def begun() -> control.State:
    start = control.RunStarted(
        jobs={"job-00": ["member-000"], "job-01": ["member-001"]}, workers=["worker-0"],
        required=["member-000", "member-001"], min_members=2, max_failures=1,
    )
    state, _ = control.transition(control.State(), start)
    return control.transition(state, control.WorkerReady("worker-0"))[0]


def test_a_status_survives_its_record() -> None:
    board = StatusBoard("films")
    board.preparation = BlockDone(1, 6, 2.0, 10.0, 0.03)
    board.report("job-00", training(4))
    status = board.status(begun())
    assert RunStatus.from_record(json.loads(json.dumps(status.record()))) == status
    assert status.jobs["job-00"].progress == training(4) and status.jobs["job-01"].progress is None


def test_statuses_that_were_given_out_stay_and_new_ones_have_what_was_reported_since() -> None:
    board, state = StatusBoard("films"), begun()
    first = board.status(state)
    board.report("job-00", training(4))
    second = board.status(state)
    assert first.jobs["job-00"].progress is None and second.jobs["job-00"].progress == training(4)
    third = board.status(control.transition(state, control.JobFinished("job-00", 1))[0])
    assert third.jobs["job-00"].status is control.JobState.FINISHED
    assert second.jobs["job-00"].status is control.JobState.RUNNING
    fresh = StatusBoard("films")
    fresh.report("job-00", training(4))
    assert fresh.status(state).jobs == second.jobs


def test_the_time_left_counts_the_jobs_that_have_not_begun() -> None:
    board, state = StatusBoard("films"), begun()
    assert board.status(state).eta_s is None
    board.report("job-00", training(4))
    assert board.status(state).eta_s == pytest.approx((6 + 10) * 2.0)
    board.report("job-00", Progress(Activity.EVALUATING, 30, 120, 10, 1.0))
    status = board.status(state)
    assert status.eta_s == pytest.approx(9.0 + 10 * 2.0)  # the other job at the pace that was seen
    assert status.jobs["job-00"].left_s == pytest.approx(9.0)


def test_jobs_that_come_later_have_a_pace_of_their_own() -> None:
    board, state = StatusBoard("films"), control.State()
    first = control.RunStarted(
        {"job-00": ["member-000"], "answers-000": ["a"], "answers-001": ["b"]}, ["w0"], ["member-000"], 1, 0,
        later=["answers-000", "answers-001"],
    )
    for event in (first, control.WorkerReady("w0")):
        state, _ = control.transition(state, event)
    board.report("job-00", training(4))
    assert board.status(state).eta_s == pytest.approx(6 * 2.0)
    state, _ = control.transition(state, control.JobFinished("job-00", 1))
    board.report("answers-000", Progress(Activity.ANSWERING, 10, 32, 10, 5.0))
    status = board.status(state)
    assert status.eta_s == pytest.approx((22 + 32) * 0.5) and status.jobs["answers-001"].later
    assert RunStatus.from_record(json.loads(json.dumps(status.record()))) == status


def test_rows_are_counted_over_sets_and_reports_are_added_up() -> None:
    seen: list[Progress] = []
    counter = RowCounter(Activity.EVALUATING, 7, seen.append)
    for done, of in ((2, 4), (4, 4), (3, 3)):
        counter(done, of)
    assert [(p.done, p.total, p.new) for p in seen] == [(2, 7, 2), (4, 7, 2), (7, 7, 3)]
    throttle = Throttle()
    passed = [throttle.merged(training(step)) for step in (1, 2, 3)]
    assert passed[0] == training(1) and passed[1:] == [None, None]
    last = throttle.merged(training(10))
    assert last is not None and (last.new, last.seconds, last.tokens) == (3, 6.0, 300)
    other = throttle.merged(Progress(Activity.EVALUATING, 1, 9, 1, 0.1))
    assert other is not None and other.new == 1  # another activity does not wait for the clock


def test_lines_say_what_a_job_is_at() -> None:
    job = JobStatus(["member-000"], "running", 1, 0, training(4))
    assert job_line("job-00", job) == "job-00 step 4/10 loss 0.500 50 tokens/s, about 12 s left"
    rows = JobStatus(["rows"], "running", 1, 0, Progress(Activity.MAKING_TARGETS, 64, 256, 32, 4.0))
    assert job_line("shard", rows) == "shard making targets 64/256 rows, about 24 s left"


def test_a_run_in_this_process_tells_every_step_and_every_evaluated_row(make_spec: Callable[..., Any]) -> None:
    seen: list[RunStatus] = []
    spec = make_spec()
    prepared = prepare(spec)
    run_in_process(prepared, seen.append)
    of_job = [status.jobs["job-00"].progress for status in seen if "job-00" in status.jobs]
    steps = [p.done for p in of_job if p is not None and p.activity is Activity.TRAINING]
    assert sorted(set(steps)) == list(range(1, prepared.total_steps + 1))
    rows = [p for p in of_job if p is not None and p.activity is Activity.EVALUATING]
    evaluated = sum(len(loaded.examples) for loaded in prepared.sets.all()) - len(prepared.sets.train.examples)
    assert rows[-1].done == rows[-1].total == evaluated
    assert seen[-1].phase is control.Phase.SUCCEEDED and seen[-1].run == spec.run_name()


@pytest.mark.slow
def test_a_resumed_job_builds_each_optimizer_once(
    make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    with pytest.raises(Interrupted):
        run(spec, stop_at(2))
    built: list[int] = []
    real = member_state.MemberOptimizer

    def counted(*arguments: Any) -> Any:
        built.append(1)
        return real(*arguments)

    monkeypatch.setattr(member_state, "MemberOptimizer", counted)
    run(spec)
    assert len(built) == spec.ensemble.members
