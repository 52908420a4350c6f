"""The report of values: predicted against true ones, and whether the intervals hold."""

from __future__ import annotations

from raylora.records import RunMetrics
from raylora.report import errors, figures_regression, tables
from raylora.report.outputs.base import Block, OutputSection, Part

_PREDICTED = Part(
    "Predicted and true values",
    "Each point is one row: on the dashed line the prediction is right. The thick bar is one standard deviation of the "
    "members' values (what they disagree about), the thin bar one standard deviation of the whole prediction, noise "
    "included.",
)


def _blocks(metrics: RunMetrics) -> list[Block]:
    intervals = Part(
        "Are the intervals calibrated?",
        "Every prediction is a distribution: the members' values with one noise around all of them, fitted on the "
        "validation split. On the dashed line, intervals that promise to hold the label 80 % of the time do so; below "
        "it they are too narrow (overconfident), above it too wide.",
        "; ".join(tables.noises(metrics)) + ".",
    )
    return [Block(_PREDICTED, figures_regression.values(metrics)), *errors.misses_block(metrics),
            Block(intervals, figures_regression.coverage(metrics))]


SECTION = OutputSection(
    compared=("pearson", "spearman", "rmse", "nll", "coverage_95"),
    compared_text=(
        "Pearson and Spearman correlate predictions with labels, by value and by rank (higher is better). RMSE is the "
        "root of the mean squared error in the label's units, NLL the average surprise at the label under the "
        "predicted distribution (lower is better for both), and 95 % coverage the share of labels inside the predicted "
        "95 % interval: 95 % is right, less is overconfident."
    ),
    secondary=("mae", "r2", "total_std"),
    secondary_title="Absolute error, explained variance, and how wide the intervals are",
    secondary_text=(
        "MAE is the mean absolute error (lower is better), R² the share of the labels' variance that is explained "
        "(higher is better), and total std the mean standard deviation of the predicted distribution: of two "
        "contenders with the right coverage the one with less of it is more precise."
    ),
    members=("pearson", "rmse", "nll", "coverage_95"),
    shifted=("pearson", "rmse", "nll", "coverage_95"),
    curve=("rmse", "nll"),
    headline=("rmse", "nll", "pearson"),
    watched=("nll", "rmse"),
    distilled=("nll", "pearson", "rmse"),
    detection=("epistemic_std",),
    detected_by="epistemic_std",
    detection_text=(
        "The score is the standard deviation of the members' values, so it needs more than one member."
    ),
    retained=("epistemic_std",),
    blocks=_blocks,
)
