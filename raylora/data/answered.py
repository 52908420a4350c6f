"""Rows as prompts and answers: another answer may take the place of the one that a row holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raylora.data.sets import DataSets, digest_of
from raylora.data.task import Example
from raylora.errors import DataError


def prompt_length(example: Example) -> int:
    """Return how many tokens stand before a row's last answer; all of them where there is none."""
    return example.target_ranges[-1][0] if example.target_ranges else len(example.sequences[0])


def answered(example: Example, answer: Sequence[int]) -> Example:
    """Return a row with this answer in place of its last one, and nothing else to learn."""
    first = prompt_length(example)
    tokens = (*example.sequences[0][:first], *answer)
    return replace(example, sequences=(tokens,), target_ranges=((first, len(tokens)),))


def with_answers(sets: DataSets, answers: Mapping[str, Sequence[int]]) -> DataSets:
    """Return sets whose training rows have these answers; rows without one are left out.

    Raises:
        DataError: none has one.
    """
    examples = [answered(one, answers[one.id]) for one in sets.train.examples if one.id in answers]
    if not examples:
        raise DataError(
            "no answer of the teacher is left to learn from",
            "raise distill.answers.max_new_tokens or task.max_length, or lower distill.answers.min_agreement",
        )
    left_out = sets.train.left_out + len(sets.train.examples) - len(examples)
    train = replace(
        sets.train, origin=f"{sets.train.origin}, answered by the teacher", examples=examples, left_out=left_out,
        content_hash=digest_of(examples),
    )
    return replace(sets, train=train)
