"""From M members' predictions to the ensemble's: a mean of probabilities or, under its own name, of logits.

Shapes: M members, N rows, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from raylora.errors import SpecError, suggest

Rule = Literal["mean_probabilities", "mean_logits"]
RULES: tuple[str, ...] = ("mean_probabilities", "mean_logits")


def mean_probabilities(logits_MNC: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return ``log(1/M sum_m softmax(z_m / T_m))``, N x C in float64 (arXiv 2310.00035).

    ``temperature`` is one number for all members, or a tensor of M.
    """
    log_probs_MNC = torch.log_softmax(_tempered(logits_MNC, temperature), dim=-1)
    return torch.logsumexp(log_probs_MNC, dim=0) - math.log(logits_MNC.shape[0])


def mean_logits(logits_MNC: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return ``log softmax(1/M sum_m z_m / T_m)``, N x C in float64: a product of experts, not a mixture."""
    return torch.log_softmax(_tempered(logits_MNC, temperature).mean(dim=0), dim=-1)


def aggregate_logits(logits_MNC: Tensor, rule: str, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the ensemble's log-probabilities, N x C, under the named rule; SpecError for an unknown one."""
    if rule == "mean_probabilities":
        return mean_probabilities(logits_MNC, temperature)
    if rule == "mean_logits":
        return mean_logits(logits_MNC, temperature)
    raise SpecError(f"unknown aggregate {rule!r}", suggest(rule, RULES))


def _tempered(logits_MNC: Tensor, temperature: float | Tensor) -> Tensor:
    scale = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1, 1)
    if scale.shape[0] not in (1, logits_MNC.shape[0]) or not bool((scale > 0).all()):
        raise ValueError(f"{scale.shape[0]} temperatures for {logits_MNC.shape[0]} members, all must be positive")
    return logits_MNC.to(torch.float64) / scale
