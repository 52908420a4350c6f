"""Rows of one text or of two, read by a model with a sequence-classification head: what its tasks share.

Shapes: N examples, O outputs of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylora.data.task import UNLABELED, Batch, Example, PaddingSide, check_length, collate, require_text
from raylora.spec import TaskSpec


class SequenceTask:
    """Columns ``text`` and optionally ``text_pair``; what a label is, and what it costs to miss it, a subclass says."""

    auto_class = "AutoModelForSequenceClassification"
    output = "classes"
    no_label: int | float = UNLABELED
    columns: tuple[str, ...] = ("text",)
    optional_columns: tuple[str, ...] = ("text_pair",)
    label_column: str | None = "label"

    def __init__(self, spec: TaskSpec) -> None:
        self.spec: Any = spec

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        """Return nothing: the head needs no more than the inputs."""
        return {}

    def padding_side(self, is_decoder: bool) -> PaddingSide:
        """Return left for decoders, whose last position must be the last real token."""
        return "left" if is_decoder else "right"

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a ``max_length`` beyond the model's. Raises: DataError."""
        check_length(self.spec, tokenizer)

    def content(self, row: Mapping[str, Any]) -> str:
        """Return the text, and the pair's second text. Raises: BadRow."""
        text = require_text(row, "text")
        return text if row.get("text_pair") is None else f"{text}\n{require_text(row, 'text_pair')}"

    def label(self, row: Mapping[str, Any]) -> int | float | None:
        """Return the row's label, or None where it has no label column. Raises: BadRow."""
        raise NotImplementedError

    def tokenize(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return the example, cut at the end (of the longer text of a pair) to ``max_length``. Raises: BadRow."""
        self.content(row)
        texts = [row["text"]] if row.get("text_pair") is None else [row["text"], row["text_pair"]]
        encoded = tokenizer(*texts, verbose=False)
        truncated = len(encoded["input_ids"]) > self.spec.max_length
        if truncated:
            encoded = tokenizer(*texts, truncation="longest_first", max_length=self.spec.max_length)
        token_types = encoded.get("token_type_ids")
        return Example(
            id=row_id,
            sequences=(tuple(encoded["input_ids"]),),
            label=self.label(row),
            token_types=(tuple(token_types),) if token_types is not None else None,
        ), truncated

    def blocks(self, example: Example) -> list[Example]:
        """Return the example itself."""
        return [example]

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
        """Pad examples on the tokenizer's padding side."""
        return collate(examples, tokenizer)

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the head's outputs N x O in float32."""
        return logits.float()
