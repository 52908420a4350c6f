"""A base's tokenizer is read once per thread, and again when anything in its folder has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

from raylora.data.task import Task
from raylora.data.tasks import classification, multiple_choice
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.spec import BaseSpec


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the folders that tokenizers are read from, as they are read."""
    found: list[str] = []
    read = transformers.AutoTokenizer.from_pretrained

    def counted(folder: str, **kwargs: Any) -> Any:
        found.append(folder)
        return read(folder, **kwargs)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", counted)
    return found


@pytest.fixture
def folders(tiny_model: Callable[[str], str], tmp_path: Path) -> list[str]:
    """Return three folders with a language model each, that no other test has read."""
    return [str(shutil.copytree(tiny_model("llama"), tmp_path / name)) for name in ("one", "two", "three")]


CLASSES: Task = classification.build(classification.Spec(num_labels=2))
CHOICES: Task = multiple_choice.build(multiple_choice.Spec(options=2))


def load(folder: str, task: Task = CLASSES) -> Any:
    return load_tokenizer(BaseSpec(source=folder), task)


def test_a_folder_that_has_not_changed_is_read_once(folders: list[str], reads: list[str]) -> None:
    first = load(folders[0])
    assert load(folders[0]) is first and reads == folders[:1]


def test_a_folder_that_has_changed_is_read_again(folders: list[str], reads: list[str]) -> None:
    assert load(folders[0]).model_max_length != 7
    settings = Path(folders[0], "tokenizer_config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 7}))
    assert load(folders[0]).model_max_length == 7 and len(reads) == 2


def test_who_pads_on_the_other_side_has_a_tokenizer_of_its_own(tiny_model: Callable[[str], str]) -> None:
    encoder = tiny_model("bert")
    first, other, again = (load(encoder, task) for task in (CLASSES, CHOICES, CLASSES))
    assert (first.padding_side, other.padding_side, again.padding_side) == ("right", "left", "right")
    assert first is again


def test_every_thread_has_its_own(folders: list[str]) -> None:
    with ThreadPoolExecutor(1) as other:
        assert other.submit(load, folders[0]).result() is not load(folders[0])


def test_two_are_kept_and_the_one_not_asked_for_longest_is_let_go(folders: list[str], reads: list[str]) -> None:
    one, two, three = folders
    for folder in (one, two, one, three, one, two):
        load(folder)
    assert reads == [one, two, three, two]
