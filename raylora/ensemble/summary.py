"""The one entry point from predictions to numbers: ``summarize``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from raylora.ensemble.aggregate import RULES
from raylora.ensemble.groups import Group, Settings, check_groups
from raylora.ensemble.outputs import output_of
from raylora.errors import SpecError, suggest
from raylora.spec.run import EvaluationSpec


def summarize(
    groups: Mapping[str, Group],
    evaluation: EvaluationSpec,
    aggregate: str = "mean_probabilities",
    seed: int = 0,
) -> dict[str, Any]:
    """Return the summary of a run as plain JSON-able values; docs/metrics.md describes every field.

    ``groups`` holds the ensemble under ``ensemble`` and any baselines under their names; ``single`` is added. Raises
    DataError for sets that cannot be scored or compared, and RayloraError if a result contradicts mathematics.
    """
    if aggregate not in RULES:
        raise SpecError(f"unknown aggregate {aggregate!r}", suggest(aggregate, RULES))
    check_groups(groups)
    settings = Settings(evaluation, aggregate, seed)
    sets = {part.name: {"role": part.role, "rows": part.rows} for part in groups["ensemble"]}
    output = output_of(groups["ensemble"][0].output)
    with one_thread():
        return {"sets": sets, "confidence": evaluation.confidence, **output.summarize(groups, settings)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread for a while."""
    # Thousands of small operations: on a machine whose cores are busy training, every one of them would wait for a
    # thread that is not being scheduled, and a summary of half a second was measured to take fifteen.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
