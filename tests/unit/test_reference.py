"""The reference: the committed pages are what the models say now, and no key of any model is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylora import registry
from raylora.data.task import Task
from raylora.spec import Frozen, KindSpec, json_schema, parse_spec
from raylora.spec.keys import keys_of
from raylora.spec.kinds import SEAMS, WHERE, kind_of
from raylora.spec.reference import PAGES, pages, write

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
KINDS = [(seam, kind) for seam in SEAMS for kind in registry.kinds(seam)]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


def test_the_committed_pages_are_those_that_would_be_made_now(made: dict[str, str]) -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    differing = sorted(name for name in {*made, *committed} if made.get(name) != committed.get(name))
    assert not differing, f"{', '.join(differing)} in docs/reference: run make docs"


def test_writing_gives_the_pages_and_touches_nothing_else(tmp_path: Path, made: dict[str, str]) -> None:
    other = tmp_path / "other.md"
    other.write_text("mine")
    written = write(tmp_path)
    assert {path.name: path.read_text() for path in written} == made and other.read_text() == "mine"


# --- every key, found by other means than the generator's ---------------------------------------------------
def paths_of(schema: dict[str, Any], definitions: dict[str, Any], prefix: str, seen: set[str]) -> Iterator[str]:
    """Yield the key paths of a JSON schema; what a $ref leads to, once."""
    for name, part in schema.get("properties", {}).items():
        yield prefix + name
        for branch in [part, *part.get("anyOf", [])]:
            named = branch.get("additionalProperties")
            values = [named, *named.get("anyOf", [])] if isinstance(named, dict) else []
            for inner, below in ((branch, ""), *((value, ".NAME") for value in values)):
                target = inner.get("$ref", "").rpartition("/")[2]
                if target and target not in seen:
                    seen.add(target)
                    yield from paths_of(definitions[target], definitions, f"{prefix}{name}{below}.", seen)


def test_every_key_of_the_run_spec_is_a_row_of_its_page(made: dict[str, str]) -> None:
    schema = json_schema()
    expected = list(paths_of(schema, schema["$defs"], "", set()))
    rows = re.findall(r"^\| `([\w.]+)` \|", made["run.md"], re.MULTILINE)
    assert len(rows) == len(set(rows)) and set(rows) == set(expected) and len(rows) > 100


def every_model(model: type[Frozen] = Frozen) -> Iterator[type[Frozen]]:
    for below in model.__subclasses__():
        yield below
        yield from every_model(below)


def test_every_model_is_on_a_page_with_all_its_fields(made: dict[str, str]) -> None:
    for seam, kind in KINDS:
        registry.load(seam, kind)
    private = {"_DistillFile"}  # the wrapper of a file that holds nothing but a distill section
    for model in {each for each in every_model() if each.__module__.startswith("raylora.")}:
        if model.__module__ == "raylora.placement.cluster":  # files that docs/commands.md is about
            continue
        if issubclass(model, KindSpec) or model.__name__ in private:
            continue
        fields = {rf"^\| `([\w.]+\.)?{name}` \|" for name in model.model_fields}
        assert all(re.search(field, made["run.md"], re.MULTILINE) for field in fields), model


@pytest.mark.parametrize(("seam", "kind"), KINDS)
def test_every_kind_has_a_section_with_each_of_its_keys(seam: str, kind: str, made: dict[str, str]) -> None:
    page = next(page for page, (_, seams) in PAGES.items() if seam in seams)
    text = made[page]
    if len(PAGES[page][1]) > 1:
        text = text.partition(f"## {seam.capitalize()}\n")[2].partition("\n## ")[0]
    section = re.split(r"^#{2,3} ", text.partition(f"# {kind}\n")[2], flags=re.MULTILINE)[0]
    spec = registry.load(seam, kind).Spec
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|", section, re.MULTILINE) == list(spec.model_fields)
    for number in re.findall(r"arXiv (\d+\.\d+)", registry.load(seam, kind).__doc__.partition("\n\n")[0]):
        assert f"https://arxiv.org/abs/{number}" in section
    assert f"`{kind}`" in made["README.md"]


@pytest.mark.parametrize(("seam", "kind"), KINDS)
def test_every_key_of_every_kind_has_a_sentence(seam: str, kind: str) -> None:
    found = kind_of(seam, kind)
    assert found.title and found.says, "the module or its Spec has no docstring"
    assert not [key.path for key in found.keys if not key.says]
    json.dumps(found.record())


def test_every_key_of_the_run_spec_has_a_sentence_and_seconds_their_unit() -> None:
    from raylora.spec import RunSpec

    keys = {key.path: key for key in keys_of(RunSpec)}
    assert not [path for path, key in keys.items() if not key.says]
    assert {path for path, key in keys.items() if key.unit == "seconds"} == {p for p in keys if p.endswith("_s")}
    lr, eps, labels = keys["optimization.lr"], keys["optimization.eps"], keys["base.dtype"]
    assert (lr.accepts, lr.default) == ("number of more than 0", "0.0005")
    assert (labels.accepts, eps.default) == ("auto, float32 or bfloat16", "1.0e-08")  # 1e-08 would be text in YAML
    assert keys["base"].default is None and keys["base.source"].default is None
    assert set(WHERE.values()) <= set(keys)


# --- tasks: columns, a row, a spec ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", registry.kinds("task"))
def test_a_tasks_row_and_spec_are_real(kind: str) -> None:
    found = kind_of("task", kind)
    spec = parse_spec(found.spec)
    task: Task = registry.load("task", kind).build(spec.task)
    assert found.columns is not None and found.row is not None
    columns = {*found.columns.required, *found.columns.optional, *filter(None, [found.columns.label])}
    assert set(found.row) <= columns and {*found.columns.required, *filter(None, [task.label_column])} <= set(found.row)
    assert task.content(found.row)
    assert (task.label(found.row) is None) == (task.label_column is None)
    for column in found.columns.required:  # required means required
        with pytest.raises(ValueError, match=column):
            task.content({key: value for key, value in found.row.items() if key != column})
