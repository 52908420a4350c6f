"""What a run that was begun with one spec may become with another: more members, steps, sets or baselines.

What members have learned stays what it was. Whatever would make them other members is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylora.engine.training.answer_validation import watched_by_answers
from raylora.engine.training.member_plan import MADE_OF_MEMBER_0, MemberPlan, member_plans_of, rounds_of
from raylora.engine.training.schedule import DEFAULT_EPOCHS, learning_rate_factor, restart_steps, total_steps
from raylora.errors import RunDirectoryError
from raylora.records import DataRecord
from raylora.spec import RunSpec, diff_specs
from raylora.store.run_store import RunStore

_WHY = {
    "base": "the members were trained on that base",
    "adapter": "a member's matrices are of that kind and shape",
    "task": "that is the task that the members have learned",
    "data": "the members' rows, and those they are judged by, come from it",
    "optimization": "the steps that members have taken cannot be taken otherwise",
    "ensemble": "members that are trained began with it",
    "baselines": "a baseline that is trained is neither changed nor taken out",
    "distill_from": "a student belongs to the targets that it was taught",
}
_FREE = ("evaluation.", "ensemble.min_members", "ensemble.aggregate", "ensemble.select", "ensemble.weights",
         "baselines.single", "baselines.temperature")
"""Only the evaluation depends on these."""
_STOPPED_BY = tuple(f"evaluation.generation.{key}" for key in ("max_new_tokens", "normalize", "rows"))
"""But for members that are stopped early by their answers."""


@dataclass(frozen=True)
class Growth:
    """How a run changes."""

    changes: tuple[str, ...]
    """``key: old -> new``."""
    trains_on: bool = False
    """Every unit takes further steps."""
    other_sets: bool = False
    """Every unit is evaluated again."""


def growth_of(store: RunStore, wanted: RunSpec, rows: int) -> Growth | None:
    """Return what changes between the spec that a run was begun with and another; None if nothing does.

    Args:
        rows: training rows.

    Raises:
        RunDirectoryError: the run cannot become that; every difference that stands in the way is named, and why.
    """
    begun = store.read_spec()
    changes = diff_specs(begun, wanted)
    if not changes:
        return None
    refused = [f"{change}: {why}" for change, why in ((c, _obstacle(c, begun, wanted, rows)) for c in changes) if why]
    if refused:
        raise RunDirectoryError(
            f"{store.uri}: holds a run that cannot become this one:\n  " + "\n  ".join(refused),
            "choose another name, or delete that run",
        )
    steps = [total_steps(rows, spec.optimization) for spec in (begun, wanted)]
    sets = [(spec.evaluation.in_distribution, spec.evaluation.out_of_distribution) for spec in (begun, wanted)]
    return Growth(tuple(changes), steps[0] != steps[1], sets[0] != sets[1])


def check_data(store: RunStore, found: DataRecord, growth: Growth | None) -> None:
    """Refuse to go on with other data than a run was begun with; sets may be added and taken out for evaluation.

    Raises:
        RunDirectoryError: naming the sets.
    """
    recorded: DataRecord | None = store.read_json("data.json")
    if not recorded:
        return
    before, now = ({one["name"]: one["content_hash"] for one in record["sets"]} for record in (recorded, found))
    both = before.keys() & now.keys() if growth is not None and growth.other_sets else before.keys() | now.keys()
    other = sorted(name for name in both if before.get(name) != now.get(name))
    if other:
        raise RunDirectoryError(
            f"{store.uri}: the data has changed since the run was begun ({', '.join(other)})",
            "restore it, or start a new run",
        )


def check_final_states(store: RunStore, spec: RunSpec, finished: Sequence[str]) -> None:
    """Refuse to train on where the members' last states were not kept.

    Raises:
        RunDirectoryError: naming the members.
    """
    those = set(finished)
    gone = [plan.name for plan in member_plans_of(spec) if plan.name in those
            and not store.checkpoint_steps(plan.name)]
    if gone:
        raise RunDirectoryError(
            f"{store.uri}: cannot train on: the last states of {', '.join(gone)} were not kept, or are damaged",
            "checkpointing.keep_final: true keeps them",
        )


def clear_outgrown(store: RunStore, units: Sequence[MemberPlan], growth: Growth) -> None:
    """Delete the results of finished units that a growth makes anew; the states that they train on from stay."""
    for unit in units:
        store.storage.delete(f"predictions/{unit.name}")
        if growth.trains_on:
            store.storage.delete(unit.folder)
    if units:
        for name in MADE_OF_MEMBER_0:
            store.storage.delete(f"predictions/{name}")


def _obstacle(change: str, begun: RunSpec, wanted: RunSpec, rows: int) -> str:
    """Return why a run cannot change in this way, or nothing if it can."""
    key = change.partition(": ")[0]
    if key in _STOPPED_BY and watched_by_answers(member_plans_of(begun)):
        return "members were stopped early by what they answered under it"
    if key.startswith(_FREE):
        return ""
    if key.startswith(("ensemble.members", "ensemble.seed")):
        return _other_members(begun.ensemble.member_seeds(), wanted.ensemble.member_seeds())
    if key in ("optimization.epochs", "optimization.steps") or key.startswith("optimization.restarts"):
        return _other_steps(begun, wanted, rows)
    if key == "baselines.last_layer" and wanted.baselines.last_layer > begun.baselines.last_layer:
        return ""
    if key.startswith("baselines.mc_dropout") and begun.baselines.mc_dropout is None:
        return ""
    if key == "baselines.checkpoints" and wanted.baselines.checkpoints > begun.baselines.checkpoints:
        return "the ends of those epochs were not kept when member 0 was trained"
    if key.startswith("baselines.swag") and begun.baselines.swag is None:
        return "the moments of member 0's weights were not kept when it was trained"
    if key.startswith("baselines.laplace") and begun.baselines.laplace is None:
        return "it is made of member 0 when that is predicted with, which has been done"
    section = key.partition(".")[0]
    return _WHY.get(section, "it is part of what the run computes")


def _other_members(begun: Sequence[int], wanted: Sequence[int]) -> str:
    if list(wanted[: len(begun)]) == list(begun):
        return ""
    return "members can be added, not taken out or given another seed"


def _other_steps(begun: RunSpec, wanted: RunSpec, rows: int) -> str:
    """Return why members cannot take further steps: those they have taken must be the first of the longer training."""
    before, after = (total_steps(rows, spec.optimization) for spec in (begun, wanted))
    if after < before:
        return f"the members have taken {before} steps"
    if after > before and begun.ensemble.places is not None:
        return "members began one after another, where others had left; more steps would have made others wait"
    if after > before and any(rounds_of(plan) > 1 for plan in member_plans_of(begun)):
        return "members train in rounds, which are equal parts of the whole training"
    if wanted.baselines.checkpoints and after > before:
        return "the checkpoints baseline is made of the last epochs, which would no longer be the last"
    if wanted.baselines.swag is not None and after > before:
        return "the swag baseline is made of the last steps, which would no longer be the last"
    rates = [
        [learning_rate_factor(spec.optimization, step, total, restart_steps(rows, spec.optimization))
         for step in range(before)]
        for spec, total in ((begun, before), (wanted, after))
    ]
    if rates[0] == rates[1]:
        return ""
    step = next(n for n, pair in enumerate(zip(*rates, strict=True)) if pair[0] != pair[1])
    at = [*begun.optimization.restarts, begun.optimization.steps or begun.optimization.epochs or DEFAULT_EPOCHS]
    restarts = ", ".join(f"{one:g}" for one in at)
    return (
        f"the learning rate of step {step + 1} would have been another ({rates[0][step]:.3g} of the peak, not "
        f"{rates[1][step]:.3g}); optimization.restarts: [{restarts}] starts the schedule anew where training ended"
    )
