"""Squared error on the outputs of a regression (arXiv 2410.20777).

Shapes: B examples, M teacher members.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from raylora.distill.base import LossSpec
from raylora.distill.loss_functions import at_least_float32, member_mean, weighted
from raylora.errors import SpecError


class Spec(LossSpec):
    """``a (z - y)^2 + (1 - a) (z - mean_m t_m)^2``; a value has no temperature."""

    kind: Literal["mse"] = "mse"


class MeanSquaredError:
    """A student of one real output, taught the mean of the members' values."""

    teaches = "value"
    reinterprets_logits = False

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.weights: tuple[float, ...] | None = None

    def outputs(self, num_labels: int) -> int:
        """Return 1. Raises: SpecError for classes."""
        if num_labels != 1:
            raise SpecError(f"loss mse is for one real value, not for {num_labels} classes", "use kl, or another kind")
        return 1

    def per_example(self, student_outputs: Tensor, targets: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss B of student_outputs B x 1 (or B) against the members' values B x M; NaN is no label."""
        value_B = at_least_float32(student_outputs).reshape(len(targets))
        distilled_B = (value_B - member_mean(at_least_float32(targets), self.weights)) ** 2
        if labels is None:
            return weighted(torch.zeros_like(distilled_B), distilled_B, self.spec.task_weight)
        # The student's own value stands in for a missing label: a NaN masked afterwards still has a NaN gradient.
        wanted_B = torch.where(labels.isnan(), value_B.detach(), labels.to(value_B.dtype))
        return weighted((value_B - wanted_B) ** 2, distilled_B, self.spec.task_weight)

    def weighing(self, weights: Sequence[float]) -> MeanSquaredError:
        """Return the loss of a teacher whose members have these weights."""
        own = copy.copy(self)
        own.weights = tuple(weights)
        return own

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return ``value`` B."""
        return {"value": student_outputs.double().reshape(len(student_outputs))}


def build(spec: Spec) -> MeanSquaredError:
    """Return the loss that a spec describes."""
    return MeanSquaredError(spec)
