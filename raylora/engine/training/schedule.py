"""How long a member trains and how its learning rate moves: pure functions of the step."""

from __future__ import annotations

import math

from raylora.spec import OptimizationSpec

_DEFAULT_EPOCHS = 3.0


def micro_batches_per_epoch(rows: int, spec: OptimizationSpec) -> int:
    """Return how many micro-batches one pass over the rows takes; the last may be short."""
    return math.ceil(rows / spec.micro_batch)


def epochs_done(step: int, rows: int, spec: OptimizationSpec) -> int:
    """Return how many whole passes over the rows a number of optimizer steps makes."""
    return step * spec.accumulation // micro_batches_per_epoch(rows, spec)


def total_steps(rows: int, spec: OptimizationSpec) -> int:
    """Return the optimizer steps of a whole training; epochs are rounded up to whole steps."""
    if spec.steps is not None:
        return spec.steps
    epochs = spec.epochs if spec.epochs is not None else _DEFAULT_EPOCHS
    return max(1, math.ceil(epochs * micro_batches_per_epoch(rows, spec) / spec.accumulation))


def learning_rate_factor(spec: OptimizationSpec, step: int, total: int) -> float:
    """Return the share of the peak learning rate that update number ``step`` (from 0) uses."""
    warmup = math.ceil(spec.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if spec.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if spec.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
