"""Distillation on what the student itself writes, by a teacher that stays loaded (GKD, arXiv 2306.13649).

Shapes: P token positions, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from raylora.distill.base import TemperedSpec, Writing
from raylora.distill.loss_functions import generalized_jensen_shannon, kd_loss
from raylora.distill.uncertainty import of_softmax
from raylora.errors import DataError


class Spec(TemperedSpec):
    """``a CE(next token) + (1 - a) T^2 JSD_beta(teacher, student)`` on answers that are there or the student's own."""

    kind: Literal["gkd"] = "gkd"
    task_weight: float = Field(default=0.0, ge=0, le=1)
    """``a``; what the student wrote itself is no label and has no such term."""
    temperature: float = Field(default=1.0, gt=0)
    """``T``, of the divergence: teacher and student are softened alike, and it is multiplied by its square."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Between KL(teacher || student) at 0, which covers all that the teacher holds possible, and KL(student || teacher)
    at 1, which avoids what it rules out."""
    on_policy: float = Field(default=0.5, ge=0, le=1)
    """The share of steps in which a member learns from answers that it has just written; in the others, from those of
    the rows. At 0 nothing is written."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """The share of the training, at its beginning, in which a student writes nothing and beta is 0. One that cannot
    answer yet needs it: between distributions that have nothing in common the divergence is flat, except at beta 0."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens that it writes at most; an answer also ends at ``task.max_length``, prompt included."""
    sampling_temperature: float = Field(default=1.0, ge=0)
    """Of what it writes; 0 takes the most probable token."""


class GeneralizedDistillation:
    """Per position, not per answer: the caller picks the positions of the answers and averages over them."""

    teaches = "tokens"
    reinterprets_logits = False

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.beta = spec.beta
        self.writing = Writing(spec.on_policy, spec.warmup, spec.max_new_tokens, spec.sampling_temperature)

    def at(self, progress: float) -> GeneralizedDistillation:
        """Return the loss to use when this share of the training is done."""
        loss = GeneralizedDistillation(self.spec)
        loss.beta = 0.0 if progress < self.spec.warmup else self.spec.beta
        return loss

    def outputs(self, num_labels: int) -> int:
        """Return V: a language model keeps its head."""
        return num_labels

    def per_example(self, student_outputs: Tensor, targets: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss P of the student's logits P x V against the log-probabilities P x V of the teacher's mixture.

        Args:
            labels: the next tokens, -1 where the student wrote them.

        Raises:
            DataError: teacher and student have other positions or vocabularies.
        """
        if targets.shape != student_outputs.shape:
            said, asked = (" x ".join(map(str, tensor.shape)) for tensor in (targets, student_outputs))
            raise DataError(
                f"the teacher has {said} positions and tokens, the student {asked}",
                "teacher and student need the same tokenizer and the same vocabulary",
            )
        divergence = partial(generalized_jensen_shannon, beta=self.beta)
        return kd_loss(student_outputs, targets, labels, self.spec.temperature, self.spec.task_weight, divergence)

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return ``log_probs`` and ``entropy`` of the next token."""
        return of_softmax(student_outputs)


def build(spec: Spec) -> GeneralizedDistillation:
    """Return the loss that a spec describes."""
    return GeneralizedDistillation(spec)
