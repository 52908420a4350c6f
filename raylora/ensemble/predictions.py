"""One data set's predictions by every member, checked once so that no metric has to doubt them.

Shapes: M members (or stochastic passes, heads, checkpoints), N rows or tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from raylora.errors import DataError

Role = Literal["validation", "test", "in_distribution", "out_of_distribution"]
ROLES: tuple[str, ...] = ("validation", "test", "in_distribution", "out_of_distribution")

P = TypeVar("P", bound="Predictions")


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of M members for one set; each output has its own class of them.

    Raises DataError, naming the set, for empty or non-finite predictions, labels out of range and mismatched lengths.
    """

    output: ClassVar[str] = ""
    """The registered name of the output that these are predictions of."""
    dimensions: ClassVar[int] = 2

    name: str
    role: Role
    ids: list[str]
    """One per row; where a row is answered token by token, one per token, repeated for the tokens of a document."""
    values: Tensor
    """M x N x C logits or M x N numbers: what each member says of each row (or token)."""
    labels_N: Tensor | None = None
    expected_entropy_MN: Tensor | None = None
    """For members that are themselves distributions over classifiers (a Dirichlet, several heads): the entropy that
    each expects of one of its classifiers. None for ordinary members, for whom it is the entropy of their softmax."""

    weights_M: Tensor | None = None
    """What each member weighs, float64, positive and one in all; None where all weigh alike."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise self._error(f"unknown role {self.role!r}", f"known: {', '.join(ROLES)}")
        self._check_values()
        self.check()
        if len(self.ids) != self.rows:
            raise self._error(f"{len(self.ids)} ids for {self.rows} predictions", "give one id per row (or token)")
        if self.expected_entropy_MN is not None and self.expected_entropy_MN.shape != self.values.shape[:2]:
            raise self._error(
                f"expected entropies of shape {tuple(self.expected_entropy_MN.shape)}", "give one per member and row"
            )

        if self.weights_M is not None:
            check_weights(self.weights_M, self.members, self.name)

    def check(self) -> None:
        """Refuse what this output cannot be. Raises: DataError."""

    @property
    def members(self) -> int:
        """Return M."""
        return self.values.shape[0]

    @property
    def rows(self) -> int:
        """Return N."""
        return self.values.shape[1]

    def member(self: P, index: int) -> P:
        """Return the same set as predicted by one member alone (M = 1)."""
        expected = self.expected_entropy_MN
        return replace(
            self, values=self.values[index : index + 1], weights_M=None,
            expected_entropy_MN=None if expected is None else expected[index : index + 1],
        )

    def weighted(self: P, members: Sequence[int], weights_M: Tensor | None) -> P:
        """Return the same set as predicted by some of the members, with these weights."""
        expected, chosen = self.expected_entropy_MN, list(members)
        return replace(
            self, values=self.values[chosen], weights_M=weights_M,
            expected_entropy_MN=None if expected is None else expected[chosen],
        )

    def labels(self) -> Tensor:
        """Return the labels, N, or raise DataError where the set has none."""
        if self.labels_N is None:
            raise self._error("has no labels", "only out-of-distribution sets may be unlabeled")
        return self.labels_N

    def _check_values(self) -> None:
        if self.values.dim() != self.dimensions:
            raise self._error(
                f"predictions of shape {tuple(self.values.shape)}", f"expected {self.dimensions} dimensions"
            )
        if self.values.numel() == 0:
            raise self._error("is empty", "a metric of no rows means nothing: check the data and its filters")
        bad_M = ~torch.isfinite(self.values).flatten(1).all(dim=1)
        if bad_M.any():
            members = bad_M.nonzero().flatten().tolist()
            raise self._error(f"members {members} predict NaN or infinity", "look at their training curves")

    def _error(self, what: str, hint: str) -> DataError:
        return DataError(f"set {self.name!r}: {what}", hint)


def check_weights(weights_M: Tensor, members: int, name: str) -> None:
    """Raise DataError unless these are positive weights of so many members, float64 and one in all."""
    is_sound = weights_M.shape == (members,) and weights_M.dtype == torch.float64 and bool((weights_M > 0).all())
    if not is_sound or abs(float(weights_M.sum()) - 1) > 1e-9:
        raise DataError(
            f"set {name!r}: {weights_M.tolist()} are no weights of {members} members", "they are positive, one in all"
        )


def check_labels(labels_N: Tensor, rows: int, classes: int, name: str) -> None:
    """Raise DataError unless there are ``rows`` integer labels in [0, classes)."""
    check_one_each(labels_N, rows, name)
    if labels_N.is_floating_point():
        raise DataError(f"set {name!r}: labels are floating point", "give integer class indices")
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"set {name!r}: labels range over {low}..{high}, but there are {classes} classes",
            f"labels must lie in 0..{classes - 1}",
        )


def check_one_each(labels_N: Tensor, rows: int, name: str) -> None:
    """Raise DataError unless there is one label per row."""
    if labels_N.shape != (rows,):
        raise DataError(f"set {name!r}: labels of shape {tuple(labels_N.shape)} for {rows} rows", "one label per row")
