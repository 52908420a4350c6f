"""A value: each member gives a real number, and the members' numbers are mixed with one noise around all of them.

Shapes: M members, N rows, S bootstrap samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from raylora.ensemble.aggregate import mean
from raylora.ensemble.bootstrap import interval, interval_if_defined, resampled
from raylora.ensemble.confusion import largest
from raylora.ensemble.gains import Measured, gains_over_members
from raylora.ensemble.gaussian import (
    Noise,
    coverage,
    epistemic_std,
    fit_noise,
    half_width,
    mixture_nll,
    total_std,
)
from raylora.ensemble.groups import (
    Group,
    Settings,
    add_weighted_gains,
    baselines_of,
    check_jensen,
    describe_contenders,
    mean_and_error,
    member_subsets,
    one_member,
    same_set,
    with_role,
)
from raylora.ensemble.objectives import Objective, ValueNLL
from raylora.ensemble.ood import auroc, bootstrap_auroc, histograms
from raylora.ensemble.outputs.base import Contributors, Names, Record, Rows
from raylora.ensemble.predictions import Predictions, check_one_each
from raylora.ensemble.regression_metrics import LEVEL, VALUE_METRICS, draw_metrics, point_metrics, score_values
from raylora.errors import DataError
from raylora.records import (
    CurvePoint,
    Description,
    Doubt,
    Gains,
    MeanMember,
    MemberMetrics,
    Miss,
    OodMetrics,
    Plots,
    SetErrors,
    SetMetrics,
    Summary,
    ValuePoints,
)
from raylora.spec import EvaluationSpec

COMPARED = ("rmse", "mae", "pearson", "spearman", "nll")
CURVE_METRICS = ("rmse", "nll", "pearson", "mae")
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
POINTS = 120
"""With more, the bars of a figure run together; they are taken at even steps through the set."""


class ValuePredictions(Predictions):
    """Values M x N, and real labels."""

    output: ClassVar[str] = "value"

    def check(self) -> None:
        """Refuse labels that are not real values. Raises: DataError."""
        if self.labels_N is None:
            return
        check_one_each(self.labels_N, self.rows, self.name)
        if not self.labels_N.is_floating_point():
            raise self._error(f"labels are {self.labels_N.dtype}, not real values", "give floating-point labels")
        if not bool(torch.isfinite(self.labels_N).all()):
            raise self._error("labels are NaN or infinite", "leave out the rows that have no label")


@dataclass(frozen=True)
class ValuePrediction:
    """What a regression's ensemble says about one row."""

    heads: ClassVar[tuple[str, ...]] = ("value", "95 % interval", "epistemic std", "std")

    id: str
    value: float
    """The mean of the members' values, by their weights."""
    member_values: list[float]
    epistemic_std: float
    """The standard deviation of the members' values: what more data could remove."""
    std: float | None
    """That and the noise fitted on the validation split; None where none was fitted for just these members."""
    interval_95: list[float] | None
    """The central 95 % of a Gaussian with this value and ``std``."""
    truncated: bool
    contributors: Contributors

    def record(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        fields = {name: value for name, value in vars(self).items() if name != "contributors"}
        return {**fields, **self.contributors.record()}

    def cells(self) -> tuple[str, ...]:
        """Return what stands under the heads."""
        reach = "n/a" if self.interval_95 is None else "{:.3f} to {:.3f}".format(*self.interval_95)
        std = "n/a" if self.std is None else f"{self.std:.3f}"
        return f"{self.value:.3f}", reach, f"{self.epistemic_std:.3f}", std

    def caption(self) -> str:
        """Return where the noise comes from, and who speaks if not all do."""
        how = "no noise is fitted for these members, so there are no intervals"
        if self.std is not None:
            how = "intervals with the noise fitted on the validation split"
        return "; ".join(filter(None, (how, self.contributors.caption())))


class Value:
    """The output of regression."""

    name = "value"
    predictions = ValuePredictions
    per_token = False
    rules = ("mean_probabilities",)
    validation = ("nll", "rmse")
    retained = "pearson"
    is_distribution = False
    unpredictable_reason = ""

    def start_value(self, labels: Sequence[float]) -> float:
        """Return the mean label.

        A head that starts at 0 is first pushed to the mean by everything that can push it, and adapters bent to that
        end were seen to forget the text (the loss stays at the labels' variance).
        """
        known = [label for label in labels if not math.isnan(label)]
        return math.fsum(known) / max(1, len(known))

    def validation_metrics(self, predictions: Predictions, evaluation: EvaluationSpec) -> list[dict[str, float]]:
        """Return each member's NLL and RMSE, the former with the noise that fits the member best on this very split.

        So the two rise and fall together.
        """
        labels_N = predictions.labels()
        return [
            {
                "nll": fit_noise(value_N[None], labels_N).nll,
                "rmse": float(((value_N.double() - labels_N.double()) ** 2).mean().sqrt()),
            }
            for value_N in predictions.values
        ]

    def objective(self, validation: Predictions, rule: str) -> Objective:
        """Return the NLL of the labels with the noise that fits each weighting best."""
        return ValueNLL(validation.values, validation.labels())

    def summarize(self, groups: Mapping[str, Group], settings: Settings) -> Summary:
        """Return the summary described in docs/metrics.md."""
        return summarize_values(groups, settings)

    def errors(self, ensemble: Group, settings: Settings, names: Names) -> dict[str, SetErrors]:
        """Return each labeled set's values that are furthest off, for how sure the ensemble was of them."""
        noise_std = noise_of(ensemble).std
        return {
            part.name: {"misses": _misses(part, noise_std, names)}
            for part in with_role(ensemble, "test", "in_distribution")
        }

    def records(self, values: Tensor, expected_entropy_MN: Tensor | None, rows: Rows) -> list[Record]:
        """Return each row's mean value and, once a noise is fitted, the interval around it."""
        noise_std = rows.described.get("noise_std")
        value_N, between_N = mean(values.double(), rows.weights_M), epistemic_std(values, rows.weights_M)
        found: list[Record] = []
        for n, row_id in enumerate(rows.ids):
            value, between, std, interval = float(value_N[n]), float(between_N[n]), None, None
            if noise_std is not None:
                std = math.hypot(noise_std, between)
                interval = [value - half_width(LEVEL) * std, value + half_width(LEVEL) * std]
            found.append(ValuePrediction(row_id, value, values[:, n].tolist(), between, std, interval,
                                         rows.truncated[n], rows.contributors))
        return found


def build() -> Value:
    """Return the output."""
    return Value()


def summarize_values(groups: Mapping[str, Group], settings: Settings) -> Summary:
    """Return the summary described in docs/metrics.md.

    Raises:
        DataError: a group has no labeled validation set, which its noise is fitted on.
    """
    ensemble = groups["ensemble"]
    summary = describe_contenders(
        "value", groups, settings, lambda group, intervals: describe_group(group, settings, intervals), _mean_member
    )
    noise = noise_of(ensemble)
    _check_identities(ensemble, noise)
    add_weighted_gains(
        summary, groups, lambda part, group: _gains(same_set(ensemble, part), ensemble, settings, part, group)
    )
    labeled = with_role(ensemble, "test", "in_distribution")
    return {
        **summary,
        "gains": {part.name: _gains(part, ensemble, settings) for part in labeled},
        "m_curve": {part.name: _curve(part, ensemble, settings) for part in labeled},
        "pairwise_kl": {part.name: pairwise_kl(part.values, noise.std).tolist() for part in ensemble},
        "plots": _plots({"ensemble": ensemble, **baselines_of(groups)}),
    }


def noise_of(group: Group) -> Noise:
    """Return the noise around a group's members, fitted on its validation set. Raises: DataError without one."""
    validation = with_role(group, "validation")
    if not validation:
        raise DataError(
            "a regression's noise is fitted on a validation set, and there is none", "predict one too, with its labels"
        )
    return fit_noise(validation[0].values, validation[0].labels(), validation[0].weights_M)


def describe_group(group: Group, settings: Settings, intervals: bool = True) -> Description:
    """Return the fitted noise, ``eval`` and ``ood`` of a group."""
    noise = noise_of(group)
    return {
        "noise_std": noise.std,
        "noise_fit": {"nll": noise.nll, "degenerate": noise.degenerate},
        "eval": {
            part.name: _describe_set(part, noise.std, settings, intervals)
            for part in with_role(group, "test", "in_distribution")
        },
        "ood": _describe_ood(group, noise.std, settings, intervals),
    }


def pairwise_kl(real_MN: Tensor, noise_std: float) -> Tensor:
    """Return ``KL(N(v_i, s^2) || N(v_j, s^2)) = (v_i - v_j)^2 / 2 s^2`` averaged over rows, M x M."""
    difference_MMN = (real_MN[:, None] - real_MN[None]).double()
    return (difference_MMN**2).mean(dim=2) / (2 * noise_std**2)


def _describe_set(part: Predictions, noise_std: float, settings: Settings, intervals: bool) -> SetMetrics:
    scores = score_values(part.values, part.labels(), noise_std, part.weights_M)
    described = cast(SetMetrics, {"rows": part.rows, **point_metrics(scores), **_doubt(part, noise_std)})
    if intervals and settings.samples:
        drawn = resampled(lambda draws_SN: draw_metrics(scores, draws_SN), part.rows, settings.samples, settings.seed)
        found = {key: interval_if_defined(values_S, settings.evaluation.confidence) for key, values_S in drawn.items()}
        described["intervals"] = {key: value for key, value in found.items() if value is not None}
    return described


def _misses(part: Predictions, noise_std: float, names: Names) -> list[Miss]:
    value_N, std_N = part.values.double().mean(dim=0), total_std(part.values, noise_std, part.weights_M)
    error_N = value_N - part.labels().double()
    deviations_N = error_N.abs() / std_N
    return [
        {
            "id": part.ids[n],
            "label": float(part.labels()[n]),
            "value": float(value_N[n]),
            "error": float(error_N[n]),
            "total_std": float(std_N[n]),
            "deviations": float(deviations_N[n]),
            "text": names.text_of(part.name, part.ids[n]),
        }
        for n in largest(deviations_N, error_N != 0)
    ]


def _doubt(part: Predictions, noise_std: float) -> Doubt:
    return {
        "epistemic_std": float(epistemic_std(part.values, part.weights_M).mean()),
        "total_std": float(total_std(part.values, noise_std, part.weights_M).mean()),
    }


def _describe_ood(group: Group, noise_std: float, settings: Settings, intervals: bool) -> dict[str, OodMetrics]:
    described: dict[str, OodMetrics] = {}
    for part in with_role(group, "out_of_distribution"):
        values: OodMetrics = {"rows": part.rows, "uncertainty": _doubt(part, noise_std)}
        if part.members > 1:  # one member disagrees with nobody
            familiar, foreign = _scores(with_role(group, "test")[0]), _scores(part)
            values["epistemic_std"] = auroc(familiar, foreign)
            if intervals and settings.samples:
                drawn = bootstrap_auroc(familiar, foreign, settings.samples, settings.seed)
                values["intervals"] = {"epistemic_std": interval(drawn, settings.evaluation.confidence)}
        described[part.name] = values
    return described


def _scores(part: Predictions) -> Tensor:
    # Twelve digits: the order in which members are summed must not break ties.
    return epistemic_std(part.values, part.weights_M).round(decimals=12)


def _mean_member(members: Sequence[MemberMetrics]) -> MeanMember:
    """Average the members' metrics, not their predictions; what is undefined for one of them is left out."""
    averaged: dict[str, dict[str, Any]] = {}
    for name in members[0]["eval"]:
        known = (*VALUE_METRICS, "epistemic_std", "total_std")
        sets: list[Mapping[str, Any]] = [member["eval"][name] for member in members]
        values = {key: [one[key] for one in sets] for key in known}
        averaged[name] = {key: mean_and_error(found) for key, found in values.items() if None not in found}
    return {"eval": averaged, "ood": {}}


def _check_identities(ensemble: Group, noise: Noise) -> None:
    # Both are convex in what is averaged; the NLL only at one noise for all, as members fit their own elsewhere.
    for part in with_role(ensemble, "test", "in_distribution"):
        labels_N, own = part.labels().double(), [part.member(m).values for m in range(part.members)]
        squared = float(((part.values.double().mean(dim=0) - labels_N) ** 2).mean())
        check_jensen(squared, [float(((v.double() - labels_N) ** 2).mean()) for v in own], "squared error", part.name)
        nll = float(mixture_nll(part.values, labels_N, noise.std).mean())
        check_jensen(nll, [float(mixture_nll(v, labels_N, noise.std).mean()) for v in own], "nll", part.name)


def _gains(
    part: Predictions, ensemble: Group, settings: Settings, weighted: Predictions | None = None,
    weighted_group: Group = (),
) -> Gains:
    """Compare the ensemble, or one with fitted weights, with its members, each with the noise of its own."""

    def measured(group: Group, own: Predictions) -> Measured:
        scores = score_values(own.values, own.labels(), noise_of(group).std, own.weights_M)
        drawn = resampled(
            lambda draws_SN: draw_metrics(scores, draws_SN, COMPARED), own.rows, settings.samples, settings.seed
        ) if settings.samples else {}
        return Measured(point_metrics(scores, COMPARED), drawn)

    members = [measured(one_member(ensemble, m), part.member(m)) for m in range(part.members)]
    plain = measured(ensemble, part)
    if weighted is None:
        return gains_over_members(plain, members, COMPARED, settings)
    return gains_over_members(measured(weighted_group, weighted), members, COMPARED, settings, plain)


def _curve(part: Predictions, ensemble: Group, settings: Settings) -> list[CurvePoint]:
    """Return, for sizes 1..M, the mean and spread of each metric over subsets, each with the noise of its own."""
    validation = with_role(ensemble, "validation")[0]
    curve = []
    for size in range(1, part.members + 1):
        subsets = [list(subset) for subset in member_subsets(part.members, size, settings.seed)]
        values = []
        for subset in subsets:
            noise = fit_noise(validation.values[subset], validation.labels())
            scores = score_values(part.values[subset], part.labels(), noise.std)
            values.append(point_metrics(scores, CURVE_METRICS))
        point: CurvePoint = {"members": size, "subsets": len(subsets)}
        for metric in CURVE_METRICS:
            known = [value for one in values if (value := one[metric]) is not None]
            if len(known) == len(values):
                point |= {metric: statistics.fmean(known), f"{metric}_std": statistics.pstdev(known)}
        curve.append(point)
    return curve


def _plots(groups: Mapping[str, Group]) -> Plots:
    """Return points of the ensemble, interval coverage by set and group, and histograms of disagreement."""
    data: Plots = {"values": {}, "coverage": {}, "ood_histograms": {}}
    for name, group in groups.items():
        noise_std = noise_of(group).std
        for part in with_role(group, "test", "in_distribution"):
            share_L = coverage(part.values, part.labels(), noise_std, LEVELS, part.weights_M).double().mean(dim=1)
            data["coverage"].setdefault(part.name, {})[name] = {"nominal": list(LEVELS), "observed": share_L.tolist()}
            if name == "ensemble":
                data["values"][part.name] = _points(part, noise_std)
    familiar = _scores(with_role(groups["ensemble"], "test")[0])
    for part in with_role(groups["ensemble"], "out_of_distribution"):
        if part.members > 1:
            data["ood_histograms"][part.name] = {"epistemic_std": histograms(familiar, _scores(part))}
    return data


def _points(part: Predictions, noise_std: float) -> ValuePoints:
    kept = torch.linspace(0, part.rows - 1, min(part.rows, POINTS)).round().long()
    return {
        "label": part.labels().double()[kept].tolist(),
        "value": part.values.double().mean(dim=0)[kept].tolist(),
        "epistemic_std": epistemic_std(part.values, part.weights_M)[kept].tolist(),
        "total_std": total_std(part.values, noise_std, part.weights_M)[kept].tolist(),
    }
