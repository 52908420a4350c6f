"""XGBLoRA: rounds that add frozen pairs, against plain torch; resumes within and between rounds, packs, exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at, weights
from sweeps import sweep

from raylora import registry
from raylora.adapters import lora
from raylora.adapters.base import HEAD, Site
from raylora.adapters.boosted_lora import BoostedLora, Spec
from raylora.adapters.packed import stack
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.schedule import learning_rate_factor, round_starts
from raylora.errors import BaseError, Interrupted, RunDirectoryError, SpecError
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
BOOSTED = {"kind": "boosted_lora", "rounds": 3, "rank_per_round": 2, "alpha": 4, "target_modules": ["query", "value"]}
STEPS, STARTS = 8, [0, 2, 5]


@pytest.fixture
def boosted(make_spec: Make) -> Make:
    return lambda **changes: make_spec(**{"adapter": dict(BOOSTED), "optimization__steps": STEPS, **changes})


def rows_of(name: str, number: int) -> Any:
    rows = slice(2 * number, 2 * number + 2)
    return rows if name.endswith("A") else (slice(None), rows)


def test_every_round_trains_a_fresh_pair_on_the_sum_of_those_before(make_parts: Make) -> None:
    assert round_starts(STEPS, 3) == STARTS
    parts = make_parts(adapter=dict(BOOSTED), optimization__steps=STEPS, optimization__clip_norm=1e9,
                       ensemble__regularizers={"decay_b": 2.0})
    trainer = parts.trainer(parts.units[:1])
    (state,), spec = trainer.states, parts.spec.optimization
    found: list[Any] = []
    with trainer.collator() as collator:
        batches = [collator.batch(step, {state.plan.name: state.order}, {}) for step in range(STEPS)]
    whole = {n: t.clone() for n, t in state.tensors().items()}
    trainer.run(lambda t: None, lambda p: found.append({n: t.clone() for n, t in state.tensors().items()}), lambda: 0)

    plain = lora.build(lora.Spec(rank=6, alpha=12, target_modules=["query", "value"]))  # of the same scale, 2
    model = PackedModel(parts.base, plain, parts.task)
    heads = {n: torch.nn.Parameter(whole[n].clone()) for n in whole if n.startswith(HEAD)}
    head_optimizer = torch.optim.AdamW(heads.values(), lr=spec.lr, weight_decay=0.0)
    pairs: dict[str, torch.nn.Parameter] = {}
    for step in range(STEPS):
        if step in STARTS:
            number = STARTS.index(step)
            if step:  # what a round begins with is drawn; the rest of it is the reference's own
                assert not any(whole[n][rows_of(n, number)].any() for n in whole if n not in heads)
                drawn = torch.Generator().manual_seed(state.plan.stream("round", number))
                for site in parts.base.sites:
                    fresh = torch.empty(2, site.in_features).uniform_(
                        -site.in_features**-0.5, site.in_features**-0.5, generator=drawn
                    )
                    whole[f"{site.name}.lora_A"][rows_of("A", number)] = fresh
            pairs = {n: torch.nn.Parameter(whole[n][rows_of(n, number)].clone()) for n in whole if n not in heads}
            groups = [
                {"params": [p], "weight_decay": 2.0 if n.endswith("B") else 0.0} for n, p in pairs.items()
            ]
            optimizer = torch.optim.AdamW(groups, lr=spec.lr)
        outcome = model.gradients(stack([whole]), batches[step], [state.plan.stream("dropout", step)])
        for name, p in {**pairs, **heads}.items():
            gradient = outcome.gradients[0][name]
            p.grad = gradient if name in heads else gradient[rows_of(name, number)]
        for group in [*optimizer.param_groups, *head_optimizer.param_groups]:
            group["lr"] = spec.lr * learning_rate_factor(spec, step, STEPS)
        optimizer.step()
        head_optimizer.step()
        for name, p in pairs.items():
            whole[name][rows_of(name, number)] = p.detach()
        whole |= {name: p.detach().clone() for name, p in heads.items()}
        assert found[step].keys() == whole.keys()
        for name, tensor in found[step].items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-5, msg=f"{step} {name}")
    last = found[-1]
    for number, end in enumerate([2, 5]):  # a pair that is done stays, bit for bit
        for name in (n for n in last if not n.startswith(HEAD)):
            assert torch.equal(last[name][rows_of(name, number)], found[end - 1][name][rows_of(name, number)])
    saved, _ = state.saved(STEPS)
    assert {t.shape for n, t in saved["optimizer"].items() if "query.lora_A" in n} == {(2, 32)}


def test_a_single_round_is_lora_bit_for_bit(boosted: Make, make_spec: Make, trained: Callable[[Any], str]) -> None:
    one = boosted(name="one", adapter={**BOOSTED, "rounds": 1})
    two = make_spec(name="two", adapter={"kind": "lora", "rank": 2, "alpha": 4, "target_modules": ["query", "value"]})
    for spec in (one, two):
        trained(spec)
    assert_bit_equal(members(one), members(two))


@pytest.mark.parametrize("step", sweep([4, 5], [5]))
def test_a_run_that_stops_within_a_round_or_between_two_goes_on_as_if_it_had_not(
    step: int, boosted: Make, trained: Callable[[Any], str]
) -> None:
    whole = boosted(name="whole")
    trained(whole)
    broken = boosted(name="broken", checkpointing={"every_steps": 1})
    with pytest.raises(Interrupted):
        run(broken, stop_at(step))
    assert RunStore.for_spec(broken).checkpoint_steps("member-000")[-1] == step
    run(broken)
    assert_bit_equal(members(broken), members(whole))


def test_packed_equals_alone_in_every_round(make_parts: Make, trajectory: Make) -> None:
    parts = make_parts(adapter=dict(BOOSTED), optimization__steps=STEPS)
    packed = trajectory(parts.trainer())
    for plan in parts.units:
        for step, alone in enumerate(trajectory(parts.trainer([plan]))):
            for name, tensor in alone[plan.name].items():
                torch.testing.assert_close(packed[step][plan.name][name], tensor, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_chains_beside_lora_and_of_other_rounds_are_what_they_are_among_their_like(
    boosted: Make, trained: Callable[[Any], str]
) -> None:
    own = [{}, {"adapter.rounds": 2}, {"adapter": {"kind": "lora", "rank": 2}}]
    varied = boosted(name="varied", ensemble__members=3, ensemble__vary=own)
    assert [len(units) for units in prepare(varied).jobs.values()] == [3]
    run(varied)
    for m, settings in enumerate(own):
        alike = boosted(name=f"alike-{m}", ensemble__vary=[settings] * 3)
        trained(alike)
        assert_bit_equal(weights(varied, f"member-{m:03d}"), weights(alike, f"member-{m:03d}"))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_zero_stages_give_one_result(stage: int, make_parts: Make, trajectory: Make) -> None:
    found = []
    for number in (0, stage):
        parts = make_parts(adapter=dict(BOOSTED), optimization__steps=STEPS, optimization__zero_stage=number)
        trainer = parts.trainer()
        trajectory(trainer)
        found.append([state.result() for state in trainer.states])
    for one, two in zip(*found, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


# --- what a member is, and what is said of it -----------------------------------------------------------
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_a_finished_member_is_a_lora_that_peft_loads(boosted: Make, trained: Callable[[Any], str]) -> None:
    import transformers
    from peft import PeftModel

    spec = boosted(name="exported")
    folder = trained(spec)
    member = f"{folder}/members/member-000"
    config = json.loads(RunStore(folder).load_result("members/member-000")["adapter_config.json"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 12.0)
    text = "A film to remember."
    base = transformers.AutoModelForSequenceClassification.from_pretrained(spec.base.source, num_labels=2)
    tokens = transformers.AutoTokenizer.from_pretrained(spec.base.source)(text, return_tensors="pt")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, member).eval()(**tokens).logits.softmax(dim=-1)[0]
    (answer,) = load_ensemble(folder, calibrated=False).predict([text])
    assert list(answer.member_probabilities[0].values()) == pytest.approx(expected.tolist(), abs=1e-4)


def test_parting_a_member_and_joining_it_gives_it_back() -> None:
    adapter = BoostedLora(Spec(rounds=3, rank_per_round=2))
    sites = [Site("x", 5, 4, 0)]
    assert isinstance(adapter, registry.load("adapter", "boosted_lora").BoostedLora)
    generator = torch.Generator().manual_seed(0)
    member = adapter.build(sites, generator)
    for number in range(3):
        if number:
            before = adapter.delta_weight(member, sites[0])
            member = adapter.begin_round(member, sites, number, generator)
            assert torch.equal(adapter.delta_weight(member, sites[0]), before)  # a fresh pair changes nothing
        trained, kept = adapter.parted(member, number)
        assert_bit_equal(adapter.joined(trained, kept), member)
        trained["x.lora_B"] = torch.randn(4, 2, generator=generator)
        member = adapter.joined(trained, kept)
        assert torch.linalg.matrix_rank(adapter.delta_weight(member, sites[0])) == min(4, 2 * number + 2)


def test_the_plan_counts_one_pair_as_trained_and_says_that_rounds_wait_for_each_other(boosted: Make) -> None:
    prepared = prepare(boosted())
    pair = 4 * (2 * 32 + 32 * 2)
    assert prepared.member_parameters == pair + 2 * 32 + 2
    assert prepared.demand.member.kept_parameters == 2 * pair
    assert any("a member is a chain of 3 rounds" in note for note in prepared.notes)
    assert not any("chain" in note for note in prepare(boosted(adapter={**BOOSTED, "rounds": 1})).notes)


def test_what_rounds_have_no_room_for_is_refused_by_name(boosted: Make, trained: Callable[[Any], str]) -> None:
    with pytest.raises(SpecError, match="adapter.rounds: 9 rounds have no steps of their own in a training of 8"):
        prepare(boosted(adapter={**BOOSTED, "rounds": 9}))
    with pytest.raises(SpecError, match=r"swag: counts weights in from step 5 on.*begins with step 6"):
        prepare(boosted(baselines__swag={"last": 0.5}))
    prepare(boosted(baselines__swag={"last": 0.3}))
    with pytest.raises(BaseError, match="adapter.rank_per_round: 33 is more than"):
        prepare(boosted(baselines=None, adapter={**BOOSTED, "rank_per_round": 33}))
    trained(boosted(name="grown", optimization__schedule="constant", optimization__warmup=0.0))
    with pytest.raises(RunDirectoryError, match="rounds, which are equal parts of the whole training"):
        prepare(boosted(optimization__steps=12))
