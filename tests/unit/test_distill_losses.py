"""The distillation losses against plain float64 references, and against the mistakes usually made with them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from raylora.distill import loss_functions as losses
from raylora.distill.losses import dirichlet, js, kl, mse, multi_head, reverse_kl, topk_kl
from raylora.distill.topk import top_k
from raylora.errors import SpecError

KINDS = {
    "kl": kl, "reverse_kl": reverse_kl, "js": js, "mse": mse, "dirichlet": dirichlet, "multi_head": multi_head,
    "topk_kl": topk_kl,
}
SOFT = {"kl": losses.forward_kl, "reverse_kl": losses.reverse_kl, "js": losses.jensen_shannon}


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    weights = [math.exp((z - top) / temperature) for z in row]
    return [w / sum(weights) for w in weights]


def kl_of(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference(kind: str, student: list[float], members: list[list[float]], label: int, t: float, a: float) -> float:
    """Plain Python, one example."""
    each = [softmax(z, t) for z in members]
    p = [sum(column) / len(members) for column in zip(*each, strict=True)]
    q = softmax(student, t)
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    apart = {"kl": kl_of(p, q), "reverse_kl": kl_of(q, p), "js": kl_of(p, m) / 2 + kl_of(q, m) / 2}[kind]
    task = -math.log(softmax(student, 1.0)[label]) if label >= 0 else 0.0
    return a * task + (1 - a) * t * t * apart


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_divergence_kinds_equal_the_plain_reference_and_skip_the_task_term_of_unlabeled_rows(
    kind: str, temperature: float
) -> None:
    members_BMC, student_BC, labels_B = randn(6, 3, 4), randn(6, 4, seed=1), torch.tensor([0, 3, -1, 2, -1, 1])
    loss = KINDS[kind].build(KINDS[kind].Spec(temperature=temperature, task_weight=0.3))
    expected = [
        reference(kind, student_BC[b].tolist(), members_BMC[b].tolist(), int(labels_B[b]), temperature, 0.3)
        for b in range(6)
    ]
    assert loss.per_example(student_BC, members_BMC, labels_B).tolist() == pytest.approx(expected, rel=1e-10)
    single = loss.per_example(student_BC.float(), members_BMC.float(), labels_B)
    assert single.dtype == torch.float32 and single.tolist() == pytest.approx(expected, rel=1e-4)


def test_kl_agrees_with_torch_in_its_argument_order_and_not_in_the_other() -> None:
    members_BMC, student_BC = randn(5, 2, 3), randn(5, 3, seed=1)
    loss = kl.build(kl.Spec(temperature=2.0, task_weight=0.0)).per_example(student_BC, members_BMC, None)
    teacher_BC = torch.softmax(members_BMC / 2, -1).mean(1)
    student_logp_BC = torch.log_softmax(student_BC / 2, -1)
    # torch's first argument is the *student's* log-probabilities; "batchmean" is the mean of examples
    right = 4 * F.kl_div(student_logp_BC, teacher_BC, reduction="batchmean")
    swapped = 4 * F.kl_div(teacher_BC.log(), student_logp_BC.exp(), reduction="batchmean")
    assert loss.mean().item() == pytest.approx(right.item())
    assert abs(loss.mean().item() - swapped.item()) > 0.05
    assert loss.mean().item() == pytest.approx(3 * 4 * F.kl_div(student_logp_BC, teacher_BC, reduction="none").mean())
    backwards = reverse_kl.build(reverse_kl.Spec(temperature=2.0, task_weight=0.0))
    assert backwards.per_example(student_BC, members_BMC, None).mean().item() == pytest.approx(swapped.item())


@pytest.mark.parametrize("kind", SOFT)
def test_t_squared_keeps_the_gradient_of_one_size_over_temperatures(kind: str) -> None:
    members_BMC, start_BC = randn(32, 3, 5, scale=0.5), randn(32, 5, seed=1, scale=0.5)
    norms = {}
    for temperature in (4.0, 8.0, 16.0, 32.0):
        student_BC = start_BC.clone().requires_grad_(True)
        loss = KINDS[kind].build(KINDS[kind].Spec(temperature=temperature, task_weight=0.0))
        loss.per_example(student_BC, members_BMC, None).sum().backward()
        assert student_BC.grad is not None
        norms[temperature] = student_BC.grad.norm().item()
    assert norms[32.0] / norms[4.0] == pytest.approx(1, rel=0.1)  # without the factor it would be 1/64
    if kind == "kl":  # Hinton et al., equation 4: for high T the gradient is (z - v) / C of centered logits
        apart_BC = start_BC - members_BMC.mean(1)
        centered_BC = apart_BC - apart_BC.mean(1, keepdim=True)
        assert norms[32.0] == pytest.approx((centered_BC / 5).norm().item(), rel=0.05)


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(kind: str, dtype: torch.dtype) -> None:
    student_BC = randn(7, 4).to(dtype).requires_grad_(True)
    members_BMC = student_BC.detach()[:, None].expand(-1, 3, -1)
    loss = KINDS[kind].build(KINDS[kind].Spec(task_weight=0.0)).per_example(student_BC, members_BMC, None)
    loss.sum().backward()
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    assert student_BC.grad is not None and loss.abs().max() < limit and student_BC.grad.abs().max() < limit


def test_a_mixture_tempers_each_member_and_then_averages() -> None:
    members_BMC = torch.tensor([[[4.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    p = (softmax([4.0, 0.0], 2.0)[0] + softmax([0.0, 2.0], 2.0)[0]) / 2
    assert losses.tempered_mixture(members_BMC, 2.0).exp()[0].tolist() == pytest.approx([p, 1 - p])
    averaged_first = (torch.softmax(members_BMC, -1).mean(1).log() / 2).softmax(-1)
    assert abs(averaged_first[0, 0].item() - p) > 0.01
    one_by_one = losses.mixture((members_BMC[:, m] for m in range(2)), 2.0)
    assert torch.equal(one_by_one, losses.tempered_mixture(members_BMC, 2.0))
    with pytest.raises(SpecError, match="no members"):
        losses.mixture([], 1.0)


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("size", [80.0, 65504.0])
def test_extreme_logits_give_finite_losses_and_gradients(kind: str, size: float) -> None:
    student_BC = torch.tensor([[size, -size, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    members_BMC = torch.tensor([[[-size, size, 0.0]], [[size, -size, -size]]])
    loss = KINDS[kind].build(KINDS[kind].Spec(temperature=0.5, task_weight=0.5))
    found_B = loss.per_example(student_BC, members_BMC, torch.tensor([1, 0]))
    found_B.sum().backward()
    assert student_BC.grad is not None and found_B.isfinite().all() and student_BC.grad.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    members_BMC, student_BC = randn(4, 2, 3).bfloat16(), randn(4, 3, seed=1).bfloat16()
    loss = kl.build(kl.Spec())
    found_B = loss.per_example(student_BC, members_BMC, torch.tensor([0, 1, 2, -1]))
    assert found_B.dtype == torch.float32
    assert torch.equal(found_B, loss.per_example(student_BC.float(), members_BMC.float(), torch.tensor([0, 1, 2, -1])))


def test_weights_one_and_zero_leave_one_term_alone() -> None:
    members_BMC, student_BC, labels_B = randn(5, 2, 3), randn(5, 3, seed=1), torch.tensor([0, 1, 2, 0, -1])
    alone = kl.build(kl.Spec(task_weight=1.0)).per_example(student_BC, members_BMC, labels_B)
    assert torch.allclose(alone[:4], F.cross_entropy(student_BC[:4], labels_B[:4], reduction="none"))
    assert alone[4] == 0
    taught = kl.build(kl.Spec(task_weight=0.0))
    assert torch.equal(
        taught.per_example(student_BC, members_BMC, labels_B), taught.per_example(student_BC, members_BMC, None)
    )


def test_js_is_symmetric_bounded_and_near_the_teacher_a_quarter_of_the_kl() -> None:
    p, q = torch.log_softmax(randn(50, 4, scale=20), -1), torch.log_softmax(randn(50, 4, seed=1, scale=20), -1)
    assert torch.allclose(losses.jensen_shannon(p, q), losses.jensen_shannon(q, p))
    assert losses.jensen_shannon(p, q).max() <= math.log(2) + 1e-12
    near = torch.log_softmax(p / 20 + 1e-3 * randn(50, 4, seed=2), -1)
    p = torch.log_softmax(p / 20, -1)
    assert torch.allclose(losses.jensen_shannon(p, near), losses.forward_kl(p, near) / 4, rtol=0.01)


def test_the_plain_function_refuses_what_the_specs_refuse() -> None:
    student_BC, teacher_BC = randn(2, 3), torch.log_softmax(randn(2, 3), -1)
    with pytest.raises(SpecError, match="temperature 0.0 is not positive"):
        losses.kd_loss(student_BC, teacher_BC, None, 0.0, 0.5)
    with pytest.raises(SpecError, match=r"task_weight 1.5 is not in \[0, 1\]"):
        losses.kd_loss(student_BC, teacher_BC, None, 1.0, 1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_specs_are_frozen_values_that_name_their_kind_and_refuse_wrong_fields(kind: str) -> None:
    spec = KINDS[kind].Spec()
    assert spec.kind == kind and KINDS[kind].Spec.model_validate(spec.model_dump()) == spec
    wrong: list[dict[str, object]] = [{"task_weight": 1.1}, {"task_weight": -0.1}, {"tmperature": 2}, {"kind": "other"}]
    if kind != "mse":
        wrong += [{"temperature": 0}, {"temperature": -1}, {"temperature": math.inf}]
    for fields in wrong:
        with pytest.raises(ValidationError, match=next(iter(fields))):
            KINDS[kind].Spec(**fields)
    with pytest.raises(ValidationError, match="frozen"):
        spec.task_weight = 0.1


def sample(kind: str, examples: int = 8, classes: int = 5) -> tuple[Tensor, object, Tensor]:
    """Return a student's outputs, targets and labels that suit a kind; the last example has no label."""
    labels = torch.arange(examples) % classes
    labels[-1] = -1
    if kind == "mse":
        values_B = randn(examples, seed=2)
        values_B[-1] = math.nan
        return randn(examples, 1), randn(examples, 3, seed=1), values_B
    if kind == "topk_kl":
        return randn(examples, classes), top_k(torch.log_softmax(randn(examples, classes, seed=1), -1), 3), labels
    outputs = KINDS[kind].build(KINDS[kind].Spec()).outputs(classes)
    return randn(examples, outputs), randn(examples, 3, classes, seed=1), labels


def pick(targets: object, rows: Tensor) -> object:
    if isinstance(targets, Tensor):
        return targets[rows]
    return type(targets)(  # type: ignore[call-arg]
        targets.index_PK[rows], targets.logp_PK[rows], targets.tail_P[rows], targets.vocabulary,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_per_example_move_with_it_and_depend_on_no_other(kind: str) -> None:
    loss = KINDS[kind].build(KINDS[kind].Spec())
    outputs, targets, labels = sample(kind)
    found_B = loss.per_example(outputs, targets, labels)
    assert found_B.shape == (8,) and found_B.isfinite().all()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(loss.per_example(outputs[order], pick(targets, order), labels[order]), found_B[order])
    alone = torch.cat([
        loss.per_example(outputs[b : b + 1], pick(targets, torch.tensor([b])), labels[b : b + 1]) for b in range(8)
    ])
    assert torch.allclose(alone, found_B, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unlabeled_example_keeps_its_distillation_term_at_its_weight(kind: str) -> None:
    outputs, targets, labels = sample(kind)
    found_B = KINDS[kind].build(KINDS[kind].Spec(task_weight=0.25)).per_example(outputs, targets, labels)
    taught_B = KINDS[kind].build(KINDS[kind].Spec(task_weight=0.0)).per_example(outputs, targets, None)
    assert found_B[-1].item() == pytest.approx(0.75 * taught_B[-1].item())
    no_labels_B = KINDS[kind].build(KINDS[kind].Spec(task_weight=0.25)).per_example(outputs, targets, None)
    assert torch.allclose(no_labels_B, 0.75 * taught_B)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"mse"}))
def test_predictions_are_distributions_with_their_entropy(kind: str) -> None:
    outputs, _, _ = sample(kind)
    found = KINDS[kind].build(KINDS[kind].Spec()).predict(outputs)
    p_BC = found["log_probs"].exp()
    assert p_BC.shape == (8, 5) and torch.allclose(p_BC.sum(-1), torch.ones(8).double())
    assert torch.allclose(found["entropy"], -(p_BC * p_BC.log()).sum(-1))
    keeps_disagreement = kind in ("dirichlet", "multi_head")
    assert ("mutual_information" in found) == keeps_disagreement
    if keeps_disagreement:
        assert found["mutual_information"].min() >= 0
        assert torch.allclose(found["expected_entropy"] + found["mutual_information"], found["entropy"])


def test_regression_is_taught_the_members_mean_and_a_missing_label_has_no_gradient() -> None:
    loss = mse.build(mse.Spec(task_weight=0.25))
    student_B1 = torch.tensor([[1.0], [2.0]], requires_grad=True)
    targets_BM, labels_B = torch.tensor([[0.0, 4.0], [1.0, 1.0]]), torch.tensor([3.0, math.nan])
    found_B = loss.per_example(student_B1, targets_BM, labels_B)
    assert found_B.tolist() == pytest.approx([0.25 * 4 + 0.75 * 1, 0.75 * 1])
    found_B.sum().backward()
    assert student_B1.grad is not None
    assert student_B1.grad.flatten().tolist() == pytest.approx([0.25 * 2 * -2 + 0.75 * 2 * -1, 0.75 * 2])
    assert loss.outputs(1) == 1 and loss.predict(student_B1.detach())["value"].tolist() == [1.0, 2.0]
    with pytest.raises(SpecError, match="not for 3 classes"):
        loss.outputs(3)
