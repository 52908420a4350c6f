"""Everything the report draws: how metrics move with M, reliability, selective risk, score histograms.

Shapes: M members, N rows, C classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch

from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.groups import Group, Settings, member_subsets, with_role
from raylora.ensemble.metrics import RowScores, evaluate, reliability_bins, score_rows, selective_risk
from raylora.ensemble.ood import foreign_scores, histograms
from raylora.ensemble.predictions import Predictions
from raylora.records import CurvePoint, Histograms, Plots, ReliabilityBins, RiskCoverage

POINTS = 100
"""A curve is thinned to this many points: a page shows no more, and metrics.json stays small."""
CURVE_METRICS = ("nll", "brier", "ece", "accuracy")


def member_curve(part: Predictions, settings: Settings) -> list[CurvePoint]:
    """Return, for sizes 1..M, the mean and spread of each metric over subsets of the members."""
    curve = []
    for size in range(1, part.members + 1):
        subsets = member_subsets(part.members, size, settings.seed)
        values = [
            evaluate(
                aggregate_logits(part.values[list(subset)], settings.rule),
                part.labels(),
                settings.evaluation.bins,
                CURVE_METRICS,
                part.name,
            )
            for subset in subsets
        ]
        point: CurvePoint = {"members": size, "subsets": len(subsets)}
        for metric in CURVE_METRICS:
            point[metric] = statistics.fmean(one[metric] for one in values)
            point[f"{metric}_std"] = statistics.pstdev(one[metric] for one in values)
        curve.append(point)
    return curve


def plot_data(groups: Mapping[str, Group], temperatures: Mapping[str, float], settings: Settings) -> Plots:
    """Return reliability bins, risk-coverage curves and score histograms, by set and then by group."""
    data: Plots = {
        "reliability": {}, "risk_coverage": {}, "ood_histograms": _ood_histograms(groups["ensemble"], settings),
    }
    for name, group in groups.items():
        for part in with_role(group, "test", "in_distribution"):
            scores = _scores(part, settings.rule, 1.0)
            data["risk_coverage"].setdefault(part.name, {})[name] = _risk_coverage(scores)
            bins: ReliabilityBins = {"before": reliability_bins(scores, settings.evaluation.bins)}
            if name in temperatures:
                scaled = _scores(part, settings.rule, temperatures[name])
                bins["after"] = reliability_bins(scaled, settings.evaluation.bins)
            data["reliability"].setdefault(part.name, {})[name] = bins
    return data


def _scores(part: Predictions, rule: str, temperature: float) -> RowScores:
    return score_rows(aggregate_logits(part.values, rule, temperature, part.weights_M), part.labels(), part.name)


def _risk_coverage(scores: RowScores) -> RiskCoverage:
    rows = len(scores.nll_N)
    risk_N = selective_risk(scores, torch.arange(rows)[None])[0]
    kept = torch.linspace(0, rows - 1, min(rows, POINTS)).round().long()
    return {"coverage": ((kept + 1) / rows).tolist(), "risk": risk_N[kept].tolist()}


def _ood_histograms(ensemble: Group, settings: Settings) -> dict[str, dict[str, Histograms]]:
    test = with_role(ensemble, "test")[0]
    familiar = foreign_scores(test.values, settings.rule, test.expected_entropy_MN)
    found: dict[str, dict[str, Histograms]] = {}
    for part in with_role(ensemble, "out_of_distribution"):
        foreign = foreign_scores(part.values, settings.rule, part.expected_entropy_MN)
        found[part.name] = {score: histograms(familiar[score], foreign[score]) for score in familiar}
    return found
