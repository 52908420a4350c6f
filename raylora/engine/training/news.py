"""What is told of members at the ends of their epochs, in words."""

from __future__ import annotations

from collections.abc import Mapping

from raylora.engine.training.member_state import MemberState
from raylora.ensemble.metric_table import METRICS
from raylora.spec.members import PruningSpec


def news_of(
    state: MemberState, values: Mapping[str, float], epoch: int, epochs: int, pruning: PruningSpec | None
) -> list[str]:
    """Return what came of a member's validation, and whether that ended it."""
    name = state.plan.name
    shown = ", ".join(f"{METRICS[key].label} {value:.4g}" for key, value in values.items())
    told = [f"{name} epoch {epoch} of {epochs}: validation {shown}"]
    rule = state.plan.regularizers.early_stopping
    if pruning is not None and state.stopped_at is not None:
        label = METRICS[pruning.metric].label
        told.append(f"{name} is behind by its validation {label} and trains no further than step {state.stopped_at}")
    if rule is not None and state.stopped_at is not None:
        times = "once" if rule.patience == 1 else f"in {rule.patience} epochs"
        told.append(
            f"{name} stopped early at step {state.stopped_at}: validation {METRICS[rule.metric].label} did not get "
            f"better {times}; its best, {state.best_value:.4g}, is kept"
        )
    return told
