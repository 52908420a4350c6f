"""Tokens: each member gives every target token of a text a log-probability, and the text is its own label.

Shapes: M members, N tokens, D texts (a text's tokens are those of one row), S bootstrap samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from raylora.ensemble.aggregate import log_mean_exp
from raylora.ensemble.bootstrap import bootstrap_token_nll, interval
from raylora.ensemble.gains import language_gains
from raylora.ensemble.groups import (
    Group,
    Settings,
    add_weighted_gains,
    check_jensen,
    describe_contenders,
    mean_and_error,
    member_subsets,
    same_set,
    with_role,
)
from raylora.ensemble.objectives import MixtureNLL, Objective
from raylora.ensemble.outputs.base import Names, Record, Rows
from raylora.ensemble.predictions import Predictions
from raylora.errors import SpecError
from raylora.records import CurvePoint, Description, Gains, MeanMember, MemberMetrics, SetErrors, SetMetrics, Summary
from raylora.spec import EvaluationSpec

TOKEN_METRICS: tuple[Literal["nll", "perplexity", "tokenwise_nll", "sequencewise_nll"], ...] = (
    "nll", "perplexity", "tokenwise_nll", "sequencewise_nll",
)


class TokenPredictions(Predictions):
    """Log-probabilities M x N of the target tokens; there are no labels."""

    output: ClassVar[str] = "tokens"

    def check(self) -> None:
        """Refuse what is no log-probability. Raises: DataError."""
        # They come from reduced precision, where a certain token may round to just above zero.
        if float(self.values.max()) > 1e-3:
            raise self._error("token log-probabilities above zero", "give log-probabilities, not losses or logits")


class Tokens:
    """The output of language modeling."""

    name = "tokens"
    predictions = TokenPredictions
    per_token = True
    rules = ("mean_probabilities",)
    validation = ("nll",)
    retained: str | None = None
    is_distribution = True
    unpredictable_reason = "has no classes to predict; ask it with generate, or what it says of answers with score"

    def start_value(self, labels: Sequence[float]) -> float:
        """Return 0: a language model keeps its own head."""
        return 0.0

    def validation_metrics(self, predictions: Predictions, evaluation: EvaluationSpec) -> list[dict[str, float]]:
        """Return each member's mean negative log-likelihood per token."""
        return [{"nll": -float(row_N.double().mean())} for row_N in predictions.values]

    def objective(self, validation: Predictions, rule: str) -> Objective:
        """Return the NLL per token, as the ensemble writes: the members are mixed at every token."""
        return MixtureNLL(validation.values.double())

    def summarize(self, groups: Mapping[str, Group], settings: Settings) -> Summary:
        """Return the summary described in docs/metrics.md."""
        return summarize_tokens(groups, settings)

    def errors(self, ensemble: Group, settings: Settings, names: Names) -> dict[str, SetErrors]:
        """Return nothing: a text is its own label, and no answer to it is wrong."""
        return {}

    def records(self, values: Tensor, expected_entropy_MN: Tensor | None, rows: Rows) -> list[Record]:
        """Raise SpecError: :attr:`unpredictable_reason`."""
        raise SpecError(f"output tokens: {self.unpredictable_reason}")


def build() -> Tokens:
    """Return the output."""
    return Tokens()


def summarize_tokens(groups: Mapping[str, Group], settings: Settings) -> Summary:
    """Return the summary described in docs/metrics.md."""
    summary = describe_contenders(
        "tokens", groups, settings, lambda group, intervals: _describe(group, settings, intervals), _mean_member
    )
    summary["gains"], summary["m_curve"] = {}, {}
    for part in _scored(groups["ensemble"]):
        for key in ("nll", "tokenwise_nll", "sequencewise_nll"):
            of_members = [member["eval"][part.name][key] for member in summary["members"]]
            check_jensen(summary["ensemble"]["eval"][part.name][key], of_members, key, part.name)
        summary["gains"][part.name] = _gains(part, settings)
        summary["m_curve"][part.name] = _curve(part, settings)
    add_weighted_gains(
        summary, groups, lambda part, group: _gains(same_set(groups["ensemble"], part), settings, part)
    )
    return summary


def token_nll(logprobs_MN: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return ``-log sum_m w_m p_m(token)``, N: the NLL of the mean of probabilities, by default of the plain one."""
    return -log_mean_exp(logprobs_MN.to(torch.float64), weights_M)


def text_nlls(logprobs_MN: Tensor, ids: Sequence[str], weights_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what whole texts cost, in nats, under two mixtures of the members, D each.

    Token by token, as an ensemble writes, a text has the probability ``prod_t sum_m w_m p_m(y_t)``; as a whole, as one
    of the members wrote it, ``sum_m w_m prod_t p_m(y_t)``.
    """
    names, of_N = np.unique(np.asarray(ids), return_inverse=True)
    text_N = torch.from_numpy(of_N)
    tokenwise_D = torch.zeros(len(names), dtype=torch.float64).index_add_(0, text_N, token_nll(logprobs_MN, weights_M))
    sums_MD = torch.zeros((len(logprobs_MN), len(names)), dtype=torch.float64)
    sums_MD.index_add_(1, text_N, logprobs_MN.to(torch.float64))
    return tokenwise_D, token_nll(sums_MD, weights_M)


def _scored(group: Group) -> list[Predictions]:
    return with_role(group, "test", "in_distribution", "out_of_distribution")


def _describe(group: Group, settings: Settings, intervals: bool) -> Description:
    described: dict[str, SetMetrics] = {}
    for part in _scored(group):
        nll_N = token_nll(part.values, part.weights_M)
        nll = float(nll_N.mean())
        tokenwise_D, sequencewise_D = text_nlls(part.values, part.ids, part.weights_M)
        described[part.name] = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "tokenwise_nll": float(tokenwise_D.mean()),
            "sequencewise_nll": float(sequencewise_D.mean()),
            "tokens": part.rows,
            "documents": len(set(part.ids)),
        }
        if intervals and settings.samples:
            values_S = bootstrap_token_nll(nll_N, part.ids, settings.samples, settings.seed)
            low, high = interval(values_S, settings.evaluation.confidence)
            described[part.name]["intervals"] = {"nll": [low, high], "perplexity": [math.exp(low), math.exp(high)]}
            for key, value_D in (("tokenwise_nll", tokenwise_D), ("sequencewise_nll", sequencewise_D)):
                texts = [str(n) for n in range(len(value_D))]
                drawn_S = bootstrap_token_nll(value_D, texts, settings.samples, settings.seed)
                described[part.name]["intervals"][key] = interval(drawn_S, settings.evaluation.confidence)
    return {"eval": described}


def _mean_member(members: Sequence[MemberMetrics]) -> MeanMember:
    averaged: dict[str, dict[str, Any]] = {}
    for name in members[0]["eval"]:
        sets = [member["eval"][name] for member in members]
        averaged[name] = {key: mean_and_error([one[key] for one in sets]) for key in TOKEN_METRICS}
    return {"eval": averaged}


def _gains(part: Predictions, settings: Settings, weighted: Predictions | None = None) -> Gains:
    """Return what the ensemble, or one with fitted weights, gains per token, and per text as a whole."""
    own_MD = torch.stack([text_nlls(row_N[None], part.ids)[1] for row_N in part.values])
    texts = [str(n) for n in range(own_MD.shape[1])]
    token_N, text_D = token_nll(part.values), text_nlls(part.values, part.ids)[1]
    plain_N, plain_D = None, None
    if weighted is not None:
        plain_N, plain_D = token_N, text_D
        token_N = token_nll(weighted.values, weighted.weights_M)
        text_D = text_nlls(weighted.values, part.ids, weighted.weights_M)[1]
    per_text = language_gains(text_D, own_MD, texts, settings, "sequencewise_nll", plain_D)
    per_token = language_gains(token_N, -part.values.double(), part.ids, settings, ensemble_nll_N=plain_N)
    return cast(Gains, {over: {**gains, **cast(Any, per_text)[over]} for over, gains in cast(Any, per_token).items()})


def _curve(part: Predictions, settings: Settings) -> list[CurvePoint]:
    curve: list[CurvePoint] = []
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
