"""Prompts and chats at the command line, and files of answers that go on where they were cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raylora.cli import app
from raylora.cli.answering import shade
from raylora.engine.generation.answers import Token
from raylora.errors import UsageError
from raylora.serve.answer_files import read_prompts, write_answers
from raylora.serve.predictor import LoadedEnsemble, load_ensemble
from raylora.store.run_store import RunStore

SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "batch": 2}


@pytest.fixture
def writer(make_spec: Callable[..., Any], tiny_model: Callable[[str], str], trained: Callable[[Any], str]) -> str:
    """Return a finished run on chats."""
    return trained(make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto", evaluation__out_of_distribution={},
        task={"kind": "instruction", "max_length": 112}, optimization={"lr": 0.01, "steps": 2, "micro_batch": 2},
        data={"train": {"source": "pypi:soc-codes"}, "train_rows": 4, "validation_rows": 2, "test_rows": 2},
    ))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Write prompts and chats and return their file."""
    rows: list[dict[str, Any]] = [{"prompt": f"What is {n}?"} for n in range(4)]
    rows.append({"id": "mine", "messages": [{"role": "user", "content": "Hello"}]})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def raylora(*arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), **options)


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_answered(writer: str) -> None:
    few = ["--max-new-tokens", "4"]
    said = raylora("predict", writer, "--prompt", "Hi", "--prompt", "Ho", "--agreement", "--json", *few)
    assert said.exit_code == 0, said.output
    answers = [json.loads(line) for line in said.output.splitlines() if line.startswith("{")]
    assert [one["id"] for one in answers] == ["0", "1"] and all(len(one["tokens"]) <= 4 for one in answers)
    assert all({"text", "nll", "mean_entropy", "mean_mutual_information", "agreement"} <= one.keys() for one in answers)
    shown = raylora("predict", writer, "--prompt", "Hi", "--each-member", *few)
    assert shown.exit_code == 0 and "member 1:" in shown.output and "NLL" in shown.output


def test_a_file_of_answers_goes_on_where_it_stopped(
    writer: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    options = ["--max-new-tokens", "4", "--each-member"]
    assert raylora("predict", writer, "--file", prompts, "--out", str(whole), *options).exit_code == 0
    records = records_of(whole)
    assert [one["id"] for one in records] == ["0", "0", "1", "1", "2", "2", "3", "3", "mine", "mine"]
    assert records[-1]["input"]["messages"][0]["content"] == "Hello" and not Path(f"{whole}.part").exists()

    real = LoadedEnsemble.answers

    def killed(self: LoadedEnsemble, rows: Any, **settings: Any) -> Iterator[Any]:
        for number, answers in enumerate(real(self, rows, **settings)):
            if number == 3:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(LoadedEnsemble, "answers", killed)
        assert raylora("predict", writer, "--file", prompts, "--out", str(broken), *options).exit_code != 0
    part = Path(f"{broken}.part")
    assert not broken.exists() and part.exists()
    with part.open("a") as file:  # as a process that dies in the middle of a line leaves it
        file.write(json.dumps(records[6])[:40])
    refused = raylora("predict", writer, "--file", prompts, "--out", str(broken), "--max-new-tokens", "5")
    assert refused.exit_code == 2 and "was begun with other prompts, another run or other settings" in refused.output
    again = raylora("predict", writer, "--file", prompts, "--out", str(broken), *options)
    assert again.exit_code == 0 and "3 of them from before" in again.output
    assert broken.read_text() == whole.read_text() and not part.exists()


def test_answers_are_compared_with_those_that_rows_hold(writer: str, tmp_path: Path) -> None:
    ensemble = load_ensemble(writer)
    asked = [f"What is {n}?" for n in range(6)]
    said = ensemble.generate(asked, max_new_tokens=4)
    rows = [{"prompt": text, "completion": one.text if n % 2 else "no such words"}
            for n, (text, one) in enumerate(zip(asked, said, strict=True))]
    path, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--file", str(path), "--out", str(output), "--max-new-tokens", "4", "--agreement"]
    told = raylora("predict", writer, *options, "--metric", "exact_match", "--metric", "f1", "--json")
    assert told.exit_code == 0, told.output
    described = json.loads(next(line for line in told.output.splitlines() if line.startswith("{")))["described"]
    assert described["metrics"]["exact_match"]["value"] == 0.5 and described["answers"] == 6
    assert described["error_auroc"].keys() == {"mean_nll", "mean_entropy", "mean_mutual_information", "disagreement"}
    shown = raylora("predict", writer, *options, "--metric", "exact_match")
    assert "AUROC for wrong answers" in shown.output and "0.500" in shown.output
    each = ["--metric", "f1", "--each-member"]
    for wrong, why in (["--metric", "exact"], "unknown metric"), (each, "one for each row"):
        refused = raylora("predict", writer, *options, *wrong)
        assert refused.exit_code == 2 and why in refused.output.replace("\n", " ")
    path.write_text('{"prompt": "Hi"}\n')
    output.unlink()
    refused = raylora("predict", writer, *options, "--metric", "f1")
    assert refused.exit_code == 2 and "row 0 has no answer to compare with" in refused.output.replace("\n", " ")
    assert not list(tmp_path.glob("out*"))


def test_progress_is_told_for_every_prompt(writer: str, prompts: str, tmp_path: Path) -> None:
    ensemble, told = load_ensemble(writer), []
    rows = read_prompts(ensemble, prompts).rows
    path = str(tmp_path / "a.jsonl")
    write_answers(ensemble, list(rows), path, SETTINGS, lambda done, of: told.append((done, of)))
    assert told == [(n, 5) for n in range(6)]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--prompt", " "], "prompt 0: 'prompt' is empty"),
        (["--prompt", "a " * 5000], "more than the"),
        (["--prompt", "Hi", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "Hi", "--text", "Hi"], "give either --text, --prompt or --file"),
        (["--text", "Hi"], "--text: a row of this run has"),
    ],
)
def test_bad_prompts_are_one_sentence(arguments: list[str], why: str, writer: str) -> None:
    said = raylora("predict", writer, *arguments)
    assert said.exit_code == 2 and why in said.output.replace("\n", " ")


def test_broken_lines_are_named_or_left_out(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "Hi"}\nnot json\n{"prompt": ""}\n{"messages": [{"role": "robot", "content": "x"}]}\n')
    said = raylora("predict", writer, "--file", str(path), "--out", str(tmp_path / "out.jsonl"))
    assert said.exit_code == 2 and "broken.jsonl:2: not valid JSON" in said.output and "2 more" in said.output
    assert not list(tmp_path.glob("out*"))
    said = raylora("predict", writer, "--file", str(path), "--out", str(tmp_path / "out.jsonl"), "--on-bad-row", "skip",
                   "--max-new-tokens", "2")
    assert said.exit_code == 0 and "3 row(s) left out, 1 to answer" in said.output
    assert len(records_of(tmp_path / "out.jsonl")) == 1


def test_a_run_that_is_not_finished_or_does_not_write_says_so(
    make_spec: Callable[..., Any], trained: Callable[[Any], str]
) -> None:
    classes = trained(make_spec())
    said = raylora("predict", classes, "--prompt", "Hi")
    assert said.exit_code == 2 and "has no model that writes" in said.output.replace("\n", " ")
    with pytest.raises(UsageError, match="has no model that writes"):
        read_prompts(load_ensemble(classes), "x.jsonl")
    store = RunStore(classes)
    store.storage.delete("members/member-001")
    said = raylora("predict", classes, "--prompt", "Hi")
    assert said.exit_code != 0 and "member-001" in said.output


def test_a_chat_is_answered_in_shades_and_each_member_can_be_asked(writer: str) -> None:
    lines = "Hello\n/members\n/new\n/help\n<|im_end|>\nAnd now?\n/quit\n"
    said = raylora("chat", writer, "--max-new-tokens", "4", "--system", "Be brief.", input=lines)
    assert said.exit_code == 0, said.output
    assert "member 0:" in said.output and "member 1:" in said.output and "/members" in said.output
    assert "the user's text holds '<|im_end|>'" in said.output
    ensemble = load_ensemble(writer)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And now?"}]
    (answer,) = ensemble.generate(chat, max_new_tokens=4)
    assert answer.text.strip() in said.output
    assert raylora("chat", writer, input="").exit_code == 0  # the end of input


def test_a_shade_is_the_strongest_disagreement_within() -> None:
    sure, torn = Token(1, "a", -0.1, 0.1, 0.0), Token(2, "b", -2.0, 2.0, 0.7)
    assert shade([sure]) == "" == shade([]) and shade([sure, torn]) == shade([torn]) == "black on rgb(255,105,0)"
