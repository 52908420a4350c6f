"""What a spec asks for and its base, task or members cannot do; and what they can, and is most likely a mistake."""

from __future__ import annotations

from collections.abc import Sequence

from raylora.adapters.base import TwoFactors, WholeModel
from raylora.adapters.side_by_side import adapter_of
from raylora.data.sets import DataSets
from raylora.data.task import Task
from raylora.engine.generation.questions import answers_obstacle
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.sites import AdaptedLayers
from raylora.engine.run.baseline_checks import check_sureness
from raylora.engine.run.demand import Shell, output_obstacle
from raylora.engine.training.member_plan import PlanRole, member_adapters, member_plans_of
from raylora.engine.training.row_packing import check_packing
from raylora.ensemble.answer_metrics import ANSWER_METRICS
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.base import check_rule
from raylora.errors import BaseError, SpecError
from raylora.spec import RegularizersSpec, RunSpec
from raylora.spec.vary import OWN_FORWARD, in_words

_LARGE_LR = 0.1


def check_task(spec: RunSpec, task: Task) -> None:
    """Refuse what an ensemble is asked to do that means nothing for its task. Raises: SpecError."""
    for regularizers in [spec.ensemble.regularizers, *(plan.regularizers for plan in member_plans_of(spec))]:
        _check_regularizers(regularizers, spec, task)
    pruning, known = spec.ensemble.pruning, output_of(task.output).validation
    if pruning is not None and pruning.metric not in known:
        raise SpecError(f"ensemble.pruning.metric: {spec.task.kind} has no {pruning.metric}",
                        f"use {' or '.join(known)}")
    check_rule(output_of(task.output), spec.ensemble.aggregate)
    check_sureness(spec, task)
    check_packing(spec, task)
    _check_rates(spec)


def _check_regularizers(regularizers: RegularizersSpec, spec: RunSpec, task: Task) -> None:
    """Refuse a run's or a member's rules that mean nothing for its task. Raises: SpecError."""
    kind, output = spec.task.kind, output_of(task.output)
    rule, answers = regularizers.early_stopping, () if answers_obstacle(task) else tuple(ANSWER_METRICS)
    if rule is not None and rule.metric not in (*output.validation, *answers):
        raise SpecError(
            f"ensemble.regularizers.early_stopping.metric: {kind} has no {rule.metric}",
            f"use {' or '.join((*output.validation, *answers))}",
        )
    if rule is not None and rule.metric in answers and spec.evaluation.generation is None:
        raise SpecError(
            f"ensemble.regularizers.early_stopping.metric: {rule.metric} is of written answers, and "
            "evaluation.generation, which says how they are written, is missing",
            "add evaluation.generation: {max_new_tokens: 64}, or use nll",
        )
    if regularizers.kl is not None and not output.is_distribution:
        raise SpecError(
            f"ensemble.regularizers.kl: a model of {kind} gives one value, not a distribution to compare with the "
            "base's, and the base's own head is not trained",
            "use early_stopping, decay_a, decay_b or decay_head",
        )


def _check_rates(spec: RunSpec) -> None:
    """Refuse LoRA+ for members that have no A and B, and decay of an A that is not trained. Raises: SpecError."""
    for plan in member_plans_of(spec):
        if getattr(plan.adapter, "freeze_a", False) and plan.regularizers.decay_a:
            raise SpecError("ensemble.regularizers.decay_a: adapter.freeze_a keeps A as it was drawn",
                            "leave one of them out, or use decay_b")
        if plan.role is PlanRole.LAST_LAYER or isinstance(adapter_of(plan.adapter), TwoFactors):
            continue
        if plan.optimization.lora_plus_ratio != 1:
            raise SpecError(
                f"optimization.lora_plus_ratio: adapter.kind {plan.adapter.kind} has no pair of A and B whose rates "
                "could differ", "leave it out (1), or use adapter.kind lora, mos, melora, prolora or boosted_lora",
            )


def check_placement(spec: RunSpec, shell: Shell) -> None:
    """Refuse what this base and these batches cannot do. Raises: SpecError, BaseError."""
    partners, micro_batch = spec.placement.data_parallel, spec.optimization.micro_batch
    if partners > micro_batch:
        raise SpecError(
            f"placement.data_parallel: {partners} workers cannot share a micro-batch of {micro_batch} rows",
            "raise optimization.micro_batch, or lower placement.data_parallel",
        )
    if spec.placement.recompute:
        if isinstance(shell.adapter, WholeModel):
            raise SpecError(
                f"placement.recompute: members of adapter.kind {spec.adapter.kind} are in the base's place during the "
                "forward pass only", "use recompute: false, or an adapter",
            )
        find_blocks(shell.model)
    obstacle = output_obstacle(spec, shell) if spec.placement.output_layer == "parts" else ""
    if obstacle:
        raise SpecError(f"placement.output_layer: parts: {obstacle}", "use output_layer: whole")


def check_start(spec: RunSpec, quantized: Sequence[str], layers: AdaptedLayers) -> None:
    """Refuse a trainable pair that a member's LoRA cannot hold.

    Raises:
        BaseError: with the key to change.
    """
    compensation = spec.base.compensation
    if compensation is None or not compensation.trainable:
        return
    for adapter in member_adapters(spec):
        rank = getattr(adapter, "rank", 0)
        if adapter.kind != "lora" or rank != compensation.rank:
            raise BaseError(
                f"base.compensation.trainable: members start from pairs of rank {compensation.rank}, "
                f"and the adapter is {adapter.kind}" + (f" of rank {rank}" if adapter.kind == "lora" else ""),
                f"use adapter kind lora of rank {compensation.rank}, or trainable: false",
            )
        adapted = {site.name for site in layers.of(adapter).sites}
        missing = [name for name in quantized if name not in adapted]
        if missing:
            raise BaseError(
                f"base.compensation.trainable: {len(missing)} quantized layers have no adapter to hold their pair, "
                f"such as {missing[0]}",
                "adapt them all (adapter.target_modules: all-linear), or use trainable: false",
            )
    if any(plan.regularizers.kl is not None for plan in member_plans_of(spec)):
        raise BaseError(
            "ensemble.regularizers.kl: with a trainable pair the base without adapters is not the calibrated model",
            "use trainable: false, which keeps the pair in the base",
        )


def doubts(spec: RunSpec, sets: DataSets) -> list[str]:
    """Return what is allowed and most likely a mistake."""
    found = []
    rates: dict[str, None] = {}
    for own in (plan.optimization for plan in member_plans_of(spec)):
        if own.optimizer == "adamw" and own.lr > _LARGE_LR:
            rates[f"lr: {own.lr:g}"] = None
        elif own.optimizer == "adamw" and own.lr * own.lora_plus_ratio > _LARGE_LR:
            rates[f"lora_plus_ratio: {own.lr:g} * {own.lora_plus_ratio:g} = {own.lr * own.lora_plus_ratio:g}"] = None
    for rate in rates:
        found.append(
            f"optimization.{rate} is far beyond what trains (1e-5 to 1e-2 is usual): expect losses "
            "that are not finite"
        )
    seen = {example.label for example in sets.train.examples}
    absent = [name for index, name in enumerate(sets.label_names) if index not in seen]
    if absent and len(absent) < len(sets.label_names):
        found.append(f"task.labels: no training row has the label {', '.join(map(repr, absent))}")
    return found


def differences(spec: RunSpec) -> list[str]:
    """Return in words what members differ in, and which of them cannot share a forward for it."""
    if spec.ensemble.vary is None:
        return []
    settings = spec.ensemble.member_settings()
    keys = dict.fromkeys(key for own in settings for key in own)
    values = {key: list(dict.fromkeys(in_words(own[key]) for own in settings if key in own)) for key in keys}
    shown = [f"{key} ({', '.join(own[:8])}{', ...' if len(own) > 8 else ''})" for key, own in values.items()]
    apart = [key for key in values if key.startswith(OWN_FORWARD) and len(values[key]) > 1]
    told = [f"members differ in {' and '.join(shown)}"]
    return told + [f"members that differ in {key} share no forward: each value has packs of its own" for key in apart]
