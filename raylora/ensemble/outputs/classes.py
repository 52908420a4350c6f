"""Classes: each member gives logits over a fixed set of answers, and the members' probabilities are mixed.

Shapes: M members, N rows, C classes, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from raylora.ensemble.aggregate import RULES, aggregate_logits, mean_probabilities
from raylora.ensemble.bootstrap import bootstrap_metrics, interval
from raylora.ensemble.calibration import Temperature, fit_temperature
from raylora.ensemble.confusion import MOST_CLASSES, class_scores, confusion_matrix, largest
from raylora.ensemble.curves import member_curve, plot_data
from raylora.ensemble.gains import classification_gains
from raylora.ensemble.groups import (
    Group,
    Settings,
    add_weighted_gains,
    baselines_of,
    check_jensen,
    describe_contenders,
    mean_and_error,
    same_set,
    with_role,
)
from raylora.ensemble.metrics import CLASS_METRICS, evaluate, point_metrics, score_rows
from raylora.ensemble.objectives import LogitsNLL, MixtureNLL, Objective
from raylora.ensemble.ood import auroc, bootstrap_auroc, foreign_scores
from raylora.ensemble.outputs.base import Contributors, Names, Record, Rows
from raylora.ensemble.predictions import Predictions, check_labels
from raylora.ensemble.uncertainty import decompose, pairwise_kl
from raylora.records import Description, Doubt, MeanMember, MemberMetrics, OodMetrics, SetErrors, SetMetrics, Summary
from raylora.spec import EvaluationSpec

SCALED = ("nll", "brier", "ece")
"""What a temperature can change and a reader asks for; accuracy under ``mean_logits`` never moves."""


class ClassPredictions(Predictions):
    """Logits M x N x C, and the classes' indices as labels."""

    output: ClassVar[str] = "classes"
    dimensions: ClassVar[int] = 3

    def check(self) -> None:
        """Refuse a single class, and labels that are no class. Raises: DataError."""
        if self.values.shape[2] < 2:
            raise self._error("has one class only", "a classifier needs at least two classes")
        if self.labels_N is not None:
            check_labels(self.labels_N, self.rows, self.values.shape[2], self.name)


@dataclass(frozen=True)
class Prediction:
    """What the ensemble says about one row."""

    heads: ClassVar[tuple[str, ...]] = ("label", "probability", "entropy (nats)", "mutual information")

    id: str
    label: str
    probabilities: dict[str, float]
    """Calibrated where the run fitted a temperature; the four below are of the same temperature."""
    member_probabilities: list[dict[str, float]]
    entropy: float
    """Predictive entropy in nats: all the uncertainty."""
    mutual_information: float
    """The part of it that the members disagree about: what more data could remove."""
    raw_probabilities: dict[str, float]
    """As the members give them, at T = 1."""
    temperature: float | None
    """What the members' logits were divided by; None if they were not."""
    truncated: bool
    contributors: Contributors

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was applied."""
        return self.temperature is not None

    def record(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        fields = {name: value for name, value in vars(self).items() if name != "contributors"}
        return {**fields, "calibrated": self.calibrated, **self.contributors.record()}

    def cells(self) -> tuple[str, ...]:
        """Return what stands under the heads."""
        return (
            self.label, f"{self.probabilities[self.label]:.3f}", f"{self.entropy:.3f}", f"{self.mutual_information:.4f}"
        )

    def caption(self) -> str:
        """Return whether the probabilities are calibrated, and who speaks if not all do."""
        how = "as the members give them, not calibrated"
        if self.temperature is not None:
            how = f"calibrated with T = {self.temperature:.2f}, fitted on the validation split"
        return "; ".join(filter(None, (f"probabilities {how}", self.contributors.caption())))


class Classes:
    """The output of classification and of multiple choice."""

    name = "classes"
    predictions = ClassPredictions
    per_token = False
    rules = RULES
    validation = ("nll", "accuracy", "brier", "ece")
    retained = "accuracy"
    is_distribution = True
    unpredictable_reason = ""

    def start_value(self, labels: Sequence[float]) -> float:
        """Return 0: a fresh head prefers no class."""
        return 0.0

    def validation_metrics(self, predictions: Predictions, evaluation: EvaluationSpec) -> list[dict[str, float]]:
        """Return each member's metrics on the validation split."""
        labels_N = predictions.labels()
        return [
            evaluate(mean_probabilities(logits_NC[None]), labels_N, evaluation.bins, self.validation)
            for logits_NC in predictions.values
        ]

    def objective(self, validation: Predictions, rule: str) -> Objective:
        """Return the NLL of the labels under the rule, before any temperature."""
        logp_MNC, labels_N = torch.log_softmax(validation.values.double(), dim=-1), validation.labels().long()
        if rule == "mean_logits":
            return LogitsNLL(logp_MNC, labels_N)
        return MixtureNLL(logp_MNC.gather(2, labels_N.expand(len(logp_MNC), -1)[..., None])[..., 0])

    def summarize(self, groups: Mapping[str, Group], settings: Settings) -> Summary:
        """Return the summary described in docs/metrics.md."""
        return summarize_classes(groups, settings)

    def errors(self, ensemble: Group, settings: Settings, names: Names) -> dict[str, SetErrors]:
        """Return each labeled set's confusion matrix, where there are few classes, and its surest wrong answers."""
        return {part.name: _errors(part, settings, names) for part in with_role(ensemble, "test", "in_distribution")}

    def records(self, values: Tensor, expected_entropy_MN: Tensor | None, rows: Rows) -> list[Record]:
        """Return each row's label and probabilities under the run's rule, and how sure the members are."""
        names = rows.label_names or [str(c) for c in range(values.shape[2])]
        applied = rows.temperature or 1.0
        probs_NC, raw_NC = (aggregate_logits(values, rows.rule, t, rows.weights_M).exp() for t in (applied, 1.0))
        member_MNC = (values.double() / applied).softmax(dim=-1)
        # A member that says itself how uncertain it is says it at T = 1, so its parts are only true there.
        uncertainty = decompose(
            values, applied if expected_entropy_MN is None else 1.0, expected_entropy_MN, rows.weights_M
        )
        return [
            Prediction(
                id=row_id,
                label=names[int(probs_NC[n].argmax())],
                probabilities=dict(zip(names, probs_NC[n].tolist(), strict=True)),
                member_probabilities=[dict(zip(names, row.tolist(), strict=True)) for row in member_MNC[:, n]],
                entropy=float(uncertainty.predictive_entropy_N[n]),
                mutual_information=float(uncertainty.mutual_information_N[n]),
                raw_probabilities=dict(zip(names, raw_NC[n].tolist(), strict=True)),
                temperature=rows.temperature,
                truncated=rows.truncated[n],
                contributors=rows.contributors,
            )
            for n, row_id in enumerate(rows.ids)
        ]


def build() -> Classes:
    """Return the output."""
    return Classes()


def summarize_classes(groups: Mapping[str, Group], settings: Settings) -> Summary:
    """Return the summary described in docs/metrics.md."""
    ensemble = groups["ensemble"]
    summary = describe_contenders(
        "classes", groups, settings, lambda group, intervals: describe_group(group, settings, intervals), _mean_member
    )
    _check_identities(summary, settings.rule)
    add_weighted_gains(
        summary, groups, lambda part, group: classification_gains(same_set(ensemble, part), settings, part)
    )
    labeled = with_role(ensemble, "test", "in_distribution")
    fitted = {"ensemble": summary["ensemble"], **summary.get("weighted", {}), **summary["baselines"]}
    temperatures = {name: part["temperature"] for name, part in fitted.items() if "temperature" in part}
    return {
        **summary,
        "gains": {part.name: classification_gains(part, settings) for part in labeled},
        "m_curve": {part.name: member_curve(part, settings) for part in labeled},
        "pairwise_kl": {part.name: pairwise_kl(part.values).tolist() for part in ensemble},
        "plots": plot_data({"ensemble": ensemble, **baselines_of(groups)}, temperatures, settings),
    }


def describe_group(group: Group, settings: Settings, intervals: bool = True) -> Description:
    """Return ``eval``, ``ood`` and, where a validation set allows it, the fitted ``temperature`` of a group."""
    temperature = _temperature(group, settings)
    labeled = with_role(group, "test", "in_distribution")
    description: Description = {
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
    return fit_temperature(validation[0].values, validation[0].labels(), settings.rule, validation[0].name,
                           validation[0].weights_M)


def _describe_set(
    part: Predictions, temperature: Temperature | None, settings: Settings, intervals: bool
) -> SetMetrics:
    bins, samples = settings.evaluation.bins, settings.samples
    pooled_NC = aggregate_logits(part.values, settings.rule, weights_M=part.weights_M)
    scores = score_rows(pooled_NC, part.labels(), part.name)
    described = cast(SetMetrics, {"rows": part.rows, **point_metrics(scores, bins), **_uncertainty(part)})
    if temperature is not None:
        scaled_NC = aggregate_logits(part.values, settings.rule, temperature.value, part.weights_M)
        described["temperature_scaled"] = point_metrics(score_rows(scaled_NC, part.labels(), part.name), bins, SCALED)
    if intervals and samples:
        resampled = bootstrap_metrics(scores, bins, samples, settings.seed)
        confidence = settings.evaluation.confidence
        described["intervals"] = {name: interval(values_S, confidence) for name, values_S in resampled.items()}
    return described


def _errors(part: Predictions, settings: Settings, names: Names) -> SetErrors:
    """Return what is said of single classes and rows, as predicted: like the scores, without a temperature."""
    probs_NC, labels_N = aggregate_logits(part.values, settings.rule).exp(), part.labels()
    confidence_N, answers_N = probs_NC.max(dim=1)
    unsure_N = decompose(part.values, expected_entropy_MN=part.expected_entropy_MN).mutual_information_N
    found: SetErrors = {"wrong_answers": [
        {
            "id": part.ids[n],
            "label": names.label(int(labels_N[n])),
            "answer": names.label(int(answers_N[n])),
            "confidence": float(confidence_N[n]),
            "mutual_information": float(unsure_N[n]),
            "text": names.text_of(part.name, part.ids[n]),
        }
        for n in largest(confidence_N, answers_N != labels_N)
    ]}
    classes = probs_NC.shape[1]
    if classes <= MOST_CLASSES:
        confusion_CC = confusion_matrix(answers_N, labels_N, classes)
        found["confusion"], found["classes"] = confusion_CC.tolist(), class_scores(confusion_CC)
    return found


def _uncertainty(part: Predictions) -> Doubt:
    parts = decompose(part.values, expected_entropy_MN=part.expected_entropy_MN, weights_M=part.weights_M)
    return {
        "predictive_entropy": float(parts.predictive_entropy_N.mean()),
        "expected_entropy": float(parts.expected_entropy_N.mean()),
        "mutual_information": float(parts.mutual_information_N.mean()),
        "disagreement": float(parts.disagreement_N.mean()),
    }


def _describe_ood(group: Group, settings: Settings, intervals: bool) -> dict[str, OodMetrics]:
    foreign_sets = with_role(group, "out_of_distribution")
    if not foreign_sets:
        return {}
    familiar = _scores(with_role(group, "test")[0], settings)
    described: dict[str, OodMetrics] = {}
    for part in foreign_sets:
        foreign = _scores(part, settings)
        values = cast(OodMetrics, {name: auroc(familiar[name], foreign[name]) for name in familiar})
        if intervals and settings.samples:
            values["intervals"] = {
                name: interval(
                    bootstrap_auroc(familiar[name], foreign[name], settings.samples, settings.seed),
                    settings.evaluation.confidence,
                )
                for name in familiar
            }
        described[part.name] = {**values, "rows": part.rows, "uncertainty": _uncertainty(part)}
    return described


def _scores(part: Predictions, settings: Settings) -> dict[str, Tensor]:
    return foreign_scores(part.values, settings.rule, part.expected_entropy_MN, part.weights_M)


def _mean_member(members: Sequence[MemberMetrics]) -> MeanMember:
    """Average the members' metrics, not their predictions."""
    averaged: MeanMember = {"eval": {}, "ood": {}}
    for name, first in members[0]["eval"].items():
        sets: list[Mapping[str, Any]] = [member["eval"][name] for member in members]
        averaged["eval"][name] = {key: mean_and_error([one[key] for one in sets]) for key in CLASS_METRICS}
        if "temperature_scaled" in first:
            averaged["eval"][name]["temperature_scaled"] = {
                key: mean_and_error([one["temperature_scaled"][key] for one in sets]) for key in SCALED
            }
    for name, found in members[0]["ood"].items():
        scored: list[Mapping[str, Any]] = [member["ood"][name] for member in members]
        scores = [key for key in found if key not in ("rows", "uncertainty")]
        averaged["ood"][name] = {key: mean_and_error([one[key] for one in scored]) for key in scores}
    return averaged


def _check_identities(summary: Summary, rule: str) -> None:
    # NLL is convex in probabilities and in logits, Brier in probabilities only.
    for name, pooled in summary["ensemble"]["eval"].items():
        members = [member["eval"][name] for member in summary["members"]]
        check_jensen(pooled["nll"], [one["nll"] for one in members], "nll", name)
        if rule == "mean_probabilities":
            check_jensen(pooled["brier"], [one["brier"] for one in members], "brier", name)
