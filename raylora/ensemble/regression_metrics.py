"""Errors, correlations and proper scores of real values, for the rows as they are or for many resamples at once.

Every metric is one float64 kernel over S draws of N rows; the tests hold it against scipy and torchmetrics.

Shapes: M members, N rows, S draws (resamples), U distinct values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.ensemble.aggregate import mean
from raylora.ensemble.gaussian import coverage, epistemic_std, mixture_nll, total_std

VALUE_METRICS = ("rmse", "mae", "pearson", "spearman", "r2", "nll", "coverage_95")
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class ValueScores:
    """What each row contributes to every metric; all float64, N."""

    value_N: Tensor
    label_N: Tensor
    nll_N: Tensor
    covered_N: Tensor
    epistemic_std_N: Tensor
    total_std_N: Tensor


def score_values(
    real_MN: Tensor, labels_N: Tensor, noise_std: float, weights_M: Tensor | None = None
) -> ValueScores:
    """Return each row's scores under the mixture of the members."""
    return ValueScores(
        value_N=mean(real_MN.double(), weights_M),
        label_N=labels_N.double(),
        nll_N=mixture_nll(real_MN, labels_N, noise_std, weights_M),
        covered_N=coverage(real_MN, labels_N, noise_std, [LEVEL], weights_M)[0].double(),
        epistemic_std_N=epistemic_std(real_MN, weights_M),
        total_std_N=total_std(real_MN, noise_std, weights_M),
    )


def point_metrics(scores: ValueScores, names: Sequence[str] = VALUE_METRICS) -> dict[str, float | None]:
    """Return the named metrics of the rows as they are; None where one is undefined."""
    identity_1N = torch.arange(len(scores.label_N))[None]
    found = {name: float(values_S[0]) for name, values_S in draw_metrics(scores, identity_1N, names).items()}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def draw_metrics(scores: ValueScores, draws_SN: Tensor, names: Sequence[str] = VALUE_METRICS) -> dict[str, Tensor]:
    """Return each named metric, S, over S draws of row indices; NaN where one is undefined."""
    error_N = scores.value_N - scores.label_N
    kernels: dict[str, Callable[[], Tensor]] = {
        "rmse": lambda: (error_N**2)[draws_SN].mean(dim=1).sqrt(),
        "mae": lambda: error_N.abs()[draws_SN].mean(dim=1),
        "pearson": lambda: _correlation(scores.value_N[draws_SN], scores.label_N[draws_SN]),
        "spearman": lambda: _correlation(_ranks(scores.value_N, draws_SN), _ranks(scores.label_N, draws_SN)),
        "r2": lambda: _r2((error_N**2)[draws_SN], scores.label_N[draws_SN]),
        "nll": lambda: scores.nll_N[draws_SN].mean(dim=1),
        "coverage_95": lambda: scores.covered_N[draws_SN].mean(dim=1),
    }
    return {name: kernels[name]() for name in names}


def _correlation(one_SN: Tensor, two_SN: Tensor) -> Tensor:
    """Return Pearson's r of each draw."""
    one_SN, two_SN = _centered(one_SN), _centered(two_SN)
    product_S = (one_SN * two_SN).sum(dim=1)
    return (product_S / ((one_SN**2).sum(dim=1) * (two_SN**2).sum(dim=1)).sqrt()).clamp(-1, 1)


def _r2(squared_error_SN: Tensor, label_SN: Tensor) -> Tensor:
    """Return ``1 - sum e^2 / sum (y - mean y)^2`` of each draw."""
    return 1 - squared_error_SN.sum(dim=1) / (_centered(label_SN) ** 2).sum(dim=1)


def _centered(x_SN: Tensor) -> Tensor:
    """Subtract each draw's mean; a draw of equal values becomes NaN, and not the rounding error of its mean."""
    constant_S1 = (x_SN == x_SN[:, :1]).all(dim=1, keepdim=True)
    return (x_SN - x_SN.mean(dim=1, keepdim=True)).masked_fill(constant_S1, math.nan)


def _ranks(x_N: Tensor, draws_SN: Tensor) -> Tensor:
    """Return the rank of each row within its draw, S x N; equal values share their mean rank."""
    # Twelve digits: summing the members in another order must not break a tie.
    scale = float(x_N.abs().max()) or 1.0
    x_U, code_N = torch.unique((x_N / scale).round(decimals=12), return_inverse=True)
    code_SN = code_N[draws_SN]
    count_SU = torch.zeros(len(draws_SN), len(x_U), dtype=torch.float64)
    count_SU.scatter_add_(1, code_SN, torch.ones_like(code_SN).double())
    return (count_SU.cumsum(dim=1) - count_SU / 2).gather(1, code_SN)
