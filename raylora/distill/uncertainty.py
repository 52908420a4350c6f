"""What a student says and how unsure it is; entropies are in nats, computed in float64.

Shapes: B examples, H heads, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(log_probs_C: Tensor) -> Tensor:
    """Return ``-sum_c p log p`` over the last dimension."""
    return -(log_probs_C.exp() * log_probs_C).sum(dim=-1)


def of_softmax(logits_BC: Tensor) -> dict[str, Tensor]:
    """Return the prediction of one softmax; it cannot tell doubt about the answer from doubt about the model."""
    log_probs_BC = torch.log_softmax(logits_BC.double(), dim=-1)
    return {"log_probs": log_probs_BC, "entropy": entropy(log_probs_BC)}


def of_heads(logits_BHC: Tensor) -> dict[str, Tensor]:
    """Return the mixture of H heads and ``H(mean_h p_h) = mean_h H(p_h) + I(y; h)`` (arXiv 2310.00035)."""
    log_probs_BHC = torch.log_softmax(logits_BHC.double(), dim=-1)
    log_probs_BC = torch.logsumexp(log_probs_BHC, dim=1) - math.log(logits_BHC.shape[1])
    return _split(log_probs_BC, entropy(log_probs_BHC).mean(dim=1))


def of_dirichlet(log_alpha_BC: Tensor) -> dict[str, Tensor]:
    """Return the mean of a Dirichlet over categoricals, and its uncertainty split in closed form (arXiv 1905.00076).

    ``E H(pi) = sum_c alpha_c / alpha_0 (psi(alpha_0 + 1) - psi(alpha_c + 1))``; the mutual information of class
    and categorical is what the mean's entropy exceeds it by.
    """
    log_alpha_BC = log_alpha_BC.double()
    log_probs_BC = torch.log_softmax(log_alpha_BC, dim=-1)  # the mean alpha / alpha_0
    alpha_BC = log_alpha_BC.exp()
    rest_BC = torch.digamma(alpha_BC.sum(dim=-1, keepdim=True) + 1) - torch.digamma(alpha_BC + 1)
    return _split(log_probs_BC, (log_probs_BC.exp() * rest_BC).sum(dim=-1))


def _split(log_probs_BC: Tensor, expected_B: Tensor) -> dict[str, Tensor]:
    total_B = entropy(log_probs_BC)
    # The difference of two nearly equal entropies may round to just below zero, which no information is.
    expected_B = torch.minimum(expected_B, total_B)
    return {
        "log_probs": log_probs_BC, "entropy": total_B, "expected_entropy": expected_B,
        "mutual_information": total_B - expected_B,
    }
