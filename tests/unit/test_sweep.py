"""A sweep: what is tried, how it is ranked, and what is left behind for the run that follows."""

from __future__ import annotations

import itertools
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at, weights
from sweeps import sweep
from typer.testing import CliRunner

import raylora
from raylora.cli import app
from raylora.engine.model import serialization
from raylora.engine.run.evaluation import Evaluator
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.sweep import sweep_spec
from raylora.engine.training.optimizer import MemberOptimizer
from raylora.errors import Interrupted, RunDirectoryError, SpecError
from raylora.placement.inventory import Inventory, Node
from raylora.spec import dump_spec, read_spec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
TWO_CORES = Inventory((Node("a", 2, 16 * 2**30),), "two cores")
RATES = {"optimization.lr": [1e-5, 5e-3]}


def validation_nll(run: str, name: str) -> float:
    parts = serialization.unpack_predictions(RunStore(run).load_result(f"predictions/{name}"))
    (part,) = [one for one in parts if one.role == "validation"]
    logp_NC = torch.log_softmax(part.values[0].double(), dim=-1)
    return -float(logp_NC.gather(1, part.labels_N[:, None]).mean())


def test_settings_are_ranked_on_the_validation_rows_and_the_best_is_written_out(
    make_spec: Make, tmp_path: Path
) -> None:
    spec = make_spec(optimization__steps=20, ensemble__members=3, baselines__last_layer=1)
    found = raylora.sweep(spec, RATES, local=True)
    assert found.run.endswith("demo-sweep")
    best, other = found.tried
    assert best.settings == {"optimization.lr": 5e-3} and other.settings == {"optimization.lr": 1e-5}
    for one in found.tried:
        assert one.value == pytest.approx(validation_nll(found.run, one.members[0]), rel=1e-6)
        assert one.interval[0] < one.value < one.interval[1] and one.standard_error is None
    assert best.value < other.value
    folder = Path(found.run)
    assert json.loads((folder / "sweep.json").read_text())["tried"][0]["members"] == ["member-001"]
    assert (folder / "sweep.png").stat().st_size > 5000
    follow = read_spec(folder / "best.yaml")
    assert follow.optimization.lr == 5e-3 and follow.ensemble.members == 3 and follow.ensemble.vary is None
    assert follow.digest() == spec.with_settings(best.settings).digest() and follow.name == "demo"
    assert not RunStore(found.run).storage.list("baselines")
    before = weights(found.run, "member-001")
    again = raylora.sweep(spec, RATES, local=True)
    assert again.tried == found.tried
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(found.run, "member-001").items())


@pytest.mark.slow
def test_the_test_rows_have_no_say(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    from raylora.engine.run import sweep as module

    real = module.summarize

    def spied(groups: Any, *arguments: Any, **more: Any) -> Any:
        seen.extend(part.name for group in groups.values() for part in group)
        return real(groups, *arguments, **more)

    monkeypatch.setattr(module, "summarize", spied)
    raylora.sweep(make_spec(), RATES, local=True)
    assert seen == ["validation", "validation"]


@pytest.mark.slow
def test_several_members_of_one_setting_are_averaged(make_spec: Make) -> None:
    found = raylora.sweep(make_spec(), RATES, metric="accuracy", repeats=2, local=True)
    assert [len(one.members) for one in found.tried] == [2, 2]
    assert all(one.interval is None and one.standard_error is not None for one in found.tried)
    assert found.tried[0].value >= found.tried[1].value


@pytest.mark.parametrize(("vary", "members"), [
    (RATES, 2), ({**RATES, "optimization.warmup": [0.0, 0.1, 0.2]}, 6),
    ({"optimization.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, 5),
])
def test_a_sweep_has_as_many_members_as_there_is_to_try(make_spec: Make, vary: Any, members: int) -> None:
    from raylora.spec.vary import RangeSpec

    checked = {key: RangeSpec(**own) if isinstance(own, dict) else own for key, own in vary.items()}
    spec = sweep_spec(make_spec(ensemble__seeds=[4, 9]), checked, samples=5)
    assert spec.ensemble.members == members
    assert spec.ensemble.seeds is None and spec.distill is None


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "a sweep needs something to try"),
    (["--vary", "optimization.lr"], "is no key with values"),
    (["--vary", "optimization.lr=1e-2..1e-4"], "low 0.01 must be below high 0.0001"),
    (["--vary", "optimization.lr=1..x"], "is no range of numbers"),
    (["--vary", "optimization.lr=1..2:square"], "unknown scale 'square'"),
    (["--vary", "optimization.epochs=1,2"], "do not differ in 'optimization.epochs'"),
    (["--vary", "optimization.lr=1e-3,-1"], "lr: Input should be"),
    (["--vary", "optimization.lr=1e-3,1e-2", "--metric", "rmse"], "classification has no rmse"),
])
def test_what_cannot_be_tried_is_refused_and_nothing_is_written(
    make_spec: Make, tmp_path: Path, arguments: list[str], said: str
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(make_spec()))
    result = CliRunner().invoke(app, ["sweep", str(file), "--local", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "runs").exists()


def test_the_command_shows_a_table_and_goes_on_to_the_best(make_spec: Make, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(make_spec()))
    asked = ["sweep", str(file), "--local", "--vary", "optimization.lr=1e-5,5e-3", "--vary",
             "ensemble.regularizers.decay_b=0,0.1"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "validation NLL" in result.output and "best.yaml" in result.output
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert len(found["tried"]) == 4
    assert found["tried"][0]["settings"]["optimization.lr"] == 5e-3
    assert [one["value"] for one in found["tried"]] == sorted(one["value"] for one in found["tried"])


def test_half_of_the_settings_end_at_each_epoch_and_the_others_are_as_if_they_had_been_alone(make_spec: Make) -> None:
    rates = [1e-5, 1e-3, 3e-3, 5e-3]
    spec = make_spec(optimization__steps=None, optimization__epochs=3)
    found = raylora.sweep(spec, {"optimization.lr": rates}, local=True, keep=0.5)
    left = {one.settings["optimization.lr"]: one.left_at for one in found.tried}
    steps = RunStore(found.run).read_json("metrics.json")["training"]["member-003"][-1]["step"]
    assert sorted(left.values(), key=lambda at: at or math.inf) == [steps // 3, steps // 3, 2 * steps // 3, None]
    assert [one.left_at for one in found.tried] == [None, 2 * steps // 3, steps // 3, steps // 3]
    values = [one.value for one in found.tried]
    assert values[2] < values[3]
    histories = RunStore(found.run).read_json("metrics.json")["training"]
    first = {name: next(row["validation_nll"] for row in rows if "validation_nll" in row)
             for name, rows in histories.items()}
    worst = {f"member-{rates.index(rate):03d}" for rate, at in left.items() if at == steps // 3}
    assert worst == set(sorted(first, key=first.__getitem__)[2:])
    assert found.best.ensemble.pruning is None
    alone = make_spec(name="alone", ensemble__members=4, ensemble__vary={"optimization.lr": rates})
    run(alone)
    best = found.tried[0].members[0]
    for name, tensor in weights(found.run, best).items():  # beside fewer others a last bit may be another
        torch.testing.assert_close(tensor, weights(alone, best)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_halved_sweep_that_is_stopped_goes_on_with_those_who_were_left(make_spec: Make) -> None:
    common: dict[str, Any] = {
        "ensemble__members": 4, "ensemble__vary": {"optimization.lr": [1e-5, 1e-3, 3e-3, 5e-3]},
        "ensemble__pruning": {"keep": 0.5}, "optimization__steps": None, "optimization__epochs": 3,
    }
    whole, spec = make_spec(name="whole", **common), make_spec(name="stopped", **common)
    run(whole)
    with pytest.raises(Interrupted):
        run(spec, stop_at(8))
    run(spec)
    assert_bit_equal(members(spec), members(whole))


@pytest.mark.parametrize(("keys", "said"), [
    ({"keep": 1.0}, "--keep: 1 of the settings"), ({"keep": 0.5, "repeats": 2}, "--repeats trains it several times"),
    ({"places": 2}, "nobody leaves a place"), ({"keep": 0.5, "brackets": 2}, "wait for places"),
])
def test_what_cannot_be_pruned_is_said(make_spec: Make, keys: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        raylora.sweep(make_spec(), RATES, local=True, **keys)


def test_two_rules_that_end_members_are_refused_and_so_is_a_metric_that_the_task_lacks(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="both end members"):
        make_spec(ensemble__pruning={}, ensemble__regularizers={"early_stopping": {}})
    with pytest.raises(SpecError, match="ensemble.pruning.metric: classification has no rmse"):
        prepare(make_spec(ensemble__pruning={"metric": "rmse"}, ensemble__regularizers=None))


@pytest.mark.slow
def test_another_sweep_of_one_name_is_not_mixed_with_it(make_spec: Make) -> None:
    raylora.sweep(make_spec(), RATES, local=True)
    with pytest.raises(RunDirectoryError, match="ensemble.vary"):
        raylora.sweep(make_spec(), {"optimization.lr": [1e-5, 6e-3]}, local=True)


def test_nothing_to_try_is_said(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="a sweep needs something to try"):
        raylora.sweep(make_spec(), local=True)


# --- places that are given to others --------------------------------------------------------------------------
RATES_OF_SIX = [5e-3, 1e-5, 3e-3, 2e-5, 1e-3, 4e-3]
PLACED: dict[str, Any] = {
    "ensemble__members": 6, "ensemble__vary": {"optimization.lr": RATES_OF_SIX},
    "ensemble__pruning": {"keep": 0.5, "places": 2}, "optimization__steps": None, "optimization__epochs": 3,
}
EPOCH = 5
"""Steps of one, of 40 rows in micro-batches of 8."""


def rungs(run: Any) -> dict[str, dict[int, float]]:
    """Return the validation NLL of each member by its own step."""
    histories = RunStore.for_spec(run).read_json("metrics.json")["training"]
    return {name: {row["step"]: row["validation_nll"] for row in rows if "validation_nll" in row}
            for name, rows in histories.items()}


def expected_steps(scores: dict[str, dict[int, float]], full: dict[str, dict[int, float]]) -> dict[str, int]:
    """Return how many steps each member takes, by a slow simulation of two places epoch by epoch."""
    waiting, there, seen, taken = sorted(scores), {}, {}, {}
    while waiting or there:
        while waiting and len(there) < 2:
            there[waiting.pop(0)] = 0
        for name in there:
            there[name] += EPOCH
            seen.setdefault(there[name], {})[name] = full[name][there[name]]
        for name, step in list(there.items()):
            best = sorted(seen[step], key=lambda one: (seen[step][one], one))[: math.ceil(len(seen[step]) / 2)]
            if step == 3 * EPOCH or name not in best:
                taken[name] = step
                del there[name]
    return taken


def test_whoever_is_pruned_gives_the_place_to_the_next_and_all_who_came_so_far_are_judged_together(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(name="placed", **PLACED)
    assert prepare(spec).plan.packs == (tuple(f"member-{m:03d}" for m in range(6)),)
    seen: list[set[str]] = []
    held: list[int] = []
    optimizers: list[Any] = []
    begun = MemberOptimizer.__init__

    def noted(self: MemberOptimizer, *arguments: Any, **named: Any) -> None:
        begun(self, *arguments, **named)
        optimizers.extend(map(weakref.ref, self._flat_P))

    def on_step(progress: Any) -> None:
        seen.append(set(progress.losses))
        held.append(sum(one() is not None for one in optimizers))

    monkeypatch.setattr(MemberOptimizer, "__init__", noted)
    run(spec, on_step)
    assert max(map(len, seen)) == 2  # never more in a forward
    assert max(held) == held[0]  # nor with an optimizer
    alone = make_spec(name="alone", **{**PLACED, "ensemble__pruning": None})
    run(alone)
    scores, full = rungs(spec), rungs(alone)
    for name, values in scores.items():  # each is what it would have been beside others
        assert values == pytest.approx({step: full[name][step] for step in values}, rel=1e-3)
    taken = {name: max(values) for name, values in scores.items()}
    assert taken == expected_steps(scores, full) and set(taken.values()) >= {EPOCH, 3 * EPOCH}
    assert len(seen) < sum(taken.values())  # some trained beside each other
    facts = {name: json.loads(RunStore.for_spec(spec).load_result(f"members/{name}")["member.json"]) for name in taken}
    assert {name: one["steps"] for name, one in facts.items()} == taken
    assert {name: one["stopped_at"] for name, one in facts.items()} == {
        name: None if steps == 3 * EPOCH else steps for name, steps in taken.items()
    }


@pytest.mark.parametrize("every", sweep([None, 2], always=[2]))
def test_a_sweep_with_places_goes_on_where_it_was_stopped_bit_for_bit(make_spec: Make, every: int | None) -> None:
    changes = PLACED
    if every:  # and members of two ranks, whose matrices multiply beside each other
        own = [{"optimization.lr": rate, "adapter.rank": 2 + 2 * (m % 2)} for m, rate in enumerate(RATES_OF_SIX)]
        changes = {**PLACED, "checkpointing": {"every_steps": every}, "ensemble__vary": own}
    whole, spec = make_spec(name="whole", **changes), make_spec(name="stopped", **changes)
    total = sum(1 for _ in steps_of(whole))
    for step in (EPOCH, 2 * EPOCH + 1, 3 * EPOCH, total - 1):
        with pytest.raises(Interrupted):
            run(spec, stop_at(step))
    run(spec)
    assert_bit_equal(members(spec), members(whole))
    assert rungs(spec) == rungs(whole)


def test_a_sweep_with_places_that_is_killed_anywhere_comes_out_the_same(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, spec = make_spec(name="whole", **PLACED), make_spec(name="killed", **PLACED)
    run(whole)
    for owner, method, call in [  # within a commit of two members, and between two packs of predictions
        (RunStore, "commit_checkpoint", 2), (RunStore, "commit_checkpoint", 4), (Evaluator, "evaluate", 2),
        (Evaluator, "evaluate", 2),
    ]:
        real, calls = getattr(owner, method), itertools.count(1)

        def killed(*arguments: Any, real: Any = real, calls: Any = calls, call: int = call) -> Any:
            if next(calls) == call:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, method, killed)
            run(spec)
    assert 0 < len(RunStore.for_spec(spec).storage.list("members")) < 6  # some are finished, the others are not
    trained: list[int] = []
    run(spec, lambda progress: trained.append(progress.done))
    assert trained == []
    assert_bit_equal(members(spec), members(whole))
    for name in members(whole):
        one, two = (RunStore.for_spec(each).load_result(f"predictions/{name}") for each in (spec, whole))
        assert one == two


def steps_of(spec: Any) -> list[int]:
    """Train a run and return the steps that its pack has taken."""
    seen: list[int] = []
    run(spec, lambda progress: seen.append(progress.done))
    return seen


@pytest.mark.slow
def test_a_member_that_fails_gives_its_place_away_and_counts_for_nobody(make_spec: Make) -> None:
    changes = {**PLACED, "ensemble__members": 4, "ensemble__min_members": 3,
               "ensemble__vary": {"optimization.lr": [1e30, 5e-3, 1e-5, 3e-3]}}
    whole, spec = make_spec(name="whole", **changes), make_spec(name="stopped", **changes)
    seen: list[set[str]] = []
    metrics = run(whole, lambda progress: seen.append(set(progress.losses)))
    assert metrics["run"]["phase"] == "degraded" and len(members(whole)) == 3
    assert seen[EPOCH - 1] == {"member-001"} and seen[EPOCH] == {"member-001", "member-002"}
    first = {name: rows[EPOCH] for name, rows in rungs(whole).items()}
    for name in first:  # each comes after the one before it
        so_far = sorted((one for one in first if one <= name), key=first.__getitem__)
        goes_on = name in so_far[: math.ceil(len(so_far) / 2)]
        assert (max(rungs(whole)[name]) > EPOCH) is goes_on
    for step in (EPOCH - 1, EPOCH + 1):
        with pytest.raises(Interrupted):
            run(spec, stop_at(step))
    run(spec)
    assert_bit_equal(members(spec), members(whole))


@pytest.mark.slow
def test_a_member_that_is_lost_comes_out_of_its_bracket_again(make_spec: Make) -> None:
    spec = make_spec(name="lost", **PLACED)
    run(spec)
    before = members(spec)
    RunStore.for_spec(spec).storage.delete("members/member-003")
    raylora.repair_run(RunStore.for_spec(spec).uri, local=True)
    assert_bit_equal(members(spec), before)
    more = spec.model_copy(update={"ensemble": spec.ensemble.model_copy(update={"members": 8})})
    jobs = prepare(more).jobs  # those who come later have no part in what was decided
    assert [len(units) for units in jobs.values()] == [6, 2] and jobs["job-01"] == ["member-006", "member-007"]
    longer = spec.model_copy(update={"optimization": spec.optimization.model_copy(update={"epochs": 4.0})})
    with pytest.raises(RunDirectoryError, match="members began one after another, where others had left"):
        prepare(longer)


def test_brackets_do_not_depend_on_how_many_workers_there_are(make_spec: Make) -> None:
    keys = {**PLACED, "ensemble__pruning": {"keep": 0.5, "places": 2, "brackets": 2}}
    spec = make_spec(name="brackets", **keys)
    odd, even = (tuple(f"member-{m:03d}" for m in range(first, 6, 2)) for first in (0, 1))
    for workers in (1, 2):
        plan = prepare(spec.model_copy(update={
            "placement": spec.placement.model_copy(update={"workers": workers, "split_last": True})
        }), TWO_CORES).plan
        assert plan.packs == (odd, even)
    run(spec)
    one = make_spec(name="one", **{
        **PLACED, "ensemble__members": 3, "ensemble__seeds": [0, 2, 4],
        "ensemble__vary": {"optimization.lr": RATES_OF_SIX[::2]},
    })
    run(one)
    found, own = members(spec), members(one)
    for m in range(3):  # a bracket is what it would be in a run of its own
        assert_bit_equal(found[f"member-{2 * m:03d}"], own[f"member-{m:03d}"])


@pytest.mark.parametrize(("changes", "said"), [
    ({"optimization__accumulation": 2}, "no whole number of steps of 2"),
    ({"adapter": {"kind": "full"}}, "ensemble.pruning.places"),
    ({"baselines": {"checkpoints": 2}}, "need a member 0 that trains to the end"),
    ({"placement__data_parallel": 2}, "one worker has all of a bracket"),
])
def test_places_that_cannot_be_are_refused(make_spec: Make, changes: Any, said: str) -> None:
    vary = {"ensemble__vary": None} if "adapter" in changes else {}
    with pytest.raises((SpecError, ValueError), match=said):
        prepare(make_spec(**{**PLACED, **vary, **changes}))


def test_a_spec_without_places_keeps_its_digest(make_spec: Make) -> None:
    spec = make_spec(ensemble__pruning={"keep": 0.5})
    assert spec.identity()["ensemble"]["pruning"] == {"metric": "nll", "keep": 0.5, "every_epochs": 1}
    placed = make_spec(ensemble__pruning={"keep": 0.5, "places": 2})
    assert placed.digest() != spec.digest()
