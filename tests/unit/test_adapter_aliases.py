"""Names that people type for an adapter with settings: each is the same spec as its long form, however it is given."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from raylora import registry
from raylora.adapters.base import Site
from raylora.adapters.peft import OPTIONS
from raylora.errors import SpecError
from raylora.spec import build_spec, dump_spec, json_schema, parse_spec

REST = """
base: {source: some/model}
task: {kind: classification, labels: [bad, good]}
data: {train: {files: rows.jsonl}}
"""
ALIASES = registry.ALIASES["adapter"]
SITES = [Site("layer.query", 64, 64, 0), Site("layer.value", 64, 64, 0)]
SMALL = {"vblora": {"options": {"vector_length": 8, "num_vectors": 12}}, "fourierft": {"options": {"n_frequency": 40}}}
"""PEFT's defaults are for wider layers."""


def read(adapter: Any, *overrides: str) -> Any:
    return parse_spec(REST + yaml.safe_dump({"adapter": adapter}), overrides).adapter


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_its_long_form_from_yaml_and_overrides_and_in_the_record(name: str) -> None:
    alias = ALIASES[name]
    settings = {"options": dict(alias.options)} if alias.options else {}
    long = read({"kind": alias.kind, **alias.keys, **settings})
    assert read(name) == read({"kind": name}) == read("lora", f"adapter={name}") == long
    assert read({}, f"adapter.kind={name}") == read({"kind": "mos"}, f"adapter.kind={name}") == long
    assert read(name, "adapter.dropout=0.25").dropout == 0.25
    spec = parse_spec(REST + f"adapter: {name}\n")
    recorded = yaml.safe_load(dump_spec(spec))["adapter"]
    assert recorded["kind"] == "peft" and name not in recorded.values()
    assert build_spec(yaml.safe_load(dump_spec(spec))) == spec
    assert spec.digest() == build_spec({**yaml.safe_load(REST), "adapter": long.model_dump()}).digest()


@pytest.mark.parametrize("name", ALIASES)
def test_short_keys_become_pefts_own_and_peft_builds_the_alias(name: str) -> None:
    alias = ALIASES[name]
    assert set(alias.names.values()) <= set(OPTIONS[alias.keys["method"]])
    spec = read({"kind": name, **dict.fromkeys(alias.names, 4), **SMALL.get(name, {})})
    for inner in alias.names.values():
        assert spec.options[inner] == 4
    adapter = registry.load("adapter", spec.kind).build(spec)
    adapter.check(SITES)


def test_every_method_of_the_peft_kind_has_an_alias_but_lora_itself() -> None:
    assert {alias.keys["method"] for alias in ALIASES.values()} == set(OPTIONS)


def test_a_students_adapter_may_be_an_alias_too() -> None:
    spec = parse_spec(REST + "distill: {student: {base: {source: a/b}, adapter: {kind: dora, rank: 2}}}\n")
    assert spec.distill.student.adapter == read({"kind": "dora", "rank": 2})


@pytest.mark.parametrize(("adapter", "says"), [
    ({"kind": "dora", "method": "VERA"}, "stands for peft with method 'LORA', and method says 'VERA'"),
    ({"kind": "dora", "options": {"use_dora": False}}, "options.use_dora True, and options.use_dora says False"),
    ({"kind": "pissa", "options": {"init_lora_weights": "olora"}}, "and options.init_lora_weights says 'olora'"),
    ({"kind": "rslora", "rank": 4, "options": {"r": 8}}, "rank says 4, and options.r says 8"),
    ({"kind": "dora", "options": 3}, "'options' must be a mapping"),
    ({"kind": "dora", "rnak": 3}, "adapter.rnak: unknown key; did you mean 'rank'?"),
    ({"kind": "ia3", "rank": 3}, "adapter.rank: unknown key"),
    ({"kind": ["dora"]}, "'kind' must be a name"),
    ("dorra", "did you mean 'dora'?"), ("VeRA", "did you mean 'vera'?"), ("adalora", "which members cannot"),
    ("qlora", "kind lora on a base with quantization nf4"),
])
def test_what_contradicts_an_alias_is_refused_by_name(adapter: Any, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(adapter)
    assert says in str(caught.value)


def test_saying_the_same_twice_is_no_contradiction() -> None:
    twice = {"kind": "dora", "method": "LORA", "rank": 4, "options": {"use_dora": True, "r": 4}}
    assert read(twice) == read({"kind": "dora", "rank": 4})


def test_the_schema_accepts_aliases_and_their_keys_only() -> None:
    schema = jsonschema.Draft202012Validator(json_schema())
    for adapter in [*ALIASES, *({"kind": name, **dict.fromkeys(ALIASES[name].names, 4)} for name in ALIASES)]:
        schema.validate({**yaml.safe_load(REST), "adapter": adapter})
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**yaml.safe_load(REST), "adapter": {"kind": "ia3", "rank": 4}})
