"""From a finished run and a ``distill`` section to checked work: whose targets, which student, which comparison.

Everything that can be wrong is found here, before a worker starts and before a byte is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from raylora import control, registry
from raylora.data.task import Task
from raylora.distill import Keys
from raylora.engine.base import load_tokenizer
from raylora.engine.lessons import sets_of, student_task, targets_uri, task_of
from raylora.engine.members import finished_members
from raylora.engine.prepare import Prepared, prepare
from raylora.engine.teach import SHARD_ROWS, PreparedTeaching, Teaching, shard_names, teacher_digest
from raylora.errors import RunDirectoryError, SpecError
from raylora.placement.plan import Inventory
from raylora.spec import BaselinesSpec, DistillSpec, EnsembleSpec, LessonSpec, RunSpec
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class Distillation:
    """A teacher, its targets and who learns from them."""

    settings: DistillSpec
    store: RunStore
    """Of the teacher."""
    teacher: RunSpec
    teaching: PreparedTeaching
    student: RunSpec
    alone: RunSpec | None
    """The same student without a teacher."""

    def students(self) -> list[RunSpec]:
        """Return what is trained, in order."""
        return [self.student, *([self.alone] if self.alone is not None else [])]


def prepare_distillation(
    run: str, settings: DistillSpec, inventory: Inventory | None = None, shard_rows: int = SHARD_ROWS
) -> Distillation:
    """Check a run and what it is to teach.

    Raises:
        UsageError: with what is wrong and how to mend it; nothing was started or written.
    """
    store = RunStore(run)
    spec = spec_in_place(store)
    check_finished(store)
    task = task_of(spec)
    _check_task(settings, task)
    prepared = prepare(spec, inventory)
    members = finished_members(store)[: 1 if settings.teacher == "single" else None]
    content_of = _content_of(spec, task, settings, prepared)
    digest = teacher_digest(spec, store, members)
    key = targets_key(digest, content_of)
    teaching = Teaching(store.uri, digest, _packs(prepared, members), settings.transfer, shard_rows)
    shards = shard_names(len(content_of), shard_rows)
    plan = replace(prepared.plan, workers=min(prepared.plan.workers, len(shards)))
    lesson = LessonSpec(targets=key, teacher=digest, loss=settings.loss, transfer=settings.transfer)
    student = student_spec(spec, settings, store.uri, settings.name, lesson)
    alone = student_spec(spec, settings, store.uri, f"{settings.name}-alone", None) if settings.alone else None
    _check_rows(content_of, prepare(student, inventory))
    if alone is not None:
        RunStore.for_spec(alone).check_spec(alone)
    return Distillation(
        settings, store, spec,
        PreparedTeaching(spec, RunStore(targets_uri(store.uri, key)), plan, teaching, shards, len(content_of)),
        student, alone,
    )


def spec_in_place(store: RunStore) -> RunSpec:
    """Return the spec of a run directory under the name and path where it now is. Raises: RunDirectoryError."""
    parent, _, name = store.uri.rpartition("/")
    return store.read_spec().model_copy(update={"storage_path": parent, "name": name})


def is_finished(store: RunStore) -> bool:
    """Return whether a run has ended well, with all members or with enough of them."""
    state = control.replay(control.from_record(record) for record in store.read_events())
    return state.phase in (control.Phase.SUCCEEDED, control.Phase.DEGRADED) and store.storage.exists("metrics.json")


def check_finished(store: RunStore) -> None:
    """Raise RunDirectoryError for a run that cannot teach yet."""
    if not is_finished(store):
        raise RunDirectoryError(
            f"{store.uri}: the run is not finished and cannot teach", f"finish it first: raylora resume {store.uri}"
        )


def student_spec(
    teacher: RunSpec, settings: DistillSpec, run_uri: str, name: str, lesson: LessonSpec | None
) -> RunSpec:
    """Return a student's run: the teacher's data, task and evaluation, the student's model; without a lesson, alone."""
    student = settings.student
    fields = {
        "name": name, "storage_path": run_uri, "base": student.base, "adapter": student.adapter,
        "task": student.task or teacher.task, "data": teacher.data, "evaluation": teacher.evaluation,
        "ensemble": EnsembleSpec(members=student.members, seed=student.seed),
        "optimisation": student.optimisation or teacher.optimisation, "baselines": BaselinesSpec(),
        "placement": teacher.placement, "checkpointing": teacher.checkpointing, "lesson": lesson,
    }
    return RunSpec.model_validate(fields)


def targets_key(teacher: str, content_of: Mapping[str, str]) -> str:
    """Return by what targets are known: the teacher, and each row's id and content."""
    return hashlib.sha256(json.dumps([teacher, list(content_of.items())]).encode()).hexdigest()[:16]


def _check_task(settings: DistillSpec, task: Task) -> None:
    if settings.student.task is not None:
        given = settings.student.task
        own: Task = registry.load("task", given.kind).build(given)
        if given.kind != task.spec.kind or own.label_names != task.label_names:
            raise SpecError(
                f"distill.student.task: {given.kind} of labels {own.label_names} is not the teacher's "
                f"{task.spec.kind} of {task.label_names}",
                "teacher and student need the same labels in the same order; leave task out to take the teacher's",
            )
    student_task(task, settings.loss)


def _content_of(spec: RunSpec, task: Task, settings: DistillSpec, prepared: Prepared) -> Mapping[str, str]:
    """Return id -> content hash of the rows that are taught, in their order."""
    recorded = prepared.store.read_json("data.json")
    if recorded and recorded["content_hash"] != prepared.sets.content_hash():
        raise RunDirectoryError(
            f"{prepared.store.uri}: the data has changed since the teacher was trained", "restore it, or train anew"
        )
    if settings.transfer is None:
        return prepared.sets.train.content_of
    return sets_of(spec, task, load_tokenizer(spec.base, task), settings.transfer).train.content_of


def _check_rows(content_of: Mapping[str, str], student: Prepared) -> None:
    """Refuse a student whose rows are not the teacher's. Raises: DataError, naming the first of them."""
    Keys(list(content_of), list(content_of.values())).check(student.sets.train.content_of)


def _packs(prepared: Prepared, members: list[str]) -> tuple[tuple[str, ...], ...]:
    packs = (tuple(name for name in units if name in members) for units in prepared.plan.jobs().values())
    return tuple(pack for pack in packs if pack)
