"""From M members' predictions to the ensemble's: a mean of probabilities or, under its own name, of logits.

The mean is plain, or of weights w that are positive and one in all (:mod:`raylora.ensemble.weights`).

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


def mean_probabilities(
    logits_MNC: Tensor, temperature: float | Tensor = 1.0, weights_M: Tensor | None = None
) -> Tensor:
    """Return ``log sum_m w_m softmax(z_m / T_m)``, N x C in float64 (arXiv 2310.00035); by default ``w_m = 1/M``.

    ``temperature`` is one number for all members, or a tensor of M.
    """
    return log_mean_exp(torch.log_softmax(_tempered(logits_MNC, temperature), dim=-1), weights_M)


def mean_logits(
    logits_MNC: Tensor, temperature: float | Tensor = 1.0, weights_M: Tensor | None = None
) -> Tensor:
    """Return ``log softmax(sum_m w_m z_m / T_m)``, N x C in float64: a product of experts, not a mixture."""
    return torch.log_softmax(mean(_tempered(logits_MNC, temperature), weights_M), dim=-1)


def aggregate_logits(
    logits_MNC: Tensor, rule: str, temperature: float | Tensor = 1.0, weights_M: Tensor | None = None
) -> Tensor:
    """Return the ensemble's log-probabilities, N x C, under the named rule; SpecError for an unknown one."""
    if rule == "mean_probabilities":
        return mean_probabilities(logits_MNC, temperature, weights_M)
    if rule == "mean_logits":
        return mean_logits(logits_MNC, temperature, weights_M)
    raise SpecError(f"unknown aggregate {rule!r}", suggest(rule, RULES))


def mean(x_MN: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return ``sum_m w_m x_m`` over the first dimension, in the type of x; without weights the plain mean."""
    if weights_M is None:
        return x_MN.mean(dim=0)
    return torch.tensordot(weights_M.to(x_MN), x_MN, dims=1)


def log_mean_exp(logp_MN: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return ``log sum_m w_m exp(x_m)`` over the first dimension, in the type of x; without weights ``w_m = 1/M``."""
    if weights_M is None:
        return torch.logsumexp(logp_MN, dim=0) - math.log(logp_MN.shape[0])
    log_weights_M = weights_M.log().to(logp_MN)
    return torch.logsumexp(logp_MN + log_weights_M.reshape(-1, *[1] * (logp_MN.dim() - 1)), dim=0)


def _tempered(logits_MNC: Tensor, temperature: float | Tensor) -> Tensor:
    scale = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1, 1)
    if scale.shape[0] not in (1, logits_MNC.shape[0]) or not bool((scale > 0).all()):
        raise ValueError(f"{scale.shape[0]} temperatures for {logits_MNC.shape[0]} members, all must be positive")
    return logits_MNC.to(torch.float64) / scale
