"""Next-token prediction on plain text by a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from raylora.data.task import (
    BadRow,
    Example,
    check_length,
    encode_text,
    leading_ids,
    require_text,
)
from raylora.data.tasks.tokens import TokenTask
from raylora.spec import TaskSpec
from raylora.spec.starting import Starter


class Spec(TaskSpec):
    """Column ``text``; a row is cut into blocks of ``max_length`` tokens, and nothing of it is dropped."""

    kind: Literal["language_modeling"] = "language_modeling"


STARTER = Starter(
    row={"text": "Sales rose by a tenth in the last quarter of the year."},
    base="pypi:smollm2-135m",
    train="pypi:bbc-news",
    task={"max_length": 96},
    optimization={"lr": 5e-4, "steps": 60, "micro_batch": 4},
    train_rows=200, validation_rows=10, test_rows=40, batch=16,
    notes={"task.max_length": "a text is cut into blocks of as many tokens"},
)


class LanguageModeling(TokenTask):
    """The probability of each token given those before it in its block."""

    columns: tuple[str, ...] = ("text",)
    optional_columns: tuple[str, ...] = ()

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a ``max_length`` beyond the model's. Raises: DataError."""
        check_length(self.spec, tokenizer)

    def content(self, row: Mapping[str, Any]) -> str:
        """Return the text. Raises: BadRow."""
        return require_text(row, "text")

    def tokenize(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return the whole row as one sequence, to be cut by :meth:`blocks`. Raises: BadRow."""
        sequence = tuple(self.prompt(row, tokenizer))
        if len(sequence) < 2:
            raise BadRow("'text' is a single token: there is nothing to predict")
        return Example(row_id, (sequence,), None, (1,)), False

    def blocks(self, example: Example) -> list[Example]:
        """Return pieces of ``max_length`` tokens; the first token of each is context only, and ids get ``#n``."""
        (sequence,), size = example.sequences, self.spec.max_length
        pieces = [sequence[start : start + size] for start in range(0, len(sequence), size)]
        pieces = [piece for piece in pieces if len(piece) > 1]  # a last single token predicts nothing
        return [replace(example, id=f"{example.id}#{n}", sequences=(piece,)) for n, piece in enumerate(pieces)]

    def prompt(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the text's tokens, to be gone on with. Raises: BadRow."""
        return [*leading_ids(tokenizer), *encode_text(tokenizer, require_text(row, "text"))]

    def reference(self, row: Mapping[str, Any]) -> str | None:
        """Return None: a text has no answer."""
        return None

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokenizer's end token, if it has one."""
        return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def document(self, example_id: str) -> str:
        """Return the row that a block was cut from."""
        return example_id.rpartition("#")[0]


def build(spec: Spec) -> LanguageModeling:
    """Return the task that a spec describes."""
    return LanguageModeling(spec)
