"""Prediction on people's files: their columns, ids and delimiters, rows that do not fit, and texts beside answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import run
from typer.testing import CliRunner

from raylora.cli import app
from raylora.data.sources import load_rows
from raylora.errors import DataError, SpecError
from raylora.serve.inputs import read_inputs
from raylora.serve.predictor import load_ensemble
from raylora.spec import SetSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
ROWS = [("A film to remember.", "positive"), ("Dull; from start, to end.", "negative")] * 10


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def reviews(make_spec: Make, trained: Callable[[Any], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a run whose training file calls its columns otherwise than the task does."""
    file = tmp_path_factory.getbasetemp() / "reviews-of-shop.jsonl"
    file.write_text("".join(json.dumps({"review": f"{text} {n}", "stars": label}) + "\n"
                            for n, (text, label) in enumerate(ROWS)))
    return trained(make_spec(
        data={"train": {"files": str(file), "columns": {"text": "review", "label": "stars"}}, "validation_rows": 4,
              "test_rows": 4},
        optimization={"lr": 0.005, "steps": 2, "micro_batch": 8}, evaluation={"bootstrap_samples": 0},
    ))


def predicted(uri: str, *arguments: str) -> list[dict[str, Any]]:
    done = call("predict", uri, "--json", *arguments)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_file_is_read_as_the_training_set_was_and_keeps_its_columns(reviews: str, tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    file.write_text('id,review,shop,text\na-1,"A film, to remember.",Bonn,x\na-2,Dull.,Köln,y\n', encoding="utf-8")
    records = predicted(reviews, "--file", str(file))
    assert [one["id"] for one in records] == ["a-1", "a-2"]
    assert records[0]["input"] == {"id": "a-1", "review": "A film, to remember.", "shop": "Bonn", "text": "x"}
    alone = load_ensemble(reviews).predict(["A film, to remember.", "Dull."])
    assert [one["probabilities"] for one in records] == [pytest.approx(one.probabilities) for one in alone]


def test_columns_are_told_where_a_file_has_others(reviews: str, tmp_path: Path) -> None:
    file = tmp_path / "new.jsonl"
    file.write_text('{"body": "Dull.", "label": "unheard of"}\n')
    missing = call("predict", reviews, "--file", str(file))
    assert missing.exit_code == 2 and "no column 'text'" in missing.output
    assert predicted(reviews, "--file", str(file), "--columns", "text=body")[0]["input"]["body"] == "Dull."
    wrong = call("predict", reviews, "--file", str(file), "--columns", "text")
    assert wrong.exit_code == 2 and "text=review" in wrong.output


def test_rows_that_do_not_fit_are_refused_or_left_out_and_counted(reviews: str, tmp_path: Path) -> None:
    file = tmp_path / "new.jsonl"
    file.write_text('{"review": "Dull."}\nnot json\n{"review": ""}\n{"review": "Fine.", "id": "last"}\n')
    refused = call("predict", reviews, "--file", str(file))
    assert refused.exit_code == 2 and "new.jsonl:2" in refused.output and "1 more do not fit" in refused.output
    assert "--on-bad-row skip" in refused.output
    done = call("predict", reviews, "--file", str(file), "--on-bad-row", "skip", "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and [one["id"] for one in records] == ["0", "last"]
    said = " ".join(done.stderr.split())
    assert "2 row(s) left out, 2 predicted" in said and "new.jsonl:2: not valid JSON" in said and "new.jsonl:3" in said
    assert call("predict", reviews, "--file", str(file), "--on-bad-row", "maybe").exit_code == 2
    file.write_text("not json\n")
    assert call("predict", reviews, "--file", str(file), "--on-bad-row", "skip").exit_code == 2


def test_a_file_is_checked_before_a_base_is_loaded(
    reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylora.serve import predictor

    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(predictor, "load_base", loaded)
    file = tmp_path / "new.jsonl"
    file.write_text('{"body": "Dull."}\n')
    assert call("predict", reviews, "--file", str(file)).exit_code == 2


def test_the_table_shows_the_texts(reviews: str) -> None:
    long = "An [bold]unusual[/bold] film, " + "very " * 40 + "long"
    done = call("predict", reviews, "--text", long, "--text", "Dull.")
    said = "".join(done.output.split())
    assert done.exit_code == 0 and "An[bold]unusual[/bold]film," in said and "Dull." in said and "…" in said


def test_a_plain_string_is_one_text(reviews: str) -> None:
    ensemble = load_ensemble(reviews)
    assert len(ensemble.predict("abc")) == 1
    assert ensemble.predict("abc")[0].probabilities == ensemble.predict(["abc"])[0].probabilities
    assert repr(ensemble).startswith("<raylora ensemble: 2 of 2 lora members over ")


def test_a_choice_is_said_in_words(make_spec: Make, tiny_model: Callable[[str], str], tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} plus one?", "choices": [str(n + n % 2), str(n + 1 - n % 2), "none"],
             "answer": 1 - n % 2} for n in range(12)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules=["q_proj", "v_proj"],
        task={"kind": "multiple_choice", "options": 3, "max_length": 48},
        data={"train": {"files": str(file)}, "validation_rows": 2, "test_rows": 2},
        optimization={"lr": 0.005, "steps": 1, "micro_batch": 4}, evaluation={"bootstrap_samples": 0},
    )
    run(spec)
    uri = RunStore.for_spec(spec).uri
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"question": "Which?", "choices": ["a dog", "a cat", "a cow"]}) + "\n")
    (record,) = predicted(uri, "--file", str(new))
    assert record["answer"] == ["a dog", "a cat", "a cow"]["ABC".index(record["label"])]
    assert record["answer"] in call("predict", uri, "--file", str(new)).output
    refused = call("predict", uri, "--text", "Which?")
    assert refused.exit_code == 2 and "question, choices" in refused.output


# --- delimiters ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "content", "rows"), [
    ("a.csv", "text,label\nx; y,1\n", [{"text": "x; y", "label": "1"}]),
    ("a.csv", "text;label\nx, y;1\n", [{"text": "x, y", "label": "1"}]),
    ("a.csv", "text\tlabel\nx, y\t1\n", [{"text": "x, y", "label": "1"}]),
    ("a.csv", "text|label\nx|1\n\ny|2\n", [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]),
    ("a.csv", "text\nx; y\nz\n", [{"text": "x; y"}, {"text": "z"}]),
    ("a.tsv", "text;label\nx;1\n", [{"text": "x", "label": "1"}]),
])
def test_a_delimiter_is_recognized(tmp_path: Path, name: str, content: str, rows: list[dict[str, str]]) -> None:
    (tmp_path / name).write_text(content)
    assert [row.values for row in load_rows(SetSpec(files=name), tmp_path).rows] == rows


def test_a_delimiter_is_told(reviews: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("review:note\nDull.:1,2\n")
    assert read_inputs(reviews, str(file), delimiter=":").brought == [{"review": "Dull.", "note": "1,2"}]
    with pytest.raises(DataError):
        read_inputs(reviews, str(file))
    assert predicted(reviews, "--file", str(file), "--delimiter", ":")[0]["input"]["note"] == "1,2"


def test_a_delimiter_is_one_character(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="delimiter"):
        make_spec(data__train={"files": "a.csv", "delimiter": "::"})
