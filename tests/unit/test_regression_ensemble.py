"""A regression's numbers against scipy, torchmetrics and plain loops; identities, and what has no number."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torchmetrics.functional as tm
from torch import Tensor

from raylora.ensemble import Predictions, summarize
from raylora.ensemble.bootstrap import row_draws
from raylora.ensemble.gaussian import FLOOR, coverage, epistemic_std, fit_noise, mixture_nll, total_std
from raylora.ensemble.outputs.value import ValuePredictions, pairwise_kl
from raylora.ensemble.regression_metrics import VALUE_METRICS, draw_metrics, point_metrics, score_values
from raylora.errors import DataError, SpecError
from raylora.spec.evaluation import EvaluationSpec

FEW = EvaluationSpec(bootstrap_samples=40)


def fake(members: int = 4, rows: int = 200, seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return values M x N that share an error and have one of their own, and labels of half points, so with ties."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = (torch.rand(rows, generator=generator) * 10).round() / 2
    shared_N = torch.randn(rows, generator=generator) * 0.6
    return labels_N + shared_N + noise * torch.randn(members, rows, generator=generator), labels_N


def group_of(members: int = 4, seed: int = 0, rows: int = 200) -> list[Predictions]:
    sets = []
    for offset, (name, role) in enumerate((
        ("validation", "validation"), ("test", "test"), ("shifted", "in_distribution"),
        ("foreign", "out_of_distribution"),
    )):
        labels_N = fake(1, rows, offset)[1]
        real_MN = fake(members, rows, offset, noise=1.5 if name == "foreign" else 0.5)[0]
        real_MN = real_MN + 0.1 * torch.randn(members, rows, generator=torch.Generator().manual_seed(99 * seed))
        sets.append(ValuePredictions(
            name=name, role=role, ids=[f"{name}-{n}" for n in range(rows)], values=real_MN,
            labels_N=None if name == "foreign" else labels_N,
        ))
    return sets


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return summarize({"ensemble": group_of(5), "mc_dropout": group_of(3, seed=7)}, FEW)


# --- one number at a time ----------------------------------------------------------------------------------
def test_metrics_are_those_of_the_libraries() -> None:
    real_MN, labels_N = fake()
    value_N, label_N = real_MN.double().mean(0), labels_N.double()
    found = point_metrics(score_values(real_MN, labels_N, 0.7))
    assert list(found) == list(VALUE_METRICS)
    assert found["rmse"] == pytest.approx(float(tm.mean_squared_error(value_N, label_N, squared=False)), rel=1e-12)
    assert found["mae"] == pytest.approx(float(tm.mean_absolute_error(value_N, label_N)), rel=1e-12)
    assert found["r2"] == pytest.approx(float(tm.r2_score(value_N, label_N)), rel=1e-12)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(value_N, label_N).statistic, rel=1e-12)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(value_N, label_N).statistic, rel=1e-12)


def test_the_mixtures_nll_and_coverage_are_those_of_plain_loops() -> None:
    real_MN, labels_N = fake(3, 50)
    std = 0.8
    expected, inside = [], []
    for n, label in enumerate(labels_N.tolist()):
        values = real_MN[:, n].double().numpy()
        expected.append(-math.log(np.mean([scipy.stats.norm.pdf(label, value, std) for value in values])))
        low, high = scipy.stats.norm.interval(0.9, values.mean(), math.sqrt(std**2 + values.var()))
        inside.append(low <= label <= high)
    np.testing.assert_allclose(mixture_nll(real_MN, labels_N, std), expected, rtol=1e-10)
    assert coverage(real_MN, labels_N, std, [0.9])[0].tolist() == inside
    np.testing.assert_allclose(epistemic_std(real_MN), real_MN.double().numpy().std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total_std(real_MN, std) ** 2, std**2 + real_MN.double().numpy().var(axis=0))


@pytest.mark.parametrize(("members", "spread"), [(1, 0.5), (2, 0.1), (4, 0.5), (4, 6.0), (8, 2.0)])
def test_the_fitted_noise_is_the_most_likely_one(members: int, spread: float) -> None:
    real_MN, labels_N = fake(members, 120, noise=spread)
    found = fit_noise(real_MN, labels_N)
    grid = np.geomspace(1e-3, 30, 4000)  # brute force
    values = [float(mixture_nll(real_MN, labels_N, std).mean()) for std in grid]
    assert found.nll <= min(values) + 1e-9
    assert found.std == pytest.approx(grid[int(np.argmin(values))], rel=3e-3) and not found.degenerate
    assert found.nll == pytest.approx(float(mixture_nll(real_MN, labels_N, found.std).mean()), rel=1e-12)
    if members == 1:
        mse = float(((real_MN[0].double() - labels_N.double()) ** 2).mean())
        assert found.std == pytest.approx(mse**0.5, rel=1e-9)
        assert found.nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e * found.std**2), rel=1e-9)


def test_labels_that_are_hit_exactly_leave_a_floor_and_say_so() -> None:
    labels_N = fake()[1]
    found = fit_noise(labels_N.expand(3, -1), labels_N)
    assert found.degenerate and math.isfinite(found.nll)
    assert found.std == pytest.approx(FLOOR * float(labels_N.double().std(correction=0)))
    constant = fit_noise(torch.ones(2, 5), torch.ones(5))
    assert constant.degenerate and constant.std == pytest.approx(FLOOR)


def test_a_resample_is_scored_as_if_it_were_a_set() -> None:
    real_MN, labels_N = fake(3, 60)
    scores = score_values(real_MN, labels_N, 0.7)
    draws_SN = next(row_draws(60, 5, seed=1))
    drawn = draw_metrics(scores, draws_SN)
    for s, draw_N in enumerate(draws_SN):
        alone = point_metrics(score_values(real_MN[:, draw_N], labels_N[draw_N], 0.7))
        assert {key: float(drawn[key][s]) for key in VALUE_METRICS} == pytest.approx(alone, rel=1e-10)


def test_shuffling_rows_changes_nothing_and_shuffling_members_next_to_nothing() -> None:
    real_MN, labels_N = fake()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    noise = fit_noise(real_MN, labels_N)
    expected = point_metrics(score_values(real_MN, labels_N, noise.std))
    assert fit_noise(real_MN[:, order], labels_N[order]).std == pytest.approx(noise.std, rel=1e-7)
    assert point_metrics(score_values(real_MN[:, order], labels_N[order], noise.std)) == pytest.approx(expected)
    assert point_metrics(score_values(real_MN[[2, 0, 3, 1]], labels_N, noise.std)) == pytest.approx(expected, abs=1e-9)


def test_equal_predictions_have_no_correlation_and_equal_labels_no_r2() -> None:
    labels_N = fake()[1]
    found = point_metrics(score_values(torch.full((3, 200), 0.1), labels_N, 1.0))
    assert found["pearson"] is None and found["spearman"] is None and found["r2"] is not None and found["r2"] <= 0
    found = point_metrics(score_values(fake()[0], torch.ones(200), 1.0))
    assert found["pearson"] is None and found["spearman"] is None and found["r2"] is None
    assert found["rmse"] == pytest.approx(float((fake()[0].mean(0) - 1).square().mean().sqrt()))


def test_kl_between_members_is_that_of_their_gaussians() -> None:
    real_MN, std = fake(3, 40)[0], 0.6
    kl_MM = pairwise_kl(real_MN, std)
    one, two = (torch.distributions.Normal(real_MN[m].double(), torch.tensor(std).double()) for m in (0, 2))
    assert float(kl_MM[0, 2]) == pytest.approx(float(torch.distributions.kl_divergence(one, two).mean()), rel=1e-6)
    assert torch.equal(kl_MM, kl_MM.T) and kl_MM.diagonal().tolist() == [0, 0, 0]


# --- the whole summary -------------------------------------------------------------------------------------
def test_the_summary_is_json_with_the_parts_of_every_other(summary: dict[str, Any]) -> None:
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == ["sets", "confidence", "output", "aggregate", "members", "ensemble", "mean_member",
                             "baselines", "gains", "m_curve", "pairwise_kl", "plots"]
    assert summary["output"] == "value" and set(summary["baselines"]) == {"single", "mc_dropout"}
    tested = summary["ensemble"]["eval"]["test"]
    assert set(tested["intervals"]) == set(VALUE_METRICS)
    assert all(low <= tested[key] <= high for key, (low, high) in tested["intervals"].items())
    assert len(summary["pairwise_kl"]["foreign"]) == 5


def test_every_field_is_documented(summary: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    described = summary["ensemble"]
    fields = {*summary, *described, *described["eval"]["test"], *described["ood"]["foreign"], *summary["plots"],
              *described["noise_fit"], *summary["plots"]["values"]["test"]}
    assert [field for field in sorted(fields) if f"`{field}" not in text and f" {field}`" not in text] == []


def test_the_ensemble_is_the_mean_with_a_noise_of_its_own(summary: dict[str, Any]) -> None:
    validation, test = group_of(5)[:2]
    noise = fit_noise(validation.values, validation.labels())
    assert summary["ensemble"]["noise_std"] == noise.std
    expected = point_metrics(score_values(test.values, test.labels(), noise.std))
    assert {key: summary["ensemble"]["eval"]["test"][key] for key in VALUE_METRICS} == expected
    single, first = summary["baselines"]["single"], summary["members"][0]
    assert single["eval"]["test"]["nll"] == first["eval"]["test"]["nll"] and single["noise_std"] > noise.std
    assert single["eval"]["test"]["epistemic_std"] == 0
    rmses = [member["eval"]["test"]["rmse"] for member in summary["members"]]
    assert summary["mean_member"]["eval"]["test"]["rmse"]["mean"] == pytest.approx(sum(rmses) / 5)
    assert summary["ensemble"]["eval"]["test"]["rmse"] < min(rmses)


def test_gains_and_curve_agree_with_the_scores(summary: dict[str, Any]) -> None:
    for name in ("test", "shifted"):
        pooled, mean = summary["ensemble"]["eval"][name], summary["mean_member"]["eval"][name]
        gains = summary["gains"][name]["over_mean_member"]
        assert gains["rmse"]["gain"] == pytest.approx(mean["rmse"]["mean"] - pooled["rmse"])
        assert gains["pearson"]["gain"] == pytest.approx(pooled["pearson"] - mean["pearson"]["mean"])
        assert gains["nll"]["interval"][0] <= gains["nll"]["gain"] <= gains["nll"]["interval"][1]
        curve = summary["m_curve"][name]
        assert [point["subsets"] for point in curve] == [5, 10, 10, 5, 1]
        for metric in ("rmse", "nll"):
            assert curve[0][metric] == pytest.approx(mean[metric]["mean"])
            assert curve[-1][metric] == pytest.approx(pooled[metric]) and curve[-1][f"{metric}_std"] == 0


def test_disagreement_detects_foreign_rows_only_where_there_is_somebody_to_disagree(summary: dict[str, Any]) -> None:
    found = summary["ensemble"]["ood"]["foreign"]
    assert found["epistemic_std"] > 0.8 and found["intervals"]["epistemic_std"][0] < found["epistemic_std"]
    assert found["uncertainty"]["epistemic_std"] > summary["ensemble"]["eval"]["test"]["epistemic_std"]
    assert "epistemic_std" not in summary["baselines"]["single"]["ood"]["foreign"]
    plots = summary["plots"]
    assert list(plots["ood_histograms"]["foreign"]) == ["epistemic_std"]
    assert all(len(column) == 120 for column in plots["values"]["test"].values())
    curve = plots["coverage"]["test"]["ensemble"]
    share = summary["ensemble"]["eval"]["test"]["coverage_95"]
    assert curve["observed"][curve["nominal"].index(0.95)] == pytest.approx(share)
    assert curve["observed"] == sorted(curve["observed"])


def test_members_that_all_say_one_number_still_make_a_summary() -> None:
    group = [replace(part, values=torch.full_like(part.values, 2.5)) for part in group_of(3)]
    found = summarize({"ensemble": group}, FEW)
    json.dumps(found, allow_nan=False)
    tested = found["ensemble"]["eval"]["test"]
    assert tested["pearson"] is None and "pearson" not in tested["intervals"]
    labels_N = next(part for part in group if part.name == "test").labels_N
    assert tested["rmse"] == pytest.approx(float((2.5 - labels_N).square().mean().sqrt()), rel=1e-5)
    assert "pearson" not in found["mean_member"]["eval"]["test"] and "pearson" not in found["gains"]["test"][
        "over_single"]
    assert found["gains"]["test"]["over_single"]["rmse"]["gain"] == pytest.approx(0)
    assert found["ensemble"]["ood"]["foreign"]["epistemic_std"] == 0.5


def test_one_member_equals_the_single_and_gains_nothing() -> None:
    found = summarize({"ensemble": group_of(1)}, EvaluationSpec(bootstrap_samples=0))
    assert found["ensemble"]["eval"] == found["baselines"]["single"]["eval"]
    assert "intervals" not in found["ensemble"]["eval"]["test"]
    assert {one["gain"] for one in found["gains"]["test"]["over_mean_member"].values()} == {0.0}
    assert found["mean_member"]["eval"]["test"]["nll"]["standard_error"] is None


def test_what_cannot_be_summarized_is_refused() -> None:
    group = group_of(2)
    with pytest.raises(SpecError, match="mean_logits cannot aggregate predictions of value"):
        summarize({"ensemble": group}, FEW, "mean_logits")
    with pytest.raises(DataError, match="fitted on a validation set"):
        summarize({"ensemble": group[1:]}, FEW)
    fields: dict[str, Any] = {"name": "mine", "role": "test", "ids": ["a", "b"]}
    values_MN = torch.zeros(2, 2)
    with pytest.raises(DataError, match=r"'mine': labels are torch.int64"):
        ValuePredictions(**fields, values=values_MN, labels_N=torch.tensor([1, 2]))
    with pytest.raises(DataError, match="labels are NaN or infinite"):
        ValuePredictions(**fields, values=values_MN, labels_N=torch.tensor([1.0, math.nan]))
    with pytest.raises(DataError, match="labels of shape"):
        ValuePredictions(**fields, values=values_MN, labels_N=torch.tensor([1.0]))
    with pytest.raises(DataError, match=r"members \[1\] predict NaN or infinity"):
        ValuePredictions(**fields, values=torch.tensor([[1.0, 2.0], [math.inf, 1.0]]))
