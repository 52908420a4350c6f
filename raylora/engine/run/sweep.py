"""A sweep: one run whose members differ in settings, and what the validation rows say of each of them.

The test rows are not looked at: whoever picks by them has nothing left to report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ValidationError

from raylora.data.task import Task
from raylora.engine.model import serialization
from raylora.engine.run.finished_members import member_facts
from raylora.engine.run.roster import read_roster
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.member_plan import member_plans_of
from raylora.ensemble.metric_table import METRICS
from raylora.ensemble.outputs import output_of
from raylora.ensemble.predictions import Predictions
from raylora.ensemble.summary import summarize
from raylora.errors import SpecError
from raylora.spec import RunSpec
from raylora.spec.base import said_by
from raylora.spec.members import PruningSpec
from raylora.spec.vary import RangeSpec, combinations
from raylora.store.run_store import RunStore

FACTS = "sweep.json"
_SUFFIX = "-sweep"


@dataclass(frozen=True)
class Ranked:
    """What was tried once or several times, and what came of it."""

    settings: Mapping[str, Any]
    members: list[str]
    value: float
    """The metric on the validation rows, the mean of the members."""
    interval: list[float] | None
    """Over draws of the validation rows, where one member tried it."""
    standard_error: float | None
    """Over members, where several did."""
    left_at: int | None = None
    """The step after which it was pruned; those that trained to the end are ahead of it, whatever their metric."""

    def record(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def sweep_spec(
    spec: RunSpec, vary: dict[str, list[Any] | RangeSpec] | None = None, repeats: int = 1, samples: int = 8,
    pruning: PruningSpec | None = None,
) -> RunSpec:
    """Return the run that tries what a spec's members differ in, or what is given in its place.

    It measures the validation rows and the test set alone: no baselines, no foreign sets, no answers, no student.

    Args:
        repeats: members, each of another seed, for every combination of values.
        samples: members where a range is drawn from and no list says how many there are.
        pruning: end at epoch ends what is behind, in place of the spec's own rule.

    Raises:
        SpecError: nothing differs, or the values make no sense.
    """
    if vary is None and spec.ensemble.vary is None:
        raise SpecError("ensemble.vary: a sweep needs something to try",
                        "give it, or --vary optimization.lr=1e-4,3e-4,1e-3")
    content = spec.members_alone()
    if pruning is not None:
        if repeats > 1:
            raise SpecError("--keep: a setting is pruned as a whole, and --repeats trains it several times", "use one")
        content["ensemble"]["pruning"] = pruning.model_dump()
    if vary is not None:
        plain = {key: own.model_dump() if isinstance(own, RangeSpec) else own for key, own in vary.items()}
        drawn = any(isinstance(own, RangeSpec) for own in vary.values())
        members = max(combinations(vary), samples if drawn else 1) * repeats
        content["ensemble"] |= {"vary": plain, "members": members, "seeds": None, "min_members": None}
    content["name"] = f"{spec.run_name()[: 40 - len(_SUFFIX)].rstrip('-')}{_SUFFIX}"
    try:
        return RunSpec.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"the sweep is not a valid run: {said_by(error)}") from None


def check_metric(spec: RunSpec, metric: str) -> None:
    """Refuse a metric that the validation rows of a task are not scored by. Raises: SpecError."""
    known = output_of(task_of(spec).output).validation
    if metric not in known:
        raise SpecError(f"--metric: {spec.task.kind} has no {metric} on validation rows", f"use {' or '.join(known)}")


def rank(store: RunStore, metric: str) -> list[Ranked]:
    """Return what a finished sweep tried, the best first, and write it to ``sweep.json``.

    Raises:
        SpecError: the task has no such metric.
        StoreError: a member's predictions are missing or damaged.
    """
    spec = store.read_spec()
    check_metric(spec, metric)
    task = task_of(spec)
    tried: dict[str, tuple[Mapping[str, Any], list[str], list[dict[str, Any]]]] = {}
    left_at: dict[str, int | None] = {}
    settings_of = {plan.name: plan.settings for plan in member_plans_of(spec)}
    for name in read_roster(store).members():
        settings = settings_of[name]
        _, names, scores = tried.setdefault(repr(sorted(settings.items())), (settings, [], []))
        names.append(name)
        scores.append(_validated(store, spec, task, name, metric))
        if spec.ensemble.pruning is not None:
            left_at[name] = member_facts(store.load_result(f"members/{name}"))["stopped_at"]
    ranked = [replace(_ranked(*one), left_at=left_at.get(one[1][0])) for one in tried.values()]
    ranked.sort(key=lambda one: (-(one.left_at or math.inf), METRICS[metric].cost(one.value) or 0.0))
    store.write_json(FACTS, {"metric": metric, "tried": [one.record() for one in ranked]})
    return ranked


def _ranked(settings: Mapping[str, Any], names: list[str], scores: Sequence[Mapping[str, Any]]) -> Ranked:
    values = [float(one["value"]) for one in scores]
    alone = len(values) == 1
    error = None if alone else statistics.stdev(values) / len(values) ** 0.5
    return Ranked(settings, names, statistics.fmean(values), scores[0]["interval"] if alone else None, error)


def _validated(store: RunStore, spec: RunSpec, task: Task, name: str, metric: str) -> dict[str, Any]:
    """Return a member's metric on the validation rows, with its interval over draws of them."""
    parts = serialization.unpack_predictions(store.load_result(f"predictions/{name}"))
    (found,) = [part for part in parts if part.role == "validation"]
    as_test: Predictions = replace(found, role="test")
    summary = summarize({"ensemble": [as_test]}, spec.evaluation, spec.ensemble.aggregate, seed=spec.data.seed)
    scores: Any = summary["ensemble"]["eval"][found.name]
    return {"value": scores[metric], "interval": scores.get("intervals", {}).get(metric)}


def best_spec(spec: RunSpec, best: Ranked) -> RunSpec:
    """Return a spec with the settings of what was best, and nothing that its members differ in."""
    alike = spec.model_copy(update={"ensemble": spec.ensemble.model_copy(update={"vary": None, "pruning": None})})
    return alike.with_settings(best.settings)
