"""Regression's rows: which labels count, what a batch holds, and the STS benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from joined_batches import join
from pydantic import ValidationError
from transformers import AutoTokenizer

from raylora.data.catalog import assets
from raylora.data.sets import load_sets
from raylora.data.task import BadRow, pad_id
from raylora.data.tasks.regression import Spec, build
from raylora.errors import DataError
from raylora.spec import DataSpec, EvaluationSpec, SetSpec


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.model_folder("minilm-l6"))


@pytest.mark.parametrize(("label", "value"), [
    (2.5, 2.5), (3, 3.0), ("4.75", 4.75), (" -1e-3 ", -0.001), ("0", 0.0), (-1, -1.0), (".5", 0.5),
])
def test_labels_are_numbers_or_csvs_text_of_one(label: Any, value: float) -> None:
    found = build(Spec()).label({"label": label})
    assert found == value and isinstance(found, float)


@pytest.mark.parametrize(("label", "says"), [
    (float("nan"), "not a finite number"), (math.inf, "not a finite number"), (1e39, "not a finite number"),
    pytest.param(10**400, "not a finite number", id="huge"), ("nan", "'nan' is not a number"), ("inf", "not a number"),
    ("1_000", "not a number"), ("two", "'two' is not a number"), (True, "True is not a number"),
    ([1.0], "not a number"), (None, "no 'label'"), ("", "no 'label'"),
])
def test_labels_that_are_no_value(label: Any, says: str) -> None:
    with pytest.raises(BadRow, match=says):
        build(Spec()).label({"label": label})


def test_a_scale_refuses_what_is_off_it() -> None:
    task = build(Spec(low=0, high=5))
    assert [task.label({"label": end}) for end in (0, 5)] == [0, 5]
    with pytest.raises(BadRow, match=r"label 5\.01 is outside the scale 0 \.\. 5"):
        task.label({"label": 5.01})
    with pytest.raises(BadRow, match=r"-0\.1 is outside the scale 0 \.\. of"):
        build(Spec(low=0)).label({"label": -0.1})
    with pytest.raises(ValidationError, match="'low' 2 must be less than 'high' 2"):
        Spec(low=2, high=2)
    with pytest.raises(ValidationError):
        Spec(low=math.nan)


def test_a_batch_has_float_labels_and_a_squared_error_per_row(tokenizer: Any) -> None:
    task = build(Spec(max_length=12))
    rows = [{"text": "one two", "text_pair": "a b c d e f g h i j k", "label": 1.5}, {"text": "alone", "label": "4"}]
    examples = [task.tokenize(row, str(n), tokenizer)[0] for n, row in enumerate(rows)]
    batch = task.collate(examples, tokenizer)
    assert batch.labels_N is not None and batch.labels_N.dtype == torch.float32
    assert batch.labels_N.tolist() == [1.5, 4.0] and batch.input_ids_BT.shape == (2, 12)
    scores = task.scores(torch.tensor([[1.0], [6.0]], dtype=torch.bfloat16), batch)
    assert scores.dtype == torch.float32 and task.loss(scores, batch).tolist() == [0.25, 4.0]
    both = join([batch, batch], pad_id(tokenizer), "right")
    assert both.labels_N is not None and both.labels_N.dtype == torch.float32 and len(both) == 4
    unlabeled, _ = task.tokenize({"text": "x"}, "x", tokenizer)
    with pytest.raises(DataError, match="have no labels"):
        task.loss(scores[:1], task.collate([unlabeled], tokenizer))


def test_transfer_rows_have_no_number_for_a_label(tokenizer: Any, tmp_path: Path) -> None:
    labeled, more = tmp_path / "rows.jsonl", tmp_path / "more.jsonl"
    labeled.write_text("".join(json.dumps({"text": f"row {n}", "label": n - 1}) + "\n" for n in range(12)))
    more.write_text("".join(json.dumps({"text": f"more {n}", "label": "not looked at"}) + "\n" for n in range(3)))
    data = DataSpec(train=SetSpec(files=str(labeled)), validation_rows=2, test_rows=2)
    task = build(Spec())
    plain = load_sets(data, EvaluationSpec(), task, tokenizer)
    sets = load_sets(data, EvaluationSpec(), task, tokenizer, transfer=SetSpec(files=str(more)))
    batch = task.collate(sets.train.examples, tokenizer)
    assert batch.labels_N is not None and batch.labels_N.dtype == torch.float32
    assert batch.labels_N.isnan().tolist() == [False] * 8 + [True] * 3
    labels = [example.label for example in plain.train.examples]  # -1 may be among them: it is a value like others
    assert f"labels {min(labels):g} to {max(labels):g}" in plain.describe()[0]  # type: ignore[type-var]
    assert "3 without label" in sets.describe()[0] and "without" not in plain.describe()[0]
    assert sets.content_hash() == load_sets(
        data, EvaluationSpec(), task, tokenizer, transfer=SetSpec(files=str(more))
    ).content_hash() != plain.content_hash()


def test_bad_rows_say_where_and_one_value_for_all_is_nothing_to_learn(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"row {n},{n}\n" for n in range(5)) + "last,nan\n")
    data = DataSpec(train=SetSpec(files=str(file)), validation_rows=1, test_rows=1)
    with pytest.raises(DataError, match=r"rows\.csv:7: label 'nan' is not a number"):
        load_sets(data, EvaluationSpec(), build(Spec()), tokenizer)
    file.write_text("text,label\n" + "".join(f"row {n},2.5\n" for n in range(9)))
    with pytest.raises(DataError, match=r"training rows of .* have one label, 2\.5"):
        load_sets(data, EvaluationSpec(), build(Spec()), tokenizer)


def test_the_sts_benchmark_has_pairs_once_and_its_quotes() -> None:
    rows = {
        name: [json.loads(line) for line in assets.dataset_file(name).read_text("utf-8").split("\n") if line]
        for name in ("sts-b", "sts-b-dev", "sts-b-test")
    }
    assert {name: len(found) for name, found in rows.items()} == {"sts-b": 5_671, "sts-b-dev": 1_494,
                                                                 "sts-b-test": 1_377}
    every = [row for found in rows.values() for row in found]
    pairs = {frozenset(" ".join(row[key].casefold().split()) for key in ("text", "text_pair")) for row in every}
    assert len(pairs) == len({row["id"] for row in every}) == len(every)
    assert all(0 <= row["label"] <= 5 and row["text"] and row["text_pair"] for row in every)
    assert not any("\t" in row["text"] + row["text_pair"] for row in every)
    assert sum(row["text"].startswith('"') for row in every) > 50  # a csv reader would have eaten them
    assert {row["genre"].rstrip("s") for row in every} == {"main-caption", "main-new", "main-forum"}
