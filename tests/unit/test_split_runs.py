"""Real runs whose last pack is split over two workers of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at

from raylora import control
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import Prepared, prepare
from raylora.engine.run.roster import read_state
from raylora.engine.run.run_status import RunStatus
from raylora.errors import Interrupted
from raylora.progress import Activity
from raylora.store.run_store import RunStore

MakeSpec = Callable[..., Any]


class TwoWorkers:
    """A planned run that is begun with two workers, which take turns in this process."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prepared, name)

    def start_event(self, workers: list[str]) -> control.RunStarted:
        return self.prepared.start_event(["worker-0", "worker-1"])


def run_on_two(spec: Any, on_step: Callable[[Any], None] = lambda progress: None) -> Any:
    def on_status(status: RunStatus) -> None:
        for job in status.jobs.values():
            running = job.status is control.JobState.RUNNING and job.progress is not None
            if running and job.progress.activity is Activity.TRAINING:
                on_step(job.progress)

    return run_in_process(TwoWorkers(prepare(spec)), on_status)


@pytest.fixture
def in_one_pack(make_spec: MakeSpec) -> MakeSpec:
    """Return a function to the spec of four members that are planned into one pack."""
    def make(name: str, split_last: bool) -> Any:
        return make_spec(
            name=name, ensemble__members=4, placement__workers=1, placement__members_per_worker=4,
            placement__split_last=split_last,
        )

    return make


def packs(spec: Any) -> dict[str, tuple[str, ...]]:
    return {name: job.units for name, job in read_state(RunStore.for_spec(spec)).jobs.items()}


def test_a_split_run_has_its_members_to_tolerance_and_its_packs_on_record(in_one_pack: MakeSpec) -> None:
    whole, split = in_one_pack("whole", False), in_one_pack("split", True)
    run(whole)
    run_on_two(split)
    assert packs(split) == {"job-00.0": ("member-000", "member-001"), "job-00.1": ("member-002", "member-003")}
    expected = members(whole)
    for name, tensors in members(split).items():
        for key, value in tensors.items():
            torch.testing.assert_close(value, expected[name][key], rtol=1e-4, atol=1e-5)
    assert prepare(split).jobs == {name: list(units) for name, units in packs(split).items()}  # nobody is repacked


def test_by_default_two_workers_do_not_change_a_bit(in_one_pack: MakeSpec) -> None:
    spec, again = in_one_pack("one", False), in_one_pack("two", False)
    run(spec)
    run_on_two(again)
    assert list(packs(again)) == ["job-00"]
    assert_bit_equal(members(again), members(spec))


def test_a_split_run_that_was_interrupted_goes_on_with_its_pieces(in_one_pack: MakeSpec) -> None:
    straight, stopped = in_one_pack("straight", True), in_one_pack("stopped", True)
    run_on_two(straight)
    with pytest.raises(Interrupted):
        run_on_two(stopped, stop_at(2))
    resumed = prepare(stopped)
    assert resumed.kept == packs(stopped) == packs(straight)
    assert list(resumed.jobs) == ["job-00.0", "job-00.1"]
    assert resumed.start_event(["worker-0"]).may_split == []
    run_on_two(stopped)
    assert_bit_equal(members(stopped), members(straight))


def test_the_start_says_how_long_jobs_take(make_spec: MakeSpec) -> None:
    prepared = prepare(make_spec(ensemble__members=3, placement__workers=1, placement__members_per_worker=2))
    event = prepared.start_event(["worker-0"])
    assert event.costs == {"job-00": 2.0 * prepared.total_steps, "job-01": 1.0 * prepared.total_steps}
    assert event.may_split == []
