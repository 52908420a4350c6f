"""Members that differ in more than a seed: in what they may, and that each is what it would be without the others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at, weights

from raylora.adapters.base import HEAD
from raylora.engine.run.finished_members import adapters_of, read_members
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.member_plan import member_plans_of
from raylora.errors import BaseError, Interrupted, RunDirectoryError, SpecError
from raylora.report.entries import member_entries
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
RATES = {"optimization.lr": [1e-3, 5e-3]}


# --- what is said ---------------------------------------------------------------------------------------
def test_a_grid_gives_every_combination_in_turn_and_goes_on_with_it_when_a_run_grows(make_spec: Make) -> None:
    vary = {**RATES, "ensemble.regularizers.decay_b": [0.0, 0.1]}
    found = make_spec(ensemble__members=8, ensemble__vary=vary).ensemble.member_settings()
    assert [tuple(one.values()) for one in found[:4]] == [(0.0, 1e-3), (0.0, 5e-3), (0.1, 1e-3), (0.1, 5e-3)]
    assert found[4:] == found[:4]


def test_a_range_is_drawn_from_by_the_members_own_seed(make_spec: Make) -> None:
    vary = {"optimization.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "optimization.warmup": {"low": 0, "high": 0.5}}
    spec = make_spec(ensemble__members=200, ensemble__vary=vary)
    found = spec.ensemble.member_settings()
    later = make_spec(ensemble__members=3, ensemble__seed=7, ensemble__vary=vary)
    assert later.ensemble.member_settings() == found[7:10]
    rates = [one["optimization.lr"] for one in found]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates) and len(set(rates)) == 200
    below = sum(rate < 1e-3 for rate in rates)  # half of the decades
    assert 70 < below < 130
    warmups = [one["optimization.warmup"] for one in found]
    assert abs(sum(warmups) / 200 - 0.25) < 0.03
    logs = [math.log(rate) for rate in rates]  # the two are drawn apart
    mean = sum(logs) / 200
    shared = sum((a - mean) * (b - 0.25) for a, b in zip(logs, warmups, strict=True)) / 200
    assert abs(shared) < 0.05


def test_a_list_says_of_each_member_what_it_has(make_spec: Make) -> None:
    own = [{}, {"optimization.lr": 1e-4, "optimization.schedule": "constant"}]
    plans = member_plans_of(make_spec(ensemble__vary=own))
    assert [plan.optimization.lr for plan in plans] == [0.005, 1e-4]
    assert [plan.optimization.schedule for plan in plans] == ["linear", "constant"]
    assert [dict(plan.settings) for plan in plans] == own


@pytest.mark.parametrize(("vary", "said"), [
    ({"optimization.epochs": [1, 2]}, "do not differ in 'optimization.epochs'"),
    ({"adapter.rank": [2, 0]}, "member 1 with {'adapter.rank': 0}: adapter.rank: Input should"),
    ({"optimization.lr": [1e-3, 2e-3, 3e-3]}, "3 combinations, and there are 2 members: set ensemble.members to 3"),
    ({"optimization.lr": []}, "optimization.lr has no values"),
    ({"optimization.lr": [1e-3, -1]}, "member 1 with {'optimization.lr': -1}: optimization.lr: Input should be"),
    ({"optimization.lr": {"low": 2, "high": 1}}, "low 2 must be below high 1"),
    ({"optimization.lr": {"low": 0, "high": 1, "log": True}}, "needs low above 0"),
    ({"ensemble.regularizers.decay_a": [0, 1e6]}, "lr * decay_a = 5e+03 >= 1"),
    ([{"optimization.lr": 1e-3}], "what 1 members have, and there are 2"),
    ({}, "says nothing"),
])
def test_what_makes_no_sense_is_refused_by_name(make_spec: Make, vary: Any, said: str) -> None:
    with pytest.raises(SpecError) as error:
        make_spec(ensemble__vary=vary)
    assert said in str(error.value)


def test_a_metric_that_the_task_lacks_is_refused_in_a_members_own_rule_too(make_spec: Make) -> None:
    rules = [{}, {"ensemble.regularizers.early_stopping": {"metric": "rmse"}}]
    with pytest.raises(SpecError, match="early_stopping.metric: classification has no rmse"):
        prepare(make_spec(ensemble__vary=rules))


def test_a_spec_without_it_keeps_its_digest(make_spec: Make) -> None:
    spec = make_spec()
    assert "vary" not in spec.identity()["ensemble"]
    assert make_spec(ensemble__vary=RATES).digest() != spec.digest()
    assert "data_fraction" not in spec.identity()["ensemble"]
    assert make_spec(ensemble__vary=None, ensemble__data_fraction=0.5).digest() != spec.digest()


# --- what is trained ------------------------------------------------------------------------------------
def test_members_of_other_rates_share_a_forward_and_equal_those_of_a_run_of_their_rate_bit_for_bit(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    vary = {**RATES, "ensemble.regularizers.decay_b": [0.0, 0.1]}
    varied = make_spec(name="varied", ensemble__members=4, ensemble__vary=vary, optimization__steps=12)
    prepared = prepare(varied)
    assert [len(units) for units in prepared.jobs.values()] == [4]
    assert any("members differ in ensemble.regularizers.decay_b (0.0, 0.1) and" in note for note in prepared.notes)
    metrics = run(varied)
    found = members(varied)
    for m, settings in enumerate(varied.ensemble.member_settings()):
        decay, lr = settings.values()
        alike = make_spec(name=f"alike-{m}", ensemble__vary=None, optimization__lr=lr,
                          ensemble__regularizers={"decay_b": decay})
        trained(alike)
        assert_bit_equal(found[f"member-{m:03d}"], weights(alike, f"member-{m:03d}"))
        make_spec(ensemble__regularizers=None)
    store = RunStore.for_spec(varied)
    facts = [store.load_result(f"members/member-{m:03d}")["member.json"] for m in range(4)]
    assert b'"optimization.lr": 0.005' in facts[1]
    assert [one["settings"]["optimization.lr"] for one in metrics["members"]] == [1e-3, 5e-3, 1e-3, 5e-3]
    assert member_entries(metrics)[3].label == "Member 3: decay_b 0.1, lr 0.005"
    rates = {max(row["lr"] for row in metrics["training"][f"member-{m:03d}"] if "lr" in row) for m in range(4)}
    assert rates == {1e-3, 5e-3}


def test_members_that_learn_from_other_samples_of_the_rows_equal_those_of_a_run_of_their_share_bit_for_bit(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    vary = [{}, {"ensemble.data_fraction": 0.3}, {"ensemble.bootstrap": True, "ensemble.data_fraction": 0.5}]
    varied = make_spec(name="parted", ensemble__members=3, ensemble__vary=vary, optimization__steps=12)
    assert [len(units) for units in prepare(varied).jobs.values()] == [3]
    run(varied)
    found = members(varied)
    rows = {m: plan.sample_of(40) for m, plan in enumerate(member_plans_of(varied))}
    assert rows[0] is None and rows[1].size == 12 and rows[2].size == 20 and rows[2].with_replacement
    for m, settings in enumerate(vary):
        own = {key.replace(".", "__"): value for key, value in settings.items()}
        alike = make_spec(name=f"part-{m}", ensemble__vary=None, **own)
        trained(alike)
        assert_bit_equal(found[f"member-{m:03d}"], weights(alike, f"member-{m:03d}"))


def test_each_member_ends_by_its_own_rule(make_spec: Make, trained: Callable[[Any], str]) -> None:
    rules = [{}, {"ensemble.regularizers.early_stopping": {"patience": 1}, "optimization.lr": 0.3}]
    spec = make_spec(ensemble__vary=rules, optimization__steps=None, optimization__epochs=6)
    metrics = run(spec)
    stops = [one["stopped_at"] for one in metrics["members"]]
    assert stops[0] is None and stops[1] is not None


def test_what_changes_the_forward_is_packed_apart(make_spec: Make) -> None:
    vary = {"ensemble.regularizers.kl.beta": [0.1, 0.5], "optimization.lr": [1e-3, 5e-3]}
    spec = make_spec(ensemble__members=4, ensemble__vary=vary)
    prepared = prepare(spec)
    assert sorted(map(tuple, prepared.jobs.values())) == [("member-000", "member-001"), ("member-002", "member-003")]
    assert any("kl.beta share no forward" in note for note in prepared.notes)
    run(spec)
    alike = make_spec(name="alike", ensemble__vary=None, ensemble__regularizers={"kl": {"beta": 0.5}},
                      placement__members_per_worker=2)
    assert [plan.regularizers.kl.beta for plan in member_plans_of(spec)[2:]] == [0.5, 0.5]
    assert alike.optimization.lr == 0.005
    run(alike)
    assert_bit_equal(weights(spec, "member-003"), weights(alike, "member-003"))


@pytest.mark.slow
def test_dropout_of_its_own_is_trained_with_and_resumed(make_spec: Make) -> None:
    vary = {"adapter.dropout": [0.0, 0.3]}
    whole = make_spec(name="whole", ensemble__vary=vary)
    run(whole)
    spec = make_spec(name="stopped", ensemble__vary=vary, checkpointing={"every_steps": 1})
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    run(spec)
    assert_bit_equal(members(spec), members(whole))


SMALL_MOS = {"kind": "mos", "equivalent_rank": 2, "rank": 3, "private_rank": 1, "shards": 4}
KINDS = [
    {"adapter.rank": 2}, {"adapter.rank": 4, "adapter.alpha": 1.0}, {"adapter": SMALL_MOS},
    {"adapter.rank": 2, "optimization.lr": 1e-3}, {"adapter.dropout": 0.3, "adapter.rank": 2},
]


STANDING = {"optimization.lr": 1e-12, "ensemble.regularizers.early_stopping": {"patience": 1}}
TEXTS = ["A good film.", "A bad film, and far too long."]


def assert_says_the_same(m: int, *specs: Any) -> None:
    """Compare what member m of two finished runs predicts when it is asked."""
    stores = map(RunStore.for_spec, specs)
    asked = [load_ensemble(store.uri, calibrated=False).predict(TEXTS) for store in stores]
    one, two = ([answer.member_probabilities[m] for answer in answers] for answers in asked)
    assert all(row == pytest.approx(other, abs=1e-6) for row, other in zip(one, two, strict=True))


def test_members_of_several_ranks_alphas_and_kinds_share_a_forward_and_equal_those_among_their_like(
    make_spec: Make,
) -> None:
    varied = make_spec(name="kinds", ensemble__members=5, ensemble__vary=KINDS, optimization__steps=8)
    prepared = prepare(varied)
    order = ["member-000", "member-003", "member-001", "member-002", "member-004"]  # those of one adapter together
    assert list(map(list, prepared.jobs.values())) == [order]
    metrics = run(varied)
    found = members(varied)
    assert metrics["run"]["adapter"] == "LoRA and MoS"
    label = "Member 2: adapter mos (equivalent_rank 2, private_rank 1, rank 3, shards 4)"
    assert member_entries(metrics)[2].label == label
    assert any("adapter (mos (equivalent_rank 2" in note for note in prepared.notes)
    assert found["member-001"]["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"].shape[0] == 4
    for m, own in enumerate(KINDS):
        alike = make_spec(name=f"kind-{m}", ensemble__members=5, ensemble__vary=[own] * 5)
        assert len(prepare(alike).jobs) == 1
        run(alike)
        assert_bit_equal(found[f"member-{m:03d}"], weights(alike, f"member-{m:03d}"))
        assert_says_the_same(m, varied, alike)
    store, names = RunStore.for_spec(varied), [f"member-{m:03d}" for m in range(5)]
    alone = read_members(varied, store, load_ensemble(store.uri).base, names[2:3], names)
    assert {name.partition("#")[0] for name in alone if not name.startswith(HEAD)} == {"2"}  # as a pack of a teacher
    assert adapters_of(varied, names)[2].spec.kind == "mos"
    exported = export_run(store.uri, "peft-lora", members=names[1:3])
    kinds = [json.loads((Path(one.folder) / "adapter_config.json").read_text()) for one in exported]
    assert [kind["r"] for kind in kinds] == [4, 3] and kinds[0]["lora_alpha"] == 1.0


ELSEWHERE = [
    {}, {"adapter.target_modules": ["value", "output.dense"], "adapter.dropout": 0.3}, {"adapter.layers": {"last": 1}},
    {"adapter.target_modules": "all-linear"}, {"adapter": {**SMALL_MOS, "target_modules": "all-linear"}},
]


def test_members_in_other_layers_share_a_forward_and_equal_those_in_their_own(make_spec: Make) -> None:
    varied = make_spec(name="elsewhere", ensemble__members=5, ensemble__vary=ELSEWHERE, optimization__steps=8)
    prepared = prepare(varied)
    assert [len(units) for units in prepared.jobs.values()] == [5]
    run(varied)
    found = members(varied)
    store = RunStore.for_spec(varied)
    exported = export_run(store.uri, "peft-lora", members=["member-001", "member-002", "member-004"])
    targets = [json.loads((Path(one.folder) / "adapter_config.json").read_text())["target_modules"] for one in exported]
    assert {name.rpartition(".")[2] for name in targets[0]} == {"value", "dense"} and len(targets[0]) == 6
    assert all("layer.1" in name for name in targets[1]) and targets[2] == ["dense", "key", "query", "value"]
    for m, own in list(enumerate(ELSEWHERE))[1:]:
        alike = make_spec(name=f"at-{m}", ensemble__members=5, ensemble__vary=[own] * 5)
        run(alike)
        one, two = found[f"member-{m:03d}"], weights(alike, f"member-{m:03d}")
        if m == 2:  # alone the block below it runs once for all members; here it is adapted by others
            assert one.keys() == two.keys() and not any("layer.0" in name for name in one)
            assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)
        else:
            assert_bit_equal(one, two)
        assert_says_the_same(m, varied, alike)


def test_layers_that_a_model_lacks_are_refused_for_the_member_that_wants_them(make_spec: Make) -> None:
    with pytest.raises(BaseError, match="'valeu' matches no linear layer of this model"):
        prepare(make_spec(ensemble__vary={"adapter.target_modules": ["query", ["valeu"]]}))


@pytest.mark.slow
def test_members_of_several_kinds_end_on_their_own_and_are_resumed_together(make_spec: Make) -> None:
    rules = [*KINDS[:3], {**KINDS[3], **STANDING}]
    common = {"ensemble__members": 4, "ensemble__vary": rules, "optimization__steps": None, "optimization__epochs": 6}
    whole = make_spec(name="whole", **common)
    metrics = run(whole)
    assert [one["name"] for one in metrics["members"]] == [f"member-{m:03d}" for m in range(4)]
    stops = [one["stopped_at"] for one in metrics["members"]]
    assert stops[3] is not None and stops[:3] == [None] * 3
    spec = make_spec(name="stopped", **common, checkpointing={"every_steps": 1})
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    run(spec)
    assert_bit_equal(members(spec), members(whole))


def test_kinds_without_layers_of_their_own_are_not_put_beside_others(make_spec: Make) -> None:
    with pytest.raises(BaseError, match="members of adapter.kind full have no place beside others"):
        prepare(make_spec(ensemble__vary=[{}, {"adapter": {"kind": "full"}}]))


@pytest.mark.slow
def test_a_finished_run_grows_along_its_grid_and_is_not_given_another(make_spec: Make) -> None:
    spec = make_spec(ensemble__vary=RATES)
    run(spec)
    with pytest.raises(RunDirectoryError, match="ensemble.vary"):
        prepare(make_spec(ensemble__vary={"optimization.lr": [1e-3, 6e-3]}))
    grown = make_spec(ensemble__members=4, ensemble__vary=RATES)
    metrics = run(grown)
    assert [one["settings"]["optimization.lr"] for one in metrics["members"]] == [1e-3, 5e-3] * 2
