"""Text or text-pair classification with a trained head, on encoders and on decoders.

Shapes: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylora.data.task import (
    BadRow,
    Batch,
    Example,
    PaddingSide,
    check_length,
    collate,
    require_labels,
    require_text,
)
from raylora.errors import suggest
from raylora.spec import TaskSpec


class Spec(TaskSpec):
    """Columns ``text``, optionally ``text_pair``, and ``label``: a class's name, or its index."""

    kind: Literal["classification"] = "classification"
    labels: list[str] | None = None
    """Names of the classes, in the order of their indices."""
    num_labels: int | None = Field(default=None, ge=2)
    """For classes without names: labels are 0 .. num_labels - 1."""

    @model_validator(mode="after")
    def _one_kind_of_labels(self) -> Spec:
        if (self.labels is None) == (self.num_labels is None):
            raise ValueError("give exactly one of 'labels' (names) and 'num_labels'")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise ValueError("'labels' needs at least two names, all different")
        return self

    def names(self) -> list[str]:
        """Return one name per class."""
        return list(self.labels) if self.labels is not None else [str(index) for index in range(self.num_labels or 0)]


class Classification:
    """A class per row, from the model's sequence-classification head."""

    auto_class = "AutoModelForSequenceClassification"
    columns: tuple[str, ...] = ("text",)
    optional_columns: tuple[str, ...] = ("text_pair",)
    label_column: str | None = "label"

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.label_names = spec.names()
        self.num_classes: int | None = len(self.label_names)
        self._index = {name: index for index, name in enumerate(self.label_names)}

    def model_kwargs(self) -> dict[str, Any]:
        """Return the head's size and the names of its outputs."""
        return {
            "num_labels": self.num_classes,
            "id2label": dict(enumerate(self.label_names)),
            "label2id": dict(self._index),
            "problem_type": "single_label_classification",
        }

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

    def label(self, row: Mapping[str, Any]) -> int | None:
        """Return the class's index, from its name or its index. Raises: BadRow when there is no such class."""
        if "label" not in row:
            return None
        value = row["label"]
        if isinstance(value, str) and value in self._index:
            return self._index[value]
        if isinstance(value, str) and value.strip().isdecimal():  # csv knows no numbers
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int):
            if 0 <= value < len(self.label_names):
                return int(value)
            raise BadRow(f"label {value} is out of range: the classes are 0 .. {len(self.label_names) - 1}")
        if value is None or value == "":
            raise BadRow("no 'label'")
        raise BadRow(f"unknown label {value!r}; {suggest(str(value), self.label_names)}")

    def tokenise(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
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
        """Return the head's logits_NC as float32 scores_NC."""
        return logits.float()

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy loss_N of scores_NC. Raises: DataError without labels."""
        return F.cross_entropy(scores, require_labels(batch), reduction="none")


def build(spec: Spec) -> Classification:
    """Return the task that a spec describes."""
    return Classification(spec)
