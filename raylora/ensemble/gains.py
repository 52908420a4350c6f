"""What the ensemble gains over a single member and over its mean member, with paired bootstrap intervals.

A gain is positive where the ensemble is better, whichever way the metric points.

Shapes: S bootstrap samples, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.bootstrap import bootstrap_metrics, bootstrap_token_nll, interval, interval_if_defined
from raylora.ensemble.groups import Settings
from raylora.ensemble.metric_table import METRICS
from raylora.ensemble.metrics import RowScores, point_metrics, score_rows
from raylora.ensemble.predictions import Predictions
from raylora.records import Gain, Gains

COMPARED = ("accuracy", "nll", "brier", "ece")


def classification_gains(part: Predictions, settings: Settings) -> Gains:
    """Return ``{over_mean_member, over_single: {metric: {gain, interval}}}`` for one labeled set."""
    logits_MNC, labels_N, bins = part.values, part.labels(), settings.evaluation.bins
    pooled = score_rows(aggregate_logits(logits_MNC, settings.rule), labels_N, part.name)
    members = [
        score_rows(torch.log_softmax(logits_NC.double(), dim=-1), labels_N, part.name) for logits_NC in logits_MNC
    ]
    return gains_over_members(
        Measured(point_metrics(pooled, bins, COMPARED), _resample(pooled, settings)),
        [Measured(point_metrics(one, bins, COMPARED), _resample(one, settings)) for one in members],
        COMPARED, settings,
    )


@dataclass(frozen=True)
class Measured:
    """A contender's metrics on the rows as they are, and over the same resamples of them, S."""

    point: Mapping[str, float | None]
    drawn: Mapping[str, Tensor]


def gains_over_members(
    pooled: Measured, members: Sequence[Measured], metrics: Sequence[str], settings: Settings
) -> Gains:
    """Return ``{over_mean_member, over_single: {metric: {gain, interval}}}``; what is undefined is left out."""
    gains: Gains = {"over_mean_member": {}, "over_single": {}}
    for metric in metrics:
        sign = METRICS[metric].sign
        for found, others in ((gains["over_mean_member"], members), (gains["over_single"], members[:1])):
            values = [one.point[metric] for one in (pooled, *others)]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                continue
            found[metric] = {"gain": sign * (known[0] - sum(known[1:]) / len(others))}
            if pooled.drawn:
                mean_S = torch.stack([one.drawn[metric] for one in others]).mean(dim=0)
                ends = interval_if_defined(sign * (pooled.drawn[metric] - mean_S), settings.evaluation.confidence)
                if ends is not None:
                    found[metric]["interval"] = ends
    return gains


def _resample(scores: RowScores, settings: Settings) -> dict[str, Tensor]:
    if not settings.samples:
        return {}
    return bootstrap_metrics(scores, settings.evaluation.bins, settings.samples, settings.seed, COMPARED)


def language_gains(
    pooled_nll_N: Tensor, nll_MN: Tensor, ids: Sequence[str], settings: Settings, metric: str = "nll"
) -> Gains:
    """Return the gain in the NLL of tokens, or of whole texts, over the mean member and over member 0."""

    def over(other_N: Tensor) -> dict[str, Gain]:
        difference_N = other_N - pooled_nll_N
        gain: Gain = {"gain": float(difference_N.mean())}
        if settings.samples:
            values_S = bootstrap_token_nll(difference_N, ids, settings.samples, settings.seed)
            gain["interval"] = interval(values_S, settings.evaluation.confidence)
        return {metric: gain}

    return {"over_mean_member": over(nll_MN.mean(dim=0)), "over_single": over(nll_MN[0])}
