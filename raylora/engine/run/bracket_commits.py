"""From where a bracket goes on: members leave it one after another, so that no step is common to all."""

from __future__ import annotations

from collections.abc import Sequence

from raylora.engine.model import serialization
from raylora.engine.model.base import Base
from raylora.engine.run.evaluation import read_trained
from raylora.engine.training.bracket import has_left
from raylora.engine.training.member_plan import MemberPlan
from raylora.engine.training.member_state import SavedState
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


def saved_bracket(
    spec: RunSpec, store: RunStore, base: Base, plans: Sequence[MemberPlan]
) -> dict[str, SavedState] | None:
    """Return the newest state of a bracket of which nothing is missing, or None to begin.

    A commit of a member says who has begun by then. Of each of them there is a commit of the same step, or its last
    one, or it is finished. Members are finished when all have left, so whoever is finished has begun, too.

    Raises:
        StoreError: a finished member is damaged.
    """
    of_name = {plan.name: plan for plan in plans}
    steps = {name: store.checkpoint_steps(name) for name in of_name}
    finished = {name for name, plan in of_name.items() if store.has_result(plan.folder)}
    for step in sorted({step for own in steps.values() for step in own}, reverse=True):
        one = next(name for name, own in steps.items() if step in own)
        begun: dict[str, int] = _read(store, one, step)[1]["begun"]
        found: dict[str, SavedState] = {}
        for name in begun:
            if name in finished:
                continue
            last = max((own for own in steps[name] if own <= step), default=None)
            saved = None if last is None else _read(store, name, last)
            if saved is None or (last != step and not has_left(saved)):
                break
            found[name] = saved
        else:
            return found | {name: _finished(spec, store, base, of_name[name]) for name in sorted(finished)}
    return None


def _read(store: RunStore, name: str, step: int) -> SavedState:
    return serialization.unpack_state(store.load_checkpoint(name, step).files)


def _finished(spec: RunSpec, store: RunStore, base: Base, plan: MemberPlan) -> SavedState:
    one = read_trained(spec, store, base, plan)
    facts = {
        "step": one.steps, "begun_at": 0, "left": True, "history": one.history, "stopped_at": one.stopped_at,
    }
    return {"member": dict(one.tensors)}, facts
