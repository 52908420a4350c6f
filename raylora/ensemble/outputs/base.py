"""The seam between what members predict and everything that is said of it: predictions, scores, summary, records.

A task declares its output by name. Whoever trains, evaluates, aggregates, distills or serves asks the output, so that
nobody else needs to know whether a row's answer is a class, a value or its own next tokens.

Shapes: M members, N rows or target tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from raylora.ensemble.groups import Group, Settings
from raylora.ensemble.objectives import Objective
from raylora.ensemble.predictions import Predictions
from raylora.errors import SpecError
from raylora.records import GroupMetrics, SetErrors, Summary
from raylora.spec import EvaluationSpec


class Record(Protocol):
    """What an ensemble says about one row, for programs (``record``) and for a terminal's table (``cells``)."""

    heads: ClassVar[tuple[str, ...]]
    """The columns of a table of such records."""

    @property
    def id(self) -> str:
        """The row's id."""

    def record(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""

    def cells(self) -> tuple[str, ...]:
        """Return what stands under the heads."""

    def caption(self) -> str:
        """Return what a reader of the table must know of its numbers."""


@dataclass(frozen=True)
class Contributors:
    """How many members speak, of how many that their run asks for."""

    members: int
    members_asked: int
    weights: Mapping[str, float] | None = None
    """What each of them weighs, by name, where the validation rows decided who speaks."""

    def record(self) -> dict[str, Any]:
        """Return it as a part of a record."""
        found: dict[str, Any] = {"members": self.members, "members_asked": self.members_asked}
        return found if self.weights is None else {**found, "weights": dict(self.weights)}

    def caption(self) -> str:
        """Return it in words where not all of them speak, or not alike, else nothing."""
        if self.weights is not None:
            return f"{self.members} of {self.members_asked} members, as the validation split weighs them"
        return f"{self.members} of {self.members_asked} members" if self.members < self.members_asked else ""


@dataclass(frozen=True)
class Rows:
    """The rows that are described to a user, and what of their run is needed for it."""

    ids: Sequence[str]
    truncated: Sequence[bool]
    label_names: Sequence[str]
    rule: str
    described: GroupMetrics
    """What the run's summary says of these members together, such as their noise; empty where it says nothing."""
    contributors: Contributors
    calibrated: bool = True
    """Whether the fitted temperature is applied, where there is one that can be trusted."""
    weights_M: Tensor | None = None
    """What each member weighs; None where all weigh alike."""

    @property
    def temperature(self) -> float | None:
        """The temperature to apply; None where none was fitted, where the fit told nothing, or where none is wanted."""
        fit = self.described.get("temperature_fit")
        if not self.calibrated or fit is None or fit["degenerate"]:
            return None
        return self.described["temperature"]


@dataclass(frozen=True)
class Names:
    """What people call the classes and the rows of a run's sets."""

    labels: Sequence[str] = ()
    """One per class; without any, classes are called by their indices."""
    text_of: Callable[[str, str], str] = lambda set_name, row_id: ""
    """From a set and a row's id to what stands in the row, shortened; nothing where that is not known."""

    def label(self, index: int) -> str:
        """Return what a class is called."""
        return self.labels[index] if self.labels else str(index)


class Output(Protocol):
    """A kind of prediction."""

    name: str
    predictions: type[Predictions]
    per_token: bool
    """Whether a row is answered at every target token, by its own text, and not once by a label."""
    rules: tuple[str, ...]
    """The rules that can aggregate it."""
    validation: tuple[str, ...]
    """The metrics of :meth:`validation_metrics`: what early stopping may watch."""
    retained: str | None
    """The metric of which a student is said to retain a share of its teacher's; None where a share means nothing."""
    is_distribution: bool
    """Whether a model's answer is a distribution that a KL divergence can compare with the base's."""
    unpredictable_reason: str
    """Why a loaded ensemble does not answer new rows, or nothing if it does."""

    def start_value(self, labels: Sequence[float]) -> float:
        """Return what a fresh head says before it has learned anything."""

    def validation_metrics(self, predictions: Predictions, evaluation: EvaluationSpec) -> list[dict[str, float]]:
        """Return each member's metrics on the validation split."""

    def objective(self, validation: Predictions, rule: str) -> Objective:
        """Return the NLL of validation rows as a function of the members' weights. Raises: DataError without labels."""

    def summarize(self, groups: Mapping[str, Group], settings: Settings) -> Summary:
        """Return the summary of a run, described in docs/metrics.md. Raises: DataError."""

    def errors(self, ensemble: Group, settings: Settings, names: Names) -> dict[str, SetErrors]:
        """Return, by labeled set, where the ensemble errs; nothing for an output whose rows have no right answer."""

    def records(self, values: Tensor, expected_entropy_MN: Tensor | None, rows: Rows) -> list[Record]:
        """Return what the members say about new rows together."""


def check_rule(output: Output, rule: str) -> None:
    """Refuse a rule that means nothing for an output. Raises: SpecError."""
    if rule not in output.rules:
        raise SpecError(
            f"ensemble.aggregate: {rule} cannot aggregate predictions of {output.name}",
            f"use {' or '.join(output.rules)}",
        )
