"""Trials of Ray Tune in one run: which run it is, what each of them is told, and who leaves it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members, run, weights

from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.member_plan import member_plans_of
from raylora.errors import Interrupted, SpecError
from raylora.spec import RunSpec
from raylora.spec.vary import with_settings
from raylora.store.run_store import RunStore
from raylora.trials.epochs import Epochs
from raylora.trials.packs import pack_spec

Make = Callable[..., Any]
RATES = [{"optimization.lr": 1e-5}, {"optimization.lr": 5e-3}]


def pack_of(spec: RunSpec, settings: Any) -> RunSpec:
    return RunSpec.model_validate(pack_spec(spec, settings))


def test_each_trial_has_the_specs_members_and_seeds(make_spec: Make) -> None:
    spec = make_spec(ensemble__members=2, ensemble__seed=7, baselines__last_layer=2)
    plans = member_plans_of(pack_of(spec, RATES))
    assert [(plan.seed, plan.optimization.lr) for plan in plans] == [(7, 1e-5), (8, 1e-5), (7, 5e-3), (8, 5e-3)]


def test_the_same_trials_are_the_same_run_and_others_another(make_spec: Make) -> None:
    spec = make_spec(name="a-name-that-is-as-long-as-names-can-be-0")
    one, again, other = pack_of(spec, RATES), pack_of(spec, [dict(own) for own in RATES]), pack_of(spec, RATES[:1])
    assert one == again and one.run_name() != other.run_name() and len(one.run_name()) <= 40


def test_what_would_be_said_twice_is_refused(make_spec: Make) -> None:
    with pytest.raises(SpecError, match=r"ensemble\.vary: in a pack of trials it is Tune that says it"):
        pack_spec(make_spec(ensemble__vary=RATES), RATES)
    with pytest.raises(SpecError, match=r"ensemble\.pruning: "):
        pack_spec(make_spec(ensemble__vary=None, ensemble__pruning={"keep": 0.5}), RATES)
    with pytest.raises(ValueError, match="members of one run do not differ in 'optimization.epochs'"):
        pack_of(make_spec(ensemble__pruning=None), [{"optimization.epochs": 2}])


def test_members_of_one_seed_and_one_setting_are_one_member(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="seeds repeat"):
        make_spec(ensemble__seeds=[3, 3], ensemble__vary=[RATES[0], RATES[0]])
    assert make_spec(ensemble__seeds=[3, 3], ensemble__vary=RATES).ensemble.member_seeds() == [3, 3]


def test_who_is_ended_from_outside_leaves_after_that_epoch_and_everyone_is_what_they_would_be_alone(
    make_spec: Make,
) -> None:
    spec = make_spec(name="trial", ensemble__members=1, optimization__steps=None, optimization__epochs=3)
    told: list[list[dict[str, Any]]] = [[], []]
    boards = [Epochs(told[0].append, ["member-000"]), Epochs(told[1].append, ["member-001"])]
    pack = pack_of(spec, RATES)

    def tell(status: Any) -> None:
        for board in boards:
            board(status)

    def leaving() -> list[str]:
        assert len(told[0]) == min(2, len(told[1]))  # who is asked has seen the epoch's numbers
        return ["member-000"] if len(told[0]) == 2 else []

    def stops(status: Any) -> None:
        if len(told[1]) == 2 and any(job.progress and job.progress.done == 12 for job in status.jobs.values()):
            os.kill(os.getpid(), signal.SIGTERM)

    metrics = run_in_process(prepare(pack), tell, leaving)
    for board in boards:
        board.end(run="here")
    first, second = metrics["members"]
    of_epoch = metrics["training"]["member-001"][-1]["step"] // 3
    assert (first["stopped_at"], second["stopped_at"]) == (2 * of_epoch, None)
    assert [row["step"] for row in told[0]] == [of_epoch, 2 * of_epoch, 2 * of_epoch]
    assert [row["step"] for row in told[1]] == [of_epoch, 2 * of_epoch, 3 * of_epoch, 3 * of_epoch]
    assert told[0][-1] == {**told[0][-2], "run": "here"}
    rows = [row for row in metrics["training"]["member-001"] if "validation_nll" in row]
    assert [row["validation_nll"] for row in rows] == [one["validation_nll"] for one in told[1][:3]]
    alone = RunSpec.model_validate(with_settings(spec.model_dump(mode="json"), RATES[1]))
    run(alone)
    assert_bit_equal(weights(alone), weights(pack, "member-001"))
    before = members(pack)
    shutil.rmtree(RunStore.for_spec(pack).uri)
    told[0].clear(), told[1].clear()
    boards[:] = [Epochs(told[0].append, ["member-000"]), Epochs(told[1].append, ["member-001"])]
    with pytest.raises(Interrupted):
        run_in_process(prepare(pack), lambda status: (tell(status), stops(status)), leaving)
    assert run(pack)["members"][0]["stopped_at"] == 2 * of_epoch  # and nobody says it again
    assert_bit_equal(members(pack), before)
