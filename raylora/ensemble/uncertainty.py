"""How unsure an ensemble is, and whether its members are unsure alone or disagree.

Shapes: M members, N rows, C classes. Entropies are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.ensemble.aggregate import mean, mean_probabilities
from raylora.errors import RayloraError

ROUNDING = 1e-9
"""How far below zero float64 may push a quantity that cannot be negative."""


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Per-row uncertainty of a mixture; ``predictive_entropy = expected_entropy + mutual_information``."""

    predictive_entropy_N: Tensor
    expected_entropy_N: Tensor
    mutual_information_N: Tensor
    disagreement_N: Tensor
    """The share of member pairs whose most probable classes differ."""


def entropy(log_probs_C: Tensor) -> Tensor:
    """Return ``-sum_c p log p`` over the last dimension."""
    return -(log_probs_C.exp() * log_probs_C).sum(dim=-1)


def decompose(
    logits_MNC: Tensor, temperature: float = 1.0, expected_entropy_MN: Tensor | None = None,
    weights_M: Tensor | None = None,
) -> Uncertainty:
    """Split ``H(mean_m p_m) = mean_m H(p_m) + I(y; m)`` row by row (arXiv 2310.00035), means by the members' weights.

    The identity belongs to the mixture, so it is computed from mean probabilities whatever rule predicts.

    Args:
        expected_entropy_MN: takes the place of ``H(p_m)`` where a member is a distribution over classifiers.
    """
    log_probs_MNC = torch.log_softmax(logits_MNC.to(torch.float64) / temperature, dim=-1)
    predictive_N = entropy(mean_probabilities(logits_MNC, temperature, weights_M))
    expected_N = mean(entropy(log_probs_MNC), weights_M)
    if expected_entropy_MN is not None:  # computed elsewhere, so the two may differ by rounding where nobody disagrees
        expected_N = torch.minimum(mean(expected_entropy_MN.double(), weights_M), predictive_N)
    return Uncertainty(
        predictive_N,
        expected_N,
        non_negative(predictive_N - expected_N, "mutual information"),
        disagreement(log_probs_MNC, weights_M),
    )


def disagreement(scores_MNC: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return, per row, the share of member pairs with different argmax; zero for one member.

    Of weighted members it is the probability that two different ones, drawn by their weights, differ.
    """
    members = scores_MNC.shape[0]
    if members == 1:
        return torch.zeros(scores_MNC.shape[1], dtype=torch.float64)
    votes_NC = torch.zeros(scores_MNC.shape[1:], dtype=torch.float64)
    choice_NM = scores_MNC.argmax(dim=-1).T
    if weights_M is not None:
        votes_NC.scatter_add_(1, choice_NM, weights_M.expand(choice_NM.shape))
        alone = float((weights_M**2).sum())
        return (1 - (votes_NC**2).sum(dim=1)).clamp(min=0) / (1 - alone)
    votes_NC.scatter_add_(1, choice_NM, torch.ones_like(choice_NM, dtype=torch.float64))
    agreeing_N = (votes_NC * (votes_NC - 1)).sum(dim=1)
    return 1 - agreeing_N / (members * (members - 1))


def pairwise_kl(logits_MNC: Tensor) -> Tensor:
    """Return ``KL(p_i || p_j)`` averaged over rows, M x M, with an exactly zero diagonal."""
    log_probs_MF = torch.log_softmax(logits_MNC.to(torch.float64), dim=-1).flatten(1)
    probs_MF = log_probs_MF.exp()
    self_M = (probs_MF * log_probs_MF).sum(dim=1)
    kl_MM = (self_M[:, None] - probs_MF @ log_probs_MF.T) / logits_MNC.shape[1]
    kl_MM = non_negative(kl_MM, "pairwise KL", scale=float(self_M.abs().max()) / logits_MNC.shape[1])
    return kl_MM.fill_diagonal_(0.0)


def non_negative(values: Tensor, what: str, scale: float = 1.0) -> Tensor:
    """Clamp rounding noise below zero away; RayloraError for anything larger, which would be a bug."""
    lowest = float(values.min())
    if lowest < -ROUNDING * max(1.0, scale):
        raise RayloraError(f"{what} is {lowest:.3e}, but cannot be negative", "this is a bug in raylora: report it")
    return values.clamp(min=0)
