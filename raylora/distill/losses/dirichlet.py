"""Ensemble distribution distillation: the student's Dirichlet explains the members (Malinin et al., arXiv 1905.00076).

Shapes: B examples, M teacher members, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.distill.base import LossSpec
from raylora.distill.loss_functions import cross_entropy, member_mean, softened, weighted
from raylora.distill.uncertainty import of_dirichlet


class Spec(LossSpec):
    """``a CE(mean) + (1 - a) T^2 (-1/M sum_m log Dir(pi_m | exp(z / T)))``; T anneals to 1 while the student trains."""

    kind: Literal["dirichlet"] = "dirichlet"
    temperature: float = Field(default=1.0, ge=1)
    """Where the annealing starts; 1 is none. Heat brings members that agree on a corner back into the simplex."""
    annealed_over: float = Field(default=0.5, gt=0, le=1)
    """The share of the training over which the temperature falls linearly to 1."""
    smoothing: float = Field(default=1e-3, gt=0, lt=1)
    """Share of the uniform distribution mixed into each member: the density has no value at probability zero."""
    max_precision: float = Field(default=1e4, gt=1)
    """Bound of ``alpha_0``; without one, members that agree exactly would drive it to infinity."""


class DirichletLoss:
    """The negative log-likelihood of the members' categoricals under ``Dir(alpha = exp(z))``.

    Without the ``+ 1`` of some later work the mean is exactly ``softmax(z)``: the student remains an ordinary
    classifier to whoever exports it, and the task term an ordinary cross-entropy.
    """

    teaches = "classes"
    reinterprets_logits = True

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.weights: tuple[float, ...] | None = None
        self.temperature = 1.0  # a caller that does not anneal trains what `predict` uses

    def at(self, progress: float) -> DirichletLoss:
        """Return the loss when this share of the training is done, its temperature on the way to 1."""
        heated = copy.copy(self)
        left = max(0.0, 1 - progress / self.spec.annealed_over)
        heated.temperature = 1 + (self.spec.temperature - 1) * left
        return heated

    def outputs(self, num_labels: int) -> int:
        """Return C: one concentration per class."""
        return num_labels

    def per_example(self, student_outputs: Tensor, targets: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss B of student_outputs B x C against the members' logits B x M x C; it may be negative."""
        member_logp_BMC = smoothed(softened(targets, self.temperature), self.spec.smoothing)
        log_alpha_BC = concentrations(student_outputs, self.temperature, self.spec.max_precision)
        nll_B = self.temperature**2 * dirichlet_nll(log_alpha_BC, member_logp_BMC, self.weights)
        task_B = cross_entropy(student_outputs, labels)
        return weighted(task_B, nll_B.to(task_B.dtype), self.spec.task_weight)

    def weighing(self, weights: Sequence[float]) -> DirichletLoss:
        """Return the loss of a teacher whose members have these weights."""
        own = copy.copy(self)
        own.weights = tuple(weights)
        return own

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return the Dirichlet's mean, the entropy of it, and its split into expected entropy and disagreement."""
        return of_dirichlet(concentrations(student_outputs, 1.0, self.spec.max_precision))


def concentrations(logits_BC: Tensor, temperature: float, max_precision: float) -> Tensor:
    """Return ``log alpha = z / T``, B x C in float64, shifted down where ``alpha_0`` exceeds its bound.

    The shift leaves the mean as it is; beyond the bound the precision, and it alone, has no gradient.
    """
    log_alpha_BC = logits_BC.double() / temperature
    excess_B1 = torch.logsumexp(log_alpha_BC, dim=-1, keepdim=True) - math.log(max_precision)
    return log_alpha_BC - excess_B1.clamp(min=0)


def smoothed(log_probs_C: Tensor, share: float) -> Tensor:
    """Return ``log((1 - s) p + s / C)``, at least ``log(s / C)``, in float64."""
    floor = torch.tensor(math.log(share / log_probs_C.shape[-1]), dtype=torch.float64, device=log_probs_C.device)
    return torch.logaddexp(log_probs_C.double() + math.log1p(-share), floor)


def dirichlet_nll(
    log_alpha_BC: Tensor, member_logp_BMC: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """Return ``sum_c lnGamma(alpha_c) - lnGamma(alpha_0) - sum_c (alpha_c - 1) mean_m ln pi_mc``, B in float64.

    The mean is by the members' weights, if they have any.

    Terms of the size of alpha_0 cancel here, for which float32 has too few digits.
    """
    log_alpha_BC, mean_logp_BC = log_alpha_BC.double(), member_mean(member_logp_BMC.double(), weights)
    alpha_BC = log_alpha_BC.exp()
    # lnGamma(a) = lnGamma(1 + a) - ln a stays finite, and so does its gradient, where a underflows.
    lgamma_BC = torch.lgamma(1 + alpha_BC) - log_alpha_BC
    log_alpha0_B = torch.logsumexp(log_alpha_BC, dim=-1)
    lgamma0_B = torch.lgamma(1 + log_alpha0_B.exp()) - log_alpha0_B
    return lgamma_BC.sum(dim=-1) - lgamma0_B - ((alpha_BC - 1) * mean_logp_BC).sum(dim=-1)


def build(spec: Spec) -> DirichletLoss:
    """Return the loss that a spec describes."""
    return DirichletLoss(spec)
