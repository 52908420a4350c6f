"""The ensemble's weights over its members: equal ones, or those that the validation rows ask for.

Whoever forms a mixture takes ``weights_M``: positive float64 numbers that sum to one, or None for the plain mean of
all that are there. A member without weight is not among those that are mixed, so it need not be asked.

Shapes: M members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raylora.ensemble.greedy import Step, select_greedily
from raylora.ensemble.objectives import Objective
from raylora.ensemble.stacking import stack_weights
from raylora.records import WeightedMetrics
from raylora.spec import EnsembleSpec

SELECTED, STACKED = "selected", "stacked"
FITTED = (SELECTED, STACKED)
"""What ensembles with fitted weights are called, beside the plain mean's ``ensemble``."""


@dataclass(frozen=True)
class MemberWeights:
    """What each of some members weighs."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    """Positive, one in all."""

    @property
    def mixed(self) -> tuple[float, ...] | None:
        """The weights as they are mixed with; None where all are equal, which is the plain mean of these members."""
        return None if len(set(self.weights)) == 1 else self.weights

    @property
    def weights_M(self) -> Tensor | None:
        """:attr:`mixed` as a tensor."""
        return None if self.mixed is None else torch.tensor(self.mixed, dtype=torch.float64)

    def record(self) -> dict[str, float]:
        """Return each member's weight by name."""
        return dict(zip(self.names, self.weights, strict=True))


@dataclass(frozen=True)
class FittedWeights:
    """Weights that were fitted on validation rows, and how."""

    name: str
    """``selected`` or ``stacked``."""
    weights: MemberWeights
    nll: float
    """Of the weighted mixture on the validation rows."""
    steps: tuple[Step, ...] = ()
    """Of a selection: whom each step added, and the NLL with it."""
    gap: float | None = None
    """Of stacked weights: by how much their NLL may at most exceed the least there is, in nats per row."""

    def record(self) -> WeightedMetrics:
        """Return what ``metrics.json`` says of it, beside what it predicts."""
        found: WeightedMetrics = {"weights": self.weights.record(), "validation_nll": self.nll}
        if self.name == SELECTED:
            found["steps"] = [{"member": one.member, "validation_nll": one.nll} for one in self.steps]
        if self.gap is not None:
            found["gap"] = self.gap
        return found


def equal_weights(names: Sequence[str]) -> MemberWeights:
    """Return the plain mean of these members."""
    return MemberWeights(tuple(names), (1 / len(names),) * len(names))


def fit_weights(objective: Objective, names: Sequence[str], spec: EnsembleSpec) -> list[FittedWeights]:
    """Return the weights that a spec asks for, the ones to speak with last; none where it asks for the plain mean.

    Args:
        objective: the members' likelihoods of the validation rows, in the order of ``names``.
    """
    found: list[FittedWeights] = []
    chosen = list(range(len(names)))
    if spec.select is not None:
        steps = select_greedily(objective, spec.select.size)
        count_of = {m: sum(one.index == m for one in steps) for m in chosen}
        chosen = [m for m in chosen if count_of[m]]
        weights = tuple(count_of[m] / len(steps) for m in chosen)
        said = tuple(replace(one, member=names[one.index]) for one in steps)
        found.append(FittedWeights(SELECTED, MemberWeights(_of(names, chosen), weights), steps[-1].nll, said))
    if spec.weights == "stacked":
        stacked = stack_weights(objective.of(chosen))
        positive = [(names[m], float(w)) for m, w in zip(chosen, stacked.weights_M.tolist(), strict=True) if w > 0]
        kept = MemberWeights(tuple(name for name, _ in positive), tuple(w for _, w in positive))
        found.append(FittedWeights(STACKED, kept, stacked.nll, gap=stacked.gap))
    return found


def _of(names: Sequence[str], chosen: Sequence[int]) -> tuple[str, ...]:
    return tuple(names[m] for m in chosen)
