"""Students that learn what the ensemble answers: which answers, to which rows, made once and taken up again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members, run, stop_at

from raylora.client import distill_run
from raylora.data.answered import answered, prompt_length, with_answers
from raylora.data.task import BadRow, Example, LeftOut
from raylora.data.tasks import instruction
from raylora.distill import AnsweredRows, Keys
from raylora.engine.distillation import answers as answers_module
from raylora.engine.distillation.answers import agreement, tokens_of
from raylora.engine.distillation.plan import check_ahead, prepare_distillation
from raylora.engine.generation.decoder import Sampling
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run import answering
from raylora.engine.run.answer_job import AnswerJob
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.session import TrainingSession
from raylora.engine.training.distillation_loss import targets_uri
from raylora.engine.training.inputs import ANSWERED
from raylora.errors import DataError, Interrupted, SpecError, StoreError
from raylora.report.distillation import sections
from raylora.serve.predictor import load_ensemble
from raylora.spec import DistillSpec, RunSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a file of chats with one-word answers, and one of prompts that nobody answered."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        {"messages": [{"role": "user", "content": f"Is {n} a number of {'this' if n % 2 else 'that'} kind?"},
                      {"role": "assistant", "content": "yes" if n % 2 else "no"}]} for n in range(40)
    ]
    asks = [{"prompt": f"Is {n} another number of {'this' if n % 2 else 'that'} kind?"} for n in range(9)]
    asks.append({"prompt": "Is 3 a number of this kind?"})  # a row of the chats
    found = {}
    for name, lines in (("chats", rows), ("asks", asks)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(path)
    return found


@pytest.fixture
def make_teacher(make_spec: Make, tiny_model: Callable[[str], str], files: dict[str, str], trained: Make) -> Make:
    """Return a function from changes to the directory of three members that have learned to answer and to stop."""
    return lambda **changes: trained(make_spec(**{
        "base__source": tiny_model("llama"), "adapter": {"kind": "lora", "rank": 8, "target_modules": "all-linear"},
        "ensemble__members": 3, "task": {"kind": "instruction", "max_length": 80},
        "evaluation__out_of_distribution": {}, "evaluation__bootstrap_samples": 0,
        "data": {"train": {"files": files["chats"]}, "validation_rows": 4, "test_rows": 6},
        "optimization": {"lr": 0.02, "steps": 60, "micro_batch": 6, "warmup": 0.0}, **changes,
    }))


@pytest.fixture
def teacher(make_teacher: Make) -> str:
    """Return such a directory."""
    return make_teacher()


def settings(source: str, answers: dict[str, Any] | None = None, **changes: Any) -> DistillSpec:
    student = {
        "base": {"source": source, "dtype": "float32", "quantization": "none"},
        "adapter": {"kind": "lora", "rank": 4, "target_modules": "all-linear"},
        "optimization": {"lr": 0.01, "steps": 6, "micro_batch": 4, "warmup": 0.0},
    }
    return DistillSpec.model_validate({
        "student": {**student, **changes.pop("student", {})}, "costs": False, "alone": False,
        "loss": {"kind": "answers"}, "answers": {"max_new_tokens": 6, **(answers or {})}, **changes,
    })


# --- what is learned ----------------------------------------------------------------------------------------
def test_a_row_gets_another_answer_and_rows_without_one_are_left_out() -> None:
    row = Example("a", ((5, 6, 7, 8, 9),), None, target_ranges=((1, 2), (3, 5)))
    asked = Example("b", ((5, 6),), None)
    assert prompt_length(row) == 3 and prompt_length(asked) == 2
    assert answered(row, [1, 2, 3]) == Example("a", ((5, 6, 7, 1, 2, 3),), None, target_ranges=((3, 6),))
    assert answered(asked, [4]) == Example("b", ((5, 6, 4),), None, target_ranges=((2, 3),))


def test_answers_are_kept_with_their_rows_and_refused_with_others() -> None:
    keys = Keys(["a", "b"], ["hash-a", "hash-b"])
    rows = AnsweredRows(keys, "teacher", {"a": (1, 2)}, {"b": "unsure"})
    files = rows.to_files()
    found = AnsweredRows.read(files)
    assert found.answers == {"a": (1, 2)} and found.counts == {"unsure": 1}
    found.check("teacher", {"a": "hash-a", "b": "hash-b"})
    with pytest.raises(DataError, match="teacher of the answers: the targets have 'teacher', the student asks for"):
        found.check("another", {"a": "hash-a", "b": "hash-b"})
    with pytest.raises(DataError, match="1 of 2 examples are not what the teacher read"):
        found.check("teacher", {"a": "hash-a", "b": "changed"})
    with pytest.raises(StoreError, match=r"answers.json is damaged"):
        AnsweredRows.read({name: content[:-9] for name, content in files.items()})


def record(row: str, nll: float, text: str = "yes", own: tuple[str, ...] = ("yes", "no", "Yes."), finish: str = "end",
           tokens: int = 2) -> dict[str, Any]:
    return {
        "id": row, "members": [{"text": one} for one in own],
        "answer": {"text": text, "finish": finish, "mean_nll": nll, "tokens": [{"id": n} for n in range(tokens)]},
    }


@pytest.mark.parametrize(("answers", "expected"), [
    ({}, {"cut": "unfinished", "long": "too_long"}),
    ({"min_agreement": 0.6}, {"cut": "unfinished", "long": "too_long", "alone": "unsure"}),
    ({"surest": 0.5}, {"cut": "unfinished", "long": "too_long", "d": "unsure", "alone": "unsure"}),
    ({"surest": 0.3, "min_agreement": 1.0},
     {"cut": "unfinished", "long": "too_long", "alone": "unsure", "a": "unsure", "b": "unsure", "d": "unsure"}),
])
def test_only_what_the_ensemble_is_sure_of_is_learned(
    answers: dict[str, Any], expected: dict[str, str], teacher: str, tiny_model: Make
) -> None:
    records = [
        record("a", 0.3), record("b", 0.2), record("cut", 0.0, finish="length"), record("long", 0.0, tokens=30),
        record("alone", 0.5, own=("no", "no", "yes")), record("d", 0.4), record("all", 0.1, own=("yes", "yes.", "Yes")),
    ]
    work = prepare_distillation(teacher, settings(tiny_model("llama"), answers)).answers
    examples = [Example(one["id"], (tuple(range(60)),), None) for one in records]
    found = work.left_out(records, examples)
    assert found == expected
    assert [agreement(one) for one in records[:1]] == [2 / 3] and tokens_of(records[0]) == (0, 1)


# --- rows that only ask ------------------------------------------------------------------------------------
def test_rows_may_only_ask(tiny_model: Callable[[str], str], make_spec: Make) -> None:
    spec = make_spec(base__source=tiny_model("llama"))
    whole = instruction.build(instruction.Spec(max_length=60))
    tokenizer = load_tokenizer(spec.base, whole)
    chat = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "four"}]
    example, cut = whole.question({"messages": chat}, "x", tokenizer)
    same, _ = whole.question({"prompt": "Two and two?"}, "x", tokenizer)
    assert example == same and not cut and example.target_ranges == () and example.spans == ()
    learned, _ = whole.tokenize({"messages": chat}, "x", tokenizer)
    assert learned.sequences[0][: prompt_length(learned)] == example.sequences[0]
    assert whole.asked({"prompt": "Two and two?"}) == whole.content({"messages": chat})
    assert whole.columns_for(["prompt", "text"], may_ask=True) == ("prompt",)
    with pytest.raises(BadRow, match="nobody asks anything"):
        whole.question({"messages": chat[1:]}, "x", tokenizer)
    long = {"prompt": "many words " * 40}
    with pytest.raises(BadRow, match="more than task.max_length 60"):
        whole.question(long, "x", tokenizer)
    with pytest.raises(LeftOut):
        skips = instruction.build(instruction.Spec(max_length=60, on_too_long="skip"))
        skips.question(long, "x", tokenizer)


# --- whole distillations ------------------------------------------------------------------------------------
def sets_of_student(student: RunSpec) -> Any:
    return prepare(student).sets


def test_the_student_learns_what_the_ensemble_writes(
    make_teacher: Make, tiny_model: Callable[[str], str], files: dict[str, str]
) -> None:
    teacher = make_teacher(evaluation__generation={"rows": 6, "max_new_tokens": 6, "metrics": ["exact_match", "f1"]})
    wanted = settings(tiny_model("gpt2"), transfer={"files": files["asks"]}, alone=True)
    said: list[str] = []
    result = distill_run(teacher, wanted, local=True, on_stage=said.append)
    work = prepare_distillation(teacher, wanted)
    train = sets_of_student(work.student).train
    asked = {one.id: one for shard in work.answers.plan.shards.values() for one in shard.examples}
    assert len(asked) == 30 + 9 and sum(name.startswith("transfer:") for name in asked) == 9
    prompts = {name: list(example.sequences[0][: prompt_length(example)]) for name, example in asked.items()}
    writer = load_ensemble(teacher).generator()
    expected = dict(zip(prompts, writer.written(list(prompts.values()), list(prompts), Sampling(6)), strict=True))
    ended = {name: one for name, (one,) in expected.items() if one.finish == "end"}
    assert len(ended) > 20  # they have learned to stop
    assert {example.id for example in train.examples} == set(ended)
    for example in train.examples:
        first = prompt_length(example)
        assert list(example.sequences[0][:first]) == prompts[example.id]
        assert list(example.sequences[0][first:]) == [token.id for token in ended[example.id].tokens]
    store = RunStore.for_spec(work.student)
    (data, *_) = store.read_json("data.json")["sets"]
    assert data["rows"] == len(ended) and data["left_out"] == 39 - len(ended)
    assert result["targets"]["answers"] == len(ended) and result["targets"]["rows"] == 39
    assert result["targets"]["left_out"] == ({"unfinished": 39 - len(ended)} if len(ended) < 39 else {})
    (section,) = sections({"distillation": [result]})
    assert "Taught by 3 members, whose mixture answered 39 rows" in section["sentence"]
    assert f"{len(ended)} answers are learned" in section["sentence"]
    assert section["quality"].groups[-1] == ("test, answers", 2)
    assert section["quality"].heads[-2:] == ["Exact match", "F1"]
    for name, one in result["contenders"].items():
        assert one["answers"]["test"].keys() == {"exact_match", "f1", "intervals"}, name
        assert 0 <= one["answers"]["test"]["exact_match"] <= one["answers"]["test"]["f1"] <= 1
    said_of_teacher = RunStore(teacher).read_json("answers.json")["sets"]["test"]["ensemble"]["metrics"]
    assert result["contenders"]["teacher"]["answers"]["test"]["f1"] == said_of_teacher["f1"]["value"]
    assert [what.split(" in ")[0] for what in said] == [
        "having 39 rows answered,", "training student", "training student-alone", "comparing teacher and student",
    ]
    assert distill_run(teacher, wanted, local=True, on_stage=said.append) == result
    assert said[-1] == "student is distilled already, and nothing has changed"


@pytest.mark.slow
def test_answers_are_written_once_for_all_students_and_taken_up_again(
    teacher: str, tiny_model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = answering.answer_records

    def counted(writer: Any, examples: Any, *rest: Any, **named: Any) -> Any:
        made.append(len(examples))
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(writer, examples, *rest, **named)

    monkeypatch.setattr(answering, "answer_records", counted)
    monkeypatch.setattr(answers_module, "AnswerJob", partial(AnswerJob, shard_rows=12))
    with pytest.raises(Interrupted):
        distill_run(teacher, settings(tiny_model("gpt2")), local=True)
    assert made == [12] and not Path(teacher, "student").exists()
    distill_run(teacher, settings(tiny_model("gpt2")), local=True)
    assert made == [12, 12, 6]  # nobody was asked twice
    distill_run(teacher, settings(tiny_model("gpt2"), {"surest": 0.5}, name="surer"), local=True)
    assert sum(made) == 30  # others of the same answers
    work = prepare_distillation(teacher, settings(tiny_model("gpt2"), {"surest": 0.5}, name="surer"))
    whole = prepare_distillation(teacher, settings(tiny_model("gpt2")))
    kept, all_of_them = (sets_of_student(one.student).train.examples for one in (work, whole))
    assert len(kept) == -(-len(all_of_them) // 2) and {e.id for e in kept} < {e.id for e in all_of_them}
    distill_run(teacher, settings(tiny_model("gpt2"), {"temperature": 0.1, "seed": 3}, name="drawn"), local=True)
    assert sum(made) == 60


@pytest.mark.slow
def test_a_killed_student_of_answers_goes_on_bit_for_bit(teacher: str, tiny_model: Make) -> None:
    found = {}
    for name in ("whole", "broken"):
        work = prepare_distillation(teacher, settings(
            tiny_model("llama"), name=name, loss={"kind": "gkd", "on_policy": 0.5, "max_new_tokens": 5},
        ))
        if not work.answers.is_done:
            run_in_process(work.answers.plan)
            work.answers.conclude()
        if name == "broken":
            with pytest.raises(Interrupted):
                run(work.student, stop_at(3))
        run(work.student)
        found[name] = members(work.student)
    assert_bit_equal(found["whole"], found["broken"])


@pytest.mark.slow
def test_a_teacher_beside_its_student_can_also_have_answered(teacher: str, tiny_model: Make) -> None:
    wanted = settings(tiny_model("llama"), loss={"kind": "gkd", "on_policy": 0.0})
    result = distill_run(teacher, wanted, local=True)
    work = prepare_distillation(teacher, wanted)
    spec = RunStore.for_spec(work.student).read_spec()
    assert spec.distill_from.members is not None and spec.distill_from.answers == work.answers.key
    assert spec.distill_from.targets is None and result["targets"]["on_policy"] == 0.0
    session = TrainingSession(work.student, RunStore.for_spec(work.student), 1, 0)
    session.load()
    rows = AnsweredRows.read(work.answers.store.load_result(ANSWERED))
    assert {e.id for e in session.sets.train.examples} == set(rows.answers)
    assert session.distillation_loss is not None


@pytest.mark.slow
def test_answers_of_another_teacher_or_to_other_rows_are_refused(teacher: str, tiny_model: Make) -> None:
    wanted = settings(tiny_model("gpt2"))
    distill_run(teacher, wanted, local=True)
    work = prepare_distillation(teacher, wanted)
    folder = RunStore(targets_uri(teacher, work.answers.key))
    rows = AnsweredRows.read(folder.load_result(ANSWERED))
    path = Path(folder.uri, ANSWERED, "answers.json")
    changed = Keys(rows.keys.ids, ["0" * 16, *rows.keys.content_hashes[1:]])
    files = AnsweredRows(changed, rows.teacher_digest, rows.answers, rows.left_out).to_files()
    path.write_bytes(files["answers.json"])
    with pytest.raises(StoreError, match="answers.json"):  # not what was committed
        prepare(work.student)
    other = work.student.distill_from.model_copy(update={"teacher": "0" * 64})
    with pytest.raises((DataError, StoreError)):
        prepare(work.student.model_copy(update={"distill_from": other}))


# --- bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "said"), [
    ({"answers": None}, "distill.loss: answers learns what the teacher writes, and distill.answers is not there"),
    ({"loss": {"kind": "topk_kl"}}, "distill.answers: topk_kl learns from targets that are made for the rows' own"),
    ({"student": {"task": {"kind": "instruction", "max_length": 80, "train_on": "all"}}},
     "distill.answers: rows of instruction with train_on: all hold no answers"),
])
def test_what_has_nobody_to_write_or_to_learn_is_refused_ahead(
    changes: dict[str, Any], said: str, teacher: str, tiny_model: Make
) -> None:
    wanted = settings(tiny_model("gpt2"), **changes) if "answers" not in changes else settings(
        tiny_model("gpt2")).model_copy(update=changes)
    spec = RunStore(teacher).read_spec().model_copy(update={"distill": wanted})
    for refused in (lambda: prepare_distillation(teacher, wanted), lambda: check_ahead(spec)):
        with pytest.raises(SpecError, match=said):
            refused()
    assert not Path(teacher, "targets").exists() and not Path(teacher, "answers").exists()


@pytest.mark.slow
def test_a_good_section_passes_ahead_and_one_whose_answers_never_end_says_so(
    teacher: str, tiny_model: Make, files: dict[str, str]
) -> None:
    wanted = settings(tiny_model("gpt2"), transfer={"files": files["asks"]})
    spec = RunStore(teacher).read_spec()
    check_ahead(spec.model_copy(update={"distill": wanted}))
    far = settings(tiny_model("gpt2"), {"max_new_tokens": 10_000})
    for refused in (lambda: prepare_distillation(teacher, far), lambda: check_ahead(
            spec.model_copy(update={"distill": far}))):
        with pytest.raises(DataError, match="train: row .* and with 10000 to write that is more than"):
            refused()
    with pytest.raises(DataError, match="no answer of the teacher is left to learn from") as caught:
        distill_run(teacher, settings(tiny_model("gpt2"), {"max_new_tokens": 1}), local=True)
    assert "raise distill.answers.max_new_tokens" in caught.value.hint


def test_answers_need_a_row_each(teacher: str) -> None:
    sets = sets_of_student(RunStore(teacher).read_spec())
    kept = sets.train.examples[0]
    found = with_answers(sets, {kept.id: (3, 4)})
    assert [e.id for e in found.train.examples] == [kept.id] and found.train.left_out == 29
    assert found.train.content_hash != sets.train.content_hash and found.test is sets.test
