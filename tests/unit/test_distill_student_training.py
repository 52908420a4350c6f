"""One step of a student against float64, and what a student must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from raylora import registry
from raylora.adapters.base import HEAD
from raylora.adapters.packed import stack
from raylora.data.task import UNLABELED
from raylora.distill import ClassificationTargets, Keys
from raylora.engine.training.distillation_loss import DistillationLoss

MakeParts = Callable[..., Any]


def loss_of(parts: Any, logits_NMC: torch.Tensor, **loss: Any) -> DistillationLoss:
    """Return distillation_loss whose targets are given for the training rows, in their order."""
    examples = parts.sets.train.examples
    ids = [example.id for example in examples]
    targets = ClassificationTargets.from_outputs(
        Keys(ids, [parts.sets.train.content_of[i] for i in ids]), logits_NMC, teacher_digest="t",
        members=range(logits_NMC.shape[1]), label_names=parts.task.label_names,
    )
    module = registry.load("loss", loss["kind"])
    return DistillationLoss(parts.task, module.build(module.Spec.model_validate(loss)), targets)


def some_logits(parts: Any, members: int = 3) -> torch.Tensor:
    rows = len(parts.sets.train.examples)
    return torch.randn(rows, members, 2, generator=torch.Generator().manual_seed(0)) * 2


def trained(parts: Any, distillation_loss: DistillationLoss) -> dict[str, Any]:
    trainer = parts.trainer(distillation_loss=distillation_loss)
    trainer.run(lambda trainer: None, lambda progress: None, lambda: 0)
    return {t.plan.name: t.result() for t in trainer.states}


def test_a_step_equals_a_float64_reference(make_parts: MakeParts) -> None:
    parts = make_parts(adapter__dropout=0.0)
    temperature, weight = 3.0, 0.3
    distillation_loss = loss_of(parts, some_logits(parts), kind="kl", temperature=temperature, task_weight=weight)
    members = [parts.member(unit, trained=0.05) for unit in parts.units]
    batches = [parts.batch(0, 5), parts.batch(7, 5)]
    found = parts.model.gradients(
        stack(members), parts.pack(*batches), [0, 0],
        loss=lambda scores, batch: distillation_loss.losses(scores, batch, 0.0),
    )
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(parts.spec.base.source).double().eval()
    weights = {name: weight.detach() for name, weight in dense.named_parameters()}
    for k, (member, batch) in enumerate(zip(members, batches, strict=True)):
        leaves = {name: tensor.double().requires_grad_(True) for name, tensor in member.items()}
        merged = weights | {name.removeprefix(HEAD): leaf for name, leaf in leaves.items() if name.startswith(HEAD)}
        for site in parts.base.sites:
            delta_OI = leaves[f"{site.name}.lora_B"] @ leaves[f"{site.name}.lora_A"] * 8 / 4
            merged[f"{site.name}.weight"] = weights[f"{site.name}.weight"] + delta_OI
        logits = torch.func.functional_call(dense, merged, kwargs=batch.model_inputs()).logits
        teacher = distillation_loss.targets.gather(batch.ids).double()
        p_T = (teacher / temperature).softmax(-1).mean(1)
        log_S = (logits / temperature).log_softmax(-1)
        kl = (p_T * (p_T.log() - log_S)).sum(-1)
        ce = F.cross_entropy(logits, batch.labels_N, reduction="none")
        loss = (weight * ce + (1 - weight) * temperature**2 * kl).mean()
        assert found.losses_K[k] == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), expected in zip(leaves.items(), gradients, strict=True):
            expected = torch.zeros_like(leaf) if expected is None else expected
            torch.testing.assert_close(found.gradients[k][name].double(), expected, atol=2e-6, rtol=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(make_parts: MakeParts) -> None:
    parts = make_parts(adapter__dropout=0.0)
    (unit, *_) = parts.units
    member = stack([parts.member(unit, trained=0.05)])
    batch = parts.task.collate(parts.sets.train.examples, parts.base.tokenizer)
    logits, _ = parts.model.scores(member, batch)
    distillation_loss = loss_of(parts, logits[:, None].half().float(), kind="kl", temperature=2.0, task_weight=0.0)
    found = parts.model.gradients(
        member, parts.pack(batch), [0], loss=lambda scores, joined: distillation_loss.losses(scores, joined, 0.0)
    )
    own = parts.model.gradients(member, parts.pack(batch), [0])
    assert abs(found.losses_K[0]) < 1e-5  # what float16 targets leave
    size = max(float(g.abs().max()) for g in own.gradients[0].values())
    assert max(float(g.abs().max()) for g in found.gradients[0].values()) < 2e-3 * size


def test_the_order_of_the_targets_changes_nothing(make_parts: MakeParts) -> None:
    parts = make_parts()
    distillation_loss = loss_of(parts, some_logits(parts), kind="kl")
    whole = distillation_loss.targets
    order = torch.randperm(len(whole.keys), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = ClassificationTargets(
        keys=Keys([whole.keys.ids[i] for i in order], [whole.keys.content_hashes[i] for i in order]),
        values=whole.values[order], teacher_digest="t", members=whole.members, label_names=whole.label_names,
    )
    permuted = DistillationLoss(parts.task, distillation_loss.loss, shuffled)
    one, two = trained(parts, distillation_loss), trained(parts, permuted)
    for name in one:
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name])


def test_a_task_weight_of_one_is_training_without_a_teacher(make_parts: MakeParts) -> None:
    parts = make_parts()
    with_labels = trained(parts, loss_of(parts, some_logits(parts), kind="kl", task_weight=1.0))
    alone = parts.trainer()
    alone.run(lambda trainer: None, lambda progress: None, lambda: 0)
    for state in alone.states:
        for name, tensor in state.result().items():
            torch.testing.assert_close(with_labels[state.plan.name][name], tensor, atol=1e-6, rtol=1e-5)


def test_rows_without_a_label_learn_from_the_teacher_alone(make_parts: MakeParts) -> None:
    from dataclasses import replace

    parts = make_parts()
    distillation_loss = loss_of(parts, some_logits(parts), kind="kl", task_weight=0.5)
    member = stack([parts.member(parts.units[0], trained=0.05)])
    examples = [replace(e, label=UNLABELED if n % 2 else e.label) for n, e in enumerate(parts.sets.train.examples[:4])]
    batch = parts.task.collate(examples, parts.base.tokenizer)
    scores, joined = parts.model.scores(member, batch)
    of_each = distillation_loss.losses(scores, joined, 0.0)
    without = distillation_loss.loss.per_example(scores, distillation_loss.targets.gather(joined.ids), None)
    assert torch.equal(of_each[1::2], without[1::2]) and bool((of_each[::2] > without[::2]).all())


def test_heat_is_taken_away_while_a_dirichlet_student_trains(make_parts: MakeParts) -> None:
    parts = make_parts()
    distillation_loss = loss_of(parts, some_logits(parts), kind="dirichlet", temperature=5.0, task_weight=0.0)
    batch = parts.batch(0, 4)
    scores, joined = parts.model.scores(
        stack([parts.member(parts.units[0])]), batch
    )
    begun, ended = distillation_loss.losses(scores, joined, 0.0), distillation_loss.losses(scores, joined, 1.0)
    assert not torch.allclose(begun, ended)
    unheated = distillation_loss.loss.per_example(scores, distillation_loss.targets.gather(joined.ids), joined.labels_N)
    assert torch.equal(ended, unheated)
