"""What teaches a run's members: targets that are there, or a teacher that is loaded beside them and stays."""

from __future__ import annotations

from raylora.data.sets import DataSets
from raylora.distill import AsksTeacher, LearnsAnswers
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.model_files import BASE, TEACHER
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.quantized_layers import content_hash, prepared_store
from raylora.engine.model.shared_sequences import check_shared_sequences
from raylora.engine.run.finished_members import adapters_of, read_members, teacher_digest
from raylora.engine.training.distillation_loss import DistillationLoss, loss_of, read_distillation_loss, task_of
from raylora.engine.training.live_teacher import LiveDistillationLoss, LiveTeacher
from raylora.engine.training.member_plan import PlanRole, member_adapters, member_plans_of, packable_groups
from raylora.errors import DataError
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


def teaching_of(
    spec: RunSpec, store: RunStore, base: Base, sets: DataSets
) -> DistillationLoss | LiveDistillationLoss | None:
    """Return what takes the place of the task's loss, or None for a run that learns from labels alone.

    Args:
        store: the run's, which lies in its teacher's.
        base: the run's own, loaded.

    Raises:
        DataError: the teacher or its targets are not what they were when the student was begun.
        StoreError: they are missing, incomplete or damaged.
    """
    loss = loss_of(spec)
    if isinstance(loss, AsksTeacher):
        return LiveDistillationLoss(loss, load_teacher(spec, store, base), loss.writing)
    if isinstance(loss, LearnsAnswers):  # its rows hold what is learned
        return None
    return read_distillation_loss(spec, store, task_of(spec), sets)


def load_teacher(student: RunSpec, store: RunStore, base: Base) -> LiveTeacher:
    """Load a student's teacher, over the student's own weights if both have the same base.

    Raises:
        DataError: it is not the teacher that the student was begun with.
        StoreError: a member is damaged.
    """
    assert student.distill_from is not None and student.distill_from.members is not None
    run, names = RunStore(store.uri.rpartition("/")[0]), student.distill_from.members
    spec = run.read_spec()
    folder = student.base.held(TEACHER)
    if folder is not None:
        spec.base.hold({BASE: folder})
    shares = student.distill_from.weights
    if teacher_digest(spec, run, names, shares) != student.distill_from.teacher:
        raise DataError(
            f"{run.uri}: its members are not those that {student.run_name()} was begun with",
            "restore them, or distill again under another distill.name",
        )
    sharing = base if is_same_base(spec, run, student, store) else None
    task, prepared = task_of(spec), prepared_store(run)
    loaded = load_base(spec.base, member_adapters(spec), task, base.device, prepared, sharing=sharing)
    if student.optimization.pack_rows:
        check_shared_sequences(loaded)
    plans = [plan for plan in member_plans_of(spec) if plan.role is PlanRole.MEMBER and plan.name in names]
    groups = packable_groups(plans)
    everyone = [name for group in groups for name in group]
    packs = [read_members(spec, run, loaded, group, everyone) for group in groups]
    share_of = dict(zip(names, shares, strict=True)) if shares is not None else None
    weights = None if share_of is None else [share_of[name] for name in everyone]
    return LiveTeacher(PackedModel(loaded, adapters_of(spec, everyone), task), packs, weights)


def is_same_base(teacher: RunSpec, teacher_run: RunStore, student: RunSpec, student_run: RunStore) -> bool:
    """Return whether two runs read the same weights: one source, stored alike and, if it is prepared, alike."""
    if teacher.base != student.base:
        return False
    ours, theirs = prepared_store(teacher_run), prepared_store(student_run)
    return (ours and content_hash(ours)) == (theirs and content_hash(theirs))
