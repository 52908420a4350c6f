"""What is measured when members are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylora.spec.base import Frozen
from raylora.spec.data import SetSpec
from raylora.spec.names import NAME_PATTERN

AnswerMetric = Literal["exact_match", "f1", "contains", "number", "choice"]
Normalization = Literal["squad", "space", "none"]


class GenerationSpec(Frozen):
    """Let the ensemble and each member answer the evaluation sets, greedily, when the members are finished."""

    metrics: list[AnswerMetric] = Field(default=["exact_match"], min_length=1)
    """What answers are scored by against the rows' own; by the first one an answer is right or wrong."""
    normalize: Normalization = "squad"
    """What is alike before answers are compared: ``squad`` takes case, punctuation, articles and surplus space out
    (arXiv 1606.05250), ``space`` surplus space alone, ``none`` nothing; ``number`` and ``choice`` read answers as they
    are."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Of an answer, at most."""
    rows: int = Field(default=200, ge=1)
    """Of each set, at most; its first ones."""

    @field_validator("metrics")
    @classmethod
    def _each_metric_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a metric is given twice: give each at most once")
        return value


class EvaluationSpec(Frozen):
    """What is measured after training; the test split is always evaluated under the name ``test``."""

    in_distribution: dict[str, SetSpec] = {}
    """Further labeled sets: the same task on other text."""
    out_of_distribution: dict[str, SetSpec] = {}
    """Unlabeled sets that a sure model should not be sure about; scored by AUROC against ``test``."""
    bins: int = Field(default=15, ge=2)
    """Bins of equal width of the calibration error."""
    bootstrap_samples: int = Field(default=200, ge=0)
    """Draws behind each interval; 0 leaves the intervals out."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """The share of draws that an interval holds."""
    temperature_scaling: bool = True
    """Fit one temperature on the validation rows; results with it stand beside those without."""
    batch: int = Field(default=64, ge=1)
    """Rows per forward pass of an evaluation, those of all members together; when answers are written, too."""
    generation: GenerationSpec | None = None
    """Answers written to the sets' prompts, for tasks whose rows hold an answer; null is off."""

    @model_validator(mode="after")
    def _distinct_names(self) -> EvaluationSpec:
        names = [*self.in_distribution, *self.out_of_distribution]
        for name in names:
            if not NAME_PATTERN.match(name):
                raise ValueError(f"set name {name!r} must match {NAME_PATTERN.pattern}")
            if name in ("test", "validation", "train") or names.count(name) > 1:
                raise ValueError(f"set name {name!r} is taken")
        return self
