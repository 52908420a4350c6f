"""Who is taught by a finished ensemble, and by what."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, field_validator

from raylora.spec.base import AnyAdapter, AnyLoss, AnyTask, Frozen
from raylora.spec.data import SetSpec
from raylora.spec.model import BaseSpec
from raylora.spec.names import NAME_PATTERN, RUN_FOLDERS
from raylora.spec.training import OptimizationSpec


class StudentSpec(Frozen):
    """The model that is taught: a smaller base with an adapter of its own."""

    base: BaseSpec
    """The student's own frozen model."""
    adapter: AnyAdapter = Field(default_factory=lambda: cast(Any, {"kind": "lora"}))
    """What is trained in the student."""
    task: AnyTask | None = None
    """The student's task, by default the teacher's; it may differ in anything but its kind and its labels."""
    members: int = Field(default=1, ge=1)
    """How many members the student has; more than one make it an ensemble, whose prediction is the one that counts."""
    seed: int = 0
    """The student's seed; member m of several has this plus m."""
    optimization: OptimizationSpec | None = None
    """How the student is trained; by default as the teacher was."""


class AnswersSpec(Frozen):
    """The ensemble's own answers, in place of the rows' (sequence-level distillation, arXiv 1606.07947).

    They are written by the mixture of the members. One that ``max_new_tokens`` cuts off, or that does not fit into
    ``task.max_length``, is left out and counted.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    """Of an answer, at most."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the mixture; 0 takes the most probable token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest most probable tokens that have this probability together."""
    seed: int = 0
    """Of what is drawn."""
    surest: float = Field(default=1.0, gt=0, le=1)
    """Keep this share of the answers: those whose tokens the mixture holds most probable, by the mean NLL of one."""
    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """Keep answers that at least this share of the members would give by itself, greedily and once normalized; above 0
    every member answers every row, too."""


class DistillSpec(Frozen):
    """A finished ensemble teaches a student (arXiv 2410.20777); no part of the ensemble's identity."""

    name: str = "student"
    """The student's run directory, inside the teacher's."""
    student: StudentSpec
    """Who is taught."""
    loss: AnyLoss = Field(default_factory=lambda: cast(Any, {"kind": "kl"}))
    """What the student learns from the teacher's predictions by."""
    answers: AnswersSpec | None = None
    """Have the teacher answer every row, and the student learn those answers; for losses ``answers`` and ``gkd``."""
    teacher: Literal["ensemble", "single"] = "ensemble"
    """``single``: member 0 alone teaches."""
    calibrated: bool = False
    """Divide the teacher's logits by the temperature with which it has the least NLL on the validation rows: for one
    that is too sure of itself, or not sure enough, which its student would learn too."""
    transfer: SetSpec | None = None
    """Further text to be taught on, beside the training rows; its labels, if it has any, are not looked at. With
    ``answers`` its rows need only ask."""
    alone: bool = True
    """Train the same student without a teacher too, which shows what the teacher is worth."""
    costs: bool = True
    """Measure memory and speed of teacher and student, in processes of their own."""

    @field_validator("name")
    @classmethod
    def _free_name(cls, value: str) -> str:
        if not NAME_PATTERN.match(value) or len(value) > 34:
            raise ValueError(f"name {value!r} must match {NAME_PATTERN.pattern} and have at most 34 characters")
        if value in RUN_FOLDERS:
            raise ValueError(f"name {value!r} is a folder of the run itself: choose another")
        return value


class DistillFromSpec(Frozen):
    """What makes a run a student's: whom and what it learns from, and how. Written by ``raylora distill``."""

    targets: str | None = None
    """The targets' folder below ``targets`` of the run that the student lies in; none where the teacher is asked."""
    teacher: str
    """Digest of the teacher: its spec and its members' weights."""
    members: list[str] | None = None
    """The teacher's members that are asked while the student learns; none where there are targets."""
    weights: list[float] | None = None
    """What each of ``members`` weighs in the teacher's mixture; none where all weigh alike."""
    answers: str | None = None
    """The folder of the teacher's answers, beside targets; none where the student learns the rows' own."""
    loss: AnyLoss
    """The loss that the student learns by."""
    transfer: SetSpec | None = None
    """Further text that it is taught on."""
