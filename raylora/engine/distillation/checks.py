"""What a distill section may ask for: a loss, a student and a task that go together. Nothing is read but settings."""

from __future__ import annotations

import torch

from raylora import registry
from raylora.data.task import Task
from raylora.distill import AsksTeacher, Loss, WeighsMembers, targets_class
from raylora.engine.distillation.answers import check_answering
from raylora.engine.model.checkpoint import load_config, load_tokenizer
from raylora.engine.run.baseline_checks import check_temperature
from raylora.engine.training.distillation_loss import student_task
from raylora.engine.training.own_answers import check_writes
from raylora.ensemble.outputs import output_of
from raylora.errors import DataError, SpecError
from raylora.spec import DistillSpec, RunSpec

_PROBE = "Déjà vu: 12,345 tokens -- isn't   that\n\tnaïve? 语言 🙂 <|endoftext|>"
"""A text on which tokenizers of one vocabulary but other rules come apart."""


def check_tokenizers(teacher: RunSpec, student: RunSpec, task: Task) -> None:
    """Refuse models that read a text as different tokens, or number their tokens differently.

    Raises:
        DataError: with the first difference.
    """
    ours, theirs = (load_tokenizer(spec.base, task) for spec in (teacher, student))
    hint = "a token-level loss needs two models of one tokenizer, such as two sizes of one family"
    one, two = ours.get_vocab(), theirs.get_vocab()
    if one != two:
        different = sorted(token for token in one.keys() | two.keys() if one.get(token) != two.get(token))
        raise DataError(
            f"teacher and student have different tokenizers, of {len(one):,} and {len(two):,} tokens: "
            f"{len(different):,} differ, such as {different[0]!r}", hint,
        )
    if ours(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"]:
        raise DataError(f"teacher and student have one vocabulary, but read {_PROBE!r} as different tokens", hint)
    sizes = [int(load_config(spec.base).get_text_config().vocab_size) for spec in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise DataError(f"the teacher has logits over {sizes[0]} tokens, the student over {sizes[1]}", hint)


def try_loss(loss: Loss, task: Task, members: int, is_weighted: bool = False) -> None:
    """Ask the loss about nothing, which is soon done.

    Args:
        is_weighted: whether the members may weigh differently.

    Raises:
        SpecError: it cannot learn from so many members, or not from weighted ones.
    """
    if output_of(task.output).per_token:
        return
    if is_weighted and not isinstance(loss, WeighsMembers):
        raise SpecError(
            f"distill.loss: {loss.spec.kind} has the members weigh alike, and the run selects or weights them",
            "use kl, js, reverse_kl or dirichlet, or a run without ensemble.select and ensemble.weights",
        )
    outputs_BO = torch.zeros(1, loss.outputs(task.num_outputs))
    targets = torch.zeros((1, members, task.num_outputs)[: targets_class(task.output).dimensions])
    loss.per_example(outputs_BO, targets, None)


def check_task(settings: DistillSpec, task: Task) -> Loss:
    """Return the loss. Raises: SpecError if it, or the student's task, does not go with the teacher's."""
    given, own = settings.student.task, task
    if given is not None:
        own = registry.load("task", given.kind).build(given)
        if given.kind != task.spec.kind or own.label_names != task.label_names:
            raise SpecError(
                f"distill.student.task: {given.kind} of labels {own.label_names} is not the teacher's "
                f"{task.spec.kind} of {task.label_names}",
                "teacher and student need the same labels in the same order; leave task out to take the teacher's",
            )
    if settings.calibrated:
        check_temperature("distill.calibrated", task)
    student_task(task, settings.loss)
    loss: Loss = registry.load("loss", settings.loss.kind).build(settings.loss)
    check_answering(settings, own, loss)
    if isinstance(loss, AsksTeacher) and loss.writing.share:
        _check_writing(settings, own)
    return loss


def _check_writing(settings: DistillSpec, task: Task) -> None:
    """Refuse a student that cannot learn from what it writes. Raises: SpecError."""
    optimization = settings.student.optimization
    check_writes(task)
    if optimization is not None and optimization.cache_trunk:
        raise SpecError(
            "distill.student.optimization.cache_trunk: what a student writes itself is read once and not cached",
            "use cache_trunk: false, or distill.loss.on_policy: 0",
        )
