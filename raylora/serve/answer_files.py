"""Answers to a file of prompts, written one after another, so that what was cut short goes on where it stopped.

While they are written the answers stand in ``FILE.part``, behind a line that says of what they are; the file itself
appears when the last one is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from raylora.data.sources import Table, load_rows, renamed
from raylora.data.task import Asks, BadRow
from raylora.engine.generation.answers import Answer
from raylora.engine.generation.generator import BATCH
from raylora.ensemble.answer_metrics import Doubts, describe_answers, score_answers
from raylora.errors import DataError, UsageError
from raylora.serve.inputs import OnBadRow
from raylora.serve.predictor import LoadedEnsemble
from raylora.spec import EvaluationSpec, SetSpec

OnAnswer = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """Rows to answer, and the places of those that were left out."""

    rows: Sequence[dict[str, Any]]
    left_out: Sequence[str] = ()


def read_prompts(
    ensemble: LoadedEnsemble, path: str, columns: Mapping[str, str] | None = None, delimiter: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> Prompts:
    """Return the prompts of a jsonl, csv, parquet or arrow file, each with an ``id``: its own or its place's number.

    Raises:
        DataError: the file cannot be read, or a row of it asks nothing; the message says which.
    """
    task = ensemble.task
    if not isinstance(task, Asks):
        raise UsageError(f"a {task.spec.kind} run has no model that writes", "leave --prompt and its options out")
    table: Table = load_rows(SetSpec(files=path, delimiter=delimiter), Path())
    table = renamed(table, dict(columns or {}))
    bad, rows = [*table.bad], []
    for number, row in enumerate(table.rows):
        try:
            task.prompt(row.values, ensemble.base.tokenizer)
            rows.append({**row.values, "id": str(row.values.get("id", number))})
        except BadRow as error:
            bad.append(f"{row.place}: {error}")
    if bad and (on_bad_row == "error" or not rows):
        more = f"; {len(bad) - 1:,} more cannot be asked" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}", "fix the rows, or leave them out with --on-bad-row skip")
    return Prompts(rows, bad)


def write_answers(
    ensemble: LoadedEnsemble, prompts: Sequence[dict[str, Any]], path: str, settings: Mapping[str, Any],
    on_answer: OnAnswer = lambda done, of: None,
) -> int:
    """Write a JSON line per answer, in the prompts' order, and return how many were there from before.

    Args:
        settings: what :meth:`LoadedEnsemble.answers` is given.
        on_answer: told how many prompts are answered, of how many.

    Raises:
        UsageError: a part is there that was begun with other prompts or settings.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    head = json.dumps({"answers_of": _digest(ensemble, prompts, settings)})
    per_prompt = ensemble.members if settings.get("each_member") else 1
    done = _begun(part, head, per_prompt)
    on_answer(done, len(prompts))
    begin = done - done % int(settings.get("batch", BATCH))  # prompts that share a batch share its last bits
    with part.open("a", encoding="utf-8") as file:
        if not done and not file.tell():
            file.write(head + "\n")
        for number, answers in enumerate(ensemble.answers(prompts[begin:], **settings), begin + 1):
            if number <= done:
                continue
            file.writelines(json.dumps(_record(one, prompts[number - 1]), ensure_ascii=False) + "\n" for one in answers)
            file.flush()
            on_answer(number, len(prompts))
        file.flush()
        os.fsync(file.fileno())
    _publish(part, target)
    return done


def references_of(ensemble: LoadedEnsemble, prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the answers that rows hold. Raises: DataError for a row without one."""
    task = cast(Asks, ensemble.task)
    found: list[str] = []
    for row in prompts:
        text = task.reference(row)
        if text is None:
            raise DataError(f"row {row['id']} has no answer to compare with",
                            "give 'completion', or messages that end with the assistant's")
        found.append(text)
    return found


def describe_file(
    path: str, references: Sequence[str], metrics: Sequence[str], evaluation: EvaluationSpec
) -> dict[str, Any]:
    """Return how right the answers in a file are.

    The doubts by which wrong answers are to be told from right ones are an answer's negative log-probability, entropy
    and mutual information, as means over its tokens, and the share of members who did not give it, if they were asked.
    Raises: UsageError for an unknown metric.
    """
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    scores = score_answers([one["text"] for one in records], references, metrics)
    doubts = {
        name: torch.tensor([float(one[name]) for one in records], dtype=torch.float64)
        for name in ("mean_nll", "mean_entropy", "mean_mutual_information") if all(name in one for one in records)
    }
    if all("agreement" in one for one in records):
        doubts["disagreement"] = torch.tensor([1.0 - one["agreement"] for one in records], dtype=torch.float64)
    sure_N = torch.tensor([-one["nll"] for one in records], dtype=torch.float64).exp()
    return describe_answers(
        scores, Doubts(doubts, sure_N), evaluation.bins, evaluation.bootstrap_samples, evaluation.confidence
    )


def _record(answer: Answer, prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {**answer.record(), "input": {key: value for key, value in prompt.items() if key != "id"}}


def _begun(part: Path, head: str, per_prompt: int) -> int:
    """Return how many prompts a part has answered; what was cut off in the middle of a prompt is taken away."""
    if not part.exists():
        return 0
    lines = list(_whole_lines(part))
    if not lines:
        part.unlink()
        return 0
    if lines[0] != head:
        raise UsageError(f"{part} was begun with other prompts, another run or other settings",
                         "delete it, or write to another file")
    done = (len(lines) - 1) // per_prompt
    kept = "".join(line + "\n" for line in lines[: 1 + done * per_prompt])
    with part.open("r+", encoding="utf-8") as file:
        file.truncate(len(kept.encode()))
    return done


def _whole_lines(part: Path) -> Iterator[str]:
    with part.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1].decode("utf-8")


def _publish(part: Path, target: Path) -> None:
    """Leave the head out and give the file its name, all at once."""
    whole = target.with_name(target.name + ".whole")
    with part.open("rb") as source, whole.open("wb") as file:
        next(source)
        for line in source:
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(target)
    part.unlink()


def _digest(ensemble: LoadedEnsemble, prompts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    facts: list[Any] = [ensemble.spec.digest(), ensemble.members, list(prompts), dict(settings)]
    if ensemble.weights is not None:
        facts.append(ensemble.weights.record())
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
