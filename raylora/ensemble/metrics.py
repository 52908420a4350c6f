"""Accuracy, proper scores, calibration and selective risk, for the rows as they are or for many resamples at once.

Libraries score one sample of rows at a time, and torchmetrics' calibration error rounds confidences to float32 and
counts a confidence of 1.0 in a bin of its own; fine-tuned models have many of those. So every metric is one float64
kernel over S draws of N rows, and the tests hold it against torchmetrics and scikit-learn.

Shapes: N rows, C classes, S draws (resamples), B bins, U distinct confidences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.ensemble.predictions import check_labels
from raylora.errors import DataError
from raylora.records import ReliabilityBin

CLASS_METRICS = ("accuracy", "nll", "brier", "ece", "adaptive_ece", "aurc")


@dataclass(frozen=True, eq=False)
class RowScores:
    """What each row contributes to every metric; all float64, N."""

    correct_N: Tensor
    nll_N: Tensor
    brier_N: Tensor
    confidence_N: Tensor


def score_rows(log_probs_NC: Tensor, labels_N: Tensor, name: str = "predictions") -> RowScores:
    """Return each row's scores; DataError, naming the set, for bad labels or rows that are not distributions."""
    if log_probs_NC.numel() == 0:
        raise DataError(f"set {name!r}: is empty", "a metric of no rows means nothing")
    check_labels(labels_N, log_probs_NC.shape[0], log_probs_NC.shape[1], name)
    log_probs_NC = log_probs_NC.to(torch.float64)
    probs_NC = log_probs_NC.exp()
    if not bool(torch.isfinite(log_probs_NC).all()) or bool(((probs_NC.sum(dim=1) - 1).abs() > 1e-5).any()):
        raise DataError(f"set {name!r}: rows are not log-probabilities", "apply log_softmax to logits first")
    confidence_N, choice_N = probs_NC.max(dim=1)
    target_NC = torch.nn.functional.one_hot(labels_N.long(), log_probs_NC.shape[1])
    return RowScores(
        correct_N=(choice_N == labels_N).to(torch.float64),
        nll_N=-log_probs_NC.gather(1, labels_N.long()[:, None])[:, 0],
        brier_N=((probs_NC - target_NC) ** 2).sum(dim=1),
        # Twelve digits: summing the members in another order must not move a row across a tie or a bin's edge.
        confidence_N=confidence_N.round(decimals=12),
    )


def evaluate(
    log_probs_NC: Tensor, labels_N: Tensor, bins: int = 15, names: Sequence[str] = CLASS_METRICS,
    name: str = "predictions",
) -> dict[str, float]:
    """Return the named metrics of log-probabilities N x C; DataError as in ``score_rows``."""
    return point_metrics(score_rows(log_probs_NC, labels_N, name), bins, names)


def point_metrics(scores: RowScores, bins: int, names: Sequence[str] = CLASS_METRICS) -> dict[str, float]:
    """Return the named metrics of the rows as they are."""
    identity_1N = torch.arange(len(scores.correct_N))[None]
    return {name: float(values_S[0]) for name, values_S in draw_metrics(scores, identity_1N, bins, names).items()}


def draw_metrics(
    scores: RowScores, draws_SN: Tensor, bins: int, names: Sequence[str] = CLASS_METRICS
) -> dict[str, Tensor]:
    """Return each named metric, S, over S draws of row indices."""
    kernels: dict[str, Callable[[], Tensor]] = {
        "accuracy": lambda: scores.correct_N[draws_SN].mean(dim=1),
        "nll": lambda: scores.nll_N[draws_SN].mean(dim=1),
        "brier": lambda: scores.brier_N[draws_SN].mean(dim=1),
        "ece": lambda: _ece(scores, draws_SN, bins),
        "adaptive_ece": lambda: _adaptive_ece(scores, draws_SN, bins),
        "aurc": lambda: selective_risk(scores, draws_SN).mean(dim=1),
    }
    return {name: kernels[name]() for name in names}


def _ece(scores: RowScores, draws_SN: Tensor, bins: int) -> Tensor:
    """``sum_b |sum_{i in b} (correct_i - confidence_i)| / N`` over equal-width bins."""
    gap_N = scores.correct_N - scores.confidence_N
    bin_SN = bin_of(scores.confidence_N, bins)[draws_SN]
    return _binned_gap(gap_N[draws_SN], bin_SN, bins)


def _adaptive_ece(scores: RowScores, draws_SN: Tensor, bins: int) -> Tensor:
    """The same over bins that hold equally many rows, in order of confidence."""
    correct_SN, confidence_SN = _by_confidence(scores, draws_SN)
    rows = draws_SN.shape[1]
    bin_SN = (torch.arange(rows) * bins // rows).expand_as(draws_SN)
    return _binned_gap(correct_SN - confidence_SN, bin_SN, bins)


def _binned_gap(gap_SN: Tensor, bin_SN: Tensor, bins: int) -> Tensor:
    gap_SB = torch.zeros(gap_SN.shape[0], bins, dtype=torch.float64).scatter_add_(1, bin_SN, gap_SN)
    return gap_SB.abs().sum(dim=1) / gap_SN.shape[1]


def selective_risk(scores: RowScores, draws_SN: Tensor) -> Tensor:
    """Return the error rate among the k most confident rows, for k = 1..N, S x N; its mean is the AURC."""
    correct_SN, _ = _by_confidence(scores, draws_SN)
    errors_SN = 1 - correct_SN.flip(1)
    return errors_SN.cumsum(dim=1) / torch.arange(1, draws_SN.shape[1] + 1)


def _by_confidence(scores: RowScores, draws_SN: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each draw by confidence; tied rows share their mean correctness, so their order cannot matter."""
    confidence_U, code_N = torch.unique(scores.confidence_N, return_inverse=True)
    code_SN = code_N[draws_SN]
    shape = (draws_SN.shape[0], len(confidence_U))
    count_SU = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, code_SN, torch.ones_like(code_SN).double())
    correct_SU = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, code_SN, scores.correct_N[draws_SN])
    code_SN = code_SN.sort(dim=1).values
    return (correct_SU / count_SU.clamp(min=1)).gather(1, code_SN), confidence_U[code_SN]


def bin_of(confidence_N: Tensor, bins: int) -> Tensor:
    """Return the equal-width bin of each confidence; the last bin is closed."""
    return (confidence_N * bins).long().clamp(0, bins - 1)


def reliability_bins(scores: RowScores, bins: int) -> list[ReliabilityBin]:
    """Return per equal-width bin its edges, count, mean confidence and accuracy (None where it is empty)."""
    bin_N = bin_of(scores.confidence_N, bins)
    count_B = torch.bincount(bin_N, minlength=bins)
    confidence_B = torch.bincount(bin_N, weights=scores.confidence_N, minlength=bins) / count_B
    accuracy_B = torch.bincount(bin_N, weights=scores.correct_N, minlength=bins) / count_B
    return [
        {
            "lower": b / bins,
            "upper": (b + 1) / bins,
            "count": int(count_B[b]),
            "confidence": float(confidence_B[b]) if count_B[b] else None,
            "accuracy": float(accuracy_B[b]) if count_B[b] else None,
        }
        for b in range(bins)
    ]
