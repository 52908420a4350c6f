"""Rows as questions: what the members are asked of a row, what it says itself, and what is kept of their answers.

Shapes: M members, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylora.data.answered import prompt_length
from raylora.data.task import Asks, Example, Task
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator, check_length, text_of
from raylora.errors import DataError, UsageError
from raylora.placement.answering import rows_at_once


@dataclass(frozen=True)
class Question:
    """A row's prompt, token by token as in training, and the answer that the row holds."""

    id: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...] | None
    """None where the row holds none."""


def answers_obstacle(task: Task) -> str:
    """Return why a task's rows hold no answer to compare with, or nothing where they do."""
    learns = getattr(task.spec, "train_on", "")
    if isinstance(task, Asks) and learns == "completion":
        return ""
    which = f"{task.spec.kind} with train_on: {learns}" if learns else task.spec.kind
    return f"rows of {which} hold no answers to compare with"


def check_answers(task: Task) -> None:
    """Refuse a task whose rows hold no answer of their own. Raises: UsageError."""
    obstacle = answers_obstacle(task)
    if obstacle:
        raise UsageError(obstacle, "task.kind instruction with train_on: completion has")


def question_of(example: Example) -> Question:
    """Return what stands before an example's last answer, and that answer; all of it where there is none."""
    tokens, first = example.sequences[0], prompt_length(example)
    reference = tokens[slice(*example.target_ranges[-1])] if example.target_ranges else None
    return Question(example.id, tokens[:first], reference)


def check_lengths(config: Any, tokenizer: Any, set_name: str, examples: Sequence[Example], max_new_tokens: int) -> None:
    """Refuse a row that with its answer is longer than the model reads. Raises: DataError, naming it."""
    for example in examples:
        check_length(config, tokenizer, f"{set_name}: row {example.id}", question_of(example).prompt, max_new_tokens)


def answer_records(
    writer: Generator, examples: Sequence[Example], sampling: Sampling, each_member: bool,
    batch: int, report: Callable[[int, int, int], None] = lambda done, of, tokens: None,
) -> list[dict[str, Any]]:
    """Return a JSON-able record per row: id, prompt, reference, the mixture's answer and, if asked, the members' own.

    The answer is :meth:`~raylora.engine.generation.answers.Answer.record`; members' answers, which are greedy, go
    without their tokens.

    Args:
        batch: model rows per forward pass, shared out among the members.
        report: told after each batch how many rows are answered, of how many, and how many tokens the batch took: the
            mixture's, and the members' own.

    Raises:
        DataError: a prompt with its answer is longer than the model reads.
    """
    found: list[dict[str, Any]] = []
    rows = rows_at_once(batch, writer.members)
    for start in range(0, len(examples), rows):
        questions = [question_of(one) for one in examples[start : start + rows]]
        records, tokens = _batch(questions, writer, sampling, each_member)
        found += records
        report(len(found), len(examples), tokens)
    return found


def _batch(
    questions: Sequence[Question], writer: Generator, sampling: Sampling, each_member: bool
) -> tuple[list[dict[str, Any]], int]:
    """Return the records of some questions, and how many tokens were written for them."""
    asked, names = [list(one.prompt) for one in questions], [one.id for one in questions]
    if not all(asked):
        raise DataError(f"row {names[asked.index([])]}: nothing stands before its answer", "give rows with a prompt")
    ways = [replace(sampling, each_member=False), replace(sampling, each_member=True, temperature=0.0)]
    together, *own = writer.voices(asked, names, ways if each_member else ways[:1])
    records: list[dict[str, Any]] = []
    for number, (question, (answer,)) in enumerate(zip(questions, together, strict=True)):
        reference = None if question.reference is None else text_of(writer.tokenizer, question.reference)
        record: dict[str, Any] = {
            "id": question.id, "prompt": text_of(writer.tokenizer, question.prompt), "reference": reference,
            "answer": answer.record(),
        }
        for members in own:
            record["members"] = [
                {key: value for key, value in one.record().items() if key != "tokens"} for one in members[number]
            ]
        records.append(record)
    return records, sum(len(one.tokens) for answers in (*together, *(row for way in own for row in way))
                        for one in answers)
