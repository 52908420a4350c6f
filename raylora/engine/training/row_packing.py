"""Which runs may pack their rows, and what it saves them."""

from __future__ import annotations

from collections.abc import Sequence

from raylora.data.packed_rows import Packing
from raylora.data.task import Example, Task
from raylora.engine.training.member_plan import MemberPlan, member_plans_of
from raylora.engine.training.member_state import lengths_of, order_of
from raylora.engine.training.schedule import micro_batches_per_epoch
from raylora.ensemble.outputs import output_of
from raylora.errors import SpecError
from raylora.spec import EnsembleSpec, OptimizationSpec, RunSpec


def check_packing(spec: RunSpec, task: Task) -> None:
    """Refuse to pack rows that cannot share a sequence.

    Raises:
        SpecError: their answers are not tokens, or they would meet other dropout in other places.
    """
    if not spec.optimization.pack_rows:
        return
    if not output_of(task.output).per_token:
        raise SpecError(
            f"optimization.pack_rows: a model of {spec.task.kind} answers once per sequence, so each row needs its own",
            "use pack_rows: false; group_by_length saves padding, too",
        )
    drops = any(getattr(plan.adapter, "dropout", 0) for plan in member_plans_of(spec))
    if spec.placement.data_parallel > 1 and drops:
        raise SpecError(
            "placement.data_parallel: with optimization.pack_rows each worker packs its own part of a batch, and "
            "dropout would not be what it is on one worker", "use data_parallel: 1, no dropout, or pack_rows: false",
        )


def first_epoch_of(
    plan: MemberPlan, examples: Sequence[Example], optimization: OptimizationSpec, ensemble: EnsembleSpec, size: int
) -> Packing:
    """Return what packing saves in one member's first pass over the training rows."""
    lengths = lengths_of(examples)
    order = order_of(plan, lengths, optimization, ensemble)
    steps = range(micro_batches_per_epoch(len(examples), optimization))
    return Packing.of(([lengths[row] for row in order.indices(step)] for step in steps), size)


def packing_of(spec: RunSpec, examples: Sequence[Example]) -> Packing | None:
    """Return what packing saves the run's first member in its first epoch, or None where rows are not packed."""
    if not spec.optimization.pack_rows:
        return None
    plan = member_plans_of(spec)[0]
    return first_epoch_of(plan, examples, spec.optimization, spec.ensemble, spec.task.max_length)
