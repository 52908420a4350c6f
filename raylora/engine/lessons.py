"""A student's side of distillation: its head, its loss, and the teacher's targets looked up by example id.

Shapes: K members of one pack, N examples of each, B = K * N, M teacher members, C classes, O outputs of the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from raylora import registry
from raylora.data.sets import DataSets, load_sets
from raylora.data.task import Batch, Task
from raylora.distill import Annealed, ClassificationTargets, Loss, merge
from raylora.errors import SpecError, StoreError
from raylora.spec import KindSpec, RunSpec, SetSpec
from raylora.store.run_store import RunStore

TOKEN_LEVEL = "topk_kl"


def task_of(spec: RunSpec) -> Task:
    """Return a run's task; a student's has the head that its loss needs."""
    task: Task = registry.load("task", spec.task.kind).build(spec.task)
    return task if spec.lesson is None else student_task(task, spec.lesson.loss)


def sets_of(spec: RunSpec, task: Task, tokenizer: Any, transfer: SetSpec | None = None) -> DataSets:
    """Return every set of a run; a student's training set has the transfer rows.

    Args:
        transfer: has a teacher's training set grow by the same rows.

    Raises:
        DataError: as :func:`raylora.data.sets.load_sets`.
    """
    extra = spec.lesson.transfer if spec.lesson is not None else transfer
    return load_sets(spec.data, spec.evaluation, task, tokenizer, transfer=extra)


def student_task(task: Task, loss_spec: KindSpec) -> Task:
    """Return the task as a student of this loss does it.

    Raises:
        SpecError: the loss does not serve the task.
    """
    loss: Loss = registry.load("loss", loss_spec.kind).build(loss_spec)
    if task.num_classes is None or loss_spec.kind == TOKEN_LEVEL:
        raise SpecError(
            f"distill.loss: {loss_spec.kind} for task.kind {task.spec.kind}: distillation of language models, token by "
            "token, is not offered yet" if task.num_classes is None else
            f"distill.loss: {TOKEN_LEVEL} teaches language models token by token, not task.kind {task.spec.kind}",
            "use a task with classes, and loss kind kl, reverse_kl, js, dirichlet or multi_head",
        )
    outputs = loss.outputs(task.num_classes)
    if outputs == task.num_classes and loss_spec.kind != "dirichlet":
        return task
    if outputs != task.num_classes and task.auto_class != "AutoModelForSequenceClassification":
        raise SpecError(
            f"distill.loss: {loss_spec.kind} needs {outputs} outputs, and {task.spec.kind} has no head for them",
            "use kl or dirichlet, or task.kind classification",
        )
    return cast(Task, StudentTask(task, loss, outputs))


class StudentTask:
    """A task whose model says more than one softmax: its scores are the head's outputs, to be read by the loss."""

    def __init__(self, task: Task, loss: Loss, outputs: int) -> None:
        self._task, self._loss, self._outputs = task, loss, outputs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled there is no task to ask yet
            raise AttributeError(name)
        return getattr(self._task, name)

    def model_kwargs(self) -> dict[str, Any]:
        """Return the task's, with the head that the loss needs."""
        found = self._task.model_kwargs()
        if self._outputs == self._task.num_classes:
            return found
        labels = self._task.label_names
        names = [f"head-{o // len(labels)}:{labels[o % len(labels)]}" for o in range(self._outputs)]
        return {**found, "num_labels": self._outputs, "id2label": dict(enumerate(names)),
                "label2id": {name: o for o, name in enumerate(names)}}

    def read(self, outputs_MNO: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits_MNC, whose softmax is the prediction, and M x N the expected entropy if the loss keeps it."""
        members, rows, _ = outputs_MNO.shape
        said = self._loss.predict(outputs_MNO.flatten(0, 1))
        logits_BC = outputs_MNO.flatten(0, 1) if self._outputs == self._task.num_classes else said["log_probs"]
        expected_B = said.get("expected_entropy")
        return logits_BC.view(members, rows, -1), None if expected_B is None else expected_B.view(members, rows)


def read_outputs(task: Task, outputs_MNO: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what members' outputs mean: logits_MNC and, if they say more than those, M x N the expected entropy."""
    return task.read(outputs_MNO) if isinstance(task, StudentTask) else (outputs_MNO, None)


class Lessons:
    """Takes the place of the task's loss while a student trains; no teacher is asked any more."""

    def __init__(self, loss: Loss, targets: ClassificationTargets) -> None:
        self.loss, self.targets = loss, targets

    def losses(self, scores_BO: Tensor, batch: Batch, progress: float) -> Tensor:
        """Return the loss of each example, B, when this share of the training is done.

        Raises:
            DataError: the teacher has not seen an example.
        """
        loss = self.loss.at(progress) if isinstance(self.loss, Annealed) else self.loss
        targets_BMC = self.targets.gather(batch.ids).to(scores_BO.device)
        return loss.per_example(scores_BO, targets_BMC, batch.labels_N)


def read_lessons(spec: RunSpec, store: RunStore, task: Task, content_of: Mapping[str, str]) -> Lessons | None:
    """Return what a run's members are taught, or None for a run that learns from labels alone.

    Args:
        store: the run's; its targets lie in the run around it.
        content_of: example id -> content hash, of every row it trains on.

    Raises:
        DataError: the targets are another teacher's, or were made for other data.
        StoreError: they are missing, incomplete or damaged.
    """
    if spec.lesson is None:
        return None
    targets = load_targets(RunStore(targets_uri(store.uri.rpartition("/")[0], spec.lesson.targets)))
    targets.check(teacher_digest=spec.lesson.teacher, label_names=task.label_names, content_hash_of=content_of)
    return Lessons(registry.load("loss", spec.lesson.loss.kind).build(spec.lesson.loss), targets)


def targets_uri(run_uri: str, key: str) -> str:
    """Return where a run's targets with this key lie."""
    return f"{run_uri}/targets/{key}"


def load_targets(store: RunStore) -> ClassificationTargets:
    """Return all shards of finished targets as one.

    Raises:
        StoreError: they are missing, incomplete or damaged.
    """
    facts = store.read_json("targets.json")
    if facts is None or not facts["done"]:
        raise StoreError(f"{store.uri}: the targets are not complete", "run `raylora distill` again: it continues")
    return merge([
        ClassificationTargets.from_files(store.load_result(f"shards/{name}")) for name in facts["shards"]
    ])
