"""How long a member trains and how its learning rate moves: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raylora.spec import OptimizationSpec

DEFAULT_EPOCHS = 3.0


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
    return _steps_of(spec.epochs if spec.epochs is not None else DEFAULT_EPOCHS, rows, spec)


def restart_steps(rows: int, spec: OptimizationSpec) -> tuple[int, ...]:
    """Return the steps, from 0, at which the schedule starts anew."""
    return tuple(int(at) if spec.steps is not None else _steps_of(at, rows, spec) for at in spec.restarts)


def round_starts(total: int, rounds: int) -> list[int]:
    """Return the steps, from 0, with which the rounds of a training begin: equal parts of it, but for rounding."""
    return [total * number // rounds for number in range(rounds)]


def _steps_of(epochs: float, rows: int, spec: OptimizationSpec) -> int:
    return max(1, math.ceil(epochs * micro_batches_per_epoch(rows, spec) / spec.accumulation))


def learning_rate_factor(spec: OptimizationSpec, step: int, total: int, restarts: Sequence[int] = ()) -> float:
    """Return the share of the peak learning rate that update number ``step`` (from 0) uses.

    Between two restarts the schedule runs from its warmup to its end (Loshchilov and Hutter, arXiv 1608.03983).
    """
    begin = max((at for at in restarts if at <= step), default=0)
    end = min((at for at in restarts if at > step), default=total)
    step, total = step - begin, end - begin
    warmup = math.ceil(spec.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if spec.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if spec.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
