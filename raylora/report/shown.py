"""What a report shows of each kind of run: which metrics, in which table, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shown:
    """The metrics of one kind of run by where they are shown; an empty tuple leaves the place out."""

    compared: tuple[str, ...]
    """In the main table, on the terminal, and of teacher and student."""
    apart: tuple[str, ...]
    """In a second table of the same rows."""
    members: tuple[str, ...]
    shifted: tuple[str, ...]
    curve: tuple[str, ...]
    told: tuple[str, ...]
    """In the headline, the most important first."""
    detection: tuple[str, ...] = ()
    """Scores that tell foreign inputs from those of the task."""
    detected_by: str = ""
    """The one among them that is quoted: picking the best afterwards would flatter."""
    kept: tuple[str, ...] = ()
    """Those that a student is compared by: what its teacher was sure of, and what it disagreed about."""


_KINDS = {
    "classification": Shown(
        compared=("accuracy", "nll", "brier", "ece"),
        apart=("adaptive_ece", "aurc"),
        members=("accuracy", "nll", "ece", "aurc"),
        shifted=("accuracy", "nll", "ece"),
        curve=("nll", "accuracy", "brier", "ece"),
        told=("nll", "accuracy", "ece", "brier"),
        detection=("max_probability", "predictive_entropy", "mutual_information"),
        detected_by="predictive_entropy",
        kept=("predictive_entropy", "mutual_information"),
    ),
    "language_modeling": Shown(
        compared=("nll", "perplexity"),
        apart=(),
        members=("nll", "perplexity"),
        shifted=("nll",),
        curve=("nll",),
        told=("nll",),
    ),
    "regression": Shown(
        compared=("pearson", "spearman", "rmse", "nll", "coverage_95"),
        apart=("mae", "r2", "total_std"),
        members=("pearson", "rmse", "nll", "coverage_95"),
        shifted=("pearson", "rmse", "nll", "coverage_95"),
        curve=("rmse", "nll"),
        told=("rmse", "nll", "pearson"),
        detection=("epistemic_std",),
        detected_by="epistemic_std",
        kept=("epistemic_std",),
    ),
}


def shown(metrics: dict[str, Any]) -> Shown:
    """Return what is shown of a run's metrics."""
    return _KINDS[kind_of(metrics)]


def kind_of(metrics: dict[str, Any]) -> str:
    """Return a run's kind; numbers that do not say are those of a classifier."""
    kind = metrics.get("kind")
    return kind if kind in _KINDS else "classification"


def shown_of_scores(scores: dict[str, Any]) -> Shown:
    """Return what is shown of one set's ``eval``, whose metrics tell which kind of run it belongs to."""
    kind = "language_modeling" if "perplexity" in scores else "regression" if "rmse" in scores else "classification"
    return _KINDS[kind]
