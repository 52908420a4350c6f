"""The summary of a classification or multiple-choice run.

Shapes: M members, N rows, C classes, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.bootstrap import bootstrap_metrics, interval
from raylora.ensemble.calibration import Temperature, fit_temperature
from raylora.ensemble.curves import member_curve, plot_data
from raylora.ensemble.gains import classification_gains
from raylora.ensemble.groups import Group, Settings, baselines_of, check_jensen, mean_and_error, one_member, with_role
from raylora.ensemble.metrics import METRICS, point_metrics, score_rows
from raylora.ensemble.ood import auroc, bootstrap_auroc, foreign_scores
from raylora.ensemble.predictions import Predictions
from raylora.ensemble.uncertainty import decompose, pairwise_kl

SCALED = ("nll", "brier", "ece")
"""What a temperature can change and a reader asks for; accuracy under ``mean_logits`` never moves."""


def summarize_classification(groups: Mapping[str, Group], settings: Settings) -> dict[str, Any]:
    """Return the summary described in docs/metrics.md."""
    ensemble = groups["ensemble"]
    size = ensemble[0].members
    baselines = baselines_of(groups)
    members = [{"index": m, **describe_group(one_member(ensemble, m), settings, intervals=False)} for m in range(size)]
    summary: dict[str, Any] = {
        "kind": "classification",
        "aggregate": settings.rule,
        "members": members,
        "ensemble": {"members": size, **describe_group(ensemble, settings)},
        "mean_member": _mean_member(members),
        "baselines": {
            name: {"members": group[0].members, **describe_group(group, settings)} for name, group in baselines.items()
        },
    }
    _check_identities(summary, settings.rule)
    labeled = with_role(ensemble, "test", "in_distribution")
    fitted = {"ensemble": summary["ensemble"], **summary["baselines"]}
    temperatures = {name: part["temperature"] for name, part in fitted.items() if "temperature" in part}
    return summary | {
        "gains": {part.name: classification_gains(part, settings) for part in labeled},
        "m_curve": {part.name: member_curve(part, settings) for part in labeled},
        "pairwise_kl": {part.name: pairwise_kl(part.logits()).tolist() for part in ensemble},
        "plots": plot_data({"ensemble": ensemble, **baselines}, temperatures, settings),
    }


def describe_group(group: Group, settings: Settings, intervals: bool = True) -> dict[str, Any]:
    """Return ``eval``, ``ood`` and, where a validation set allows it, the fitted ``temperature`` of a group."""
    temperature = _temperature(group, settings)
    labeled = with_role(group, "test", "in_distribution")
    description: dict[str, Any] = {
        "eval": {part.name: _describe_set(part, temperature, settings, intervals) for part in labeled},
        "ood": _describe_ood(group, settings, intervals),
    }
    if temperature is not None:
        description["temperature"] = temperature.value
        description["temperature_fit"] = {
            "nll_before": temperature.nll_before,
            "nll_after": temperature.nll_after,
            "degenerate": temperature.degenerate,
        }
    return description


def _temperature(group: Group, settings: Settings) -> Temperature | None:
    validation = with_role(group, "validation")
    if not validation or not settings.evaluation.temperature_scaling:
        return None
    return fit_temperature(validation[0].logits(), validation[0].labels(), settings.rule, validation[0].name)


def _describe_set(
    part: Predictions, temperature: Temperature | None, settings: Settings, intervals: bool
) -> dict[str, Any]:
    bins, samples = settings.evaluation.bins, settings.samples
    scores = score_rows(aggregate_logits(part.logits(), settings.rule), part.labels(), part.name)
    described: dict[str, Any] = {"rows": part.rows, **point_metrics(scores, bins), **_uncertainty(part)}
    if temperature is not None:
        scaled_NC = aggregate_logits(part.logits(), settings.rule, temperature.value)
        described["temperature_scaled"] = point_metrics(score_rows(scaled_NC, part.labels(), part.name), bins, SCALED)
    if intervals and samples:
        resampled = bootstrap_metrics(scores, bins, samples, settings.seed)
        confidence = settings.evaluation.confidence
        described["intervals"] = {name: interval(values_S, confidence) for name, values_S in resampled.items()}
    return described


def _uncertainty(part: Predictions) -> dict[str, float]:
    parts = decompose(part.logits(), expected_entropy_MN=part.expected_entropy_MN)
    return {
        "predictive_entropy": float(parts.predictive_entropy_N.mean()),
        "expected_entropy": float(parts.expected_entropy_N.mean()),
        "mutual_information": float(parts.mutual_information_N.mean()),
        "disagreement": float(parts.disagreement_N.mean()),
    }


def _describe_ood(group: Group, settings: Settings, intervals: bool) -> dict[str, Any]:
    foreign_sets = with_role(group, "out_of_distribution")
    if not foreign_sets:
        return {}
    familiar = _scores(with_role(group, "test")[0], settings)
    described: dict[str, Any] = {}
    for part in foreign_sets:
        foreign = _scores(part, settings)
        values: dict[str, Any] = {name: auroc(familiar[name], foreign[name]) for name in familiar}
        if intervals and settings.samples:
            values["intervals"] = {
                name: interval(
                    bootstrap_auroc(familiar[name], foreign[name], settings.samples, settings.seed),
                    settings.evaluation.confidence,
                )
                for name in familiar
            }
        described[part.name] = values | {"rows": part.rows, "uncertainty": _uncertainty(part)}
    return described


def _scores(part: Predictions, settings: Settings) -> dict[str, Tensor]:
    return foreign_scores(part.logits(), settings.rule, part.expected_entropy_MN)


def _mean_member(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Average the members' metrics, not their predictions."""
    averaged: dict[str, Any] = {"eval": {}, "ood": {}}
    for name, first in members[0]["eval"].items():
        sets = [member["eval"][name] for member in members]
        averaged["eval"][name] = {key: mean_and_error([one[key] for one in sets]) for key in METRICS}
        if "temperature_scaled" in first:
            averaged["eval"][name]["temperature_scaled"] = {
                key: mean_and_error([one["temperature_scaled"][key] for one in sets]) for key in SCALED
            }
    for name, first in members[0]["ood"].items():
        sets = [member["ood"][name] for member in members]
        scores = [key for key in first if key not in ("rows", "uncertainty")]
        averaged["ood"][name] = {key: mean_and_error([one[key] for one in sets]) for key in scores}
    return averaged


def _check_identities(summary: dict[str, Any], rule: str) -> None:
    # NLL is convex in probabilities and in logits, Brier in probabilities only.
    convex = ("nll", "brier") if rule == "mean_probabilities" else ("nll",)
    for name, pooled in summary["ensemble"]["eval"].items():
        for metric in convex:
            check_jensen(pooled[metric], [m["eval"][name][metric] for m in summary["members"]], metric, name)
