"""The generalized Jensen-Shannon divergence against a plain formula in float64, its gradient and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raylora.distill import AsksTeacher, loss_functions
from raylora.distill.loss_functions import forward_kl, generalized_jensen_shannon, jensen_shannon, reverse_kl
from raylora.distill.losses import gkd
from raylora.errors import DataError, SpecError

BETAS = [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0]


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(teacher: list[float], student: list[float], beta: float) -> float:
    """Equation 1 of arXiv 2306.13649 in plain Python; at its ends the KLs that it tends to."""
    p, q = ([math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (teacher, student))
    if beta in (0.0, 1.0):
        one, other = (p, q) if beta == 0.0 else (q, p)
        return sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    of_p, of_q = (sum(a * math.log(a / b) for a, b in zip(one, m, strict=True)) for one in (p, q))
    return beta * of_p + (1 - beta) * of_q


@pytest.mark.parametrize("beta", BETAS)
def test_it_equals_the_plain_formula_and_its_gradient_in_float64_and_in_float32(beta: float) -> None:
    teacher_PV, student_PV = randn(6, 9), randn(6, 9, seed=1).requires_grad_(True)

    def of(student: Tensor) -> Tensor:
        return generalized_jensen_shannon(
            torch.log_softmax(teacher_PV.to(student.dtype), -1), torch.log_softmax(student, -1), beta
        )

    found_P = of(student_PV)
    expected = [plain(*rows, beta) for rows in zip(teacher_PV.tolist(), student_PV.tolist(), strict=True)]
    assert found_P.tolist() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(of, (student_PV,))
    (exact_PV,) = torch.autograd.grad(found_P.sum(), student_PV)
    single_PV = student_PV.detach().float().requires_grad_(True)
    (rounded_PV,) = torch.autograd.grad(of(single_PV).sum(), single_PV)
    assert rounded_PV.dtype == torch.float32
    torch.testing.assert_close(rounded_PV.double(), exact_PV, atol=2e-6, rtol=1e-4)


def test_its_limits_are_the_two_kls_and_its_middle_is_jensen_and_shannons() -> None:
    p_PV, q_PV = torch.log_softmax(randn(8, 12), -1), torch.log_softmax(randn(8, 12, seed=1), -1)
    small = 1e-7
    towards_zero = generalized_jensen_shannon(p_PV, q_PV, small) / small
    towards_one = generalized_jensen_shannon(p_PV, q_PV, 1 - small) / small
    torch.testing.assert_close(towards_zero, forward_kl(p_PV, q_PV), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(towards_one, reverse_kl(p_PV, q_PV), rtol=1e-4, atol=1e-6)
    assert torch.equal(generalized_jensen_shannon(p_PV, q_PV, 0.0), forward_kl(p_PV, q_PV))
    assert torch.equal(generalized_jensen_shannon(p_PV, q_PV, 1.0), reverse_kl(p_PV, q_PV))
    torch.testing.assert_close(generalized_jensen_shannon(p_PV, q_PV, 0.5), jensen_shannon(p_PV, q_PV))
    for beta in BETAS[1:-1]:  # bounded by the entropy of a coin of this beta, however far apart they are
        far_PV = torch.tensor([[0.0, -500.0], [-500.0, 0.0]])
        found_P = generalized_jensen_shannon(far_PV, far_PV.flip(0), beta)
        assert found_P.tolist() == pytest.approx([-beta * math.log(beta) - (1 - beta) * math.log(1 - beta)] * 2)
        swapped_P = generalized_jensen_shannon(q_PV, p_PV, 1 - beta)
        torch.testing.assert_close(generalized_jensen_shannon(p_PV, q_PV, beta), swapped_P)
    with pytest.raises(SpecError, match=r"beta 1.5 is not in \[0, 1\]"):
        generalized_jensen_shannon(p_PV, q_PV, 1.5)


def test_the_loss_weighs_it_against_the_label_and_an_own_token_has_none() -> None:
    loss = gkd.build(gkd.Spec(beta=0.3, temperature=2.0, task_weight=0.25))
    assert isinstance(loss, AsksTeacher) and loss.teaches == "tokens" and loss.outputs(7) == 7
    student_PV, teacher_PV = randn(5, 11), randn(5, 11, seed=1)
    labels_P = torch.tensor([3, loss_functions.UNLABELED, 0, 10, loss_functions.UNLABELED])
    apart = [plain([z / 2 for z in t], [z / 2 for z in s], 0.3)
             for t, s in zip(teacher_PV.tolist(), student_PV.tolist(), strict=True)]
    own_P = -torch.log_softmax(student_PV, -1)[range(5), labels_P.clamp(min=0)]
    expected = [0.25 * float(nll) * (label >= 0) + 0.75 * 4 * d
                for nll, label, d in zip(own_P, labels_P.tolist(), apart, strict=True)]
    targets_PV = torch.log_softmax(teacher_PV / 2, -1)
    assert loss.per_example(student_PV, targets_PV, labels_P).tolist() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(DataError, match="the teacher has 5 x 10 positions and tokens, the student 5 x 11"):
        loss.per_example(student_PV, targets_PV[:, :10], labels_P)


def test_it_begins_with_the_kl_that_pulls_a_student_which_rules_out_what_the_teacher_says() -> None:
    loss = gkd.build(gkd.Spec(beta=0.5, warmup=0.25))
    teacher_PV = torch.log_softmax(torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64), -1)
    student_PV = torch.tensor([[-30.0, 30.0, 0.0]], dtype=torch.float64, requires_grad=True)
    slopes = {}
    for progress in (0.0, 0.2, 0.25, 0.9):
        value = loss.at(progress).per_example(student_PV, teacher_PV, None).sum()
        (slope_PV,) = torch.autograd.grad(value, student_PV)
        slopes[progress] = float(slope_PV.abs().max())
        early = progress < 0.25
        assert value.item() == pytest.approx(60.0 if early else math.log(2), rel=1e-3)
    assert slopes[0.0] == slopes[0.2] > 0.9 and slopes[0.25] == slopes[0.9] < 1e-6
