"""Distillation of a language model from top-k targets: the KL of two coarse-grained distributions.

Shapes: P token positions, K kept tokens, L = K + 1 with the tail's bucket, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.distill.base import TemperedSpec
from raylora.distill.loss_functions import cross_entropy, softened, weighted
from raylora.distill.topk import TopK, log_mass_of_the_rest, teacher_logp
from raylora.distill.uncertainty import of_softmax
from raylora.errors import DataError


class Spec(TemperedSpec):
    """``a CE(next token) + (1 - a) T^2 KL`` over the teacher's ``top_k`` tokens and one bucket for all others."""

    kind: Literal["topk_kl"] = "topk_kl"
    temperature: float = Field(default=1.0, gt=0)
    """Fixed when the targets are made: heat moves mass into the tail, where nothing more is known of it."""
    top_k: int = Field(default=32, ge=1)
    """Tokens kept per position; with 16-bit token numbers each costs four bytes."""


class TopKLoss:
    """Per position, not per document: the caller picks the target positions and averages over them."""

    teaches = "tokens"
    reinterprets_logits = False

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def outputs(self, num_labels: int) -> int:
        """Return V: a language model keeps its head."""
        return num_labels

    def per_example(self, student_outputs: Tensor, targets: TopK, labels: Tensor | None) -> Tensor:
        """Return the loss P of the student's logits P x V at the target positions; labels are the next tokens.

        Raises:
            DataError: the targets have another number of positions, vocabulary or temperature.
        """
        positions, vocabulary = student_outputs.shape
        if (len(targets), targets.vocabulary) != (positions, vocabulary):
            raise DataError(
                f"the teacher has {len(targets)} positions over {targets.vocabulary} tokens, "
                f"the student {positions} over {vocabulary}",
                "teacher and student need the same tokenizer and max_length, and logits at the target positions only",
            )
        if targets.temperature != self.spec.temperature:
            raise DataError(
                f"targets were made at temperature {targets.temperature}, the loss has {self.spec.temperature}",
                "make the targets again: the tail of the vocabulary is not stored",
            )
        distilled_P = topk_kl(
            student_outputs, targets.index_PK, targets.logp_PK, targets.tail_P, self.spec.temperature
        )
        return weighted(cross_entropy(student_outputs, labels), distilled_P, self.spec.task_weight)

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return ``log_probs`` and ``entropy`` of the next token."""
        return of_softmax(student_outputs)


def topk_kl(
    student_logits_PV: Tensor, index_PK: Tensor, logp_PK: Tensor, tail_logmass_P: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return ``T^2 KL`` between teacher and student over K tokens and the tail, P; for K = V it is the whole KL.

    Merging tokens into a bucket can only lower a KL, so this is a lower bound of it; how the student spreads its
    tail has no gradient. ``temperature`` softens the student, the teacher's numbers are at it already.
    """
    student_logp_PV = softened(student_logits_PV, temperature)
    tail_P1 = log_mass_of_the_rest(student_logp_PV, index_PK)[:, None]
    student_PL = torch.cat([student_logp_PV.gather(-1, index_PK), tail_P1], dim=-1)
    teacher_PL = teacher_logp(TopK(index_PK, logp_PK, tail_logmass_P, student_logp_PV.shape[-1], temperature))
    return temperature**2 * (teacher_PL.exp() * (teacher_PL - student_PL)).sum(dim=-1)


def build(spec: Spec) -> TopKLoss:
    """Return the loss that a spec describes."""
    return TopKLoss(spec)
