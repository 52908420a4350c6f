"""Full fine-tuning is what torch and transformers do on their own, and a member of it is like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from run_helpers import assert_bit_equal, members, run, stop_at, weights
from torch import nn

import raylora
from raylora import registry
from raylora.adapters.packed import stack
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.serialization import from_bytes
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.errors import BaseError, Interrupted, SpecError, UsageError
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.spec.members import KLSpec
from raylora.store.run_store import RunStore

FULL = {"adapter": {"kind": "full"}}


def plain_model(parts: Any, member: dict[str, Any]) -> nn.Module:
    """Return the transformers model itself with a member's head, that nothing of raylora has touched."""
    auto_class = getattr(transformers, parts.task.auto_class)
    model = auto_class.from_pretrained(
        parts.spec.base.source, attn_implementation="eager", dtype=torch.float32, **parts.task.model_kwargs()
    ).eval()
    model.config.pad_token_id = parts.base.model.config.pad_token_id
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in member.items():
            own[name.removeprefix("head:")].copy_(tensor)
    assert own.keys() == {name.removeprefix("head:") for name in member}, "a weight is not trained"
    return model


def plain_loss(parts: Any, model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(**batch.model_inputs()).logits
    return parts.task.loss(parts.task.scores(logits, batch), batch).mean()


@pytest.fixture(params=["bert", "bert_without_pooler", "roberta", "gpt2", "llama"])
def parts(request: pytest.FixtureRequest, make_parts: Callable[..., Any], tiny_model: Any) -> Any:
    return make_parts(base__source=tiny_model(request.param), ensemble__members=2, **FULL)


# --- the same numbers as plain torch ---------------------------------------------------------------------
def test_gradients_are_plain_autograds(parts: Any) -> None:
    member, batch = parts.member(parts.units[0], trained=0.02), parts.batch()
    found = parts.model.gradients(stack([member]), parts.pack(batch), [1])
    model = plain_model(parts, member)
    loss = plain_loss(parts, model, batch)
    loss.backward()
    assert found.losses_K[0] == pytest.approx(loss.item(), rel=1e-6)
    own = dict(model.named_parameters())
    for name, gradient in found.gradients[0].items():
        expected = own[name.removeprefix("head:")].grad
        assert expected is not None, name
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(g.norm() > 1e-6 for g in found.gradients[0].values()) > 0.8 * len(member)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_steps_are_a_plain_loops(
    kind: str, make_parts: Callable[..., Any], tiny_model: Any, trajectory: Callable[..., Any]
) -> None:
    rules = {"decay_a": 2.0, "decay_b": 0.0, "decay_head": 1.0}
    parts = make_parts(
        base__source=tiny_model(kind), ensemble__members=1, ensemble__regularizers=rules, **FULL,
        optimization={"lr": 0.002, "steps": 5, "micro_batch": 4, "accumulation": 2, "clip_norm": 0.5,
                      "schedule": "constant", "warmup": 0.0, "eps": 1e-6},
    )
    trainer = parts.trainer()
    order, start = trainer.states[0].order, parts.member(parts.units[0])
    model = plain_model(parts, start)
    heads = tuple(parts.base.heads)
    groups = [
        {"params": [p], "weight_decay": 1.0 if n.startswith(heads) else 2.0 if p.dim() > 1 else 0.0}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.002, eps=1e-6)
    steps = trajectory(trainer)
    assert len(steps) == 5
    for step, found in enumerate(steps):
        optimizer.zero_grad()
        for micro in (2 * step, 2 * step + 1):
            rows = [parts.sets.train.examples[i] for i in order.indices(micro)]
            (plain_loss(parts, model, parts.task.collate(rows, parts.base.tokenizer)) / 2).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()
        own = dict(model.named_parameters())
        for name, tensor in found["member-000"].items():
            # AdamW divides by the gradient's own size: where that is near zero its rounding is a share of the step.
            torch.testing.assert_close(
                tensor, own[name.removeprefix("head:")].detach(), rtol=1e-6, atol=1e-5,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    assert max((steps[-1]["member-000"][n] - start[n]).abs().max() for n in start) > 5e-3


def test_at_first_it_is_the_base_and_training_does_not_write_to_it(
    parts: Any, trajectory: Callable[..., Any]
) -> None:
    before = {n: t.clone() for n, t in parts.base.model.state_dict().items()}
    member, batch = parts.member(parts.units[0]), parts.batch()
    scores = parts.model.scores(stack([member]), batch)[0]
    none = registry.load("adapter", "none")
    heads = {n: t for n, t in member.items() if n.startswith("head:")}
    base = PackedModel(parts.base, none.build(none.Spec()), parts.task).scores(stack([heads]), batch)[0]
    torch.testing.assert_close(scores, base, rtol=0, atol=0)
    trajectory(parts.trainer(parts.units[:1]))
    after = parts.base.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(p.requires_grad for p in parts.base.model.parameters())


def test_members_predict_together_as_each_alone(parts: Any) -> None:
    members, batch = [parts.member(unit, trained=0.05) for unit in parts.units], parts.batch()

    def scores(chosen: list[Any]) -> torch.Tensor:
        return parts.model.scores(stack(chosen), batch)[0]

    both = scores(members)
    torch.testing.assert_close(both, torch.cat([scores([m]) for m in members]), rtol=1e-6, atol=1e-6)
    assert (both[: len(batch)] - both[len(batch) :]).abs().max() > 1e-2


def test_a_base_in_bfloat16_trains_float32_members(make_parts: Callable[..., Any], trajectory: Any) -> None:
    parts = make_parts(base__dtype="bfloat16", ensemble__members=1, **FULL)
    trainer = parts.trainer()
    start = parts.member(parts.units[0])
    last = trajectory(trainer)[-1]["member-000"]
    assert all(t.dtype == torch.float32 for t in last.values())
    moved = last["bert.encoder.layer.0.output.dense.weight"] - start["bert.encoder.layer.0.output.dense.weight"]
    assert moved.abs().max() > 1e-3
    assert not torch.equal(last["head:classifier.weight"], start["head:classifier.weight"])
    rounded = last["bert.encoder.layer.0.output.dense.weight"].bfloat16().float()
    assert (last["bert.encoder.layer.0.output.dense.weight"] - rounded).abs().max() > 0


def test_tied_embeddings_are_trained_once(make_parts: Callable[..., Any], tiny_model: Any) -> None:
    parts = make_parts(
        base__source=tiny_model("gpt2"), ensemble__members=1, **FULL,
        task={"kind": "language_modeling", "max_length": 24}, evaluation={"bootstrap_samples": 10},
    )
    member, batch = parts.member(parts.units[0], trained=0.02), parts.batch()
    assert "transformer.wte.weight" in member and "lm_head.weight" not in member
    found = parts.model.gradients(stack([member]), parts.pack(batch), [1])
    model = plain_model(parts, member)
    assert model.lm_head.weight is model.transformer.wte.weight
    plain_loss(parts, model, batch).backward()
    torch.testing.assert_close(
        found.gradients[0]["transformer.wte.weight"], model.transformer.wte.weight.grad, rtol=1e-4, atol=1e-6
    )
    assert prepare(parts.spec).member_parameters == sum(t.numel() for t in member.values())
    assert raylora.parameter_count(model.config, {"kind": "full"}) == sum(t.numel() for t in member.values())


def test_the_reference_of_kl_is_the_base_with_its_own_weights(make_parts: Callable[..., Any]) -> None:
    parts = make_parts(ensemble__members=1, **FULL)
    member, fresh, batch = parts.member(parts.units[0], trained=0.1), parts.member(parts.units[0]), parts.batch()
    heads = stack([{n: t for n, t in fresh.items() if n.startswith("head:")}])

    def loss(kl: KLSpec | None) -> float:
        return parts.model.gradients(stack([member]), parts.pack(batch), [1], kl, heads).losses_K[0]

    logp, logq = (
        F.log_softmax(parts.model.scores(stack([m]), batch)[0].double(), -1)
        for m in (member, fresh)
    )
    expected = float((logp.exp() * (logp - logq)).sum(-1).mean())
    assert expected > 1e-3
    assert loss(KLSpec(beta=0.7)) - loss(None) == pytest.approx(0.7 * expected, rel=1e-3)


def test_matrices_decay_with_a_and_biases_and_norms_with_b(parts: Any) -> None:
    own = parts.adapter.own_weights(parts.base.model, parts.base.heads)
    for name, weight in own.items():
        assert parts.adapter.decay_group(name) == ("b" if weight.dim() == 1 else "a"), name


# --- a run -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_run_is_kept_loaded_and_exported(
    kind: str, make_spec: Callable[..., Any], tiny_model: Any
) -> None:
    spec = make_spec(base__source=tiny_model(kind), baselines={"checkpoints": 1, "last_layer": 2}, **FULL)
    prepared = prepare(spec)
    run_in_process(prepared)
    store = RunStore.for_spec(spec)
    assert [len(pack) for pack in prepared.plan.packs[:2]] == [1, 1]
    files = store.load_result("members/member-000")
    assert "adapter_config.json" not in files and b"--format checkpoint" in files["README.md"]
    kept = from_bytes(files["adapter_model.safetensors"])
    assert prepared.member_parameters == sum(t.numel() for t in kept.values())
    assert prepared.demand.member.parameters == prepared.member_parameters
    assert prepared.demand.unpackable_reason == "one member per forward: every weight is its own"
    assert set(store.read_json("metrics.json")["baselines"]) >= {"last_layer", "checkpoints"}
    texts = ["a wonderful film with a great cast", "dull and far too long"]
    predictions = load_ensemble(store.uri, gpus=0, calibrated=False).predict(texts)
    for m, written in enumerate(export_run(store.uri, "checkpoint")):
        auto_class = transformers.AutoModelForSequenceClassification
        model = auto_class.from_pretrained(written.folder, attn_implementation="eager")
        tokenizer = transformers.AutoTokenizer.from_pretrained(written.folder)
        assert model.dtype == torch.float32 and written.exported_bytes >= 4 * prepared.member_parameters
        with torch.no_grad():
            probs_NC = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
        for row, prediction in zip(probs_NC, predictions, strict=True):
            mine = prediction.member_probabilities[m]
            assert [mine["negative"], mine["positive"]] == pytest.approx(row.tolist(), abs=1e-5)
    with pytest.raises(UsageError, match="every weight is their own") as caught:
        export_run(store.uri)
    assert "--format checkpoint" in str(caught.value)


def test_adapters_are_not_exported_as_checkpoints(make_spec: Callable[..., Any]) -> None:
    spec = make_spec(optimization__steps=1, ensemble__members=1)
    run_in_process(prepare(spec))
    with pytest.raises(UsageError, match="are adapters, not models"):
        export_run(RunStore.for_spec(spec).uri, "checkpoint")


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_bit_equal_members(make_spec: Callable[..., Any]) -> None:
    changes: dict[str, Any] = {
        **FULL, "checkpointing": {"every_steps": 2}, "ensemble__regularizers": {"kl": {"beta": 0.1}},
        "optimization": {"lr": 0.002, "steps": 4, "micro_batch": 4, "accumulation": 2},
    }

    one, two = make_spec(name="whole", **changes), make_spec(name="broken", **changes)
    run_in_process(prepare(one))
    with pytest.raises(Interrupted):
        run(two, stop_at(3))
    run_in_process(prepare(two))
    assert_bit_equal(members(one), members(two))
    assert not torch.equal(weights(one, "member-000")["bert.embeddings.word_embeddings.weight"],
                           weights(one, "member-001")["bert.embeddings.word_embeddings.weight"])


# --- what it cannot be -----------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [
    {"quantization": {"kind": "nf4"}}, {"quantization": {"kind": "int8"}}, {"quantization": {"kind": "rtn", "bits": 4}},
    {"quantization": {"kind": "optq", "bits": 4}, "calibration": {"source": "pypi:bbc-news"}},
])
def test_codes_are_not_trained(grid: dict[str, Any], make_spec: Callable[..., Any]) -> None:
    kind = grid["quantization"]["kind"]
    with pytest.raises(BaseError, match=f"base.quantization: {kind}: full trains every weight"):
        prepare(make_spec(**{f"base__{key}": value for key, value in grid.items()}, **FULL))


def test_a_checkpoint_that_is_quantized_already_is_refused(parts: Any) -> None:
    parts.base.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(BaseError, match="this base is quantized"):
        parts.adapter.own_weights(parts.base.model, parts.base.heads)


@pytest.mark.parametrize("keys", [{"target_modules": "all-linear"}, {"layers": {"last": 1}}, {"dropout": 0.1}])
def test_what_would_do_nothing_is_refused(keys: dict[str, Any], make_spec: Callable[..., Any]) -> None:
    with pytest.raises(SpecError, match=f"adapter.*{next(iter(keys))}"):
        make_spec(adapter={"kind": "full", **keys})


def test_there_is_no_input_to_drop(make_spec: Callable[..., Any]) -> None:
    with pytest.raises(BaseError, match="baselines.mc_dropout: .* full has none"):
        prepare(make_spec(baselines={"mc_dropout": {"passes": 2}}, **FULL))
