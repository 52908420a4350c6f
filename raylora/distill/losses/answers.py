"""Sequence-level distillation: the likelihood of what the teacher wrote (arXiv 1606.07947).

Shapes: P token positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from raylora.distill.loss_functions import cross_entropy
from raylora.distill.uncertainty import of_softmax
from raylora.spec import KindSpec


class Spec(KindSpec):
    """``CE(next token)`` on the teacher's answers; ``distill.answers`` says how they are written and which are kept."""

    kind: Literal["answers"] = "answers"


class AnswersLoss:
    """Nothing but text passes from the teacher to its student."""

    teaches = "tokens"
    reinterprets_logits = False
    learns_answers = True

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def outputs(self, num_labels: int) -> int:
        """Return V: a language model keeps its head."""
        return num_labels

    def per_example(self, student_outputs: Tensor, targets: Any, labels: Tensor | None) -> Tensor:
        """Return the loss P of the student's logits P x V; labels are the tokens that the teacher wrote."""
        return cross_entropy(student_outputs, labels)

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return ``log_probs`` and ``entropy`` of the next token."""
        return of_softmax(student_outputs)


def build(spec: Spec) -> AnswersLoss:
    """Return the loss that a spec describes."""
    return AnswersLoss(spec)
