"""What baselines ask of a run that its task, its adapters or its length cannot give: refused before training."""

from __future__ import annotations

from collections.abc import Sequence

from raylora.adapters.base import Site
from raylora.data.task import Task
from raylora.engine.training.member_plan import member_plans_of, rounds_of
from raylora.engine.training.schedule import round_starts
from raylora.engine.training.weight_moments import collection_steps
from raylora.errors import SpecError
from raylora.placement.plan import Plan
from raylora.spec import RunSpec

_LARGE_BYTES = 2**30


def check_sureness(spec: RunSpec, task: Task) -> None:
    """Refuse ways to say how sure a model is that mean nothing for a task or an adapter. Raises: SpecError."""
    if spec.baselines.temperature:
        check_temperature("baselines.temperature", task)
    if spec.baselines.laplace is not None:
        _check_laplace(spec, task)


def check_temperature(key: str, task: Task) -> None:
    """Refuse a key that asks for a temperature of predictions that have none. Raises: SpecError."""
    if task.output == "tokens":
        raise SpecError(
            f"{key}: a temperature of {task.spec.kind} needs every token's logits over the whole "
            "vocabulary, of which a run keeps the log-probability of the row's own token only", "leave it out",
        )
    if task.output == "value":
        raise SpecError(
            f"{key}: a model of {task.spec.kind} has no logits, and its noise is fitted on the "
            "validation rows in any case, for every row of the report", "leave it out",
        )


def _check_laplace(spec: RunSpec, task: Task) -> None:
    if task.output != "classes":
        raise SpecError(
            f"baselines.laplace: is there for classes, and {spec.task.kind} predicts none",
            "leave it out, or use task.kind: classification or multiple_choice",
        )
    adapter = member_plans_of(spec)[0].adapter
    kind = adapter.kind
    if getattr(adapter, "freeze_a", False):
        raise SpecError("baselines.laplace: is over both of LoRA's matrices, and adapter.freeze_a trains B alone",
                        "leave it out, or use baselines.swag, which takes any adapter")
    if kind != "lora":
        raise SpecError(
            f"baselines.laplace: is over LoRA's matrices, and adapter.kind of member 0 is {kind}",
            "leave it out, or use baselines.swag, which takes any adapter",
        )
    if spec.ensemble.aggregate != "mean_probabilities":
        raise SpecError(
            f"baselines.laplace: its draws of logits are averaged as probabilities; under {spec.ensemble.aggregate} "
            "they would say what member 0 says", "leave it out, or use ensemble.aggregate: mean_probabilities",
        )
    if spec.distill_from is not None:
        raise SpecError("baselines.laplace: a student's outputs may be no logits, and its loss is its teacher's",
                        "leave it out")


def check_whole_base(spec: RunSpec, plan: Plan) -> None:
    """Refuse Jacobians by a base that no worker has whole. Raises: SpecError."""
    if spec.baselines.laplace is not None and plan.strategy == "shard":
        raise SpecError(
            "baselines.laplace: differentiates each row by itself, which a base that is split over workers is not "
            "there for", "leave it out, or use placement.strategy: replicate",
        )


def baseline_notes(spec: RunSpec, sites: Sequence[Site]) -> list[str]:
    """Return what one would not expect of a baseline's cost."""
    laplace, rank = spec.baselines.laplace, getattr(spec.adapter, "rank", 0)
    if laplace is None or laplace.structure != "kronecker":
        return []
    sides = [side for site in sites for side in (site.in_features, rank, rank, site.out_features)]
    size = 8 * sum(side**2 for side in sides) * 2  # sums, and axes
    if size < _LARGE_BYTES:
        return []
    return [f"baselines.laplace: Kronecker factors of these layers take {size / 2**30:.1f} GiB of a worker's memory, "
            f"and eigenvectors of matrices up to {max(sides):,} wide; structure: diagonal takes neither"]


def check_lengths(spec: RunSpec, total: int) -> None:
    """Refuse what a training of ``total`` steps is too short for.

    Raises:
        SpecError: rounds without a step; moments of weights that are counted in once, or over several rounds.
    """
    swag, plans = spec.baselines.swag, member_plans_of(spec)
    for rounds in {rounds_of(plan) for plan in plans}:
        if rounds > total:
            raise SpecError(f"adapter.rounds: {rounds} rounds have no steps of their own in a training of {total}",
                            f"use at most {total}, or train longer")
    if swag is not None and rounds_of(plans[0]) > 1:
        begins = round_starts(total, rounds_of(plans[0]))[-1]
        counted = collection_steps(swag, total)[0]
        if counted <= begins:
            raise SpecError(
                f"baselines.swag: counts weights in from step {counted} on, and the last round of member 0 begins with "
                f"step {begins + 1}: before, other weights are trained",
                "lower baselines.swag.last, or leave it out",
            )
    if swag is not None and len(collection_steps(swag, total)) < 2:
        raise SpecError(
            f"baselines.swag: weights are counted in once in a training of {total} steps, and one has no variance",
            "lower baselines.swag.every_steps, or raise baselines.swag.last",
        )
