"""A plan for machines that are not here, of a base whose weights need not be here either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raylora.adapters.base import Noted
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run.demand import assumed_batch, batch_of, demand_of, shell_of
from raylora.engine.run.run_answers import run_shards
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.member_plan import check_baselines, check_weights, member_plans_of
from raylora.errors import BaseError, DataError, PlacementError
from raylora.placement.estimate import MemberShape
from raylora.placement.inventory import Inventory
from raylora.placement.pace import Rates, pace_of, rates_of
from raylora.placement.plan import Demand, Plan
from raylora.placement.planner import make_plan
from raylora.spec import RunSpec
from raylora.spec.paths import located, places_here
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class PlannedAhead:
    """A plan, and what it was made from."""

    plan: Plan
    member_parameters: int
    batch: MemberShape
    """How much text a member sees at once."""
    notes: Sequence[str]


def plan_ahead(spec: RunSpec, inventory: Inventory, tflops: float | None = None) -> PlannedAhead:
    """Plan a run for some machines, from its spec and its base's configuration.

    Data is read if it can be; else every row is taken to be as long as the task lets it be.

    Args:
        tflops: what a worker reaches, in 10^12 floating-point operations per second; with it the notes say how fast
            the plan would be, and how fast another.

    Raises:
        UsageError: with what is wrong and how to fix it; nothing is written.
    """
    spec = located(spec, places_here(spec))
    task = task_of(spec)
    shell = shell_of(spec, task)
    check_baselines(spec, bool(shell.heads))
    check_weights(spec)
    notes = list(shell.adapter.notes(shell.sites)) if isinstance(shell.adapter, Noted) else []
    shards = 0
    try:
        sets = sets_of(spec, task, load_tokenizer(spec.base, task), RunStore.for_spec(spec))
        batch, shards = batch_of(spec, sets), len(run_shards(spec, sets))
    except (BaseError, DataError) as error:
        batch = assumed_batch(spec, task)
        notes.append(f"the data could not be read, so rows are taken to have {batch.time} tokens: {error.message}")
    demand = replace(demand_of(spec, shell, batch, member_plans_of(spec), inventory), later_jobs=shards)
    plan = make_plan(demand, inventory, spec.placement, tflops)
    notes += _paces(demand, plan, inventory, spec, rates_of(plan, tflops))
    return PlannedAhead(plan, shell.member_parameters, batch, notes)


def _paces(demand: Demand, plan: Plan, inventory: Inventory, spec: RunSpec, rates: Rates) -> list[str]:
    """Return how fast the plan would be, and why the other way to hold the base was not chosen."""
    found = [f"{plan.strategy}: {_pace(demand, plan, inventory, rates)}"]
    other = "replicate" if plan.strategy == "shard" else "shard"
    changes = {"strategy": other, "ranks": "auto"}
    try:
        instead = make_plan(demand, inventory, spec.placement.model_copy(update=changes))
        found.append(f"{other} instead: {_pace(demand, instead, inventory, rates)}")
    except PlacementError as error:
        found.append(f"{other} instead: not possible: {error.message}")
    known = f"{rates.flops / 1e12:,.3g} TFLOP/s and {rates.bytes_per_s / 1e9:,.0f} GB/s per worker"
    return [*found, f"at {known}, {rates.source}; --tflops says what a worker reaches"]


def _pace(demand: Demand, plan: Plan, inventory: Inventory, rates: Rates) -> str:
    pace = pace_of(demand, plan, inventory, rates)
    parts = {"products": pace.compute_s, "weights": pace.weights_s, "gathering": pace.gather_s}
    shares = ", ".join(f"{name} {seconds:.2g}" for name, seconds in parts.items() if seconds)
    return (
        f"about {pace.tokens_per_s:,.0f} tokens/s; {pace.step_s:.2g} s a step ({shares}), "
        f"{pace.round_s:.2g} s until every unit has taken one"
    )
