"""A finished run answers its own evaluation sets: what is written, scored, kept and shown."""

from __future__ import annotations

import json
import os
import re
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raylora.cli import app
from raylora.client import evaluate_run, run_local
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.run_status import RunStatus
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.optimizer import MemberOptimizer
from raylora.ensemble.answer_metrics import normalized
from raylora.errors import DataError, Interrupted, SpecError, StoreError, TrainingError, UsageError
from raylora.report.publish import publish_report
from raylora.serve.predictor import load_ensemble
from raylora.spec import GenerationSpec
from raylora.store.run_store import RunStore
from raylora.web.snapshot import RunReader

SPACED = "{% for m in messages %}{{ m.content }} {% endfor %}"
SETTINGS = GenerationSpec(metrics=["exact_match", "f1"], max_new_tokens=6, rows=40)


@pytest.fixture
def spec_of(
    make_spec: Callable[..., Any], tiny_model: Callable[[str], str], tmp_path: Path
) -> Callable[..., Any]:
    """Return a function to the spec of a run that learns one answer to everything, with a set beside its own."""
    rows = [{"prompt": f"Say <b>{n}</b>", "completion": "yes" if n % 3 else f"no {n}"} for n in range(90)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> Any:
        return make_spec(**{
            "base__source": tiny_model("llama"), "adapter__target_modules": "all-linear",
            "task": {"kind": "instruction", "max_length": 128, "template": SPACED},
            "optimization": {"lr": 0.1, "steps": 24, "micro_batch": 8},
            "data": {"train": {"files": str(path)}, "train_rows": 40, "validation_rows": 2, "test_rows": 40},
            "evaluation": {
                "bootstrap_samples": 20, "out_of_distribution": {"jobs": {"source": "pypi:soc-codes", "rows": 2}},
            },
            **changes,
        })

    return make


@pytest.fixture
def writer(spec_of: Callable[..., Any], trained: Callable[[Any], str]) -> str:
    """Return a finished run that has learned one answer to everything."""
    return trained(spec_of())


@pytest.mark.slow
def test_members_of_several_ranks_answer_as_those_among_their_like(
    spec_of: Callable[..., Any], trained: Callable[[Any], str]
) -> None:
    own = [{}, {"adapter.rank": 2}]
    told = {}
    for name, vary in {"varied": own, "alike": own[1:] * 2}.items():
        ensemble = load_ensemble(trained(spec_of(name=name, ensemble__vary=vary)))
        asked = ensemble.generate(["Say <b>7</b>", "Say <b>93</b> now"], max_new_tokens=6, each_member=True)
        told[name] = [answers[1] for answers in asked]
    for one, two in zip(*told.values(), strict=True):
        assert one.text == two.text and len(one.tokens) > 0
        logprobs = [[token.logprob for token in answer.tokens] for answer in (one, two)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_answers_are_scored_against_the_rows_own(writer: str) -> None:
    found = evaluate_run(writer, SETTINGS, local=True)
    assert found["members"] == 2 and found["sets"].keys() == {"test", "jobs"}
    test = found["sets"]["test"]
    assert test["ensemble"]["answers"] == 40 and len(test["members"]) == 2
    ensemble, store = load_ensemble(writer), RunStore(writer)
    spec = store.spec_in_place()
    sets = sets_of(spec, task_of(spec), load_tokenizer(spec.base, task_of(spec)), store)
    asked = [list(e.sequences[0][: e.target_ranges[-1][0]]) for e in sets.test.examples]
    tokenizer = ensemble.base.tokenizer
    references = [
        tokenizer.decode(list(e.sequences[0][slice(*e.target_ranges[-1])]), skip_special_tokens=True)
        for e in sets.test.examples
    ]
    assert {normalized(one) for one in references} > {"yes"}
    said = ensemble.generator().written(asked, [e.id for e in sets.test.examples], Sampling(6))
    right = sum(normalized(one.text) == normalized(two) for (one,), two in zip(said, references, strict=True))
    assert test["ensemble"]["metrics"]["exact_match"]["value"] == pytest.approx(right / 40)
    assert test["ensemble"]["error_auroc"].keys() >= {"mean_nll", "mean_mutual_information", "disagreement"}
    assert "disagreement" not in test["members"][0]["error_auroc"]
    jobs, other = found["sets"]["jobs"]["ensemble"], ensemble.generator().written(
        [list(e.sequences[0][: e.target_ranges[-1][0]]) for e in sets.out_of_distribution["jobs"].examples],
        [e.id for e in sets.out_of_distribution["jobs"].examples], Sampling(6),
    )
    for name in ("mean_nll", "mean_entropy"):
        usual, foreign = ([one.sums()[name] for (one,) in answers] for answers in (said, other))
        above = [(one > two) + 0.5 * (one == two) for one in foreign for two in usual]
        assert jobs["ood_auroc"][name]["value"] == pytest.approx(sum(above) / len(above))
        assert jobs["uncertainty"][name] == pytest.approx(sum(foreign) / len(foreign))
    assert "ood_auroc" not in test["ensemble"] and "mean_nll" in found["sets"]["jobs"]["members"][1]["ood_auroc"]
    nlls = [one["answer"]["mean_nll"] for one in test["shown"]]
    assert nlls == sorted(nlls) and store.read_json("answers.json") == json.loads(json.dumps(found))


@pytest.mark.slow
def test_what_is_committed_is_not_written_again(writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Generator.voices, []

    def counted(self: Generator, prompts: Any, *rest: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:  # in the second shard
            raise KeyboardInterrupt
        return real(self, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "voices", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(writer, SETTINGS, local=True)
        assert calls == [32, 8] and RunStore(writer).read_json("answers.json") is None
        seen: list[tuple[str, int, int]] = []

        def on_status(status: RunStatus) -> None:
            told = [job.progress for job in status.jobs.values() if job.progress is not None]
            seen.extend((one.activity.value, one.done, one.total) for one in told)

        first = evaluate_run(writer, SETTINGS, True, on_status)
        assert calls[2:] == [8, 2] and {("answering", 8, 8), ("answering", 2, 2)} <= set(seen)
        again = evaluate_run(writer, SETTINGS, local=True)
        other = evaluate_run(writer, SETTINGS.model_copy(update={"metrics": ["contains"]}), local=True)
        fewer = evaluate_run(writer, SETTINGS.model_copy(update={"rows": 32}), local=True)
        assert len(calls) == 4 and again == first  # other metrics are read off the same answers
    assert other["sets"]["test"]["ensemble"]["metrics"].keys() == {"contains"}
    assert fewer["sets"]["test"]["ensemble"]["answers"] == 32


@pytest.mark.slow
def test_what_is_alike_is_said_by_the_settings(writer: str) -> None:
    found = {
        how: evaluate_run(writer, SETTINGS.model_copy(update={"normalize": how}), local=True)["sets"]["test"]
        for how in ("squad", "space", "none")
    }
    store, right = RunStore(writer), {}
    (folder,) = store.storage.list("answers")
    answers = RunStore(f"{writer}/answers/{folder}")
    shards = [name for name in answers.storage.list("shards") if name.startswith("test-")]
    records = [json.loads(line) for name in shards
               for line in answers.load_result(f"shards/{name}")["answers.jsonl"].splitlines()]
    assert len(records) == 40
    right["none"] = [one["answer"]["text"] == one["reference"] for one in records]
    right["space"] = [one["answer"]["text"].split() == one["reference"].split() for one in records]
    right["squad"] = [normalized(one["answer"]["text"]) == normalized(one["reference"]) for one in records]
    for how, rights in right.items():
        assert found[how]["ensemble"]["metrics"]["exact_match"]["value"] == pytest.approx(sum(rights) / 40)


def test_the_command_writes_numbers_and_the_report_shows_answers(writer: str) -> None:
    metrics = ["--metric", "exact_match", "--metric", "f1"]
    arguments = ["evaluate", writer, *metrics, "--max-new-tokens", "6", "--rows", "9", "--local"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    assert "AUROC for foreign prompts" in said.output
    assert "AUROC for wrong answers" in said.output and "test: 9 answers" in said.output
    page = Path(writer, "report.html").read_text()
    assert "<h2>Answers</h2>" in page and "test: the least sure" in page and "Exact match" in page
    assert "Do doubts tell foreign prompts from familiar ones?" in page
    assert "Say &lt;b&gt;" in page and "Say <b>" not in page
    assert Path(writer, "plots", "answers-risk-test.png").stat().st_size > 5_000
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output.splitlines()[-1])
    assert found["test"]["ensemble"]["answers"] == 9
    for wrong, what in (("--metric", "unknown metric 'bleu'"), ("--normalize", "unknown --normalize 'bleu'")):
        refused = CliRunner().invoke(app, ["evaluate", writer, wrong, "bleu"])
        assert refused.exit_code == 2 and what in refused.output


def test_a_run_without_answers_is_told_so(make_spec: Callable[..., Any], trained: Callable[[Any], str]) -> None:
    uri = trained(make_spec())
    with pytest.raises(UsageError, match="rows of classification hold no answers to compare with"):
        evaluate_run(uri, SETTINGS, local=True)
    publish_report(RunStore(uri))
    assert "<h2>Answers</h2>" not in Path(uri, "report.html").read_text()


def answers_of(uri: str) -> dict[str, bytes]:
    """Return what is committed of a run's answers, by file."""
    return {file.parent.name: file.read_bytes() for file in Path(uri).glob("answers/*/shards/*/answers.jsonl")}


def test_a_run_answers_as_a_part_of_it_what_the_command_would(
    spec_of: Callable[..., Any], writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(name="whole", evaluation__generation=SETTINGS.model_dump())
    metrics = run_local(spec, lambda status: None)
    uri = RunStore.for_spec(spec).uri
    afterwards = evaluate_run(writer, SETTINGS, local=True)
    found = RunStore(uri).read_json("answers.json")
    assert found == json.loads(json.dumps(afterwards)) and answers_of(uri) == answers_of(writer)
    assert "<h2>Answers</h2>" in Path(uri, "report.html").read_text()
    numbers = metrics["answers"]["sets"]["test"]
    assert numbers["ensemble"] == found["sets"]["test"]["ensemble"] and "shown" not in numbers
    assert RunStore(uri).read_json("metrics.json")["answers"] == metrics["answers"]
    shown = {one["set"]: one["values"] for one in RunReader(RunStore(uri), 0.0).read()["scores"]}
    assert shown["test"]["Exact match"] == f"{100 * numbers['ensemble']['metrics']['exact_match']['value']:.1f} %"
    said = CliRunner().invoke(app, ["report", uri])
    assert said.exit_code == 0 and "test: 40 answers" in said.output and "exact_match" in said.output
    monkeypatch.setattr(Generator, "voices", lambda *_: pytest.fail("something was answered again"))
    assert run_local(spec, lambda status: None)["answers"] == metrics["answers"]
    assert evaluate_run(uri, SETTINGS, local=True) == afterwards  # both know where answers lie
    more = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={
        "generation": SETTINGS.model_copy(update={"metrics": ["contains"]}),
    })})
    assert run_local(more, lambda status: None)["answers"]["sets"]["test"]["ensemble"]["metrics"].keys() == {"contains"}


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_answers_goes_on_there(
    spec_of: Callable[..., Any], writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(name="whole", evaluation__generation=SETTINGS.model_dump())
    uri, real, calls, tokens = RunStore.for_spec(spec).uri, Generator.voices, [], []

    def counted(self: Generator, prompts: Any, *rest: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        ways = real(self, prompts, *rest)
        tokens.extend(len(answer.tokens) for way in ways for answers in way for answer in answers)
        return ways

    monkeypatch.setattr(Generator, "voices", counted)
    with pytest.raises(Interrupted):
        run_local(spec, lambda status: None)
    store = RunStore(uri)
    assert len(answers_of(uri)) == 1 and not store.storage.exists("metrics.json")
    members = {name: store.load_result(f"members/{name}") for name in store.storage.list("members")}
    resumed = run_local(store.spec_in_place(), lambda status: None)
    assert calls == [32, 8, 2] and resumed["run"]["phase"] == "succeeded"
    timing = resumed["timing"]  # with what was written before the stop
    assert timing["answer_tokens"] == sum(tokens) and len(tokens) == 42 * 3 and timing["answer_s"] > 0
    assert timing["answer_tokens_per_s"] == pytest.approx(timing["answer_tokens"] / timing["answer_s"])
    assert "Tokens per second of writing" in Path(uri, "report.html").read_text()
    assert {name: store.load_result(f"members/{name}") for name in members} == members and len(members) == 2
    evaluate_run(writer, SETTINGS, local=True)
    assert answers_of(uri) == answers_of(writer) and len(answers_of(uri)) == 3
    _forget_how_long(uri)
    again = run_local(store.spec_in_place(), lambda status: None)
    assert calls == [32, 8, 2, 32, 8, 2] and again["answers"] == resumed["answers"]  # the middle ones are the writer's
    assert not [key for key in again["timing"] if key.startswith("answer_")]


def _forget_how_long(uri: str) -> None:
    """Commit one shard of a run's answers again, as it was before shards kept what it took to write them."""
    (shard, *_) = Path(uri).glob("answers/*/shards/*")
    folder, store = str(shard.relative_to(uri)), RunStore(uri)
    content = store.load_result(folder)["answers.jsonl"]
    store.storage.delete(folder)
    store.commit_result(folder, {"answers.jsonl": content})


@pytest.mark.slow
def test_a_shard_that_cannot_be_written_ends_the_run_with_the_reason_and_is_tried_again(
    spec_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(name="whole", optimization__steps=4, evaluation__generation={"max_new_tokens": 2})
    store, real = RunStore.for_spec(spec), Generator.voices

    def failing(self: Generator, prompts: Any, *rest: Any) -> Any:
        if len(prompts) == 8:
            raise DataError("these rows are not to be answered")
        return real(self, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "voices", failing)
        with pytest.raises(TrainingError, match="1 of 3 shards of answers are not written.*these rows are not to be"):
            run_local(spec, lambda status: None)
    assert len(answers_of(store.uri)) == 2 and store.storage.list("members") == ["member-000", "member-001"]
    asked: list[int] = []
    monkeypatch.setattr(Generator, "voices", lambda self, prompts, *rest: (
        asked.append(len(prompts)), real(self, prompts, *rest))[1])
    assert run_local(store.spec_in_place(), lambda status: None)["run"]["phase"] == "succeeded" and asked == [8]


@pytest.mark.slow
def test_members_that_are_left_answer_without_the_lost_one(writer: str) -> None:
    both = evaluate_run(writer, SETTINGS, local=True)
    RunStore(writer).storage.delete("members/member-001")
    with pytest.raises(StoreError, match="member-001"):
        evaluate_run(writer, SETTINGS, local=True)
    alone = evaluate_run(writer, SETTINGS, local=True, allow_missing=True)
    assert alone["members"] == 1 and len(RunStore(writer).storage.list("answers")) == 2
    of_first = both["sets"]["test"]["members"][0]["metrics"]
    assert alone["sets"]["test"]["members"][0]["metrics"] == of_first == alone["sets"]["test"]["ensemble"]["metrics"]


def test_a_forward_pass_has_no_more_rows_than_an_evaluation_is_allowed(
    spec_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rows, begun = Generator.voices, [], MemberOptimizer.__init__
    trained: list[Any] = []
    held: list[int] = []

    def noted(self: MemberOptimizer, *arguments: Any, **named: Any) -> None:
        begun(self, *arguments, **named)
        trained.extend(map(weakref.ref, self._flat_P))

    def counted(self: Generator, prompts: Any, *rest: Any) -> Any:
        rows.append(len(prompts))
        held.append(sum(parameter() is not None for parameter in trained))
        return real(self, prompts, *rest)

    monkeypatch.setattr(MemberOptimizer, "__init__", noted)
    monkeypatch.setattr(Generator, "voices", counted)
    run_local(spec_of(
        optimization__steps=4, evaluation__generation={"max_new_tokens": 2, "rows": 11}, evaluation__batch=8,
    ), lambda status: None)
    assert rows == [4, 4, 3, 2]  # of two members
    assert trained and held == [0] * 4  # nothing of the training is held beside it, as plans count on


@pytest.mark.slow
def test_members_that_are_added_are_asked_with_the_others(spec_of: Callable[..., Any]) -> None:
    spec = spec_of(optimization__steps=4, evaluation__generation={"max_new_tokens": 2, "rows": 3})
    run_local(spec, lambda status: None)
    grown = run_local(spec.model_copy(update={"ensemble": spec.ensemble.model_copy(update={"members": 3})}))
    assert grown["answers"]["members"] == 3 and len(grown["answers"]["sets"]["test"]["members"]) == 3
    assert len(list(Path(RunStore.for_spec(spec).uri).glob("answers/*"))) == 2


@pytest.mark.slow
def test_prompts_without_answers_are_answered_and_told_from_the_familiar_ones(
    spec_of: Callable[..., Any], tmp_path: Path
) -> None:
    asks = tmp_path / "asks.jsonl"
    asks.write_text("".join(json.dumps({"prompt": f"<i>Why</i> is {n} odd?"}) + "\n" for n in range(1, 12, 2)))
    foreign = {"asks": {"files": str(asks)}}
    spec = spec_of(
        name="asked", evaluation__out_of_distribution=foreign,
        evaluation__generation={"max_new_tokens": 6, "rows": 40, "metrics": ["exact_match", "f1"]},
    )
    metrics = run_local(spec, lambda status: None)
    assert metrics["sets"].keys() == {"validation", "test"} and metrics["ensemble"]["eval"].keys() == {"test"}
    store = RunStore.for_spec(spec)
    found = store.read_json("answers.json")["sets"]
    asked = found["asks"]["ensemble"]
    assert asked["answers"] == 6 and asked["ood_auroc"].keys() == asked["uncertainty"].keys()
    assert asked["uncertainty"].keys() >= {"mean_nll", "mean_mutual_information", "disagreement"}
    assert "metrics" not in asked and found["test"]["ensemble"]["metrics"].keys() == {"exact_match", "f1"}
    assert found["asks"]["shown"][0]["reference"] is None and found["asks"]["shown"][0]["right"] is None
    assert [one["rows"] for one in metrics["data"] if one["name"] == "asks"] == [6]
    page = Path(store.uri, "report.html").read_text()
    assert "asks: the surest" in page and "&lt;i&gt;Why" in page and "<i>Why" not in page
    assert not Path(store.uri, "plots", "answers-risk-asks.png").exists()
    said = CliRunner().invoke(app, ["evaluate", store.uri, "--max-new-tokens", "6", "--rows", "40", "--local"])
    assert said.exit_code == 0 and "asks: 6 answers" in said.output
    without = spec.model_copy(update={
        "name": "without", "evaluation": spec.evaluation.model_copy(update={"generation": None}),
    })
    with pytest.raises(SpecError, match="out_of_distribution.asks: its rows hold no answers"):
        prepare(without)


@pytest.mark.parametrize(("changes", "said"), [
    ({"task__train_on": "all"}, "evaluation.generation: rows of instruction with train_on: all"),
    ({"evaluation__generation": {"max_new_tokens": 5_000}}, "with 5000 to write that is more than the 2048"),
    ({"evaluation__generation": {"metrics": ["bleu"]}}, "evaluation.generation.metrics"),
    ({"evaluation__generation": {"metrics": ["f1", "f1"]}}, "a metric is given twice"),
])
def test_answers_that_cannot_be_are_refused_before_anything_is_written(
    spec_of: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        run_local(spec_of(**{"evaluation__generation": {}, **changes}))
    assert not (tmp_path / "runs" / "demo").exists()


def test_a_spec_without_answers_is_the_run_that_it_was(make_spec: Callable[..., Any]) -> None:
    spec = make_spec()
    assert "generation" not in spec.identity()["evaluation"]
    with_it = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"generation": SETTINGS})})
    assert with_it.digest() != spec.digest()
    with pytest.raises(SpecError, match="evaluation.generation: rows of classification hold no answers"):
        prepare(with_it)
