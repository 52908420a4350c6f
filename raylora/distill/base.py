"""The seam between a teacher's targets and a student's training: what a loss kind has to offer.

Shapes: B examples (positions for language models), M teacher members, C classes, O outputs of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from raylora.spec import KindSpec


class LossSpec(KindSpec):
    """What every loss kind shares: how much the label counts beside the teacher."""

    task_weight: float = Field(default=0.5, ge=0, le=1)
    """``a`` of ``a * task loss + (1 - a) * distillation`` (arXiv 2410.20777); 0 needs no labels."""


class TemperedSpec(LossSpec):
    """A loss that compares distributions softened by a temperature."""

    temperature: float = Field(default=2.0, gt=0)
    """``T``; teacher and student are softened alike, and the divergence is multiplied by its square."""


class Loss(Protocol):
    """A distillation loss; a module of its own with ``Spec`` and ``build``, registered under the seam ``loss``."""

    spec: Any
    teaches: str
    """The registered name of the output that its students have."""
    reinterprets_logits: bool
    """Whether C logits are not those of a softmax over C classes but, say, of a Dirichlet."""

    def outputs(self, num_labels: int) -> int:
        """Return O, how many logits the student's head must have. Raises: SpecError if the loss cannot serve."""

    def per_example(self, student_outputs: Tensor, targets: Any, labels: Tensor | None) -> Tensor:
        """Return the loss of each example, B; never a mean, because members of several runs share a forward pass.

        Args:
            student_outputs: B x O, any float type; computed on in at least float32.
            targets: what the matching targets' ``gather`` returned for the same examples, on the same device.
            labels: one per example, -1 (NaN for real values) where there is none, or None if there are none at
                all. An unlabeled example keeps its distillation term at the weight ``1 - task_weight``: its
                share of the batch's gradient does not depend on who else has a label.
        """

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return what the student says, at temperature 1.

        ``log_probs`` B x C and ``entropy`` B of classes, or ``value`` B of a regression; where the student keeps
        the members' disagreement also ``expected_entropy`` B and ``mutual_information`` B, their sum ``entropy``.
        """


@runtime_checkable
class Annealed(Protocol):
    """Optional: the loss changes while the student trains."""

    def at(self, progress: float) -> Loss:
        """Return the loss to use when this share of the training, 0 to 1, is done."""


@runtime_checkable
class WeighsMembers(Protocol):
    """Optional: the teacher's members may weigh differently in what the loss compares a student with."""

    def weighing(self, weights: Sequence[float]) -> Loss:
        """Return the loss for a teacher whose M members have these weights, which are positive and one in all."""


@dataclass(frozen=True)
class Writing:
    """How a student writes the answers that it is taught on."""

    share: float
    """Of its steps, those in which it learns from what it writes itself."""
    begins: float
    """The share of the training before which it writes nothing."""
    max_new_tokens: int
    temperature: float


@runtime_checkable
class LearnsAnswers(Protocol):
    """Optional: what is learned are the teacher's answers, token by token as it wrote them; there are no targets."""

    learns_answers: bool


@runtime_checkable
class AsksTeacher(Protocol):
    """Optional: the teacher stays loaded beside the student and says what it thinks of all that this one reads.

    The targets of :meth:`Loss.per_example` are then the log-probabilities of the teacher's mixture, over the whole
    vocabulary and at the temperature of the loss.
    """

    writing: Writing
