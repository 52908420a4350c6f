"""The ensemble's prediction, its uncertainty and the checks on what goes in."""

from __future__ import annotations

import math

import pytest
import torch
from ensemble_fakes import fake_logits

from raylora.ensemble import aggregate_logits, decompose, mean_logits, mean_probabilities, pairwise_kl
from raylora.ensemble.outputs.classes import ClassPredictions
from raylora.ensemble.outputs.tokens import TokenPredictions
from raylora.errors import DataError, RayloraError, SpecError


def test_mean_of_probabilities_by_hand():
    logits_MNC = torch.log(torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]]))
    assert mean_probabilities(logits_MNC).exp().tolist() == [pytest.approx([0.6, 0.4])]
    geometric = [math.sqrt(0.9 * 0.3), math.sqrt(0.1 * 0.7)]
    assert mean_logits(logits_MNC).exp().tolist() == [pytest.approx([value / sum(geometric) for value in geometric])]


def test_the_two_rules_are_different_ensembles_and_an_unknown_one_is_refused():
    logits_MNC, _ = fake_logits(4, 30, 3, seed=0)
    difference = aggregate_logits(logits_MNC, "mean_probabilities") - aggregate_logits(logits_MNC, "mean_logits")
    assert difference.abs().max() > 0.1
    with pytest.raises(SpecError, match="did you mean 'mean_logits'"):
        aggregate_logits(logits_MNC, "mean_logit")


def test_float64_survives_logits_that_underflow_float32():
    logits_MNC = torch.tensor([[[0.0, -300.0]], [[0.0, -400.0]]])
    log_probs = mean_probabilities(logits_MNC)
    assert log_probs.dtype == torch.float64
    assert log_probs[0, 1].item() == pytest.approx(-300.0 - math.log(2))


def test_temperature_may_differ_per_member_and_must_be_positive():
    logits_MNC, _ = fake_logits(2, 5, 3, seed=1)
    per_member = mean_probabilities(logits_MNC, torch.tensor([2.0, 0.5]))
    by_hand = (torch.softmax(logits_MNC[0].double() / 2, -1) + torch.softmax(logits_MNC[1].double() / 0.5, -1)) / 2
    assert torch.allclose(per_member.exp(), by_hand)
    with pytest.raises(ValueError, match="positive"):
        mean_probabilities(logits_MNC, 0.0)


def test_identical_members_equal_one_member_and_have_no_epistemic_part():
    logits_1NC, _ = fake_logits(1, 50, 4, seed=2)
    logits_MNC = logits_1NC.expand(5, -1, -1)
    for rule in ("mean_probabilities", "mean_logits"):
        assert torch.allclose(aggregate_logits(logits_MNC, rule), aggregate_logits(logits_1NC, rule), atol=1e-12)
    parts = decompose(logits_MNC)
    assert parts.mutual_information_N.max() < 1e-12
    assert parts.disagreement_N.max() == 0
    assert pairwise_kl(logits_MNC).max() < 1e-12


def test_decomposition_by_hand():
    logits_MNC = torch.log(torch.tensor([[[0.5, 0.5]], [[1.0 - 1e-12, 1e-12]]], dtype=torch.float64))
    parts = decompose(logits_MNC)
    predictive = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert parts.predictive_entropy_N.item() == pytest.approx(predictive)
    assert parts.expected_entropy_N.item() == pytest.approx(math.log(2) / 2)
    assert parts.mutual_information_N.item() == pytest.approx(predictive - math.log(2) / 2)


def test_mutual_information_is_never_negative_and_parts_add_up():
    parts = decompose(fake_logits(6, 400, 5, seed=3)[0])
    assert parts.mutual_information_N.min() >= 0
    total_N = parts.expected_entropy_N + parts.mutual_information_N
    assert torch.allclose(total_N, parts.predictive_entropy_N, atol=1e-12)


def test_disagreement_is_the_share_of_pairs_that_differ():
    choices = torch.tensor([[0, 0], [0, 1], [1, 2]])  # 3 members, 2 rows: 2 of 3 pairs differ, then all
    parts = decompose(torch.nn.functional.one_hot(choices, 3).float() * 5)
    assert parts.disagreement_N.tolist() == pytest.approx([2 / 3, 1.0])


def test_pairwise_kl_against_torch():
    logits_MNC, _ = fake_logits(3, 40, 4, seed=4)
    kl_MM, log_probs_MNC = pairwise_kl(logits_MNC), torch.log_softmax(logits_MNC.double(), -1)
    expected = torch.nn.functional.kl_div(log_probs_MNC[2], log_probs_MNC[0], log_target=True, reduction="batchmean")
    assert kl_MM[0, 2].item() == pytest.approx(expected.item(), rel=1e-12)
    assert kl_MM.diagonal().tolist() == [0, 0, 0]


def test_the_order_of_members_changes_nothing():
    logits_MNC, _ = fake_logits(5, 60, 3, seed=5)
    shuffled_MNC = logits_MNC[[3, 0, 4, 1, 2]]
    for rule in ("mean_probabilities", "mean_logits"):
        assert torch.allclose(aggregate_logits(logits_MNC, rule), aggregate_logits(shuffled_MNC, rule), atol=1e-12)
    assert torch.allclose(decompose(logits_MNC).disagreement_N, decompose(shuffled_MNC).disagreement_N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.full((2, 3, 2), float("nan"))}, r"members \[0, 1\] predict NaN"),
        ({"values": torch.zeros(2, 0, 2)}, "is empty"),
        ({"values": torch.zeros(2, 3, 1)}, "one class"),
        ({"values": torch.zeros(3, 2)}, "dimensions"),
        ({"labels_N": torch.tensor([0, 1, 2])}, r"labels range over 0..2, but there are 2 classes"),
        ({"labels_N": torch.tensor([0, -1, 1])}, "labels range over -1..1"),
        ({"labels_N": torch.tensor([0.0, 1.0, 1.0])}, "floating point"),
        ({"labels_N": torch.tensor([0, 1])}, "labels of shape"),
        ({"ids": ["a"]}, "1 ids for 3"),
        ({"role": "train"}, "unknown role 'train'"),
    ],
)
def test_bad_predictions_are_refused_by_name(change, message):
    good = {"name": "mine", "role": "test", "ids": ["a", "b", "c"], "values": torch.zeros(2, 3, 2)}
    ClassPredictions(**good)
    with pytest.raises(DataError, match=message) as caught:
        ClassPredictions(**(good | change))
    assert "'mine'" in str(caught.value)


def test_what_is_no_log_probability_is_refused():
    with pytest.raises(DataError, match="above zero"):
        TokenPredictions(name="mine", role="test", ids=["a", "a", "b"], values=torch.ones(2, 3))


def test_one_broken_member_is_named():
    logits_MNC = torch.zeros(3, 4, 2)
    logits_MNC[1, 2, 0] = float("inf")
    with pytest.raises(DataError, match=r"members \[1\]"):
        ClassPredictions(name="test", role="test", ids=list("abcd"), values=logits_MNC)


def test_a_negative_quantity_that_is_not_rounding_noise_is_a_bug():
    from raylora.ensemble.uncertainty import non_negative

    assert non_negative(torch.tensor([-1e-12, 1.0]), "thing").tolist() == [0.0, 1.0]
    with pytest.raises(RayloraError, match="thing"):
        non_negative(torch.tensor([-1e-6]), "thing")
