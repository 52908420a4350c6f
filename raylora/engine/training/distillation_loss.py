"""A student's side of distillation: its head, its loss, and the teacher's targets looked up by example id.

Shapes: K members of one pack, N examples of each, B = K * N, M teacher members, C classes, O outputs of the student.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from raylora import registry
from raylora.data.sets import DataSets, content_hash
from raylora.data.task import Batch, Task, sum_per_example
from raylora.distill import Annealed, Loss, MemberTargets, TokenTargets, WeighsMembers, merge, read_targets
from raylora.engine.model.token_losses import PositionLoss, next_tokens, predicting
from raylora.ensemble.outputs import output_of
from raylora.errors import DataError, SpecError, StoreError
from raylora.spec import KindSpec, RunSpec
from raylora.store.run_store import RunStore


def task_of(spec: RunSpec) -> Task:
    """Return a run's task; a student's has the head that its loss needs."""
    task: Task = registry.load("task", spec.task.kind).build(spec.task)
    return task if spec.distill_from is None else student_task(task, spec.distill_from.loss)


def loss_of(spec: RunSpec) -> Loss | None:
    """Return what a student learns by, or None for a run that has no teacher."""
    if spec.distill_from is None:
        return None
    loss: Loss = registry.load("loss", spec.distill_from.loss.kind).build(spec.distill_from.loss)
    return loss


def student_task(task: Task, loss_spec: KindSpec) -> Task:
    """Return the task as a student of this loss does it.

    Raises:
        SpecError: the loss does not serve the task.
    """
    loss: Loss = registry.load("loss", loss_spec.kind).build(loss_spec)
    if loss.teaches != task.output:
        raise SpecError(
            f"distill.loss: {loss_spec.kind} is for {loss.teaches}, but {task.spec.kind} predicts {task.output}",
            f"use {' or '.join(losses_for(task.output))}",
        )
    if output_of(task.output).per_token:
        return task
    outputs = loss.outputs(task.num_outputs)
    if outputs == task.num_outputs and not loss.reinterprets_logits:
        return task
    if outputs != task.num_outputs and task.auto_class != "AutoModelForSequenceClassification":
        raise SpecError(
            f"distill.loss: {loss_spec.kind} needs {outputs} outputs, but {task.spec.kind} has no head for them",
            "use kl or dirichlet, or task.kind classification",
        )
    return cast(Task, StudentTask(task, loss, outputs))


def losses_for(output: str) -> list[str]:
    """Return the kinds of loss that teach an output."""
    modules = {kind: registry.load("loss", kind) for kind in registry.kinds("loss")}
    return [kind for kind, module in modules.items() if module.build(module.Spec()).teaches == output]


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
        if self._outputs == self._task.num_outputs:
            return found
        labels = self._task.label_names
        names = [f"head-{o // len(labels)}:{labels[o % len(labels)]}" for o in range(self._outputs)]
        return {**found, "num_labels": self._outputs, "id2label": dict(enumerate(names)),
                "label2id": {name: o for o, name in enumerate(names)}}

    def read(self, outputs_MNO: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits_MNC, whose softmax is the prediction, and M x N the expected entropy if the loss keeps it."""
        members, rows, _ = outputs_MNO.shape
        said = self._loss.predict(outputs_MNO.flatten(0, 1))
        logits_BC = outputs_MNO.flatten(0, 1) if self._outputs == self._task.num_outputs else said["log_probs"]
        expected_B = said.get("expected_entropy")
        return logits_BC.view(members, rows, -1), None if expected_B is None else expected_B.view(members, rows)


def read_outputs(task: Task, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what members' outputs mean: logits_MNC or numbers M x N, and the expected entropy M x N if they say it."""
    if isinstance(task, StudentTask):
        return task.read(outputs)
    dimensions = output_of(task.output).predictions.dimensions
    return outputs[..., 0] if outputs.dim() > dimensions else outputs, None


class DistillationLoss:
    """Takes the place of the task's loss while a student trains; no teacher is asked any more."""

    def __init__(self, task: Task, loss: Loss, targets: MemberTargets | TokenTargets) -> None:
        self.task, self.loss, self.targets = task, loss, targets

    def losses(self, logits: Tensor, batch: Batch, progress: float) -> Tensor:
        """Return the loss of each example, B, when this share of the training is done.

        Raises:
            DataError: the teacher has not seen an example.
        """
        assert isinstance(self.targets, MemberTargets)
        targets = self.targets.gather(batch.ids).to(logits.device)
        return self._loss_at(progress).per_example(self.task.scores(logits, batch), targets, batch.labels_N)

    def of_positions(self, batch: Batch, progress: float) -> PositionLoss:
        """Return the loss of the positions that predict a batch's target tokens, of a student taught token by token.

        Raises:
            DataError: the teacher has not seen an example, or not these tokens of it.
        """
        assert isinstance(self.targets, TokenTargets)
        found, lengths = self.targets.gather(batch.ids)
        predicting_BT = predicting(batch)
        if lengths != sum_per_example(predicting_BT.long(), batch).tolist():
            raise DataError("the teacher read other tokens than the student", "both need the same tokenizer")
        loss, targets, labels_P = self._loss_at(progress), found.to(predicting_BT.device), next_tokens(batch)
        return lambda logits_CV, chunk: loss.per_example(logits_CV, targets[chunk], labels_P[chunk])

    def _loss_at(self, progress: float) -> Loss:
        return self.loss.at(progress) if isinstance(self.loss, Annealed) else self.loss


def taught_content(sets: DataSets, task: Task) -> dict[str, str]:
    """Return training example -> hash of what a teacher reads: the text or, token by token, the tokens."""
    if not output_of(task.output).per_token:
        return dict(sets.train.content_of)
    return {example.id: content_hash(str(example.sequences)) for example in sets.train.examples}


def read_distillation_loss(spec: RunSpec, store: RunStore, task: Task, sets: DataSets) -> DistillationLoss | None:
    """Return what a run's members are taught, or None for a run that learns from labels alone.

    Args:
        store: the run's; its targets lie in the run around it.

    Raises:
        DataError: the targets are another teacher's, or were made for other data.
        StoreError: they are missing, incomplete or damaged.
    """
    loss, distill_from = loss_of(spec), spec.distill_from
    if loss is None or distill_from is None:
        return None
    assert distill_from.targets is not None
    targets = load_targets(RunStore(targets_uri(store.uri.rpartition("/")[0], distill_from.targets)))
    content_of = taught_content(sets, task)
    if isinstance(targets, TokenTargets):
        targets.check(
            teacher_digest=distill_from.teacher, vocabulary=targets.vocabulary, temperature=loss.spec.temperature,
            content_hash_of=content_of,
        )
    else:
        targets.check(teacher_digest=distill_from.teacher, label_names=task.label_names, content_hash_of=content_of)
        if targets.weights is not None and isinstance(loss, WeighsMembers):
            loss = loss.weighing(targets.weights)
    return DistillationLoss(task, loss, targets)


def targets_uri(run_uri: str, key: str) -> str:
    """Return where a run's targets with this key lie."""
    return f"{run_uri}/targets/{key}"


def load_targets(store: RunStore) -> MemberTargets | TokenTargets:
    """Return all shards of finished targets as one; those of tokens are read when they are asked for.

    Raises:
        StoreError: they are missing, incomplete or damaged.
    """
    facts = store.read_json("targets.json")
    if facts is None or not facts["done"]:
        raise StoreError(f"{store.uri}: the targets are not complete", "run `raylora distill` again: it continues")
    if facts["tokens"] is not None:
        return TokenTargets(lambda file: _read_shard_file(store, file), facts["shards"])
    return merge([read_targets(store.load_shared(f"shards/{name}")) for name in facts["shards"]])


def _read_shard_file(store: RunStore, file: str) -> bytes:
    folder = f"shards/{_shard_of(file)}"
    there = store.folder_here(folder)
    return store.storage.read(f"{folder}/{file}") if there is None else (there / file).read_bytes()


def _shard_of(file: str) -> str:
    """Return the shard that a file of token targets belongs to: ``rows-A-B.json``, ``rows-A-B-00000.safetensors``."""
    return "-".join(file.partition(".")[0].split("-")[:3])
