"""Text is read and tokenized once per content: what is kept equals what would be read, and nothing stale is used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import run

from raylora.data.sets import load_sets
from raylora.data.tokenized import pack_sets, sets_key, unpack_sets
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run.plan_run import prepare
from raylora.engine.training import inputs
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import RunDirectoryError
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
LM = {"kind": "language_modeling", "max_length": 32}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often text is read and tokenized; nothing is remembered from other tests."""
    counted: list[int] = []

    def load(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return load_sets(*arguments, **options)

    monkeypatch.setattr(inputs, "load_sets", load)
    monkeypatch.setattr(inputs, "_loaded", type(inputs._loaded)())
    return counted


def key_of(spec: Any, tokenizer: Any = None) -> str | None:
    task = task_of(spec)
    return sets_key(spec.data, spec.evaluation, task.spec, tokenizer or load_tokenizer(spec.base, task))


def own_rows(folder: Path, first: str = "a fine film") -> dict[str, Any]:
    texts = [first, *(f"film number {n} is {'dull' if n % 2 else 'a joy'}" for n in range(39))]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": n % 2}) + "\n" for n, t in enumerate(texts)))
    return {"train": {"files": str(path)}, "validation_rows": 8, "test_rows": 8}


@pytest.mark.parametrize("changes", [{}, {"task": LM, "adapter__target_modules": "auto"}])
def test_kept_sets_equal_what_was_read(changes: dict[str, Any], make_spec: Make, tiny_model: Any) -> None:
    spec = make_spec(base__source=tiny_model("llama" if changes else "bert"), **changes)
    task = task_of(spec)
    sets = load_sets(spec.data, spec.evaluation, task, load_tokenizer(spec.base, task))
    again = unpack_sets(pack_sets(sets))
    assert again == sets and again.content_hash() == sets.content_hash()
    for one, two in zip(again.all(), sets.all(), strict=True):
        assert [type(e.label) for e in one.examples] == [type(e.label) for e in two.examples]


def test_the_key_changes_with_all_that_decides_the_sets(make_spec: Make, tiny_model: Any, tmp_path: Path) -> None:
    spec = make_spec(data=own_rows(tmp_path))
    tokenizer = load_tokenizer(spec.base, task_of(spec))
    first = key_of(spec, tokenizer)
    tokenizer(["a text", "another, longer text"], padding=True, truncation=True, max_length=5)
    assert first == key_of(spec, tokenizer) == key_of(make_spec(data=own_rows(tmp_path), ensemble__seed=9))
    others = {
        key_of(make_spec(data=own_rows(tmp_path), task__max_length=9)),
        key_of(make_spec(data={**own_rows(tmp_path), "validation_rows": 9})),
        key_of(make_spec(data=own_rows(tmp_path), base__source=tiny_model("gpt2"), adapter__target_modules="auto")),
        key_of(make_spec(data=own_rows(tmp_path, "a poor film"))),
    }
    assert len(others) == 4 and first not in others and None not in others
    hub = {"train": {"source": "someone/films"}, "validation_rows": 8, "test_rows": 8}
    assert key_of(make_spec(data=hub)) is None  # whatever it holds today


def test_a_run_reads_its_text_once_and_another_process_not_at_all(make_spec: Make, loads: list[int]) -> None:
    spec = make_spec()
    run(spec)
    assert len(loads) == 1
    inputs._loaded.clear()  # as in another process
    assert prepare(spec).sets.content_hash() == RunStore.for_spec(spec).read_json("data.json")["content_hash"]
    assert len(loads) == 1


def test_checking_a_spec_writes_nothing(make_spec: Make, loads: list[int], tmp_path: Path) -> None:
    spec = make_spec()
    prepare(spec)
    assert loads and not Path(spec.storage_path).exists()


def test_damaged_sets_are_read_again(
    make_spec: Make, loads: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec()
    run(spec)
    inputs._loaded.clear()
    (path,) = Path(spec.storage_path).glob("tokenized/*/000.arrow")
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert prepare(spec.model_copy(update={"name": "second"})).sets.train.examples
    assert len(loads) == 2 and "damaged" in caplog.text


def test_changed_data_is_refused_before_anything_starts(make_spec: Make, loads: list[int], tmp_path: Path) -> None:
    spec = make_spec(data=own_rows(tmp_path))
    run(spec)
    own_rows(tmp_path, "quite another text")
    with pytest.raises(RunDirectoryError, match="the data has changed since the run was begun"):
        prepare(spec)
