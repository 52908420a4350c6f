"""The whole summary: what it contains, the identities it must keep, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ensemble_fakes import fake_group, fake_language_group

from raylora.ensemble import evaluate, mean_probabilities, summarize
from raylora.ensemble.groups import check_jensen, member_subsets
from raylora.ensemble.outputs.tokens import TokenPredictions
from raylora.errors import DataError, RayloraError, SpecError
from raylora.spec.evaluation import EvaluationSpec

FEW = EvaluationSpec(bootstrap_samples=50)


@pytest.fixture(scope="module")
def summary():
    return summarize({"ensemble": fake_group(5), "mc_dropout": fake_group(3, seed=7, noise=0.5)}, FEW)


def test_summary_is_json_and_has_every_part(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary) == {
        "sets",
        "confidence",
        "output",
        "aggregate",
        "members",
        "ensemble",
        "mean_member",
        "baselines",
        "gains",
        "m_curve",
        "pairwise_kl",
        "plots",
    }
    assert summary["sets"]["shifted"] == {"role": "in_distribution", "rows": 200}
    assert [member["index"] for member in summary["members"]] == list(range(5))
    assert set(summary["ensemble"]["eval"]) == {"test", "shifted"}
    assert set(summary["ensemble"]["ood"]) == {"foreign"}
    assert set(summary["baselines"]) == {"single", "mc_dropout"}
    assert summary["baselines"]["mc_dropout"]["members"] == 3
    assert set(summary["ensemble"]["eval"]["test"]["intervals"]) == {
        "accuracy",
        "nll",
        "brier",
        "ece",
        "adaptive_ece",
        "aurc",
    }


def test_every_field_is_documented(summary):
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    described = summary["ensemble"]
    fields = {*summary, *described, *described["eval"]["test"], *described["ood"]["foreign"], *summary["plots"]}
    assert [field for field in sorted(fields) if f"`{field}" not in text and f" {field}`" not in text] == []


def test_numbers_are_those_of_the_plain_functions(summary):
    test = fake_group(5)[1]
    expected = evaluate(mean_probabilities(test.values), test.labels())
    assert {key: summary["ensemble"]["eval"]["test"][key] for key in expected} == pytest.approx(expected)
    single = summary["baselines"]["single"]
    assert single["eval"]["test"]["nll"] == summary["members"][0]["eval"]["test"]["nll"]
    assert single["eval"]["test"]["mutual_information"] == 0
    nlls = [member["eval"]["test"]["nll"] for member in summary["members"]]
    mean = summary["mean_member"]["eval"]["test"]["nll"]
    assert mean["mean"] == pytest.approx(sum(nlls) / 5)
    assert mean["standard_error"] == pytest.approx(torch.tensor(nlls, dtype=torch.float64).std().item() / math.sqrt(5))


def test_jensen_temperature_and_gains_agree(summary):
    for name, pooled in summary["ensemble"]["eval"].items():
        mean = summary["mean_member"]["eval"][name]
        assert pooled["nll"] <= mean["nll"]["mean"] and pooled["brier"] <= mean["brier"]["mean"]
        gain = summary["gains"][name]["over_mean_member"]["nll"]
        assert gain["gain"] == pytest.approx(mean["nll"]["mean"] - pooled["nll"])
        assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1]
        assert pooled["predictive_entropy"] == pytest.approx(pooled["expected_entropy"] + pooled["mutual_information"])
    assert summary["members"][0]["temperature"] > 1.2  # the fakes are overconfident
    scaled = summary["baselines"]["single"]["eval"]["test"]
    assert scaled["temperature_scaled"]["nll"] < scaled["nll"]


def test_curve_over_members_starts_at_the_mean_and_ends_at_the_ensemble(summary):
    curve = summary["m_curve"]["test"]
    assert [point["members"] for point in curve] == [1, 2, 3, 4, 5]
    assert [point["subsets"] for point in curve] == [5, 10, 10, 5, 1]
    assert curve[0]["nll"] == pytest.approx(summary["mean_member"]["eval"]["test"]["nll"]["mean"])
    assert curve[-1]["nll"] == pytest.approx(summary["ensemble"]["eval"]["test"]["nll"])
    assert curve[-1]["nll_std"] == 0
    assert [point["nll"] for point in curve] == sorted((point["nll"] for point in curve), reverse=True)


def test_plot_data_is_thin(summary):
    plots = summary["plots"]
    assert all(len(curve["risk"]) <= 200 for by_group in plots["risk_coverage"].values() for curve in by_group.values())
    ensemble = plots["reliability"]["test"]["ensemble"]
    assert sum(one["count"] for one in ensemble["before"]) == 200 == sum(one["count"] for one in ensemble["after"])
    assert plots["risk_coverage"]["test"]["ensemble"]["coverage"][-1] == 1.0
    risk = plots["risk_coverage"]["test"]["ensemble"]["risk"][-1]
    assert risk == pytest.approx(1 - summary["ensemble"]["eval"]["test"]["accuracy"])


def test_the_order_of_members_changes_no_result_of_the_ensemble():
    order = [2, 0, 3, 1]
    group = fake_group(4)
    shuffled = [replace(part, values=part.values[order]) for part in group]
    first, second = (summarize({"ensemble": one}, FEW) for one in (group, shuffled))

    def numbers(found):
        return {**flatten(found["ensemble"]), **flatten(found["mean_member"]), **flatten(found["m_curve"])}

    assert numbers(first) == pytest.approx(numbers(second), abs=1e-9)


def test_identical_members_equal_a_single_one():
    one = fake_group(1)
    many = [replace(part, values=part.values.expand(4, -1, -1)) for part in one]
    found = summarize({"ensemble": many}, FEW)
    ensemble, single = found["ensemble"]["eval"]["test"], found["baselines"]["single"]["eval"]["test"]
    assert flatten(ensemble) == pytest.approx(flatten(single), abs=1e-7)
    assert found["gains"]["test"]["over_single"]["nll"]["gain"] == pytest.approx(0, abs=1e-12)


def test_one_member_without_validation_or_foreign_sets_or_intervals():
    test = fake_group(1)[1]
    found = summarize({"ensemble": [test]}, EvaluationSpec(bootstrap_samples=0), "mean_logits")
    assert found["mean_member"]["eval"]["test"]["nll"]["standard_error"] is None
    assert found["ensemble"]["ood"] == {} and "temperature" not in found["ensemble"]
    assert "intervals" not in found["ensemble"]["eval"]["test"]
    assert found["gains"]["test"]["over_single"] == {
        metric: {"gain": 0.0} for metric in ("accuracy", "nll", "brier", "ece")
    }
    json.dumps(found, allow_nan=False)


def test_a_violated_identity_is_loud(monkeypatch):
    with pytest.raises(RayloraError, match=r"'mine'.*nll"):
        check_jensen(1.1, [1.0, 1.0], "nll", "mine")
    monkeypatch.setattr(  # a "faster" aggregation that is subtly wrong
        "raylora.ensemble.outputs.classes.aggregate_logits",
        lambda logits, rule, temperature=1.0, weights_M=None: torch.log_softmax(
            logits.double().mean(0) * 3 * len(logits), -1
        ),
    )
    with pytest.raises(RayloraError, match="Jensen"):
        summarize({"ensemble": fake_group(3)}, FEW)


def test_groups_that_cannot_be_compared_are_refused():
    group = fake_group(2)
    with pytest.raises(DataError, match="no predictions of the ensemble"):
        summarize({"mc_dropout": group}, FEW)
    with pytest.raises(DataError, match="no test set"):
        summarize({"ensemble": group[:1]}, FEW)
    with pytest.raises(DataError, match="'test': group 'other' saw other rows"):
        summarize({"ensemble": group, "other": [replace(group[1], ids=group[1].ids[::-1])]}, FEW)
    with pytest.raises(DataError, match="'extra' of group 'other'"):
        summarize({"ensemble": group, "other": [replace(group[1], name="extra")]}, FEW)
    with pytest.raises(DataError, match=r"'test'.*no labels"):
        summarize({"ensemble": [replace(group[1], labels_N=None)]}, FEW)
    with pytest.raises(DataError, match="twice"):
        summarize({"ensemble": [group[1], group[1]]}, FEW)
    with pytest.raises(SpecError, match="median cannot aggregate predictions of classes"):
        summarize({"ensemble": group}, FEW, "median")


def test_subsets_are_complete_when_small_and_distinct_when_large():
    assert member_subsets(4, 3, seed=0) == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
    many = member_subsets(12, 6, seed=0)
    assert len(set(many)) == 10 and many == member_subsets(12, 6, seed=0)


def test_language_modeling_by_hand():
    logprobs_MN = torch.log(torch.tensor([[0.5, 0.2], [0.1, 0.4]]))
    part = TokenPredictions(name="test", role="test", ids=["a", "b"], values=logprobs_MN)
    found = summarize({"ensemble": [part]}, EvaluationSpec(bootstrap_samples=0))
    nll = -(math.log(0.3) + math.log(0.3)) / 2
    assert found["output"] == "tokens"
    assert found["ensemble"]["eval"]["test"] == pytest.approx(
        {"nll": nll, "tokenwise_nll": nll, "sequencewise_nll": nll, "perplexity": 1 / 0.3, "tokens": 2, "documents": 2}
    )


def test_both_mixtures_of_a_whole_text_by_hand():
    logprobs_MN = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.4, 0.3]]))
    part = TokenPredictions(name="test", role="test", ids=["a", "a", "b"], values=logprobs_MN)
    found = summarize({"ensemble": [part]}, EvaluationSpec(bootstrap_samples=0))
    tokenwise = -(math.log(0.3) + math.log(0.3) + math.log(0.6)) / 2
    sequencewise = -(math.log((0.5 * 0.2 + 0.1 * 0.4) / 2) + math.log(0.6)) / 2
    test = found["ensemble"]["eval"]["test"]
    assert test["tokenwise_nll"] == pytest.approx(tokenwise)
    assert test["sequencewise_nll"] == pytest.approx(sequencewise)
    members = [-(math.log(0.5 * 0.2) + math.log(0.9)) / 2, -(math.log(0.1 * 0.4) + math.log(0.3)) / 2]
    mean = found["mean_member"]["eval"]["test"]
    assert mean["tokenwise_nll"]["mean"] == mean["sequencewise_nll"]["mean"] == pytest.approx(sum(members) / 2)
    gain = found["gains"]["test"]["over_mean_member"]["sequencewise_nll"]["gain"]
    assert gain == pytest.approx(sum(members) / 2 - sequencewise)


def test_language_modeling_keeps_jensen_and_has_intervals():
    found = summarize({"ensemble": fake_language_group(4), "checkpoints": fake_language_group(2, seed=3)}, FEW)
    json.dumps(found, allow_nan=False)
    pooled = found["ensemble"]["eval"]["test"]
    assert pooled["nll"] < found["mean_member"]["eval"]["test"]["nll"]["mean"]
    assert pooled["intervals"]["nll"][0] < pooled["nll"] < pooled["intervals"]["nll"][1]
    assert found["gains"]["test"]["over_mean_member"]["nll"]["interval"][0] > 0
    assert found["m_curve"]["shifted"][-1]["perplexity"] == pytest.approx(
        found["ensemble"]["eval"]["shifted"]["perplexity"]
    )
    with pytest.raises(SpecError, match="mean_logits cannot aggregate predictions of tokens"):
        summarize({"ensemble": fake_language_group(2)}, FEW, "mean_logits")


def flatten(value, path=()):
    """Return the numbers of a nested structure by their path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flatten(part, (*path, key)).items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in flatten(part, (*path, i)).items()}
    return {path: value} if isinstance(value, (int, float)) and path[-1] not in ("degenerate", "members") else {}
