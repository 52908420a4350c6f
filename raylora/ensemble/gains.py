"""What the ensemble gains over a single member and over its mean member, with paired bootstrap intervals.

A gain is positive where the ensemble is better, whichever way the metric points.

Shapes: S bootstrap samples, N rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.bootstrap import bootstrap_metrics, bootstrap_token_nll, interval
from raylora.ensemble.groups import Settings
from raylora.ensemble.metrics import RowScores, point_metrics, score_rows
from raylora.ensemble.predictions import Predictions

COMPARED = ("accuracy", "nll", "brier", "ece")
HIGHER_IS_BETTER = frozenset({"accuracy"})


def classification_gains(part: Predictions, settings: Settings) -> dict[str, Any]:
    """Return ``{over_mean_member, over_single: {metric: {gain, interval}}}`` for one labelled set."""
    logits_MNC, labels_N, bins = part.logits(), part.labels(), settings.evaluation.bins
    pooled = score_rows(aggregate_logits(logits_MNC, settings.rule), labels_N, part.name)
    members = [
        score_rows(torch.log_softmax(logits_NC.double(), dim=-1), labels_N, part.name) for logits_NC in logits_MNC
    ]
    gains: dict[str, Any] = {"over_mean_member": {}, "over_single": {}}
    point, point_members = point_metrics(pooled, bins, COMPARED), [point_metrics(m, bins, COMPARED) for m in members]
    drawn = _resample(pooled, settings)
    drawn_members = [_resample(member, settings) for member in members]
    for metric in COMPARED:
        sign = 1.0 if metric in HIGHER_IS_BETTER else -1.0
        values = [one[metric] for one in point_members]
        draws = [one[metric] for one in drawn_members] if drawn else []
        for name, count in (("over_mean_member", len(members)), ("over_single", 1)):
            gain = sign * (point[metric] - sum(values[:count]) / count)
            gains[name][metric] = {"gain": gain}
            if drawn:
                difference_S = sign * (drawn[metric] - torch.stack(draws[:count]).mean(dim=0))
                gains[name][metric]["interval"] = interval(difference_S, settings.evaluation.confidence)
    return gains


def _resample(scores: RowScores, settings: Settings) -> dict[str, Tensor]:
    if not settings.samples:
        return {}
    return bootstrap_metrics(scores, settings.evaluation.bins, settings.samples, settings.seed, COMPARED)


def language_gains(pooled_nll_N: Tensor, nll_MN: Tensor, ids: list[str], settings: Settings) -> dict[str, Any]:
    """Return the gain in token NLL over the mean member and over member 0."""
    gains: dict[str, Any] = {}
    for name, other_N in (("over_mean_member", nll_MN.mean(dim=0)), ("over_single", nll_MN[0])):
        difference_N = other_N - pooled_nll_N
        gains[name] = {"nll": {"gain": float(difference_N.mean())}}
        if settings.samples:
            values_S = bootstrap_token_nll(difference_N, ids, settings.samples, settings.seed)
            gains[name]["nll"]["interval"] = interval(values_S, settings.evaluation.confidence)
    return gains
