"""A run whose ensemble is selected or weighted on its validation rows: who speaks, wherever it is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from run_helpers import run, stop_at
from test_records import misfits

from raylora import registry
from raylora.distill import MemberTargets, TokenTargets
from raylora.distill.loss_functions import mixture, tempered_mixture
from raylora.engine.distillation.compare import compare
from raylora.engine.distillation.plan import prepare_distillation
from raylora.engine.generation.mixture import mix
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run.answer_plan import plan_evaluation
from raylora.engine.run.finished_members import member_tensors
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.session import TrainingSession
from raylora.engine.run.speakers import predictions_of
from raylora.engine.training.distillation_loss import load_targets, read_distillation_loss, task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.live_teacher import LiveDistillationLoss, LiveTeacher
from raylora.ensemble.aggregate import aggregate_logits
from raylora.errors import Interrupted, RunDirectoryError, SpecError
from raylora.records import RunMetrics
from raylora.report import tables
from raylora.report.entries import entries
from raylora.report.headline import headline
from raylora.serve.export import export_run
from raylora.serve.predictor import LoadedEnsemble, load_ensemble
from raylora.spec import DistillSpec, EnsembleSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
TEXTS = ["A film to remember.", "Dull and far too long.", "Fine."]
APART = {"optimization__lr": 0.2, "ensemble__seed": 16, "ensemble__bootstrap": True,
         "placement__members_per_worker": 1}
"""Members that know different things; alone in their packs, so that they are bit for bit the same after growth."""
BOTH = {**APART, "ensemble__select": {"size": 4}, "ensemble__weights": "stacked"}


def weights_in(uri: str) -> dict[str, float]:
    """Return the stacked weights of a finished run."""
    weights: dict[str, float] = RunStore(uri).read_json("metrics.json")["weighted"]["stacked"]["weights"]
    return weights


@pytest.fixture
def both(make_spec: Make, trained: Callable[[Any], str]) -> dict[str, Any]:
    """Return changes with which two of three members speak, one more than the other.

    Members that learn this fast end elsewhere on each kind of processor, so the seed is sought.
    """
    for seed in range(16, 32):
        changes = {**BOTH, "ensemble__seed": seed}
        uri = trained(make_spec(name="chosen", ensemble__members=3, **changes))
        weights = weights_in(uri)
        shutil.rmtree(uri)
        if len(weights) == 2 and len(set(weights.values())) == 2:
            return changes
    pytest.fail("of no seed do two of three members speak, one more than the other")


def fitted(metrics: Any) -> Any:
    """Return what was fitted, without what it predicts."""
    return json.loads(json.dumps({
        name: {key: one.get(key) for key in ("weights", "validation_nll", "steps", "gap")}
        for name, one in metrics["weighted"].items()
    }))


def test_a_selected_run_reports_both_and_predicts_with_those_it_chose(
    make_spec: Make, trained: Callable[[Any], str], both: dict[str, Any]
) -> None:
    spec = make_spec(name="chosen", ensemble__members=3, **both)
    uri = trained(spec)
    store = RunStore(uri)
    metrics = store.read_json("metrics.json")
    assert list(metrics["weighted"]) == ["selected", "stacked"]
    plain = store.read_json("metrics.json")["ensemble"]
    assert plain["members"] == 3
    for row in metrics["weighted"].values():
        assert row["eval"].keys() == plain["eval"].keys()
        assert {"accuracy", "nll", "brier", "ece", "intervals"} <= row["eval"]["test"].keys()
        assert sum(row["weights"].values()) == pytest.approx(1)
    said = metrics["weighted"]["stacked"]
    assert 1 < len(said["weights"]) < 3 and len(set(said["weights"].values())) > 1
    names, weights_M = list(said["weights"]), torch.tensor(list(said["weights"].values()), dtype=torch.float64)
    group = predictions_of(store, names)
    logp_NC = aggregate_logits(group[1].values, "mean_probabilities", weights_M=weights_M)
    nll = -float(logp_NC.gather(1, group[1].labels()[:, None]).mean())
    assert said["eval"]["test"]["nll"] == pytest.approx(nll, abs=1e-12)
    assert [row.key for row in entries(metrics)][:3] == ["ensemble", "selected", "stacked"]
    assert not misfits(metrics, RunMetrics)
    table = tables.comparison(metrics)
    assert table is not None and f"Stacked: {len(said['weights'])} of 3, weighted" in [label for label, _ in table.rows]
    assert any(sentence.startswith("Weighted by the validation rows") for sentence in headline(metrics))

    ensemble, everybody = load_ensemble(uri, calibrated=False), load_ensemble(uri, calibrated=False, plain=True)
    assert (ensemble.members, everybody.members) == (len(names), 3)
    for one, other in zip(ensemble.predict(TEXTS), everybody.predict(TEXTS), strict=True):
        record = one.record()
        members = [other.member_probabilities[int(name[-3:])] for name in names]
        for label, value in record["probabilities"].items():
            mixed = sum(weight * own[label] for weight, own in zip(weights_M.tolist(), members, strict=True))
            assert value == pytest.approx(mixed, abs=1e-6)
        assert record["weights"] == said["weights"] and record["members_asked"] == 3
        assert "weights" not in other.record()
    assert load_ensemble(uri)._described["temperature"] == said["temperature"]


@pytest.mark.slow
def test_weights_come_out_the_same_after_a_resume_and_are_fitted_anew_after_growth(
    make_spec: Make, both: dict[str, Any]
) -> None:
    whole = make_spec(name="whole", ensemble__members=3, **both)
    expected = fitted(run(whole))
    stopped = make_spec(name="stopped")
    with pytest.raises(Interrupted):
        run(stopped, stop_at(3))
    assert fitted(run(stopped)) == expected
    grown = make_spec(name="grown", ensemble__members=2)
    before = fitted(run(grown))
    grown = make_spec(name="grown", ensemble__members=3)
    assert fitted(run(grown)) == expected != before
    seen: list[Any] = []
    plain = make_spec(name="grown", ensemble__select=None, ensemble__weights="equal")
    metrics = run(plain, seen.append)
    assert not seen and "weighted" not in metrics  # nobody is trained for it, and back it goes
    assert fitted(run(make_spec(name="grown", **both))) == expected
    identity = plain.identity()["ensemble"]
    assert "select" not in identity and "weights" not in identity


def test_members_who_weigh_nothing_may_be_lost_and_others_not(make_spec: Make, trained: Callable[[Any], str]) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, ensemble__select={"size": 1}))
    store = RunStore(uri)
    (chosen,) = store.read_json("metrics.json")["weighted"]["selected"]["weights"]
    alone = [one.record() for one in load_ensemble(uri).predict(TEXTS)]
    assert {one["members"] for one in alone} == {1} and alone[0]["mutual_information"] == 0
    spare = next(name for name in store.storage.list("members") if name != chosen)
    store.storage.delete(f"members/{spare}")
    assert [one.record() for one in load_ensemble(uri, allow_missing=True).predict(TEXTS)] == alone
    store.storage.delete(f"members/{chosen}")
    left = load_ensemble(uri, allow_missing=True)
    assert left.members == 1 and left.weights is None and "temperature" not in left._described


def test_before_a_run_has_ended_nobody_speaks_for_it(
    make_spec: Make, trained: Callable[[Any], str], both: dict[str, Any]
) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, **both))
    Path(uri, "metrics.json").unlink()
    with pytest.raises(RunDirectoryError, match="fitted when it ends.*\n.*raylora resume"):
        load_ensemble(uri)


def test_the_spec_says_whether_weights_are_fitted() -> None:
    assert not EnsembleSpec().is_fitted
    assert EnsembleSpec(weights="stacked").is_fitted and EnsembleSpec.model_validate({"select": {}}).is_fitted


def test_export_writes_those_who_speak_and_says_what_they_weigh(
    make_spec: Make, trained: Callable[[Any], str], tmp_path: Path, both: dict[str, Any]
) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, **both))
    weights = weights_in(uri)
    exported = export_run(uri, out=str(tmp_path / "out"))
    assert [one.member for one in exported] == list(weights)
    for one in exported:
        said = json.loads(Path(one.folder, "ensemble.json").read_text())
        assert said == {"member": one.member, "weight": weights[one.member], "weights": weights,
                        "aggregate": "mean_probabilities", "fitted_on": "validation"}
    (spare,) = {"member-000", "member-001", "member-002"} - set(weights)
    (named,) = export_run(uri, out=str(tmp_path / "named"), members=[spare])
    assert json.loads(Path(named.folder, "ensemble.json").read_text())["weight"] == 0


# --- a student ----------------------------------------------------------------------------------------------
def distill(uri: str, student: Any, **changes: Any) -> Any:
    settings = DistillSpec.model_validate({"student": student, "costs": False, "alone": False, **changes})
    work = prepare_distillation(uri, settings)
    if work.targets is not None and not work.targets.is_done:
        run_in_process(work.targets)
    return work


def test_targets_are_made_by_those_who_speak_also_where_a_whole_pack_does_not(
    make_spec: Make, content: dict[str, Any], trained: Callable[[Any], str]
) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, ensemble__select={"size": 1}, **APART))
    (speaker,) = RunStore(uri).read_json("metrics.json")["weighted"]["selected"]["weights"]
    work = distill(uri, {"base": content["base"], "adapter": {"kind": "lora", "target_modules": ["query"]}})
    assert work.members == [speaker] and work.targets.target_job.packs == ((speaker,),)
    targets = load_targets(work.targets.store)
    assert isinstance(targets, MemberTargets) and list(targets.members) == [int(speaker[-3:])]


@pytest.mark.slow
def test_a_student_is_taught_the_weighted_mixture(
    make_spec: Make, content: dict[str, Any], trained: Callable[[Any], str], both: dict[str, Any]
) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, **both))
    weights = RunStore(uri).read_json("metrics.json")["weighted"]["stacked"]
    student = {"base": content["base"], "adapter": {"kind": "lora", "rank": 2, "target_modules": ["query"]}}
    work = distill(uri, student)
    targets = load_targets(work.targets.store)
    assert isinstance(targets, MemberTargets)
    assert work.members == list(weights["weights"]) and targets.weights == tuple(weights["weights"].values())
    assert list(targets.members) == [int(name[-3:]) for name in work.members]
    run(work.student)
    store = RunStore.for_spec(work.student)
    task = task_of(work.student)
    loss = read_distillation_loss(work.student, store, task, sets_of(
        work.student, task, load_tokenizer(work.student.base, task), store))
    assert loss is not None
    assert cast(Any, loss.loss).weights == targets.weights
    record = compare(work)
    assert record["contenders"]["teacher"]["eval"] == weights["eval"]
    alike = {**student, "members": 1}
    single = distill(uri, alike, name="one", teacher="single")
    assert single.members == ["member-000"] and single.targets.target_job.weights is None
    with pytest.raises(SpecError, match="multi_head has the members weigh alike"):
        distill(uri, student, name="heads", loss={"kind": "multi_head", "heads": 3})


def test_losses_weigh_members_as_if_they_were_there_as_often() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BMC = torch.randn(5, 2, 4, generator=generator).double()
    repeated_BMC = logits_BMC[:, [0, 0, 0, 1]]
    said_BC, labels_B = torch.randn(5, 4, generator=generator).double(), torch.arange(5) % 4
    for kind in ("kl", "js", "reverse_kl", "dirichlet"):
        module = registry.load("loss", kind)
        loss = module.build(module.Spec())
        found = loss.weighing([0.75, 0.25]).per_example(said_BC, logits_BMC, labels_B)
        torch.testing.assert_close(found, loss.per_example(said_BC, repeated_BMC, labels_B))
        assert not torch.allclose(found, loss.per_example(said_BC, logits_BMC, labels_B))
        if kind == "dirichlet":
            assert loss.weighing([0.75, 0.25]).at(0.3).weights == (0.75, 0.25)
    mse = registry.load("loss", "mse").build(registry.load("loss", "mse").Spec())
    found = mse.weighing([0.75, 0.25]).per_example(said_BC[:, :1], logits_BMC[..., 0], None)
    torch.testing.assert_close(found, mse.per_example(said_BC[:, :1], repeated_BMC[..., 0], None))
    assert torch.equal(mixture([*logits_BMC.unbind(1)], 2.0), tempered_mixture(logits_BMC, 2.0))
    torch.testing.assert_close(
        mixture([*logits_BMC.unbind(1)], 2.0, [0.75, 0.25]), tempered_mixture(repeated_BMC, 2.0))


# --- answers ------------------------------------------------------------------------------------------------
def test_every_token_is_that_of_the_weighted_mixture() -> None:
    logits_MNV = 3 * torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0))
    weights_M = torch.tensor([0.75, 0.25], dtype=torch.float64)
    for rule in ("mean_probabilities", "mean_logits"):
        found, wanted = mix(logits_MNV, rule, weights_M), mix(logits_MNV[[0, 0, 0, 1]], rule)
        for name in ("logp_NV", "entropy_N", "mutual_information_N"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
        assert found.logp_NV.dtype == torch.float32


@pytest.fixture
def language(tiny_model: Callable[[str], str], tmp_path: Path) -> dict[str, Any]:
    """Return the changes that make the small spec one of a model that writes, whose members know different things."""
    rows = [{"prompt": f"Say {n}", "completion": "yes" if n % 3 else f"no {n}"} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base__source": tiny_model("llama"), "adapter__target_modules": "all-linear",
        "task": {"kind": "instruction", "max_length": 96}, "ensemble__members": 3, "ensemble__weights": "stacked",
        "optimization": {"lr": 0.2, "steps": 6, "micro_batch": 4}, "ensemble__bootstrap": True,
        "data": {"train": {"files": str(path)}, "train_rows": 24, "validation_rows": 8, "test_rows": 6},
        "evaluation": {
            "bootstrap_samples": 10, "generation": {"metrics": ["exact_match"], "max_new_tokens": 2, "rows": 4},
        },
    }


@pytest.mark.slow
def test_a_run_answers_by_its_weights_and_teaches_by_them(
    make_spec: Make, content: dict[str, Any], language: dict[str, Any]
) -> None:
    for seed in range(16):  # whom they ask depends on the processor, as above
        spec = make_spec(name=f"seed-{seed}", **language, ensemble__seed=seed)
        metrics = run(spec)
        weights = metrics["weighted"]["stacked"]["weights"]
        if len(weights) > 1 and len(set(weights.values())) > 1:
            break
    else:
        pytest.fail("of no seed do several members speak, one more than another")
    uri = RunStore.for_spec(spec).uri
    assert metrics["answers"]["members"] == len(weights)
    (folder,) = Path(uri, "answers").iterdir()
    records = [json.loads(line) for path in sorted(folder.glob("shards/test-*/answers.jsonl"))
               for line in path.read_text().splitlines()]
    ensemble = load_ensemble(uri)
    assert ensemble.members == len(weights)
    weights_M = torch.tensor(list(weights.values()), dtype=torch.float64)
    torch.testing.assert_close(ensemble.generator().weights_M, weights_M)
    assert records and all(len(record["members"]) == len(weights) for record in records)
    line = int(records[0]["id"].rpartition(":")[2])  # the record's own prompt is in the template already
    (written,) = ensemble.generate([{"prompt": f"Say {line - 1}"}], max_new_tokens=2)
    assert records[0]["answer"]["text"] == written.text
    assert records[0]["answer"]["entropy"] == pytest.approx(written.record()["entropy"], abs=1e-4)
    given = [{"prompt": "Say 3", "completion": "no 3"}]
    (mixed,), own = ensemble.score(given), []
    for name in weights:
        alone = LoadedEnsemble(ensemble.spec, ensemble.base, ensemble.task, {
            name: member_tensors(RunStore(uri).load_result(f"members/{name}"))})
        own.append([token.logprob for token in alone.score(given)[0].tokens])
    own_MP = torch.tensor(own, dtype=torch.float64)
    expected_P = torch.logsumexp(own_MP + weights_M.log()[:, None], dim=0)
    assert [token.logprob for token in mixed.tokens] == pytest.approx(expected_P.tolist(), abs=1e-4)
    whole = -float(torch.logsumexp(own_MP.sum(1) + weights_M.log(), dim=0))
    assert mixed.sequencewise_nll == pytest.approx(whole, abs=1e-3)
    assert run(spec)["weighted"] == json.loads(json.dumps(metrics["weighted"]))  # and nothing is answered again
    again = plan_evaluation(uri, spec.evaluation.generation)
    assert again.answers.is_done and list(again.answers.job.members) == list(weights)

    student = {"base": spec.base.model_dump(mode="json"), "adapter": {"kind": "lora", "target_modules": "all-linear"}}
    taught = distill(uri, student, loss={"kind": "topk_kl", "top_k": 512, "temperature": 1.0})
    targets = load_targets(taught.targets.store)
    live = distill(uri, student, name="live", loss={"kind": "gkd", "on_policy": 0})
    assert live.student.distill_from.weights == list(weights.values())
    session = TrainingSession(live.student, RunStore.for_spec(live.student), 1, 0)
    RunStore.for_spec(live.student).write_spec(live.student)
    session.load()
    example = session.sets.train.examples[0]
    batch = session.task.collate([example], session.base.tokenizer)
    assert isinstance(session.distillation_loss, LiveDistillationLoss)
    live_PV = session.distillation_loss.teacher.mixture(batch, 1.0)(slice(None))
    top, _ = cast(TokenTargets, targets).gather([example.id])
    torch.testing.assert_close(live_PV.gather(1, top.index_PK), top.logp_PK, atol=5e-3, rtol=5e-3)
    plain = LiveTeacher(session.distillation_loss.teacher.model, session.distillation_loss.teacher.packs)
    assert not torch.allclose(plain.mixture(batch, 1.0)(slice(None)), live_PV, atol=1e-4)
