"""Knowledge distillation from an ensemble: mixtures, divergences and their sum with the task's loss.

Everything is per example and in log-space. Divergences take (teacher, student), whichever way they then measure.
Shapes: B examples, M teacher members, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raylora.errors import SpecError

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(teacher's log-probabilities B x C, student's log-probabilities B x C) -> B."""

UNLABELED = -1


def tempered_mixture(
    member_logits_BMC: Tensor, temperature: float, weights: Sequence[float] | None = None
) -> Tensor:
    """Return ``log sum_m w_m softmax(z_m / T)``, B x C: each member is tempered, then they are averaged.

    Args:
        weights: of the members, positive and one in all; by default 1/M each.

    Raises:
        SpecError: the temperature is not positive.
    """
    return mixture(member_logits_BMC.unbind(dim=1), temperature, weights)


def mixture(
    member_logits: Iterable[Tensor], temperature: float, weights: Sequence[float] | None = None
) -> Tensor:
    """Return :func:`tempered_mixture` of M tensors ``... x C`` taken one by one, so that not all need be in memory."""
    total, members = None, 0
    for logits_C in member_logits:
        log_probs_C = softened(logits_C, temperature)
        if weights is not None:
            log_probs_C = log_probs_C + math.log(weights[members])
        total = log_probs_C if total is None else torch.logaddexp(total, log_probs_C)
        members += 1
    if total is None:
        raise SpecError("a mixture of no members", "give the logits of at least one teacher member")
    return total - math.log(members) if weights is None else total


def member_mean(member_values_BM: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Return ``sum_m w_m x_m`` over the second dimension, by default the plain mean."""
    if weights is None:
        return member_values_BM.mean(dim=1)
    weights_M = torch.tensor(weights, dtype=member_values_BM.dtype, device=member_values_BM.device)
    return torch.tensordot(member_values_BM, weights_M, dims=([1], [0]))


def softened(logits_C: Tensor, temperature: float) -> Tensor:
    """Return ``log softmax(z / T)`` over the last dimension, in at least float32.

    Raises:
        SpecError: the temperature is not positive.
    """
    if not temperature > 0:
        raise SpecError(f"temperature {temperature} is not positive", "use 1 for none, 2 for the paper's")
    return torch.log_softmax(at_least_float32(logits_C) / temperature, dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def forward_kl(teacher_logp_BC: Tensor, student_logp_BC: Tensor) -> Tensor:
    """Return ``KL(teacher || student)``, B: the student has to cover whatever the teacher holds possible."""
    return (teacher_logp_BC.exp() * (teacher_logp_BC - student_logp_BC)).sum(dim=-1)


def reverse_kl(teacher_logp_BC: Tensor, student_logp_BC: Tensor) -> Tensor:
    """Return ``KL(student || teacher)``, B: the student must not hold possible what the teacher rules out."""
    return forward_kl(student_logp_BC, teacher_logp_BC)


def jensen_shannon(teacher_logp_BC: Tensor, student_logp_BC: Tensor) -> Tensor:
    """Return ``1/2 KL(p || m) + 1/2 KL(q || m)`` with ``m = (p + q) / 2``, B: symmetric and at most log 2.

    For nearly equal distributions it is a quarter of either KL.
    """
    middle_BC = torch.logaddexp(teacher_logp_BC, student_logp_BC) - math.log(2)
    return 0.5 * (forward_kl(teacher_logp_BC, middle_BC) + forward_kl(student_logp_BC, middle_BC))


def generalized_jensen_shannon(teacher_logp_BC: Tensor, student_logp_BC: Tensor, beta: float) -> Tensor:
    """Return ``b KL(p || m) + (1 - b) KL(q || m)`` with ``m = b p + (1 - b) q``, B (arXiv 2306.13649, equation 1).

    Divided by b it tends to KL(p || q) as b goes to 0; divided by 1 - b, to KL(q || p) as b goes to 1. At 0 and at 1,
    where it is 0 itself, those divergences take its place.

    Raises:
        SpecError: beta is not in [0, 1].
    """
    if not 0 <= beta <= 1:
        raise SpecError(f"beta {beta} is not in [0, 1]", "0 is KL(teacher || student), 1 is KL(student || teacher)")
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(teacher_logp_BC, student_logp_BC)
    middle_BC = torch.logaddexp(teacher_logp_BC + math.log(beta), student_logp_BC + math.log1p(-beta))
    return beta * forward_kl(teacher_logp_BC, middle_BC) + (1 - beta) * forward_kl(student_logp_BC, middle_BC)


def kd_loss(
    student_BC: Tensor,
    teacher_logp_BC: Tensor,
    labels_B: Tensor | None,
    temperature: float,
    task_weight: float,
    divergence: Divergence = forward_kl,
) -> Tensor:
    """Return ``a CE(z_S, y) + (1 - a) T^2 D(p_T, softmax(z_S / T))``, B (arXiv 2410.20777; T^2: arXiv 1503.02531).

    Softened gradients shrink with ``1 / T^2``; the factor keeps the two terms' balance when T is changed.

    Args:
        student_BC: the student's logits.
        teacher_logp_BC: the teacher's log-probabilities at the same temperature (:func:`tempered_mixture`).
        labels_B: -1 where there is none: such an example has no CE term, its other term keeps its weight.

    Raises:
        SpecError: the temperature is not positive, or the weight not in [0, 1].
    """
    student_logp_BC = softened(student_BC, temperature)
    distilled_B = temperature**2 * divergence(at_least_float32(teacher_logp_BC), student_logp_BC)
    return weighted(cross_entropy(student_BC, labels_B), distilled_B, task_weight)


def cross_entropy(logits_BC: Tensor, labels_B: Tensor | None) -> Tensor:
    """Return the cross-entropy with the labels, B, and 0 where there is none."""
    if labels_B is None:
        return at_least_float32(logits_BC).new_zeros(len(logits_BC))
    return F.cross_entropy(at_least_float32(logits_BC), labels_B, ignore_index=UNLABELED, reduction="none")


def weighted(task_B: Tensor, distilled_B: Tensor, task_weight: float) -> Tensor:
    """Return ``a * task + (1 - a) * distillation``, B. Raises: SpecError for a weight outside [0, 1]."""
    if not 0 <= task_weight <= 1:
        raise SpecError(f"task_weight {task_weight} is not in [0, 1]", "0 is the teacher alone, 1 the labels alone")
    return task_weight * task_B + (1 - task_weight) * distilled_B
