"""The report of classes: calibration, selective risk, and where the doubt comes from."""

from __future__ import annotations

from raylora.records import RunMetrics
from raylora.report import errors, figures, figures_uncertainty, tables
from raylora.report.outputs.base import Block, OutputSection, Part

_RELIABILITY = Part(
    "Is the confidence calibrated?",
    "Answers are sorted into bins by confidence; on the dashed line, answers given with 80 % confidence are right 80 % "
    "of the time, and bars below it mean overconfidence. The lower strips count the rows in each bin: a bar of few "
    "rows says little.",
)
_RISK = Part(
    "Answering only when sure",
    "If the model may stay silent on the inputs it is least sure of, how many of its remaining answers are wrong? "
    "Lower curves are better; the right end is the plain error rate.",
)
_DECOMPOSITION = Part(
    "Where the uncertainty comes from",
    "The ensemble's total uncertainty is each member's own uncertainty plus what is added because the members "
    "disagree; the second part should grow on unfamiliar data.",
)


def _blocks(metrics: RunMetrics) -> list[Block]:
    scaled = tables.scaled(metrics)
    more = [Part(
        "After temperature scaling",
        "One number T, fitted on the validation split, divides each member's logits before averaging; T above 1 means "
        "that the model was overconfident (right less often than it says; most often trained for too long), T below 1 "
        "that it was underconfident (right more often than it says; most often trained too little). "
        "`raylora predict` applies it unless it is told --raw.",
        "; ".join(tables.temperatures(metrics)) + ".", scaled,
    )] if scaled is not None else []
    return [
        *errors.confusion_block(metrics),
        *errors.wrong_answers_block(metrics),
        Block(_RELIABILITY, figures.reliability(metrics), more),
        Block(_RISK, figures.risk_coverage(metrics)),
        Block(_DECOMPOSITION, figures_uncertainty.decomposition(metrics)),
    ]


SECTION = OutputSection(
    compared=("accuracy", "nll", "brier", "ece"),
    compared_text=(
        "Accuracy is the share of right answers (higher is better). NLL is the average surprise at the right answer, "
        "Brier the squared error of the probabilities, and ECE the gap between confidence and accuracy (lower is "
        "better for these three)."
    ),
    secondary=("adaptive_ece", "aurc"),
    secondary_title="Calibration in equal-mass bins, and selective risk",
    secondary_text=(
        "Adaptive ECE is the ECE with equally many rows in each bin; AURC is the mean error rate if only the most "
        "confident answers are given (lower is better for both)."
    ),
    members=("accuracy", "nll", "ece", "aurc"),
    shifted=("accuracy", "nll", "ece"),
    curve=("nll", "accuracy", "brier", "ece"),
    headline=("nll", "accuracy", "ece", "brier"),
    watched=("nll",),
    distilled=("nll", "accuracy", "ece"),
    detection=("max_probability", "predictive_entropy", "mutual_information"),
    detected_by="predictive_entropy",
    detection_text="Mutual information needs more than one member.",
    retained=("predictive_entropy", "mutual_information"),
    blocks=_blocks,
)
