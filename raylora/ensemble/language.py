"""The summary of a language-modeling run, from the log-probability that each member gives each target token.

Shapes: M members, N tokens, S bootstrap samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylora.ensemble.bootstrap import bootstrap_token_nll, interval
from raylora.ensemble.gains import language_gains
from raylora.ensemble.groups import (
    Group,
    Settings,
    baselines_of,
    check_jensen,
    mean_and_error,
    member_subsets,
    one_member,
    with_role,
)
from raylora.ensemble.predictions import Predictions
from raylora.errors import SpecError


def summarize_language(groups: Mapping[str, Group], settings: Settings) -> dict[str, Any]:
    """Return the summary described in docs/metrics.md; SpecError for a rule that needs whole distributions."""
    if settings.rule != "mean_probabilities":
        raise SpecError(
            f"aggregate {settings.rule!r} needs the logits of the whole vocabulary",
            "use aggregate: mean_probabilities for language modeling",
        )
    ensemble = groups["ensemble"]
    size = ensemble[0].members
    baselines = baselines_of(groups)
    members = [{"index": m, **_describe(one_member(ensemble, m), settings, False)} for m in range(size)]
    summary: dict[str, Any] = {
        "kind": "language_modeling",
        "aggregate": settings.rule,
        "members": members,
        "ensemble": {"members": size, **_describe(ensemble, settings, True)},
        "mean_member": {"eval": _mean_member(members)},
        "baselines": {
            name: {"members": group[0].members, **_describe(group, settings, True)} for name, group in baselines.items()
        },
        "gains": {},
        "m_curve": {},
    }
    for part in _scored(ensemble):
        member_nlls = [member["eval"][part.name]["nll"] for member in members]
        check_jensen(summary["ensemble"]["eval"][part.name]["nll"], member_nlls, "nll", part.name)
        summary["gains"][part.name] = language_gains(token_nll(part.values), -part.values.double(), part.ids, settings)
        summary["m_curve"][part.name] = _curve(part, settings)
    return summary


def token_nll(logprobs_MN: Tensor) -> Tensor:
    """Return ``-(logsumexp_m log p_m(token) - log M)``, N: the NLL of the mean of probabilities."""
    return math.log(logprobs_MN.shape[0]) - torch.logsumexp(logprobs_MN.to(torch.float64), dim=0)


def _scored(group: Group) -> list[Predictions]:
    return with_role(group, "test", "in_distribution", "out_of_distribution")


def _describe(group: Group, settings: Settings, intervals: bool) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for part in _scored(group):
        nll_N = token_nll(part.values)
        nll = float(nll_N.mean())
        described[part.name] = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "tokens": part.rows,
            "documents": len(set(part.ids)),
        }
        if intervals and settings.samples:
            values_S = bootstrap_token_nll(nll_N, part.ids, settings.samples, settings.seed)
            low, high = interval(values_S, settings.evaluation.confidence)
            described[part.name]["intervals"] = {"nll": [low, high], "perplexity": [math.exp(low), math.exp(high)]}
    return {"eval": described}


def _mean_member(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: mean_and_error([m["eval"][name][key] for m in members]) for key in ("nll", "perplexity")}
        for name in members[0]["eval"]
    }


def _curve(part: Predictions, settings: Settings) -> list[dict[str, float]]:
    curve = []
    for size in range(1, part.members + 1):
        subsets = member_subsets(part.members, size, settings.seed)
        values = [float(token_nll(part.values[list(subset)]).mean()) for subset in subsets]
        perplexities = [math.exp(value) for value in values]
        curve.append(
            {
                "members": size,
                "subsets": len(subsets),
                "nll": statistics.fmean(values),
                "nll_std": statistics.pstdev(values),
                "perplexity": statistics.fmean(perplexities),
                "perplexity_std": statistics.pstdev(perplexities),
            }
        )
    return curve
