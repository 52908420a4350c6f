"""The one entry point from predictions to numbers: ``summarize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raylora.ensemble.groups import Group, Settings, check_groups, with_role
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.base import Names, check_rule
from raylora.ensemble.threads import one_thread
from raylora.ensemble.weights import FittedWeights, fit_weights
from raylora.errors import DataError
from raylora.records import SetErrors, SetFacts, Summary
from raylora.spec import EnsembleSpec
from raylora.spec.evaluation import EvaluationSpec


def summarize(
    groups: Mapping[str, Group],
    evaluation: EvaluationSpec,
    aggregate: str = "mean_probabilities",
    seed: int = 0,
) -> Summary:
    """Return the summary of a run as plain JSON-able values; docs/metrics.md describes every field.

    ``groups`` holds the ensemble under ``ensemble``, those with fitted weights under ``selected`` and ``stacked``, and
    any baselines under their names; ``single`` is added.

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


def fit_group(group: Group, names: Sequence[str], ensemble: EnsembleSpec) -> list[FittedWeights]:
    """Return the weights that a spec asks for, fitted on the group's validation set and on nothing else.

    Raises:
        DataError: there is no validation set, or it has no labels.
    """
    validation = with_role(group, "validation")
    if not validation:
        raise DataError(
            "ensemble.select and ensemble.weights are fitted on a validation set, and there is none",
            "predict one too, with its labels",
        )
    with one_thread():
        objective = output_of(validation[0].output).objective(validation[0], ensemble.aggregate)
        return fit_weights(objective, names, ensemble)
