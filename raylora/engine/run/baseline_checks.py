"""What baselines ask of a run that its task, its adapters or its length cannot give; refused before anything is trained."""

from __future__ import annotations

from raylora.data.task import Task
from raylora.errors import SpecError
from raylora.spec import RunSpec


def check_sureness(spec: RunSpec, task: Task) -> None:
    """Refuse ways to say how sure a model is that mean nothing for a task or an adapter. Raises: SpecError."""
    if spec.baselines.temperature:
        _check_temperature(spec, task)


def _check_temperature(spec: RunSpec, task: Task) -> None:
    if task.output == "tokens":
        raise SpecError(
            f"baselines.temperature: a temperature of {spec.task.kind} needs every token's logits over the whole "
            "vocabulary, of which a run keeps the log-probability of the row's own token only", "leave it out",
        )
    if task.output == "value":
        raise SpecError(
            f"baselines.temperature: a model of {spec.task.kind} has no logits, and its noise is fitted on the "
            "validation rows in any case, for every row of the report", "leave it out",
        )
