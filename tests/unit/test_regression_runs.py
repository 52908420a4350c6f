"""Whole regressions in this process: trained, resumed, taught, exported, asked and reported; bad input refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from run_helpers import assert_bit_equal, members, run, stop_at
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from raylora.cli import app
from raylora.distill import Keys, RegressionTargets
from raylora.distill.losses.mse import Spec as MseSpec
from raylora.distill.losses.mse import build as build_mse
from raylora.engine.distillation.compare import compare
from raylora.engine.distillation.plan import check_ahead, prepare_distillation
from raylora.engine.model.serialization import unpack_predictions
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import DistillationLoss, load_targets
from raylora.ensemble.gaussian import epistemic_std, half_width
from raylora.ensemble.outputs.value import ValuePrediction
from raylora.errors import DataError, Interrupted, SpecError
from raylora.report import console_table, write_report
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.spec import DistillSpec, RunSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
REGRESSION: dict[str, Any] = {
    "task": {"kind": "regression", "low": 0, "high": 5, "max_length": 32},
    "data__train": {"source": "pypi:sts-b"},
    "data__test": {"source": "pypi:sts-b-test", "rows": 24},
}


@pytest.fixture
def make(make_spec: Make) -> Make:
    """Return a function from changes to a small regression on pairs of the STS benchmark."""
    return lambda **changes: make_spec(**{**REGRESSION, **changes})


@pytest.fixture
def settings(content: dict[str, Any]) -> Callable[..., DistillSpec]:
    def of(**changes: Any) -> DistillSpec:
        student = {"base": content["base"], "adapter": {"kind": "lora", "rank": 2, "target_modules": ["query"]}}
        fields = {"student": student, "loss": {"kind": "mse"}, "costs": False, "alone": False, **changes}
        return DistillSpec.model_validate(fields)

    return of


# --- training ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_resumed_regression_has_bit_equal_members_and_the_same_metrics(make: Make) -> None:
    rules = {"early_stopping": {"metric": "rmse", "patience": 9}}
    changes = {"ensemble__regularizers": rules, "optimization": {"lr": 0.005, "epochs": 2, "micro_batch": 8},
               "checkpointing": {"every_steps": 1}}
    whole, broken = make(name="whole", **changes), make(name="broken", **changes)
    expected = run(whole)
    with pytest.raises(Interrupted):
        run(broken, stop_at(3))
    found = run(broken)
    assert_bit_equal(members(whole), members(broken))
    for key in ("ensemble", "members", "gains", "m_curve", "plots"):
        assert found[key] == expected[key]
    history = [row for row in expected["training"]["member-000"] if "validation_rmse" in row]
    assert len(history) == 2
    for row in history:  # with the noise of its own the NLL is a function of the error
        assert row["validation_nll"] == pytest.approx(
            0.5 * math.log(2 * math.pi * math.e * row["validation_rmse"] ** 2), rel=1e-6)


def test_a_fresh_head_starts_at_the_mean_of_the_labels_that_there_are(make_parts: Make, tiny_model: Any) -> None:
    parts = make_parts(**REGRESSION)
    train = [*parts.sets.train.examples, replace(parts.sets.train.examples[0], label=math.nan)]
    labels = [example.label for example in train[:-1]]
    for state in parts.trainer(train=train).states:
        biases = [tensor for name, tensor in state.optimizer.tensors().items() if name.endswith("classifier.bias")]
        assert [float(bias) for bias in biases] == [pytest.approx(sum(labels) / len(labels))]
    # RoBERTa's head has a layer before its last one, whose biases are many and start at zero; a decoder's has none.
    inner = make_parts(**REGRESSION, base__source=tiny_model("roberta"))
    tensors = inner.trainer().states[0].optimizer.tensors()
    assert not next(t for name, t in tensors.items() if name.endswith("dense.bias")).any()
    assert float(next(t for name, t in tensors.items() if name.endswith("out_proj.bias"))) > 1


def test_labels_are_learnt_in_their_own_units(make: Make) -> None:
    metrics = run(make(optimization={"lr": 0.01, "steps": 30, "micro_batch": 8}, ensemble__members=1))
    losses = [row["loss"] for row in metrics["training"]["member-000"] if "loss" in row]
    assert max(losses[:3]) < 5 and sum(losses[-10:]) < sum(losses[:10])  # nobody had to climb to the mean first
    points = metrics["plots"]["values"]["test"]
    assert 1.5 < sum(points["value"]) / len(points["value"]) < 4


def test_a_decoder_whose_head_has_no_bias_trains_too(make: Make, tiny_model: Any) -> None:
    metrics = run(make(base__source=tiny_model("llama"), adapter__target_modules="auto", ensemble__members=1))
    tested = metrics["ensemble"]["eval"]["test"]
    assert tested["mae"] <= tested["rmse"] < 5  # of labels in 0 .. 5


def test_predictions_are_stored_as_values(make: Make) -> None:
    spec = make(ensemble__members=1)
    run(spec)
    sets = unpack_predictions(RunStore.for_spec(spec).load_result("predictions/member-000"))
    assert [part.output for part in sets] == ["value"] * 2 and sets[1].values.shape == (1, 24)
    assert sets[1].labels().dtype == torch.float32


@pytest.mark.parametrize("adapter", [
    {"kind": "mos", "rank": 3, "target_modules": ["query", "value"]},
    {"kind": "full", "target_modules": "auto"},
])
def test_other_adapters_and_baselines_work_untouched(make: Make, adapter: dict[str, Any]) -> None:
    baselines = {"mc_dropout": {"passes": 3}, "last_layer": 2, "checkpoints": 2} if adapter["kind"] == "mos" else {}
    metrics = run(make(adapter=adapter, baselines=baselines, ensemble__members=1,
                       optimization={"lr": 0.005, "epochs": 2, "micro_batch": 8}))
    assert set(metrics["baselines"]) == {"single", *baselines}
    assert all(one["noise_std"] > 0 for one in metrics["baselines"].values())


@pytest.mark.parametrize(("changes", "says"), [
    ({"ensemble__regularizers": {"early_stopping": {"metric": "accuracy"}}}, "regression has no accuracy.*nll or rmse"),
    ({"ensemble__regularizers": {"early_stopping": {"metric": "ece"}}}, "regression has no ece"),
    ({"ensemble__regularizers": {"kl": {"beta": 0.1}}}, "regularizers.kl: .* one value, not a distribution"),
    ({"ensemble__aggregate": "mean_logits"}, "aggregate: mean_logits cannot aggregate predictions of value"),
])
def test_what_means_nothing_for_a_value_is_refused_before_anything(
    make: Make, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as caught:
        prepare(make(**changes))
    assert re.search(says, str(caught.value), re.DOTALL) and not (tmp_path / "runs").exists()


def test_classes_have_no_rmse(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="classification has no rmse"):
        prepare(make_spec(ensemble__regularizers={"early_stopping": {"metric": "rmse"}}))


# --- distillation ------------------------------------------------------------------------------------------
def test_a_students_step_is_plain_torchs(make_parts: Make) -> None:
    parts = make_parts(**REGRESSION)
    batch, ids = parts.batch(0, 6), [example.id for example in parts.sets.train.examples[:6]]
    targets_NM = torch.linspace(0, 5, 12).view(6, 2)
    hashes = [parts.sets.train.content_of[i] for i in ids]
    backwards = [5, 4, 3, 2, 1, 0]  # targets are found by id, wherever they lie
    targets = RegressionTargets.from_outputs(
        Keys([ids[n] for n in backwards], [hashes[n] for n in backwards]), targets_NM[backwards],
        teacher_digest="t", members=[0, 1],
    )
    distillation_loss = DistillationLoss(parts.task, build_mse(MseSpec(task_weight=0.25)), targets)
    batch.labels_N[2] = math.nan  # a transfer row
    head = torch.randn(6, 1, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    losses_N = distillation_loss.losses(head, batch, 0.0)
    losses_N.mean().backward()
    value_N, labels_N = head.detach()[:, 0].clone().requires_grad_(True), batch.labels_N.clone()
    labeled_N = torch.tensor([1.0, 1, 0, 1, 1, 1])
    task_N = labeled_N * (value_N - labels_N.nan_to_num(0.0)) ** 2
    expected_N = 0.25 * task_N + 0.75 * (value_N - targets_NM.mean(1)) ** 2
    expected_N.mean().backward()
    torch.testing.assert_close(losses_N, expected_N)
    assert head.grad is not None
    torch.testing.assert_close(head.grad[:, 0], value_N.grad)


@pytest.mark.slow
def test_an_ensemble_teaches_values_and_the_share_kept_is_one_of_correlation(
    make: Make, settings: Make, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"The {n}th.", "text_pair": "A film."}) + "\n" for n in range(5)))
    spec = make()
    run(spec)
    uri = RunStore.for_spec(spec).uri
    taught = settings(transfer={"files": str(more)}, alone=True)
    work = prepare_distillation(uri, taught, shard_rows=16)
    run_in_process(work.targets)
    targets = load_targets(work.targets.store)
    assert isinstance(targets, RegressionTargets) and targets.values.shape == (45, 2)
    assert targets.values.dtype == torch.float32 and targets.rounding_error == 0
    for student in work.students():
        run_in_process(prepare(student))
    record = compare(work)
    teacher = record["contenders"]["teacher"]["eval"]["test"]["pearson"]
    assert record["retained_metric"] == "pearson"
    for row in record["contenders"].values():
        share = row["eval"]["test"]["pearson"] / teacher if teacher > 0 else None
        assert row["retained_score"] == share
    assert record == json.loads(json.dumps(work.store.read_json("distillation/student.json"), allow_nan=False))
    one = prepare_distillation(uri, settings(name="one", teacher="single"))
    run_in_process(one.targets)
    single = load_targets(one.targets.store)
    ids = list(single.keys.ids)
    assert single.members == (0,)
    torch.testing.assert_close(single.gather(ids), targets.gather(ids)[:, :1], atol=1e-5, rtol=0)
    page = Path(uri, "report.html")
    told = CliRunner().invoke(app, ["report", uri])
    assert told.exit_code == 0 and "RMSE" in told.stdout, told.output
    assert "Distilled: student" in page.read_text()
    # So small a model may learn nothing, and of nothing there is no share.
    assert ("Pearson kept" in page.read_text()) is (teacher > 0)


@pytest.mark.slow
def test_a_resumed_student_is_bit_equal(make: Make, settings: Make) -> None:
    spec = make(ensemble__members=1)
    run(spec)
    uri = RunStore.for_spec(spec).uri
    whole = prepare_distillation(uri, settings(name="whole"))
    run_in_process(whole.targets)
    run_in_process(prepare(whole.student))
    broken = prepare_distillation(uri, settings(name="broken"))
    with pytest.raises(Interrupted):
        run(broken.student, stop_at(3))
    run_in_process(prepare(broken.student))
    assert_bit_equal(members(whole.student), members(broken.student))


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "dirichlet", "multi_head", "topk_kl"])
def test_losses_of_classes_are_refused_with_the_one_to_use(make: Make, settings: Make, kind: str) -> None:
    with pytest.raises(SpecError, match=r"(?s)distill\.loss.*use mse"):
        check_ahead(make().model_copy(update={"distill": settings(loss={"kind": kind})}))


def test_mse_is_refused_for_classes(make_spec: Make, settings: Make) -> None:
    with pytest.raises(SpecError, match=r"(?s)mse is for value.*kl"):
        check_ahead(make_spec().model_copy(update={"distill": settings()}))


# --- what comes out ----------------------------------------------------------------------------------------
@pytest.fixture
def finished(make: Make, trained: Callable[[RunSpec], str]) -> str:
    """Return the directory of a finished run with foreign text."""
    return trained(make(evaluation__out_of_distribution={"news": {"source": "pypi:bbc-news", "rows": 20}}))


PAIR = {"text": "A man is playing a flute.", "text_pair": "A woman plays the guitar."}


def test_predictions_have_a_value_and_its_doubts(finished: str) -> None:
    ensemble = load_ensemble(finished)
    pair, alone = ensemble.predict([PAIR, "A single sentence."])
    assert isinstance(pair, ValuePrediction) and alone.id == "1"
    values_MN = torch.tensor([pair.member_values]).T
    assert pair.value == pytest.approx(sum(pair.member_values) / 2)
    assert pair.epistemic_std == pytest.approx(float(epistemic_std(values_MN)[0]))
    noise = json.loads(Path(finished, "metrics.json").read_text())["ensemble"]["noise_std"]
    assert pair.std == pytest.approx(math.hypot(noise, pair.epistemic_std))
    reach = half_width(0.95) * pair.std
    assert pair.interval_95 == pytest.approx([pair.value - reach, pair.value + reach])
    with pytest.raises(DataError, match="row 0: no 'text'"):
        ensemble.predict([{"text_pair": "lonely"}])
    ensemble._described = {}  # a run that has members but no metrics yet
    (unsure,) = ensemble.predict([PAIR])
    assert unsure.std is None and unsure.interval_95 is None and unsure.value == pytest.approx(pair.value)


def test_the_command_line_answers_with_intervals(finished: str, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n")
    said = CliRunner().invoke(app, ["predict", finished, "--file", str(rows)])
    assert said.exit_code == 0 and "95 % interval" in said.stdout and "epistemic std" in said.stdout, said.output
    said = CliRunner().invoke(app, ["predict", finished, "--file", str(rows), "--out", str(out), "--json"])
    record = json.loads(out.read_text())
    assert said.exit_code == 0 and {"value", "std", "epistemic_std", "interval_95", "member_values"} <= record.keys()
    assert CliRunner().invoke(app, ["status", finished, "--json"]).exit_code == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_an_exported_member_gives_our_value_in_peft(finished: str, content: dict[str, Any]) -> None:
    (exported, _) = export_run(finished)
    source = content["base"]["source"]
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, problem_type="regression")
    model = PeftModel.from_pretrained(base, exported.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        value = model(**tokenizer(PAIR["text"], PAIR["text_pair"], return_tensors="pt")).logits
    (ours,) = load_ensemble(finished).predict([PAIR])
    assert value.shape == (1, 1) and float(value) == pytest.approx(ours.member_values[0], abs=1e-5)


def test_the_page_shows_values_intervals_and_no_word_of_classes(finished: str, tmp_path: Path) -> None:
    metrics = json.loads(Path(finished, "metrics.json").read_text())
    written = write_report(metrics, tmp_path)
    page = written[0].read_text(encoding="utf-8")
    names = {path.name for path in written[1:]}
    assert {"values-test.png", "coverage-test.png", "members-test.png", "training-validation-rmse.png",
            "detection-news-epistemic-std.png"} <= names
    for heading in ("Predicted and true values", "Are the intervals calibrated?", "Detecting foreign inputs",
                    "How many members are enough?", "95 % coverage", "Ensemble of 2: noise"):
        assert heading in page, heading
    seen = re.sub(r"data:image/png;base64,[^\"]*", "", page)
    for word in ("ECE", "Brier", "temperature", "confident answers", "right answers", "n/a</td>"):
        assert word not in seen.split("<h2>The run and its cost")[0], word
    console = Console(file=StringIO(), width=200)
    console.print(console_table(metrics))
    table = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Pearson" in table and "AUROC" in table and "Accuracy" not in table


def test_the_best_coverage_is_the_nearest_to_what_was_promised() -> None:
    from raylora.report.entries import Cell, Entry, columns

    shares = {"a": 0.90, "b": 0.96, "c": 1.0}
    rows = [Entry(name, name, {}) for name in shares]
    cells = columns(rows, [("test", "coverage_95"), ("test", "total_std")], lambda row, *_: Cell(shares[row.key]))
    assert [[cell.best for cell in line if cell] for line in cells] == [[False, False], [True, False], [False, False]]
