"""Students that keep the members' disagreement: a Dirichlet, or one head per member."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet

from raylora.distill import Annealed
from raylora.distill.losses import dirichlet, multi_head
from raylora.distill.losses.dirichlet import concentrations, dirichlet_nll, smoothed
from raylora.distill.uncertainty import of_dirichlet, of_heads
from raylora.errors import SpecError


def randn(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dirichlet_nll_equals_the_density_by_hand_and_torchs() -> None:
    log_alpha_BC, logp_BMC = randn(6, 4), torch.log_softmax(randn(6, 3, 4, seed=1), -1)
    found_B = dirichlet_nll(log_alpha_BC, logp_BMC)
    for b in range(6):
        alpha = log_alpha_BC[b].exp().tolist()
        constant = math.lgamma(sum(alpha)) - sum(map(math.lgamma, alpha))
        log_density = [
            constant + sum((a - 1) * x for a, x in zip(alpha, logp, strict=True)) for logp in logp_BMC[b].tolist()
        ]
        assert found_B[b].item() == pytest.approx(-sum(log_density) / 3, rel=1e-10)
    torchs = -Dirichlet(log_alpha_BC.exp()[:, None]).log_prob(logp_BMC.exp()).mean(1)
    assert torch.allclose(found_B, torchs)


def test_dirichlet_student_recovers_the_distribution_that_the_members_were_drawn_from() -> None:
    torch.manual_seed(0)
    alpha_C = torch.tensor([6.0, 2.5, 1.2], dtype=torch.float64)
    members_BMC = Dirichlet(alpha_C).sample((1, 8000)).log()
    loss = dirichlet.build(dirichlet.Spec(task_weight=0.0, smoothing=1e-9))
    student_BC = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([student_BC], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> float:
        optimizer.zero_grad()
        value = loss.per_example(student_BC, members_BMC, None).sum()
        value.backward()
        return value.item()

    optimizer.step(step)
    assert student_BC.detach().exp()[0].tolist() == pytest.approx(alpha_C.tolist(), rel=0.05)
    assert student_BC.grad is not None and student_BC.grad.abs().max() < 1e-4  # the likelihood's stationary point
    # the student's disagreement is that of the members, from the members' own probabilities
    p_MC = members_BMC[0].exp()
    apart = -(p_MC.mean(0) * p_MC.mean(0).log()).sum() + (p_MC * p_MC.log()).sum(-1).mean()
    found = loss.predict(student_BC.detach())
    assert found["mutual_information"].item() == pytest.approx(apart.item(), rel=0.05)
    assert found["log_probs"].exp()[0].tolist() == pytest.approx(p_MC.mean(0).tolist(), abs=0.01)


def test_dirichlet_entropies_in_closed_form_equal_sampled_ones() -> None:
    torch.manual_seed(0)
    log_alpha_BC = torch.tensor([[0.0, 1.0, 2.0], [-2.0, -1.0, 0.5], [3.0, 3.0, 3.0]], dtype=torch.float64)
    found = of_dirichlet(log_alpha_BC)
    p_SBC = Dirichlet(log_alpha_BC.exp()).sample((200_000,))
    sampled_B = -torch.xlogy(p_SBC, p_SBC).sum(-1).mean(0)
    assert found["expected_entropy"].tolist() == pytest.approx(sampled_B.tolist(), abs=3e-3)
    assert found["log_probs"].exp().flatten().tolist() == pytest.approx(p_SBC.mean(0).flatten().tolist(), abs=3e-3)


def test_precision_alone_tells_disagreement_and_it_is_never_negative() -> None:
    base_BC = randn(200, 6, scale=3)
    by_precision = [of_dirichlet(base_BC + shift)["mutual_information"] for shift in (-30.0, -3.0, 0.0, 3.0, 300.0)]
    assert all(found_B.min() >= 0 and found_B.isfinite().all() for found_B in by_precision)
    assert all((more_B >= less_B).all() for more_B, less_B in zip(by_precision, by_precision[1:], strict=False))
    assert by_precision[-1].max() < 1e-9
    assert torch.equal(by_precision[-1], by_precision[-1].clamp(min=0))


def test_the_mean_is_an_ordinary_softmax_whatever_the_precision() -> None:
    student_BC = randn(20, 4, scale=8)
    found = dirichlet.build(dirichlet.Spec(max_precision=50.0)).predict(student_BC)
    assert torch.allclose(found["log_probs"], torch.log_softmax(student_BC, -1))
    assert concentrations(student_BC, 1.0, 50.0).exp().sum(-1).max() <= 50.0 + 1e-9


@pytest.mark.parametrize("size", [100.0, 5000.0])
def test_dirichlet_is_finite_for_members_in_the_corners_and_extreme_students(size: float) -> None:
    student_BC = torch.tensor([[size, -size, 0.0], [-size, -size, -size], [size, size, size]], requires_grad=True)
    members_BMC = torch.tensor([[[size, -size, -size], [-size, size, -size]]] * 3)
    found_B = dirichlet.build(dirichlet.Spec()).per_example(student_BC, members_BMC, torch.tensor([0, 1, -1]))
    found_B.sum().backward()
    assert found_B.dtype == torch.float32 and found_B.isfinite().all()
    assert student_BC.grad is not None and student_BC.grad.isfinite().all()


def test_members_that_agree_drive_the_precision_to_its_bound_and_no_further() -> None:
    loss = dirichlet.build(dirichlet.Spec(task_weight=0.0, max_precision=100.0))
    members_BMC = torch.tensor([[[1.0, 0.0, -1.0]] * 4], dtype=torch.float64)
    student_BC = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([student_BC], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss.per_example(student_BC, members_BMC, None).sum().backward()
        optimizer.step()
    log_alpha_BC = concentrations(student_BC.detach(), 1.0, 100.0)
    assert log_alpha_BC.exp().sum().item() == pytest.approx(100.0, rel=0.01)
    wanted = torch.softmax(members_BMC[0, 0], -1).tolist()
    assert torch.softmax(student_BC.detach(), -1)[0].tolist() == pytest.approx(wanted, abs=0.01)


def test_smoothing_keeps_a_distribution_away_from_zero() -> None:
    log_probs = torch.log_softmax(torch.tensor([[0.0, -5000.0, -3.0]]), -1)
    found = smoothed(log_probs, 1e-3).exp()
    assert found.sum().item() == pytest.approx(1.0, abs=1e-6) and found.min().item() == pytest.approx(1e-3 / 3)
    by_hand = 0.999 * log_probs.double().exp() + 1e-3 / 3
    assert torch.allclose(found, by_hand, rtol=1e-6)


def test_annealing_ends_at_temperature_one_and_forgetting_it_does_no_harm() -> None:
    loss = dirichlet.build(dirichlet.Spec(temperature=5.0, annealed_over=0.5))
    assert isinstance(loss, Annealed) and not isinstance(multi_head.build(multi_head.Spec()), Annealed)
    assert [loss.at(p).temperature for p in (0.0, 0.25, 0.5, 1.0)] == [5.0, 3.0, 1.0, 1.0]
    assert loss.temperature == 1.0
    student_BC, members_BMC = randn(4, 3), randn(4, 2, 3, seed=1)
    ended_B = loss.at(1.0).per_example(student_BC, members_BMC, None)
    assert torch.equal(ended_B, loss.per_example(student_BC, members_BMC, None))
    hot_B = loss.at(0.0).per_example(student_BC, members_BMC, None)
    by_hand = -25 * Dirichlet((student_BC / 5).exp()[:, None]).log_prob(
        0.999 * torch.softmax(members_BMC / 5, -1) + 1e-3 / 3
    ).mean(1)
    assert torch.allclose(hot_B, 0.5 * by_hand)


def test_each_head_is_taught_by_its_own_member() -> None:
    loss = multi_head.build(multi_head.Spec(heads=4, task_weight=0.0, temperature=2.0))
    members_BMC = randn(5, 2, 3)
    assert loss.outputs(3) == 12
    perfect = members_BMC[:, [0, 1, 0, 1]].flatten(1).requires_grad_(True)
    found_B = loss.per_example(perfect, members_BMC, None)
    found_B.sum().backward()
    assert perfect.grad is not None and found_B.abs().max() < 1e-14 and perfect.grad.abs().max() < 1e-14
    assert loss.per_example(members_BMC[:, [1, 0, 0, 1]].flatten(1), members_BMC, None).min() > 0.01


def test_multi_head_equals_its_reference_with_labels() -> None:
    loss = multi_head.build(multi_head.Spec(heads=3, task_weight=0.4, temperature=2.0))
    members_BMC, outputs_BO, labels_B = randn(5, 3, 4), randn(5, 12, seed=1), torch.tensor([0, 1, -1, 3, 2])
    heads_BHC = outputs_BO.view(5, 3, 4)
    p, q = torch.softmax(members_BMC / 2, -1), torch.softmax(heads_BHC / 2, -1)
    kl_B = (p * (p / q).log()).sum(-1).mean(1)
    nll_BH = -torch.log_softmax(heads_BHC, -1)[torch.arange(5), :, labels_B.clamp(min=0)]
    expected_B = 0.4 * torch.where(labels_B >= 0, nll_BH.mean(1), 0.0) + 0.6 * 4 * kl_B
    assert torch.allclose(loss.per_example(outputs_BO, members_BMC, labels_B), expected_B)


def test_heads_report_the_members_disagreement() -> None:
    members_BMC = randn(10, 4, 3)
    found = of_heads(members_BMC)
    p = torch.softmax(members_BMC, -1)
    mean = p.mean(1)
    assert torch.allclose(found["log_probs"].exp(), mean)
    apart_B = -(mean * mean.log()).sum(-1) + (p * p.log()).sum(-1).mean(1)
    assert torch.allclose(found["mutual_information"], apart_B)
    same = of_heads(members_BMC[:, :1].expand(-1, 4, -1))
    assert same["mutual_information"].min() >= 0 and same["mutual_information"].max() < 1e-12


def test_fewer_heads_than_members_are_refused() -> None:
    with pytest.raises(SpecError, match="last 2 would not be used") as caught:
        multi_head.build(multi_head.Spec(heads=3)).per_example(randn(2, 6), randn(2, 5, 2), None)
    assert "set heads to 5" in caught.value.hint
