"""Whole distillations in this process: targets made once, students that repeat, bad input refused before anything."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, run, stop_at, weights

from raylora.data.task import UNLABELED
from raylora.distill import loss_functions as losses
from raylora.engine.distillation import costs
from raylora.engine.distillation import plan as distil_module
from raylora.engine.distillation import target_job as teach
from raylora.engine.distillation.compare import compare
from raylora.engine.distillation.plan import prepare_distillation
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import load_targets
from raylora.ensemble.calibration import Temperature
from raylora.errors import DataError, Interrupted, RunDirectoryError, SpecError, StoreError, TrainingError, UsageError
from raylora.spec import DistillSpec, RunSpec, read_distill
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
SHARD_ROWS = 16


@pytest.fixture
def settings(content: dict[str, Any]) -> Callable[..., DistillSpec]:
    """Return a function from changes to a distill section whose student is the tiny BERT itself."""
    def make(**changes: Any) -> DistillSpec:
        student = {"base": content["base"], "adapter": {"kind": "lora", "rank": 2, "alpha": 4,
                                                        "target_modules": ["query", "value"]}, "seed": 7}
        fields = {"student": {**student, **changes.pop("student", {})}, "costs": False, **changes}
        return DistillSpec.model_validate(fields)

    return make


@pytest.fixture
def teacher(make_spec: Make, trained: Callable[[RunSpec], str]) -> str:
    """Return the directory of a finished run of two members."""
    return trained(make_spec(evaluation__out_of_distribution={"news": {"source": "pypi:bbc-news", "rows": 20}}))


def carry_out(uri: str, settings: DistillSpec, on_step: Any = lambda progress: None) -> Any:
    """Do what the client does, in small shards."""
    work = prepare_distillation(uri, settings, shard_rows=SHARD_ROWS)
    if not work.targets.is_done:
        run_in_process(work.targets)
    for student in work.students():
        run(student, on_step)
    return work


def test_a_calibrated_teacher_gives_its_logits_at_the_temperature_of_its_validation_rows(
    teacher: str, settings: Make
) -> None:
    plain, calibrated = (carry_out(teacher, settings(name=name, alone=False, calibrated=name == "calibrated"))
                         for name in ("plain", "calibrated"))
    fitted = RunStore(teacher).read_json("metrics.json")["ensemble"]
    temperature = fitted["temperature"]
    assert not fitted["temperature_fit"]["degenerate"] and abs(temperature - 1) > 0.01
    assert calibrated.targets.target_job.temperature == temperature and plain.targets.target_job.temperature == 1
    assert calibrated.key != plain.key and calibrated.student.digest() != plain.student.digest()
    one, other = (load_targets(work.targets.store) for work in (plain, calibrated))
    assert one.keys.ids == other.keys.ids
    torch.testing.assert_close(
        other.gather(other.keys.ids).double(), one.gather(one.keys.ids).double() / temperature, rtol=2e-3, atol=2e-3)
    assert compare(calibrated)["contenders"].keys() == {"teacher", "single", "student"}


def test_a_temperature_that_the_validation_rows_do_not_tell_is_refused(
    teacher: str, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil_module, "fit_temperature",
                        lambda *logits, **more: Temperature(1.0, 0.1, 0.1, degenerate=True))
    before = sorted(RunStore(teacher).storage.list(""))
    with pytest.raises(SpecError, match=r"distill\.calibrated: the validation rows tell no temperature"):
        prepare_distillation(teacher, settings(calibrated=True))
    assert sorted(RunStore(teacher).storage.list("")) == before


def test_a_run_teaches_a_student_that_is_an_ordinary_run(teacher: str, settings: Make) -> None:
    work = carry_out(teacher, settings())
    record = compare(work)
    assert list(record["contenders"]) == ["teacher", "single", "student", "alone"]
    for row in record["contenders"].values():
        assert {"accuracy", "nll", "ece", "brier"} <= row["eval"]["test"].keys() and "news" in row["ood"]
        assert row["retained_score"] == row["eval"]["test"]["accuracy"] / (
            record["contenders"]["teacher"]["eval"]["test"]["accuracy"])
    student, alone = RunStore.for_spec(work.student), RunStore.for_spec(work.alone)
    assert (student.uri, alone.uri) == (f"{teacher}/student", f"{teacher}/student-alone")
    assert student.read_spec().distill_from is not None and alone.read_spec().distill_from is None
    assert student.read_spec().digest() != alone.read_spec().digest()
    with_teacher, without = weights(work.student), weights(work.alone)
    assert any(not torch.equal(with_teacher[name], without[name]) for name in with_teacher)
    assert record == json.loads(json.dumps(work.store.read_json("distillation/student.json")))
    assert record["contenders"]["teacher"]["trainable_parameters"] == 2 * record["contenders"]["single"][
        "trainable_parameters"]


def test_settings_are_no_part_of_the_teachers_identity(make_spec: Make, settings: Make) -> None:
    spec = make_spec()
    taught = spec.model_copy(update={"distill": settings()})
    assert taught.digest() == spec.digest() and "distill_from" not in spec.identity()


def test_targets_are_what_the_members_say(teacher: str, settings: Make) -> None:
    work = prepare_distillation(teacher, settings(), shard_rows=SHARD_ROWS)
    assert len(work.targets.shards) == 3 and not Path(teacher, "targets").exists()
    facts = run_in_process(work.targets)
    assert facts["rows"] == 40 and facts["members"] == ["member-000", "member-001"]
    targets = load_targets(work.targets.store)
    session = teach.TargetSession(work.teacher, work.targets.store, 1, 0, work.targets.target_job)
    session.load()
    ids = [example.id for example in session.examples][::-1]
    found = targets.gather(ids, [session.content_of[i] for i in ids])
    expected = session._targets(session.examples, lambda done, of: None).gather(ids)
    assert found.shape == (40, 2, 2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_targets_are_taken_up_again_and_asked_for_once(
    teacher: str, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = teach.TargetSession._targets

    def counted(self: Any, examples: Any, report: Any) -> Any:
        made.append(len(examples))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, examples, report)

    monkeypatch.setattr(teach.TargetSession, "_targets", counted)
    with pytest.raises(Interrupted):
        carry_out(teacher, settings())
    assert made == [16, 16]
    carry_out(teacher, settings(student={"optimization": {"epochs": 3, "micro_batch": 8}}))
    assert made == [16, 16, 8]  # three epochs later, and nobody was asked twice
    carry_out(teacher, settings(name="other", loss={"kind": "js"}, alone=False))
    assert made == [16, 16, 8]  # another student of the same teacher


def test_a_student_resumes_to_bit_equal_members(teacher: str, settings: Make) -> None:
    plan = {"optimization": {"steps": 8, "micro_batch": 8, "lr": 0.005}}
    loss = {"kind": "dirichlet", "temperature": 4.0}
    whole = carry_out(teacher, settings(name="whole", student=plan, loss=loss, alone=False))
    broken = settings(name="broken", student=plan, loss=loss, alone=False)

    with pytest.raises(Interrupted):
        carry_out(teacher, broken, stop_at(3))
    again = carry_out(teacher, broken)
    assert_bit_equal(weights(whole.student), weights(again.student))


@pytest.mark.parametrize(("loss", "classes"), [
    ({"kind": "kl"}, 2), ({"kind": "reverse_kl"}, 2), ({"kind": "js"}, 2),
    ({"kind": "dirichlet"}, 2), ({"kind": "multi_head", "heads": 2}, 4),
])
def test_every_loss_trains_a_student_that_predicts(
    teacher: str, settings: Make, loss: dict[str, Any], classes: int
) -> None:
    from raylora.serve.export import export_run
    from raylora.serve.predictor import load_ensemble

    work = carry_out(teacher, settings(loss=loss, alone=False))
    store = RunStore.for_spec(work.student)
    tested = store.read_json("metrics.json")["ensemble"]["eval"]["test"]
    head = next(t for name, t in weights(work.student).items() if name.endswith("classifier.weight"))
    assert head.shape[0] == classes
    keeps = loss["kind"] in ("dirichlet", "multi_head")
    assert (tested["mutual_information"] > 1e-6) is keeps
    assert tested["predictive_entropy"] == pytest.approx(tested["expected_entropy"] + tested["mutual_information"])
    news = store.read_json("metrics.json")["ensemble"]["ood"]["news"]
    assert ("mutual_information" in news) is keeps
    (prediction,) = load_ensemble(store.uri).predict(["A film to remember."])
    assert sum(prediction.probabilities.values()) == pytest.approx(1) and len(prediction.probabilities) == 2
    assert (prediction.mutual_information > 1e-9) is keeps
    (exported,) = export_run(store.uri)
    assert exported.exported_bytes > 0


@pytest.mark.slow
def test_what_is_distilled_is_not_distilled_again(teacher: str, settings: Make) -> None:
    from raylora.client import distill_run

    said: list[str] = []
    wanted = settings(alone=False, costs=False)
    first = distill_run(teacher, wanted, local=True, on_stage=said.append)
    before = {path: path.stat().st_mtime_ns for path in Path(teacher).rglob("*") if path.is_file()}
    assert "comparing teacher and student" in said
    said.clear()
    assert distill_run(teacher, wanted, local=True, on_stage=said.append) == first
    assert said == ["student is distilled already, and nothing has changed"]
    assert {path: path.stat().st_mtime_ns for path in Path(teacher).rglob("*") if path.is_file()} == before
    (Path(teacher) / "student/members/member-000/adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match="member-000 is damaged"):
        distill_run(teacher, wanted, local=True)


@pytest.mark.slow
def test_a_single_member_can_teach(teacher: str, settings: Make) -> None:
    both = carry_out(teacher, settings(name="both", alone=False))
    one = carry_out(teacher, settings(name="one", teacher="single", alone=False))
    assert both.targets.store.uri != one.targets.store.uri
    assert load_targets(one.targets.store).members == (0,)
    ids = list(load_targets(one.targets.store).keys.ids)
    single = load_targets(one.targets.store).gather(ids)
    first = load_targets(both.targets.store).gather(ids)[:, :1]
    torch.testing.assert_close(single, first, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_unlabeled_text_is_taught_on_and_left_to_the_teacher(teacher: str, settings: Make, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    seen = RunStore(teacher).read_spec()
    texts = [f"The {n}th film was fine." for n in range(10)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0].upper()]))
    assert UNLABELED == losses.UNLABELED
    work = carry_out(teacher, settings(transfer={"files": str(file)}))
    targets = load_targets(work.targets.store)
    assert len(targets.keys) == 40 + 10  # a text that differs in case alone is not taught twice
    assert sum(example_id.startswith("transfer:") for example_id in targets.keys.ids) == 10
    rows = {one["name"]: one["rows"] for one in RunStore.for_spec(work.student).read_json("data.json")["sets"]}
    assert rows["train"] == 50
    rows = {one["name"]: one["rows"] for one in RunStore.for_spec(work.alone).read_json("data.json")["sets"]}
    assert rows["train"] == 40 and seen.digest() == RunStore(teacher).read_spec().digest()


# --- bad input -------------------------------------------------------------------------------------------
def test_an_unfinished_run_cannot_teach(make_spec: Make, settings: Make) -> None:
    spec = make_spec()

    with pytest.raises(Interrupted):
        run(spec, stop_at())
    with pytest.raises(RunDirectoryError, match="not finished and cannot teach"):
        prepare_distillation(RunStore.for_spec(spec).uri, settings())


@pytest.mark.parametrize("labels", [["positive", "negative"], ["bad", "good"]])
def test_other_labels_are_refused(teacher: str, settings: Make, labels: list[str]) -> None:
    task = {"kind": "classification", "labels": labels, "max_length": 24}
    with pytest.raises(SpecError, match="same labels in the same order"):
        prepare_distillation(teacher, settings(student={"task": task}))
    assert not Path(teacher, "targets").exists() and not Path(teacher, "student").exists()


@pytest.mark.parametrize(("change", "says"), [
    ({"loss": {"kind": "multi_head", "heads": 1}}, "1 heads for 2 teacher members"),
    ({"loss": {"kind": "topk_kl"}}, "topk_kl is for tokens"),
    ({"student": {"base": {"source": "/nowhere", "quantization": "none"}}}, "there is no folder"),
    ({"student": {"adapter": {"kind": "lora", "target_modules": ["nothing"]}}}, "nothing"),
    ({"transfer": {"files": "/nowhere.jsonl"}}, "nowhere.jsonl"),
])
def test_a_student_is_checked_before_its_teacher_is_trained(
    make_spec: Make, settings: Make, change: dict[str, Any], says: str
) -> None:
    from raylora.client import run_local

    spec = make_spec().model_copy(update={"distill": settings(**change)})
    with pytest.raises(UsageError, match=says):
        run_local(spec)
    assert not Path(RunStore.for_spec(spec).uri).exists()


@pytest.mark.slow
def test_a_shorter_student_of_the_same_labels_is_fine(teacher: str, settings: Make) -> None:
    task = {"kind": "classification", "labels": ["negative", "positive"], "max_length": 12}
    work = carry_out(teacher, settings(student={"task": task}, alone=False))
    assert work.student.task.max_length == 12


def test_token_level_losses_are_refused_for_classes(teacher: str, settings: Make) -> None:
    with pytest.raises(SpecError, match="is for"):
        prepare_distillation(teacher, settings(loss={"kind": "topk_kl"}))
    with pytest.raises(SpecError, match="mse is for value"):
        prepare_distillation(teacher, settings(loss={"kind": "mse"}))


def test_fewer_heads_than_members_are_refused_before_anything(teacher: str, settings: Make) -> None:
    with pytest.raises(SpecError, match="1 heads for 2 teacher members"):
        prepare_distillation(teacher, settings(loss={"kind": "multi_head", "heads": 1}))
    prepare_distillation(teacher, settings(loss={"kind": "multi_head", "heads": 1}, teacher="single"))
    assert not Path(teacher, "targets").exists()


@pytest.mark.slow
def test_targets_of_another_teacher_or_other_data_are_refused(teacher: str, settings: Make) -> None:
    work = carry_out(teacher, settings(alone=False))
    other = work.student.model_copy(update={
        "name": "other", "distill_from": work.student.distill_from.model_copy(update={"teacher": "0" * 64}),
    })
    with pytest.raises(DataError, match="teacher"):
        run_in_process(prepare(other))
    data = work.student.data.model_copy(update={"seed": 5})
    with pytest.raises(DataError, match="no targets for"):
        run_in_process(prepare(work.student.model_copy(update={"name": "third", "data": data})))
    missing = work.student.distill_from.model_copy(update={"targets": "nowhere"})
    with pytest.raises(TrainingError, match="not complete"):
        run_in_process(prepare(work.student.model_copy(update={"name": "fourth", "distill_from": missing})))


def test_rows_that_the_teacher_read_differently_are_refused(
    teacher: str, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = distil_module._content_of

    def changed(*arguments: Any) -> dict[str, str]:
        return {name: "0" * 16 for name in real(*arguments)}

    monkeypatch.setattr(distil_module, "_content_of", changed)
    with pytest.raises(DataError, match="not what the teacher read"):
        prepare_distillation(teacher, settings())


@pytest.mark.slow
def test_another_student_needs_another_name(teacher: str, settings: Make) -> None:
    carry_out(teacher, settings(alone=False))
    with pytest.raises(RunDirectoryError, match="choose another name"):
        prepare_distillation(teacher, settings(loss={"kind": "js"}, alone=False))


@pytest.mark.parametrize(("text", "says"), [
    ("loss: {kind: kl, temperature: 0}", "greater than 0"),
    ("loss: {kind: kl, temperature: -1}", "greater than 0"),
    ("loss: {kind: kl, task_weight: 1.5}", "less than or equal to 1"),
    ("loss: {kind: kl, task_weight: -0.1}", "greater than or equal to 0"),
    ("loss: {kind: kll}", "did you mean 'kl'"),
    ("loss: {kind: kl, temprature: 2}", "did you mean 'temperature'"),
    ("name: members", "folder of the run itself"),
    ("teachr: single", "did you mean 'teacher'"),
])
def test_bad_settings_say_where_and_what(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "student.yaml"
    file.write_text(f"distill:\n  student: {{base: {{source: 'pypi:minilm-l6'}}}}\n  {text}\n")
    with pytest.raises(SpecError, match=says) as caught:
        read_distill(file)
    assert "student.yaml:3" in str(caught.value)


# --- from the command line ---------------------------------------------------------------------------------
@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure costs in this process: a fresh one per contender spends its time on starting."""
    def here(contenders: Any, what: str) -> dict[str, Any]:
        return json.loads(json.dumps(costs._speed(contenders) if what == "speed" else costs._memory(*contenders)))

    monkeypatch.setattr(costs, "_in_process", here)


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process(teacher: str) -> None:
    one = costs.Contender("one", teacher, ("member-000",))
    there = costs._in_process([one], "memory")["peak_memory_bytes"]
    assert 2**26 < there < 2**34  # torch alone takes the one, and the other is what a parent of many tests may hold


@pytest.mark.slow  # one process per contender, and one for all
def test_costs_are_measured_in_processes_of_their_own(teacher: str) -> None:
    both = costs.Contender("both", teacher, ("member-000", "member-001"))
    found, where = costs.measure([both, costs.Contender("one", teacher, ("member-000",))])
    assert found.keys() == {"both", "one"} and where["rounds"] == costs.ROUNDS
    for name in ("both", "one"):
        assert found[name]["latency_ms"] > 0 and found[name]["rows_per_s"] > 0
        assert 2**26 < found[name]["peak_memory_bytes"] < 2**34


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_the_command_line_teaches_compares_and_reports(teacher: str, content: dict[str, Any], tmp_path: Path) -> None:
    import yaml
    from typer.testing import CliRunner

    from raylora.cli import app

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    student = tmp_path / "student.yaml"
    section = {"student": {"base": content["base"], "adapter": {"rank": 2}}, "loss": {"kind": "dirichlet"}}
    student.write_text(yaml.safe_dump({"distill": section}))
    done = call("distill", teacher, "--student", str(student), "--local", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    record = json.loads(Path(said["distillation"]).read_text())
    for row in record["contenders"].values():
        assert row["latency_ms"] > 0 and row["rows_per_s"] > 0 and row["peak_memory_bytes"] > 2**20
    page = Path(said["report"]).read_text()
    assert "Distilled: student" in page and "Student without a teacher" in page and "Throughput" in page
    assert Path(teacher, "student", "report.html").exists()
    again = call("report", teacher)
    assert again.exit_code == 0 and "distillation: student" in again.stdout
    assert call("status", f"{teacher}/student", "--json").exit_code == 0
    told = json.loads(call("status", teacher, "--json").stdout)
    assert told["students"] == {"student": "succeeded", "student-alone": "succeeded"}
    wrong = call("distill", teacher, "--student", str(student), "--local", "--set", "distill.loss.temperature=0")
    assert wrong.exit_code == 2 and "distill.loss.temperature" in wrong.output
    wrong = call("distill", str(tmp_path), "--student", str(student), "--local")
    assert wrong.exit_code == 2 and "there is no run here" in wrong.output


@pytest.mark.slow
def test_a_spec_with_a_distill_section_does_both_and_resumes(
    make_spec: Make, settings: Make, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from raylora.cli import app
    from raylora.spec import dump_spec

    file = tmp_path / "spec.yaml"
    spec = make_spec().model_copy(update={"distill": settings(alone=False)})
    file.write_text(dump_spec(spec))
    done = CliRunner().invoke(app, ["run", str(file), "--local", "--json"])
    assert done.exit_code == 0, done.output
    uri = json.loads(done.stdout)["run"]
    assert Path(uri, "distillation", "student.json").exists()
    Path(uri, "distillation", "student.json").unlink()
    before = weights(RunStore(f"{uri}/student").read_spec())
    done = CliRunner().invoke(app, ["resume", uri, "--local", "--json"])
    assert done.exit_code == 0, done.output
    assert Path(uri, "distillation", "student.json").exists()
    assert_bit_equal(before, weights(RunStore(f"{uri}/student").read_spec()))
