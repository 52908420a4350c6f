"""Members that wait for the places of others: who leaves a bracket, and what stays of them.

A bracket has a number of places. A member that is pruned, that fails or that has taken all its steps gives its place to
the next that waits, at an epoch's end: so the members of a pack are in different epochs, each at the same place of its
own. Whoever reaches a rung is compared with all of the bracket that have reached it by then (asynchronous successive
halving, Li et al., arXiv 1810.05934, in its form in which nobody is asked twice).

Time is counted in steps of the pack and in nothing else, so that it does not matter who is fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylora.adapters.base import Tensors, WholeModel
from raylora.adapters.side_by_side import adapter_of
from raylora.engine.training.member_plan import MemberPlan, PlanRole, member_plans_of, unpackable_reason
from raylora.engine.training.member_state import MemberState, SavedState
from raylora.engine.training.schedule import micro_batches_per_epoch
from raylora.engine.training.weight_moments import WeightMoments
from raylora.ensemble.metric_table import METRICS
from raylora.errors import SpecError
from raylora.records import HistoryRow
from raylora.spec import RunSpec
from raylora.spec.members import PruningSpec

VALIDATION = "validation_"
"""What the names of validation metrics begin with in a history."""


@dataclass(frozen=True)
class Ended:
    """A member that takes no further step: what it has become, without what it took to train it."""

    plan: MemberPlan
    tensors: Tensors
    """On CPU; nothing of a member that failed."""
    steps: int
    """Its own, from when it began."""
    committed_at: int
    """The step of the pack at which it left."""
    history: list[HistoryRow]
    stopped_at: int | None
    begun_at: int = 0
    failure: str = ""
    moments: WeightMoments = field(default_factory=WeightMoments)
    trained_parameters: int = 0
    frozen_tensors: Tensors | None = None
    """None where they are to be made again: those of many members would fill the memory."""

    @classmethod
    def of(cls, state: MemberState, step: int, keeps_frozen: bool = False) -> Ended:
        """Return what stays of a member after a step of its pack."""
        return cls(
            state.plan, {} if state.failure else state.result(), step - state.begun_at, step, state.history,
            state.stopped_at, state.begun_at, state.failure, state.moments, state.optimizer.size,
            state.frozen_tensors if keeps_frozen else None,
        )

    @classmethod
    def restored(cls, plan: MemberPlan, saved: SavedState) -> Ended:
        """Return what was committed of a member when it left."""
        sections, facts = saved
        return cls(
            plan, sections.get("member", {}), facts["step"] - facts["begun_at"], facts["step"],
            facts.get("history", []), facts.get("stopped_at"), facts["begun_at"], facts.get("failure", ""),
        )


def has_left(saved: SavedState) -> bool:
    """Return whether a commit is a member's last in its bracket."""
    return bool(saved[1].get("left"))


def begin_order(plans: Sequence[MemberPlan]) -> list[MemberPlan]:
    """Return members in the order in which they get a place: as the run counts them, whatever adapters they have."""
    return sorted(plans, key=lambda plan: (len(plan.name), plan.name))


def behind(
    rule: PruningSpec, judged: Sequence[tuple[MemberState, int]], everyone: Sequence[MemberState | Ended]
) -> set[str]:
    """Return those of members at a rung who are not among the share that goes on; of equal ones the first does.

    Args:
        judged: members and their own steps, what they score now being in their histories.
        everyone: of their bracket, they too: who has reached the same rung before counts with what it scored there.
    """
    found: set[str] = set()
    members = {one.plan.name: one for one in everyone if one.plan.role is PlanRole.MEMBER and not one.failure}
    plans = begin_order([one.plan for one in members.values()])
    for step in {step for _, step in judged}:
        costs = [(_cost(members[plan.name].history, step, rule.metric), plan.name) for plan in plans]
        best = sorted(((cost, name) for cost, name in costs if cost is not None), key=lambda one: one[0])
        going_on = {name for _, name in best[: math.ceil(rule.keep * len(best))]}
        found |= {state.plan.name for state, at in judged if at == step and state.plan.name in members} - going_on
    return found


def _cost(history: Sequence[HistoryRow], step: int, metric: str) -> float | None:
    """Return what a member scored after a step of its own, the less the better; None if it was not there."""
    key = f"{VALIDATION}{metric}"
    rows: Sequence[Mapping[str, Any]] = history
    row = next((row for row in reversed(rows) if row["step"] == step and key in row), None)
    if row is None:
        return None
    cost = METRICS[metric].cost(row[key])
    return math.inf if cost is None or math.isnan(cost) else cost


def check_places(spec: RunSpec, rows: int) -> None:
    """Refuse places where members of different epochs cannot share a forward. Raises: SpecError."""
    if spec.ensemble.places is None:
        return
    plans, key = member_plans_of(spec), "ensemble.pruning.places"
    micro_batches, accumulation = micro_batches_per_epoch(rows, spec.optimization), spec.optimization.accumulation
    alone = next(filter(None, map(unpackable_reason, plans)), "")
    if alone or any(isinstance(adapter_of(plan.adapter), WholeModel) for plan in plans):
        raise SpecError(f"{key}: {alone or 'whole models do not share a forward'}", "leave it out")
    if micro_batches % accumulation:
        raise SpecError(
            f"{key}: members begin at the ends of epochs, and {micro_batches} micro-batches are no whole number of "
            f"steps of {accumulation}", "use optimization.accumulation: 1, or one that divides them",
        )
    if spec.distill_from is not None:
        raise SpecError(f"{key}: what a student is taught depends on how far it is, which is the same for all",
                        "leave it out")
    if spec.placement.data_parallel > 1 or spec.placement.strategy == "shard":
        raise SpecError(f"{key}: one worker has all of a bracket", "use placement.data_parallel: 1 and "
                        "placement.strategy: replicate")
    if spec.baselines.swag is not None or spec.baselines.checkpoints:
        raise SpecError("baselines: swag and checkpoints need a member 0 that trains to the end, and "
                        f"{key} gives places of members that are behind to others", "leave them out")
