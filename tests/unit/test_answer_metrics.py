"""Right and wrong answers by hand, and what doubts are worth."""

from __future__ import annotations

import math

import pytest
import torch

from raylora.ensemble.answer_metrics import Doubts, check_metrics, describe_answers, score_answers
from raylora.errors import DataError, UsageError

CASES = [
    ("exact_match", "The Box.", "box", 1.0), ("exact_match", "boxes", "box", 0.0), ("exact_match", "", "box", 0.0),
    ("f1", "a red box", "the red crate", 0.5), ("f1", "", "", 1.0), ("f1", "", "box", 0.0),
    ("f1", "box box", "box", 2 / 3),
    ("contains", "It is in the red box, I think.", "red box", 1.0), ("contains", "reddish box", "red", 0.0),
    ("number", "so 3 + 4 = 7", "7", 1.0), ("number", "1,000.0", "1000", 1.0), ("number", "1/3", "2/6", 1.0),
    ("number", "about seven", "7", 0.0), ("number", "-7", "7", 0.0), ("number", "5/0", "5", 0.0),
    ("choice", "(B) because ...", "B", 1.0), ("choice", "The answer is C.", "c", 1.0), ("choice", "Both", "B", 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "reference", "expected"), CASES)
def test_one_answer(metric: str, answer: str, reference: str, expected: float) -> None:
    assert score_answers([answer], [reference], [metric])[metric].item() == pytest.approx(expected)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown metric 'exact' of answers"):
        check_metrics(["exact"])


def test_doubts_that_know_and_doubts_that_do_not() -> None:
    right = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0] * 20, dtype=torch.float64)
    knows = 1 - right + 0.01 * torch.arange(100)
    doubts = Doubts({"nll": knows, "nothing": torch.zeros(100)}, confidence_N=0.6 * torch.ones(100))
    found = describe_answers({"exact_match": right, "f1": right / 2}, doubts, samples=50)
    assert found["metrics"]["exact_match"]["value"] == pytest.approx(0.6)
    assert found["metrics"]["f1"]["value"] == pytest.approx(0.3)
    low, high = found["metrics"]["exact_match"]["interval"]
    assert low < 0.6 < high
    by_hand = sum(float(a > b) + 0.5 * float(a == b) for a in knows[right == 0] for b in knows[right == 1]) / (40 * 60)
    assert found["error_auroc"]["nll"]["value"] == pytest.approx(by_hand) and by_hand > 0.9
    assert found["error_auroc"]["nothing"]["value"] == 0.5
    assert found["risk_coverage"]["risk"][-1] == pytest.approx(0.4) and found["risk_coverage"]["risk"][0] == 0
    assert found["ece"]["value"] == pytest.approx(0.0, abs=1e-6)  # sure to 60 %, and right in 60 % of cases


def test_without_wrong_answers_no_doubt_can_be_judged() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    found = describe_answers({"exact_match": ones}, Doubts({"nll": ones}, ones), samples=0)
    assert found["error_auroc"] == {"nll": None} and "interval" not in found["ece"]
    assert not math.isnan(found["risk_coverage"]["aurc"])
    with pytest.raises(DataError, match="no answers"):
        describe_answers({"exact_match": ones[:0]}, Doubts({"nll": ones[:0]}, ones[:0]))
