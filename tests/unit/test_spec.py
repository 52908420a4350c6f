"""Specs: one frozen value in and out of YAML; every mistake is named with its line, its key and a way out."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora import errors, registry
from raylora.errors import SpecError
from raylora.spec import build_spec, diff_specs, dump_spec, json_schema, parse_spec, read_spec

GOOD = """\
name: demo
base:
  source: some/model
  quantization: nf4
task:
  kind: classification
  labels: [bad, good]
data:
  train: {files: rows.jsonl}
"""
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def problems(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, overrides, where="run.yaml")
    return [line.removeprefix("  - ") for line in caught.value.message.splitlines()[1:]]


CASES = [
    ("ensmble: {members: 3}", "run.yaml:10: ensmble: ", "did you mean 'ensemble'?"),
    ("ensemble:\n  member: 3", "run.yaml:11: ensemble.member: ", "did you mean 'members'?"),
    ("adapter:\n  kind: lora\n  rnak: 3", "run.yaml:12: adapter.rnak: ", "did you mean 'rank'?"),
    ("adapter: {kind: lorra}", "run.yaml:10: adapter: ", "did you mean 'lora'?"),
    ("adapter: {rank: 0}", "run.yaml:10: adapter.rank: ", "greater than or equal to 1 (got 0)"),
    ("adapter: {dropout: 1.5}", "run.yaml:10: adapter.dropout: ", "less than 1"),
    ("adapter: 3", "run.yaml:10: adapter: ", "expected a mapping with a 'kind'"),
    ("ensemble: {members: many}", "run.yaml:10: ensemble.members: ", "got 'many'"),
    ("ensemble: {members: 3, seeds: [1, 2]}", "run.yaml:10: ensemble: ", "2 seeds for 3 members"),
    ("ensemble: {members: 2, seeds: [1, 1]}", "run.yaml:10: ensemble: ", "seeds repeat"),
    ("ensemble: {members: 2, min_members: 3}", "run.yaml:10: ensemble: ", "only 2 members"),
    ("optimization: {epochs: 1, steps: 4}", "run.yaml:10: optimization: ", "not both"),
    ("optimization: {lr: .nan}", "run.yaml:10: optimization.lr: ", "finite"),
    ("optimization: {lr: .inf}", "run.yaml:10: optimization.lr: ", "finite"),
    ("optimization: {betas: [0.9, 1.5]}", "run.yaml:10: optimization.betas", "less than 1"),
    ("optimization: {optimizer: adam}", "run.yaml:10: optimization.optimizer: ", "'adamw' or 'sgd'"),
    ("placement: {workers: 0}", "run.yaml:10: placement.workers", "at least 1"),
    ("evaluation:\n  in_distribution:\n    test: {files: x}", "run.yaml:10: evaluation: ", "'test' is taken"),
    ("placement: {workers: many}", "run.yaml:10: placement.workers: ", "or: Input should be"),
    ("placement: {workers: [3]}", "run.yaml:10: placement.workers: ", "valid integer (got [3]); or: Input should be"),
    ("ensemble:\n  select: greedy", "run.yaml:11: ensemble.select: ", "keys of its own (got 'greedy'); known: method"),
    ("ensemble:\n  vary:\n    optimization.lr: []", "run.yaml:11: ensemble.vary: optimization.lr ", "has no values"),
    ("ensemble:\n  vary:\n    optimization.lr: {low: 2, high: 1}", "run.yaml:12: ensemble.vary.optimization.lr: low 2 ",
     "must be below high 1"),
    ("ensemble:\n  vary:\n    optimization.lr: {low: 1, hihg: 2, high: 3}",
     "run.yaml:12: ensemble.vary.optimization.lr.hihg: ", "did you mean 'high'?"),
    ("ensemble:\n  vary:\n    optimization.lr: [fast]", "run.yaml:11: ensemble.vary: member 0 with ", "valid number"),
    ("task2: 1", "run.yaml:10: task2: ", "did you mean 'task'?"),
    ("name: Bad_Name", "run.yaml:10: name: ", "must match"),
    ("storage_path: s3://key:word@bucket/x", "run.yaml:10: storage_path: ", "password does not belong"),
    ("baselines: {mc_dropout: {dropout: 0}}", "run.yaml:10: baselines.mc_dropout.dropout: ", "greater than 0"),
]


@pytest.mark.parametrize(("extra", "place", "says"), CASES)
def test_a_mistake_is_one_message_with_file_line_key_and_remedy(extra: str, place: str, says: str) -> None:
    base = GOOD if not extra.startswith("name") else GOOD.replace("name: demo\n", "") + "\n"
    (found,) = problems(base + extra + "\n")
    assert found.startswith(place), found
    assert says in found, found


@pytest.mark.parametrize("key", ["decay_a", "decay_b", "decay_head"])
def test_a_decay_that_flips_the_sign_is_refused_naming_both_keys(key: str) -> None:
    text = GOOD + f"optimization: {{lr: 0.01}}\nensemble:\n  regularizers: {{{key}: 100}}\n"
    (found,) = problems(text)
    assert f"lr * {key} = 1 >= 1" in found
    assert f"ensemble.regularizers.{key} below 100" in found and "optimization.lr below 0.01" in found
    assert parse_spec(text.replace("100", "99.9")).ensemble.regularizers


def test_every_mistake_is_reported_at_once() -> None:
    text = GOOD.replace("  source: some/model\n", "").replace("train:", "trian:") + "ensemble: {member: 3}\nlr: 3\n"
    found = problems(text)
    assert [re.sub(r"^run\.yaml:(\d+): ([\w.]+): .*", r"\1 \2", line) for line in found] == [
        "10 ensemble.member", "11 lr", "2 base.source", "7 data.train", "8 data.trian",
    ] or len(found) == 5
    assert any("base.source" in line and "required" in line for line in found)
    assert any("data.trian" in line and "did you mean 'train'?" in line for line in found)


@pytest.mark.parametrize("key", ["hf_token", "api_key", "apikey", "password", "client_secret", "HF_TOKEN"])
@pytest.mark.parametrize("section", ["", "base"])
def test_secrets_are_refused_without_repeating_them(key: str, section: str) -> None:
    line = f"{key}: hunter2\n"
    text = GOOD + line if not section else GOOD.replace("base:\n", f"base:\n  {line}")
    with pytest.raises(SpecError, match="looks like a secret") as caught:
        parse_spec(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# nothing", "- a\n- b", "just words", "a: [1, 2", "a: b: c", "\tx: 1"])
def test_what_is_not_a_mapping_is_refused_by_name(text: str) -> None:
    with pytest.raises(SpecError, match=r"^run\.yaml"):
        parse_spec(text, where="run.yaml")


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(SpecError, match="twice"):
        parse_spec(GOOD + "ensemble: {members: 3}\nensemble: {seed: 1}\n")


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(SpecError, match=says):
            read_spec(path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(SpecError, match="not UTF-8"):
        read_spec(tmp_path / "latin.yaml")


# --- in and out ------------------------------------------------------------------------------------------
def test_a_spec_reads_back_equal(make_spec: Callable[..., Any]) -> None:
    for spec in (parse_spec(GOOD), make_spec(
        ensemble__regularizers={"kl": {"beta": 0.1}, "early_stopping": {}, "decay_a": 2.0},
        baselines__mc_dropout={"passes": 4}, adapter__layers={"last": 1}, ensemble__seeds=[3, 4],
        evaluation__in_distribution={"tweets": {"source": "pypi:tweets"}},
    )):
        again = parse_spec(dump_spec(spec))
        assert again == spec and again.digest() == spec.digest() and diff_specs(spec, again) == []


@given(st.integers(1, 50), st.floats(1e-6, 1e-2), st.integers(1, 64), st.sampled_from(["linear", "cosine"]))
@settings(max_examples=40, deadline=None)
def test_any_numbers_read_back_equal(members: int, lr: float, batch: int, schedule: str) -> None:
    changes = (f"ensemble.members={members}", f"optimization.lr={lr!r}", f"optimization.micro_batch={batch}",
               f"optimization.schedule={schedule}")
    spec = parse_spec(GOOD, changes)
    assert (spec.ensemble.members, spec.optimization.lr) == (members, lr)
    assert parse_spec(dump_spec(spec)) == spec


def test_the_digest_knows_neither_name_nor_place_but_everything_else(make_spec: Callable[..., Any]) -> None:
    digest = make_spec().digest()
    assert make_spec(name="other", storage_path="/elsewhere").digest() == digest
    assert make_spec(name=None).run_name() == f"run-{digest[:8]}"
    changes = {"ensemble__seed": 1, "adapter__rank": 2, "base__quantization": "nf4", "data__seed": 3,
               "task__max_length": 20, "optimization__lr": 0.001}
    assert len({digest, *(make_spec(**{key: value}).digest() for key, value in changes.items())}) == 7


def test_the_digest_is_the_same_in_another_process() -> None:
    code = f"from raylora.spec import parse_spec; print(parse_spec({GOOD!r}).digest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == parse_spec(GOOD).digest()


def test_how_a_default_is_written_does_not_matter() -> None:
    written = GOOD.replace("quantization: nf4", "quantization: {kind: nf4, double_quant: true}")
    assert parse_spec(written + "optimization: {epochs: 3}\n").digest() == parse_spec(
        GOOD + "optimization: {epochs: 3.0}\nadapter: {kind: lora}\n"
    ).digest()


def test_a_spec_is_frozen_and_pickles() -> None:
    spec = parse_spec(GOOD)
    with pytest.raises(Exception, match="frozen"):
        spec.ensemble.members = 3
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_overrides_reach_every_depth() -> None:
    spec = parse_spec(GOOD, (
        "ensemble.members=7", "adapter.rank=3", "base.quantization.double_quant=false", "name=other",
        "task.labels=[a, b, c]", "ensemble.regularizers.kl.beta=0.5",
    ))
    assert (spec.ensemble.members, spec.adapter.rank, spec.name) == (7, 3, "other")
    assert spec.base.quantization.double_quant is False and spec.task.labels == ["a", "b", "c"]
    assert spec.ensemble.regularizers.kl.beta == 0.5


@pytest.mark.parametrize(("override", "says"), [
    ("ensemble.members", "not of the form"), ("=3", "not of the form"),
    ("name.x.y=1", "name: Input should be a valid string"),
    ("ensemble.membres=3", "did you mean 'members'?"), ("optimization.lr=[1", "not valid YAML"),
])
def test_a_bad_override_is_explained(override: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD, (override,))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["a", "run-1", "x" * 40])
def test_names_fit_a_folder_and_a_label(name: str) -> None:
    assert parse_spec(GOOD, (f"name={name}",)).run_name() == name


@pytest.mark.parametrize("name", ["-a", "a-", "A", "a_b", "x" * 41, "../x", "a/b", "a\n"])
def test_other_names_are_refused(name: str) -> None:
    content = {**yaml.safe_load(GOOD), "name": name}
    with pytest.raises(SpecError, match="must match"):
        build_spec(content)


# --- the schema ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    found = json_schema()
    json.dumps(found)
    jsonschema.Draft202012Validator.check_schema(found)  # once: it takes a second
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_schema_accepts_every_example(path: Path, schema: jsonschema.Draft202012Validator) -> None:
    text = path.read_text(encoding="utf-8")
    schema.validate(yaml.safe_load(text))
    schema.validate(yaml.safe_load(dump_spec(parse_spec(text))))


@pytest.mark.parametrize("line", ["ensmble: {}", "adapter: {kind: lorra}", "adapter: {rank: 0}", "quantization: x"])
def test_the_schema_refuses_what_the_reader_refuses(line: str, schema: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(yaml.safe_load(GOOD + line))


def test_there_are_examples() -> None:
    assert EXAMPLES


# --- registry and errors ---------------------------------------------------------------------------------
CONFIGURED = sorted(registry.REGISTRY.keys() - {"output", "report"})
"""The seams that a spec configures; outputs and their reports have no settings."""


@pytest.mark.parametrize("seam", CONFIGURED)
def test_every_kind_loads_and_says_its_own_name(seam: str) -> None:
    assert registry.kinds(seam) == sorted(registry.REGISTRY[seam])
    for kind in registry.kinds(seam):
        module = registry.load(seam, kind)
        assert module.Spec.model_fields["kind"].default == kind and callable(module.build)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match="known: boosted_lora, dora, .*full, .*lora, .*mos, .*none"):
        registry.load("adapter", "zzz")


@pytest.mark.parametrize("error", [
    errors.SpecError("a", "b"), errors.StoreError("a"), errors.Interrupted("a", "b", 15),
    errors.TrainingError("a", "b"),
])
def test_errors_survive_pickling_with_their_exit_code(error: errors.RayloraError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.exit_code == error.exit_code
    assert again.hint == error.hint


def test_exit_codes_tell_usage_failure_and_interruption_apart() -> None:
    assert (errors.SpecError("x").exit_code, errors.TrainingError("x").exit_code) == (2, 1)
    assert errors.Interrupted("x", signal_number=15).exit_code == 143
