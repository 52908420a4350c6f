"""What the ensemble gains over a single member and over its mean member, with paired bootstrap intervals.

A gain is positive where the ensemble is better, whichever way the metric points.

Shapes: S bootstrap samples, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

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


def classification_gains(part: Predictions, settings: Settings, weighted: Predictions | None = None) -> Gains:
    """Return ``{over_mean_member, over_single: {metric: {gain, interval}}}`` for one labeled set.

    Args:
        weighted: the set as an ensemble with fitted weights predicts it, whose gains they are then; with
            ``over_ensemble``, those over the plain mean.
    """
    logits_MNC, labels_N, bins = part.values, part.labels(), settings.evaluation.bins

    def measured(own: Predictions) -> Measured:
        logp_NC = aggregate_logits(own.values, settings.rule, weights_M=own.weights_M)
        scores = score_rows(logp_NC, labels_N, part.name)
        return Measured(point_metrics(scores, bins, COMPARED), _resample(scores, settings))

    members = [
        score_rows(torch.log_softmax(logits_NC.double(), dim=-1), labels_N, part.name) for logits_NC in logits_MNC
    ]
    return gains_over_members(
        measured(part if weighted is None else weighted),
        [Measured(point_metrics(one, bins, COMPARED), _resample(one, settings)) for one in members],
        COMPARED, settings, None if weighted is None else measured(part),
    )


@dataclass(frozen=True)
class Measured:
    """A contender's metrics on the rows as they are, and over the same resamples of them, S."""

    point: Mapping[str, float | None]
    drawn: Mapping[str, Tensor]


def gains_over_members(
    pooled: Measured, members: Sequence[Measured], metrics: Sequence[str], settings: Settings,
    ensemble: Measured | None = None,
) -> Gains:
    """Return ``{over_mean_member, over_single: {metric: {gain, interval}}}``; what is undefined is left out.

    Args:
        ensemble: what ``over_ensemble`` is told of, where the one that gains has weights and this is the plain mean.
    """
    gains: Gains = {"over_mean_member": {}, "over_single": {}}
    compared = [(gains["over_mean_member"], members), (gains["over_single"], members[:1])]
    if ensemble is not None:
        over_ensemble: dict[str, Gain] = {}
        gains = cast(Gains, {**gains, "over_ensemble": over_ensemble})
        compared.append((over_ensemble, [ensemble]))
    for metric in metrics:
        sign = METRICS[metric].sign
        for found, others in compared:
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
    pooled_nll_N: Tensor, nll_MN: Tensor, ids: Sequence[str], settings: Settings, metric: str = "nll",
    ensemble_nll_N: Tensor | None = None,
) -> Gains:
    """Return the gain in the NLL of tokens, or of whole texts, over the mean member and over member 0.

    Args:
        ensemble_nll_N: of the plain mean, where the one that gains has weights.
    """

    def over(other_N: Tensor) -> dict[str, Gain]:
        difference_N = other_N - pooled_nll_N
        gain: Gain = {"gain": float(difference_N.mean())}
        if settings.samples:
            values_S = bootstrap_token_nll(difference_N, ids, settings.samples, settings.seed)
            gain["interval"] = interval(values_S, settings.evaluation.confidence)
        return {metric: gain}

    gains: Gains = {"over_mean_member": over(nll_MN.mean(dim=0)), "over_single": over(nll_MN[0])}
    return gains if ensemble_nll_N is None else cast(Gains, {**gains, "over_ensemble": over(ensemble_nll_N)})
