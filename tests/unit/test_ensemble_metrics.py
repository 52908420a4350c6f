"""Metrics against hand-computed values and against torchmetrics and scikit-learn; bootstrap; temperature; detection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ensemble_fakes import fake_logits
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from raylora.ensemble import evaluate, fit_temperature, mean_probabilities
from raylora.ensemble.bootstrap import bootstrap_metrics, bootstrap_token_nll, interval, row_draws
from raylora.ensemble.metrics import CLASS_METRICS, draw_metrics, point_metrics, reliability_bins, score_rows
from raylora.ensemble.ood import auroc, bootstrap_auroc, foreign_scores, histograms
from raylora.errors import DataError


def hand_example():
    probs_NC = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.45, 0.55]], dtype=torch.float64)
    return probs_NC.log(), torch.tensor([0, 1, 1, 0])  # right, wrong, right, wrong


def test_metrics_by_hand():
    found = evaluate(*hand_example(), bins=10)
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.6) + math.log(0.45)) / 4)
    assert found["brier"] == pytest.approx((2 * 0.01 + 2 * 0.64 + 2 * 0.16 + 2 * 0.55**2) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.4 + 0.55) / 4)  # every row has a bin of its own
    assert evaluate(*hand_example(), bins=2)["adaptive_ece"] == pytest.approx((abs(-0.55 + 0.4) + abs(-0.8 + 0.1)) / 4)
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)


def test_metrics_against_libraries():
    logits_MNC, labels_N = fake_logits(3, 500, 5, seed=0)
    log_probs_NC = mean_probabilities(logits_MNC)
    found, probs_NC = evaluate(log_probs_NC, labels_N), log_probs_NC.exp()
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(probs_NC, labels_N, 5, average="micro").item())
    assert found["ece"] == pytest.approx(multiclass_calibration_error(probs_NC, labels_N, 5, 15).item(), abs=1e-6)
    assert found["nll"] == pytest.approx(log_loss(labels_N, probs_NC / probs_NC.sum(1, keepdim=True)), rel=1e-9)


def test_certain_rows_belong_to_the_last_bin():
    log_probs_NC = torch.tensor([[0.0, -800.0], [math.log(0.95), math.log(0.05)]], dtype=torch.float64)
    bins = reliability_bins(score_rows(log_probs_NC, torch.tensor([0, 0])), 10)
    assert [one["count"] for one in bins] == [0] * 9 + [2]
    assert bins[-1]["accuracy"] == 1.0 and bins[0]["accuracy"] is None
    assert evaluate(log_probs_NC, torch.tensor([0, 0]), bins=10)["ece"] == pytest.approx(0.025)


def test_tied_confidences_do_not_depend_on_row_order():
    log_probs_NC = torch.tensor([[0.7, 0.3]] * 6 + [[0.2, 0.8]] * 4, dtype=torch.float64).log()
    labels_N = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1, 0, 1])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert evaluate(log_probs_NC, labels_N, 3) == pytest.approx(evaluate(log_probs_NC[order], labels_N[order], 3))


def test_resampled_metrics_equal_metrics_of_the_resampled_rows():
    logits_MNC, labels_N = fake_logits(2, 80, 3, seed=1)
    log_probs_NC = mean_probabilities(logits_MNC).round(decimals=1)  # rounding makes ties
    log_probs_NC = torch.log_softmax(log_probs_NC, dim=-1)
    draws_SN = next(row_draws(80, 7, seed=0))
    fast = draw_metrics(score_rows(log_probs_NC, labels_N), draws_SN, 15)
    for s, rows in enumerate(draws_SN):
        slow = evaluate(log_probs_NC[rows], labels_N[rows])
        assert {name: float(fast[name][s]) for name in CLASS_METRICS} == pytest.approx(slow, abs=1e-12)


def test_rows_that_are_not_distributions_are_refused():
    with pytest.raises(DataError, match=r"'val'.*log-probabilities"):
        evaluate(torch.zeros(3, 4), torch.tensor([0, 1, 2]), name="val")
    with pytest.raises(DataError, match="empty"):
        evaluate(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="labels range"):
        evaluate(torch.log_softmax(torch.zeros(3, 4), -1), torch.tensor([0, 1, 4]))


def test_bootstrap_is_seeded_chunk_free_and_covers_the_point(monkeypatch):
    logits_MNC, labels_N = fake_logits(3, 300, 4, seed=2)
    scores = score_rows(mean_probabilities(logits_MNC), labels_N)
    first, again = (bootstrap_metrics(scores, 15, 200, seed=3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in CLASS_METRICS)
    assert not torch.equal(first["nll"], bootstrap_metrics(scores, 15, 200, seed=4)["nll"])
    monkeypatch.setattr("raylora.ensemble.bootstrap.CHUNK", 900)
    assert torch.equal(first["nll"], bootstrap_metrics(scores, 15, 200, seed=3)["nll"])
    point = point_metrics(scores, 15)
    low, high = interval(first["nll"], 0.95)
    assert low < point["nll"] < high
    expected_error = scores.nll_N.std().item() / math.sqrt(300)
    assert (high - low) / 2 / 1.96 == pytest.approx(expected_error, rel=0.25)


def test_token_bootstrap_resamples_whole_documents():
    nll_N = torch.tensor([1.0] * 50 + [3.0] * 50, dtype=torch.float64)
    clustered = bootstrap_token_nll(nll_N, ["a"] * 50 + ["b"] * 50, 400, seed=0)
    assert set(clustered.tolist()) == {1.0, 2.0, 3.0}
    independent = bootstrap_token_nll(nll_N, [str(i) for i in range(100)], 400, seed=0)
    assert independent.std() < clustered.std() / 4


def test_temperature_finds_the_scale_that_was_put_in():
    generator = torch.Generator().manual_seed(0)
    honest_NC = torch.randn(8_000, 3, generator=generator) * 1.5
    labels_N = torch.multinomial(torch.softmax(honest_NC, -1), 1, generator=generator)[:, 0]
    fitted = fit_temperature((honest_NC * 2.5)[None], labels_N)
    assert fitted.value == pytest.approx(2.5, rel=0.08)
    assert fitted.nll_after < fitted.nll_before and not fitted.degenerate


def test_temperature_never_worsens_the_pooled_validation_nll():
    logits_MNC, labels_N = fake_logits(5, 300, 4, seed=4)
    for rule in ("mean_probabilities", "mean_logits"):
        fitted = fit_temperature(logits_MNC, labels_N, rule)
        assert fitted.nll_after <= fitted.nll_before
        grid = [evaluate(mean_probabilities(logits_MNC, t), labels_N, names=("nll",))["nll"] for t in (0.5, 1, 2, 4)]
        if rule == "mean_probabilities":
            assert fitted.nll_after <= min(grid) + 1e-9


@pytest.mark.parametrize("flip", [False, True])
def test_a_split_that_cannot_tell_leaves_the_temperature_at_one(flip):
    labels_N = torch.arange(20) % 2
    logits_NC = torch.nn.functional.one_hot(1 - labels_N if flip else labels_N, 2) * 3.0
    fitted = fit_temperature(logits_NC[None], labels_N)
    assert fitted.value == 1.0 and fitted.degenerate and fitted.nll_before == fitted.nll_after


def test_detection_is_oriented_and_counts_ties_half():
    assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9])) == 1.0
    assert auroc(torch.tensor([0.1, 0.5]), torch.tensor([0.5, 0.9])) == pytest.approx(3.5 / 4)
    sure_MNC = torch.tensor([[[6.0, 0.0, 0.0]] * 3] * 2)
    unsure_MNC = torch.tensor([[[0.3, 0.0, 0.0]] * 3, [[0.0, 0.3, 0.0]] * 3])
    familiar, foreign = (foreign_scores(logits, "mean_probabilities") for logits in (sure_MNC, unsure_MNC))
    assert {name: auroc(familiar[name], foreign[name]) for name in familiar} == dict.fromkeys(familiar, 1.0)
    assert set(familiar) == {"max_probability", "predictive_entropy", "mutual_information"}
    assert "mutual_information" not in foreign_scores(sure_MNC[:1], "mean_probabilities")


def test_bootstrapped_auroc_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    familiar_N = torch.randn(60, generator=generator).round(decimals=1)
    foreign_K = (torch.randn(40, generator=generator) + 1).round(decimals=1)
    fast_S = bootstrap_auroc(familiar_N, foreign_K, 5, seed=7)
    slow = []
    for rows_N, rows_K in zip(next(row_draws(60, 5, 7)), next(row_draws(40, 5, 8)), strict=True):
        values = torch.cat([familiar_N[rows_N], foreign_K[rows_K]])
        slow.append(roc_auc_score(np.r_[np.zeros(60), np.ones(40)], values))
    assert fast_S.tolist() == pytest.approx(slow)


def test_histograms_share_edges_and_sum_to_one_even_when_all_scores_agree():
    found = histograms(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.3, 1.5]), bins=8)
    assert len(found["edges"]) == 9 and sum(found["test"]) == pytest.approx(1) == sum(found["foreign"])
    assert sum(histograms(torch.zeros(3), torch.zeros(2))["test"]) == pytest.approx(1)
