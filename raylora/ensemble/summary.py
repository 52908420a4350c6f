"""The one entry point from predictions to numbers: ``summarize``."""

from __future__ import annotations

from collections.abc import Mapping

from raylora.ensemble.groups import Group, Settings, check_groups
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.base import Names, check_rule
from raylora.ensemble.threads import one_thread
from raylora.records import SetErrors, SetFacts, Summary
from raylora.spec.evaluation import EvaluationSpec


def summarize(
    groups: Mapping[str, Group],
    evaluation: EvaluationSpec,
    aggregate: str = "mean_probabilities",
    seed: int = 0,
) -> Summary:
    """Return the summary of a run as plain JSON-able values; docs/metrics.md describes every field.

    ``groups`` holds the ensemble under ``ensemble`` and any baselines under their names; ``single`` is added.

    Raises:
        SpecError: the rule cannot aggregate this output.
        DataError: sets that cannot be scored or compared.
        RayloraError: a result contradicts mathematics.
    """
    check_groups(groups)
    settings = Settings(evaluation, aggregate, seed)
    sets: dict[str, SetFacts] = {part.name: {"role": part.role, "rows": part.rows} for part in groups["ensemble"]}
    output = output_of(groups["ensemble"][0].output)
    check_rule(output, aggregate)
    with one_thread():
        return {"sets": sets, "confidence": evaluation.confidence, **output.summarize(groups, settings)}


def find_errors(
    ensemble: Group, evaluation: EvaluationSpec, names: Names, aggregate: str = "mean_probabilities"
) -> dict[str, SetErrors]:
    """Return, by labeled set, where an ensemble errs; docs/metrics.md describes every field."""
    with one_thread():
        return output_of(ensemble[0].output).errors(ensemble, Settings(evaluation, aggregate, 0), names)
