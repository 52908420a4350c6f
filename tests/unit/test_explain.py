"""``raylora explain``: every key and every kind is found by its path, and a misspelt one by its nearest."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from raylora import registry
from raylora.cli import app
from raylora.spec import RunSpec
from raylora.spec.keys import keys_of
from raylora.spec.kinds import SEAMS, WHERE, kind_of
from raylora.spec.lookup import look_up


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments])


def found(name: str) -> list[dict[str, Any]]:
    done = call(name, "--json")
    assert done.exit_code == 0, done.output
    records: list[dict[str, Any]] = json.loads(done.stdout)
    return records


def test_every_key_of_the_run_spec_is_found_by_its_path() -> None:
    for key in keys_of(RunSpec):
        (topic,) = look_up(key.path.replace("NAME", "tweets"))
        assert topic.key is not None and topic.key.says == key.says and topic.key.default == key.default


@pytest.mark.parametrize("seam", SEAMS)
def test_every_kind_and_alias_is_found_by_seam_by_key_and_by_name(seam: str) -> None:
    for name in [*registry.kinds(seam), *registry.ALIASES.get(seam, {})]:
        one, other = look_up(f"{seam}.{name}"), look_up(f"{WHERE[seam]}.{name}")
        assert one == other and len(one) == 1 and one[0] in look_up(name)
        alias = registry.alias_of(seam, name)
        assert one[0].kind is not None and one[0].kind.name == (alias.kind if alias else name)
        for key in kind_of(seam, name).keys if alias is None else ():
            (topic,) = look_up(f"{seam}.{name}.{key.path}")
            assert topic.key is not None and topic.key.says == key.says and topic.of_kind == name


def test_a_key_says_what_it_is_what_it_may_be_and_its_default() -> None:
    (lr,) = found("optimization.lr")
    assert lr == {"key": "optimization.lr", "type": "number of more than 0", "required": False, "default": "0.0005",
                  "unit": "", "says": "The highest learning rate of the schedule."}
    text = call("placement.start_timeout_s").stdout
    assert "number of more than 0, in seconds" in text and "default: 180.0" in text
    assert "default: required" in call("base.source").stdout
    assert "adamw or sgd" in call("optimization").stdout
    assert [record["key"] for record in found("lr")] == ["optimization.lr"]
    assert {record["of_kind"] for record in found("adapter.rank")} >= {"lora", "mos", "lora_xs"}


def test_a_kind_says_its_paper_its_keys_and_a_tasks_columns() -> None:
    (optq,) = found("quantization.optq")
    assert optq["papers"] == ["2210.17323"] and "bits" in [key["key"] for key in optq["keys"]]
    (task,) = found("task.classification")
    assert task["columns"] == {"required": ["text"], "optional": ["text_pair"], "label": "label"}
    assert "raylora init --task classification" in call("task.classification").stdout
    (peft,) = found("adapter.peft")
    assert "use_dora" in peft["methods"]["LORA"] and "use_dora" in call("adapter.peft").stdout


def test_an_alias_says_what_it_stands_for() -> None:
    (dora,) = found("dora")
    assert dora["stands_for"] == "{kind: peft, method: LORA, options: {use_dora: true}}"
    assert dora["papers"] == ["2402.09353"] and list(dora["methods"]) == ["LORA"]
    assert "rank (options.r)" in call("dora").stdout and "dora" in call("adapter").stdout


def test_alone_it_lists_every_section_and_every_kind() -> None:
    listed = json.loads(call("--json").stdout)
    assert [section["key"] for section in listed["sections"]] == list(RunSpec.model_fields)
    assert {seam: entry["kinds"] for seam, entry in listed["seams"].items()} == {s: registry.kinds(s) for s in SEAMS}
    text = call().stdout
    assert all(name in text for name in [*RunSpec.model_fields, *registry.kinds("loss"), "vera"])


@pytest.mark.parametrize(("name", "near"), [
    ("optimization.lrr", "optimization.lr"), ("optimizaton", "optimization"), ("adapter.perft", "adapter.peft"),
    ("dorra", "dora"), ("quantization.otpq", "quantization.optq"),
    ("base.quantization.optq.bitz", "base.quantization.optq.bits"),
    ("adapter.lora.rnak", "adapter.lora.rank"), ("ensemble.members.x", "ensemble.members"),
    ("Task.Regression", "task.regression"),
    ("optimization.", "optimization"), ("adapter.rnak", "adapter.rank"),
])
def test_an_unknown_name_ends_with_2_and_the_nearest_one(name: str, near: str) -> None:
    done = call(name)
    assert done.exit_code == 2 and f"did you mean '{near}'?" in done.output
    record = json.loads(call(name, "--json").stdout)
    assert record["exit_code"] == 2 and near in record["hint"]


@pytest.mark.parametrize("name", ["zzz", ".", "..", "adapter..", "9"])
def test_where_nothing_is_near_the_sections_are_listed_or_one_is_offered(name: str) -> None:
    done = call(name)
    assert done.exit_code == 2 and ("known sections: name," in done.output or "did you mean" in done.output)
    assert "Traceback" not in done.output


@pytest.mark.parametrize("arguments", [["--help"], ["explain"], ["explain", "optimization.lr"], ["explain", "adapter"]])
def test_what_needs_no_kinds_module_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from raylora.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
