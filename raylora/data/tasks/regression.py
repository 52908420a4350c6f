"""Regression: one real value for a text or a pair of texts, in the label's own units.

Labels are not standardized: a member's head then gives the value itself, here and in any program that loads the
exported adapter, and nothing has to be undone (GLUE's STS-B is trained so, on 0 .. 5). A fresh head starts at the mean
label instead.

Shapes: N examples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from raylora.data.task import BadRow, Batch, require_labels
from raylora.data.tasks.sequences import SequenceTask
from raylora.spec import TaskSpec
from raylora.spec.starting import Starter

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)
"""Plain decimals: ``float`` would also take nan, inf and 1_000."""


class Spec(TaskSpec):
    """Columns ``text``, optionally ``text_pair``, and ``label``: a finite number."""

    kind: Literal["regression"] = "regression"
    low: float | None = None
    """The least label there can be; a row below it is a bad row. Predictions are not clipped."""
    high: float | None = None
    """The greatest label there can be; a row above it is a bad row."""

    @model_validator(mode="after")
    def _scale_has_a_width(self) -> Spec:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"'low' {self.low:g} must be less than 'high' {self.high:g}")
        return self


STARTER = Starter(
    row={"text": "A child is riding a horse.", "text_pair": "A young child is riding a horse.", "label": 4.75},
    base="pypi:minilm-l6",
    train="pypi:sts-b",
    task={"low": 0, "high": 5, "max_length": 48},
    optimization={"lr": 1e-3, "epochs": 3, "micro_batch": 16, "group_by_length": True},
    notes={"task.low": "rows outside the scale are bad rows; leave both out if there is none"},
)


class Regression(SequenceTask):
    """A value per row, from a head of one output, trained by squared error."""

    output = "value"
    no_label: int | float = math.nan

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.num_outputs = 1
        self.label_names: list[str] = []

    def model_kwargs(self) -> dict[str, Any]:
        """Return the head's size, and what transformers is to take its output for."""
        return {"num_labels": 1, "problem_type": "regression"}

    def label(self, row: Mapping[str, Any]) -> float | None:
        """Return the label as a number. Raises: BadRow when it is none, not finite, or off the scale."""
        if "label" not in row:
            return None
        value = row["label"]
        if value is None or value == "":
            raise BadRow("no 'label'")
        if isinstance(value, str) and _NUMBER.fullmatch(value):  # csv knows no numbers
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRow(f"label {value!r} is not a number")
        # Losses are float32, where a larger number is infinite. NaN is not less than anything, and an integer of any
        # size can be compared.
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise BadRow(f"label {value!r} is not a finite number")
        self._check_scale(value)
        return float(value)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the squared error loss_N of scores N x 1. Raises: DataError without labels."""
        return (scores[:, 0] - require_labels(batch)) ** 2

    def _check_scale(self, value: float) -> None:
        low, high = self.spec.low, self.spec.high
        if (low is not None and value < low) or (high is not None and value > high):
            scale = f"{'' if low is None else f'{low:g}'} .. {'' if high is None else f'{high:g}'}".strip()
            raise BadRow(f"label {value:g} is outside the scale {scale} of task.low and task.high")


def build(spec: Spec) -> Regression:
    """Return the task that a spec describes."""
    return Regression(spec)
