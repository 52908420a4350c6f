"""A group: the predictions of one ensemble-like thing over all sets, and the checks that make groups comparable."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from raylora.ensemble.predictions import Predictions
from raylora.ensemble.weights import FITTED
from raylora.errors import DataError, RayloraError
from raylora.records import (
    Description,
    Gains,
    GroupMetrics,
    MeanAndError,
    MeanMember,
    MemberMetrics,
    Summary,
    WeightedGains,
    WeightedMetrics,
)
from raylora.spec.evaluation import EvaluationSpec

Group = Sequence[Predictions]
SUBSETS = 10
"""How many subsets of each size the M-curve averages; small ensembles are enumerated completely."""


@dataclass(frozen=True)
class Settings:
    """How a summary is made."""

    evaluation: EvaluationSpec
    rule: str
    seed: int

    @property
    def samples(self) -> int:
        """Return the number of bootstrap resamples; 0 is no intervals."""
        return self.evaluation.bootstrap_samples


def one_member(group: Group, index: int) -> list[Predictions]:
    """Return the group as predicted by one of its members alone."""
    return [part.member(index) for part in group]


def baselines_of(groups: Mapping[str, Group]) -> dict[str, Group]:
    """Return what the plain mean is compared with: member 0 alone, fitted weights, and every other group."""
    return {"single": one_member(groups["ensemble"], 0), **{k: v for k, v in groups.items() if k != "ensemble"}}


def describe_contenders(
    output: str, groups: Mapping[str, Group], settings: Settings, describe: Callable[[Group, bool], Description],
    average: Callable[[Sequence[MemberMetrics]], MeanMember],
) -> Summary:
    """Return what is said of every contender: each member, the ensemble, the mean member and every baseline.

    ``describe`` takes a group and whether its numbers have intervals; a member's have none.
    """
    ensemble = groups["ensemble"]
    size = ensemble[0].members
    members = [cast(MemberMetrics, {"index": m, **describe(one_member(ensemble, m), False)}) for m in range(size)]

    def described(group: Group) -> GroupMetrics:
        return cast(GroupMetrics, {"members": group[0].members, **describe(group, True)})

    others = {name: described(group) for name, group in baselines_of(groups).items()}
    weighted = {name: cast(WeightedMetrics, others.pop(name)) for name in FITTED if name in others}
    summary: Summary = {
        "output": output,
        "aggregate": settings.rule,
        "members": members,
        "ensemble": described(ensemble),
        "mean_member": average(members),
        "baselines": others,
    }
    return {**summary, "weighted": weighted} if weighted else summary


def add_weighted_gains(
    summary: Summary, groups: Mapping[str, Group], gains: Callable[[Predictions, Group], Gains]
) -> None:
    """Say of every ensemble with fitted weights what it gains, by labeled set.

    Args:
        gains: of one set as such an ensemble predicts it, and of that ensemble.
    """
    for name, described in summary.get("weighted", {}).items():
        scored = [part for part in groups[name] if part.name in described["eval"]]
        described["gains"] = {part.name: cast(WeightedGains, gains(part, groups[name])) for part in scored}


def same_set(group: Group, part: Predictions) -> Predictions:
    """Return what a group says of the set that a part of another group is of."""
    return next(one for one in group if one.name == part.name)


def with_role(group: Group, *roles: str) -> list[Predictions]:
    """Return the group's sets that play one of the roles, in order."""
    return [part for part in group if part.role in roles]


def check_groups(groups: Mapping[str, Group]) -> None:
    """Raise DataError unless there is an ensemble and every group saw the same rows of the sets it shares with it."""
    ensemble = groups.get("ensemble")
    if not ensemble:
        raise DataError("there are no predictions of the ensemble", "pass them under the name 'ensemble'")
    if not with_role(ensemble, "test"):
        raise DataError("the ensemble has no test set", "one set must have the role 'test'")
    known = {part.name: part for part in ensemble}
    for name, group in groups.items():
        if len({part.name for part in group}) != len(group):
            raise DataError(f"group {name!r} names a set twice", "set names must be distinct")
        if len({part.members for part in group}) > 1:
            raise DataError(f"group {name!r} has sets with different numbers of members", "evaluate all on every set")
        for part in group:
            _check_same(part, known.get(part.name), name)


def _check_same(part: Predictions, reference: Predictions | None, group: str) -> None:
    if reference is None:
        raise DataError(
            f"set {part.name!r} of group {group!r} was not predicted by the ensemble", "evaluate the ensemble on it too"
        )
    if part.role != reference.role or part.output != reference.output:
        raise DataError(f"set {part.name!r} differs in role or task between {group!r} and the ensemble", "use one")
    same_labels = (part.labels_N is None) == (reference.labels_N is None) and (
        part.labels_N is None or reference.labels_N is None or torch.equal(part.labels_N, reference.labels_N)
    )
    if part.ids != reference.ids or not same_labels:
        raise DataError(
            f"set {part.name!r}: group {group!r} saw other rows than the ensemble",
            "evaluate every group on the same rows in the same order",
        )


def check_jensen(pooled: float, members: Sequence[float], metric: str, name: str) -> None:
    """Raise RayloraError if an ensemble scores worse than its mean member where convexity forbids it."""
    mean = statistics.fmean(members)
    if pooled > mean + 1e-9 * max(1.0, abs(mean)):
        raise RayloraError(
            f"set {name!r}: the ensemble's {metric} {pooled!r} exceeds its mean member's {mean!r}",
            "Jensen's inequality forbids it: this is a bug in raylora, report it",
        )


def mean_and_error(values: Sequence[float]) -> MeanAndError:
    """Return the mean and its standard error over members (None for one member, who has none)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def member_subsets(members: int, size: int, seed: int) -> list[tuple[int, ...]]:
    """Return all subsets of a size if there are at most ten, else ten distinct random ones."""
    if math.comb(members, size) <= SUBSETS:
        return list(itertools.combinations(range(members), size))
    generator = np.random.default_rng([seed, members, size])
    found: set[tuple[int, ...]] = set()
    while len(found) < SUBSETS:
        found.add(tuple(sorted(generator.choice(members, size, replace=False).tolist())))
    return sorted(found)
