"""The losses that match a student's softmax to the teacher's tempered mixture; they differ in the divergence alone.

Shapes: B examples, M teacher members, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from raylora.distill.base import TemperedSpec
from raylora.distill.loss_functions import Divergence, kd_loss, tempered_mixture
from raylora.distill.uncertainty import of_softmax


class MixtureLoss:
    """``a CE + (1 - a) T^2 D(mixture of the members, student)``."""

    teaches = "classes"
    reinterprets_logits = False

    def __init__(self, spec: TemperedSpec, divergence: Divergence) -> None:
        self.spec = spec
        self.divergence = divergence
        self.weights: tuple[float, ...] | None = None

    def outputs(self, num_labels: int) -> int:
        """Return C: an ordinary classifier's head."""
        return num_labels

    def per_example(self, student_outputs: Tensor, targets: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss B of student_outputs B x C against the members' logits B x M x C."""
        teacher_logp_BC = tempered_mixture(targets, self.spec.temperature, self.weights)
        return kd_loss(
            student_outputs, teacher_logp_BC, labels, self.spec.temperature, self.spec.task_weight, self.divergence
        )

    def weighing(self, weights: Sequence[float]) -> MixtureLoss:
        """Return the loss of a teacher whose members have these weights."""
        own = copy.copy(self)
        own.weights = tuple(weights)
        return own

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return ``log_probs`` and ``entropy``."""
        return of_softmax(student_outputs)
