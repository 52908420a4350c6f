"""Every metric that is reported, in one table: its label, which way is better, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Metric:
    """One metric as tables, figures, sentences, early stopping and gains know it."""

    name: str
    label: str
    better: Better = "lower"
    percent: bool = False
    digits: int = 3
    """After the decimal point."""
    target: float | None = None
    """A metric that is best at a value, not at an end."""
    phrase: str = ""
    """What a sentence calls it; by default its label."""
    axis: str = ""
    """What the axis of a histogram of it says, for scores that single rows have."""

    @property
    def in_words(self) -> str:
        """What a sentence calls it."""
        return self.phrase or self.label

    @property
    def sign(self) -> float:
        """1 where more is better, else -1: a difference times this is a gain."""
        return 1.0 if self.better == "higher" else -1.0

    def cost(self, value: float) -> float | None:
        """Return a number that is least for the best contender, or None where nobody is better."""
        if self.better == "neither":
            return None
        return abs(value - self.target) if self.target is not None else -self.sign * value


METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    # classes
    Metric("accuracy", "Accuracy", "higher", percent=True, phrase="accuracy"),
    Metric("nll", "NLL", phrase="negative log-likelihood (NLL, lower is better)"),
    Metric("brier", "Brier", phrase="Brier score (lower is better)"),
    Metric("ece", "ECE", phrase="calibration error (ECE, lower is better)"),
    Metric("adaptive_ece", "Adaptive ECE"),
    Metric("aurc", "AURC"),
    # tokens
    Metric("perplexity", "Perplexity", digits=2),
    Metric("tokenwise_nll", "NLL of a text, token by token"),
    Metric("sequencewise_nll", "NLL of a text, as a whole"),
    # written answers
    Metric("exact_match", "Exact match", "higher", percent=True, phrase="exact match"),
    Metric("f1", "F1", "higher", percent=True),
    Metric("contains", "Contains", "higher", percent=True, phrase="share of answers that contain the reference"),
    Metric("number", "Number", "higher", percent=True, phrase="share of right numbers"),
    Metric("choice", "Choice", "higher", percent=True, phrase="share of right choices"),
    # values
    Metric("rmse", "RMSE", phrase="root mean squared error (RMSE, lower is better)"),
    Metric("mae", "MAE"),
    Metric("pearson", "Pearson", "higher", phrase="Pearson correlation"),
    Metric("spearman", "Spearman", "higher"),
    Metric("r2", "R²", "higher"),
    Metric("coverage_95", "95 % coverage", "higher", percent=True, target=0.95),
    Metric("total_std", "Total std", "neither"),
    # scores that tell foreign rows from those of the task: tables show their AUROC under these names
    Metric("max_probability", "Max probability", "higher", axis="1 - max probability"),
    Metric("predictive_entropy", "Predictive entropy", "higher", axis="predictive entropy (nats)"),
    Metric("mutual_information", "Mutual information", "higher", axis="mutual information (nats)"),
    Metric("epistemic_std", "Epistemic std", "higher", axis="standard deviation over the members"),
)}
