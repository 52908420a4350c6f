"""Splits without leakage, bad rows, sizes, and what the loaded sets say of themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raylora.data.catalog import assets
from raylora.data.sets import DataSets, LoadedSet, load_sets
from raylora.data.splits import read_pool
from raylora.data.tasks import classification
from raylora.data.tasks import language_modeling as language_modeling
from raylora.errors import DataError
from raylora.spec import DataSpec, EvaluationSpec, SetSpec

TASK = classification.build(classification.Spec(labels=["bad", "good"], max_length=16))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(assets.model_folder("minilm-l6"))


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: Iterable[dict[str, Any]]) -> SetSpec:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SetSpec(files=name)


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text number {n}", "label": n % 2} for n in range(start, start + count)]


def texts(loaded: LoadedSet, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {tokenizer.decode(list(example.sequences[0])) for example in loaded.examples}


def load(tokenizer: PreTrainedTokenizerBase, data: DataSpec, **evaluation: Any) -> DataSets:
    return load_sets(data, EvaluationSpec(**evaluation), TASK, tokenizer)


def test_splits_never_share_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = numbered(60) + numbered(30) + [{"text": f"TEXT  number {n}", "label": n % 2} for n in range(10)]
    sets = load(tokenizer, DataSpec(train=write("a.jsonl", rows), validation_rows=10, test_rows=20))
    parts = [texts(loaded, tokenizer) for loaded in (sets.train, sets.validation, sets.test)]
    assert [len(part) for part in parts] == [30, 10, 20] and len(set.union(*parts)) == 60
    assert len(sets.validation.examples) == 10 and len(sets.test.examples) == 20
    assert len(sets.train.examples) + 30 + sets.validation.duplicates + sets.test.duplicates == len(rows)


def test_evaluation_splits_do_not_depend_on_the_training_size(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = write("a.jsonl", numbered(100))
    sizes = {"train": spec, "validation_rows": 10, "test_rows": 20}
    small, large = (load(tokenizer, DataSpec(**sizes, train_rows=count)) for count in (30, 60))
    assert len(small.train.examples) == 30 and len(large.train.examples) == 60
    assert small.test == large.test and small.validation == large.validation
    other = load(tokenizer, DataSpec(**sizes, train_rows=30, seed=1))
    assert other.test.content_hash != small.test.content_hash
    assert (
        other.content_hash() != small.content_hash() == load(tokenizer, DataSpec(**sizes, train_rows=30)).content_hash()
    )


def test_own_evaluation_sets_lose_rows_that_were_used_before(tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataSpec(
        train=write("train.jsonl", numbered(20)),
        validation=write("validation.jsonl", numbered(10, start=15)),
        test=write("test.jsonl", numbered(20, start=18)),
    )
    shifted = write("shifted.jsonl", numbered(10, start=22) + numbered(4, start=24))
    unlabeled = write("unlabeled.jsonl", [{"text": row["text"]} for row in numbered(5, start=23)])
    sets = load(tokenizer, data, in_distribution={"near": shifted}, out_of_distribution={"far": unlabeled})
    sizes = {loaded.name: (len(loaded.examples), loaded.duplicates) for loaded in sets.all()}
    assert sizes["validation"] == (5, 5)  # 15 .. 19 were trained on
    assert sizes["test"] == (13, 7)  # 18, 19 trained on, 20 .. 24 in validation
    assert sizes["near"] == (7, 7)  # 22 .. 24 in validation, 24 .. 27 twice
    assert sizes["far"] == (3, 2)  # 23 and 24 in validation


def test_a_set_that_was_wholly_trained_on_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = write("a.jsonl", numbered(20))
    with pytest.raises(DataError, match=r"validation: every text of a\.jsonl was already used in training"):
        load(tokenizer, DataSpec(train=spec, validation=spec, test_rows=2))


def test_out_of_distribution_sets_need_no_labels_and_ignore_foreign_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataSpec(train=write("a.jsonl", numbered(20)), validation_rows=2, test_rows=2)
    foreign = write("far.jsonl", [{"text": f"news {n}", "label": "sports"} for n in range(4)])
    bare = write("bare.jsonl", [{"text": "no label"}])
    sets = load(tokenizer, data, out_of_distribution={"far": foreign, "bare": bare})
    far = sets.out_of_distribution["far"]
    assert not far.labeled and {example.label for example in far.examples} == {None}
    with pytest.raises(DataError, match=r"bare\.jsonl has no column 'label'; it has: text"):
        load(tokenizer, data, in_distribution={"bare": bare})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"validation_rows": 10, "test_rows": 10}, "data.train_rows = at least 1, data.test_rows = 10"),
        ({"validation_rows": 2, "test_rows": 2, "train_rows": 17}, "data.train_rows = 17"),
    ],
)
def test_more_rows_than_there_are(tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl has 20 usable rows \(20 distinct texts\), too few") as raised:
        load(tokenizer, DataSpec(train=write("a.jsonl", numbered(20)), **sizes))
    assert message in str(raised.value)


def test_one_class_cannot_be_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row | {"label": "good"} for row in numbered(20)]
    with pytest.raises(DataError, match="all 16 training rows of a.jsonl have one label, 'good'"):
        load(tokenizer, DataSpec(train=write("a.jsonl", rows), validation_rows=2, test_rows=2))


BAD = [
    ({"text": "", "label": 1}, "'text' is empty"),
    ({"text": None, "label": 1}, "no 'text'"),
    ({"text": 7, "label": 1}, "'text' is a int, not text"),
    ({"text": "x", "label": 2}, "label 2 is out of range: the classes are 0 .. 1"),
    ({"text": "x", "label": -1}, "label -1 is out of range"),
    ({"text": "x", "label": "goood"}, "unknown label 'goood'; did you mean 'good'?"),
    ({"text": "x", "label": None}, "no 'label'"),
    ({"text": "x", "label": 0.5}, "unknown label 0.5"),
]


def test_bad_rows_are_counted_and_placed(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = numbered(100)
    for index, (row, _) in enumerate(BAD):
        rows[10 * index] = row
    spec = write("a.jsonl", rows)
    with pytest.raises(DataError) as raised:
        load(tokenizer, DataSpec(train=spec))
    lines = str(raised.value).split("\n")
    assert lines[0] == "train: 8 of 100 rows cannot be used"
    assert lines[6:] == ["  - ... and 3 more", "  -> fix these rows, or set data.on_bad_row to skip"]
    for line, (index, (_, why)) in zip(lines[1:6], enumerate(BAD), strict=False):
        assert line.startswith(f"  - a.jsonl:{10 * index + 1}: {why}")


@pytest.mark.parametrize(("row", "why"), BAD)
def test_each_kind_of_bad_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError) as raised:
        load(tokenizer, DataSpec(train=write("a.jsonl", [*numbered(3), row])))
    assert f"a.jsonl:4: {why}" in str(raised.value)


def test_bad_rows_are_skipped_up_to_a_fraction(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = write("a.jsonl", [*numbered(98), {"text": "x", "label": 9}, {"text": "y"}])
    sizes = {"train": spec, "validation_rows": 10, "test_rows": 10, "on_bad_row": "skip"}
    sets = load(tokenizer, DataSpec(**sizes, max_bad_fraction=0.02))
    assert sets.train.skipped == 2 and len(sets.train.examples) == 78
    with pytest.raises(DataError, match=r"these are 2\.0%, data\.max_bad_fraction allows 1\.0%"):
        load(tokenizer, DataSpec(**sizes))


def test_sets_describe_themselves(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*numbered(20), {"text": "long " * 40, "label": 1}]
    sets = load(tokenizer, DataSpec(train=write("a.jsonl", rows), validation_rows=2, test_rows=2))
    lines = sets.describe()
    assert [line.split(":")[0] for line in lines] == ["train", "validation", "test"]
    assert sum(loaded.truncated for loaded in sets.all()) == 1
    assert max(len(example.sequences[0]) for loaded in sets.all() for example in loaded.examples) == 16
    assert any("; 1 truncated" in line for line in lines) and "labels bad " in lines[0]
    (shown,) = sets.preview(1, tokenizer)
    assert "[CLS] text number" in shown and "tokens, label" in shown


def test_ids_come_from_the_rows_where_they_identify_them() -> None:
    def ids(rows: list[dict[str, Any]]) -> list[str]:
        spec = write("a.jsonl", rows)
        return [row.id for row in read_pool("new", spec, DataSpec(train=spec), TASK, labeled=False).rows]

    assert ids([{"id": 5, "text": "a"}, {"id": "x", "text": "a"}]) == ["5", "x"]
    assert ids([{"id": 5, "text": "a"}, {"id": 5, "text": "b"}]) == ["a.jsonl:1", "a.jsonl:2"]


def test_rows_draws_a_seeded_sample() -> None:
    spec = write("a.jsonl", numbered(100)).model_copy(update={"rows": 10})

    def drawn(seed: int) -> list[str]:
        return [row.id for row in read_pool("new", spec, DataSpec(train=spec, seed=seed), TASK, labeled=True).rows]

    assert len(drawn(0)) == 10 and drawn(0) == drawn(0) != drawn(1)


def test_max_length_beyond_the_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    task = classification.build(classification.Spec(num_labels=2, max_length=513))
    with pytest.raises(DataError, match="task.max_length is 513, but the model takes 512 tokens"):
        load_sets(DataSpec(train=SetSpec(files="unread.jsonl")), EvaluationSpec(), task, tokenizer)


def test_text_sets_need_no_labels_and_are_cut_into_blocks(tokenizer: PreTrainedTokenizerBase) -> None:
    task = language_modeling.build(language_modeling.Spec(max_length=8))
    rows = [{"text": f"{n} " + "word " * 20} for n in range(6)]
    data = DataSpec(train=write("a.jsonl", rows), validation_rows=1, test_rows=1)
    sets = load_sets(data, EvaluationSpec(), task, tokenizer)
    assert len(sets.train.examples) == 4 * 3 and sets.train.examples[0].id.endswith("#0")
    assert "unlabeled" not in sets.describe()[0]
