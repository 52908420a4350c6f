"""From a finished run and a ``distill`` section to checked work: whose targets, which student, which comparison.

Everything that can be wrong is found here, before a worker starts and before a byte is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raylora import control
from raylora.data.task import Task
from raylora.distill import AsksTeacher, Keys, LearnsAnswers, Loss
from raylora.engine.distillation.answers import TaughtAnswers, check_prompts, taught_answers
from raylora.engine.distillation.checks import check_task, check_tokenizers, try_loss
from raylora.engine.distillation.target_job import SHARD_ROWS, TargetJob, TargetPlan, shard_names
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run.finished_members import teacher_digest
from raylora.engine.run.plan_run import Prepared, prepare
from raylora.engine.run.roster import read_roster, read_state
from raylora.engine.run.speakers import Speakers, predictions_of, read_speakers
from raylora.engine.training.distillation_loss import (
    targets_uri,
    task_of,
    taught_content,
)
from raylora.engine.training.inputs import AHEAD, sets_of
from raylora.engine.training.member_plan import PlanRole, member_plans_of
from raylora.ensemble.calibration import fit_temperature
from raylora.ensemble.outputs import output_of
from raylora.ensemble.threads import one_thread
from raylora.ensemble.weights import MemberWeights, equal_weights
from raylora.errors import RunDirectoryError, SpecError
from raylora.placement.inventory import Inventory
from raylora.spec import BaselinesSpec, DistillFromSpec, DistillSpec, EnsembleSpec, RunSpec
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class Distillation:
    """A teacher, what it teaches and who learns from it."""

    settings: DistillSpec
    store: RunStore
    """Of the teacher."""
    teacher: RunSpec
    members: list[str]
    """Who of the teacher's members teach."""
    key: str
    """By what targets are known: the teacher, the rows and what is kept of them."""
    rows: int
    targets: TargetPlan | None
    """None where the teacher is asked while the student learns, or has answered."""
    answers: TaughtAnswers | None
    """What the teacher writes, if the student is to learn it."""
    student: RunSpec
    alone: RunSpec | None
    """The same student without a teacher."""

    def students(self) -> list[RunSpec]:
        """Return what is trained, in order."""
        return [self.student, *([self.alone] if self.alone is not None else [])]


def prepare_distillation(
    run: str, settings: DistillSpec, inventory: Inventory | None = None, shard_rows: int = SHARD_ROWS
) -> Distillation:
    """Check a run and its distill section.

    Raises:
        UsageError: with what is wrong and how to fix it; nothing was started or written.
    """
    store = RunStore(run)
    spec = store.spec_in_place()
    check_finished(store)
    task = task_of(spec)
    loss = check_task(settings, task)
    prepared = prepare(spec, inventory)
    teachers = teachers_of(spec, store, settings)
    members = teachers.names
    try_loss(loss, task, len(members), _weighs(spec, settings))
    content_of = _content_of(spec, task, settings, prepared)
    tokens = _tokens(loss)
    digest = teacher_digest(spec, store, members, teachers.weights.mixed)
    temperature = _temperature(store, teachers.weights) if settings.calibrated else 1.0
    key = targets_key(digest, content_of, tokens, temperature)
    answers = taught_answers(prepared, settings, teachers.weights, digest, content_of)
    source = _source(settings, loss, digest, teachers.weights, key, answers.key if answers is not None else None)
    student = student_spec(spec, settings, store.uri, settings.name, source)
    alone = student_spec(spec, settings, store.uri, f"{settings.name}-alone", None) if settings.alone else None
    if output_of(task.output).per_token:
        check_tokenizers(spec, student, task)
    if answers is not None and not answers.is_done:  # then one is looked at whose rows are as they were
        unanswered = source.model_copy(update={"answers": AHEAD})
        taught = prepare(student_spec(spec, settings, store.uri, f"{settings.name}-ahead", unanswered), inventory)
        RunStore.for_spec(student).check_spec(student)
    else:
        taught = prepare(student, inventory)
    if answers is None or not answers.is_done:
        Keys(list(content_of), list(content_of.values())).check(taught_content(taught.sets, task))
    if alone is not None:
        RunStore.for_spec(alone).check_spec(alone)
    targets = None
    if source.targets is not None:
        job = TargetJob(store.uri, digest, _packs(prepared, members), settings.transfer, tokens, shard_rows,
                        teachers.weights.mixed, temperature)
        targets = _target_plan(prepared, key, job, len(content_of))
    return Distillation(settings, store, spec, members, key, len(content_of), targets, answers, student, alone)


def _source(
    settings: DistillSpec, loss: Loss, teacher: str, members: MemberWeights, targets: str, answers: str | None
) -> DistillFromSpec:
    """Return what makes a run this student's: targets, a teacher that is asked, or answers, as its loss needs."""
    is_asked = isinstance(loss, AsksTeacher)
    weights = members.mixed if is_asked else None
    return DistillFromSpec(
        targets=None if is_asked or isinstance(loss, LearnsAnswers) else targets, teacher=teacher,
        members=list(members.names) if is_asked else None, weights=None if weights is None else list(weights),
        answers=answers, loss=settings.loss, transfer=settings.transfer,
    )


def _target_plan(prepared: Prepared, key: str, job: TargetJob, rows: int) -> TargetPlan:
    shards = shard_names(rows, job.shard_rows)
    processes = prepared.plan.workers * prepared.plan.ranks
    plan = replace(prepared.plan, workers=min(processes, len(shards)), ranks=1, partners=1, later_workers=0)
    return TargetPlan(prepared.spec, RunStore(targets_uri(job.run_uri, key)), plan, job, shards, rows)


def check_ahead(spec: RunSpec, inventory: Inventory | None = None) -> None:
    """Check a run's distill section before it starts: an error should not show up hours later.

    Raises:
        UsageError: as :func:`prepare_distillation`.
    """
    if spec.distill is None:
        return
    settings, task = spec.distill, task_of(spec)
    loss = check_task(settings, task)
    members = [plan.name for plan in member_plans_of(spec) if plan.role is PlanRole.MEMBER]
    members = members[: 1 if settings.teacher == "single" else None]
    try_loss(loss, task, len(members), _weighs(spec, settings))
    check_prompts(spec, settings, task)
    source = _source(settings, loss, AHEAD, equal_weights(members), AHEAD, None if settings.answers is None else AHEAD)
    # A name of its own: what is in the student's directory is looked at when the targets are known.
    student = student_spec(spec, settings, RunStore.for_spec(spec).uri, f"{settings.name}-ahead", source)
    if output_of(task.output).per_token:
        check_tokenizers(spec, student, task)
    prepare(student, inventory)


def teachers_of(spec: RunSpec, store: RunStore, settings: DistillSpec) -> Speakers:
    """Return who of a finished run teaches: those who speak for it, or member 0 alone. Raises: StoreError."""
    members = read_roster(store).members()
    if settings.teacher == "single":
        return read_speakers(store, spec, members[:1], plain=True)
    return read_speakers(store, spec, members)


def _temperature(store: RunStore, members: MemberWeights) -> float:
    """Return the temperature of a teacher's mixture on its run's validation rows. Raises: SpecError if there is none.

    Each member's logits are divided by it before they are mixed, as a distillation's own temperature divides them.
    """
    validation = next((part for part in predictions_of(store, members.names) if part.role == "validation"), None)
    fitted = None
    if validation is not None:
        with one_thread():
            fitted = fit_temperature(validation.values, validation.labels(), weights_M=members.weights_M)
    if fitted is None or fitted.degenerate:
        why = "there are none" if fitted is None else "they are all predicted well, or all badly"
        raise SpecError(f"distill.calibrated: the validation rows tell no temperature: {why}",
                        "leave it out, or train a teacher with more data.validation_rows")
    return fitted.value


def _weighs(spec: RunSpec, settings: DistillSpec) -> bool:
    """Return whether the members who teach may weigh differently."""
    return settings.teacher != "single" and spec.ensemble.is_fitted


def is_finished(store: RunStore) -> bool:
    """Return whether a run has ended well, with all members or with enough of them."""
    ended_well = read_state(store).phase in (control.Phase.SUCCEEDED, control.Phase.DEGRADED)
    return ended_well and store.storage.exists("metrics.json")


def check_finished(store: RunStore) -> None:
    """Raise RunDirectoryError for a run that cannot teach yet."""
    if not is_finished(store):
        raise RunDirectoryError(
            f"{store.uri}: the run is not finished and cannot teach", f"finish it first: raylora resume {store.uri}"
        )


def student_spec(
    teacher: RunSpec, settings: DistillSpec, run_uri: str, name: str, distill_from: DistillFromSpec | None
) -> RunSpec:
    """Return a student's run: the teacher's data, task and evaluation, the student's model.

    Without ``distill_from`` it is the same student alone.
    """
    student, placement = settings.student, teacher.placement
    if distill_from is not None and distill_from.members is not None:  # a teacher beside it is whole in every worker
        placement = placement.model_copy(update={"strategy": "replicate", "ranks": "auto", "data_parallel": 1})
    if isinstance(placement.workers, int):  # as many as the teacher's members would find nothing to do
        placement = placement.model_copy(update={"workers": min(placement.workers, student.members)})
    # The student's own adapter decides whether it has blocks that could be cached: it asks for that itself.
    inherited = teacher.optimization.model_copy(update={"cache_trunk": False})
    fields = {
        "name": name, "storage_path": run_uri, "base": student.base, "adapter": student.adapter,
        "task": student.task or teacher.task, "data": teacher.data, "evaluation": teacher.evaluation,
        "ensemble": EnsembleSpec(members=student.members, seed=student.seed),
        "optimization": student.optimization or inherited, "baselines": BaselinesSpec(),
        "placement": placement, "checkpointing": teacher.checkpointing, "tracking": teacher.tracking,
        "distill_from": distill_from,
    }
    return RunSpec.model_validate(fields)


def targets_key(
    teacher: str, content_of: Mapping[str, str], tokens: tuple[int, float] | None = None, temperature: float = 1.0
) -> str:
    """Return by what targets are known: the teacher and its temperature, each row's id and content, a token's rest."""
    parts: list[Any] = [teacher, list(content_of.items()), *([tokens] if tokens is not None else [])]
    parts += [temperature] if temperature != 1 else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _tokens(loss: Loss) -> tuple[int, float] | None:
    """Return how many tokens of a position targets keep, and at what temperature; None where they are no tokens."""
    if isinstance(loss, AsksTeacher | LearnsAnswers) or not output_of(loss.teaches).per_token:
        return None
    return loss.spec.top_k, loss.spec.temperature


def _content_of(spec: RunSpec, task: Task, settings: DistillSpec, prepared: Prepared) -> Mapping[str, str]:
    """Return id -> content hash of the rows that are taught, in their order."""
    recorded = prepared.store.read_json("data.json")
    if recorded and recorded["content_hash"] != prepared.sets.content_hash():
        raise RunDirectoryError(
            f"{prepared.store.uri}: the data has changed since the teacher was trained", "restore it, or train again"
        )
    if settings.transfer is None:
        return taught_content(prepared.sets, task)
    tokenizer, asks = load_tokenizer(spec.base, task), settings.answers is not None
    return taught_content(sets_of(spec, task, tokenizer, prepared.store, settings.transfer, asks=asks), task)


def _packs(prepared: Prepared, members: list[str]) -> tuple[tuple[str, ...], ...]:
    packs = [tuple(name for name in units if name in members) for units in prepared.jobs.values()]
    most = prepared.demand.places or max(map(len, packs))  # more have never been in one forward
    return tuple(pack[start : start + most] for pack in packs for start in range(0, len(pack), most))
