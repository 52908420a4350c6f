"""One data set's predictions by every member, checked once so that no metric has to doubt them.

Shapes: M members (or stochastic passes, heads, checkpoints), N rows or tokens, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raylora.errors import DataError

Role = Literal["validation", "test", "in_distribution", "out_of_distribution"]
ROLES: tuple[str, ...] = ("validation", "test", "in_distribution", "out_of_distribution")
FIELDS: tuple[str, ...] = ("logits_MNC", "token_logprobs_MN", "real_MN")
"""What a member can say of a row: classes, a text's own tokens, or a value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of M members for one set; exactly one of the three ``FIELDS`` is given.

    Raises DataError, naming the set, for empty or non-finite predictions, labels out of range and mismatched lengths.
    """

    name: str
    role: Role
    ids: list[str]
    """One per row; for language modeling one per token, repeated for the tokens of one document."""
    logits_MNC: Tensor | None = None
    labels_N: Tensor | None = None
    token_logprobs_MN: Tensor | None = None
    """The log-probability that each member gives to each target token."""
    real_MN: Tensor | None = None
    """The value that each member of a regression gives to each row."""
    expected_entropy_MN: Tensor | None = None
    """For members that are themselves distributions over classifiers (a Dirichlet, several heads): the entropy that
    each expects of one of its classifiers. None for ordinary members, for whom it is the entropy of their softmax."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise self._error(f"unknown role {self.role!r}", f"known: {', '.join(ROLES)}")
        given = [name for name in FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise self._error(
                "has to have either logits, token log-probabilities or real values", "give exactly one of them"
            )
        self._check_values()
        if len(self.ids) != self.rows:
            raise self._error(f"{len(self.ids)} ids for {self.rows} predictions", "give one id per row (or token)")
        if self.expected_entropy_MN is not None and self.expected_entropy_MN.shape != self.values.shape[:2]:
            raise self._error(
                f"expected entropies of shape {tuple(self.expected_entropy_MN.shape)}", "give one per member and row"
            )
        if self.labels_N is not None and self.logits_MNC is not None:
            check_labels(self.labels_N, self.rows, self.logits_MNC.shape[2], self.name)
        if self.labels_N is not None and self.real_MN is not None:
            check_values(self.labels_N, self.rows, self.name)

    @property
    def field(self) -> str:
        """Return which of ``FIELDS`` is given."""
        return next(name for name in FIELDS if getattr(self, name) is not None)

    @property
    def values(self) -> Tensor:
        """Return the predictions, M x N x C or M x N."""
        values: Tensor = getattr(self, self.field)
        return values

    @property
    def members(self) -> int:
        """Return M."""
        return self.values.shape[0]

    @property
    def rows(self) -> int:
        """Return N."""
        return self.values.shape[1]

    @property
    def is_real(self) -> bool:
        """Return whether these are the values of a regression."""
        return self.real_MN is not None

    @property
    def is_language(self) -> bool:
        """Return whether these are token log-probabilities."""
        return self.token_logprobs_MN is not None

    def member(self, index: int) -> Predictions:
        """Return the same set as predicted by one member alone (M = 1)."""
        expected = self.expected_entropy_MN
        changes: dict[str, Tensor | None] = {
            self.field: self.values[index : index + 1],
            "expected_entropy_MN": None if expected is None else expected[index : index + 1],
        }
        return replace(self, **changes)  # type: ignore[arg-type]

    def logits(self) -> Tensor:
        """Return the logits, M x N x C, or raise DataError where there are only token log-probabilities."""
        if self.logits_MNC is None:
            raise self._error("has no logits", f"it has {self.field}, which is summarized in another way")
        return self.logits_MNC

    def labels(self) -> Tensor:
        """Return the labels, N, or raise DataError where the set has none."""
        if self.labels_N is None:
            raise self._error("has no labels", "only out-of-distribution sets may be unlabeled")
        return self.labels_N

    def _check_values(self) -> None:
        dimensions = 3 if self.logits_MNC is not None else 2
        if self.values.dim() != dimensions:
            raise self._error(f"predictions of shape {tuple(self.values.shape)}", f"expected {dimensions} dimensions")
        if self.values.numel() == 0:
            raise self._error("is empty", "a metric of no rows means nothing: check the data and its filters")
        if self.logits_MNC is not None and self.logits_MNC.shape[2] < 2:
            raise self._error("has one class only", "a classifier needs at least two classes")
        bad = ~torch.isfinite(self.values).all(dim=-1)
        bad = bad.any(dim=1) if dimensions == 3 else bad
        if bad.any():
            members = bad.nonzero().flatten().tolist()
            raise self._error(f"members {members} predict NaN or infinity", "look at their training curves")
        # Log-probabilities come from reduced precision, where a certain token may round to just above zero.
        if self.token_logprobs_MN is not None and float(self.token_logprobs_MN.max()) > 1e-3:
            raise self._error("token log-probabilities above zero", "give log-probabilities, not losses or logits")

    def _error(self, what: str, hint: str) -> DataError:
        return DataError(f"set {self.name!r}: {what}", hint)


def check_labels(labels_N: Tensor, rows: int, classes: int, name: str) -> None:
    """Raise DataError unless there are ``rows`` integer labels in [0, classes)."""
    _check_one_each(labels_N, rows, name)
    if labels_N.is_floating_point():
        raise DataError(f"set {name!r}: labels are floating point", "give integer class indices")
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"set {name!r}: labels range over {low}..{high}, but there are {classes} classes",
            f"labels must lie in 0..{classes - 1}",
        )


def check_values(labels_N: Tensor, rows: int, name: str) -> None:
    """Raise DataError unless there are ``rows`` finite real labels."""
    _check_one_each(labels_N, rows, name)
    if not labels_N.is_floating_point():
        raise DataError(f"set {name!r}: labels are {labels_N.dtype}, not real values", "give floating-point labels")
    if not bool(torch.isfinite(labels_N).all()):
        raise DataError(f"set {name!r}: labels are NaN or infinite", "leave out the rows that have no label")


def _check_one_each(labels_N: Tensor, rows: int, name: str) -> None:
    if labels_N.shape != (rows,):
        raise DataError(f"set {name!r}: labels of shape {tuple(labels_N.shape)} for {rows} rows", "one label per row")
