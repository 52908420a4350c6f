"""LoRA-FA: A stays as it was drawn, B trains as it would alone; memory, packs, resumes, exports, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at, weights

from raylora.adapters import lora
from raylora.adapters.base import HEAD, Site
from raylora.adapters.packed import stack
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.schedule import learning_rate_factor
from raylora.errors import Interrupted, SpecError
from raylora.placement.estimate import ADAPTER_BYTES, OPTIMIZER_BYTES, parts_of
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


def test_b_takes_the_steps_of_its_own_gradient_and_a_stays(make_parts: Make, trajectory: Make) -> None:
    parts = make_parts(adapter__freeze_a=True, adapter__dropout=0.2, optimization__clip_norm=1e9)
    trainer = parts.trainer(parts.units[:1])
    state, spec = trainer.states[0], parts.spec.optimization
    start = {name: tensor.clone() for name, tensor in state.tensors().items()}
    assert not any(name.endswith("lora_A") for name in state.optimizer.tensors())
    found = trajectory(trainer)
    live = {n: torch.nn.Parameter(t.clone()) for n, t in start.items() if not n.endswith("lora_A")}
    frozen = {n: t for n, t in start.items() if n not in live}
    reference = torch.optim.AdamW(live.values(), lr=spec.lr, weight_decay=0.0)
    with trainer.collator() as collator:
        for step in range(spec.steps):
            batch = collator.batch(step, {state.plan.name: state.order}, {})
            whole = stack([{**{n: p.detach() for n, p in live.items()}, **frozen}])  # all of them are leaves here
            outcome = parts.model.gradients(whole, batch, [state.plan.stream("dropout", step)])
            for name, p in live.items():
                p.grad = outcome.gradients[0][name]
            for group in reference.param_groups:
                group["lr"] = spec.lr * learning_rate_factor(spec, step, spec.steps)
            reference.step()
            for name, p in live.items():
                torch.testing.assert_close(found[step]["member-000"][name], p.detach(), rtol=1e-4, atol=5e-6)
    assert_bit_equal({n: state.result()[n] for n in frozen}, frozen)
    assert all(state.result()[n].any() for n in live if n.endswith("lora_B"))


def test_a_has_no_moments_and_is_saved_with_the_member(make_parts: Make, trajectory: Make) -> None:
    trainer = make_parts(adapter__freeze_a=True).trainer()
    start = trainer.states[0].tensors()
    trajectory(trainer)
    saved, _ = trainer.states[0].saved(trainer.step)
    assert saved["member"].keys() == start.keys()
    assert {key.partition("|")[0] for key in saved["optimizer"]} == {n for n in start if not n.endswith("lora_A")}


def test_a_frozen_a_keeps_no_inputs_for_the_backward_pass_and_the_planner_knows_it(make_spec: Make) -> None:
    site, x = Site("x", 64, 16, 0), torch.randn(1, 100, 64, requires_grad=True)
    kept = {}
    for is_frozen in (False, True):
        adapter = lora.build(lora.Spec(rank=2, freeze_a=is_frozen))
        tensors = adapter.build([site], torch.Generator().manual_seed(0))
        trained, held = adapter.parted(tensors)
        leaves = {n: t.requires_grad_() for n, t in stack([trained]).items()}
        at_site = adapter.materialize({**leaves, **(stack([held]) if held else {})}, [site])["x"]
        shapes: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(t.shape) or t, lambda t: t):
            adapter.packed_delta(x, at_site)
        kept[is_frozen] = torch.Size([1, 100, 64]) in shapes
    assert kept == {False: True, True: False}

    plain = prepare(make_spec())
    prepared = prepare(make_spec(adapter__freeze_a=True))
    a_numbers, b_numbers, head = 4 * 4 * 32, 4 * 32 * 4, 2 * 32 + 2
    assert plain.member_parameters == a_numbers + b_numbers + head
    assert prepared.member_parameters == b_numbers + head
    member = prepared.demand.member
    assert (member.kept_parameters, member.input_widths) == (a_numbers, 0)
    assert plain.demand.member.input_widths == 64
    found = parts_of(prepared.demand.model, member, 3)
    assert found.optimizer == 3 * OPTIMIZER_BYTES * (b_numbers + head)
    assert found.adapters == 3 * ADAPTER_BYTES * (a_numbers + b_numbers + head)
    mixed = make_spec(ensemble__vary={"adapter.freeze_a": [False, True]})
    assert prepare(mixed).demand.member.input_widths == 64
    dropped = prepare(make_spec(ensemble__vary=None, adapter__dropout=0.1))
    assert dropped.demand.member.input_widths == 4 * 32  # a mask, and no copy


@pytest.mark.slow
def test_it_shares_a_forward_with_lora_and_each_is_what_it_is_among_its_like(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    spec = make_spec(name="mixed", ensemble__vary={"adapter.freeze_a": [False, True]}, checkpointing={"every_steps": 1})
    assert [len(units) for units in prepare(spec).jobs.values()] == [2]
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    metrics = run(spec)
    found = members(spec)
    make_spec(ensemble__vary=None, checkpointing=None)
    for m, own in enumerate((False, True)):
        alike = make_spec(name=f"alike-{m}", adapter__freeze_a=own)
        trained(alike)
        assert_bit_equal(found[f"member-{m:03d}"], weights(alike, f"member-{m:03d}"))
    plain, frozen = (RunStore.for_spec(spec).load_result(f"members/member-00{m}") for m in (0, 1))
    assert found["member-000"].keys() == found["member-001"].keys()  # PEFT finds in both what it looks for
    assert json.loads(plain["adapter_config.json"]) == json.loads(frozen["adapter_config.json"])
    assert metrics["parameters"]["per_member_trainable"] == 4 * 4 * 32 + 4 * 32 * 4 + 66
    answers = load_ensemble(RunStore.for_spec(spec).uri, calibrated=False).predict(["A good film."])
    alone = load_ensemble(RunStore.for_spec(alike).uri, calibrated=False).predict(["A good film."])
    assert answers[0].member_probabilities[1] == pytest.approx(alone[0].member_probabilities[1], abs=1e-6)
    alike_metrics = json.loads(RunStore.for_spec(alike).storage.read("metrics.json"))
    assert alike_metrics["parameters"]["per_member_trainable"] == 4 * 32 * 4 + 66


def test_a_member_begins_as_loras_does_and_a_spec_without_the_key_keeps_its_digest(
    make_spec: Make, make_parts: Make
) -> None:
    spec = make_spec()
    assert "freeze_a" not in spec.identity()["adapter"]
    parts = make_parts(adapter__freeze_a=True)
    assert parts.spec.digest() != spec.digest()
    assert type(spec).model_validate(parts.spec.model_dump(mode="json")) == parts.spec
    plain = make_parts(adapter__freeze_a=None)
    one, two = (p.trainer().states[0].tensors() for p in (parts, plain))
    assert_bit_equal(one, two)
    assert any(name.startswith(HEAD) for name in one)


def test_what_a_frozen_a_has_no_place_for_is_refused_by_name(make_spec: Make) -> None:
    with pytest.raises(SpecError, match=r"decay_a: adapter.freeze_a keeps A as it was drawn"):
        prepare(make_spec(adapter__freeze_a=True, ensemble__regularizers={"decay_a": 0.1}))
    with pytest.raises(SpecError, match=r"baselines.laplace: is over both of LoRA's matrices"):
        prepare(make_spec(ensemble__regularizers=None, baselines__laplace={}))
